"""Recipes: YAML that says which verbs to call. A leaf names a method and its settings, a composite lists steps.

Everything is checked before anything runs: verbs, arguments, specs, inputs. There are two control words: `repeat`, and
`only: {SETTING: VALUE}`, whose steps belong to one value of a setting (its values are those that some `only` names).
`{out} {i} {next} {last} {assets}` and the recipe's own settings are the only variables (a setting may use those of a loop:
where it stands in one, they are filled in each round); `preset=NAME` changes several
settings at once, to the values of a paper. When that is not enough, write ten lines of Python that call the verbs. The
verbs are handed in (`verbs.train` does it), so this module knows none.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
import typing
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from . import spec as specs
from .errors import OptionError, unknown
from .folders import MANIFEST, read_manifest, shipped
from .show import say

ASSETS = Path(__file__).parent / "assets"  # the embedded world
VARIABLE = re.compile(r"\{(\w+)\}")
LOOP = ("i", "next", "last")  # what a loop counts
Verbs = Mapping[str, Callable[..., Any]]
# An argument's checker returns (kind, path) pairs: what must exist, or be made by an earlier step.
Checks = Mapping[str, Callable[..., list[tuple[str, str]]]]


@dataclass(frozen=True)
class Recipe:
    """A recipe file, read. A leaf has a `method`, a composite has `steps`."""

    name: str
    about: str
    needs: dict[str, str]
    defaults: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)
    method: str | None = None
    steps: list[dict[str, Any]] | None = None
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One verb call, variables filled in."""

    verb: str
    arguments: dict[str, Any]
    looped: bool = False  # it stands in a loop


def names() -> dict[str, Path]:
    """The shipped recipes."""
    return {p.stem: p for p in sorted(shipped("recipes").glob("*.yaml"))}


def load(recipe: str | Path) -> Recipe:
    """Read a shipped recipe by its name, or a YAML file."""
    file = names().get(str(recipe), Path(recipe))
    if file.suffix not in (".yaml", ".yml") or not file.is_file():
        raise unknown("recipe", str(recipe), [*names(), "FILE.yaml"])
    source = file.read_text()
    try:
        body = yaml.safe_load(source)
    except yaml.YAMLError as error:
        raise OptionError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(body, dict) or ("method" in body) == ("steps" in body):
        raise OptionError(f"{file} is not a recipe: it needs either method: or steps:")
    for key in body:
        if key not in ("needs", "defaults", "presets", "method", "steps"):
            raise unknown(f"key in {file}", key, ("needs", "defaults", "presets", "method", "steps"))
    about = re.match(r"#\s*(?:\S+\.yaml\s*--\s*)?(.*)", source)
    notes = dict(re.findall(r"^\s+(\w+):[^#\n]*#\s*(.+)$", source, re.MULTILINE))
    return Recipe(
        file.stem, about[1] if about else "", dict(body.get("needs") or {}), dict(body.get("defaults") or {}), notes,
        body.get("method"), body.get("steps"), dict(body.get("presets") or {}),
    )  # fmt: skip


def settings(recipe: Recipe, given: Mapping[str, Any], also: tuple[str, ...] = ()) -> dict[str, Any]:
    """The recipe's defaults, then those of a preset, then what was given; unknown and missing settings are errors."""
    valid = {*recipe.needs, *recipe.defaults, *also}
    if recipe.presets and "preset" in given:
        if given["preset"] not in recipe.presets:
            raise unknown(f"preset of recipe '{recipe.name}'", str(given["preset"]), recipe.presets)
        given = recipe.presets[given["preset"]] | {k: v for k, v in given.items() if k != "preset"}
    for key in given:
        if key not in valid and not (recipe.steps and "." in key):
            raise unknown(f"setting of recipe '{recipe.name}'", key, valid)
    missing = [k for k in recipe.needs if k not in given and k not in recipe.defaults]
    if missing:
        wanted = ", ".join(f"{k}=... ({recipe.needs[k]})" for k in missing)
        raise OptionError(f"recipe '{recipe.name}' needs {wanted}")
    return recipe.defaults | dict(given)


def steps(recipe: Recipe, out: str | Path, given: Mapping[str, Any]) -> Generator[Step, bool, bool]:
    """The calls of a composite in order, loops unrolled. Sending True after a call ends the loop it stands in."""
    assert recipe.steps is not None
    values = settings(recipe, given)
    plain = {k: v for k, v in values.items() if "." not in k}
    for name, choices in _choices(recipe.steps).items():
        if str(values.get(name)) not in choices:
            raise unknown(f"value of {name} in recipe '{recipe.name}'", str(values.get(name)), choices)
    changes: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if "." in key:
            target, _, option = key.partition(".")
            changes.setdefault(target, {})[option] = value
    targets = {t for s in _flat(recipe.steps) for t in _targets(s, plain)}
    for target in changes:
        if target not in targets:
            raise unknown(f"step of recipe '{recipe.name}'", target, targets)
    variables = dict(plain) | {"out": str(out), "assets": str(ASSETS)}
    # A default may use {out} or another setting; a loop's own variables are left for the loop.
    later = {name: f"{{{name}}}" for name in LOOP}
    variables |= {k: _fill(v, variables | later | {k: v}, recipe) for k, v in plain.items()}
    return (yield from _unroll(recipe, recipe.steps, variables, changes, inside=False))


def _flat(listed: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for step in listed:
        yield from _flat(step["steps"]) if "steps" in step else [step]


def _choices(listed: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The settings that `only` looks at, and the values that it knows."""
    found: dict[str, list[str]] = {}
    for step in (s for s in listed if "steps" in s):
        for name, value in step.get("only", {}).items():
            found.setdefault(name, []).append(str(value))
        for name, more in _choices(step["steps"]).items():
            found.setdefault(name, []).extend(more)
    return {name: list(dict.fromkeys(values)) for name, values in found.items()}


def _targets(step: Mapping[str, Any], variables: Mapping[str, Any]) -> list[str]:
    """What a `TARGET.key=value` setting can mean by this step: its name, and the leaf recipe it trains."""
    found = [str(step["name"])] if "name" in step else []
    train = step.get("train")
    if not isinstance(train, dict) or "recipe" not in train:
        return found
    return [*found, VARIABLE.sub(lambda m: str(variables.get(m[1], m[0])), str(train["recipe"]))]


def _unroll(
    recipe: Recipe, listed: list[dict[str, Any]], variables: dict[str, Any], changes: dict[str, dict[str, Any]], inside: bool
) -> Generator[Step, bool, bool]:
    for step in listed:
        if "only" in step:
            wanted = all(str(variables[name]) == str(value) for name, value in step["only"].items())
            if wanted and (yield from _unroll(recipe, step["steps"], variables, changes, inside)):
                return True
            continue
        if "repeat" in step:
            start = int(step.get("start", 0))
            variables["last"] = start
            for i in range(start, start + int(_fill(step["repeat"], variables, recipe))):
                variables |= {"i": i, "next": i + 1}
                if (yield from _unroll(recipe, step["steps"], variables, changes, inside=True)):
                    break
                variables["last"] = i + 1
            for name in ("i", "next"):
                variables.pop(name, None)
            continue
        verbs = [k for k in step if k != "name"]
        if len(verbs) != 1 or not isinstance(step[verbs[0]], dict):
            raise OptionError(f"recipe '{recipe.name}': a step is one verb with its arguments, not {step}")
        arguments = _fill(_fill(step[verbs[0]], variables, recipe), variables, recipe)
        for target in _targets(step, variables):
            arguments |= changes.get(target, {})
        if (yield Step(verbs[0], arguments, inside)) and inside:
            return True
    return False


def _fill(value: Any, variables: Mapping[str, Any], recipe: Recipe) -> Any:
    """Replace {name}; a text that is nothing but one variable takes that variable's value, whatever its type."""
    if isinstance(value, dict):
        return {k: _fill(v, variables, recipe) for k, v in value.items()}
    if isinstance(value, list):
        return [_fill(v, variables, recipe) for v in value]
    if not isinstance(value, str):
        return value
    for name in VARIABLE.findall(value):
        if name not in variables:
            raise unknown(f"variable in recipe '{recipe.name}'", name, [*variables, *LOOP])
    whole = VARIABLE.fullmatch(value)
    return variables[whole[1]] if whole else VARIABLE.sub(lambda m: str(variables[m[1]]), value)


def check(recipe: Recipe, out: str | Path, given: Mapping[str, Any], verbs: Verbs, checks: Checks) -> list[Step]:
    """Every call of a composite, checked: verbs, arguments, specs, and inputs that exist or are made on the way."""
    plan = list(steps(recipe, out, given))
    made: list[str] = []
    for step in plan:
        if step.verb not in verbs:
            raise unknown(f"verb in recipe '{recipe.name}'", step.verb, verbs)
        parameters = inspect.signature(verbs[step.verb]).parameters
        free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for key in step.arguments:
            if key not in parameters and not free:
                raise unknown(f"argument of `{step.verb}` in recipe '{recipe.name}'", key, parameters)
        _typed(step, verbs)
        for key, parameter in parameters.items():
            if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD and key not in step.arguments:
                raise OptionError(f"recipe '{recipe.name}': `{step.verb}` needs {key}: ...")
        wanted = list(checks["train"](step.arguments)) if step.verb == "train" else []
        for key, value in step.arguments.items():
            if key in checks and step.verb != "train" and value is not None:
                wanted += checks[key](value)
        for kind, path in wanted:
            if not any(Path(path) == Path(m) or Path(m) in Path(path).parents or fnmatch.fnmatch(m, path) for m in made):
                if Path(out) in Path(path).parents:
                    raise OptionError(f"recipe '{recipe.name}': `{step.verb}` reads {path}, which no earlier step makes")
                checks[f"exists {kind}"](path)
        folder = str(step.arguments["out"])
        made += [folder, f"{folder}-random", f"{folder}-length-matched"]
        made += [str(step.arguments["dropped"])] if step.arguments.get("dropped") else []
    return plan


def run(recipe: Recipe, out: str | Path, given: Mapping[str, Any], verbs: Verbs) -> list[str]:
    """Call the verbs in order; a verb that is finished returns at once. Returns the folders written.

    A loop ends as soon as its filter keeps nothing, or where it would score a table that a filter left empty; `{last}` is
    then the last round that was finished.
    """
    total = len(list(steps(recipe, out, given)))
    folders: list[str] = []
    walk, stop = steps(recipe, out, given), None
    while True:
        try:
            step = walk.send(stop)  # type: ignore[arg-type]
        except StopIteration:
            return folders
        if stop := step.looped and step.verb == "score" and _emptied(step.arguments["data"]):
            say(f"{step.arguments['data']} is empty: the loop ends")
            continue
        say(f"[{len(folders) + 1}/{total}] {step.verb} -> {step.arguments['out']}")
        folders.append(str(verbs[step.verb](**_typed(step, verbs))))
        stop = step.verb == "filter" and _emptied(folders[-1])


def _typed(step: Step, verbs: Verbs) -> dict[str, Any]:
    """A step's arguments with the numbers that its verb wants: from the shell every setting is a word, max_tokens=24 too."""
    hints = typing.get_type_hints(verbs[step.verb])

    def typed(key: str, value: Any) -> Any:
        number = isinstance(value, str) and hints.get(key) in (int, float, bool)
        return specs.convert(value, hints[key], f"{key} of `{step.verb}`") if number else value

    return {key: typed(key, value) for key, value in step.arguments.items()}


def _emptied(folder: Any) -> bool:
    """Is this the result of a filter that left nothing?"""
    if not isinstance(folder, str) or not (Path(folder) / MANIFEST).is_file():
        return False
    manifest = read_manifest(folder)
    return manifest["verb"] == "filter" and manifest["rows"]["out"] == 0


def read_value(text: str) -> Any:
    """A setting from the shell: [a, b] and {k: v} are lists and mappings, the rest, {out}/a too, stays a word."""
    if not text.startswith(("[", "{")) or VARIABLE.match(text):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise OptionError(f"cannot read the setting {text!r}: a list is written [a, b], a mapping {{k: v}}") from None


def describe(recipe: Recipe) -> list[tuple[str, str, str]]:
    """(setting, default, meaning or source) for every setting, for people."""
    rows = [(k, "needed", v) for k, v in recipe.needs.items() if k not in recipe.defaults]
    rows += [(k, str(v), recipe.notes.get(k, recipe.needs.get(k, ""))) for k, v in recipe.defaults.items()]
    for name, changed in recipe.presets.items():
        rows.append((f"preset={name}", " ".join(f"{k}={v}" for k, v in changed.items()), recipe.notes.get(name, "")))
    return rows
