"""Rules that keep rows by one column: by a score (all, threshold, quantile, top), by length, by how the response ended, by text
(matches, keywords).

A row without a score is never kept by a score. Of equal scores the earlier row wins, so that the result is the same every
time.
"""

from __future__ import annotations

import re
from typing import Literal

import polars as pl

from ..errors import DataError, OptionError
from ..shapes import length as length_of
from ..shapes import text_of
from .groups import by_group
from .partition import CODE, MISSING, Rule, decided, group_key, number, split

CUT = "truncated: the response ran into the token limit"
UNASKABLE = ("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot", "go to",
             "video", "audio", "music", "flowchart", "diagram")  # fmt: skip
TRUNCATED = ("length", "max_tokens", "max_length", "model_length")  # what engines and APIs call a response that was cut


def everything() -> Rule:
    """Keep every row that has a response."""

    def rule(frame: pl.LazyFrame) -> tuple[pl.LazyFrame, pl.LazyFrame]:
        has = next((c for c in ("response", "completion", "chosen", "prompt") if c in frame.collect_schema()), None)
        return split(frame, pl.col(has).is_not_null() if has else pl.lit(True), pl.lit(f"no {has}"))

    return rule


def threshold(min: float | None = None, max: float | None = None, by: str = "score") -> Rule:  # noqa: A002 - the option's name
    """Keep rows with min <= score <= max."""
    return _between(number(by), min, max, "threshold", by)


def margin(min: float | None = None, max: float | None = None, by: str = "score") -> Rule:  # noqa: A002 - the option's name
    """Keep pairs whose margin, score of chosen minus score of rejected, lies in a band: min <= margin <= max."""
    return _between(number(f"{by}_chosen") - number(f"{by}_rejected"), min, max, "margin", "margin")


def _between(value: pl.Expr, low: float | None, high: float | None, name: str, called: str) -> Rule:
    if low is None and high is None:
        raise OptionError(f"rule '{name}' needs min=... or max=... or both")
    if low is not None and high is not None and low > high:
        raise OptionError(f"rule '{name}': min={low} is above max={high}")

    def rule(frame: pl.LazyFrame) -> tuple[pl.LazyFrame, pl.LazyFrame]:
        below = value < low if low is not None else pl.lit(False)
        above = value > high if high is not None else pl.lit(False)
        reason = (
            pl.when(value.is_null()).then(pl.lit(MISSING.format(called)))
            .when(below).then(pl.lit(f"{called} below {low}")).otherwise(pl.lit(f"{called} above {high}"))
        )  # fmt: skip
        return split(frame, value.is_not_null() & ~below & ~above, reason)

    return rule


def quantile(low: float = 0.0, high: float = 1.0, per: str | None = None, by: str = "score") -> Rule:
    """Keep rows between two quantiles of the scores, over all or per group; equal scores are kept or dropped together.

    low=0.9 keeps the scores that are no smaller than the one below which 90 % of them lie. per: prompt or a column.
    """
    if not 0 <= low < high <= 1:
        raise OptionError(f"rule 'quantile' takes 0 <= low < high <= 1, not low={low} high={high}")

    def decide(rows: pl.DataFrame) -> pl.DataFrame:
        score = pl.col("score")
        least, most = score.quantile(low, "higher"), score.quantile(high, "lower")
        if per:
            least, most = least.over("key"), most.over("key")
        code = pl.when(score.is_null()).then(1).when(score < least).then(2).when(score > most).then(3).otherwise(0)
        return rows.select("row", code.cast(pl.UInt8).alias(CODE))

    where = _within(per)
    reasons = [MISSING.format(by), f"{by} below quantile {low:g}{where}", f"{by} above quantile {high:g}{where}"]
    return _grouped(per, by, decide, reasons)


def top(k: int | None = None, fraction: float | None = None, per: str | None = None, by: str = "score") -> Rule:
    """Keep the k best rows, or the best fraction of the scored rows (rounded down), over all or per group.

    per: prompt, or a column whose values are the groups.
    """
    if (k is None) == (fraction is None):
        raise OptionError("rule 'top' needs either k=... or fraction=...")
    if (k is not None and k < 1) or (fraction is not None and not 0 < fraction <= 1):
        raise OptionError(f"rule 'top' takes k >= 1 or 0 < fraction <= 1, not {k if fraction is None else fraction}")

    def decide(rows: pl.DataFrame) -> pl.DataFrame:
        score = pl.col("score")
        rank, scored = score.rank("ordinal", descending=True), score.count()
        if per:
            rank, scored = rank.over("key"), scored.over("key")
        limit = pl.lit(k) if k is not None else (scored * fraction).floor()
        code = pl.when(score.is_null()).then(1).when(rank <= limit).then(0).otherwise(2)
        return rows.select("row", code.cast(pl.UInt8).alias(CODE))

    wanted = f"{k}" if k is not None else f"{fraction:g} of the rows"
    return _grouped(per, by, decide, [MISSING.format(by), f"{by} not in the top {wanted}{_within(per)}"])


def _within(per: str | None) -> str:
    return f" of its {per}" if per else ""


def _grouped(per: str | None, by: str, decide, reasons: list[str]) -> Rule:  # type: ignore[no-untyped-def]
    """A rule that decides by scores within groups, or within the whole table."""

    def rule(frame: pl.LazyFrame) -> tuple[pl.LazyFrame, pl.LazyFrame]:
        if per:
            codes = by_group(frame, group_key(frame, per), decide, score=number(by))
        else:
            narrow = frame.select(score=number(by)).with_row_index("row")
            codes = decide(narrow.collect(engine="streaming"))
        return decided(frame, codes[CODE], reasons)

    return rule


def finished(unknown: Literal["keep", "drop"] = "keep") -> Rule:
    """Keep responses that ended by themselves; those cut at the token limit (finish_reason) are dropped.

    unknown: what happens to rows without a finish_reason.
    """

    def rule(frame: pl.LazyFrame) -> tuple[pl.LazyFrame, pl.LazyFrame]:
        why = pl.col("finish_reason")
        keep = ~why.is_in(TRUNCATED) & why.is_not_null()
        reason = pl.when(why.is_null()).then(pl.lit("no finish_reason")).otherwise(pl.lit(CUT))
        return split(frame, keep | why.is_null() if unknown == "keep" else keep, reason)

    return rule


def length(
    min: int | None = None,  # noqa: A002 - the option's name
    max: int | None = None,  # noqa: A002 - the option's name
    unit: Literal["auto", "tokens", "characters", "words"] = "auto",
    of: str | None = None,
) -> Rule:
    """Keep rows whose text is of a bounded length.

    of: the column, by default the response (of a pair: both sides). unit: auto is tokens where they are known, else characters.
    """
    if min is None and max is None:
        raise OptionError("rule 'length' needs min=... or max=... or both")

    def rule(frame: pl.LazyFrame) -> tuple[pl.LazyFrame, pl.LazyFrame]:
        schema = frame.collect_schema()
        sides: list[str | None] = (
            [of] if of else [c for c in ("chosen", "rejected") if c in schema and "response" not in schema] or [None]
        )
        keep, reason = pl.lit(True), pl.lit("no length")
        for side in sides:
            value, called = length_of(schema, side, unit), f"length of {side}" if side else "length"
            if value is None:
                raise DataError(f"rule 'length': this table has no {unit} of {side or 'a response'} to count")
            for bound, wrong, word in ((min, value < (min or 0), "below"), (max, value > (max or 0), "above")):
                if bound is not None:
                    keep &= ~wrong
                    reason = pl.when(wrong.fill_null(False)).then(pl.lit(f"{called} {word} {bound}")).otherwise(reason)
        return split(frame, keep, reason)

    return rule


def matches(pattern: str, of: str = "response", invert: bool = False) -> Rule:
    """Keep rows whose text a regular expression finds (Rust's syntax); with `invert`, those it does not find."""
    try:
        pl.Series([""]).str.contains(pattern)
    except pl.exceptions.PolarsError as error:
        raise OptionError(f"rule 'matches': pattern {pattern!r}: {' '.join(str(error).split())}") from None

    def rule(frame: pl.LazyFrame) -> tuple[pl.LazyFrame, pl.LazyFrame]:
        text = text_of(frame.collect_schema(), of)
        found, verb = text.str.contains(pattern), "matches" if invert else "does not match"
        reason = pl.when(text.is_null()).then(pl.lit(f"no {of}")).otherwise(pl.lit(f"{of} {verb} {pattern}"))
        return split(frame, ~found if invert else found, reason)

    return rule


def keywords(of: str = "prompt", words: list | None = None) -> Rule:
    """Drop rows whose text has one of these words, whole and in any case; several words may be one keyword ("go to").

    Without `words` they are Self-Instruct's (arXiv:2212.10560): what a model of text cannot be given, see or make.
    """
    listed = [str(word) for word in words] if words else list(UNASKABLE)

    def rule(frame: pl.LazyFrame) -> tuple[pl.LazyFrame, pl.LazyFrame]:
        text = text_of(frame.collect_schema(), of)
        found = text.str.extract(pattern, 1).str.to_lowercase()
        reason = pl.when(text.is_null()).then(pl.lit(f"no {of}")).otherwise(pl.format(f"{of} has '{{}}'", found))
        return split(frame, text.is_not_null() & found.is_null(), reason)

    edge = r"[^\p{L}\p{N}_]"  # not \b, which is no edge beside a sign: words="c++"
    pattern = rf"(?i)(?:^|{edge})({'|'.join(re.escape(word) for word in listed)})(?:{edge}|$)"
    return rule
