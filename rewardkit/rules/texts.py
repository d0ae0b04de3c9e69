"""Words, and hashes of words in a row (n-grams), of many texts at once: what finding copies is made of.

A word is a run of letters or digits, lowercased; punctuation and spacing do not count. Texts become one flat array of
n-gram hashes and the places where each text begins, so that the work is done by arrays and not by Python.
"""

from __future__ import annotations

from typing import Any

import polars as pl

WORD = r"[\p{L}\p{N}]+"
MULTIPLIER = 0x9E3779B97F4A7C15


def grams(texts: pl.Series, n: int) -> tuple[Any, Any]:
    """Hashes of every n words in a row (uint64), and where each text's begin (one more than there are texts).

    A text of fewer than n words has one hash, of all of its words; an empty one has none.
    """
    import numpy as np

    words = texts.fill_null("").str.to_lowercase().str.extract_all(WORD)
    count = words.list.len().to_numpy().astype(np.int64)
    flat = words.list.explode(empty_as_null=False).hash(seed=1).to_numpy()
    start = np.concatenate([[0], np.cumsum(count)])
    size = np.maximum(count - n + 1, np.minimum(count, 1))  # n-grams of each text
    begin = np.concatenate([[0], np.cumsum(size)])
    # The word at which each n-gram begins, and how many words it has.
    first = np.arange(begin[-1]) - np.repeat(begin[:-1] - start[:-1], size)
    width = np.repeat(np.minimum(count, n), size)
    value = np.zeros(len(first), dtype=np.uint64)
    for step in range(n):
        inside = step < width
        word = flat[np.minimum(first + step, max(len(flat) - 1, 0))] if len(flat) else value
        value = np.where(inside, (value ^ word) * np.uint64(MULTIPLIER) + (value >> np.uint64(29)), value)
    return value, begin


def batches(frame: pl.LazyFrame, size: int = 50_000) -> Any:
    """A narrow frame in portions, in row order."""
    return frame.collect_batches(chunk_size=size, maintain_order=True)
