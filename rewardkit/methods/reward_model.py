"""A reward model from preference pairs, Bradley-Terry (arXiv:2009.01325). TRL's RewardTrainer.

    loss = -log sigmoid(r(x, y_w) - r(x, y_l)),   r = the one logit of a sequence classifier

From a causal language model (the logit is read at the last token) or an encoder such as BERT. Pairs are tokenised by
`texts`, the very text that the reward `reward_model path=OUT` scores, and the template is saved with the tokenizer. The
loss fixes differences only: the zero of r is arbitrary. Defaults: Self-Evolved Reward Learning, arXiv:2411.00418,
appendix C.3, but without LoRA. `trl_run` says what the settings mean.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..tables import Row, Table, text
from . import trl_run
from .trl_run import Dtype, Plan, Schedule


def reward_model(
    model: str,
    data: Table,
    out: Path,
    *,
    epochs: float = 2,
    learning_rate: float = 2e-5,
    min_learning_rate: float = 0.0,
    batch_size: int = 4,
    micro_batch_size: int | None = None,
    max_length: int = 512,
    schedule: Schedule = "linear",
    warmup: float = 0.0,
    weight_decay: float = 0.0,
    max_steps: int = -1,
    lora_rank: int | None = None,
    lora_alpha: int = 32,
    dropout: float = 0.1,
    template: str | None = None,
    dtype: Dtype = "auto",
    checkpoint_activations: bool = False,
    save_steps: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Train a sequence classifier with one label on preference pairs; facts for the manifest.

    warmup: steps, or below 1 a share. dropout: of the adapter with LoRA, else of the model. template: a file or a
    built-in name; the model's own if it has one, else "question".
    """
    plan = Plan.of(locals())
    import datasets
    from trl import RewardConfig, RewardTrainer

    from ..texts import reward_model_tokenizer

    class Trainer(trl_run.Quiet, RewardTrainer):
        pass

    data.require("prompt", "chosen", "rejected")
    with trl_run.quiet():
        tokenizer = reward_model_tokenizer(model, template)
        ids = datasets.List(datasets.Value("int32"))
        rows, reasons = trl_run.gather(data, _reader(tokenizer), {"chosen_ids": ids, "rejected_ids": ids})
        trl_run.some(rows, data, reasons)
        loaded = trl_run.load(plan, "score")
        config = trl_run.arguments(plan, RewardConfig, max_length=None, disable_dropout=dropout == 0)
        trainer = Trainer(loaded.model, config, train_dataset=rows, processing_class=tokenizer, peft_config=loaded.adapter)
        if long := trl_run.keep_short(trainer, plan, lambda row: max(len(row["chosen_ids"]), len(row["rejected_ids"]))):
            reasons[f"longer than {max_length} tokens"] = long
        facts = trl_run.run(trainer, plan, loaded, data, reasons, "reward_model")
        return facts | {name: trl_run.tail(trainer, name) for name in ("accuracy", "margin")}


def _reader(tokenizer: Any) -> Callable[[Row], Row | str]:
    """How to tokenise a preference row."""
    from ..texts import reward_model_ids

    def read(row: Row) -> Row | str:
        found = trl_run.pair(row)
        if isinstance(found, str):
            return found
        return {f"{side}_ids": reward_model_ids(tokenizer, found["prompt"], text(found[side])) for side in ("chosen", "rejected")}

    return read
