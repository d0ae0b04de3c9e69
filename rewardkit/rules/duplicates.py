"""dedupe: drops copies, exact ones and near ones (MinHash LSH).

dedupe compares whole texts, or with near=J texts whose n-word shingles have a Jaccard similarity of at least J. Candidates come
from MinHash signatures (rensa, 128 slots of its R-MinHash) that agree in a band (locality-sensitive hashing); each candidate is
then compared exactly, so nothing is dropped that is not as near as was asked. What is near to something near is one cluster
(as in text-dedup and datatrove), of which the first row stays: the clusters do not depend on the order of the rows.

Signatures are not kept, only a key a band: about 0.2 GB of memory for a million texts.

In a table of samples, rows that only share their prompt are no copies when prompts are compared (of=prompt): the samples of a
prompt stay or go together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import polars as pl

from ..errors import OptionError, need
from ..shapes import text_of
from .groups import by_group
from .partition import CODE, Rule, beside, decided
from .texts import batches, grams

SLOTS, SEED = 128, 1
FOUND = 0.98  # of the texts that are just as near as asked, the share whose signatures should meet in a band
TEXTS = ("prompt", "response", "completion", "chosen", "rejected")
SEPARATOR = "\x1f"


def dedupe(of: list | None = None, near: float | None = None, words: int = 3) -> Rule:
    """Keep the first of equal rows. of: the columns that are compared, by default prompt and answers.

    near: also drop texts at least this similar (Jaccard, of all runs of `words` words).
    """
    if near is not None and not 0.3 <= near < 1:
        raise OptionError(f"rule 'dedupe' takes near from 0.3 to below 1, not {near:g}; without near it compares whole texts")
    facts: dict[str, Any] = {}

    def rule(frame: pl.LazyFrame) -> tuple[pl.LazyFrame, pl.LazyFrame]:
        schema = frame.collect_schema()
        columns = [str(c) for c in of] if of else [c for c in TEXTS if c in schema]
        text = pl.concat_str([text_of(schema, c) for c in columns], separator=SEPARATOR, ignore_nulls=True)
        unit = unit_of(schema, columns)
        found = by_group(frame, text.hash(seed=0), _first, **({"unit": unit} if unit is not None else {}))
        codes = found[CODE].to_numpy().copy()
        facts.update(rows=len(codes), exact=int((codes == 1).sum()))
        if near is not None:
            codes = _near(frame, text, found, codes, near, words, facts)
        return decided(frame, codes, [f"duplicate {' + '.join(columns)}", f"near duplicate {' + '.join(columns)}"])

    rule.facts = facts  # type: ignore[attr-defined]
    return rule


def unit_of(schema: pl.Schema, columns: list[str]) -> pl.Expr | None:
    """What stays or goes together, if that is more than a row."""
    if columns != ["prompt"] or "response" not in schema:
        return None
    return pl.col("prompt_id" if "prompt_id" in schema else "prompt").hash(seed=2)


def _first(rows: pl.DataFrame) -> pl.DataFrame:
    """0 for the first of equal texts (`first` is its row), 1 for the others; rows of the first one's unit count as the first."""
    same = pl.col("unit") == pl.col("unit").first() if "unit" in rows.columns else pl.col("row") == pl.col("row").first()
    code = (~same.over("key")).cast(pl.UInt8)
    return rows.select("row", code.alias(CODE), first=pl.col("row").first().over("key"))


def _near(frame: pl.LazyFrame, text: pl.Expr, found: pl.DataFrame, codes: Any, near: float, words: int, facts: dict) -> Any:
    """Codes with 2 where a text belongs to a cluster whose first text is another."""
    import numpy as np

    first = found["first"].to_numpy()
    rows = np.flatnonzero(first == np.arange(len(first)))  # one row a distinct text
    mine = beside(frame.select(text=text), __own=first == np.arange(len(first))).filter("__own").select("text")
    bands, width = _bands(near)
    keys = _band_keys(mine, len(rows), bands, width, words)
    pairs = _candidates(keys)
    near_pairs = pairs[_jaccard(mine, pairs, words) >= near] if len(pairs) else pairs
    label = _clusters(len(rows), near_pairs)
    place = np.empty(len(first), dtype=np.int64)
    place[rows] = np.arange(len(rows))
    other = label[place[first]] != place[first]
    facts.update(near=int((other & (codes == 0)).sum()), candidates=len(pairs), near_pairs=len(near_pairs), bands=bands,
                 slots_a_band=width, found_at_the_threshold=round(1 - (1 - near**width) ** bands, 4))  # fmt: skip
    return np.where(other & (codes == 0), 2, codes).astype(np.uint8)


def _bands(near: float) -> tuple[int, int]:
    """Bands and slots a band: as wide as may be (few false candidates) with FOUND of the pairs at the threshold met."""
    width = max(w for w in range(1, 33) if w == 1 or 1 - (1 - near**w) ** (SLOTS // w) >= FOUND)
    return SLOTS // width, width


def _band_keys(texts: pl.LazyFrame, count: int, bands: int, width: int, words: int) -> Any:
    """One key a text and band: equal keys are candidates. Texts without a word have none (their row's number instead)."""
    import numpy as np

    rensa = need("rensa", "dedupe")
    keys, at = np.empty((bands, count), dtype=np.uint64), 0
    for batch in batches(texts):
        value, begin = grams(batch["text"], words)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(value, begin.astype(np.uint64), SLOTS, SEED)
        slots = np.array(matrix.to_rows(), dtype=np.uint64).reshape(-1, SLOTS)
        for band in range(bands):
            key = np.full(len(slots), band, dtype=np.uint64)
            for slot in slots[:, band * width : (band + 1) * width].T:
                key = (key ^ slot) * np.uint64(0x9E3779B97F4A7C15)
                key ^= key >> np.uint64(31)
            empty = np.diff(begin) == 0
            key[empty] = np.arange(at, at + len(slots), dtype=np.uint64)[empty]
            keys[band, at : at + len(slots)] = key
        at += len(slots)
    return keys


def _candidates(keys: Any) -> Any:
    """Pairs of texts that share a band: each with the one before it and with the first one of those that share."""
    import numpy as np

    found = [np.empty((0, 2), dtype=np.int64)]
    for key in keys:
        order = np.argsort(key, kind="stable")
        same = np.flatnonzero(key[order[1:]] == key[order[:-1]]) + 1
        if not len(same):
            continue
        starts = np.flatnonzero(np.diff(key[order], prepend=~key[order[0]]) != 0)
        head = starts[np.searchsorted(starts, same, side="right") - 1]
        found += [np.stack([order[same - 1], order[same]], axis=1), np.stack([order[head], order[same]], axis=1)]
    return np.unique(np.concatenate(found), axis=0)


def _jaccard(texts: pl.LazyFrame, pairs: Any, words: int) -> Any:
    """The exact Jaccard similarity of the shingles of each pair of texts."""
    import numpy as np

    wanted = np.zeros(int(texts.select(pl.len()).collect(engine="streaming").item()), dtype=bool)
    wanted[pairs.ravel()] = True
    sets: dict[int, Any] = {}
    numbers: Iterator[int] = iter(np.flatnonzero(wanted).tolist())
    for batch in batches(beside(texts, __own=wanted).filter("__own").select("text")):
        value, begin = grams(batch["text"], words)
        for start, end in zip(begin[:-1], begin[1:], strict=True):
            sets[next(numbers)] = np.unique(value[start:end])
    out = np.empty(len(pairs))
    for i, (a, b) in enumerate(pairs.tolist()):
        one, two = sets[a], sets[b]
        shared = len(np.intersect1d(one, two, assume_unique=True))
        out[i] = shared / max(len(one) + len(two) - shared, 1)
    return out


def _clusters(count: int, pairs: Any) -> Any:
    """For each text the first one of its cluster: labels sink along the pairs until none can sink further."""
    import numpy as np

    label = np.arange(count)
    while len(pairs):
        low = np.minimum(label[pairs[:, 0]], label[pairs[:, 1]])
        before = label.copy()
        np.minimum.at(label, pairs[:, 0], low)
        np.minimum.at(label, pairs[:, 1], low)
        np.minimum.at(label, before[pairs[:, 0]], low)  # what a text pointed at before sinks with it
        np.minimum.at(label, before[pairs[:, 1]], low)
        label = label[label]
        if (label == before).all():
            break
    return label
