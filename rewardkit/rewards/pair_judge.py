"""LLM as a judge of two responses: which one is better? The pairwise comparison of SER (arXiv:2411.00418, C.2).

A sample has `response`, shown as A, and `opponent`, shown as B. The score is 1 where A is better, 0 where B is, 0.5 for a
tie; several votes are averaged. One order only: a judge prefers places as well as replies, so ask again with the two
exchanged, as the task `win_rate` does. A question is a text file in `prompts/pairs/` (or the user's own) with {prompt},
{first} and {second}; the last line `Better: A`, `Better: B` or `Better: tie` counts. An answer without one is no vote.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Any

from ..errors import DataError, OptionError, unknown
from ..tables import Row, messages, text
from . import Score
from .judge import RUBRICS, Judge

VERDICT = re.compile(r"better\s*:\s*\**\s*(A|B|tie)\b", re.IGNORECASE)
VALUES = {"a": 1.0, "b": 0.0, "tie": 0.5}


def question(name: str) -> str:
    """A shipped question by its name, or the user's own file."""
    from pathlib import Path

    shipped = {p.stem: p for p in (RUBRICS / "pairs").glob("*.txt")}
    file = shipped.get(name, Path(name).expanduser())
    if not file.is_file():
        raise unknown("question", name, [*shipped, "FILE"])
    found = file.read_text().strip()
    if missing := [f"{{{k}}}" for k in ("prompt", "first", "second") if f"{{{k}}}" not in found]:
        raise OptionError(f"the question {file} lacks {', '.join(missing)}")
    return found


def verdict(answer: str) -> float | None:
    """1 for A, 0 for B, 0.5 for a tie; None where the answer names none."""
    found = VERDICT.findall(answer)
    return VALUES[found[-1].lower()] if found else None


class PairJudge(Judge):
    """Scores samples that have an `opponent` by the mean of a judge's votes."""

    def __init__(
        self,
        model: str,
        question: str = "better",
        votes: int = 1,
        temperature: float = 0.0,
        top_p: float = 0.95,
        max_tokens: int = 1024,
        engine: str = "vllm",
        template: str | None = None,
        seed: int = 0,
    ) -> None:
        """model: a folder, a Hub id or http://host:port/v1#model. votes: samples of the judge a comparison, which takes a
        temperature above 0 (SER's judge is GPT-4o at 0.7). engine, template: as in `generate`.
        """
        super().__init__(model, "ser", votes, 1, temperature, top_p, max_tokens, engine, template, seed)
        self.sampling["temperature"] = temperature
        self.question = globals()["question"](question)

    def _ask(self, sample: Row) -> list[dict[str, str]]:
        if sample.get("opponent") is None:
            raise DataError("the reward 'pair_judge' compares `response` with `opponent`; a row has no opponent")
        turns = messages(sample["prompt"])
        parts = {
            "prompt": turns[0]["content"] if len(turns) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in turns),
            "first": text(sample["response"]), "second": text(sample["opponent"]),
        }  # fmt: skip
        # One pass: braces inside the texts are left alone, whoever wrote them.
        filled = re.sub(r"\{(prompt|first|second)\}", lambda m: parts[m[1]], self.question)
        return [{"role": "user", "content": filled}]

    def _score(self, answer: Any) -> Score:
        from ..engine import Refused

        if isinstance(answer, Refused):
            return Score(None, f"the judge did not answer: {answer.reason}", {"votes": [], "n_valid": 0, "spread": None, "raw": []})
        votes: Sequence[float | None] = [verdict(c.text) for c in answer]
        valid = [v for v in votes if v is not None]
        extra: Row = {
            "votes": list(votes), "n_valid": len(valid), "spread": statistics.pstdev(valid) if valid else None,
            "raw": [c.text for c in answer],
        }  # fmt: skip
        if not valid:
            return Score(None, f"none of {len(votes)} answers says which is better", extra)
        return Score(statistics.fmean(valid), "", extra)
