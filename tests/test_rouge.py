"""The ROUGE-L rule is exactly the greedy one, however it is found. Run: .venv/bin/python -m pytest tests/test_rouge.py"""

import random
from fractions import Fraction

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardkit import rules
from rewardkit.errors import DataError, OptionError
from rewardkit.rules.rouge import Index, Texts

LEAST = ["0.3", "0.5", "0.6", "0.7", "0.85", "0.9", "1"]
# Few words, so that texts share many; some rare ones; some more than once in a text; some that only one text has.
WORD = st.one_of(st.sampled_from("abcd"), st.sampled_from("efghijklmnop"), st.integers(0, 400).map(lambda i: f"w{i}"))
TEXT = st.lists(WORD, max_size=24).map(" ".join)


@st.composite
def texts(draw):
    """Texts, some of them changed copies of earlier ones."""
    found = []
    for _ in range(draw(st.integers(0, 14))):
        if found and draw(st.booleans()):
            words = draw(st.sampled_from(found)).split()
            for _ in range(draw(st.integers(0, 4))):
                words.insert(draw(st.integers(0, len(words))), draw(WORD))
                del words[draw(st.integers(0, len(words) - 1))]
            found.append(" ".join(words))
        else:
            found.append(draw(TEXT))
    return found


def apply(spec, frame):
    return rules.partition(rules.load(spec), frame.lazy(), spec)


def lcs(a, b):
    """The longest common subsequence, by the table that everybody knows."""
    row = [0] * (len(b) + 1)
    for x in a:
        old = 0
        for j, y in enumerate(b, start=1):
            old, row[j] = row[j], old + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def near(a, b, least):
    """Is F1 = 2 LCS / (m + n) at least that much? Texts without a word are equal to each other."""
    return 2 * lcs(a, b) >= Fraction(least) * (len(a) + len(b)) if a or b else True


def greedy(listed, least, known=()):
    """The places of the texts that stay, by comparing all with all."""
    kept, stay = [k.split() for k in known], []
    for i, text in enumerate(t.split() for t in listed):
        if not any(near(text, other, least) for other in kept):
            kept.append(text)
            stay.append(i)
    return stay


@given(texts(), st.sampled_from(LEAST))
@settings(max_examples=200, deadline=None)
def test_the_index_decides_as_comparing_all_with_all_does(listed, least):
    texts = Texts(pl.Series([t.split() for t in listed], dtype=pl.List(pl.String)))
    index, stay = Index(texts, Fraction(least)), []
    for i in range(len(listed)):
        if not index.near(i):
            index.keep(i)
            stay.append(i)
    assert stay == greedy(listed, least)


@given(listed=texts(), known=texts(), least=st.sampled_from(LEAST))
@settings(max_examples=15, deadline=None)
def test_the_rule_keeps_what_is_unlike_all_that_was_kept(listed, known, least, tmp_path_factory):
    seeds = tmp_path_factory.mktemp("rouge") / "seeds.parquet"
    pl.DataFrame({"prompt": known}, schema={"prompt": pl.String}).write_parquet(seeds)
    frame = pl.DataFrame({"prompt": [t.upper() + "!" for t in listed]}, schema={"prompt": pl.String}).with_row_index("row")
    for option, before in (("", ()), (f" against={seeds}", known)):
        made = apply(f"rouge max={least}{option}", frame)
        kept, dropped = made.kept.collect(), made.dropped.collect()
        assert kept["row"].to_list() == greedy(listed, least, before)
        assert sorted([*kept["row"], *dropped["row"]]) == list(range(len(listed))) and kept.columns == frame.columns
        assert apply(f"rouge max={least}{option}", kept).counts["dropped"] == 0


def test_it_is_rouge():
    """rouge_score's definition; 0.55 is a value that no F1 of such short texts has, so that its rounding cannot decide."""
    from rouge_score.rouge_scorer import RougeScorer

    rng = random.Random(0)
    vocabulary = [f"{a}{b}" for a in ("ka", "lo", "mi", "ru") for b in ("ban", "dor", "fel", "gus")]
    listed = []
    for _ in range(40):
        words = rng.choices(vocabulary, k=rng.randint(4, 12))
        listed += [" ".join(words), " ".join(words[: len(words) // 2] + rng.choices(vocabulary, k=4))]
    rng.shuffle(listed)
    scorer, kept = RougeScorer(["rougeL"]), []
    for text in listed:
        if all(scorer.score(k, text)["rougeL"].fmeasure < 0.5501 for k in kept):
            kept.append(text)
    made = apply("rouge max=0.5501", pl.DataFrame({"prompt": listed}))
    assert made.kept.collect()["prompt"].to_list() == kept and 10 < len(kept) < 70


def test_a_threshold_is_what_it_says():
    """7 of 10 words in common is 0.7, whatever floating point makes of it; 69 of 100 is not."""
    for words, shared in ((10, 7), (90, 63), (30, 21), (100, 70)):
        a = [f"a{i}" for i in range(words)]
        for same, drops in ((shared, 1), (shared - 1, 0)):
            pair = [" ".join(a), " ".join(a[:same] + [f"b{i}" for i in range(words - same)])]
            assert apply("rouge max=0.7", pl.DataFrame({"prompt": pair})).counts["dropped"] == drops


def test_candidates_are_few_and_none_is_missed():
    """A thousand texts, a tenth of them changed copies: all copies are found, and hardly any pair is compared."""
    rng = random.Random(1)
    vocabulary = [f"w{int(rng.paretovariate(0.2))}" for _ in range(3000)]
    listed = []
    for i in range(1000):
        if i % 10 == 9:
            words = rng.choice(listed).split()
            words[rng.randrange(len(words))] = "changed"
        else:
            words = [*rng.choices(vocabulary, k=rng.randint(15, 40)), f"number{i}"]
        listed.append(" ".join(words))
    made = apply("rouge", pl.DataFrame({"prompt": listed}).with_row_index("row"))
    assert set(made.dropped.collect()["row"]) == {i for i in range(1000) if i % 10 == 9}
    assert made.stages[0]["facts"]["compared"] < 1000 * 999 / 2 / 20


def test_samples_of_a_prompt_stay_or_go_together():
    frame = pl.DataFrame({
        "prompt": [[{"role": "user", "content": t}] for t in ("sing a song", "sing a song", "Sing a song!", "dance")],
        "prompt_id": ["a", "a", "b", "c"], "response": ["1", "2", "3", "4"],
    })  # fmt: skip
    assert apply("rouge", frame).kept.collect()["response"].to_list() == ["1", "2", "4"]
    assert apply("rouge of=response max=1", frame).counts["dropped"] == 0


def test_empty_texts_and_signs():
    """Without a word, texts are alike; a word that one text alone has equals no other such word."""
    frame = pl.DataFrame({"prompt": [None, "!", "", "x", "y", "日本 語", "日本 語 語"]}).with_row_index("row")
    assert apply("rouge max=0.8", frame).kept.collect()["row"].to_list() == [0, 3, 4, 5]


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(OptionError, match="0 < max <= 1, not 1.5"):
        rules.load("rouge max=1.5")
    with pytest.raises(DataError, match=r"there is no file or folder .*gone.jsonl"):
        apply(f"rouge against={tmp_path}/gone.jsonl", pl.DataFrame({"prompt": ["a"]}))
    pl.DataFrame({"text": ["a"]}).write_parquet(tmp_path / "seeds.parquet")
    with pytest.raises(DataError, match="has no column 'prompt'; its columns are 'text'"):
        apply(f"rouge against={tmp_path}/seeds.parquet", pl.DataFrame({"prompt": ["a"]}))
    with pytest.raises(DataError, match="reads column 'prompt'; the columns are text"):
        apply("rouge", pl.DataFrame({"text": ["a"]}))
    chain = rules.load(f"rouge of=text against={tmp_path}/seeds.parquet")
    assert set(chain.inputs[f"against {tmp_path}/seeds.parquet"]) == {"path", "fingerprint"}
