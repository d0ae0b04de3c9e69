"""SIGKILL in one step after the other, and the recipe ends with the same files.

Run: .venv/bin/python -m pytest tests/test_killed_recipes.py

The processes are forked from a server that has imported the libraries once, so that ten starts cost seconds.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from pathlib import Path

import pytest

from rewardkit import verbs
from rewardkit import world as truth
from rewardkit.folders import MANIFEST, UNFINISHED
from rewardkit.rubrics import rubric

pytestmark = pytest.mark.usefixtures("one_thread")

LIBRARIES = ["trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "rewardkit.verbs", "rewardkit.server"]


def start(name: str, out: Path, settings: dict) -> multiprocessing.process.BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    process = context.Process(target=verbs.train, args=(name, str(out)), kwargs=settings)
    process.start()
    return process


def kill_in(step: str, name: str, out: Path, settings: dict) -> bool:
    """Kill the recipe as soon as it is in this step (a training step: as soon as it has trained); was the step cut short?"""
    process, folder, deadline = start(name, out, settings), out / step, time.monotonic() + 300

    def inside() -> bool:
        log = folder / "log.jsonl"
        trains = folder.name in ("m1", "dpo", "model")
        return (log.exists() and log.stat().st_size > 0) if trains else folder.exists()

    while not inside():
        assert process.exitcode is None and time.monotonic() < deadline, f"it ended before {step}"
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return not (folder / MANIFEST).exists()


def finish(name: str, out: Path, settings: dict) -> None:
    process = start(name, out, settings)
    process.join(300)
    assert process.exitcode == 0


def contents(out: Path) -> dict[str, dict[str, str]]:
    """Every step's files by their hashes."""
    return {str(m.parent.relative_to(out)): json.loads(m.read_text())["files"] for m in sorted(out.rglob(MANIFEST))}


def rows(path: Path, made: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def demonstrations(number: int) -> list[dict]:
    return [{k: row[k] for k in ("prompt", "completion")} for row in truth.demonstrations(number, 0)]


def check(name: str, steps: list[str], place: Path, settings: dict) -> None:
    out, whole = place / "out", place / "whole"
    finish(name, out, settings)
    out.rename(whole)  # samples name their model by its path, so both runs have the same one
    cut = [kill_in(step, name, out, settings) for step in steps]
    # A filter may be done before the signal comes; the others take longer than that.
    assert all(short for short, step in zip(cut, steps, strict=True) if not step.endswith(("prompts", "pairs")))
    finish(name, out, settings)
    assert contents(out) == contents(whole) and len(contents(whole)) >= len(steps)
    assert not list(out.rglob(UNFINISHED))


def test_self_rewarding_killed_in_every_step(world: Path, tmp_path):
    ask = rubric(str(world / "judge.txt"))
    eft = []
    for row in truth.replies(48, 0):
        asked = ask.fill(row["prompt"][0]["content"], row["response"])
        said = {"role": "assistant", "content": truth.judgement(row)[-8:]}  # the score alone is soon learned
        eft.append({"prompt": [{"role": "user", "content": asked}], "completion": [said]})
    settings = {
        "base": str(world / "base"), "ift": rows(tmp_path / "ift.jsonl", demonstrations(16)), "iterations": 1, "votes": 2,
        "eft": rows(tmp_path / "eft.jsonl", eft), "prompts": rows(tmp_path / "prompts.jsonl", truth.make(16, 0)),
        "rubric": str(world / "judge.txt"), "engine": "transformers", "max_tokens": 16, "judge_tokens": 12, "max_length": 128,
        "sft.learning_rate": 2e-3, "sft.save_steps": 3, "sft_epochs": 5, "dpo.batch_size": 2, "dpo.save_steps": 2, "epochs": 2,
        "early_stop.limit": 8,
    }  # fmt: skip
    steps = ["m1", "1/prompts", "1/samples", "1/scored", "1/pairs", "1/dpo", "m2"]
    check("self_rewarding", steps, tmp_path, settings)


def test_spin_killed_in_every_step(world: Path, tmp_path):
    settings = {
        "model": str(world / "base"), "demos": rows(tmp_path / "demos.jsonl", demonstrations(16)), "engine": "transformers",
        "max_tokens": 16, "max_length": 128, "batch_size": 4, "epochs": 2, "iteration2": 0, "iteration3": 0, "dpo.save_steps": 2,
    }  # fmt: skip
    steps = ["0/samples", "0/pairs", "0/model", "1/samples", "1/pairs", "1/model"]
    check("spin", steps, tmp_path, settings)
