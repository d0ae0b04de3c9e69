"""rouge: keep texts that are unlike every text kept before them. Self-Instruct's rule for new prompts (arXiv:2212.10560).

ROUGE-L of texts of m and n words is F1 = 2 LCS / (m + n), with LCS the length of their longest common subsequence of words
(Lin 2004, equal weights; words are lowercased, punctuation does not count). The rule is greedy: rows in order, a row is dropped
if its F1 with a kept one is `max` or more. The result is exactly that; only pairs that cannot reach `max` are not looked at:

    length    LCS <= min(m, n), so n lies between m max / (2 - max) and m (2 - max) / max
    words     LCS <= shared words, so a pair at `max` shares at least a = ceil(max (m + n) / 2), the k-th occurrence of a word
              being a word of its own
    prefix    with the words of each text sorted from rare to common, two texts that share a words share DEPTH of the first
              m - a + DEPTH words of the one and n - a + DEPTH of the other (prefix filtering, Chaudhuri et al. 2006; Wang et
              al. 2012 for DEPTH > 1), so an index of these first words finds every candidate
    LCS       bit-parallel (rapidfuzz), with a letter for each word

Numbers are compared as whole numbers, so that 7 of 10 words are 0.7 and not a little less. The index holds about half of the
kept words, 4 bytes each. Left out: stemming, and several processes (what is kept depends on all that was kept before).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import polars as pl

from .. import tables
from ..errors import DataError, OptionError, need
from ..shapes import text_of
from ..show import progress
from .duplicates import unit_of
from .partition import Rule, decided
from .texts import WORD

DEPTH = 3
# Letters: of a word that occurs once; of such a word in a kept text, so that the two never match; and the first of the others.
ONCE, ONCE_KEPT, FIRST = 1, 2, 3
LETTERS = 0x10FFFF - 0x800 - FIRST
REPORT = 1000  # rows between two steps of the progress bar


def rouge(max: float = 0.7, of: str = "prompt", against: list | None = None) -> Rule:  # noqa: A002 - the option's name
    """Keep texts whose ROUGE-L with every text that was kept before them is below `max` (read to 6 decimals).

    against: tables with the same column, whose texts count as kept before the first row: seeds, or the prompts of earlier rounds.
    """
    if not 0 < max <= 1:
        raise OptionError(f"rule 'rouge' takes 0 < max <= 1, not {max:g}")

    def others() -> list[tables.Table]:  # opened when the rule runs: an earlier step of a recipe may make them
        return [tables.open(str(name)).require(of) for name in against or ()]

    facts: dict[str, Any] = {}

    def rule(frame: pl.LazyFrame) -> tuple[pl.LazyFrame, pl.LazyFrame]:
        import numpy as np

        known = [_words(other.frame(), of) for other in others()]
        words = pl.concat([*known, _words(frame, of)])
        texts, before = Texts(words), sum(len(k) for k in known)
        index = Index(texts, Fraction(max).limit_denominator(1_000_000))
        for i in range(before):
            index.keep(i)
        codes = np.zeros(len(words) - before, dtype=np.uint8)
        unit = unit_of(frame.collect_schema(), [of])
        names = frame.select(unit).collect(engine="streaming").to_series().to_list() if unit is not None else range(len(codes))
        said: dict[Any, int] = {}
        with progress("rouge", len(codes)) as advance:
            for row, name in enumerate(names):
                if name not in said:
                    said[name] = int(index.near(before + row))
                    if not said[name]:
                        index.keep(before + row)
                codes[row] = said[name]
                if (row + 1) % REPORT == 0 or row + 1 == len(codes):
                    advance(row % REPORT + 1)
        facts.update(compared=index.compared, **({"known": before} if against else {}))
        return decided(frame, codes, [f"ROUGE-L of {of} with a kept one is {max:g} or more"])

    rule.facts = facts  # type: ignore[attr-defined]
    rule.inputs = lambda: {  # type: ignore[attr-defined]
        f"against {other.name}": {"path": other.name, "fingerprint": other.fingerprint} for other in others()
    }
    return rule


def _words(frame: pl.LazyFrame, of: str) -> pl.Series:
    """The words of each row."""
    text = text_of(frame.collect_schema(), of).fill_null("").str.to_lowercase()
    return frame.select(words=text.str.extract_all(WORD)).collect(engine="streaming")["words"]


class Texts:
    """Many texts as arrays: what each is spelled with, and its words from rare to common.

    spelled[begin[i]:begin[i + 1]] are the letters of text i, in its order. words, of the same shape, are numbers of (word, k-th
    time in this text), the rarest first; those below `lonely` stand in no other text.
    """

    def __init__(self, words: pl.Series) -> None:
        import numpy as np

        size = words.list.len().to_numpy().astype(np.int64)
        self.begin = np.concatenate([[0], np.cumsum(size)])
        flat = words.list.explode(empty_as_null=False).rank("dense").to_numpy().astype(np.int32) - 1
        owner = np.repeat(np.arange(len(size), dtype=np.int32), size)
        count = np.bincount(flat)
        common = np.empty(len(count), dtype=np.int64)  # 0 for the most frequent word: short letters for those
        common[np.argsort(-count, kind="stable")] = np.arange(len(count))
        if (count > 1).sum() > LETTERS:
            raise DataError(
                f"rule 'rouge' takes at most {LETTERS:,} distinct words that occur twice; filter the table in portions"
            )
        letter = np.where(count == 1, ONCE, common + FIRST)
        self.spelled = np.where(letter < 0xD800, letter, letter + 0x800).astype("<u4")[flat]  # what lies between are no letters
        # The k-th time of a word in its text: its place among equal (text, word).
        order = np.lexsort((flat, owner))
        text, word = owner[order], flat[order]
        del owner, flat, order
        new = np.ones(len(text), dtype=bool)
        new[1:] = (text[1:] != text[:-1]) | (word[1:] != word[:-1])
        first = np.flatnonzero(new)
        time = np.arange(len(text)) - np.repeat(first, np.diff(first, append=len(text)))
        _, element = np.unique(word.astype(np.int64) * (time.max(initial=0) + 1) + time, return_inverse=True)
        texts_with = np.bincount(element)
        rank = np.empty(len(texts_with), dtype=np.int32)
        rank[np.argsort(texts_with, kind="stable")] = np.arange(len(texts_with))
        ranked = rank[element]
        self.words = ranked[np.lexsort((ranked, text))]
        self.lonely = int((texts_with == 1).sum())

    def spell(self, i: int) -> str:
        """Text i with a letter for each word."""
        return self.spelled[self.begin[i] : self.begin[i + 1]].tobytes().decode("utf-32-le")

    def size(self, i: int) -> int:
        """How many words text i has."""
        return int(self.begin[i + 1] - self.begin[i])


class Index:
    """The kept texts, by their rare words. compared: how often two texts were compared word by word."""

    def __init__(self, texts: Texts, least: Fraction) -> None:
        import numpy as np

        self.fuzz = need("rapidfuzz", "dedupe")
        self.texts, self.p, self.q = texts, least.numerator, least.denominator
        self.cutoff = max(0.0, float(least) - 0.01)  # rapidfuzz rounds it: it only saves time, the last word is `enough`
        self.places: dict[int, array[int]] = {}
        self.spelled: list[str] = []
        self.sizes = np.zeros(1024, dtype=np.int64)
        self.whole: set[str] = set()
        self.compared = 0

    def enough(self, m: int, n: Any) -> Any:
        """The words that texts of m and n words have in common at least, in order, if they are near: ceil(max (m + n) / 2)."""
        return -(-self.p * (m + n) // (2 * self.q))

    def first(self, i: int) -> Iterator[int]:
        """The rare words of text i by which it is found; words that no other text has find nothing."""
        m, start = self.texts.size(i), self.texts.begin[i]
        shortest = -(-self.p * m // (2 * self.q - self.p))
        many = min(m, m - self.enough(m, shortest) + DEPTH)
        return (word for word in self.texts.words[start : start + many].tolist() if word >= self.texts.lonely)

    def keep(self, i: int) -> None:
        """Put text i among the kept ones."""
        import numpy as np

        number, text = len(self.spelled), self.texts.spell(i)
        if chr(ONCE) not in text:
            self.whole.add(text)
        self.spelled.append(text.replace(chr(ONCE), chr(ONCE_KEPT)))
        if number == len(self.sizes):
            self.sizes = np.concatenate([self.sizes, np.zeros_like(self.sizes)])
        self.sizes[number] = len(text)
        for word in self.first(i):
            self.places.setdefault(word, array("I")).append(number)

    def near(self, i: int) -> bool:
        """Is text i near to a kept one?"""
        text, m = self.texts.spell(i), self.texts.size(i)
        if text in self.whole:
            return True
        found = self._candidates(i, m)
        self.compared += len(found)
        if not len(found):
            return False
        choices = [self.spelled[place] for place in found]
        # ROUGE-L of the texts is the normalized indel similarity of the spelled ones.
        scorer = self.fuzz.distance.Indel.normalized_similarity
        best = self.fuzz.process.extractOne(text, choices, scorer=scorer, score_cutoff=self.cutoff, processor=None)
        return best is not None and self.fuzz.distance.LCSseq.similarity(text, best[0]) >= self.enough(m, len(best[0]))

    def _candidates(self, i: int, m: int) -> list[int]:
        """Kept texts of a fitting length that share enough rare words with text i."""
        import numpy as np

        places = [np.frombuffer(self.places[word], dtype=np.uint32) for word in self.first(i) if word in self.places]
        if not places:
            return []
        place, shared = np.unique(np.concatenate(places), return_counts=True)
        n = self.sizes[place]
        least = self.enough(m, n)
        fits = (least <= np.minimum(m, n)) & (shared >= np.minimum(least, DEPTH))
        return place[fits].tolist()
