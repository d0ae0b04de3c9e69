"""What `rewardkit filter` costs, in one run: `.venv/bin/python benchmarks/filtering.py --rows 1000000 10000000`.

Tables of samples (4 a prompt, scores, lengths; words of books if --data names the folder with books_corpus.parquet, else words
drawn by Zipf's law), about 0.2 GB a million rows. Every contender runs in a process of its own, whose library is imported
before the clock starts, and reports its seconds and its peak memory (VmHWM). They take turns, --turns times; ratios are taken
within each turn.

    ours       the verb from end to end: fingerprint, rules, counts, Parquet, length audit, manifest
    ... parts  the same in-process: rules + counts + writing, and by themselves the fingerprint and the audit
    polars     the same frame written by bare polars: scan, filter (or group), sink
    datasets   load_dataset, filter (or map over whole groups), to_parquet, with a cache of its own

Near duplicates: --near prompts, of which a tenth are near copies (one word in ten changed): ours from Parquet to kept rows, and
datasketch's own pipeline (MinHash of the same word triples, MinHashLSH, insert what has no neighbour) on the smallest size.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PORTION = 250_000
RULES = {"threshold": "threshold min=0.5", "best_vs_worst": "best_vs_worst", "top": "top per=prompt k=1"}


# The tables


def words(data: str | None) -> list[str]:
    """Running text as a list of words."""
    import numpy as np
    import polars as pl

    if data:
        texts = pl.read_parquet(Path(data) / "books_corpus.parquet", columns=["text"])["text"].head(3000)
        return " ".join(texts).split()
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    rng = np.random.default_rng(0)
    vocabulary = ["".join(rng.choice(letters, size=2 + int(rng.poisson(4)))) for _ in range(30_000)]
    return [vocabulary[min(int(i), 29_999)] for i in rng.zipf(1.3, 2_000_000) - 1]


def table(path: Path, rows: int, data: str | None) -> None:
    """`rows` samples, 4 a prompt, in row groups of about 60 thousand; lengths are log-normal around 60 words."""
    import numpy as np
    import polars as pl
    import pyarrow as pa
    import pyarrow.parquet as pq

    running, rng, writer = words(data), np.random.default_rng(1), None
    for at in range(0, rows, PORTION):
        n = min(PORTION, rows - at)
        size = np.clip(rng.lognormal(4.0, 0.7, n), 3, 600).astype(int)
        start = rng.integers(0, len(running) - 700, n)
        prompt = (np.arange(at, at + n)) // 4
        asked = {
            p: " ".join(running[s : s + 12])
            for p, s in zip(prompt.tolist(), rng.integers(0, len(running) - 20, n).tolist(), strict=True)
        }
        frame = pl.DataFrame({
            "prompt": [asked[p] for p in prompt.tolist()], "prompt_id": [f"{p:016x}" for p in prompt.tolist()],
            "sample": np.arange(at, at + n) % 4,
            "response": [" ".join(running[s : s + k]) for s, k in zip(start.tolist(), size.tolist(), strict=True)],
            "n_tokens": size, "score": rng.normal(size=n) + size / 200,
        })  # fmt: skip
        batch: pa.Table = frame.to_arrow().cast(
            pa.schema([(f.name, pa.string() if f.type == pa.large_string() else f.type) for f in frame.to_arrow().schema])
        )
        writer = writer or pq.ParquetWriter(path, batch.schema, compression="zstd")
        writer.write_table(batch, row_group_size=62_500)
    assert writer
    writer.close()


def near_table(path: Path, rows: int, data: str | None, apart: bool) -> None:
    """Prompts of 20 to 60 words; every tenth is a copy of an earlier one with a tenth of its words changed at its end.

    The others are cut from the books, so that of very many some overlap; apart: their words are drawn one by one.
    """
    import polars as pl

    running, rng = words(data), random.Random(2)
    prompts: list[str] = []
    for i in range(rows):
        if i % 10 == 9:
            old = prompts[rng.randrange(len(prompts))].split()
            cut = max(1, len(old) // 10)
            prompts.append(" ".join([*old[:-cut], *(f"changed{i}" for _ in range(cut))]))
        else:
            size, start = rng.randint(20, 60), rng.randrange(len(running) - 70)
            prompts.append(" ".join([*(rng.choices(running, k=size) if apart else running[start : start + size]), f"number{i}"]))
    pl.DataFrame({"prompt": prompts}).write_parquet(path)


# The contenders: each returns what it has to report besides seconds and memory


def ours(path: Path, task: str, out: Path) -> dict[str, Any]:
    """The verb."""
    import rewardkit
    from rewardkit.folders import read_manifest

    made = rewardkit.filter(str(path), RULES.get(task, task), str(out), output="score")
    return read_manifest(made)["stages"][0].get("facts", {}) | {"rows": read_manifest(made)["rows"]["out"]}


def parts(path: Path, task: str, out: Path) -> dict[str, Any]:
    """The verb's parts, one after the other."""
    from rewardkit import audit, rules, tables
    from rewardkit.folders import claim

    seconds, found = {}, {}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found[name] = action()
        seconds[name] = time.perf_counter() - start
        return found[name]

    source = tables.open(path)
    chain = rules.load(RULES[task])
    timed("fingerprint", lambda: source.fingerprint)
    timed("audit", lambda: audit.audit(source.frame(), chain.scores))
    made = timed("rules and counts", lambda: rules.partition(chain, source.frame(), task))
    with claim(out, "filter", {}, {}) as folder:
        timed("writing", lambda: folder.sink(made.kept))
        folder.finish(made.counts)
    return {"rows": made.counts["out"], "parts": seconds}


def polars(path: Path, task: str, out: Path) -> dict[str, Any]:
    """Bare polars writing the same frames."""
    import polars as pl

    frame = pl.scan_parquet(path)
    if task == "threshold":
        kept = frame.filter(pl.col("score") >= 0.5)
    elif task == "top":
        kept = frame.filter(pl.col("score").rank("ordinal", descending=True).over("prompt_id") == 1)
    else:
        best, worst = pl.col("score").arg_max(), pl.col("score").arg_min()

        def message(at: pl.Expr) -> pl.Expr:
            return pl.concat_list(pl.struct(role=pl.lit("assistant"), content=at))

        sides = {
            f"{c}_{side}": pl.col(c).get(at)
            for side, at in (("chosen", best), ("rejected", worst))
            for c in ("sample", "n_tokens", "score")
        }
        grouped = frame.group_by("prompt_id").agg(
            pl.col("prompt").first(),
            **sides,
            chosen=pl.col("response").get(best),
            rejected=pl.col("response").get(worst),
            most=pl.col("score").max(),
        )
        messages = {side: message(pl.col(side)) for side in ("chosen", "rejected")}
        margin = pl.col("score_chosen") - pl.col("score_rejected")
        kept = grouped.filter(margin > 0).drop("most").with_columns(**messages, margin=margin)
    kept.sink_parquet(out, compression="zstd", compression_level=1)  # as ours
    return {"rows": pl.scan_parquet(out).select(pl.len()).collect().item()}


def datasets(path: Path, task: str, out: Path) -> dict[str, Any]:
    """`datasets`: load, filter (or sort by prompt, which lays groups together, and make a pair of each), write."""
    import datasets as library

    library.disable_progress_bars()
    rows = library.load_dataset("parquet", data_files=str(path), split="train", cache_dir=f"{out}-cache")
    if task == "threshold":
        kept = rows.filter(lambda batch: [s >= 0.5 for s in batch["score"]], batched=True)
    else:

        def pairs(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            made: dict[str, list[Any]] = {"prompt": [], "chosen": [], "rejected": [], "score_chosen": [], "score_rejected": []}
            for at in range(0, len(batch["score"]), 4):
                group = range(at, at + 4)
                best, worst = max(group, key=batch["score"].__getitem__), min(group, key=batch["score"].__getitem__)
                made["prompt"].append(batch["prompt"][best])
                for side, i in (("chosen", best), ("rejected", worst)):
                    made[side].append([{"role": "assistant", "content": batch["response"][i]}])
                    made[f"score_{side}"].append(batch["score"][i])
            return made

        kept = rows.sort("prompt_id").map(pairs, batched=True, batch_size=1000, remove_columns=rows.column_names)
    kept.to_parquet(str(out))
    return {"rows": len(kept)}


def datasketch(path: Path, task: str, out: Path) -> dict[str, Any]:
    """datasketch's own pipeline: a text stays if the index holds no neighbour of it, and is then put into the index."""
    import re

    import polars as pl
    from datasketch import MinHash, MinHashLSH

    index, kept = MinHashLSH(threshold=0.7, num_perm=128), 0
    for i, text in enumerate(pl.read_parquet(path)["prompt"]):
        found = re.findall(r"\w+", text.lower())
        sketch = MinHash(num_perm=128)
        sketch.update_batch([" ".join(found[j : j + 3]).encode() for j in range(max(1, len(found) - 2))])
        if not index.query(sketch):
            index.insert(str(i), sketch)
            kept += 1
    return {"rows": kept}


CONTENDERS = {f.__name__: f for f in (ours, parts, polars, datasets, datasketch)}


# The runs


def one(name: str, path: Path, task: str) -> None:
    """Run a contender here and print what it took."""
    place = Path(tempfile.mkdtemp(dir=path.parent))
    for library in {"datasets": ["datasets"], "datasketch": ["datasketch"]}.get(name, ["rewardkit.filtering", "numpy"]) + [
        "polars"
    ]:
        importlib.import_module(library)
    start = time.perf_counter()
    found = CONTENDERS[name](path, task, place / "out")
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    shutil.rmtree(place)
    print(json.dumps({"seconds": seconds, "peak_MiB": peak, **found}))


def run(name: str, path: Path, task: str) -> dict[str, Any]:
    """A contender in a process of its own."""
    command = [sys.executable, __file__, "--one", name, str(path), task]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"REWARDKIT_QUIET": "1", "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        sys.exit(f"{name} failed on {path}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float], form: str = ".2f") -> str:
    """median (least - most)."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} - {max(values):{form}})"


def filtering(place: Path, rows: int, data: str | None, turns: int) -> Iterator[list[str]]:
    """Every task at one size."""
    path = place / f"{rows}.parquet"
    table(path, rows, data)
    print(f"{rows:,} rows, {path.stat().st_size / 1e6:,.0f} MB", file=sys.stderr)
    for task in ("threshold", "best_vs_worst", "top"):
        names = ["ours", "parts", "polars", *(["datasets"] if task != "top" else [])]
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for turn in range(turns):
            for name in names if turn % 2 == 0 else reversed(names):
                found[name].append(run(name, path, task))
        assert len({r["rows"] for runs in found.values() for r in runs}) == 1, f"the contenders disagree on {task}: {found}"
        split = {k: statistics.median(r["parts"][k] for r in found["parts"]) for k in found["parts"][0]["parts"]}
        own = [r["parts"]["rules and counts"] + r["parts"]["writing"] for r in found["parts"]]
        for name in names:
            seconds = [r["seconds"] for r in found[name]] if name != "parts" else own
            ratio = ""
            if name == "parts":
                ratio = spread([o / p["seconds"] for o, p in zip(own, found["polars"], strict=True)]) + "x polars"
            if name == "datasets":
                ratio = spread([d / o["seconds"] for d, o in zip(seconds, found["ours"], strict=True)]) + "x ours"
            label = name if name != "parts" else "ours, rules + counts + writing"
            peak = statistics.median(r["peak_MiB"] for r in found[name])
            yield [f"{rows:,}", task, label, spread(seconds), ratio, f"{peak:,.0f}", f"{found[name][0]['rows']:,}"]
        yield [f"{rows:,}", task, "fingerprint, audit", f"{split['fingerprint']:.2f}, {split['audit']:.2f}", "", "", ""]
    path.unlink()


def near(place: Path, sizes: list[int], data: str | None, apart: bool) -> Iterator[list[str]]:
    """Near duplicates at every size; datasketch on the smallest."""
    for size in sizes:
        path = place / f"near-{size}.parquet"
        near_table(path, size, data, apart)
        for name in ["ours", *(["datasketch"] if size == min(sizes) else [])]:
            r = run(name, path, "dedupe near=0.7")
            yield [
                f"{size:,}",
                name,
                f"{r['seconds']:.1f}",
                f"{r['seconds'] / size * 1e6:.0f}",
                f"{r['peak_MiB']:,.0f}",
                f"{r['rows']:,}",
            ]
        path.unlink()


def main() -> None:
    """Make the tables, run the contenders, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000_000, 10_000_000])
    parser.add_argument("--near", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--apart", action="store_true", help="prompts for --near that only their planted copies resemble")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--data", help="the folder with books_corpus.parquet")
    parser.add_argument("--place", type=Path, help="where the tables are made; a temporary folder by default")
    parser.add_argument("--one", nargs=3, metavar=("CONTENDER", "FILE", "TASK"), help="used by the benchmark itself")
    options = parser.parse_args()
    if options.one:
        one(options.one[0], Path(options.one[1]), options.one[2])
        return
    with tempfile.TemporaryDirectory(dir=options.place) as name:
        header = ["rows", "rule", "contender", "seconds", "ratio", "peak MiB", "rows out"]
        print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
        for rows in options.rows:
            for cells in filtering(Path(name), rows, options.data, options.turns):
                print("| " + " | ".join(cells) + " |", flush=True)
        header = ["prompts", "contender", "seconds", "microseconds a prompt", "peak MiB", "kept"]
        print("\n| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
        for cells in near(Path(name), options.near, options.data, options.apart):
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
