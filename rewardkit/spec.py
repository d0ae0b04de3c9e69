"""One syntax for the four open sets (rewards, rules, tasks, engines): `judge model=m1 votes=3`.

A spec is a string, or a mapping {name: judge, model: m1, votes: 3} as YAML writes it. Names are looked up in a
visible dict of "module:function"; `file.py:function` loads the user's own function. Options are checked against
the function's signature and converted by its annotations, so a wrong one is found before any model is loaded.
There is no nesting and no expression language: a value is a word, or a quoted string.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import shlex
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import OptionError, unknown


@dataclass(frozen=True)
class Spec:
    """A name and its options, as the user wrote them."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([shlex.quote(self.name), *(f"{k}={_show(v)}" for k, v in self.options.items())])


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return shlex.quote(str(value))


def parse(source: str | Mapping[str, Any] | Spec) -> Spec:
    """Read `name key=value ...` or {"name": ..., key: value}."""
    if isinstance(source, Spec):
        return source
    if isinstance(source, Mapping):
        options = dict(source)
        if "name" not in options:
            raise OptionError(f"a spec written as a mapping needs a 'name': {dict(source)}")
        return Spec(str(options.pop("name")), options)
    try:
        words = shlex.split(source)
    except ValueError as error:
        raise OptionError(f"cannot read the spec {source!r}: {error}") from None
    if not words:
        raise OptionError("a spec is empty; it should read like: judge model=m1 votes=3")
    options = {}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise OptionError(f"in the spec {source!r}, '{word}' is not key=value")
        options[key] = value
    return Spec(words[0], options)


def build(source: str | Mapping[str, Any] | Spec, known: Mapping[str, str], kind: str, **given: Any) -> Any:
    """Make the object that a spec describes: call its factory with the checked options.

    known: name -> "module:function". given: arguments the caller supplies where the factory asks for them.
    A user's `file.py:function` is not a factory: it is returned itself, its options bound as keyword arguments.
    """
    spec = parse(source)
    function = resolve(spec, known, kind)
    takes = inspect.signature(function).parameters
    options = check(function, spec.options, f"{kind} '{spec.name}'", hidden=set(given), partial=own(spec))
    options |= {k: v for k, v in given.items() if k in takes}
    return functools.partial(function, **options) if own(spec) else function(**options)


def own(spec: Spec) -> bool:
    """Is this the user's own `file.py:function`?"""
    return ".py:" in spec.name


def resolve(spec: Spec, known: Mapping[str, str], kind: str) -> Callable[..., Any]:
    """The function that a spec names."""
    if own(spec):
        return _from_file(spec.name, kind)
    if spec.name not in known:
        raise unknown(kind, spec.name, [*known, "file.py:function"])
    module, _, function = known[spec.name].partition(":")
    return getattr(importlib.import_module(module), function)


def _from_file(name: str, kind: str) -> Callable[..., Any]:
    path, _, function = name.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise OptionError(f"{kind} '{name}': there is no file {path}")
    # Two files of the same name must not overwrite each other in sys.modules.
    tag = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]
    found = importlib.util.spec_from_file_location(f"_rewardkit_user_{tag}", file)
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        names = [n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")]
        raise unknown(f"function in {path}", function, names)
    return getattr(module, function)


def check(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    owner: str,
    hidden: Iterable[str] = (),
    partial: bool = False,
) -> dict[str, Any]:
    """`options` converted by the annotations of `function`; unknown, missing and impossible ones are errors.

    hidden: parameters which are not the user's to give. partial: the rest of the arguments comes later.
    """
    parameters = {k: p for k, p in inspect.signature(function).parameters.items() if k not in hidden}
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    names = {k for k, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in options:
        if key not in names and not free:
            raise unknown(f"option of {owner}", key, names)
    missing = [k for k in names if parameters[k].default is inspect.Parameter.empty and k not in options]
    if missing and not partial:
        raise OptionError(f"{owner} needs {', '.join(f'{k}=...' for k in sorted(missing))}")
    return {k: convert(v, hints.get(k, Any), f"option '{k}' of {owner}") for k, v in options.items()}


def convert(value: Any, hint: Any, owner: str) -> Any:
    """`value` (perhaps a string from the shell) as the annotated type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty:
        return _literal(value) if isinstance(value, str) else value
    if origin in (typing.Union, types.UnionType):
        if isinstance(value, str) and value.lower() in ("none", "null") and type(None) in arguments:
            return None
        if value is None and type(None) in arguments:
            return None
        errors = []
        for one in sorted((a for a in arguments if a is not type(None)), key=lambda a: a is str):
            try:
                return convert(value, one, owner)
            except OptionError as error:
                errors.append(error)
        raise errors[-1]
    if origin is typing.Literal:
        for choice in arguments:
            if value == choice or (isinstance(value, str) and value == _show(choice)):
                return choice
        raise unknown(f"value for {owner}:", str(value), map(str, arguments))
    return _scalar(value, origin or hint, owner)


def _scalar(value: Any, kind: Any, owner: str) -> Any:
    if kind is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() in words:
            return words[str(value).lower()]
        raise OptionError(f"{owner} is true or false, not {value!r}")
    if kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise OptionError(f"{owner} is a number, not {value!r}") from None
        if kind is float:
            return number
        if number == int(number):
            return int(number)
        raise OptionError(f"{owner} is a whole number, not {value!r}")
    if kind is str and isinstance(value, (str, Path, int, float)):
        return str(value)
    if kind is list and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(kind, type) and isinstance(value, kind):
        return value
    if kind is dict or isinstance(kind, type) and issubclass(kind, Mapping):
        if isinstance(value, Mapping):
            return dict(value)
        if isinstance(value, str):  # a:b,c:d
            pairs = [p.partition(":") for p in value.split(",") if p.strip()]
            if all(colon for _, colon, _ in pairs):
                return {k.strip(): v.strip() for k, _, v in pairs}
        raise OptionError(f"{owner} is written as a:b,c:d, not {value!r}")
    if isinstance(kind, type):
        raise OptionError(f"{owner} should be {kind.__name__}, not {value!r}")
    return value


def _literal(text: str) -> Any:
    """A word from the shell as the plain value it looks like."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
