"""Seed data of Self-Rewarding Language Models (arXiv:2401.10020, section 3.1; SPEC C.2) out of OpenAssistant conversations.

    oasst part=ift    instructions and the replies that people ranked best: what a model is to say
    oasst part=eft    instructions and all of their ranked replies, to be scored by a judge
    agrees            ... of which those stay that the judge orders as people did; its words become what a judge is to say
    oasst part=eval   the same rows as eft, of other conversations: what a judge is measured on

A table has a row for every message, as OpenAssistant/oasst1 has: message_id, parent_id, text, role (prompter or user, and
assistant), rank (0 is the best of a message's replies), lang; without a column `lang` all of it is taken. Only first turns are
read: the reply to a message that has no parent. The parts share no first message: a hash of its id and the seed puts them in
an order, and the shares cut it. Left out: later turns, other labels than the rank, and any look at the text.
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import polars as pl

from ..errors import OptionError
from ..rubrics import rubric as read_rubric
from ..rubrics import told
from ..tables import text
from .groups import by_group
from .partition import CODE, MISSING, Rule, decided, group_key, number, split

PARTS = ("ift", "eft", "eval")
OF_THE_REPLY = ("votes", "raw", "unparsed", "n_valid", "spread", "expected", "mass", "why")


def oasst(
    part: Literal["ift", "eft", "eval"],
    ift: float = 0.5,
    eft: float = 0.375,
    eval: float = 0.125,
    lang: str = "en",
    seed: int = 0,
) -> Rule:
    """Keep the replies to first messages that one part of the seed data is made of; the other messages are dropped.

    part=ift gives prompt and completion (the reply of rank 0); eft and eval give prompt, response and rank, for messages with
    two or more ranked replies. ift, eft, eval: shares of the first messages (the paper says 3,200 examples, and 1,630 to 541).
    """
    if min(ift, eft, eval) < 0 or ift + eft + eval > 1 + 1e-9:
        raise OptionError(f"rule 'oasst' takes ift, eft and eval that sum to at most 1, not {ift:g}, {eft:g}, {eval:g}")
    facts: dict[str, Any] = {}

    def rule(frame: pl.LazyFrame) -> tuple[pl.LazyFrame, pl.LazyFrame]:
        schema = frame.collect_schema()
        there = pl.lit(True) if "deleted" not in schema else ~pl.col("deleted").fill_null(False)
        there &= (pl.lit(True) if "lang" not in schema else pl.col("lang") == lang) & (pl.col("text").str.strip_chars() != "")
        first = frame.filter(pl.col("parent_id").is_null(), pl.col("role").is_in(("prompter", "user")), there)
        asked = first.select(parent_id="message_id", __asked="text").collect(engine="streaming")
        parts = _parts(asked["parent_id"].to_list(), {"ift": ift, "eft": eft, "eval": eval}, seed)
        ranked = frame.filter(pl.col("rank").is_not_null(), there).group_by("parent_id").agg(__ranked=pl.len())
        told = asked.with_columns(__part=pl.Series(parts, dtype=pl.String)).lazy().join(ranked, on="parent_id", how="left")
        both = frame.join(told, on="parent_id", how="left", maintain_order="left")
        rank = pl.col("rank")
        reasons = {
            "not a reply": pl.col("role") != "assistant",
            f"empty, deleted or not in '{lang}'": ~there,
            "not a reply to a first message": pl.col("__asked").is_null(),
            f"not in the part '{part}'": (pl.col("__part") != part) | pl.col("__part").is_null(),
            "no rank": rank.is_null(),
            "not ranked best": (rank != 0) & (part == "ift"),
            "the only ranked reply": (pl.col("__ranked").fill_null(0) < 2) & (part != "ift"),
        }
        why = pl.coalesce(*(pl.when(wrong.fill_null(True)).then(pl.lit(reason)) for reason, wrong in reasons.items()))
        kept, dropped = split(both, why.is_null(), why)
        facts.update(first_messages=asked.height, in_this_part=parts.count(part))
        own = [c for c in schema if c not in ("text", "rank", "prompt", "response", "completion")]
        answer = {"completion": pl.col("text")} if part == "ift" else {"response": pl.col("text"), "rank": rank}
        return kept.select(*own, prompt="__asked", **answer), dropped.drop("__asked", "__part", "__ranked")

    rule.facts = facts  # type: ignore[attr-defined]
    return rule


def _parts(ids: list[str], shares: dict[str, float], seed: int) -> list[str | None]:
    """The part of each first message: exact shares (rounded down) of an order that neither the rows nor a library decide."""
    order = sorted(range(len(ids)), key=lambda i: (hashlib.sha256(f"{seed} {ids[i]}".encode()).digest(), i))
    found: list[str | None] = [None] * len(ids)
    reached, start = 0.0, 0
    for name in PARTS:
        reached += shares[name]
        end = int(reached * len(ids) + 1e-9)
        for place in order[start:end]:
            found[place] = name
        start = end
    return found


def agrees(
    agreement: Literal["full", "pairwise"] = "full",
    rubric: str = "additive5",
    by: str = "score",
    rank: str = "rank",
    per: str = "prompt",
) -> Rule:
    """Keep scored replies that the judge orders as people did, as examples of judging: prompt, completion, vote.

    The prompt is the judge's (`rubric`, filled), the completion what it said: the whole text of the vote nearest to its score,
    out of the columns `raw` and `votes` that the reward `judge` writes. agreement=full: all replies of a prompt stay or none,
    by strict order (replies that people ranked alike may stand in any). pairwise: a reply stays that stands right to each of
    the others. by, rank: the columns of score (more is better) and rank (less is better).
    """
    asks = read_rubric(rubric)
    head = "" if by == "score" else f"{by}_"
    votes, raw = f"{head}votes", f"{head}raw"
    facts: dict[str, Any] = {}

    def asked_of(row: dict[str, Any]) -> str:
        return asks.fill(told(row), text(row["response"]))

    def rule(frame: pl.LazyFrame) -> tuple[pl.LazyFrame, pl.LazyFrame]:
        voted = pl.col(raw).is_not_null() & (pl.col(votes).list.drop_nulls().list.len() > 0)
        columns = {"score": number(by), "rank": number(rank), "voted": voted}
        found = by_group(frame, group_key(frame, per), lambda rows: _order(rows, agreement == "full"), **columns)
        pairs = {"pairs": int(found["pairs"].sum()), "right": int(found["right"].sum()), "tied": int(found["tied"].sum())}
        facts.update(pairs, pairwise_accuracy=round(pairs["right"] / pairs["pairs"], 4) if pairs["pairs"] else None)
        reasons = [MISSING.format(by), MISSING.format(rank), "no vote to learn from", "no other reply to compare it with",
                   "another reply to the prompt has no score", "two replies have the same score",
                   "the judge's order is not people's"]  # fmt: skip
        kept, dropped = decided(frame, found[CODE], reasons)
        said = pl.struct(score=number(by), votes=votes, raw=raw).map_elements(_said, return_dtype=SAID)
        asked = pl.struct("prompt", "response").map_elements(asked_of, return_dtype=pl.String)
        shown = kept.drop("completion", "vote", strict=False).with_columns(said.alias("__said"), prompt=asked).unnest("__said")
        # What described the reply, or the vote that was not taken, does not describe the example.
        return shown.drop("response", "prompt_id", *(f"{head}{c}" for c in OF_THE_REPLY), strict=False), dropped

    rule.facts = facts  # type: ignore[attr-defined]
    return rule


def _order(rows: pl.DataFrame, full: bool) -> pl.DataFrame:
    """For each reply its code, and of the pairs in which people have it as the better one: how many the judge has right."""
    scored = rows.filter(pl.col("score").is_not_null() & pl.col("rank").is_not_null())
    pairs = scored.join(scored, on="key", suffix="_worse").filter(pl.col("rank") < pl.col("rank_worse"))
    pairs = pairs.select(
        "key", "row", "row_worse", right=pl.col("score") > pl.col("score_worse"), tied=pl.col("score") == pl.col("score_worse")
    )
    counts = pairs.group_by("row").agg(pairs=pl.len(), right=pl.col("right").sum(), tied=pl.col("tied").sum())
    wrong = ~pl.col("right") & ~pl.col("tied")
    if full:
        seen = pairs.group_by("key").agg(of=pl.len(), tied_ones=pl.col("tied").sum(), wrong_ones=wrong.sum())
        marked = rows.join(seen, on="key", how="left")
    else:
        sides = [pairs.select("right", "tied", row=pl.col(side)) for side in ("row", "row_worse")]
        seen = pl.concat(sides).group_by("row").agg(of=pl.len(), tied_ones=pl.col("tied").sum(), wrong_ones=wrong.sum())
        marked = rows.join(seen, on="row", how="left")
    unscored = (pl.col("score").is_null() & pl.col("rank").is_not_null()).any().over("key")
    tests = [
        pl.col("score").is_null(), pl.col("rank").is_null(), ~pl.col("voted").fill_null(False), pl.col("of").fill_null(0) == 0,
        unscored & full, pl.col("tied_ones") > 0, pl.col("wrong_ones") > 0,
    ]  # fmt: skip
    code = pl.coalesce(
        *(pl.when(test).then(pl.lit(i, dtype=pl.UInt8)) for i, test in enumerate(tests, start=1)), pl.lit(0, dtype=pl.UInt8)
    )
    return marked.with_columns(code.alias(CODE)).join(counts, on="row", how="left").select(
        "row", CODE, *(pl.col(c).fill_null(0).cast(pl.UInt32) for c in ("pairs", "right", "tied"))
    )  # fmt: skip


SAID = pl.Struct({"completion": pl.String, "vote": pl.Float64})


def _said(row: dict[str, Any]) -> dict[str, Any]:
    """The vote nearest to the score, of equally near ones the first, and its text."""
    both = [(vote, said) for vote, said in zip(row["votes"], row["raw"], strict=False) if vote is not None]
    vote, said = min(both, key=lambda one: abs(one[0] - row["score"]), default=(None, None))
    return {"completion": said, "vote": vote}


def thin(by: str = "vote", to: int | None = None, seed: int = 0) -> Rule:
    """Keep only `to` of the rows with the most frequent value of `by`, by chance; without `to`, as many as the next value has.

    SPEC C.2: nearly all of a judge's scores are one number, which is thinned. Where there is no other value, all stay.
    """
    if to is not None and to < 1:
        raise OptionError(f"rule 'thin' takes to >= 1, not {to}")

    def rule(frame: pl.LazyFrame) -> tuple[pl.LazyFrame, pl.LazyFrame]:
        import numpy as np

        value = frame.select(value=number(by)).collect(engine="streaming")["value"]
        codes = value.is_null().cast(pl.UInt8).to_numpy().copy()
        most = value.drop_nulls().value_counts().sort(["count", "value"], descending=True)
        limit = to if to is not None else most["count"][1] if most.height > 1 else None
        common = most["value"][0] if most.height else None
        if limit is not None and common is not None:
            rows = np.flatnonzero((value == common).fill_null(False).to_numpy())
            codes[np.random.default_rng(seed).permutation(rows)[limit:]] = 2
        return decided(frame, codes, [MISSING.format(by), f"{by} is {common}, the most frequent one"])

    return rule
