"""Judges in runs: their statistics, when they are stopped, both orders, and expected scores. Run: pytest tests/test_judge.py"""

import json
import os
import signal
import subprocess
import sys
import time

import polars as pl
import pytest

from rewardkit import rewards, verbs
from rewardkit.engine import Scripted, load
from rewardkit.errors import DataError, ModelError, OptionError
from rewardkit.folders import read_manifest
from rewardkit.rewards.pair_judge import PairJudge
from rewardkit.rewards.votes import expected
from rewardkit.rubrics import rubric
from tests.speaking import build_judge

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = 600


def script(folder, replies):
    """A table of ROWS rows, and the spec of a judge that answers row i with replies(i)."""
    rows = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(ROWS)]
    pl.DataFrame(rows).write_parquet(folder / "rows.parquet")
    asked = [rubric("additive5").fill(row["prompt"], row["response"]) for row in rows]
    pl.DataFrame({"prompt": asked, "replies": [replies(i) for i in range(ROWS)]}).write_parquet(folder / "replies.parquet")
    return str(folder / "rows.parquet"), f"judge model=scripted votes=3 engine='scripted file={folder / 'replies.parquet'}'"


def shards(folder):
    return pl.concat([pl.read_parquet(p) for p in sorted(folder.glob("part-*"))], how="diagonal_relaxed")


def test_a_run_reports_how_far_its_judge_can_be_trusted(tmp_path, capfd):
    """Votes (5, 5, 5), (4, 4, none) and (1, 3, 5) in turn: every number by hand. One row has no reply at all."""
    turns = [["Score: 5"] * 3, ["Score: 4", "Score: 4", "I cannot say"], ["Score: 1", "Score: 3", "Score: 5"]]
    data, judge = script(tmp_path, lambda i: turns[i % 3] if i != 7 else [])
    out = verbs.score(data, judge, str(tmp_path / "out"))
    told = capfd.readouterr().err
    assert all(label in told for label in ("parse rate", "saturation", "vote variance", "unscored: the judge did not answer"))
    facts = read_manifest(out)["reward_facts"]
    fives, fours, mixed = 200, 199, 200
    votes = 3 * (fives + fours + mixed)
    assert facts["votes"] == votes and facts["unanswered"] == 1
    assert facts["parse_rate"] == pytest.approx((votes - fours) / votes)
    assert facts["saturation"] == pytest.approx((3 * fives + mixed) / (votes - fours))
    assert facts["most_common"] == 5 and facts["most_common_share"] == facts["saturation"]
    assert facts["vote_variance"] == pytest.approx(mixed * (8 / 3) / (ROWS - 1))
    assert facts["unscored_share"] == 1 / ROWS
    assert facts["reasons"] == {"the judge did not answer: the script has no reply to this prompt": 1}
    found = shards(out)
    assert found["raw"][1].to_list() == turns[1] and found["votes"][1].to_list() == [4, 4, None]
    assert found["score"][7] is None and found["raw"][7].to_list() == []


def test_a_judge_that_cannot_be_read_is_stopped_with_its_share_and_nothing_is_lost(tmp_path):
    data, judge = script(tmp_path, lambda i: ["Score: 3", "well", "hmm"])
    told = r"512 of 768 votes \(66.7%\) hold no verdict, more than max_unparsed=0.5"
    with pytest.raises(ModelError, match=told) as stopped:
        verbs.score(data, judge, str(tmp_path / "out"))
    assert "\n" not in str(stopped.value)
    found = shards(tmp_path / "out")
    assert found.height == 256 and found["raw"].to_list() == [["Score: 3", "well", "hmm"]] * 256 and (found["score"] == 3).all()
    with pytest.raises(ModelError, match=told):  # the same command again knows what was written, and writes no more
        verbs.score(data, judge, str(tmp_path / "out"))
    assert shards(tmp_path / "out").height == 256
    out = verbs.score(data, f"{judge} max_unparsed=0.7", str(tmp_path / "lenient"))
    assert read_manifest(out)["reward_facts"]["parse_rate"] == pytest.approx(1 / 3)
    with pytest.raises(OptionError, match="max_unparsed between 0 and 1, not 2"):
        rewards.load("judge model=m max_unparsed=2")


def test_a_bad_beginning_or_end_is_judged_by_the_whole_run(tmp_path):
    """33 rows are 99 votes: too few to stop a judge before its work is done; the last batch counts, too."""
    data, judge = script(tmp_path, lambda i: ["hmm"])
    pl.read_parquet(data).head(33).write_parquet(tmp_path / "few.parquet")
    out = verbs.score(str(tmp_path / "few.parquet"), judge, str(tmp_path / "few"))
    assert read_manifest(out)["unscored"] == 33 and read_manifest(out)["reward_facts"]["parse_rate"] == 0
    data, judge = script(tmp_path, lambda i: ["Score: 2"] if i < 512 else ["hmm"])
    with pytest.raises(ModelError, match=r"264 of 1,800 votes \(14.7%\)"):
        verbs.score(data, f"{judge} max_unparsed=0.1", str(tmp_path / "end"))
    assert shards(tmp_path / "end").height == ROWS and not (tmp_path / "end/manifest.json").exists()


def test_a_killed_run_reports_what_a_whole_one_does(tmp_path):
    data, judge = script(tmp_path, lambda i: [f"Score: {i % 6}", f"Score: {i % 5}", "none"])
    (tmp_path / "slow.py").write_text(
        "import time\nfrom rewardkit.engine import Scripted\n"
        "class Slow(Scripted):\n"
        "    def generate(self, *asked, **sampling):\n"
        "        time.sleep(0.3)\n"
        "        return super().generate(*asked, **sampling)\n"
        "def slow(model, file):\n    return Slow(file=file)\n"
    )
    judge = judge.replace("engine='scripted ", f"engine='{tmp_path / 'slow.py'}:slow ")
    whole = verbs.score(data, judge, str(tmp_path / "whole"))
    words = ["score", "--data", data, "--reward", judge, "--out", str(tmp_path / "killed")]
    run = subprocess.Popen([sys.executable, "-m", "rewardkit.cli", *words])
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed/part-00000.parquet").exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "killed/manifest.json").exists()
    killed = verbs.score(data, judge, str(tmp_path / "killed"))
    assert shards(killed).equals(shards(whole))
    assert read_manifest(killed)["reward_facts"] == read_manifest(whole)["reward_facts"]
    assert read_manifest(whole)["reward_facts"]["votes"] == 3 * ROWS


# Both orders


def prefers(text):
    """A judge that names A (`first`), the longer reply (`long`), a tie first and then the longer, or nothing."""
    asked = text[0]["content"]
    first, second = (asked.split(f"<reply {x}>")[1].split(f"</reply {x}>")[0].strip() for x in "AB")
    kind = asked.split("<request>")[1].split("</request>")[0].strip()
    longer = "A" if len(first) > len(second) else "B"
    unsure = "tie" if len(first) > len(second) else "B"
    return {"first": "Better: A", "long": f"Better: {longer}", "unsure": f"Better: {unsure}", "dumb": "?"}[kind]


def both(**options):
    made = PairJudge("scripted", orders="both", **options)
    made._engine = Scripted(function=prefers)
    return made


def test_both_orders_must_agree():
    rows = [{"prompt": kind, "response": "longer", "opponent": "short"} for kind in ("long", "first", "unsure", "dumb")]
    scores = rewards.apply(both(), [*rows, rows[0] | {"opponent": None}])
    assert [s.value for s in scores] == [1.0, 0.5, 0.5, None, None]
    assert [s.extra["flipped"] for s in scores] == [False, True, False, None, None]
    assert [s.extra["votes"] for s in scores] == [[1, 1], [1, 0], [0.5, 1], [None, None], []]
    assert scores[1].extra["raw"] == ["Better: A", "Better: A"] and scores[4].why == "there is no opponent"
    mirrored = [row | {"response": "short", "opponent": "longer"} for row in rows]
    assert [s.value for s in rewards.apply(both(), mirrored)] == [0.0, 0.5, 0.5, None]
    assert rewards.apply(both(votes=3, temperature=1.0), rows[:1])[0].extra["votes"] == [1] * 6
    with pytest.raises(DataError, match="has no opponent"):
        rewards.apply(both(), [{"prompt": "q", "response": "a"}])


def test_score_compares_the_sides_of_pairs_and_reports_the_flip_rate(tmp_path):
    kinds = ["long"] * 6 + ["first"] * 3 + ["unsure"]
    pairs = [{"prompt": kind, "chosen": f"the longer {i}", "rejected": f"short {i}"} for i, kind in enumerate(kinds)]
    pl.DataFrame(pairs).write_parquet(tmp_path / "pairs.parquet")
    (tmp_path / "mine.py").write_text(
        f"import sys\nsys.path.insert(0, {os.getcwd()!r})\nfrom tests.test_judge import both\n"
        "def judge(samples):\n    return both()(samples)\n"
    )
    out = verbs.score(str(tmp_path / "pairs.parquet"), f"{tmp_path}/mine.py:judge", str(tmp_path / "out"))
    found = shards(out)
    assert found["score_chosen"].to_list() == [1.0] * 6 + [0.5] * 4
    assert found["score_rejected"].to_list() == [0.0] * 6 + [0.5] * 4

    def column(name):
        return (v for side in ("chosen", "rejected") for v in found[f"{name}_{side}"].drop_nulls().to_list())

    facts = both().facts(column)
    assert facts["orders"] == 20 and facts["flip_rate"] == 0.3 and facts["saturation"] == 19 / 40
    assert facts["parse_rate"] == 1 and facts["unscored_share"] == 0


def test_questions_that_are_the_same_are_asked_once():
    asked = []

    def count(text):
        asked.append(text[0]["content"])
        return prefers(text)

    made = both()
    made._engine = Scripted(function=count)
    one, other = {"prompt": "long", "response": "a", "opponent": "bb"}, {"prompt": "long", "response": "bb", "opponent": "a"}
    assert [s.value for s in made([one, other, one])] == [0.0, 1.0, 0.0] and len(asked) == 2


# Expected scores


def place(text, **p):
    import math

    return text, {k.strip("_"): math.log(v) for k, v in p.items()}


@pytest.mark.parametrize(
    ("places", "mean", "mass"),
    [
        ([place("Score"), place(":"), place(" 4", _4=0.6, _2=0.3, x=0.1)], 3.0 / 0.9, 0.9),
        ([place("Score: "), place("4", _4=0.5, _7=0.5), place("/5")], 4.0, 0.5),
        ([place("Score: "), place("1", _1=1.0), place("\nScore: "), place("5", _5=0.75, _3=0.25)], 4.5, 1.0),
        ([place("Score: "), place("3", _3=1.0), place(".5")], None, None),
        ([place("Score: "), place("9", _9=0.9, _1=0.1)], None, None),
        ([place("no idea")], None, None),
        (None, None, None),
    ],
)
def test_an_expected_score_is_the_mean_over_whole_scores_at_its_place(places, mean, mass):
    found = expected(places, rubric("additive5"))
    assert found == (mean and pytest.approx(mean), mass and pytest.approx(mass))


SCORES = {"0": 0.05, "1": 0.05, "2": 0.1, "3": 0.2, "4": 0.35, "5": 0.15, "7": 0.05, "?": 0.05}
INSIDE = {int(s): p for s, p in SCORES.items() if s in "012345"}
MEAN = sum(s * p for s, p in INSIDE.items()) / sum(INSIDE.values())


@pytest.fixture(scope="module")
def judge_model(tmp_path_factory):
    """A real model whose score is drawn from SCORES."""
    return build_judge(tmp_path_factory.mktemp("judge") / "model", SCORES)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_one_call_gives_the_mean_that_many_votes_only_approach(judge_model, engine, tmp_path):
    (tmp_path / "short.txt").write_text("score: last 0 5\n---\n{prompt} {response}")
    rows = [{"prompt": "hi", "response": f"answer {i}"} for i in range(12)]
    spec = f"judge model={judge_model} engine={engine} rubric={tmp_path}/short.txt max_tokens=12 expected=true"
    spec += " top_p=1.0 temperature=1.0"
    one, many = rewards.load(f"{spec} votes=1")[0], rewards.load(f"{spec} votes=20")[0]
    with rewards.loaded(one):
        many._engine = one._engine
        for score in one(rows):
            assert score.value == pytest.approx(MEAN, abs=1e-5) and score.extra["votes"] == [4]
            assert score.extra["expected"] == [score.value] and score.extra["mass"] == [pytest.approx(0.9, abs=1e-5)]
        votes = [v for s in many(rows) for v in s.extra["votes"] if v is not None]
    assert 0.8 < len(votes) / 240 < 0.97, "7 and ? are no score"
    assert sum(votes) / len(votes) == pytest.approx(MEAN, abs=0.4)


def test_an_engine_without_probabilities_says_so():
    with pytest.raises(OptionError, match="unknown option of engine 'scripted' 'top_logprobs'"):
        load("scripted reply=x top_logprobs=20", "scripted")
    judge = rewards.load("judge model=scripted expected=true votes=2")[0]
    judge._engine = Scripted(reply="Score: 4")
    (score,) = judge([{"prompt": "q", "response": "a"}])
    assert score.value is None and score.why == "0 of 2 scores are one token whose probability is known"
    assert score.extra["votes"] == [4, 4] and json.dumps(score.extra["raw"])
