"""What a recipe's arguments must be, checked before anything runs.

A checker takes an argument's value and returns (kind, path) pairs: what must exist by then, or be made by an earlier
step. Reading a spec also checks its name and options; no model is loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from .folders import model_fingerprint, read_manifest


def method(loaded: Any, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The method of a leaf recipe, and its options, checked; `data` and `reward` as they were given."""
    from . import methods, spec
    from . import recipe as recipes

    function = spec.resolve(spec.Spec(loaded.method), methods.METHODS, "method")
    own = tuple(inspect.signature(function).parameters)
    values = recipes.settings(loaded, settings, also=tuple(k for k in own if k != "out"))
    handed = {k: values.pop(k) for k in ("data", "reward") if k in own and k in values}
    return function, spec.check(function, values, f"recipe '{loaded.name}'", hidden=("out", *handed)) | handed


def _train(arguments: Mapping[str, Any]) -> list[tuple[str, str]]:
    from . import recipe as recipes

    loaded = recipes.load(arguments["recipe"])
    if not loaded.method:
        return []
    _, options = method(loaded, {k: v for k, v in arguments.items() if k not in ("recipe", "out")})
    data = options["data"] if isinstance(options["data"], list) else [options["data"]]
    models = [("model", str(options[k])) for k in ("model", "reference") if options.get(k)]
    return [("data", str(d)) for d in data] + models + (_reward(options["reward"]) if "reward" in options else [])


def _reward(source: Any) -> list[tuple[str, str]]:
    from . import rewards

    return [("model", str(m)) for m in getattr(rewards.load(source)[0], "models", {}).values()]


def _rule(source: Any) -> list[tuple[str, str]]:
    from . import rules

    rules.load(source)
    return []


def _engine(source: Any) -> list[tuple[str, str]]:
    from . import engine

    engine.check(source)
    return []


def _write(source: Any) -> list[tuple[str, str]]:
    from . import self_instruct

    self_instruct.load(source)
    return []


def _tasks(source: Any) -> list[tuple[str, str]]:
    from . import tasks

    tasks.parse(source)
    return []


def _kind(source: Any) -> list[tuple[str, str]]:
    from . import reports

    reports.load(source)
    return []


def _exists_data(source: Any) -> None:
    from . import tables

    tables.open(source)


# How a recipe checks an argument before anything runs: each returns what must exist by then.
CHECKS: dict[str, Any] = {
    "train": _train, "reward": _reward, "rule": _rule, "engine": _engine, "write": _write, "tasks": _tasks,
    "data": lambda source: [("data", str(source))], "prompts": lambda source: [("data", str(source))],
    "model": lambda model: [("model", str(model))], "kind": _kind,
    "paths": lambda paths: [("folder", str(p)) for p in paths if "*" not in str(p)],
    "exists data": _exists_data, "exists model": model_fingerprint, "exists folder": read_manifest,
}  # fmt: skip
