"""The coherent reward: log p_policy(y|x) - log p_base(y|x), summed over the response tokens, EOS included.

Self-Rewarding PPO (arXiv:2510.21090, eq. 3); policy is the SFT model, base the pretrained one. Both models score
the same token ids, so they must share tokenizer and chat template: this is checked first and refused otherwise.
`score` is the sum (the paper's reward, which grows with length), `score_mean` the sum per token, which filters use.

A row's `token_ids` win over its text. A text is complete unless `finish_reason` is "length", and a complete text
ends with the end-of-turn token. For a truncated response `missing_eos` says what happens: keep (score it as it
stands), append (add the token, as OpenRLHF does) or drop (leave it unscored).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from ..errors import DataError, ModelError
from ..tables import Row, messages, text
from . import Score


class Coherent:
    """Scores samples by how much more likely the policy finds them than the base does."""

    def __init__(
        self,
        policy: str,
        base: str,
        missing_eos: Literal["keep", "append", "drop"] = "keep",
        template: str | None = None,
        tokens: bool = False,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        batch_tokens: int = 8_192,
    ) -> None:
        """policy, base: model folders or Hub ids. template: a chat template where the models have none.
        tokens: also keep the reward of every token. batch_tokens: tokens a forward pass, padding included.
        """
        self.models = {"policy": policy, "base": base}
        self.missing_eos, self.template, self.tokens = missing_eos, template, tokens
        self.dtype, self.batch_tokens = dtype, batch_tokens
        self._scorers: tuple[Any, Any] | None = None

    def load(self) -> None:
        """Compare the tokenizers, then load both models."""
        if self._scorers:
            return
        from ..engine import load_tokenizer
        from ..logprobs import LogProbs

        policy, base = self.models["policy"], self.models["base"]
        self.tokenizer = load_tokenizer(policy, self.template)
        same_tokenizer(self.tokenizer, policy, base)
        self.ends = ends_of(self.tokenizer, policy)
        self._scorers = LogProbs(policy, self.dtype, self.batch_tokens), LogProbs(base, self.dtype, self.batch_tokens)
        self.longest = min(s.longest for s in self._scorers)

    def __call__(self, samples: Sequence[Row]) -> list[Score]:
        """One Score a sample; extra: score_mean, n_tokens, logp_policy, logp_base, has_eos, truncated."""
        self.load()
        assert self._scorers
        encoded = [self._encode(s) for s in samples]
        rows = [e for e in encoded if not isinstance(e, str)]
        found = iter(zip(*(scorer([(p, r) for p, r, _ in rows]) for scorer in self._scorers), strict=True))
        return [
            Score(None, e, self._extra(None, None, None, None)) if isinstance(e, str) else self._score(e[1], e[2], *next(found))
            for e in encoded
        ]

    def _encode(self, sample: Row) -> tuple[list[int], list[int], bool] | str:
        """(prompt ids, response ids, truncated), or why this sample cannot be scored."""
        from ..engine import prompt_ids

        ids = sample.get("token_ids")
        truncated = sample.get("finish_reason") == "length"
        if ids is None:
            ids = self.tokenizer(text(sample["response"]), add_special_tokens=False, verbose=False)["input_ids"]
            ids = ids if truncated else [*ids, self.ends[0]]
        else:
            # A sampler may report "stop" for a stop string, which leaves no end token behind.
            ids, truncated = list(ids), not ids or ids[-1] not in self.ends
        if truncated and self.missing_eos == "drop":
            return "the response has no end token (missing_eos=drop)"
        if truncated and self.missing_eos == "append":
            ids = [*ids, self.ends[0]]
        if not ids:
            return "the response is empty"
        try:
            prompt = prompt_ids(self.tokenizer, messages(sample["prompt"]))
        except DataError as error:
            return str(error)
        if len(prompt) + len(ids) > self.longest:
            return f"prompt and response have {len(prompt) + len(ids)} tokens; the models take {self.longest}"
        return prompt, ids, truncated

    def _score(self, ids: list[int], truncated: bool, policy: list[float], base: list[float]) -> Score:
        rewards = [p - b for p, b in zip(policy, base, strict=True)]
        total = sum(rewards)
        return Score(total, "", self._extra(rewards, sum(policy), sum(base), (ids[-1] in self.ends, truncated)))

    def _extra(
        self, rewards: list[float] | None, policy: float | None, base: float | None, ends: tuple[bool, bool] | None
    ) -> Row:
        """The extra columns; all there, empty, for an unscored row, so that every shard has the same ones."""
        extra: Row = {
            "score_mean": sum(rewards) / len(rewards) if rewards else None,
            "n_tokens": len(rewards) if rewards else None,
            "logp_policy": policy, "logp_base": base,
            "has_eos": ends[0] if ends else None, "truncated": ends[1] if ends else None,
        }  # fmt: skip
        return extra | ({"token_rewards": rewards} if self.tokens else {})


def same_tokenizer(tokenizer: Any, policy: str, base: str) -> None:
    """Refuse two models that do not see the same token ids in the same text."""
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    what = {
        "vocabulary": (tokenizer.get_vocab(), other.get_vocab()),
        "BOS token": (tokenizer.bos_token_id, other.bos_token_id),
        "EOS token": (tokenizer.eos_token_id, other.eos_token_id),
        "tokenization": tuple(t("Mixed CASE 12 345,\n\tand  spaces.")["input_ids"] for t in (tokenizer, other)),
    }
    if other.chat_template:
        what["chat template"] = (tokenizer.chat_template, other.chat_template)
    for name, (mine, theirs) in what.items():
        if mine != theirs:
            raise ModelError(
                f"policy {policy} and base {base} differ in their {name}: a coherent reward needs the same token ids"
            )


def ends_of(tokenizer: Any, model: str) -> list[int]:
    """The tokens that end a response: first the one the chat template writes after an assistant turn, then the others."""
    from ..engine import base_of, end_ids

    ends = end_ids(tokenizer, base_of(model) or model)
    if not ends:
        raise ModelError(f"{model} has no EOS token, so the end of a response cannot be scored")
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = tokenizer.apply_chat_template(turn, tokenize=True, return_dict=False)
    written = [i for i in reversed(rendered) if i in ends]
    return list(dict.fromkeys([*written[:1], *ends]))
