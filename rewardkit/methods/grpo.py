"""Group-relative policy optimisation, arXiv:2402.03300: reinforcement learning without a critic. TRL's GRPOTrainer.

    r_i  = reward of the i-th of `group` answers to a prompt, sampled from the policy p
    A_i  = (r_i - mean r) / (std r + 1e-4)            within the group; std is the unbiased one
    kl_t = q - log q - 1,  q = p_ref / p              per token, never negative (k3)
    loss = mean_i mean_t [ - min(w A_i, clip(w, 1 - clip, 1 + clip) A_i) + kl_coef * kl_t ],  w = p / p_sampled

The reward is given by the caller and called with samples as `generate` writes them: a row of the prompt table with
`response`, `token_ids` (the end token among them) and `finish_reason`. An answer whose reward is None does not count.
The reference is the model that training starts from. As a group is compared with itself, offset and scale of the reward do
not matter, so it is not clamped, as PPO implementations do.
Left out: generation by vLLM (transformers generates, inside TRL), tools, several rewards at once (write one function).
`trl_run` says what the settings mean; here a row of a batch is an answer, and max_length is of prompt and answer together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, OptionError
from ..tables import Row, Table, samples
from . import trl_run
from .trl_run import Dtype, Plan, Schedule

Reward = Callable[[Sequence[Row]], Sequence[Any]]  # one result a sample, with a `value`


def grpo(
    model: str,
    data: Table,
    out: Path,
    reward: Reward,
    *,
    group: int = 8,
    kl_coef: float = 0.2,
    clip: float = 0.2,
    temperature: float = 1.0,
    max_tokens: int = 256,
    buffer: int | None = None,
    epochs: float = 1,
    learning_rate: float = 1e-6,
    min_learning_rate: float = 0.0,
    batch_size: int = 128,
    micro_batch_size: int | None = None,
    max_length: int = 2048,
    schedule: Schedule = "constant",
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
    seed: int = 0,
) -> dict[str, Any]:
    """Train a causal language model to give answers that a reward likes; facts for the manifest.

    group: answers a prompt. kl_coef: how dear it is to leave the reference. batch_size: answers an optimiser step.
    buffer: answers sampled at a time, a multiple of batch_size (the default): above it, a round feeds several steps, and
    clip matters. A run that is killed within a round samples the rest of it anew.
    """
    plan = Plan.of(locals())
    _check(plan, group, buffer or batch_size, max_tokens)
    with warnings.catch_warnings(action="ignore"):  # it looks for a vLLM of its taste, which is not used here
        from trl import GRPOConfig, GRPOTrainer
        from trl.trainer.utils import add_fused_lm_head

    from ..engine import load_tokenizer

    class Trainer(trl_run.Quiet, GRPOTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            sampler: Any = super()._get_train_sampler(dataset)
            # The order of a pass depends on its number alone: a resumed run meets the prompts that an unbroken one meets.
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(seed + epoch)
            return sampler

    data.require("prompt")
    with trl_run.quiet():
        tokenizer, loaded = load_tokenizer(model, template), trl_run.load(plan, "causal")
        trl_run.stops(loaded.model, tokenizer)
        window = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or max_length
        sources, rows, reasons = _prompts(data, tokenizer, min(max_length, window) - max_tokens)
        trl_run.some(rows, data, reasons)
        if len(rows) * group < (buffer or batch_size):
            full = f"{len(rows)} prompts of {data.name} give {len(rows) * group} answers"
            raise OptionError(f"{full}, less than the {buffer or batch_size} of one round: lower buffer or batch_size")
        config = trl_run.arguments(
            plan, GRPOConfig, num_generations=group, generation_batch_size=buffer or batch_size, temperature=temperature,
            max_completion_length=max_tokens, epsilon=clip, beta=0.0, loss_type="grpo", disable_dropout=dropout == 0,
        )  # fmt: skip
        # TRL would read the reference from the path in the config, which for a merged adapter is another model, and its
        # copy of an adapter that is trained on does not survive a resume. A new adapter is simply switched off.
        other = None
        if kl_coef and not loaded.adapter:
            other = trl_run.load(plan, "causal", frozen=True).model.eval().requires_grad_(False)
        rate = _rate(reward, sources, tokenizer, model)
        trainer = Trainer(loaded.model, rate, config, rows, processing_class=tokenizer, peft_config=loaded.adapter)
        trainer.beta = kl_coef
        if other:
            add_fused_lm_head(other, temperature=temperature)
            trainer.ref_model = trainer.accelerator.prepare_model(other, evaluation_mode=True)
        facts = trl_run.run(trainer, plan, loaded, data, reasons, "grpo")
    return facts | _figures(trainer) | {"reference": model if kl_coef else None}


def _check(plan: Plan, group: int, buffer: int, max_tokens: int) -> None:
    """The numbers must divide each other."""
    if group < 2:
        raise OptionError(f"group={group}: an answer is compared with others to the same prompt, so it takes at least 2")
    if buffer % plan.batch_size or buffer % group:
        raise OptionError(f"a round of {buffer} answers must divide into batches of {plan.batch_size} and groups of {group}")
    if not 0 < max_tokens < plan.max_length:
        raise OptionError(f"max_tokens={max_tokens} must lie between 0 and max_length={plan.max_length}, prompt included")


def _prompts(data: Table, tokenizer: Any, longest: int) -> tuple[list[Row], Any, Any]:
    """The rows; the usable prompts as a `datasets` data set that points into them; and why others were left out."""
    import datasets

    from ..engine import prompt_ids

    sources: list[Row] = []

    def read(row: Row) -> Row | str:
        prompt = trl_run.conversation(row["prompt"])
        if not prompt:
            return "no prompt"
        try:
            ids = prompt_ids(tokenizer, prompt)
        except DataError as error:
            return str(error)
        if len(ids) > longest:
            return f"a prompt longer than {longest} tokens"
        # The other columns stay in Python: they may hold anything, and TRL gives some names a meaning of its own.
        sources.append(row | {"prompt": prompt})
        return {"prompt": prompt, "row": len(sources) - 1}

    rows, reasons = trl_run.gather(data, read, {"prompt": trl_run.message_type(), "row": datasets.Value("int64")})
    return sources, rows, reasons


def _rate(reward: Reward, sources: list[Row], tokenizer: Any, model: str) -> Callable[..., list[float | None]]:
    """The reward as TRL calls it: completions as token ids in, numbers out."""
    from ..engine import Completion, base_of, decode, end_ids

    ends = end_ids(tokenizer, base_of(model) or model)

    def rate(completion_ids: list[list[int]], row: list[int], log_metric: Any, **others: Any) -> list[float | None]:
        found: list[Row] = []
        for place, ids, text in zip(row, completion_ids, decode(tokenizer, completion_ids, ends), strict=True):
            reason = "stop" if ids and ids[-1] in ends else "length"
            found += samples(sources[place], [Completion(text, ids, reason)], model)
        values = [score.value for score in reward(found)]
        log_metric("unscored", sum(value is None for value in values) / len(values))
        return values

    return rate


def _figures(trainer: Any) -> dict[str, Any]:
    """What the log says of the whole run; it survives a resume."""
    log = [entry for entry in trainer.state.log_history if "reward" in entry]

    def mean(key: str, entries: list[dict[str, Any]]) -> float | None:
        values = [entry[key] for entry in entries if entry.get(key) is not None]
        return sum(values) / len(values) if values else None

    first, last = log[: trl_run.TAIL], log[-trl_run.TAIL :]
    seconds = sum(entry.get("step_time") or 0.0 for entry in log)
    return {
        "reward_first": mean("reward", first), "reward_last": mean("reward", last),
        "length_first": mean("completions/mean_length", first), "length_last": mean("completions/mean_length", last),
        "truncated": mean("completions/clipped_ratio", last), "kl": mean("kl", last),
        "clipped": mean("clip_ratio/region_mean", log), "unscored": mean("unscored", log),
        "tokens_per_second": round(trainer.state.num_input_tokens_seen / seconds, 1) if seconds else None,
    }  # fmt: skip
