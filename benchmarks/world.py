"""The demo at several corruption levels and more seeds: `.venv/bin/python benchmarks/world.py --out runs/worlds`.

Builds a base per level (about 10 minutes each on 2 cores, seconds on a GPU; one that is there is not built again), runs
`train recipe=demo` on each, and prints one Markdown table: what the base knew, how well each score tells right from
wrong, and what training on the kept rows gained over the control, with intervals over the seeds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import rewardkit

COLUMNS = ["corruption, base seed", "base", "SFT", "on kept", "on random", "SFT longer", "kept - random", "verdict",
           "kept right", "random right", "AUC coherent", "AUC log p_SFT", "AUC length"]  # fmt: skip


def text(estimate: dict) -> str:
    """0.612 [0.580, 0.644]."""
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def row(name: str, out: Path, seeds: int) -> list[str]:
    """One world's results as table cells."""
    models, scores, kept = (json.loads((out / "report" / k / "report.json").read_text()) for k in ("models", "scores", "kept"))
    runs = {k.rpartition(" (mean")[0]: v["accuracy"] for k, v in models["means"].items()}
    (gain,) = [d for d in models["differences"] if d["run"] == "sft on kept"]
    accuracies = [text(runs[k]) for k in ("sft", "sft on kept", "sft on random", "sft longer")]
    aucs = [text(scores["scores"][k]) for k in ("coherent mean", "log p_SFT alone", "length alone")]
    shares = [text(kept["tables"][k]) for k in ("kept", "kept-random")]
    base = models["runs"]["0/base"]["accuracy"]
    return [name, text(base), *accuracies, text(gain), gain["verdict"], *shares, *aucs]


def main() -> None:
    """Build, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/worlds"))
    parser.add_argument("--levels", nargs="+", default=["0.45:0", "0.6:0", "0.6:1", "0.75:0"], help="corruption:seed of the base")
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    rows = []
    for level in options.levels:
        corruption, _, seed = level.partition(":")
        world = options.out / f"world-{corruption}-{seed}"
        if not (world / "world.json").is_file():
            build = ["scripts/build_world.py", "--out", str(world), "--corruption", corruption, "--seed", seed]
            subprocess.run([sys.executable, *build], check=True)
        out = rewardkit.train("demo", str(options.out / f"demo-{corruption}-{seed}"), world=str(world), seeds=options.seeds)
        rows.append(row(f"{corruption}, {seed}", out, options.seeds))
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for cells in rows:
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
