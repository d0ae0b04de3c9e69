"""Direct preference optimisation, arXiv:2305.18290: prefer the chosen answer, no reward model. TRL's DPOTrainer.

    h    = beta * ([log p(y_w|x) - log p_ref(y_w|x)] - [log p(y_l|x) - log p_ref(y_l|x)])
    loss = -log sigmoid(h)            sigmoid
           max(0, 1 - h)              hinge: SPIN's other loss, arXiv:2401.01335
           (h / beta - 1/(2 beta))^2  ipo, arXiv:2310.12036, on log-probabilities averaged over an answer's tokens

Log-probabilities are sums over the answer's tokens, the end token among them. The reference is the model that training
starts from, unless another is named; with LoRA it is the model with its new adapter off, so nothing is loaded twice. Rows
with `ref_chosen_logps` and `ref_rejected_logps` (sums in the sense above, through the same chat template) need no
reference at all. Defaults: Self-Rewarding Language Models, arXiv:2401.10020, section 3. `trl_run` says what the settings
mean.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..tables import Row, Table
from . import trl_run
from .trl_run import Dtype, Plan, Schedule

FAR = 0.05  # a token; bf16 rounding stays below
KNOWN = ("ref_chosen_logps", "ref_rejected_logps")


def dpo(
    model: str,
    data: Table,
    out: Path,
    *,
    beta: float = 0.1,
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
    reference: str | None = None,
    epochs: float = 1,
    learning_rate: float = 1e-6,
    min_learning_rate: float = 1e-7,
    batch_size: int = 16,
    micro_batch_size: int | None = None,
    max_length: int = 2048,
    optimizer: Literal["adamw", "rmsprop"] = "adamw",
    schedule: Schedule = "cosine",
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
    keep_checkpoints: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Train a causal language model on preference pairs; facts for the manifest.

    beta: how dear it is to leave the reference. warmup: steps, or below 1 a share. dropout: of the adapter with LoRA,
    else of the model.
    """
    plan = Plan.of(locals())
    from trl import DPOConfig, DPOTrainer

    from ..engine import load_tokenizer

    class Trainer(trl_run.Quiet, DPOTrainer):
        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            return dataset  # the table brought them

    known = reference is None and _known(data)
    rows, reasons = _rows(data, known)
    trl_run.some(rows, data, reasons)
    with trl_run.quiet():
        tokenizer, loaded = load_tokenizer(model, template), trl_run.load(plan, "causal")
        trl_run.stops(loaded.model, tokenizer)
        other = None
        # A new adapter can be switched off. One that is trained on cannot, and TRL's copy of it does not survive a resume.
        if not known and (reference or not loaded.adapter):
            other = trl_run.load(replace(plan, model=reference or model), "causal", frozen=True).model
        own = {"beta": beta, "loss_type": [loss], "precompute_ref_log_probs": known}
        own |= {"optim": "rmsprop"} if optimizer == "rmsprop" else {}
        config = trl_run.arguments(plan, DPOConfig, max_length=None, disable_dropout=dropout == 0, **own)
        trainer = Trainer(loaded.model, other, config, train_dataset=rows, processing_class=tokenizer, peft_config=loaded.adapter)
        if long := trl_run.keep_short(trainer, plan, _length):
            reasons[f"longer than {max_length} tokens"] = long
        gap = _gap(loaded.model, trainer.train_dataset) if known else None
        facts = trl_run.run(trainer, plan, loaded, data, reasons, "dpo")
        figures = {"accuracy": trl_run.tail(trainer, "rewards/accuracies"), "margin": trl_run.tail(trainer, "rewards/margins")}
        reference = "the table's columns" if known else reference or model
    return facts | {"reference": reference} | ({"reference_gap": gap} if known else {}) | figures


def _length(row: Row) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _gap(model: Any, rows: Any, looked_at: int = 4) -> float:
    """How far the table's reference is from the model that training starts from: mean difference a token, on some pairs."""
    from ..logprobs import LogProbs
    from ..show import say

    scorer = LogProbs(model.eval(), plain=True)
    apart, tokens = 0.0, 0
    for row in rows.select(range(min(looked_at, len(rows)))):
        for side in ("chosen", "rejected"):
            ids = row[f"{side}_ids"]
            apart += abs(sum(scorer([(row["prompt_ids"], ids)])[0]) - row[f"ref_{side}_logps"])
            tokens += len(ids)
    if apart / tokens > FAR:
        say(f"the table's reference is {apart / tokens:.2g} a token away from the starting model: of another model?")
    return apart / tokens


def _known(data: Table) -> bool:
    """Does every row bring the reference's log-probabilities?"""
    if any(c not in data.schema for c in KNOWN):
        return False
    return data.complete(*KNOWN)


def _rows(data: Table, known: bool) -> tuple[Any, Any]:
    """The pairs as a `datasets` data set, and why others were left out."""
    import datasets

    data.require("prompt", "chosen", "rejected")
    message, number = trl_run.message_type(), datasets.Value("float32")
    types = {"prompt": message, "chosen": message, "rejected": message} | (dict.fromkeys(KNOWN, number) if known else {})

    def read(row: Row) -> Row | str:
        found = trl_run.pair(row)
        return found if isinstance(found, str) or not known else found | {k: row[k] for k in KNOWN}

    return trl_run.gather(data, read, types)
