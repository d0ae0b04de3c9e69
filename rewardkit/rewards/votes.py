"""What the votes of a judge say: over a run, how far the judge can be trusted; in one answer, how sure it was.

A run's numbers are sums that grow row by row, so they cost no memory and can be read off the columns of finished shards.
A judge that mostly cannot be read is stopped, with the share, as soon as `ENOUGH` votes are in: its rows would all be None.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ModelError

ENOUGH = 100  # votes before a judge is stopped for answers that cannot be read: one bad row proves nothing
MOST_REASONS = 20  # different reasons that a manifest lists

Column = Callable[[str], Iterable[Any]]


@dataclass
class Tally:
    """The votes of many rows, counted."""

    rows: int = 0
    votes: int = 0
    unanswered: int = 0  # rows without any vote: the judge was not reached
    values: Counter[float] = field(default_factory=Counter)  # the votes that could be read
    repeated: int = 0  # rows with at least two such votes
    variance: float = 0.0  # summed over these rows

    def add(self, votes: Sequence[float | None]) -> None:
        """One row's votes; None could not be read."""
        valid = [v for v in votes if v is not None]
        self.rows += 1
        self.votes += len(votes)
        self.unanswered += not votes
        self.values.update(valid)
        if len(valid) > 1:
            mean = math.fsum(valid) / len(valid)
            self.repeated += 1
            self.variance += math.fsum((v - mean) ** 2 for v in valid) / len(valid)

    @property
    def parsed(self) -> int:
        """Votes that could be read."""
        return sum(self.values.values())

    def stop_above(self, most: float, enough: int = ENOUGH) -> None:
        """Stop the run if more than this share of the votes could not be read, and there were enough of them."""
        unread = self.votes - self.parsed
        if self.votes >= enough and unread > most * self.votes:
            told = f"{unread:,} of {self.votes:,} votes ({unread / self.votes:.1%}) hold no verdict"
            raise ModelError(
                f"the judge's answers cannot be read: {told}, more than max_unparsed={most:g}; "
                "the column `raw` of the shards written so far has what it said instead"
            )

    def facts(self, top: float) -> dict[str, Any]:
        """Shares over all votes. vote_variance: the mean over rows of the population variance of a row's votes."""
        common = self.values.most_common(1)
        return {
            "votes": self.votes, "parse_rate": share(self.parsed, self.votes),
            "saturation": share(self.values[top], self.parsed),
            "most_common": common[0][0] if common else None,
            "most_common_share": share(common[0][1], self.parsed) if common else None,
            "vote_variance": self.variance / self.repeated if self.repeated else None, "unanswered": self.unanswered,
        }  # fmt: skip


def share(part: float, whole: float) -> float | None:
    """part / whole; nothing has no share."""
    return part / whole if whole else None


def reasons(column: Column) -> dict[str, Any]:
    """The share of rows without a score, and why: the most frequent reasons, the others together."""
    rows, why = 0, Counter[str]()
    for reason in column("why"):
        rows += 1
        if reason:
            # A reason may quote a server; what is listed stays short, however many different ones there are.
            why[reason if reason in why or len(why) < MOST_REASONS else "other reasons"] += 1
    return {"unscored_share": share(why.total(), rows), "reasons": dict(why.most_common())}


def expected(places: Sequence[tuple[str, dict[str, float]]] | None, rubric: Any) -> tuple[float | None, float | None]:
    """The mean of the whole scores a judge could have given where it gave one, and the probability they have together.

    places: an answer's tokens, each as (its text, {text: log p} of the likeliest tokens at its place). The mean is
    sum_s s p(s) / sum_s p(s) over the whole numbers s of the rubric's scale: what the judge would give on average after the
    very reasoning that it wrote, not on average over its reasonings. (None, None) where no score was given, or one that is
    more than one token (3.5, or 10 in most vocabularies).
    """
    found = rubric.find("".join(text for text, _ in places or ()))
    if not found or not places:
        return None, None
    ends = itertools.accumulate(len(text) for text, _ in places)
    text, likeliest = places[next(i for i, end in enumerate(ends) if found.start(1) < end)]
    if text.strip() != found[1]:
        return None, None
    p = [(int(t), math.exp(logp)) for t, logp in likeliest.items() if t.strip().isdecimal()]
    inside = [(s, p_s) for s, p_s in p if rubric.low <= s <= rubric.high]
    mass = math.fsum(p_s for _, p_s in inside)
    return (math.fsum(s * p_s for s, p_s in inside) / mass, mass) if mass else (None, None)
