"""Self-Rewarding Language Models as a recipe, and early stopping. Run: .venv/bin/python -m pytest tests/test_self_rewarding.py"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rewardkit import checks, recipe, tables, verbs
from rewardkit import world as truth
from rewardkit.errors import RewardkitError
from rewardkit.folders import read_manifest
from rewardkit.methods.early_stop import checkpoints
from rewardkit.rubrics import rubric
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = checks.CHECKS | {key: lambda _: None for key in checks.CHECKS if key.startswith("exists ")}


def plan(**more) -> list[dict]:
    """The calls of the recipe, each with its verb."""
    given = {"base": "b", "ift": "i", "eft": "e", "prompts": "p", **more}
    steps = recipe.check(recipe.load("self_rewarding"), "o", given, verbs.VERBS, SHAPE)
    return [{"verb": s.verb, **s.arguments} for s in steps]


def leaf(arguments: dict) -> dict:
    """The settings that a training step's method would get."""
    loaded = recipe.load(arguments["recipe"])
    return checks.method(loaded, {k: v for k, v in arguments.items() if k not in ("recipe", "out", "verb")})[1]


def test_the_numbers_are_the_papers():
    """SPEC C.1, C.4 and C.5."""
    found = plan()
    sft, *rest = [c for c in found if c["verb"] == "train"]
    wanted = {"learning_rate": 5.5e-6, "min_learning_rate": 1.1e-6, "schedule": "cosine", "batch_size": 16, "dropout": 0.1}
    assert {k: leaf(sft)[k] for k in wanted} == wanted
    assert (sft["model"], sft["data"], sft["out"]) == ("b", ["i", "e"], "o/m1")
    assert [c["recipe"] for c in rest] == ["dpo", "early_stop"] * 2
    wanted = {"beta": 0.1, "learning_rate": 1e-6, "min_learning_rate": 1e-7, "batch_size": 16, "dropout": 0.1, "save_steps": 200,
              "keep_checkpoints": True}  # fmt: skip
    for i, (dpo, stop) in enumerate(zip(rest[::2], rest[1::2], strict=True), start=1):
        assert {k: leaf(dpo)[k] for k in wanted} == wanted
        # From Mt, with Mt as reference, on AIFT(Mt) only.
        assert (dpo["model"], dpo["data"], leaf(dpo).get("reference")) == (f"o/m{i}", f"o/{i}/pairs", None)
        assert (stop["model"], stop["out"], leaf(stop)["limit"]) == (f"o/{i}/dpo", f"o/m{i + 1}", 253)
    made = {c["out"]: c for c in found}
    for i in (1, 2):
        said = made[f"o/{i}/samples"]
        assert (said["model"], said["n"], said["temperature"], said["top_p"]) == (f"o/m{i}", 4, 0.7, 0.9)
        judge = recipe.specs.parse(made[f"o/{i}/scored"]["reward"])
        assert judge.name == "judge" and judge.options["model"] == f"o/m{i}"
        assert [judge.options[k] for k in ("rubric", "votes", "temperature", "top_p")] == ["additive5", "3", "0.7", "0.9"]
        assert made[f"o/{i}/pairs"]["rule"] == "best_vs_worst" and made[f"o/{i}/prompts"]["data"] == "p"
    meanings = {name: meaning for name, _, meaning in recipe.describe(recipe.load("self_rewarding"))}
    assert all(meanings.values()), "each setting says where it comes from"


def test_what_can_be_asked_of_the_recipe():
    # The paper's negative result: SFT from the base on the seed data and the answers with full marks.
    found = [c for c in plan(preset="positive") if c["verb"] == "train"]
    assert [c["recipe"] for c in found] == ["sft"] * 3 and found[2]["data"] == ["i", "e", "o/2/positive"]
    assert {leaf(c)["learning_rate"] for c in found} == {5.5e-6} and {c["model"] for c in found} == {"b"}
    assert [c["rule"] for c in plan(augment="positive") if c["out"].endswith("/positive")] == ["threshold min=5"] * 2
    # Settings may name the loop's numbers: prompts of each iteration, tasks that judge with the model that is measured.
    found = plan(prompts="new-{i}", tasks="reward_accuracy data=d reward='judge model={out}/m{next}'")
    assert [c["data"] for c in found if c["out"].endswith("/prompts")] == ["new-1", "new-2"]
    assert ["m1" in c["tasks"] for c in found if c["verb"] == "eval"] == [True, False, False]
    # Prompts that Mt writes, or a fixed model; new ones in each iteration.
    for more, writers in (({}, ["o/m1", "o/m2"]), ({"writer": "http://h/v1#n"}, ["http://h/v1#n"] * 2)):
        found = plan(prompts_from="self", seed=7, **more)
        written = [c for c in found if c["out"].endswith("/written")]
        assert [c["model"] for c in written] == writers and [c["seed"] for c in written] == ["71", "72"]
        assert {(c["temperature"], c["top_p"], c["prompts"]) for c in written} == {(0.6, 0.9, "p")}
        assert [c["data"] for c in found if c["out"].endswith("/prompts")] == ["o/1/written", "o/2/written"]
    claude = plan(compare="pair_judge model=http://h/v1#n", compare_mode="pairwise")
    assert {(c["reward"], c["mode"]) for c in claude if c.get("recipe") == "early_stop"} == {
        ("pair_judge model=http://h/v1#n", "pairwise")
    }
    for wrong, said in [
        ({"augment": "best"}, r"unknown value of augment in recipe 'self_rewarding' 'best' \(valid: positive, preference\)"),
        ({"prompts_from": "me"}, "unknown value of prompts_from in recipe 'self_rewarding' 'me'"),
        ({"prompts_from": "self", "write": "self_instruct cuont=3"}, "did you mean 'count'"),
        ({"compare_mode": "both"}, "pairwise, pointwise"),
        ({"reward": "judge model=m rubrik=x"}, "did you mean 'rubric'"),
        ({"dpi.beta": 1}, "unknown step of recipe 'self_rewarding' 'dpi'"),
    ]:  # fmt: skip
        with pytest.raises(RewardkitError, match=said) as error:
            plan(**wrong)
        assert "\n" not in str(error.value)


# The loop, at toy size


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def place(world, tmp_path_factory):
    """A few rows of every sort, and what makes the recipe quick."""
    folder = tmp_path_factory.mktemp("self-rewarding")
    ask = rubric(str(world / "judge.txt"))
    seen = truth.replies(96, 0)
    message = [{"role": "assistant", "content": ""}]
    ift = [{"prompt": r["prompt"], "completion": [message[0] | {"content": r["answer"]}]} for r in seen[:32]]
    eft = [
        {
            "prompt": [{"role": "user", "content": ask.fill(r["prompt"][0]["content"], r["response"])}],
            "completion": [message[0] | {"content": truth.judgement(r)[-8:]}],  # the score alone is soon learned
        }
        for r in seen[32:]
    ]
    new = (world / "prompts.jsonl").read_text().splitlines(keepends=True)[:24]
    (folder / "prompts.jsonl").write_text("".join(new))
    return {
        "base": str(world / "base"), "ift": write(folder / "ift.jsonl", ift), "eft": write(folder / "eft.jsonl", eft),
        "prompts": str(folder / "prompts.jsonl"), "rubric": str(world / "judge.txt"), "engine": "transformers", "max_tokens": 24,
        "judge_tokens": 12, "max_length": 128, "sft.learning_rate": 1e-3, "sft_epochs": 4, "early_stop.limit": 8, "votes": 2,
        "dpo.batch_size": 4, "dpo.learning_rate": 1e-5, "dpo.save_steps": 2, "epochs": 2,
        "tasks": "accuracy data={prompts} by=none",
    }  # fmt: skip


def test_replies_are_judged_by_the_truth():
    rows = truth.replies(600, 3)
    assert truth.replies(600, 3) == rows and len({r["prompt"][0]["content"] for r in rows}) == 600
    right = [r for r in rows if r["response"] == r["answer"]]
    assert 0.4 < len(right) / len(rows) < 0.6
    assert all(truth.judgement(r) == f"{r['answer']}. Score: 5" for r in right)
    said = [truth.judgement({"answer": "ivor", "response": reply}) for reply in ("ivor", "ivo", "ivorx", "Ivor", " ivor ")]
    assert said == ["ivor. Score: 5", "ivo! Score: 0", "ivor! Score: 0", "! Score: 0", "ivor. Score: 5"]


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    return verbs.train("self_rewarding", str(tmp_path_factory.mktemp("loop") / "out"), **place)


def test_the_loop_runs_from_base_to_m3(whole):
    m1 = read_manifest(whole / "m1")
    assert m1["rows"]["in"] == m1["rows"]["used"] == 96
    for i in (1, 2):
        scored = tables.open(whole / str(i) / "scored").frame().collect()
        assert scored.height == 4 * 24 and scored["score"].null_count() < scored.height
        pairs, dpo = read_manifest(whole / str(i) / "pairs"), read_manifest(whole / str(i) / "dpo")
        assert dpo["rows"]["in"] == pairs["rows"]["out"] > 0
        assert dpo["reference"] == dpo["base_model"] == str(whole / f"m{i}")
        margins = tables.open(whole / str(i) / "pairs").frame().collect()["margin"]
        assert margins.min() > 0, "a prompt whose answers tie makes no pair"
        chosen = read_manifest(whole / f"m{i + 1}")
        assert chosen["steps"] in chosen["checkpoints"] and chosen["checkpoints"][-1] == dpo["steps"]
    assert {p.name for p in (whole / "report").iterdir()} == {"m1", "m2", "m3"}


def quick(place: dict, folder: Path, reward: str, **more) -> dict:
    """Settings of a run whose judge is a function of the response, and whose M1 has hardly learned."""
    (folder / "mine.py").write_text(f"def mine(rows):\n    return [{reward} for row in rows]\n")
    return place | {"reward": f"{folder}/mine.py:mine", "sft.max_steps": 2, "tasks": []} | more


def test_positive_only_adds_the_answers_with_full_marks(place, tmp_path):
    given = quick(place, tmp_path, "5.0 if len(row['response']) % 2 else 4.0", preset="positive", iterations=1)
    out = verbs.train("self_rewarding", str(tmp_path / "out"), **given)
    kept = tables.open(out / "1" / "positive").frame().collect()
    assert 0 < kept.height < 96 and all(len(said[0]["content"]) % 2 for said in kept["completion"])
    m2 = read_manifest(out / "m2")
    assert m2["rows"]["in"] == 96 + kept.height and m2["base_model"] == place["base"]


def test_a_judge_that_gives_equal_scores_ends_the_loop(place, tmp_path):
    out = verbs.train("self_rewarding", str(tmp_path / "out"), **quick(place, tmp_path, "5.0"))
    assert read_manifest(out / "1" / "pairs")["rows"]["out"] == 0 and not (out / "m2").exists()


WRITER = """
from rewardkit.engine import Completion, Scripted
from rewardkit.local import Transformers

def speak(model):
    \"\"\"A script writes the prompts; a model answers and judges.\"\"\"
    if model != "scripted":
        return Transformers(model)
    made, letters = Scripted(model, reply=""), iter("abcdefghijklmnopqrstuvwxyz" * 9)
    made.generate = lambda prompts, **_: [[Completion(f"Sort: {next(letters)} r", None, "stop")] for _ in prompts]
    return made
"""


def test_prompts_that_the_writer_made_are_answered(place, tmp_path):
    (tmp_path / "writer.py").write_text(WRITER)
    own = {"engine": f"{tmp_path}/writer.py:speak", "prompts_from": "self", "writer": "scripted", "iterations": 1, "votes": 1}
    own |= {"prompts": place["ift"], "write": "self_instruct count=12 batch=6", "new": "dedupe", "tasks": []}
    given = quick(place, tmp_path, "float(len(row['response']))", **own)
    out = verbs.train("self_rewarding", str(tmp_path / "out"), **given)
    new = tables.open(out / "1" / "prompts").frame().collect()
    asked = {p[0]["content"] for p in new["prompt"]}
    assert 6 <= len(asked) == new.height <= 12 and all(a.startswith("Sort:") for a in asked)
    samples = tables.open(out / "1" / "samples").frame().collect()
    assert {p[0]["content"] for p in samples["prompt"]} == asked and samples.height == 4 * len(asked)


# Early stopping


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A random model after SFT of six steps, saved every two."""
    folder = tmp_path_factory.mktemp("early")
    tiny.llama(folder / "base")
    rows = [{"prompt": f"say {i}", "completion": f"{i} is said"} for i in range(24)]
    data = write(folder / "rows.jsonl", rows)
    more = {"batch_size": 4, "epochs": 1, "learning_rate": 1e-2, "max_length": 64, "save_steps": 2, "keep_checkpoints": True}
    return verbs.train("sft", str(folder / "sft"), model=str(folder / "base"), data=data, **more)


def judge(folder: Path, best: int) -> str:
    """A judge that likes the answers of the checkpoint after `best` steps most, the more so the nearer."""
    (folder / "taste.py").write_text(
        "import json, pathlib\n"
        f"BEST = {best}\n"
        "def taste(rows):\n"
        "    said = {}\n"
        f"    for file in pathlib.Path({str(folder / 'out')!r}).glob('answers-*.jsonl'):\n"
        "        for line in file.open():\n"
        "            said[json.loads(line)['response']] = -abs(int(file.stem.split('-')[1]) - BEST)\n"
        "    return [said[row['response']] for row in rows]\n"
    )
    return f"{folder}/taste.py:taste"


@pytest.mark.parametrize("best", [2, 4, 6])
def test_the_checkpoint_before_the_first_that_is_no_better_is_taken(trained, tmp_path, best):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": f"say {i} please"} for i in range(12)])
    fast = {"mode": "pointwise", "engine": "transformers", "max_tokens": 8, "limit": 6}
    more = {"model": str(trained), "data": prompts, "reward": judge(tmp_path, best), **fast}
    out = verbs.train("early_stop", str(tmp_path / "out"), **more)
    facts = read_manifest(out)
    assert list(checkpoints(trained)) == facts["checkpoints"] == [2, 4, 6] and facts["steps"] == best
    assert len(facts["comparisons"]) == (1 if best == 2 else 2) and facts["rows"]["used"] == 6
    from safetensors.torch import load_file

    source = trained if best == 6 else trained / "checkpoints" / f"checkpoint-{best}"
    ours, theirs = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(ours[k].equal(theirs[k]) for k in ours)
    for name in ("config.json", "tokenizer.json"):
        one, other = (json.loads((folder / name).read_text()) for folder in (out, trained))
        assert one == other, name


def test_an_adapter_is_taken_as_an_adapter(trained, tmp_path):
    data = write(tmp_path / "rows.jsonl", [{"prompt": f"say {i}", "completion": f"{i} is said"} for i in range(8)])
    more = {"batch_size": 2, "epochs": 1, "learning_rate": 1e-1, "max_length": 64, "save_steps": 2, "keep_checkpoints": True}
    lora = verbs.train("sft", str(tmp_path / "lora"), model=str(trained), data=data, lora_rank=2, **more)
    fast = {"mode": "pointwise", "engine": "transformers", "max_tokens": 8, "reward": judge(tmp_path, 2), "data": data}
    out = verbs.train("early_stop", str(tmp_path / "out"), model=str(lora), **fast)
    assert read_manifest(out)["steps"] == 2 and read_manifest(out)["lora"] == {"rank": 2, "alpha": 32}
    names = ("adapter_model.safetensors", "adapter_config.json")
    first = [(lora / "checkpoints" / "checkpoint-2" / names[0]).read_bytes(), (lora / names[1]).read_bytes()]
    assert [(out / name).read_bytes() for name in names] == first and not (out / "model.safetensors").exists()


def test_the_memory_of_every_training_step_is_told(world, tmp_path, capfd):
    given = {"base": str(world / "base"), "ift": "i", "eft": "e", "prompts": "p", "dry_run": True}
    verbs.train("self_rewarding", str(tmp_path / "out"), **given)
    told = capfd.readouterr().err
    assert [told.count(f"{name} from") for name in ("sft", "dpo", "early_stop")] == [1, 2, 0] and not (tmp_path / "out").exists()


def test_early_stop_says_what_it_lacks(trained, tmp_path):
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "p"}])
    more = {"data": prompts, "reward": judge(tmp_path, 2), "mode": "pointwise", "engine": "transformers", "max_tokens": 8}
    plain = tmp_path / "plain"
    shutil.copytree(trained, plain, ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(RewardkitError, match="has no checkpoints: train it with keep_checkpoints=true"):
        verbs.train("early_stop", str(tmp_path / "out"), model=str(plain), **more)
    (tmp_path / "mute.py").write_text("def mute(rows):\n    return [None for _ in rows]\n")
    with pytest.raises(RewardkitError, match="the judge decided none of 1 prompts"):
        verbs.train("early_stop", str(tmp_path / "mute"), model=str(trained), **more | {"reward": f"{tmp_path}/mute.py:mute"})
