"""Rules that keep samples by one score column: all, threshold, top. A row without a score is never kept by a score."""

from __future__ import annotations

from typing import Literal

import polars as pl

from ..errors import OptionError
from .partition import Rule, prompt_key, split


def everything() -> Rule:
    """Keep every row that has a response."""

    def rule(frame: pl.LazyFrame) -> tuple[pl.LazyFrame, pl.LazyFrame]:
        has = next((c for c in ("response", "completion", "chosen", "prompt") if c in frame.collect_schema()), None)
        return split(frame, pl.col(has).is_not_null() if has else pl.lit(True), pl.lit(f"no {has}"))

    return rule


def threshold(min: float | None = None, max: float | None = None, by: str = "score") -> Rule:  # noqa: A002 - the option's name
    """Keep rows with min <= score <= max."""
    if min is None and max is None:
        raise OptionError("rule 'threshold' needs min=... or max=... or both")

    def rule(frame: pl.LazyFrame) -> tuple[pl.LazyFrame, pl.LazyFrame]:
        score = pl.col(by)
        low = score < min if min is not None else pl.lit(False)
        high = score > max if max is not None else pl.lit(False)
        reason = (
            pl.when(score.is_null()).then(pl.lit(f"no {by}"))
            .when(low).then(pl.lit(f"{by} below {min}")).otherwise(pl.lit(f"{by} above {max}"))
        )  # fmt: skip
        return split(frame, score.is_not_null() & score.is_not_nan() & ~low & ~high, reason)

    return rule


def top(k: int | None = None, fraction: float | None = None, per: Literal["prompt"] | None = None, by: str = "score") -> Rule:
    """Keep the k best rows, or the best fraction of the scored rows (rounded down), over all or per prompt.

    Of equal scores the earlier row wins, so that the result is the same every time.
    """
    if (k is None) == (fraction is None):
        raise OptionError("rule 'top' needs either k=... or fraction=...")
    if (k is not None and k < 1) or (fraction is not None and not 0 < fraction <= 1):
        raise OptionError(f"rule 'top' takes k >= 1 or 0 < fraction <= 1, not {k if fraction is None else fraction}")

    def rule(frame: pl.LazyFrame) -> tuple[pl.LazyFrame, pl.LazyFrame]:
        score = pl.when(pl.col(by).is_not_nan()).then(pl.col(by))
        rank, scored = score.rank("ordinal", descending=True), score.count()
        if per == "prompt":
            key = prompt_key(frame)
            rank, scored = rank.over(key), scored.over(key)
        limit = pl.lit(k) if k is not None else (scored * fraction).floor()
        where = " of its prompt" if per else ""
        wanted = f"{k}" if k is not None else f"{fraction:g} of the rows"
        reason = pl.when(score.is_null()).then(pl.lit(f"no {by}")).otherwise(pl.lit(f"{by} not in the top {wanted}{where}"))
        marked = frame.with_columns(__keep=rank <= limit)
        kept, dropped = split(marked, pl.col("__keep"), reason)
        return kept.drop("__keep"), dropped.drop("__keep")

    return rule
