"""Run: .venv/bin/python -m pytest tests/test_tables.py"""

import gzip
import json

import datasets
import polars as pl
import pytest

from rewardkit import tables
from rewardkit.errors import DataError

ROWS = [{"prompt": f"question {i}\u2028with an odd separator", "response": f"r{i}", "n": i} for i in range(1000)]


def _write(path, rows=ROWS):
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    return path


def test_every_kind_of_source_gives_the_same_rows(tmp_path):
    frame = pl.DataFrame(ROWS)
    frame[:400].write_parquet(tmp_path / "a.parquet")
    frame[400:].write_parquet(tmp_path / "b.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "arrow")
    (tmp_path / "all.json").write_text(json.dumps(ROWS))
    for source in (
        _write(tmp_path / "rows.jsonl"), _write(tmp_path / "rows.jsonl.gz"), tmp_path / "*.parquet", tmp_path / "arrow",
        tmp_path / "all.json", [tmp_path / "a.parquet", tmp_path / "b.parquet"],
    ):  # fmt: skip
        table = tables.open(source)
        assert table.rows == 1000
        assert [r for batch in table.batches(300) for r in batch] == ROWS
        assert [r["n"] for batch in table.batches(300, skip=600) for r in batch] == list(range(600, 1000))


def test_the_fingerprint_follows_the_contents_and_not_the_name(tmp_path):
    first, copy = _write(tmp_path / "a.jsonl"), _write(tmp_path / "b.jsonl")
    other = _write(tmp_path / "c.jsonl", ROWS[:-1])
    prints = [tables.open(p).fingerprint for p in (first, copy, other)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("line", "reason"), [("{broken", "not JSON"), ("[1, 2]", "a JSON list, not an object"), ("\xff", "not JSON")]
)
def test_a_broken_line_is_named_or_quarantined(tmp_path, line, reason):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS[0]) + "\n\n" + line + "\n" + json.dumps(ROWS[1]) + "\n")
    with pytest.raises(DataError, match=f"rows.jsonl line 3: {reason}"):
        tables.open(file)
    table = tables.open(file, quarantine=True)
    assert table.rows == 2
    assert [(b["line"], b["text"].strip()) for b in table.broken] == [(3, line)]


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "bad.parquet").write_text("this is not parquet")
    (tmp_path / "rows.csv").write_text("a,b\n")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:2])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "empty").mkdir()
    for source, says in [
        (tmp_path / "none.parquet", "there is no file or folder"),
        (tmp_path / "bad.parquet", "cannot read .*bad.parquet"),
        (tmp_path / "rows.csv", "rows are read from .parquet"),
        (tmp_path / "splits", "name one of .*splits/train"),
        (tmp_path / "empty", "holds no .parquet"),
        (tmp_path / "*.nothing", "no file matches"),
    ]:
        with pytest.raises(DataError, match=says):
            tables.open(source)
    with pytest.raises(DataError, match="no column 'chosen'; its columns are 'prompt', 'response', 'n'"):
        tables.open(_write(tmp_path / "rows.jsonl")).require("prompt", "chosen")


def test_a_column_empty_in_one_shard_gets_the_type_of_the_others(tmp_path):
    pl.DataFrame({"a": [1], "why": [None]}).write_parquet(tmp_path / "part-00000.parquet")
    pl.DataFrame({"a": [2.5], "why": ["x"], "more": [[1]]}).write_parquet(tmp_path / "part-00001.parquet")
    assert tables.seal(tmp_path) == (2, 0)
    loaded = datasets.load_dataset(
        "parquet", data_files=f"{tmp_path}/*.parquet", split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.to_list() == [{"a": 1.0, "why": None, "more": None}, {"a": 2.5, "why": "x", "more": [1]}]


def test_prompts_are_messages_or_text():
    assert tables.messages("hi") == [{"role": "user", "content": "hi"}]
    assert tables.prompt_id(tables.messages("hi")) == tables.prompt_id([{"content": "hi", "role": "user"}])
    with pytest.raises(DataError, match="a prompt is text or a list"):
        tables.messages(7)
