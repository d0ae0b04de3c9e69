#!/usr/bin/env python
"""Builds the embedded world's folder: the tiny base, its tokenizer, demonstrations, prompts and held-out prompts.

    python scripts/build_world.py --out rewardkit/assets/world --corruption 0.6 --seed 0

The base is a small Llama trained from scratch on `rewardkit.world.base_corpus`, with the loss on the answers only. The
tokenizer knows the 256 bytes and a few special tokens, so no text is unknown to it. The same command with the same
library versions rebuilds the same rows; the weights agree up to the rounding of the machine.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from rewardkit import world

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"]
# The prompt with its generation prompt is a token prefix of the whole conversation; the tokenizer adds no second <s>.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
MAX_TOKENS = 256


def main() -> None:
    arguments = read_arguments()
    began = time.time()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (
        ("demos", world.demonstrations(arguments.demos, arguments.seed)),
        ("prompts", world.make(arguments.prompts, arguments.seed, split="prompts")),
        ("heldout", world.make(arguments.heldout, arguments.seed, split="heldout")),
    ):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    tokenizer = build_tokenizer()
    corpus = world.base_corpus(arguments.rows, arguments.seed, arguments.corruption)
    model = train_base(tokenizer, corpus, arguments)
    model.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")

    settings = vars(arguments) | {
        "command": "python scripts/build_world.py " + " ".join(sys.argv[1:]),
        "shape": SHAPE,
        "parameters": model.num_parameters(),
        "rule_share_spread": world.SPREAD,
        "random_share": world.RANDOM_SHARE,
        "seconds": round(time.time() - began),
    }
    (out / "world.json").write_text(json.dumps(settings, indent=1) + "\n")
    print(out)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="rewardkit/assets/world", help="the folder to write")
    parser.add_argument("--corruption", type=float, default=0.6, help="mean share of answers wrong by rule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the base corpus")
    parser.add_argument("--demos", type=int, default=96)
    parser.add_argument("--prompts", type=int, default=360)
    parser.add_argument("--heldout", type=int, default=420)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def build_tokenizer() -> "PreTrainedTokenizerFast":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS + alphabet)}
    # Byte-level BPE without a single merge: one token a byte.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL_TOKENS[4:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def tokenize(tokenizer: "PreTrainedTokenizerFast", rows: list[dict]) -> list[tuple[list[int], int]]:
    """One (ids, where the answer begins) per row, through the chat template that everybody else uses."""
    prompts = [tokenizer.apply_chat_template(r["prompt"], tokenize=False, add_generation_prompt=True) for r in rows]
    texts = [tokenizer.apply_chat_template(r["prompt"] + r["completion"], tokenize=False) for r in rows]
    prompt_ids, text_ids = tokenizer(prompts)["input_ids"], tokenizer(texts)["input_ids"]
    return [(ids, len(start)) for ids, start in zip(text_ids, prompt_ids, strict=True)]


def train_base(tokenizer: "PreTrainedTokenizerFast", corpus: list[dict], arguments: argparse.Namespace) -> "LlamaForCausalLM":
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **SHAPE,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(config).to(device)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id

    rows = tokenize(tokenizer, corpus)
    rng = random.Random(arguments.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = 100

    def share_of_lr(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (arguments.steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_lr)
    began, running = time.time(), None
    for step in range(arguments.steps):
        batch = rng.sample(rows, arguments.batch)
        length = max(len(ids) for ids, _ in batch)
        ids_BT = torch.tensor([ids + [tokenizer.pad_token_id] * (length - len(ids)) for ids, _ in batch], device=device)
        labels_BT = ids_BT.clone()
        for row, (ids, start) in enumerate(batch):
            labels_BT[row, :start] = -100
            labels_BT[row, len(ids) :] = -100
        # Padding stands on the right and the attention is causal, so no mask is needed.
        loss = model(input_ids=ids_BT, labels=labels_BT).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            running = loss.item() if running is None else 0.5 * running + 0.5 * loss.item()
            print(f"step {step + 1:5d}  loss {running:.4f}  {time.time() - began:.0f} s", file=sys.stderr, flush=True)
    return model


if __name__ == "__main__":
    main()
