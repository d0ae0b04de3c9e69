"""Rules keep and drop: each row once, the right ones, in any order. Run: .venv/bin/python -m pytest tests/test_rules.py"""

import math
import random

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardkit import rules
from rewardkit.errors import DataError, OptionError
from rewardkit.rules.groups import by_group
from rewardkit.rules.pairs import PAIR, _sorted

settings.register_profile("rules", max_examples=25, deadline=None)
settings.load_profile("rules")
SCORE = st.one_of(st.none(), st.sampled_from([0.0, 1.0, 2.0]), st.floats(-9, 9), st.just(math.nan))
ROWS = st.lists(st.tuples(st.integers(0, 4), SCORE), max_size=30)
# Rules that keep samples as they are, by numbers: every property holds for each of them.
SELECT = ["all",
          "threshold min=0.5", "threshold max=1", "threshold min=-1 max=1", "quantile low=0.5", "quantile low=0.2 high=0.8",
          "quantile low=0.5 per=prompt", "top k=3", "top fraction=0.5", "top per=prompt k=1", "top per=prompt fraction=0.5",
          "top per=half k=2", "finished", "finished unknown=drop", "length min=3", "length max=4 unit=words",
          "keywords of=response words='r1,w w w'",
          "matches pattern=r1", "matches pattern=r1 invert=true", "label high=1 low=0", "residual",
          "combine columns=score,other", "combine columns=score,other how=weighted weights=1,-2 veto=other:1",
          "threshold min=-5 then top per=prompt k=2 then matches pattern=r1 invert=true"]  # fmt: skip
PAIRS = ["best_vs_worst", "best_vs_worst length_penalty=0.5", "best_vs_worst truncated=keep", "best_vs_random seed=3",
         "length_matched", "length_matched tolerance=0.9", "threshold min=-5 then best_vs_worst then margin min=0.5"]  # fmt: skip


def frame(rows) -> pl.LazyFrame:
    schema = {"prompt": pl.String, "response": pl.String, "score": pl.Float64, "row": pl.Int64, "half": pl.Int64,
              "other": pl.Float64, "finish_reason": pl.String}  # fmt: skip
    ends = (None, "stop", "length")
    given = [(f"p{p}", f"r{i}" + " w" * (i % 5), s, i, i % 2, float(i % 3), ends[i % 7 % 3]) for i, (p, s) in enumerate(rows)]
    return pl.DataFrame(given, schema=schema, orient="row").lazy()


def apply(spec, given):
    table = given if isinstance(given, pl.LazyFrame) else frame(given)
    return rules.partition(rules.load(spec), table, spec)


def kept(spec, given) -> set[int]:
    return set(apply(spec, given).kept.collect()["row"])


# Partition: every row once


@pytest.mark.parametrize("spec", SELECT)
@given(rows=ROWS)
@settings(max_examples=12)
def test_a_rule_keeps_a_row_or_drops_it_with_a_reason(spec, rows):
    made = apply(spec, rows)
    keep, drop = made.kept.collect(), made.dropped.collect()
    assert sorted(keep["row"].to_list() + drop["row"].to_list()) == list(range(len(rows)))
    assert made.counts == {"in": len(rows), "out": keep.height, "used": keep.height, "dropped": drop.height}
    assert drop["reason"].null_count() == 0 and drop.height == sum(made.reasons.values())
    assert keep["row"].is_sorted(), "the order of the table stays"
    given = frame(rows).collect()
    for part in (keep, drop):  # rows come out as they went in; only columns may be added
        assert part.select(given.columns).sort("row").equals(given.filter(pl.col("row").is_in(part["row"].implode())))
    assert [s["in"] for s in made.stages][1:] == [s["out"] for s in made.stages][:-1]


@pytest.mark.parametrize("spec", PAIRS)
@given(rows=ROWS)
@settings(max_examples=12)
def test_a_pair_uses_two_rows_of_one_prompt_and_the_rest_is_dropped(spec, rows):
    made = apply(spec, rows)
    pairs, drop = made.kept.collect(), made.dropped.collect()
    assert made.counts["in"] == len(rows) == 2 * pairs.height + made.counts["dropped"]
    assert sum(made.reasons.values()) == made.counts["dropped"] and drop["reason"].null_count() == 0
    by_response = {r["response"]: r for r in frame(rows).collect().to_dicts()}
    for pair in pairs.to_dicts():
        best, worst = (by_response[pair[side][0]["content"]] for side in ("chosen", "rejected"))
        assert best["prompt"] == worst["prompt"] == pair["prompt"] and best["row"] != worst["row"]
        assert (pair["score_chosen"], pair["score_rejected"]) == (best["score"], worst["score"])
        assert pair["margin"] == best["score"] - worst["score"]
        if "truncated=keep" not in spec:
            assert "length" not in (best["finish_reason"], worst["finish_reason"])
        if "length_penalty" not in spec:
            assert best["score"] > worst["score"]
    prompts = pairs["prompt"].to_list()
    assert len(set(prompts)) == len(prompts)


# The right rows: each rule against a few lines of Python that say what it means


def scored(rows):
    return [(i, p, s) for i, (p, s) in enumerate(rows) if s is not None and not math.isnan(s)]


@given(rows=ROWS, low=st.floats(-9, 9), high=st.floats(-9, 9))
def test_threshold_keeps_the_interval(rows, low, high):
    low, high = sorted((low, high))
    assert kept(f"threshold min={low} max={high}", rows) == {i for i, _, s in scored(rows) if low <= s <= high}


@given(rows=ROWS, k=st.integers(1, 5))
def test_top_keeps_the_best_and_the_earlier_of_equals(rows, k):
    def best(found):
        return {i for i, _, _ in sorted(found, key=lambda r: (-r[2], r[0]))[:k]}

    assert kept(f"top k={k}", rows) == best(scored(rows))
    assert kept(f"top per=prompt k={k}", rows) == set().union(*(best([r for r in scored(rows) if r[1] == p]) for p in range(5)))


@given(rows=ROWS, low=st.sampled_from([0.0, 0.25, 0.5, 0.9]))
def test_quantile_keeps_what_is_no_smaller_than_that_share(rows, low):
    values = sorted(s for _, _, s in scored(rows))
    wanted = {i for i, _, s in scored(rows) if s >= values[math.ceil(low * (len(values) - 1) - 1e-9)]}
    assert kept(f"quantile low={low}", rows) == wanted


@given(rows=ROWS)
def test_best_vs_worst_is_first_argmax_against_first_argmin(rows):
    wanted = {}
    for prompt in range(5):
        found = [(s, i) for i, p, s in scored(rows) if p == prompt]
        if found and max(found)[0] > min(found)[0]:
            wanted[f"p{prompt}"] = (min(found, key=lambda r: (-r[0], r[1]))[1], min(found)[1])
    pairs = apply("best_vs_worst truncated=keep", rows).kept.collect()
    number = {r["response"]: r["row"] for r in frame(rows).collect().to_dicts()}
    sides = {r["prompt"]: tuple(number[r[s][0]["content"]] for s in ("chosen", "rejected")) for r in pairs.to_dicts()}
    assert sides == wanted
    assert [c for c, _ in sides.values()] == sorted(c for c, _ in sides.values()), "in the order of the chosen rows"


@given(rows=ROWS)
def test_length_matched_is_the_widest_pair_of_about_one_length(rows):
    table = frame(rows).collect().filter(pl.col("finish_reason").ne_missing("length")).to_dicts()
    for pair in apply("length_matched tolerance=0.5", rows).kept.collect().to_dicts():
        long = [len(pair[s][0]["content"]) for s in ("chosen", "rejected")]
        assert abs(long[0] - long[1]) <= 0.5 * max(long)
        mine = [r for r in table if r["prompt"] == pair["prompt"] and r["score"] is not None and not math.isnan(r["score"])]
        gaps = [a["score"] - b["score"] for a in mine for b in mine
                if abs(len(a["response"]) - len(b["response"])) <= 0.5 * max(len(a["response"]), len(b["response"]))]  # fmt: skip
        assert pair["margin"] == max(gaps)


def test_judge_means_make_the_pair_of_spec_f23():
    """SPEC F.23: means (3.3333, 4, 2.6667, 4): chosen is the first argmax, rejected the third."""
    rows = [(0, 10 / 3), (0, 4.0), (0, 8 / 3), (0, 4.0), (1, 3.0), (1, 3.0), (2, None), (2, 1.0)]
    pairs = apply("best_vs_worst truncated=keep", rows).kept.collect()
    assert [m[0]["content"] for m in pairs["chosen"]] == ["r1 w"] and [m[0]["content"] for m in pairs["rejected"]] == ["r2 w w"]


def test_a_truncated_answer_is_no_bad_example_unless_asked():
    rows = [(0, 2.0), (0, 1.0), (0, 0.0)]  # the third ran into the limit
    assert apply("best_vs_worst", rows).kept.collect()["score_rejected"].to_list() == [1.0]
    assert apply("best_vs_worst truncated=keep", rows).kept.collect()["score_rejected"].to_list() == [0.0]
    assert "truncated: the response ran into the token limit" in apply("best_vs_worst", rows).reasons


def test_a_length_penalty_changes_who_wins():
    table = pl.LazyFrame({"prompt": ["p"] * 2, "response": ["x" * 100, "y"], "score": [1.0, 0.5], "row": [0, 1]})
    assert apply("best_vs_worst", table).kept.collect()["score_chosen"].item() == 1.0
    assert apply("best_vs_worst length_penalty=0.01", table).kept.collect()["score_chosen"].item() == 0.5


def test_a_pair_carries_what_is_known_of_its_sides():
    table = pl.LazyFrame({
        "prompt": ["p"] * 2, "prompt_id": ["a"] * 2, "response": ["x", "y"], "score": [1.0, 0.5], "sample": [0, 1],
        "n_tokens": [3, 4], "ref_logps": [-1.0, -2.0],
    })  # fmt: skip
    pair = apply("best_vs_worst", table).kept.collect().to_dicts()[0]
    assert (pair["ref_chosen_logps"], pair["ref_rejected_logps"]) == (-1.0, -2.0)
    assert (pair["sample_chosen"], pair["n_tokens_rejected"], pair["prompt_id"]) == (0, 4, "a")


# Scores out of scores


@given(rows=ROWS)
def test_combine_by_hand(rows):
    out = apply("combine columns=score,other how=weighted weights=2,1 into=sum", rows).kept.collect()
    for row in out.to_dicts():
        known = row["score"] is not None and not math.isnan(row["score"])
        assert row["sum"] == (pytest.approx(2 * row["score"] + row["other"]) if known else None)


@given(rows=ROWS)
def test_combining_is_symmetric(rows):
    for how in ("rank", "standard", "weighted"):
        one = apply(f"combine columns=score,other how={how}", rows).kept.collect()["combined"].to_list()
        two = apply(f"combine columns=other,score how={how}", rows).kept.collect()["combined"].to_list()
        assert one == pytest.approx(two, nan_ok=True)


def test_a_veto_overrules_the_other_score():
    made = apply("combine columns=score,other veto=other:1", [(0, 9.0), (0, 1.0)])
    assert made.kept.collect()["row"].to_list() == [1] and made.reasons == {"vetoed: other below 1": 1}


def test_the_residual_knows_nothing_of_the_length():
    import numpy as np

    rng = np.random.default_rng(0)
    size = rng.integers(1, 200, 4000)
    score = np.sqrt(size) + rng.normal(size=4000)
    table = pl.LazyFrame({"prompt": ["p"] * 4000, "response": ["x" * n for n in size], "score": score})
    out = apply("residual", table).kept.collect().with_columns(size=pl.col("response").str.len_chars())
    before, after = (out.select(pl.corr("size", c, method="spearman")).item() for c in ("score", "score_residual"))
    assert before > 0.9 and abs(after) < 0.03
    noise = score - np.sqrt(size)
    assert np.corrcoef(out["score_residual"], noise)[0, 1] > 0.97, "what the length does not explain stays"


def test_keywords_are_whole_words_in_any_case():
    texts = ["Draw a map", "a mapping of images", "Graphs!", "drawn by hand", "please GO TO sleep", "go  to", None, ""]
    table = pl.LazyFrame({"prompt": texts}).with_row_index("row")
    made = rules.partition(rules.load("keywords"), table, "keywords")
    assert made.kept.collect()["row"].to_list() == [3, 5, 7]
    assert made.dropped.collect()["reason"].to_list() == ["prompt has 'draw'", "prompt has 'images'", "prompt has 'graphs'",
                                                          "prompt has 'go to'", "no prompt"]  # fmt: skip
    made = rules.partition(rules.load("keywords words='c++,(x'"), pl.LazyFrame({"prompt": ["in C++.", "in c", "(x"]}), "keywords")
    assert made.kept.collect()["prompt"].to_list() == ["in c"]


# Idempotence, order, monotony, symmetry


@pytest.mark.parametrize("spec", [s for s in SELECT if "fraction" not in s and "quantile" not in s])
@given(rows=ROWS)
@settings(max_examples=10)
def test_what_was_kept_is_kept_again(spec, rows):
    first = apply(spec, rows).kept.collect()
    assert kept(spec, first.lazy()) == set(first["row"])


@pytest.mark.parametrize("spec", SELECT)
@given(rows=st.lists(st.tuples(st.integers(0, 4), st.integers(-9, 9)), max_size=30), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_the_order_of_the_rows_does_not_matter(spec, rows, seed):
    distinct = [(p, s + i / 100) for i, (p, s) in enumerate(rows)]  # of equal scores, the order decides by design
    table = frame(distinct).collect()
    mixed = list(range(table.height))
    random.Random(seed).shuffle(mixed)
    assert kept(spec, table[mixed].lazy()) == kept(spec, table.lazy())


@pytest.mark.parametrize("spec", PAIRS)
@given(rows=st.lists(st.tuples(st.integers(0, 4), st.integers(-9, 9)), max_size=30), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_the_order_of_the_rows_does_not_matter_to_pairs(spec, rows, seed):
    table = frame([(p, s + i / 100) for i, (p, s) in enumerate(rows)]).collect()
    mixed = list(range(table.height))
    random.Random(seed).shuffle(mixed)
    one, two = (apply(spec, t.lazy()).kept.collect().sort("prompt") for t in (table, table[mixed]))
    assert one.equals(two)


@given(rows=ROWS, cuts=st.tuples(st.floats(-9, 9), st.floats(-9, 9)))
def test_a_higher_cut_keeps_a_subset(rows, cuts):
    low, high = sorted(cuts)
    assert kept(f"threshold min={high}", rows) <= kept(f"threshold min={low}", rows)
    assert kept(f"threshold max={low}", rows) <= kept(f"threshold max={high}", rows)
    assert kept("top k=1", rows) <= kept("top k=4", rows)
    assert kept("top per=prompt k=1", rows) <= kept("top per=prompt k=3", rows)
    assert kept("quantile low=0.7", rows) <= kept("quantile low=0.3", rows)
    pairs = apply("best_vs_worst", rows).kept
    wide, narrow = (set(apply(f"margin min={m}", pairs).kept.collect()["prompt"]) for m in (0.1, 2.0))
    assert narrow <= wide


@given(rows=ROWS)
def test_turning_the_scores_round_turns_the_pairs_round(rows):
    """With negated scores chosen and rejected change places (scores made distinct: of equals the earlier wins)."""
    table = frame([(p, None if s is None else s + i / 1000) for i, (p, s) in enumerate(rows)])
    turned = table.with_columns(score=-pl.col("score"))
    for spec in ("best_vs_worst", "length_matched tolerance=0.5"):
        one, two = (apply(spec, t).kept.collect().sort("prompt") for t in (table, turned))
        if spec == "best_vs_worst":
            assert one["chosen"].to_list() == two["rejected"].to_list() and one["rejected"].to_list() == two["chosen"].to_list()
        assert one["margin"].to_list() == pytest.approx(two["margin"].to_list())


@given(rows=ROWS, low=st.floats(-9, 9))
def test_a_threshold_and_its_mirror_share_the_table(rows, low):
    over, under = kept(f"threshold min={low}", rows), kept(f"threshold max={math.nextafter(low, -math.inf)}", rows)
    assert over | under == {i for i, _, _ in scored(rows)} and not over & under


# Chains


@given(rows=ROWS)
def test_then_runs_one_rule_after_the_other(rows):
    chain = apply("threshold min=-2 then top per=prompt k=2 then best_vs_worst", rows)
    by_hand = frame(rows)
    for spec in ("threshold min=-2", "top per=prompt k=2", "best_vs_worst"):
        by_hand = apply(spec, by_hand).kept
    assert chain.kept.collect().equals(by_hand.collect())
    listed = rules.load(["threshold min=-2", {"name": "top", "per": "prompt", "k": 2}, "best_vs_worst"])
    assert str(listed) == str(rules.load("threshold min=-2 then top per=prompt k=2 then best_vs_worst"))


def test_a_then_inside_quotes_is_part_of_a_value():
    assert [s.name for s in rules.parse("matches pattern='now then' then top k=1")] == ["matches", "top"]
    for spec, says in [("then top k=1", "one side of a `then`"), ("top k=1 then", "one side of a `then`"), ("", "empty")]:
        with pytest.raises(OptionError, match=says):
            rules.load(spec)


# Groups that do not fit


@given(rows=ROWS, limit=st.integers(1, 12))
@settings(max_examples=15)
def test_decisions_on_disk_are_the_decisions_in_memory(rows, limit, tmp_path_factory):
    import os

    want = {s: apply(s, rows).kept.collect() for s in ("top per=prompt k=2", "best_vs_worst", "quantile low=0.5 per=prompt")}
    os.environ["REWARDKIT_ROWS_IN_MEMORY"] = str(limit)
    try:
        for spec, whole in want.items():
            assert apply(spec, rows).kept.collect().equals(whole), spec
    finally:
        del os.environ["REWARDKIT_ROWS_IN_MEMORY"]


def test_every_group_is_decided_whole(tmp_path):
    import os

    sizes = []

    def decide(rows):
        sizes.append(rows.height)
        assert rows.group_by("key").len().filter(pl.col("len") != 7).is_empty()
        return rows.select("row", n=pl.len().over("key").cast(pl.UInt32))

    table = pl.LazyFrame({"g": [i % 100 for i in range(700)]})
    os.environ["REWARDKIT_ROWS_IN_MEMORY"] = "100"
    try:
        found = by_group(table, pl.col("g").hash(seed=0), decide)
    finally:
        del os.environ["REWARDKIT_ROWS_IN_MEMORY"]
    assert found["n"].to_list() == [7] * 700 and len(sizes) > 3 and max(sizes) < 300


def test_rows_are_sorted_in_portions_on_disk():
    order = list(range(50))
    random.Random(0).shuffle(order)
    table = pl.LazyFrame({PAIR: order, "text": [f"t{i}" for i in order]}, schema_overrides={PAIR: pl.Int32})
    assert _sorted(table, 50, portion=7).collect()["text"].to_list() == [f"t{i}" for i in range(50)]


# What is wrong is named


def test_wrong_rules_and_columns_are_named(tmp_path):
    for spec, says in [
        ("top k=0", "k >= 1"),
        ("top", "either k"),
        ("threshold", "needs min"),
        ("threshold min=2 max=1", "min=2.0 is above max=1.0"),
        ("quantile low=1", "0 <= low < high <= 1"),
        ("matches pattern=(", "pattern '\\('"),
        ("combine columns=score", "two or more columns"),
        ("tip k=1", "unknown rule 'tip'; did you mean 'top'"),
        ("top k=1 then tresh min=1", "unknown rule 'tresh'"),
    ]:
        with pytest.raises(OptionError, match=says):
            rules.load(spec)
    with pytest.raises(DataError, match="reads column 'scor'; the columns are prompt, response, score, row"):
        apply("threshold min=1 by=scor", [(0, 1.0)])
    with pytest.raises(DataError, match="reads column 'grup'"):
        apply("top k=1 per=grup", [(0, 1.0)])
    (tmp_path / "mine.py").write_text("def lossy(frame):\n    return frame.head(1), frame.head(0).with_columns(reason='score')\n")
    with pytest.raises(OptionError, match="does not account for its rows: 2 in, 1 kept, 0 dropped"):
        apply(f"{tmp_path}/mine.py:lossy", [(0, 1.0), (0, 2.0)])
