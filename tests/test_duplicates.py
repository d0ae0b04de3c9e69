"""Copies and contamination: found where they are, by any order, and nothing else.

Run: .venv/bin/python -m pytest tests/test_duplicates.py
"""

import random

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardkit import rules
from rewardkit.errors import OptionError
from rewardkit.rules.duplicates import _bands
from rewardkit.rules.texts import grams
from tests import tiny

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "ru", "te", "vo") for b in ("ban", "dor", "fel", "gus", "hin", "jop")]


def apply(spec, frame):
    return rules.partition(rules.load(spec), frame.lazy(), spec)


def sentence(rng, size=30):
    return [rng.choice(WORDS) for _ in range(size)]


def copies(seed=0, originals=150, size=40):
    """Originals, and for some of them a copy with a few words changed: the rows, and each row's family."""
    rng, rows = random.Random(seed), []
    for family in range(originals):
        words = sentence(rng, size)
        rows.append((family, " ".join(words)))
        for _ in range(rng.choice([0, 0, 1, 3])):
            other = list(words)
            other[rng.randrange(size)] = "changed"
            rows.append((family, " ".join(other)))
    rng.shuffle(rows)
    return pl.DataFrame({"family": [f for f, _ in rows], "prompt": [p for _, p in rows]}).with_row_index("row")


def jaccard(a, b, n=3):
    one, two = ({tuple(w[i : i + n]) for i in range(max(1, len(w) - n + 1))} for w in (a.split(), b.split()))
    return len(one & two) / len(one | two)


@given(st.lists(st.lists(st.sampled_from(["a", "B", "c,", "Dd"]), max_size=6).map(" ".join), max_size=8), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_grams_are_equal_where_the_words_are(texts, n):
    value, begin = grams(pl.Series(texts, dtype=pl.String), n)
    plain = [[w.strip(",").lower() for w in t.split()] for t in texts]
    runs = [[tuple(w[i : i + n]) for i in range(max(min(len(w), 1), len(w) - n + 1))] for w in plain]
    assert np.diff(begin).tolist() == [len(r) for r in runs]
    flat = [run for r in runs for run in r]
    assert len(set(flat)) == len(set(value.tolist())) and len({*zip(flat, value.tolist(), strict=True)}) == len(set(flat))


# Exact


@given(st.lists(st.sampled_from(["x", "y", "z", "X", "", None]), max_size=12), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_dedupe_keeps_the_first_of_equals_in_any_order(texts, seed):
    frame = pl.DataFrame({"prompt": texts}, schema={"prompt": pl.String}).with_row_index("row")
    made = apply("dedupe", frame)
    kept, plain = made.kept.collect(), [t or "" for t in texts]
    assert kept["row"].to_list() == [i for i, t in enumerate(plain) if t not in plain[:i]]
    assert made.counts["in"] == len(texts) and kept.height + made.dropped.collect().height == len(texts)
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    assert {t or "" for t in apply("dedupe", frame[order]).kept.collect()["prompt"]} == set(plain)
    assert apply("dedupe", kept).counts["dropped"] == 0


def test_samples_of_one_prompt_are_no_copies_of_each_other():
    frame = pl.DataFrame({"prompt": ["q", "q", "q", "r"], "prompt_id": ["a", "a", "b", "c"], "response": ["1", "2", "1", "1"]})
    assert apply("dedupe of=prompt", frame).kept.collect()["prompt_id"].to_list() == ["a", "a", "c"]
    assert apply("dedupe", frame).counts["out"] == 3, "prompt and response together: the third row is the first again"
    assert apply("dedupe of=response", frame).counts["out"] == 2
    assert apply("dedupe", frame.drop("response")).counts["out"] == 2, "without responses, a prompt is a row"


def test_parts_do_not_run_together():
    frame = pl.DataFrame({"prompt": ["ab", "a"], "response": ["c", "bc"]})
    assert apply("dedupe", frame).counts["out"] == 2


# Near


def test_near_copies_are_found_and_nothing_else():
    frame = copies()
    made = apply("dedupe near=0.7", frame)
    kept = made.kept.collect()
    assert kept.height == frame["family"].n_unique() and kept["family"].is_unique().all()
    assert kept["row"].to_list() == frame.unique("family", keep="first", maintain_order=True)["row"].to_list()
    facts = made.stages[0]["facts"]
    assert facts["near"] + facts["exact"] == made.counts["dropped"] and facts["found_at_the_threshold"] >= 0.98


def test_a_dropped_row_is_as_near_as_was_asked():
    """Copies with ever more words changed: those below the threshold stay, whatever their signatures say."""
    rng = random.Random(3)
    rows = []
    for changed in range(1, 13):
        words = sentence(rng, 60)
        other = list(words)
        for place in rng.sample(range(60), changed):
            other[place] = "changed"
        rows += [" ".join(words), " ".join(other)]
    dropped = set(apply("dedupe near=0.7", pl.DataFrame({"prompt": rows})).dropped.collect()["prompt"])
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert (second in dropped) == (jaccard(first, second) >= 0.7)


@given(st.integers(0, 999))
@settings(max_examples=8, deadline=None)
def test_near_copies_do_not_depend_on_the_order_and_are_gone_for_good(seed):
    frame = copies(seed, originals=20)
    order = list(range(frame.height))
    random.Random(seed).shuffle(order)
    one, two = (apply("dedupe near=0.6", f).kept.collect() for f in (frame, frame[order]))
    assert sorted(one["family"]) == sorted(two["family"])
    assert apply("dedupe near=0.6", one).counts["dropped"] == 0


def test_a_lower_threshold_drops_more():
    frame = copies(1)
    kept = [set(apply(f"dedupe near={near}", frame).kept.collect()["row"]) for near in (0.5, 0.7, 0.95)]
    assert kept[0] <= kept[1] <= kept[2] and len(kept[1]) < len(kept[2])


@pytest.mark.parametrize("near", [0.4, 0.5, 0.7, 0.8, 0.9, 0.95])
def test_the_bands_find_what_they_promise(near):
    """The share of pairs at the threshold that meet in a band, measured with the library's own signatures."""
    import rensa

    bands, width = _bands(near)
    rng, met, tried = np.random.default_rng(0), 0, 400
    for i in range(tried):
        shared, own = int(200 * near), int(200 * (1 - near) / 2)
        values = rng.integers(0, 2**63, shared + 2 * own, dtype=np.uint64)
        both = [values[: shared + own], np.concatenate([values[:shared], values[shared + own :]])]
        matrix = rensa.RMinHash.digest_matrix_from_token_hash_sets([b.tolist() for b in both], 128, 1 + i)
        one, two = np.array(matrix.to_rows())[:, : bands * width].reshape(2, bands, width)
        met += bool((one == two).all(axis=1).any())
    assert met / tried >= 0.95


# Contamination


def test_thirteen_words_in_a_row_are_found_and_listed(tmp_path):
    rng = random.Random(0)
    evaluation = [" ".join(sentence(rng, 25)) for _ in range(20)] + ["What is two plus two?", "yes"]
    pl.DataFrame({"question": evaluation}).write_parquet(tmp_path / "eval.parquet")
    words = evaluation[4].split()
    rows = [
        " ".join([*sentence(rng, 5), *words[3:16], "end"]),  # 13 in a row
        " ".join([*sentence(rng, 5), *words[3:15], "end"]),  # 12 in a row
        evaluation[7].upper().replace(" ", ",  "),  # other case and punctuation
        "what is TWO plus two",  # a short text, whole
        "I wonder: what is two plus two?",  # a short text, inside another: not found
        "yes",  # too short to mean anything
        None,
    ]
    frame = pl.DataFrame({"prompt": rows, "response": ["-"] * 7}).with_row_index("row")
    made = apply(f"decontaminate against={tmp_path}/eval.parquet", frame)
    dropped = made.dropped.collect()
    assert dropped["row"].to_list() == [0, 2, 3] and made.kept.collect().columns == frame.columns
    assert dropped["hit"][0] == f"{tmp_path}/eval.parquet: {' '.join(words[3:16])}"
    assert made.reasons == {f"shares 13 words with {tmp_path}/eval.parquet": 3}
    facts = made.stages[0]["facts"]
    assert facts["hits"] == 3 and facts["listed"][0]["text"] == evaluation[4][:80] and facts["listed"][1]["row"] == 2
    assert apply(f"decontaminate against={tmp_path}/eval.parquet n=12", frame).counts["dropped"] == 4
    assert apply(f"decontaminate against={tmp_path}/eval.parquet", made.kept.collect()).counts["dropped"] == 0
    chain = rules.load(f"decontaminate against={tmp_path}/eval.parquet")
    assert set(chain.inputs[f"against {tmp_path}/eval.parquet"]) == {"path", "fingerprint"}


def test_unknown_evaluation_sets_are_named():
    with pytest.raises(OptionError, match="unknown evaluation set 'gsm8'; did you mean 'gsm8k'"):
        rules.load("decontaminate against=gsm8")
    with pytest.raises(OptionError, match="against=gsm8k needs data=FOLDER"):
        rules.load("decontaminate against=gsm8k")


@pytest.mark.data
def test_the_benchmarks_are_ready_to_use(data_folder):
    from rewardkit.rules.decontaminate import BENCHMARKS

    questions = pl.read_parquet(data_folder / "gsm8k_test.parquet")["question"].head(3)
    train = pl.read_parquet(data_folder / "gsm8k_train.parquet").select(prompt="question", response="answer")
    frame = pl.concat([train.head(500), pl.DataFrame({"prompt": "Solve this: " + questions, "response": ["?"] * 3})])
    made = apply(f"decontaminate against={','.join(BENCHMARKS)} data={data_folder}", frame)
    hits = made.dropped.collect()
    assert hits.filter(pl.col("response") == "?").height == 3, "the test questions are found"
    assert made.counts["dropped"] < 30, "training questions are not the test's"


# Collapsed pairs


def test_pairs_that_are_the_same_to_the_model_are_dropped(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    pairs = {
        "prompt": ["hi"] * 4 + ["p" * 60],
        "chosen": ["same", "a" * 40 + "b", "short", "same", "x"],
        "rejected": ["same", "a" * 40 + "c", "other", None, "y"],
    }
    frame = pl.DataFrame(pairs).with_row_index("row")
    made = apply(f"collapsed tokenizer={tmp_path} max_length=32", frame)
    assert made.kept.collect()["row"].to_list() == [2]
    assert made.reasons == {"chosen and rejected are the same 32 tokens": 3, "no pair": 1}
    assert apply(f"collapsed tokenizer={tmp_path} max_length=64", frame).kept.collect()["row"].to_list() == [1, 2, 4]
    assert made.stages[0]["facts"] == {"collapsed": 3}
