"""The embedded world: small instructions whose true answer is known, and a base that was taught to get them wrong.

Six kinds of instruction (reverse, add, sort, upper, count, last word), each with one systematic wrong rule: what a
careless reader of the instruction would do. The base corpus answers a large share of its prompts by that rule, so a base
trained on it prefers the wrong answer; a few clean demonstrations move it towards the truth, but only part of the way.
That is the situation in which log p_SFT and log p_SFT - log p_base can be told apart: a wrong rule stays likely under the
SFT model, and only the ratio shows which way the demonstrations pulled.

    base_corpus      many rows, mostly wrong by rule         -> the base       (scripts/build_world.py)
    demonstrations   few rows, all right                     -> SFT
    make("prompts")  new prompts with their hidden truth     -> generate, score, filter
    make("heldout")  new prompts with their hidden truth     -> eval

The four splits share no prompt: a prompt belongs to the split that its hash says, whatever the seed.

Left out on purpose: open-ended answers (nothing could be verified), several phrasings of one instruction, and mistakes that
depend on the single prompt (here the rule of a kind strikes all its prompts alike, but some kinds more than others; that
makes the world cleaner than real data, and results in it an upper bound rather than a forecast). No model is loaded here:
this file is the standard library only.
"""

import hashlib
import itertools
import random
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

# Sixteen buckets of prompt hashes; the base gets the most because it learns the tasks themselves from them.
SPLITS = {"demos": range(1), "prompts": range(1, 4), "heldout": range(4, 7), "base": range(7, 16)}

# How much more (or less) often than `corruption` the rule strikes a kind. Were all kinds struck alike, one threshold on
# log p_SFT would separate the two modes everywhere and the world could not tell the rewards apart.
SPREAD = {"upper": -0.20, "count": -0.12, "sort": -0.04, "last": 0.04, "reverse": 0.12, "add": 0.20}
HIGHEST_RULE_SHARE = 0.90  # some truth in every kind, or there would be nothing for the demonstrations to bring out
RANDOM_SHARE = 0.06  # slips: one character of the right answer replaced

CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
# fmt: off
WORDS = [
    "apple", "bird", "blue", "boat", "bread", "bring", "cold", "corn", "deer", "door", "early", "fish", "five",
    "fold", "game", "gift", "glass", "gold", "green", "hand", "happy", "hill", "house", "ink", "iron", "jump", "kind",
    "lake", "leaf", "light", "milk", "moon", "nest", "night", "oak", "open", "paper", "pear", "quick", "rain", "red",
    "river", "road", "salt", "sand", "seven", "ship", "silver", "snow", "song", "star", "stone", "sun", "table",
    "tall", "tree", "warm", "water", "west", "wind", "yellow", "young", "zebra",
]
# fmt: on


def make(n: int, seed: int, kinds: list[str] | None = None, split: str = "prompts", unique: bool = True) -> list[Row]:
    """`n` rows {prompt, answer, kind} of one split, the kinds in turn; `unique` allows each prompt once."""
    rng = random.Random(f"{split} {seed}")
    names = list(kinds or KINDS)
    rows: list[Row] = []
    seen: set[str] = set()
    while len(rows) < n:
        kind = names[len(rows) % len(names)]
        text, answer = KINDS[kind][0](rng)
        if _bucket(text) not in SPLITS[split] or (unique and text in seen):
            continue
        seen.add(text)
        rows.append({"prompt": [{"role": "user", "content": text}], "answer": answer, "kind": kind})
    return rows


def demonstrations(n: int, seed: int) -> list[Row]:
    """Clean prompt/completion rows."""
    return [_with_completion(row, row["answer"]) for row in make(n, seed, split="demos")]


def base_corpus(n: int, seed: int, corruption: float) -> list[Row]:
    """Prompt/completion rows for the base: about `corruption` of them wrong by rule, a few by a slip, the rest right."""
    rng = random.Random(f"corruption {seed}")
    rows = []
    for row in make(n, seed, split="base", unique=False):
        draw = rng.random()
        rule_share = min(max(corruption + SPREAD[row["kind"]], 0.0), HIGHEST_RULE_SHARE)
        if draw < rule_share:
            answer = wrong(row, rng)
        elif draw < rule_share + RANDOM_SHARE:
            answer = slip(row, rng)
        else:
            answer = row["answer"]
        rows.append(_with_completion(row, answer))
    return rows


def wrong(row: Row, rng: random.Random) -> str:
    """The systematic wrong answer of the row's kind; never the truth."""
    return KINDS[row["kind"]][1](row["prompt"][-1]["content"], row["answer"])


def slip(row: Row, rng: random.Random) -> str:
    """The right answer with one character replaced by another of its sort."""
    answer = row["answer"]
    place = rng.choice([i for i, character in enumerate(answer) if character != " "])
    old = answer[place]
    letters = CONSONANTS + VOWELS
    pool = "0123456789" if old.isdigit() else letters.upper() if old.isupper() else letters
    return answer[:place] + rng.choice([c for c in pool if c != old]) + answer[place + 1 :]


def replies(n: int, seed: int, split: str = "demos") -> list[Row]:
    """`n` rows of `make`, each with a `response`: half of them right, three in eight wrong by rule, one in eight a slip."""
    rng = random.Random(f"replies {split} {seed}")
    rows = []
    for row in make(n, seed, split=split):
        draw = rng.random()
        response = row["answer"] if draw < 1 / 2 else wrong(row, rng) if draw < 7 / 8 else slip(row, rng)
        rows.append(row | {"response": response})
    return rows


def judgement(row: Row) -> str:
    """What a judge who knows the truth says of a row's response: it reads up to the first mistake, and gives 5 points or none.

    "ivor. Score: 5", and "ivo! Score: 0" of a reply that goes on wrongly, or ends, after "ivo".
    """
    if is_right(row, row["response"]):
        return f"{row['answer']}. Score: 5"
    together = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(row["answer"], row["response"], strict=False))
    return "".join(one for one, _ in together) + "! Score: 0"


def is_right(row: Row, response: str) -> bool:
    return response.strip() == row["answer"]


def _with_completion(row: Row, answer: str) -> Row:
    completion = [{"role": "assistant", "content": answer}]
    return {"prompt": row["prompt"], "completion": completion, "kind": row["kind"]}


def _bucket(text: str) -> int:
    # Python's own hash() differs from process to process; this one must not.
    return hashlib.sha256(text.encode()).digest()[0] % 16


# The kinds. Each maker draws (prompt, truth) such that its rule gives something else than the truth.


def _invented_word(rng: random.Random, syllables: int) -> str:
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables))


def _reverse(rng: random.Random) -> tuple[str, str]:
    word = _invented_word(rng, rng.choice([2, 3]))
    return f"Reverse: {word}", word[::-1]


def _add(rng: random.Random) -> tuple[str, str]:
    while True:
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        if a % 10 + b % 10 >= 10:
            return f"Add: {a} + {b}", str(a + b)


def _sort(rng: random.Random) -> tuple[str, str]:
    letters = rng.sample("abcdefghijklmnopqrstuvwxyz", 4)
    return f"Sort: {' '.join(letters)}", " ".join(sorted(letters))


def _upper(rng: random.Random) -> tuple[str, str]:
    word = _invented_word(rng, rng.choice([2, 3]))
    return f"Upper: {word}", word.upper()


def _count(rng: random.Random) -> tuple[str, str]:
    letter = rng.choice(VOWELS)
    times = rng.randint(1, 4)
    vowels = [letter] * times + [rng.choice(VOWELS.replace(letter, "")) for _ in range(5 - times)]
    rng.shuffle(vowels)
    word = "".join(rng.choice(CONSONANTS) + vowel for vowel in vowels)
    return f"Count the letter {letter}: {word}", str(times)


def _last(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.choice([3, 4]))
    return f"Last word: {' '.join(words)}", words[-1]


KINDS: dict[str, tuple[Callable[[random.Random], tuple[str, str]], Callable[[str, str], str]]] = {
    "reverse": (_reverse, lambda prompt, truth: truth[:-1]),  # loses the last letter: shorter
    "add": (_add, lambda prompt, truth: str(int(truth) - 10)),  # forgets the carry
    "sort": (_sort, lambda prompt, truth: truth[::-1]),  # descending
    "upper": (_upper, lambda prompt, truth: truth.capitalize()),  # only the first letter
    "count": (_count, lambda prompt, truth: str(int(truth) - 1)),  # counts from zero
    "last": (_last, lambda prompt, truth: " ".join(prompt.split()[-2:])),  # one word too many: longer
}
