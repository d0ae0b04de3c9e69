"""Supervised fine-tuning: make the given answers likely. TRL's SFTTrainer.

    loss = - sum_t log p(y_t | x, y_<t) / number of answer tokens in the batch

Only the tokens of the answer count, the end token among them; the prompt is masked. Rows are prompt + completion,
prompt + response (samples), or `messages`, of which the last assistant turn is the answer. Other columns are ignored.
Defaults: Self-Rewarding PPO, arXiv:2510.21090, section 4.1 and Table 6 (Llama-3-8B). `trl_run` says what the settings mean.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..tables import Row, Table
from . import trl_run
from .trl_run import Dtype, Plan, Schedule


def sft(
    model: str,
    data: Table,
    out: Path,
    *,
    epochs: float = 2,
    learning_rate: float = 1e-5,
    min_learning_rate: float = 0.0,
    batch_size: int = 128,
    micro_batch_size: int | None = None,
    max_length: int = 2048,
    schedule: Schedule = "cosine",
    warmup: float = 0.0,
    weight_decay: float = 0.0,
    max_steps: int = -1,
    lora_rank: int | None = None,
    lora_alpha: int = 32,
    dropout: float = 0.0,
    template: str | None = None,
    dtype: Dtype = "auto",
    checkpoint_activations: bool = False,
    save_steps: int = 200,
    keep_checkpoints: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Fine-tune a causal language model on answers; facts for the manifest.

    warmup: steps, or below 1 a share of all steps. min_learning_rate: where the schedule ends. max_steps: instead of epochs.
    dropout: of the adapter with LoRA, else of the model. template: a chat template, for a base that has none.
    """
    plan = Plan.of(locals())
    from trl import SFTConfig, SFTTrainer

    from ..engine import load_tokenizer

    class Trainer(trl_run.Quiet, SFTTrainer):
        pass

    message = trl_run.message_type()
    rows, reasons = trl_run.gather(data, reader(data), {"prompt": message, "completion": message})
    trl_run.some(rows, data, reasons)
    with trl_run.quiet():
        tokenizer, loaded = load_tokenizer(model, template), trl_run.load(plan, "causal")
        trl_run.stops(loaded.model, tokenizer)
        config = trl_run.arguments(plan, SFTConfig, max_length=None, completion_only_loss=True)
        trainer = Trainer(loaded.model, config, train_dataset=rows, processing_class=tokenizer, peft_config=loaded.adapter)
        if long := trl_run.keep_short(trainer, plan, lambda row: len(row["input_ids"])):
            reasons[f"longer than {max_length} tokens"] = long
        return trl_run.run(trainer, plan, loaded, data, reasons, "sft")


def reader(data: Table) -> Callable[[Row], Row | str]:
    """How to get prompt and completion out of a row of this table."""
    if "messages" in data.schema and "prompt" not in data.schema:
        return _last_turn
    data.require("prompt", "completion" if "response" not in data.schema else "response")
    # A rule writes the answer it chose as `completion`; `response` is then what it chose from.
    column = "completion" if "completion" in data.schema else "response"
    return lambda row: _row(trl_run.conversation(row["prompt"]), row[column])


def _row(prompt: Any, value: Any) -> Row | str:
    if not prompt:
        return "no prompt"
    completion = trl_run.answer(value, prompt)
    return {"prompt": prompt, "completion": completion} if completion else "an empty answer"


def _last_turn(row: Row) -> Row | str:
    """`messages` cut before the last assistant turn."""
    turns = trl_run.conversation(row["messages"]) or []
    places = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    return _row(turns[: places[-1]], turns[places[-1]]["content"]) if places else "an empty answer"
