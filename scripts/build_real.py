#!/usr/bin/env python
"""Builds a small start for a run on real text: a tiny base model, demonstrations, preference pairs and responses.

    python scripts/build_real.py --data FOLDER --out runs/real --steps 250 --seed 0

    OUT/base              a small Llama trained from scratch on public-domain books, with its own byte-level BPE tokenizer
    OUT/demos.jsonl       prompt, completion: GPTeacher and Dolly
    OUT/pairs.jsonl       prompt, chosen, rejected, source: HH-RLHF, OpenAssistant and a DPO sample
    OUT/responses.parquet prompt, response, generator, judge_preference: AlpacaEval, the same prompts for every generator

FOLDER holds the sources as parquet (books_corpus, gpteacher_sft, dolly_short, hh_rlhf_harmless, oasst_preferences,
dpo_en_demo, alpaca_eval_responses). Nothing of them is shipped with rewardkit. The base has learned the words of English
and little else: it makes the steps after it real and fast, not their numbers good.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rewardkit.engine import chat_template

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<pad>", "</s>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 4096
WINDOW = 1024
# 2.1 million parameters; a head of 32 is the smallest that vLLM takes on every machine.
SHAPE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 6, "head_dim": 32}
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def main() -> None:
    arguments = read_arguments()
    data, out = Path(arguments.data), Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(arguments.seed)
    write(out / "demos.jsonl", demonstrations(data, rng))
    write(out / "pairs.jsonl", preference_pairs(data, rng)[: arguments.pairs])
    table = responses(data, arguments.prompts, arguments.generators, arguments.seed)
    table.write_parquet(out / "responses.parquet")
    say(f"responses.parquet: {table.height:,} rows")

    from transformers.utils import logging

    logging.disable_progress_bar()
    began = time.time()
    passages = pl.read_parquet(data / "books_corpus.parquet", columns=["text"])["text"].to_list()
    rng.shuffle(passages)
    tokenizer = build_tokenizer(passages[:400] + [str(row["completion"]) for row in read(out / "demos.jsonl")][:2000])
    model = train_base(tokenizer, passages, arguments)
    model.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    say(f"base: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens, {time.time() - began:.0f} s")
    print(out)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder with the sources")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--steps", type=int, default=250, help="steps of pretraining, 8 x 256 tokens each")
    parser.add_argument("--prompts", type=int, default=40, help="prompts of AlpacaEval")
    parser.add_argument("--generators", type=int, default=6, help="generators of AlpacaEval, from the worst to the best")
    parser.add_argument("--pairs", type=int, default=None, help="at most this many preference pairs")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    # Escaped to ASCII: real texts hold line separators that some readers split at.
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    say(f"{file.name}: {len(rows):,} rows")


def read(file: Path) -> Iterator[dict[str, Any]]:
    return map(json.loads, file.read_text().splitlines())


def demonstrations(data: Path, rng: random.Random) -> list[dict[str, Any]]:
    """Instruction, with its input below it, and answer."""
    rows = []
    for source in ("gpteacher_sft", "dolly_short"):
        for row in pl.read_parquet(data / f"{source}.parquet").iter_rows(named=True):
            prompt = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part and part.strip())
            if prompt and (row["response"] or "").strip():
                rows.append({"prompt": prompt, "completion": row["response"], "source": source})
    rng.shuffle(rows)
    return rows


def preference_pairs(data: Path, rng: random.Random) -> list[dict[str, Any]]:
    """Pairs with two answers that say something, to a conversation that ends with the user."""
    rows = []
    for source in ("hh_rlhf_harmless", "oasst_preferences", "dpo_en_demo"):
        for row in pl.read_parquet(data / f"{source}.parquet").iter_rows(named=True):
            turns = row.get("messages") or [{"role": ROLES[t["from"]], "content": t["value"]} for t in row["conversations"]]
            answers = {side: row[side] for side in ("chosen", "rejected") if (row[side] or "").strip()}
            if len(answers) == 2 and turns[-1]["role"] == "user":
                rows.append({"prompt": turns, **answers, "source": source})
    rng.shuffle(rows)
    return rows


def responses(data: Path, prompts: int, generators: int, seed: int) -> pl.DataFrame:
    """What generators of very different quality said to the same prompts, empty and endless answers included."""
    frame = pl.read_parquet(data / "alpaca_eval_responses.parquet")
    ranked = frame.group_by("generator").agg(pl.col("judge_preference").mean()).sort("judge_preference", "generator")
    names = ranked["generator"].to_list()
    spread = {names[round(i * (len(names) - 1) / max(1, generators - 1))] for i in range(generators)}
    asked = random.Random(seed).sample(sorted(frame["prompt"].unique().to_list()), min(prompts, frame["prompt"].n_unique()))
    kept = frame.filter(pl.col("prompt").is_in(asked) & pl.col("generator").is_in(spread)).sort("prompt", "generator")
    return kept.select("prompt", "response", "generator", "judge_preference")


def build_tokenizer(texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    # With all 256 bytes in the alphabet no text is unknown, whatever the script.
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator(texts, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", additional_special_tokens=SPECIAL_TOKENS[2:],
        model_max_length=WINDOW, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    made.chat_template = chat_template(made, "chatml", "the base")
    return made


def blocks(tokenizer: "PreTrainedTokenizerFast", passages: Iterable[str], count: int, length: int) -> Any:
    """`count` rows of `length` tokens: passages one after the other, each closed by the end token."""
    import torch

    stream: list[int] = []
    for passage in passages:
        stream += [*tokenizer.backend_tokenizer.encode(passage).ids, tokenizer.eos_token_id]
        if len(stream) >= count * length:
            break
    # A corpus that is too small for the run is read again.
    stream *= math.ceil(count * length / len(stream))
    return torch.tensor(stream[: count * length]).view(count, length)


def train_base(
    tokenizer: "PreTrainedTokenizerFast", passages: list[str], arguments: argparse.Namespace, rows: int = 8, length: int = 256
) -> "LlamaForCausalLM":
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(arguments.seed)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=WINDOW, tie_word_embeddings=True, **SHAPE, **ids)
    model = LlamaForCausalLM(config)
    ids_NT = blocks(tokenizer, passages, arguments.steps * rows, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.05)
    warmup = max(1, arguments.steps // 10)

    def share_of_lr(step: int) -> float:
        rest = (step - warmup) / max(1, arguments.steps - warmup)
        return (step + 1) / warmup if step < warmup else 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * rest))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_lr)
    for step, ids_BT in enumerate(ids_NT.split(rows), start=1):
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == arguments.steps:
            say(f"step {step:5d}  loss {loss.item():.3f}")
    return model


if __name__ == "__main__":
    main()
