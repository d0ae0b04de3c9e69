"""Plain transformers as an engine, for machines and models that vLLM does not take, and for a model that is being trained.

It keeps the promises that `engine.py` states. Rows leave a batch when they have ended, and the cache is not copied as it grows.
Left out: beams, and models with a cache of their own kind.
"""

from __future__ import annotations

import gc
import importlib.metadata
from collections.abc import Sequence
from typing import Any

from .alternatives import places
from .engine import (
    Answers,
    Completion,
    Refused,
    admit,
    base_of,
    decode,
    end_ids,
    load_tokenizer,
    one_line,
    prompt_seed,
    settings,
)
from .errors import ModelError, need
from .folders import digest
from .models import quiet
from .tables import Messages


class Transformers:
    """Plain transformers, where vLLM cannot run: batches of `batch_size` rows, shortest prompts first, padded on the left.

    It samples with one random stream per row (see `_Sampler`), so it keeps the same promise as vLLM: the same prompt gives
    the same samples wherever it stands, and the same chunk the same bits.
    """

    def __init__(
        self, model: str, template: str | None = None, dtype: str = "auto", batch_size: int = 32, logprobs: bool = False,
        top_logprobs: int = 0,
    ) -> None:  # fmt: skip
        transformers = need("transformers", "models")
        import torch

        base = base_of(model)
        if base:
            need("peft", "train")  # transformers loads the adapter onto its base through it
        tokenizer = load_tokenizer(model, template)
        try:
            with quiet():
                loaded = transformers.AutoModelForCausalLM.from_pretrained(
                    model, dtype=dtype, use_safetensors=True, trust_remote_code=False
                ).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"transformers cannot load {model}: {one_line(error)}") from None
        loaded.to("cuda" if torch.cuda.is_available() else "cpu")
        self._speak_with(loaded, tokenizer, end_ids(tokenizer, base or model), batch_size, logprobs, top_logprobs)

    @classmethod
    def around(cls, model: Any, tokenizer: Any, ends: list[int], batch_size: int) -> Transformers:
        """An engine for a model in memory, whose weights may change between two calls."""
        engine = cls.__new__(cls)
        engine._speak_with(model, tokenizer, ends, batch_size, logprobs=True)
        return engine

    def _speak_with(
        self, model: Any, tokenizer: Any, ends: list[int], batch_size: int, logprobs: bool, top_logprobs: int = 0
    ) -> None:
        import transformers

        self._model, self._tokenizer, self._ends = model, tokenizer, ends
        self._batch_size, self._logprobs, self._top = batch_size, logprobs, top_logprobs
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # The model's own sampling defaults (top_k, repetition penalty) would be mixed into ours.
        self._config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
        self._window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.name = f"transformers {importlib.metadata.version('transformers')} ({model.device.type})"
        self.facts = {
            "dtype": str(model.dtype).removeprefix("torch."), "max_model_len": self._window,
            "chat_template": digest(tokenizer.chat_template), "batch_size": batch_size,
        }  # fmt: skip

    def generate(
        self, prompts: Sequence[Messages], n: int = 1, temperature: float = 1.0, top_p: float = 1.0,
        max_tokens: int = 1024, seed: int = 0,
    ) -> Answers:  # fmt: skip
        """`n` samples for each prompt, in order."""
        settings(n, temperature, top_p, max_tokens, self._window)
        inputs = admit(self._tokenizer, prompts, max_tokens, self._window)
        answers: Answers = [ids if isinstance(ids, Refused) else [] for ids in inputs]
        rows = [
            (place, ids, prompt_seed(prompts[place], seed) + k)
            for place, ids in enumerate(inputs) if not isinstance(ids, Refused) for k in range(n if temperature else 1)
        ]  # fmt: skip
        rows.sort(key=lambda row: len(row[1]))  # stable: the samples of a prompt stay in order
        for start in range(0, len(rows), self._batch_size):
            batch = rows[start : start + self._batch_size]
            sampler = _Sampler([s for _, _, s in batch], temperature, top_p, max_tokens, self._model.device, self._top)
            made = self._batch([ids for _, ids, _ in batch], sampler, max_tokens)
            for (place, _, _), completion in zip(batch, made, strict=True):
                answer = answers[place]
                assert isinstance(answer, list)
                answer += [completion] * (1 if temperature else n)
        return answers

    def _batch(self, rows: list[list[int]], sampler: _Sampler, max_tokens: int) -> list[Completion]:
        """Whenever a quarter of the rows have ended, the others go on without them: nobody computes padding for long."""
        import torch

        batch = self._tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(self._model.device)
        ids_BT, mask_BT, cache = batch["input_ids"], batch["attention_mask"], _roomy(self._model)
        width, ends = ids_BT.shape[1], torch.tensor(self._ends, device=ids_BT.device)
        new: list[list[int]] = [[] for _ in rows]

        before, self._model.generation_config = self._model.generation_config, self._config
        try:
            while len(ids_BT):
                over_B = torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)

                def enough(ids_BT: Any, _: Any, over_B: Any = over_B) -> Any:
                    over_B |= torch.isin(ids_BT[:, -1], ends)
                    return over_B | (over_B.sum() * 4 >= len(over_B))

                with torch.inference_mode():
                    made = self._model.generate(
                        ids_BT, attention_mask=mask_BT, past_key_values=cache, do_sample=False, logits_processor=[sampler],
                        stopping_criteria=[enough], max_length=width + max_tokens, return_dict_in_generate=True,
                    )  # fmt: skip
                ids_BT = made.sequences
                for row, ids in zip(sampler.rows_B.tolist(), ids_BT[:, width:].tolist(), strict=True):
                    new[row] = ids[: next((t + 1 for t, i in enumerate(ids) if i in self._ends), len(ids))]
                going_B = ~over_B & (ids_BT.shape[1] < width + max_tokens)
                mask_BT = torch.nn.functional.pad(mask_BT, (0, ids_BT.shape[1] - mask_BT.shape[1]), value=1)
                ids_BT, mask_BT, sampler.rows_B = ids_BT[going_B], mask_BT[going_B], sampler.rows_B[going_B]
                if len(ids_BT):
                    cache.reorder_cache(going_B.nonzero()[:, 0])
        finally:
            self._model.generation_config = before
        logp_BT = sampler.logp_BT.tolist() if self._logprobs else None
        return [
            Completion(
                text, ids, "stop" if ids[-1] in self._ends else "length", logp_BT[row][: len(ids)] if logp_BT else None,
                places(self._tokenizer, ids, sampler.top[row]) if self._top else None,
            )
            for row, (ids, text) in enumerate(zip(new, decode(self._tokenizer, new, self._ends), strict=True))
        ]  # fmt: skip

    def close(self) -> None:
        """Free the model."""
        import torch

        self._model = None
        gc.collect()
        torch.cuda.empty_cache()


def _roomy(model: Any) -> Any:
    """A key-value cache that is not copied whole at every step, as transformers' own is."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Layer(DynamicLayer):
        """Keys and values lie in storage with room for a hundred steps."""

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
                self.rooms = [self.keys, self.values]
            used = self.get_seq_length()
            upto = used + key_states.shape[-2]
            for side, (old, new) in enumerate([(self.keys, key_states), (self.values, value_states)]):
                room = self.rooms[side]
                if upto > room.shape[-2] or len(room) != len(new):
                    self.rooms[side] = room = new.new_empty(*new.shape[:2], upto + 100, new.shape[-1])
                    room[..., :used, :] = old
                room[..., used:upto, :] = new
            self.keys, self.values = (room[..., :upto, :] for room in self.rooms)
            return self.keys, self.values

    cache = DynamicCache(config=model.config)
    cache.layers = [Layer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _Sampler:
    """Temperature, top-p and a random stream of its own for every row, as a logits processor.

    transformers draws all rows from one global stream, so that a row's samples would depend on its neighbours. Here each
    step uses one number u of the row's own and picks the token at which the cumulated probabilities pass u. Its logit is
    set to inf, so that greedy decoding takes it.
    """

    def __init__(self, seeds: list[int], temperature: float, top_p: float, steps: int, device: Any, most: int = 0) -> None:
        import torch

        streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.u_BT = torch.stack([torch.rand(steps, dtype=torch.float64, generator=stream) for stream in streams]).to(device)
        self.temperature, self.top_p, self.most = temperature, top_p, most
        self.logp_BT = torch.zeros(len(seeds), steps, device=device)  # of the chosen tokens, before temperature and top-p
        self.top: list[list[list[tuple[int, float]]]] = [[] for _ in seeds]  # a row: the likeliest tokens of every step
        self.rows_B = torch.arange(len(seeds), device=device)  # those that are still in the batch
        self.step = 0

    def __call__(self, ids_BT: Any, logits_BV: Any) -> Any:
        logp_BV = logits_BV.float().log_softmax(-1)
        choice_B1 = self._draw(logp_BV) if self.temperature else logits_BV.argmax(-1, keepdim=True)
        self.logp_BT[self.rows_B, self.step] = logp_BV.gather(1, choice_B1)[:, 0]
        self.step += 1
        if self.most:
            logp_BK, token_BK = logp_BV.topk(min(self.most, logp_BV.shape[1]))
            for row, tokens, logps in zip(self.rows_B.tolist(), token_BK.tolist(), logp_BK.tolist(), strict=True):
                self.top[row].append(list(zip(tokens, logps, strict=True)))
        return logits_BV.scatter_(1, choice_B1, float("inf"))

    def _draw(self, logp_BV: Any) -> Any:
        import torch

        p_BV = logp_BV.exp() if self.temperature == 1 else (logp_BV / self.temperature).softmax(-1)
        if self.top_p < 1:
            sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True)
            outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= self.top_p  # the first token is always inside
            p_BV = p_BV.masked_fill(outside_BV.gather(1, order_BV.argsort(-1)), 0.0)
        # In double precision u times the sum stays below the sum, and a token of probability 0 is never reached.
        upto_BV = p_BV.cumsum(-1, dtype=torch.float64)
        u_B1 = self.u_BT[self.rows_B, self.step, None]
        return torch.searchsorted(upto_BV, u_B1 * upto_BV[:, -1:], right=True)
