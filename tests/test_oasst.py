"""Seed data out of OpenAssistant: who is in which part, and which judgements become examples.

Run: .venv/bin/python -m pytest tests/test_oasst.py
"""

import itertools
import json

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewardkit
from rewardkit import rules
from rewardkit.errors import DataError, OptionError
from rewardkit.folders import read_manifest
from rewardkit.rewards.judge import Judge

SHARES = "ift=0.5 eft=0.25 eval=0.25"
MESSAGE = {"message_id": pl.String, "parent_id": pl.String, "text": pl.String, "role": pl.String, "lang": pl.String,
           "rank": pl.Int32, "deleted": pl.Boolean}  # fmt: skip
VOTES = st.lists(st.one_of(st.none(), st.integers(0, 5).map(float)), min_size=1, max_size=3)
REPLIES = st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 3)), VOTES), max_size=20)


def apply(spec, frame):
    return rules.partition(rules.load(spec), frame.lazy(), spec)


def conversations(count=40):
    """First messages with 0 to 3 ranked replies, one reply that nobody ranked, and a second turn."""
    rows = []
    for i in range(count):
        rows.append((f"m{i}", None, f"question {i}", "prompter", "de" if i % 10 == 9 else "en", None, i == 7))
        rows += [(f"m{i}r{k}", f"m{i}", f"reply {k} to {i}", "assistant", "en", k, False) for k in range(i % 4)]
        rows.append((f"m{i}x", f"m{i}", "never ranked", "assistant", "en", None, False))
        rows.append((f"m{i}y", f"m{i}r0", "and then?", "prompter", "en", None, False))
        rows.append((f"m{i}z", f"m{i}y", "a second turn", "assistant", "en", 0, False))
    return pl.DataFrame(rows, schema=MESSAGE, orient="row")


@pytest.mark.parametrize("seed", [0, 1])
def test_the_parts_are_disjoint_and_of_the_shares_asked_for(seed):
    frame = conversations()
    made = {part: apply(f"oasst part={part} {SHARES} seed={seed}", frame) for part in ("ift", "eft", "eval")}
    first = [i for i in range(40) if i % 10 != 9 and i != 7]
    facts = {part: m.stages[0]["facts"] for part, m in made.items()}
    assert [f["in_this_part"] for f in facts.values()] == [17, 9, 9] and all(f["first_messages"] == 35 for f in facts.values())
    kept = {part: m.kept.collect() for part, m in made.items()}
    asked = {part: set(k["parent_id"]) for part, k in kept.items()}
    assert not any(a & b for a, b in itertools.combinations(asked.values(), 2))
    assert set.union(*asked.values()) <= {f"m{i}" for i in first}
    for m in made.values():
        assert m.counts["in"] == frame.height == m.counts["out"] + m.counts["dropped"]
        assert set(m.dropped.collect().columns) == {*frame.columns, "reason"}


def test_ift_is_the_best_reply_and_eft_all_ranked_ones():
    frame = conversations()
    ift = apply("oasst part=ift ift=1 eft=0 eval=0", frame).kept.collect()
    first = [i for i in range(40) if i % 10 != 9 and i != 7]
    wanted = [(f"question {i}", f"reply 0 to {i}") for i in first if i % 4]
    assert list(ift.select("prompt", "completion").iter_rows()) == wanted
    eft = apply("oasst part=eft ift=0 eft=1 eval=0", frame)
    wanted = [(f"question {i}", f"reply {k} to {i}", k) for i in first if i % 4 > 1 for k in range(i % 4)]
    assert list(eft.kept.collect().select("prompt", "response", "rank").iter_rows()) == wanted
    assert eft.reasons["the only ranked reply"] == len([i for i in first if i % 4 == 1])


def test_the_order_of_the_rows_decides_nothing():
    frame = conversations()
    for part in ("ift", "eft", "eval"):
        one, two = (set(apply(f"oasst part={part}", f).kept.collect()["message_id"]) for f in (frame, frame[::-1]))
        assert one == two and one


def test_wrong_input_is_named():
    with pytest.raises(OptionError, match="sum to at most 1, not 0.9, 0.375, 0.125"):
        rules.load("oasst part=ift ift=0.9")
    with pytest.raises(OptionError, match="option 'part' of rule 'oasst'"):
        rules.load("oasst part=ifd")
    with pytest.raises(OptionError, match="unknown rubric 'additive6'; did you mean 'additive5'"):
        rules.load("agrees rubric=additive6")
    with pytest.raises(OptionError, match="needs a first line 'score: last 0 5', a line '---', and a text"):
        rules.load(f"agrees rubric={__file__}")
    with pytest.raises(OptionError, match="to >= 1, not 0"):
        rules.load("thin to=0")
    with pytest.raises(DataError, match="reads column 'parent_id'; the columns are message_id"):
        apply("oasst part=ift", conversations().drop("parent_id"))
    with pytest.raises(DataError, match="reads column 'raw'; the columns are"):
        apply("agrees", judged([(0, 0, [1.0])]).drop("raw"))


# Which judgements become examples


def judged(replies):
    """A scored table: (prompt, rank, votes) of each reply."""
    rows = [
        {"row": i, "prompt": f"question {p}", "response": f"reply {i}", "rank": rank, "votes": votes, "why": "",
         "raw": [f"vote {k} of {i}: {v}" for k, v in enumerate(votes)],
         "score": sum(v) / len(v) if (v := [x for x in votes if x is not None]) else None}
        for i, (p, rank, votes) in enumerate(replies)
    ]  # fmt: skip
    schema = {"row": pl.Int64, "prompt": pl.String, "response": pl.String, "rank": pl.Int64, "votes": pl.List(pl.Float64),
              "why": pl.String, "raw": pl.List(pl.String), "score": pl.Float64}  # fmt: skip
    return pl.DataFrame(rows, schema=schema)


def right(frame, full):
    """By hand: the rows whose order is people's."""
    rows, found = frame.to_dicts(), set()
    for row in rows:
        family = [r for r in rows if r["prompt"] == row["prompt"] and r["rank"] is not None]
        if full and any(r["score"] is None for r in family) or row["score"] is None or row["rank"] is None:
            continue
        pairs = [(a, b) for a in family for b in family if a["rank"] < b["rank"] and None not in (a["score"], b["score"])]
        if not full:
            pairs = [(a, b) for a, b in pairs if row["row"] in (a["row"], b["row"])]
        if pairs and all(a["score"] > b["score"] for a, b in pairs):
            found.add(row["row"])
    return found


@pytest.mark.parametrize("agreement", ["full", "pairwise"])
@given(replies=REPLIES)
@settings(max_examples=60, deadline=None)
def test_what_stays_is_ordered_as_people_ordered_it(agreement, replies):
    frame = judged(replies)
    made = apply(f"agrees agreement={agreement}", frame)
    kept, dropped = made.kept.collect(), made.dropped.collect()
    assert set(kept["row"]) == right(frame, agreement == "full")
    assert sorted([*kept["row"], *dropped["row"]]) == list(range(len(replies))) and dropped["reason"].null_count() == 0
    assert dropped.drop("reason").equals(frame.filter(pl.col("row").is_in(dropped["row"].implode())))
    for row in kept.to_dicts():
        given = frame.row(row["row"], named=True)
        valid = [v for v in given["votes"] if v is not None]
        assert abs(row["vote"] - given["score"]) == min(abs(v - given["score"]) for v in valid)
        assert row["completion"] in given["raw"] and row["completion"].endswith(f": {row['vote']}")
        assert {"response", "votes", "raw", "why"}.isdisjoint(row)


def test_the_example_asks_what_the_judge_was_asked(tmp_path):
    """An engine that writes down what the reward `judge` asks it, which must be the example's prompt, word for word."""
    (tmp_path / "engine.py").write_text(
        "import json\nfrom rewardkit.engine import Scripted\n"
        "def listening(model):\n"
        "    def answer(prompt):\n"
        f"        with open('{tmp_path}/asked.jsonl', 'a') as file:\n"
        "            file.write(json.dumps(prompt) + '\\n')\n"
        "        return 'Score: 3'\n"
        "    return Scripted(model, function=answer)\n"
    )
    frame = judged([(0, 0, [4.0]), (0, 1, [2.0])])
    for rubric in ("additive5", "ser"):
        kept = apply(f"agrees rubric={rubric}", frame).kept.collect()
        Judge("scripted", rubric=rubric, engine=f"{tmp_path}/engine.py:listening")(frame.to_dicts())
        asked = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
        (tmp_path / "asked.jsonl").unlink()
        assert [[{"role": "user", "content": p}] for p in kept["prompt"]] == asked


def test_the_facts_are_the_judges_accuracy():
    replies = [(0, 0, [4.0]), (0, 1, [4.0]), (0, 2, [1.0]), (1, 0, [1.0]), (1, 1, [3.0])]
    facts = apply("agrees", judged(replies)).stages[0]["facts"]
    assert facts == {"pairs": 4, "right": 2, "tied": 1, "pairwise_accuracy": 0.5}


@given(st.lists(st.one_of(st.none(), st.integers(0, 3).map(float)), max_size=20), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_thin_touches_only_the_most_frequent_value(votes, seed):
    frame = pl.DataFrame({"vote": votes}, schema={"vote": pl.Float64}).with_row_index("row")
    before = {v: votes.count(v) for v in votes if v is not None}
    for to in (None, 2):
        made = apply(f"thin seed={seed}" + (f" to={to}" if to else ""), frame)
        kept = made.kept.collect()["vote"].to_list()
        after, sizes = {v: kept.count(v) for v in kept}, sorted(before.values(), reverse=True)
        limit = to or (sizes[1] if len(sizes) > 1 else None)
        changed = [v for v in before if after.get(v, 0) != before[v]]
        assert None not in kept and made.counts["in"] == len(votes) == len(kept) + made.counts["dropped"]
        assert len(changed) <= 1 and all(before[v] == sizes[0] and after.get(v, 0) == limit for v in changed)
        assert not limit or max(after.values(), default=0) <= max([limit, *sizes[1:2]])


def test_from_messages_to_examples_of_judging(tmp_path):
    """The whole way, with a judge of our own that likes short replies; its words are kept as they are."""
    conversations().write_parquet(tmp_path / "oasst.parquet")
    (tmp_path / "mine.py").write_text(
        "from rewardkit.rewards import Score\n"
        "def judge(rows):\n"
        "    votes = [float(4 - int(r['response'].split()[1]) if r['response'].endswith('to 3') else 4) for r in rows]\n"
        "    return [Score(v, '', {'votes': [v], 'raw': [f'Because.\\nScore: {v:g}']}) for v in votes]\n"
    )
    eft = rewardkit.filter(str(tmp_path / "oasst.parquet"), "oasst part=eft ift=0 eft=1 eval=0", str(tmp_path / "eft"))
    scored = rewardkit.score(str(eft), f"{tmp_path}/mine.py:judge", str(tmp_path / "scored"))
    made = rewardkit.filter(str(scored), "agrees then thin", str(tmp_path / "examples"))
    rows = pl.read_parquet(made / "part-00000.parquet").to_dicts()
    assert {r["parent_id"] for r in rows} == {"m3"} and len(rows) == 3
    assert rows[0]["completion"] == [{"role": "assistant", "content": "Because.\nScore: 4"}]
    assert "question 3\n" in rows[0]["prompt"][0]["content"] and "reply 0 to 3\n" in rows[0]["prompt"][0]["content"]
    facts = read_manifest(made)
    assert facts["rows"]["in"] == facts["rows"]["used"] + facts["rows"]["dropped"]
    assert facts["reasons"] == {"two replies have the same score": facts["rows"]["dropped"]}


@pytest.mark.data
def test_real_conversations(data_folder):
    messages = pl.read_parquet(data_folder / "oasst_messages.parquet")
    eft = apply("oasst part=eft ift=0 eft=1 eval=0", messages).kept.collect()
    pairs = pl.read_parquet(data_folder / "oasst_preferences.parquet").filter(pl.col("messages").list.len() == 1)
    ordered = eft.join(eft, on="parent_id", suffix="_worse").filter(pl.col("rank") < pl.col("rank_worse"))
    assert set(ordered.select("response", "response_worse").iter_rows()) == set(pairs.select("chosen", "rejected").iter_rows())
    ift = apply("oasst part=ift ift=1 eft=0 eval=0", messages).kept.collect()
    assert ift.height == 98 and set(ift.filter(pl.col("parent_id").is_in(eft["parent_id"].implode()))["completion"]) <= set(
        eft["response"]
    )
