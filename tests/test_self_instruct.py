"""Prompts that a model writes: counted, traced to their examples, the same after a kill.

Run: .venv/bin/python -m pytest tests/test_self_instruct.py
"""

import json
import os
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewardkit
from rewardkit import checks
from rewardkit.errors import DataError, OptionError
from rewardkit.folders import read_manifest
from rewardkit.self_instruct import SelfInstruct, parse
from rewardkit.tables import prompt_id
from tests import tiny

# A writer that answers by the request alone: mostly a new task, now and then a copy, a task cut short, an empty or a long one.
SPEAKER = """
import hashlib, os, time
from rewardkit.engine import Completion, Refused, Scripted

def speak(model):
    made = Scripted(model, function=answer)
    made.generate = lambda prompts, **options: [said(p[0]["content"]) for p in prompts]
    return made

def answer(prompt):
    return prompt

def said(text):
    time.sleep(float(os.environ.get("SLOW", 0)))
    number = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
    kind, task = number % 10, f"Explain thing number {number} to a child"
    if kind == 0:
        return Refused("no")
    texts = {1: "Sing song 1", 2: "...\\u2028", 3: " ".join(["long"] * 60), 4: f"Task 9: {task}\\nTask 10: Another"}
    return [Completion(texts.get(kind, task), None, "length" if kind == 5 else "stop")]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("write")
    (folder / "speaker.py").write_text(SPEAKER)
    seeds = [{"prompt": f"Sing song {i} {{next}} {{tasks}}"} for i in range(20)] + [
        {"prompt": "Sing  song 1"},
        {"prompt": "long " * 51},
    ]
    pl.DataFrame(seeds).write_parquet(folder / "seeds.parquet")
    tiny.llama(folder / "model")
    return folder


def write(place, out, spec="self_instruct count=150 max_words=50 batch=16", **more):
    return rewardkit.generate(
        "scripted", str(place / "seeds.parquet"), str(out), temperature=0.6, top_p=0.9, max_tokens=40,
        **({"engine": f"{place}/speaker.py:speak", "write": spec} | more),
    )  # fmt: skip


def rows(out):
    return pl.concat([pl.read_parquet(p) for p in sorted(out.glob("part-*.parquet"))])


def aside(out):
    return [json.loads(line) for p in sorted(out.glob("quarantine-*")) for line in p.read_text().split("\n")[:-1]]


def test_every_request_is_a_prompt_or_has_a_reason(place, tmp_path):
    out = write(place, tmp_path / "out")
    made, left, facts = rows(out), aside(out), read_manifest(out)
    assert made.height == 150 == made["prompt_id"].n_unique()
    counts = facts["rows"]
    assert counts["in"] == 150 + len(left) and counts["quarantined"] == len(left) == sum(facts["reasons"].values())
    assert set(facts["reasons"]) == {"the request was refused", "no prompt in the answer", "longer than 50 words",
                                     "cut off at max_tokens", "a copy of a seed or of an earlier prompt"}  # fmt: skip
    assert facts["write"] == {"seeds": 21, "seeds_left_out": 1, "rounds": made["round"].max() + 1}
    texts = [p[0]["content"] for p in made["prompt"]]
    assert all(t.startswith("Explain thing number") and t.endswith("child") for t in texts)
    assert all(prompt_id(p) == i for p, i in made.select("prompt", "prompt_id").iter_rows())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"], "nothing else is written"


def test_a_prompt_names_its_examples(place, tmp_path):
    """Six seeds and two prompts of earlier rounds; eight seeds in the first."""
    made = rows(write(place, tmp_path / "out"))
    seeds = {prompt_id([{"role": "user", "content": p.strip()}]) for p in pl.read_parquet(place / "seeds.parquet")["prompt"][:21]}
    wrote = dict(made.select("prompt_id", "round").iter_rows())
    for shown, own, number in made.select("demonstrations", "own", "round").iter_rows():
        mine = [i for i in shown if i not in seeds]
        assert len(set(shown)) == 8 and len(mine) == own == (2 if number else 0)
        assert all(wrote[i] < number for i in mine)
    assert made["source"].unique().to_list() == ["scripted"]


def test_no_more_requests_than_tries_allow(place, tmp_path):
    out = write(place, tmp_path / "out", "self_instruct count=30 tries=2", engine="scripted reply='Sing song 3 {next} {tasks}'")
    assert read_manifest(out)["rows"] == {"in": 60, "used": 0, "out": 0, "dropped": 0, "quarantined": 60}
    assert rows(out).height == 0 and rows(out).schema["prompt"] == rows(write(place, tmp_path / "full")).schema["prompt"]


def test_a_killed_run_ends_with_the_same_prompts(place, tmp_path):
    words = [sys.executable, "-m", "rewardkit.cli", "generate", "--model", "scripted", "--prompts", str(place / "seeds.parquet"),
             "--engine", f"{place}/speaker.py:speak", "--write", "self_instruct count=60 batch=8", "--out"]  # fmt: skip
    slow = subprocess.Popen([*words, str(tmp_path / "killed")], env=os.environ | {"SLOW": "0.02"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed/part-00002.parquet").exists():
        assert slow.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.005)
    slow.send_signal(signal.SIGKILL)
    assert slow.wait() == -signal.SIGKILL and not (tmp_path / "killed/manifest.json").exists()
    again = subprocess.run([*words, str(tmp_path / "killed")], check=True, capture_output=True, text=True)
    subprocess.run([*words, str(tmp_path / "whole")], check=True, capture_output=True)
    assert "continues in" in again.stderr
    killed, whole = (tmp_path / name for name in ("killed", "whole"))
    assert rows(killed).equals(rows(whole)) and aside(killed) == aside(whole)
    assert read_manifest(killed)["files"] == read_manifest(whole)["files"]
    assert all(read_manifest(killed)[key] == read_manifest(whole)[key] for key in ("rows", "reasons", "write"))


def test_a_seed_decides_the_examples(place, tmp_path):
    one, same, other = (rows(write(place, tmp_path / f"{i}", seed=s)) for i, s in enumerate((0, 0, 1)))
    assert one.equals(same) and set(one["prompt_id"]) != set(other["prompt_id"])


BREAKING = """
import os
from rewardkit.server import Transformers

def speak(model):
    made, rounds = Transformers(model), []
    answer = made.generate
    def generate(prompts, **options):
        rounds.append(prompts)
        if os.environ.get("BREAK") == str(len(rounds)):
            raise KeyboardInterrupt
        return answer(prompts, **options)
    made.generate = generate
    return made
"""


@pytest.mark.usefixtures("one_thread")
def test_a_real_model_goes_on_where_it_was_stopped(place, tmp_path):
    """A random model: what it says is gibberish, but the same gibberish when it is stopped in its third round."""
    pl.DataFrame({"prompt": [f"Add: {i} + {i}" for i in range(12)]}).write_parquet(tmp_path / "seeds.parquet")
    (tmp_path / "breaking.py").write_text(BREAKING)

    def run(out):
        return rewardkit.generate(
            str(place / "model"), str(tmp_path / "seeds.parquet"), str(tmp_path / out), temperature=0.6, max_tokens=48,
            engine=f"{tmp_path}/breaking.py:speak", write="self_instruct count=8 seeds=3 own=1 batch=4 max_words=30",
        )  # fmt: skip

    os.environ["BREAK"] = "3"
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    del os.environ["BREAK"]
    assert (tmp_path / "stopped/part-00001.parquet").exists() and not (tmp_path / "stopped/manifest.json").exists()
    stopped, whole = run("stopped"), run("whole")
    facts = read_manifest(stopped)
    assert facts["files"] == read_manifest(whole)["files"] and aside(stopped) == aside(whole) and facts["resumed"]
    assert facts["rows"]["in"] == facts["rows"]["out"] + sum(facts["reasons"].values()) and 8 < facts["rows"]["in"] <= 32
    assert facts["engine"].startswith("transformers")


# Reading an answer


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        (" Write a poem about rain. ", "Write a poem about rain."),
        ("Task 9: Write a poem.\nTask 10: Sing.", "Write a poem."),
        ("Write a poem.\n\nTask 10: Sing.\nTask 11: Dance.", "Write a poem."),
        ("Sure! Here is one more task:\n\nTask 9: Write a poem.", "Write a poem."),
        ("Here's another one:\nWrite a poem.", "Write a poem."),
        ('**Task 9:** "Write a poem."', "Write a poem."),
        ("Sort these lines:\n- b\n- a", "Sort these lines:\n- b\n- a"),
        ("Here is a list: a, b. Sort it.", "Here is a list: a, b. Sort it."),
    ],
)
def test_what_is_taken_of_an_answer(answer, prompt):
    assert parse(answer, "stop", 9, 150) == (prompt, "")


def test_an_answer_cut_short_counts_only_if_its_task_is_whole():
    assert parse("Write a poem about", "length", 9, 150) == ("", "cut off at max_tokens")
    assert parse("Write a poem.\nTask 10: Si", "length", 9, 150) == ("Write a poem.", "")
    assert parse("one two three", "stop", 9, 2) == ("", "longer than 2 words")


@given(st.text(max_size=80), st.sampled_from(["stop", "length"]))
@settings(max_examples=60, deadline=None)
def test_any_answer_is_a_prompt_or_a_reason(answer, ended):
    text, reason = parse(answer, ended, 9, 20)
    assert bool(text) != bool(reason) and text in answer and len(text.split()) <= 20


# What is wrong is named


def test_wrong_options_are_named(place, tmp_path):
    for spec, says in [
        ("self_instruct", "needs count="),
        ("self_instruct count=0", "of at least 1"),
        ("self_instruct count=5 request=taks", "unknown request of self_instruct 'taks'; did you mean 'tasks'"),
        (f"self_instruct count=5 request={place}/speaker.py", "needs {tasks} and {next}"),
        ("prompts count=5", "unknown way to write prompts 'prompts'"),
    ]:
        with pytest.raises(OptionError, match=says):
            write(place, tmp_path / "out", spec)
        with pytest.raises(OptionError, match=says):
            checks.CHECKS["write"](spec)
    with pytest.raises(OptionError, match="n is 1, not 4"):
        write(place, tmp_path / "out", n=4)
    with pytest.raises(DataError, match="too few examples for seeds=25: 21 of its 22 rows"):
        write(place, tmp_path / "out", "self_instruct count=5 seeds=25 max_words=50")
    assert not (tmp_path / "out").exists()
    assert SelfInstruct(1).text().count("{") == 2
