"""Kill -9 in the middle, run again: the same table. Run: .venv/bin/python -m pytest tests/test_resume.py"""

import json
import signal
import subprocess
import sys
import time

import polars as pl
import pytest

from tests import tiny


def command(*words):
    return [sys.executable, "-m", "rewardkit.cli", *map(str, words)]


def kill_after_shard(words, out, shard):
    """Start the real command, kill it as soon as `shard` is there, and say that it had not finished."""
    process = subprocess.Popen(command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / f"part-{shard:05d}.parquet").exists():
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists() and (out / "unfinished.json").exists()


def rows(out):
    return pl.concat([pl.read_parquet(p) for p in sorted(out.glob("part-*.parquet"))])


def counts(out):
    return json.loads((out / "manifest.json").read_text())["rows"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    tiny.llama(folder / "model")
    prompts = [{"prompt": f"Question {i}?", "number": i} for i in range(600)]
    prompts[300]["prompt"], prompts[500]["prompt"] = "", "long " * 100
    pl.DataFrame(prompts).write_parquet(folder / "prompts.parquet")
    pl.DataFrame([{"prompt": f"q{i}", "response": "r" * (i % 7)} for i in range(1500)]).write_parquet(folder / "rows.parquet")
    (folder / "slow.py").write_text(
        "import time\ndef slow(rows):\n    time.sleep(0.3)\n    return [float(len(r['response'])) for r in rows]\n"
    )
    return folder


def test_a_killed_score_ends_with_the_same_table(place, tmp_path):
    words = ["score", "--data", place / "rows.parquet", "--reward", f"{place}/slow.py:slow", "--out"]
    subprocess.run(command(*words, tmp_path / "whole"), check=True, capture_output=True)
    kill_after_shard([*words, tmp_path / "killed"], tmp_path / "killed", shard=1)
    again = subprocess.run(command(*words, tmp_path / "killed"), check=True, capture_output=True, text=True)
    assert "continues in" in again.stderr
    assert rows(tmp_path / "killed").equals(rows(tmp_path / "whole")) and rows(tmp_path / "whole").height == 1500
    assert counts(tmp_path / "killed") == counts(tmp_path / "whole")


def test_a_killed_generate_ends_with_the_same_table(place, tmp_path):
    words = [
        "generate",
        "--model",
        place / "model",
        "--prompts",
        place / "prompts.parquet",
        "--n",
        2,
        "--max-tokens",
        40,
        "--out",
    ]
    kill_after_shard([*words, tmp_path / "killed"], tmp_path / "killed", shard=0)
    subprocess.run(command(*words, tmp_path / "killed"), check=True, capture_output=True)
    subprocess.run(command(*words, tmp_path / "whole"), check=True, capture_output=True)
    killed, whole = rows(tmp_path / "killed"), rows(tmp_path / "whole")
    assert killed.equals(whole)
    assert whole.select("prompt_id", "sample").n_unique() == whole.height == 2 * 598
    assert (
        counts(tmp_path / "killed")
        == counts(tmp_path / "whole")
        == {"in": 600, "used": 598, "out": 1196, "dropped": 0, "quarantined": 2}
    )
    refused = [
        json.loads(line) for p in sorted((tmp_path / "killed").glob("quarantine-*")) for line in p.read_text().splitlines()
    ]
    assert [r["number"] for r in refused] == [300, 500] and all(r["reason"] for r in refused)
    assert json.loads((tmp_path / "whole/manifest.json").read_text())["engine"].startswith("vllm")
