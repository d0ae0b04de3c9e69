"""Proximal policy optimisation, arXiv:1707.06347, as Self-Rewarding PPO (arXiv:2510.21090) uses it. Ours, on torch.

One buffer after another, in this order (SRPPO, algorithm 2):

    sample     y ~ p(.|x), one answer a prompt, temperature 1
    score      r(x, y), any reward; clipped, and by how much is logged
    read       log p_old and the critic's values of every token; log p_ref where the reward does not have it
    pay        r_t = -kl_coef (log p_old - log p_ref)_t, plus r(x, y) at the last token (eq. 4) or r_t's own (eq. 8)
    estimate   A_t by GAE (eq. 5), whitened over the buffer; targets R_t, reward to go (eq. 6) or A_t + V_t (OpenRLHF)
    learn      in shuffled batches: the critic on (V - R)^2 (eq. 6), then, after its warm-up, the actor on
               -min(w A, clip(w, 1 - clip, 1 + clip) A), w = p / p_old (eq. 7)

The reference p_ref is the model that training starts from: for SRPPO the SFT model, which is also the numerator of its
reward, and one frozen forward pass serves both. The formulas are in `losses`, sampling and scoring in `rollout`, networks,
LoRA and several processes in `actor_critic`. Left out: adaptive KL, answers of several turns, asynchronous sampling.

algo=reinforce and algo=rloo (arXiv:2402.14740) have no critic: A_t is the reward to go, or the whole reward minus the mean
of the other `group` answers to the prompt. (GRPO is a method of its own.) With algo=ppo, critic_warmup counts buffers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Literal

from .. import show
from ..errors import OptionError
from ..tables import Table
from . import losses, trl_run
from .actor_critic import Learner, add_up, build, processes, window
from .rollout import Buffer, Rollout, check_sampler, prompts, speaks_for
from .saving import Journal, SaveDtype, save
from .trl_run import Dtype, Plan, Schedule

WINDOW = 3  # buffers whose mean the stop rules compare


def ppo(
    model: str,
    data: Table,
    out: Path,
    reward: Any,
    *,
    algo: Literal["ppo", "reinforce", "rloo"] = "ppo",
    reward_at: Literal["end", "token"] = "end",
    reward_clip: float | None = 10.0,
    reward_scale: float = 1.0,
    missing_eos_penalty: float = 0.0,
    kl_coef: float = 0.2,
    kl_estimator: losses.Estimator = "k1",
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    returns: Literal["mc", "lambda"] = "mc",
    whiten: bool = True,
    clip: float = 0.2,
    value_clip: float | None = None,
    entropy_coef: float = 0.0,
    loss_mean: Literal["token", "sequence"] = "token",
    buffer: int = 1024,
    group: int = 1,
    buffer_epochs: int = 1,
    critic_warmup: int = 35,
    critic_learning_rate: float = 9e-6,
    epochs: float = 2,
    max_buffers: int | None = None,
    learning_rate: float = 5e-8,
    min_learning_rate: float = 0.0,
    batch_size: int = 128,
    micro_batch_size: int | None = None,
    max_grad_norm: float = 1.0,
    schedule: Schedule = "constant",
    warmup: float = 0.0,
    weight_decay: float = 0.0,
    max_tokens: int = 1024,
    max_length: int = 2048,
    sampler: str = "transformers",
    stop_length: float | None = 3.0,
    stop_eos: float | None = 0.2,
    lora_rank: int | None = None,
    lora_alpha: int = 32,
    template: str | None = None,
    dtype: Dtype = "auto",
    shard: bool = False,
    checkpoint_activations: bool = False,
    save_buffers: int = 10,
    save_dtype: SaveDtype = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Train a causal language model to give answers that a reward likes; facts for the manifest.

    reward: called with samples, it returns a score each (`rollout.Reward`). `recipes/ppo.yaml` says what each setting means
    and where its default is from.
    """
    plan = Plan.of(locals() | {"max_steps": max_buffers or -1, "save_steps": save_buffers, "dropout": 0.0})
    _check(plan, algo, critic_learning_rate, buffer, group, max_tokens, buffer_epochs)
    check_sampler(sampler)
    import torch

    from ..engine import load_tokenizer
    from ..logprobs import LogProbs

    here = processes()
    tokenizer = load_tokenizer(model, template)
    sources, reasons = prompts(data, tokenizer, min(max_length, window(model)) - max_tokens)
    in_epoch = len(sources) * group // buffer
    total = min(int(epochs * in_epoch), max_buffers or 1 << 60)
    critic_warmup = critic_warmup if algo == "ppo" else 0
    _enough(total, in_epoch, len(sources), data.name, buffer, critic_warmup, max_buffers)
    steps = buffer // batch_size * buffer_epochs
    rates = {"actor": _rate(plan, learning_rate, (total - critic_warmup) * steps)}
    if algo == "ppo":
        rates["critic"] = _rate(plan, critic_learning_rate, total * steps)
    backbone = reward.reward.backbone(model) if lora_rank and speaks_for(reward, model) else None
    with trl_run.quiet():
        roles = build(plan, rates, backbone, shard, max_grad_norm)
        trl_run.stops(roles.model, tokenizer)
        reference = None
        if not speaks_for(reward, model) and kl_coef:
            reference = LogProbs(roles.reference or model, adapter=roles.reference_adapter) if lora_rank else LogProbs(model)
    actor, critic = roles.actor, roles.critic
    journal = Journal(out, actor, critic, save_buffers)
    done = journal.resume()
    rollout = Rollout(model, reward, sampler, tokenizer, actor, critic, reference, group, max_tokens, seed)
    learn = partial(
        _learn, actor, critic, batch_size=batch_size, passes=buffer_epochs, clip=clip, value_clip=value_clip,
        entropy_coef=entropy_coef, loss_mean=loss_mean, seed=seed,
    )  # fmt: skip
    stopped = _stop(journal.entries, stop_length, stop_eos)
    with show.progress(algo, total, "buffers", done=done) as advance:
        for number in range(done, 0 if stopped else total):
            started = monotonic()
            chosen = _prompts(sources, number, in_epoch, buffer // group, seed)
            b, seconds = rollout.fill(chosen, number, reward_at == "token")

            # Pay: what every token of the buffer earns.
            scored_N = ~b.score_N.isnan()
            if not scored_N.any():
                raise OptionError(f"no answer of buffer {number + 1} has a score: {', '.join(b.why)}")
            mask_NT = b.mask_NT & scored_N[:, None]
            score_N = b.score_N.nan_to_num() * reward_scale - missing_eos_penalty * ~b.ended_N
            clipped = losses.clip_scores(score_N[scored_N], reward_clip)[1]
            score_N = losses.clip_scores(score_N, reward_clip)[0]
            if clipped > 0.5 and number == done:
                show.say(f"{algo}: reward_clip={reward_clip:g} cuts {clipped:.0%} of the rewards, which then differ in sign "
                         "only; raise it, set it to null, or lower reward_scale")  # fmt: skip
            kl_NT = torch.zeros_like(b.logp_NT)
            if b.reference_NT is not None:
                kl_NT = losses.kl(b.logp_NT, b.reference_NT, kl_estimator)
            rewards_NT = losses.shape_rewards(score_N, kl_NT, mask_NT, kl_coef, b.reward_NT)

            # Estimate: advantages and targets.
            targets_NT = losses.monte_carlo(rewards_NT, mask_NT, gamma)
            if algo == "ppo":
                advantages_NT = losses.gae(rewards_NT, b.values_NT, mask_NT, gamma, gae_lambda)
                targets_NT = targets_NT if returns == "mc" else advantages_NT + b.values_NT
            elif algo == "rloo":
                advantages_NT = losses.leave_one_out(_filled(rewards_NT.sum(1), scored_N, group)).view(-1, 1) * mask_NT
            else:
                advantages_NT = targets_NT
            if whiten:
                advantages_NT = losses.whiten(advantages_NT, mask_NT)

            # Learn: shuffled batches, the critic first. Then log, make a checkpoint, and see whether to stop.
            seconds["estimate"] = monotonic() - started - sum(seconds.values())
            learnt = learn(b, mask_NT, advantages_NT, targets_NT, number, act=number >= critic_warmup)
            entry: dict[str, Any] = {"step": actor.steps, "buffer": number + 1, "epoch": round((number + 1) / in_epoch, 4)}
            entry |= _figures(b, score_N[scored_N], clipped, kl_NT, targets_NT, mask_NT) | learnt
            journal.add(entry | _times(seconds, monotonic() - started, buffer))
            advance(1)
            if stopped := _stop(journal.entries, stop_length, stop_eos):
                show.say(f"{algo}: stops after {number + 1} of {total} buffers: {stopped}")
                break
    rollout.close()
    saved = save(plan, roles, tokenizer, journal, save_dtype)
    return journal.facts() | saved | {
        "rows": {"in": len(sources) + reasons.total(), "used": len(sources), "dropped": reasons.total()},
        "reasons": dict(reasons), "base_model": model, "reference": model, "stopped": stopped or None,
        "lora": {"rank": lora_rank, "alpha": lora_alpha} if lora_rank else None, "one_backbone": backbone is not None,
        "sampler": rollout.engine.name, "device": str(actor.device), "processes": here.num_processes,
    }  # fmt: skip


def _learn(
    actor: Learner, critic: Learner | None, b: Buffer, mask_NT: Any, advantages_NT: Any, targets_NT: Any, number: int, *,
    act: bool, batch_size: int, passes: int, clip: float, value_clip: float | None, entropy_coef: float,
    loss_mean: Literal["token", "sequence"], seed: int,
) -> dict[str, float | None]:  # fmt: skip
    """Passes over a buffer in shuffled batches, every process with its share of each; means of the figures to log."""
    import torch

    here, sums = processes(), Sums()
    shuffle = torch.Generator().manual_seed(seed * 1_000_003 + number)
    batches = [batch for _ in range(passes) for batch in torch.randperm(len(b.rows), generator=shuffle).split(batch_size)]
    for batch in batches:
        mine_B = batch[here.process_index :: here.num_processes]
        rows = [b.rows[i] for i in mine_B.tolist()]
        weight_NT = torch.zeros_like(b.logp_NT)
        weight_NT[batch] = losses.weights(mask_NT[batch], loss_mean)

        def flat(x_NT: Any, chunk: list[int], mine_B: Any = mine_B) -> Any:
            """The numbers at a micro-batch's response tokens, (K,), as `Learner.read` orders them."""
            places = mine_B[chunk]
            return x_NT[places][b.mask_NT[places]].to(actor.device)

        def critic_loss(value_K: Any, _: Any, chunk: list[int], flat: Any = flat, weight_NT: Any = weight_NT) -> Any:
            loss_K = losses.value_loss(value_K, flat(targets_NT, chunk), flat(b.values_NT, chunk), value_clip)
            return sums.add("value_loss", loss_K, flat(weight_NT, chunk))

        def actor_loss(logp_K: Any, entropy_K: Any, chunk: list[int], flat: Any = flat, weight_NT: Any = weight_NT) -> Any:
            old_K, weight_K = flat(b.logp_NT, chunk), flat(weight_NT, chunk)
            loss_K, clipped_K = losses.policy_loss(logp_K, old_K, flat(advantages_NT, chunk), clip)
            sums.add("clipped", clipped_K, weight_K)
            sums.add("step_kl", losses.kl(old_K, logp_K.detach(), "k3"), weight_K)
            loss = sums.add("policy_loss", loss_K, weight_K)
            return loss - entropy_coef * (entropy_K * weight_K).sum() if entropy_coef else loss

        if critic:
            sums.norms["critic_grad"] += critic.update(rows, critic_loss)
        if act:
            sums.norms["actor_grad"] += actor.update(rows, actor_loss, entropy=bool(entropy_coef))
    return sums.means(len(batches))


class Sums:
    """Weighted sums over the tokens of a buffer, of this process; `means` adds the other processes'."""

    names = ("value_loss", "policy_loss", "clipped", "step_kl")

    def __init__(self) -> None:
        self.totals: dict[str, Any] = {}
        self.norms = {"critic_grad": 0.0, "actor_grad": 0.0}

    def add(self, name: str, x_K: Any, weight_K: Any) -> Any:
        """sum_k weight_k x_k, which is also what is returned."""
        total = (x_K * weight_K).sum()
        self.totals[name] = self.totals.get(name, 0.0) + total.detach()
        return total

    def means(self, steps: int) -> dict[str, float | None]:
        """A step's mean; None for what was not learnt in this buffer. Norms are the same in every process."""
        add_up(list(self.totals.values()))
        found = {name: (self.totals[name] / steps).item() if name in self.totals else None for name in self.names}
        return found | {name: norm / steps or None for name, norm in self.norms.items()}


def _figures(b: Buffer, score_N: Any, clipped: float, kl_NT: Any, targets_NT: Any, mask_NT: Any) -> dict[str, float | None]:
    """What a buffer was like. Rewards as the reward gave them; KL in nats an answer; lengths in tokens."""
    lengths_N = b.mask_NT.sum(1).float()
    raw_N = b.score_N[~b.score_N.isnan()]
    known = b.reference_NT is not None
    return {
        "reward": raw_N.mean().item(), "reward_sd": raw_N.std(correction=0).item(),
        "reward_paid": score_N.mean().item(), "reward_clipped": clipped,
        "unscored": b.score_N.isnan().float().mean().item(),
        "kl": (kl_NT * mask_NT).sum(1).mean().item() if known else None,
        "length": lengths_N.mean().item(), "length_max": lengths_N.max().item(), "eos_rate": b.ended_N.float().mean().item(),
        # E[-log p] is the entropy, and these are draws from p.
        "entropy": losses.average(-b.logp_NT, b.mask_NT).item(), "sampler_gap": b.gap,
        "value": losses.average(b.values_NT, mask_NT).item() if b.values_NT is not None else None,
        "explained_variance": losses.explained_variance(b.values_NT, targets_NT, mask_NT) if b.values_NT is not None else None,
    }  # fmt: skip


def _times(seconds: dict[str, float], whole: float, answers: int) -> dict[str, float]:
    """Where the time went; `learn` is what the other parts leave."""
    parts = seconds | {"learn": whole - sum(seconds.values())}
    return {f"seconds_{name}": round(value, 4) for name, value in parts.items()} | {
        "samples_per_second": round(answers / whole, 3)
    }


def _stop(entries: list[dict[str, Any]], length: float | None, eos: float | None) -> str:
    """Why to stop, or "": the last buffers against the first ones."""
    if len(entries) < 2 * WINDOW:
        return ""

    def mean(key: str, part: list[dict[str, Any]]) -> float:
        return sum(entry[key] for entry in part) / WINDOW

    first, last = ({key: mean(key, part) for key in ("length", "eos_rate")} for part in (entries[:WINDOW], entries[-WINDOW:]))
    if length and last["length"] > length * first["length"]:
        return f"answers grew from {first['length']:.1f} to {last['length']:.1f} tokens (stop_length={length:g})"
    if eos and last["eos_rate"] < eos * first["eos_rate"]:
        return f"answers with an end fell from {first['eos_rate']:.1%} to {last['eos_rate']:.1%} (stop_eos={eos:g})"
    return ""


def _prompts(sources: list[Any], number: int, in_epoch: int, size: int, seed: int) -> list[Any]:
    """The prompts of buffer `number`: every epoch is a new order, and what does not fill a buffer is left for the next."""
    import torch

    epoch, place = divmod(number, in_epoch)
    order = torch.randperm(len(sources), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    return [sources[i] for i in order[place * size : (place + 1) * size]]


def _filled(total_N: Any, scored_N: Any, group: int) -> Any:
    """Returns by prompt, (G, group); an answer without a score is given the mean of the others, so that it moves nothing."""
    total_GK, scored_GK = total_N.view(-1, group), scored_N.view(-1, group)
    mean_G1 = (total_GK * scored_GK).sum(1, keepdim=True) / scored_GK.sum(1, keepdim=True).clamp(min=1)
    return total_GK.where(scored_GK, mean_G1)


def _rate(plan: Plan, highest: float, total: int) -> tuple[float, Callable[[int], float]]:
    """The learning rate of step n of `total`: warm-up, then constant or falling to the same share for actor and critic."""
    rising = plan.warmup if plan.warmup >= 1 else plan.warmup * total
    least = plan.min_learning_rate / plan.learning_rate

    def rate(step: int) -> float:
        if step < rising:
            return highest * (step + 1) / rising
        gone = (step - rising) / max(1, total - rising)
        left = {"constant": 1.0, "linear": 1 - gone, "cosine": (1 + math.cos(math.pi * gone)) / 2}[plan.schedule]
        return highest * (least + (1 - least) * left)

    return highest, rate


def _check(plan: Plan, algo: str, critic_rate: float, buffer: int, group: int, max_tokens: int, passes: int) -> None:
    """The numbers must divide each other, and what the algorithm needs must be there."""
    if plan.learning_rate <= 0 or critic_rate <= 0:
        raise OptionError(f"learning_rate={plan.learning_rate:g} and critic_learning_rate={critic_rate:g} must be above 0")
    if algo == "rloo" and group < 2:
        raise OptionError(f"algo=rloo compares answers to one prompt: group={group} must be at least 2")
    plan.micro()
    shares = group * int(os.environ.get("WORLD_SIZE", "1"))
    if buffer % plan.batch_size or buffer % shares:
        parts = f"batches of {plan.batch_size} and {shares} shares (answers a prompt x processes)"
        raise OptionError(f"buffer={buffer} must divide into {parts}")
    if not 0 < max_tokens < plan.max_length:
        raise OptionError(f"max_tokens={max_tokens} must lie between 0 and max_length={plan.max_length}, prompt included")
    if plan.min_learning_rate >= plan.learning_rate and plan.schedule != "constant":
        raise OptionError(f"min_learning_rate={plan.min_learning_rate:g} is not below learning_rate={plan.learning_rate:g}")
    if passes < 1 or plan.save_steps < 1:
        raise OptionError(f"buffer_epochs={passes} and save_buffers={plan.save_steps} must be at least 1")


def _enough(total: int, in_epoch: int, count: int, name: str, buffer: int, warmup: int, most: int | None) -> None:
    """Refuse a run that would end before it begins, or before the actor moves."""
    if not in_epoch:
        raise OptionError(f"{count} prompts of {name} do not fill a buffer of {buffer} answers: lower buffer")
    if total <= warmup:
        buffers = f"the run has {total} buffers ({in_epoch} an epoch)" if most is None else f"max_buffers={most}"
        raise OptionError(f"{buffers} and critic_warmup={warmup} of them train the critic only: the actor would never move")
