"""Rewards that read the text alone: its length, a pattern, an exact answer, a numeric answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from ..errors import OptionError
from ..tables import Row, last_number
from ..tables import text as as_text
from . import Reward, Score


def text(
    kind: Literal["length", "regex", "exact", "numeric"],
    pattern: str | None = None,
    answer: str = "answer",
    unit: Literal["chars", "words"] = "chars",
) -> Reward:
    """length: characters or words. regex: 1 where `pattern` is found, else 0. exact: 1 where the stripped response
    equals the column `answer`. numeric: 1 where the last number of the response equals the last one of the answer.
    """
    if kind == "regex" and not pattern:
        raise OptionError("reward 'text' with kind=regex needs pattern=...")
    try:
        found = re.compile(pattern or "")
    except re.error as error:
        raise OptionError(f"pattern={pattern!r} is not a regular expression: {error}") from None

    def one(sample: Row) -> Score:
        response = as_text(sample["response"])
        if kind == "length":
            return Score(float(len(response) if unit == "chars" else len(response.split())))
        if kind == "regex":
            return Score(float(bool(found.search(response))))
        truth = sample.get(answer)
        if truth is None:
            return Score(None, f"the column '{answer}' is empty or missing")
        if kind == "exact":
            return Score(float(response.strip() == str(truth).strip()))
        given, wanted = last_number(response), last_number(str(truth))
        if wanted is None:
            return Score(None, f"the column '{answer}' holds no number")
        return Score(float(given == wanted), "" if given is not None else "the response holds no number")

    def score(samples: Sequence[Row]) -> list[Score]:
        return [one(s) for s in samples]

    return score
