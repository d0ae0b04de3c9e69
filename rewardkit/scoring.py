"""What the verb `score` does with a row and with a score: the samples that a row stands for, and the columns that come of it.

A sample is `prompt` and `response`. Rows of preference pairs are two samples, `chosen` and `rejected`, whose columns end so;
rows of demonstrations are one, their `completion`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .show import say, table


def facts_of(scorer: Any, path: Path, prefix: str, sides: list[str]) -> dict[str, Any]:
    """How much of the scores is length, and what a reward has to say of its finished columns."""
    from . import audit, tables

    names = [named(name, prefix, "") for name in ("score", "score_mean")]
    lengths = audit.audit(tables.open(sorted(path.glob("part-*.parquet"))).frame(), names)
    for line in audit.words(lengths):
        say(line)
    if not hasattr(scorer, "facts"):
        return {"length_audit": lengths}
    facts = scorer.facts(reader(path, prefix, sides))
    if hasattr(scorer, "summary"):
        table("score: what the judge's votes say", ["", "value"], scorer.summary(facts))
    return {"length_audit": lengths, "reward_facts": facts}


def reader(path: Path, prefix: str, sides: Sequence[str]) -> Callable[[str], Iterator[Any]]:
    """Reads what finished shards hold under a name that a reward gave, one shard at a time."""
    from . import tables

    def column(name: str) -> Iterator[Any]:
        return itertools.chain.from_iterable(tables.column(path, named(name, prefix, side)) for side in sides)

    return column


def sides_of(source: Any) -> list[str]:
    """[""] for samples; chosen and rejected for preference pairs."""
    if "response" in source.schema:
        source.require("prompt")
        return [""]
    if "chosen" in source.schema or "rejected" in source.schema:
        source.require("prompt", "chosen", "rejected")
        return ["chosen", "rejected"]
    if "completion" in source.schema:
        source.require("prompt")
        return ["completion"]
    source.require("prompt", "response")
    return [""]


def sample_of(row: Mapping[str, Any], side: str) -> dict[str, Any]:
    """The sample that one side of a row stands for: its text, without the token ids of another; a pair's other side opposes."""
    if not side:
        return dict(row)
    sample = {k: v for k, v in row.items() if k not in ("token_ids", "finish_reason")} | {"response": row[side]}
    other = {"chosen": "rejected", "rejected": "chosen"}.get(side)
    return {"opponent": row[other], **sample} if other else sample


def columns_of(scores: Sequence[Any], prefix: str, side: str) -> dict[str, list[Any]]:
    """Score columns of one side: score, why and the extras."""
    extras = sorted({k for s in scores for k in s.extra})
    found = {named("score", prefix, side): [s.value for s in scores], named("why", prefix, side): [s.why for s in scores]}
    return found | {named(k, prefix, side): [s.extra.get(k) for s in scores] for k in extras}


def named(name: str, prefix: str, side: str) -> str:
    """The column of a score (NAME, with a prefix NAME), or of what comes with it (NAME_x); suffixed by the side of a pair."""
    tail = f"_{side}" if side in ("chosen", "rejected") else ""
    if name == "ref_logps":  # TRL's name
        return f"ref{tail}_logps"
    return (prefix if prefix and name == "score" else f"{prefix}_{name}" if prefix else name) + tail
