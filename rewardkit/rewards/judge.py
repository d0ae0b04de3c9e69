"""LLM as a judge: a model reads a rubric with the prompt and the response, and its votes are averaged.

Self-Rewarding Language Models (arXiv:2401.10020) and Self-Evolved Reward learning (arXiv:2411.00418); SPEC C.3, B.8.
A rubric is a text file in `prompts/` (or the user's own): a first line `score: last|first LOW HIGH`, a line `---`,
then the text with {prompt} and {response}. `last` or `first` says which score line counts when there are several.
A vote that does not parse is None, never a number; a row with fewer than `min_valid` votes is unscored. The text of
every vote is kept (`raw`).
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import OptionError, unknown
from ..tables import Row, messages, text
from . import Score

RUBRICS = Path(__file__).parents[1] / "prompts"
HEADER = re.compile(r"score: (first|last) (-?\d+(?:\.\d+)?) (-?\d+(?:\.\d+)?)$")
# A full number: a class such as [0-5] would read "55" as 5.
SCORE = re.compile(r"score\s*:\s*\**\s*(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d+))?", re.IGNORECASE)


@dataclass(frozen=True)
class Rubric:
    """What the judge is asked, and how its answer is read."""

    text: str
    which: Literal["first", "last"]
    low: float
    high: float

    def fill(self, prompt: str, response: str) -> str:
        """The judge's prompt. One pass: braces inside the texts are left alone, whoever wrote them."""
        return re.sub(r"\{(prompt|response)\}", lambda m: {"prompt": prompt, "response": response}[m[1]], self.text)

    def parse(self, answer: str) -> float | None:
        """The score in a judge's answer, or None if it has none in the range."""
        found = SCORE.findall(answer)
        if not found:
            return None
        number, scale = found[-1 if self.which == "last" else 0]
        value = float(number)
        inside = self.low <= value <= self.high and (not scale or float(scale) == self.high)
        return value if inside else None


def rubric(name: str) -> Rubric:
    """A shipped rubric by its name, or the user's own file."""
    shipped = {p.stem: p for p in RUBRICS.glob("*.txt")}
    file = shipped.get(name, Path(name).expanduser())
    if not file.is_file():
        raise unknown("rubric", name, [*shipped, "FILE"])
    head, _, body = file.read_text().partition("\n---\n")
    header = HEADER.match(head.strip())
    if not header or "{prompt}" not in body or "{response}" not in body:
        raise OptionError(
            f"rubric {file} needs a first line 'score: last 0 5', a line '---', and a text with {{prompt}} and {{response}}"
        )
    which: Any = header[1]
    return Rubric(body.strip(), which, float(header[2]), float(header[3]))


class Judge:
    """Scores samples by the mean of a judge's votes."""

    def __init__(
        self,
        model: str,
        rubric: str = "additive5",
        votes: int = 3,
        min_valid: int = 1,
        temperature: float = 0.7,
        top_p: float = 0.9,
        max_tokens: int = 512,
        engine: str = "vllm",
        template: str | None = None,
        seed: int = 0,
    ) -> None:
        """model: a folder, a Hub id or http://host:port/v1#model. votes: samples of the judge a response, in one
        request. min_valid: votes that must parse. engine, template: as in `generate`.
        """
        if votes < 1 or not 1 <= min_valid <= votes:
            raise OptionError(
                f"judge takes votes >= 1 and min_valid between 1 and votes, not votes={votes} min_valid={min_valid}"
            )
        self.models = {"judge": model}
        self.rubric = globals()["rubric"](rubric)
        self.votes, self.min_valid, self.seed = votes, min_valid, seed
        self.sampling = {"temperature": temperature if votes > 1 else 0.0, "top_p": top_p, "max_tokens": max_tokens}
        self.spec = engine + (f" template={template}" if template else "")
        self._engine: Any = None

    def load(self) -> None:
        """Start the judge's engine."""
        from .. import engine

        self._engine = self._engine or engine.load(self.spec, self.models["judge"])

    def close(self) -> None:
        """Give the engine's memory back."""
        if self._engine:
            self._engine.close()
            self._engine = None

    def __call__(self, samples: Sequence[Row]) -> list[Score]:
        """One Score a sample; extra: votes, raw (the answers they were read from), n_valid, spread (population deviation)."""
        self.load()
        prompts = [self._ask(s) for s in samples]
        return [self._score(a) for a in self._engine.generate(prompts, n=self.votes, seed=self.seed, **self.sampling)]

    def _ask(self, sample: Row) -> list[dict[str, str]]:
        turns = messages(sample["prompt"])
        prompt = turns[0]["content"] if len(turns) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in turns)
        return [{"role": "user", "content": self.rubric.fill(prompt, text(sample["response"]))}]

    def _score(self, answer: Any) -> Score:
        from ..engine import Refused

        if isinstance(answer, Refused):
            nothing: Row = {"votes": [], "n_valid": 0, "spread": None, "raw": []}
            return Score(None, f"the judge did not answer: {answer.reason}", nothing)
        votes = [self.rubric.parse(c.text) for c in answer]
        valid = [v for v in votes if v is not None]
        extra: Row = {
            "votes": votes, "n_valid": len(valid), "spread": statistics.pstdev(valid) if valid else None,
            "raw": [c.text for c in answer],
        }  # fmt: skip
        if len(valid) < self.min_valid:
            return Score(
                None,
                f"{len(valid)} of {len(votes)} votes have a score between {self.rubric.low:g} and {self.rubric.high:g}",
                extra,
            )
        return Score(statistics.fmean(valid), "", extra)
