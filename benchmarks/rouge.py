"""What the rule `rouge` costs and how it grows: `.venv/bin/python benchmarks/rouge.py --data FOLDER`.

The prompts are the real ones in FOLDER (parquet; SOURCES says which), and beyond those recombinations of them: the opening of one
and the end of another, so that phrases and the frequencies of words stay natural, and every tenth a near copy (one word in
ten replaced by a word of another prompt). They are shuffled once, and a size is the first so many of them.

    ours        the verb `filter rule=rouge` from end to end, in a process of its own, which uses one core
    all pairs   every prompt against every kept one, with rapidfuzz's bit-parallel LCS and its cutoff (what the rule did before)
    rouge_score the library that defines the measure, every prompt against every kept one, on the fewest prompts

All three must keep the same rows. Seconds are those of the wall; CPU seconds stand beside them, for a machine that is not idle.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LEAST = 0.7
SOURCES = {
    "alpaca_eval_responses": "prompt", "arena_hard_prompts": "prompt", "bbh": "input", "dolly_short": "instruction",
    "gpteacher_sft": "instruction", "gsm8k_test": "question", "gsm8k_train": "question", "hh_rlhf_harmless": "prompt",
    "hhh_alignment": "prompt", "ifeval_prompts": "prompt", "koala_test_set": "prompt", "llmbar": "input", "mbpp": "text",
    "pandalm_testset": "instruction", "self_instruct_seed_tasks": "instruction", "self_instruct_user_oriented": "instruction",
    "tulu_human_eval": "prompt", "vicuna_reviews": "question", "xstest_prompts": "prompt",
}  # fmt: skip


def prompts(data: Path, count: int) -> tuple[list[str], int]:
    """`count` prompts, and how many of them are real."""
    import polars as pl

    tables = [pl.read_parquet(data / f"{file}.parquet").select(prompt=column) for file, column in SOURCES.items()]
    users = pl.read_parquet(data / "oasst_messages.parquet").filter(pl.col("role") == "user").select(prompt="text")
    found = pl.concat([*tables, users]).unique(maintain_order=True)["prompt"].to_list()
    rng = random.Random(0)
    rng.shuffle(found)
    real = found[:count]
    words = [text.split() for text in real if 4 <= len(text.split()) <= 150]
    made = []
    while len(real) + len(made) < count:
        one, other = rng.choice(words), rng.choice(words)
        if len(made) % 10 == 9:
            changed = [rng.choice(other) if rng.random() < 0.1 else word for word in one]
        else:
            changed = one[: math.ceil(len(one) * rng.uniform(0.3, 0.7))] + other[math.ceil(len(other) * rng.uniform(0.3, 0.7)) :]
        made.append(" ".join(changed))
    mixed = real + made
    rng.shuffle(mixed)
    return mixed, len(real)


# The contenders: each returns the numbers of the rows it keeps, and how many pairs it compared


def ours(path: Path) -> tuple[list[int], int]:
    """The verb."""
    import polars as pl

    import rewardkit
    from rewardkit.folders import read_manifest

    made = rewardkit.filter(str(path), f"rouge max={LEAST}", str(path.with_suffix(".kept")), output="score")
    return pl.read_parquet(made / "part-00000.parquet")["row"].to_list(), read_manifest(made)["rule_facts"]["compared"]


def all_pairs(path: Path) -> tuple[list[int], int]:
    """A letter for each word, and rapidfuzz over all kept texts."""
    import polars as pl
    from rapidfuzz import process
    from rapidfuzz.distance import Indel

    letters: dict[str, str] = {}
    spelled = [
        "".join(letters.setdefault(word, chr(0x10000 + len(letters))) for word in words)
        for words in pl.read_parquet(path)["prompt"].str.to_lowercase().str.extract_all(r"[\p{L}\p{N}]+")
    ]
    kept: list[str] = []
    rows, compared = [], 0
    for row, text in enumerate(spelled):
        compared += len(kept)
        best = process.extractOne(text, kept, scorer=Indel.normalized_similarity, score_cutoff=LEAST - 0.01, processor=None)
        if best is None or best[1] < LEAST - 1e-9:
            kept.append(text)
            rows.append(row)
    return rows, compared


def rouge_score(path: Path) -> tuple[list[int], int]:
    """The library's own tokens and dynamic programme, as in Self-Instruct's code."""
    import polars as pl
    from rouge_score.rouge_scorer import RougeScorer

    scorer, kept, rows, compared = RougeScorer(["rougeL"]), [], [], 0
    for row, text in enumerate(pl.read_parquet(path)["prompt"]):
        near = False
        for other in kept:
            compared += 1
            if near := scorer.score(other, text)["rougeL"].fmeasure >= LEAST - 1e-9:
                break
        if not near:
            kept.append(text)
            rows.append(row)
    return rows, compared


CONTENDERS = {"ours": ours, "all pairs": all_pairs, "rouge_score": rouge_score}


def one(name: str, path: Path) -> None:
    """Run a contender here and print what it took."""
    import polars  # noqa: F401 - imported before the clock starts
    import rapidfuzz  # noqa: F401

    wall, cpu = time.perf_counter(), time.process_time()
    rows, compared = CONTENDERS[name](path)
    took = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    print(json.dumps({"rows": rows, "compared": compared, "peak_MiB": peak, **took}))


def run(name: str, path: Path) -> dict[str, Any]:
    """A contender in a process of its own."""
    quiet = os.environ | {"REWARDKIT_QUIET": "1"}
    done = subprocess.run([sys.executable, __file__, "--one", name, str(path)], capture_output=True, text=True, env=quiet)
    if done.returncode:
        sys.exit(f"{name} failed on {path}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Make the prompts, run the contenders, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[12_500, 25_000, 50_000, 100_000])
    parser.add_argument("--pairs", type=int, default=12_500, help="the size of `all pairs`")
    parser.add_argument("--library", type=int, default=400, help="the size of rouge_score")
    parser.add_argument("--data", type=Path, help="the folder with the prompts")
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "FILE"), help="used by the benchmark itself")
    options = parser.parse_args()
    if options.one:
        one(options.one[0], Path(options.one[1]))
        return
    if not options.data:
        parser.error("--data FOLDER is needed")
    import polars as pl

    mixed, real = prompts(options.data, max(options.sizes))
    print(f"{len(mixed):,} prompts, {real:,} of them real\n")
    header = ["prompts", "contender", "seconds", "CPU seconds", "CPU ms a prompt", "growth", "peak MiB", "kept", "pairs compared"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header), flush=True)
    with tempfile.TemporaryDirectory() as place:
        found: dict[int, dict[str, Any]] = {}
        sizes = sorted({*options.sizes, options.pairs, options.library})
        for name, size in [*(("ours", n) for n in sizes), ("all pairs", options.pairs), ("rouge_score", options.library)]:
            path = Path(place) / f"{name}-{size}.parquet"
            # rouge_score drops every sign that is not ASCII, so it is given prompts that have none.
            chosen = [text for text in mixed if text.isascii()] if size == options.library else mixed
            pl.DataFrame({"prompt": chosen[:size]}).with_row_index("row").write_parquet(path)
            r = run(name, path)
            growth = ""
            if name == "ours":
                less = max((n for n in found if n < size and n != options.library), default=None)
                growth = f"n^{math.log(r['cpu'] / found[less]['cpu']) / math.log(size / less):.2f}" if less else ""
                found[size] = r
            assert r["rows"] == found[size]["rows"], f"{name} keeps other rows than ours"
            cells = [f"{size:,}", name, f"{r['seconds']:.1f}", f"{r['cpu']:.1f}", f"{r['cpu'] / size * 1e3:.2f}", growth,
                     f"{r['peak_MiB']:,.0f}", f"{len(r['rows']):,}", f"{r['compared']:,}"]  # fmt: skip
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
