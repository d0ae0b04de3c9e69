"""From prompts to a buffer: answers of the current policy, what the reward says of them, and what each network does.

A buffer is filled by all processes, each with its share of the prompts, and then known whole to every one of them. Nothing
here depends on how many there are: an answer depends on the weights and on (seed, buffer, prompt) only.

The reward is called with samples as `generate` writes them and returns one Score each. Of a coherent reward whose policy is
the model that training starts from, the log-probabilities under that model are taken as the reference's: one frozen forward
pass serves the KL penalty and the reward's numerator.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .. import spec as specs
from ..errors import DataError, OptionError
from ..models import same_model, split, wearing
from ..packing import Ids
from ..tables import Row, Table, samples
from . import trl_run
from .actor_critic import Learner, gathered, processes
from .losses import average

Reward = Callable[[Sequence[Row]], Sequence[Any]]  # one result a sample: `value`, `why`, and maybe `tokens`


def prompts(data: Table, tokenizer: Any, longest: int) -> tuple[list[Row], Counter[str]]:
    """The usable rows, each with its `prompt_ids`; and why others were left out."""
    from ..engine import prompt_ids

    data.require("prompt")
    found: list[Row] = []
    reasons: Counter[str] = Counter()
    for batch in data.batches(10_000):
        for row in batch:
            prompt = trl_run.conversation(row["prompt"])
            if not prompt:
                reasons["no prompt"] += 1
                continue
            try:
                ids = prompt_ids(tokenizer, prompt)
            except DataError as error:
                reasons[str(error)] += 1
                continue
            if len(ids) > longest:
                reasons[f"a prompt longer than {longest} tokens"] += 1
            else:
                found.append(row | {"prompt": prompt, "prompt_ids": ids})
    trl_run.some(found, data, reasons)
    return found, reasons


@dataclass
class Buffer:
    """N answers and what is known of them; _NT: by token, `mask_NT` where there is one, 0 elsewhere."""

    rows: list[tuple[Ids, Ids]]  # prompt, answer
    score_N: Any  # nan where there is none
    ended_N: Any  # the answer has its end token
    mask_NT: Any
    logp_NT: Any  # of the policy that sampled
    gap: float  # between the sampler's log-probabilities and the trainer's: mean difference a token
    values_NT: Any | None
    reference_NT: Any | None
    reward_NT: Any | None  # token by token, where the reward has it
    why: Counter[str]  # of answers without a score


class Rollout:
    """Fills buffers."""

    def __init__(
        self, model: str, reward: Reward, sampler: str, tokenizer: Any, actor: Learner, critic: Learner | None,
        reference: Any, group: int, max_tokens: int, seed: int,
    ) -> None:  # fmt: skip
        """reference: a LogProbs, called where the reward does not speak for the reference already; or None."""
        from ..engine import base_of, end_ids

        self.model, self.reward, self.tokenizer = model, reward, tokenizer
        self.actor, self.critic, self.reference = actor, critic, reference
        self.group, self.max_tokens, self.seed = group, max_tokens, seed
        self.ends = end_ids(tokenizer, base_of(model) or model)
        self.engine = _engine(sampler, model, tokenizer, self.ends, actor)
        self.at = -1  # the actor's step whose weights the sampler has

    def fill(self, sources: list[Row], number: int, token_rewards: bool) -> tuple[Buffer, dict[str, float]]:
        """Buffer `number` from these prompts, and the seconds that its parts took."""
        from time import monotonic

        from accelerate.utils import gather_object

        here = processes()
        mine = list(range(here.process_index, len(sources), here.num_processes))
        started = monotonic()
        answered = self._sample([sources[i] for i in mine], number)
        sampled = monotonic()
        answers = [answer for several in answered for answer in several]
        scores = list(self.reward(answers))
        rows = [(sources[i]["prompt_ids"], a["token_ids"]) for i, several in zip(mine, answered, strict=True) for a in several]
        known = [self._known(score, len(ids), token_rewards) for score, (_, ids) in zip(scores, rows, strict=True)]
        if self.reference and any(k["reference"] is None for k in known):
            for one, logps in zip(known, self.reference(rows), strict=True):
                one["reference"] = logps
        scored = monotonic()
        # In fp32 the sampler that speaks with the actor's own weights has said log p_old already; a micro-batch is checked.
        known_already = self.owns_weights and self.actor.exact
        checked = self.actor.all(rows[: self.actor.micro] if known_already else rows)
        trainer = [*checked, *[None] * (len(rows) - len(checked))]
        values = self.critic.all(rows) if self.critic else [None] * len(rows)
        parts = zip(rows, answers, known, trainer, values, strict=True)
        items = [
            (mine[k // self.group] * self.group + k % self.group, row, a["logprobs"], a["token_ids"][-1] in self.ends, *rest)
            for k, (row, a, *rest) in enumerate(parts)
        ]
        seconds = {"sample": sampled - started, "score": scored - sampled, "read": monotonic() - scored}
        whole = sorted(gather_object(items), key=lambda item: item[0]) if here.num_processes > 1 else items
        return _buffer(whole, known_already), seconds

    def _sample(self, sources: list[Row], number: int) -> list[list[Row]]:
        """For each prompt, its answers as sample rows."""
        if not self.owns_weights and self.at != self.actor.steps:
            self.engine.reload(_weights(self.actor))
        self.at = self.actor.steps
        with self._speaking():
            answers = self.engine.generate(
                [row["prompt"] for row in sources], n=self.group, max_tokens=self.max_tokens, seed=self.seed * 1_000_003 + number
            )
        found = []
        for row, several in zip(sources, answers, strict=True):
            assert isinstance(several, list), several  # the prompts were checked
            found.append(samples({k: v for k, v in row.items() if k != "prompt_ids"}, several, self.model))
        return found

    @property
    def owns_weights(self) -> bool:
        """Does the sampler speak with the actor's own weights? If not, they have to be sent to it."""
        return not hasattr(self.engine, "reload")

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        import torch

        if not self.owns_weights:
            yield
            return
        network, adapter = self.actor.network, self.actor.adapter
        if network.model.config._attn_implementation != network.attention:
            network.model.set_attn_implementation(network.attention)
        autocast = torch.autocast(network.model.device.type, self.actor.amp, enabled=self.actor.amp is not None)
        with gathered(network), wearing(network.model, adapter) if adapter else contextlib.nullcontext(), autocast:
            yield

    def _known(self, score: Any, length: int, token_rewards: bool) -> dict[str, Any]:
        """Score, reference and rewards by token, as far as the reward gives them."""
        tokens = getattr(score, "tokens", None) or {}
        if token_rewards and score.value is not None and "reward" not in tokens:
            raise OptionError("reward_at=token needs a reward that gives one number a token, such as coherent")
        paid = list(tokens["reward"]) if token_rewards and score.value is not None else None
        if paid:  # with missing_eos=append the end token that was added has a reward of its own
            paid = [*paid[: length - 1], sum(paid[length - 1 :])]
        spoken_for = speaks_for(self.reward, self.model) and score.value is not None
        reference = list(tokens["policy"])[:length] if spoken_for else None
        return {"score": score.value, "why": score.why, "reference": reference, "reward": paid}

    def close(self) -> None:
        if not self.owns_weights:
            self.engine.close()


def speaks_for(reward: Any, model: str) -> bool:
    """Are the log-probabilities that a reward gives as "policy" those of this model?"""
    models = getattr(getattr(reward, "reward", None), "models", None) or {}
    return set(models) == {"policy", "base"} and same_model(models["policy"], model)


def check_sampler(sampler: str) -> specs.Spec:
    """The engine that is to sample, and its options; refused before anything is loaded."""
    from .. import engine as engines

    wanted = specs.parse(sampler)
    if wanted.name not in ("transformers", "vllm"):
        raise OptionError(f"sampler={wanted.name}: PPO samples with transformers or vllm")
    engines.check(wanted)
    if wanted.name == "transformers" and set(wanted.options) - {"batch_size"}:
        raise OptionError(f"sampler={sampler}: transformers samples with the actor itself and takes batch_size only")
    return wanted


def _engine(sampler: str, model: str, tokenizer: Any, ends: list[int], actor: Learner) -> Any:
    """transformers speaks with the actor itself; vLLM has weights of its own, which are replaced between buffers."""
    from .. import engine as engines
    from ..local import Transformers

    wanted = check_sampler(sampler)
    if wanted.name == "transformers":
        return Transformers.around(actor.network.model, tokenizer, ends, int(wanted.options.get("batch_size", 64)))
    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template:
        template.write(tokenizer.chat_template)
        template.flush()
        options = {"template": template.name, **wanted.options, "logprobs": True}
        return engines.load(specs.Spec("vllm", options), split(model)[0])


def _weights(actor: Learner) -> Iterable[tuple[str, Any]]:
    """The actor's weights as its checkpoint names them, an adapter merged into what it sits on."""
    import torch
    from peft.tuners.lora import LoraLayer

    from .actor_critic import whole

    model = actor.network.model
    merged = {}
    if actor.adapter:
        layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
        with torch.no_grad():
            merged = {f"{n}.weight": m.weight + m.get_delta_weight(actor.adapter).to(m.weight.dtype) for n, m in layers.items()}
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            plain = name.replace(".base_layer.", ".")
            yield plain, merged.get(plain, whole(tensor))


def _buffer(items: list[Any], known_already: bool) -> Buffer:
    """Lists of numbers, put side by side. known_already: log p_old is the sampler's."""
    import torch

    rows, sampler, ended, known, trainer, values = (list(column) for column in zip(*(item[1:] for item in items), strict=True))
    lengths = torch.tensor([len(response) for _, response in rows])
    mask_NT = torch.arange(int(lengths.max()))[None] < lengths[:, None]

    def tensor(lists: Sequence[Sequence[float] | None]) -> Any:
        """(N, T), or None where no row has numbers."""
        if all(numbers is None for numbers in lists):
            return None
        made = torch.zeros(mask_NT.shape)
        for place, numbers in enumerate(lists):
            if numbers is not None:
                made[place, : len(numbers)] = torch.tensor(numbers)
        return made

    sampler_NT, trainer_NT = tensor(sampler), tensor(trainer)
    checked = torch.tensor([numbers is not None for numbers in trainer])
    gap = average((sampler_NT - trainer_NT).abs()[checked], mask_NT[checked]).item()
    scores = [float("nan") if k["score"] is None else k["score"] for k in known]
    return Buffer(
        rows, torch.tensor(scores), torch.tensor(ended), mask_NT, sampler_NT if known_already else trainer_NT, gap,
        tensor(values), tensor([k["reference"] for k in known]), tensor([k["reward"] for k in known]),
        Counter(k["why"] for k in known if k["score"] is None),
    )  # fmt: skip
