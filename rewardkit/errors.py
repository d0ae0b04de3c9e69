"""What can go wrong, in two voices.

    RewardkitError            what the user can fix: one line, exit code 1, no traceback
    |- OptionError            an unknown name, option or value; names the valid ones
    |- DataError              a file, column or row that cannot be read or used
    |- ModelError             a model, tokenizer or template that cannot be used
    |- FolderError            an output folder that holds something else
    `- MissingExtra           an optional dependency that is not installed

`assert` is for what only we could have broken. Nothing else is caught.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class RewardkitError(Exception):
    """The user can fix this; the message is one line."""


class OptionError(RewardkitError):
    """An unknown name, option or value."""


class DataError(RewardkitError):
    """A file, column or row that cannot be read or used."""


class ModelError(RewardkitError):
    """A model, tokenizer or chat template that cannot be used."""


class FolderError(RewardkitError):
    """An output folder that holds something else."""


class MissingExtra(RewardkitError):
    """An optional dependency that is not installed."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> OptionError:
    """The error for a name that is not among `choices`, with the nearest one suggested."""
    valid = sorted(choices)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return OptionError(f"unknown {kind} '{name}'{hint} (valid: {', '.join(valid) or 'none'})")


def need(module: str, extra: str) -> ModuleType:
    """Import `module`, or say in one sentence which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtra(
            f"this needs {module.split('.')[0]}, which is not installed: pip install 'rewardkit[{extra}]'"
        ) from None
