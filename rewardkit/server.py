"""The engines that are not vLLM in this process: plain transformers, and a model behind an address.

`Transformers` is for machines and models that vLLM does not take; `Server` speaks the OpenAI chat protocol, which vLLM,
llama.cpp, the large providers and most gateways understand. Both keep the promises that `engine.py` states, as far as they
can: a server has its own chat template, and whether its seeds mean anything is its own affair.

Left out: log-probabilities of a server's own tokens, and starting or stopping a server.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import itertools
import json
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .alternatives import Place, places
from .engine import (
    Answers,
    Completion,
    Refused,
    admit,
    base_of,
    decode,
    empty,
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

AGAIN = {408, 409, 429, *range(500, 600)}  # answers after which the same request may succeed
DOOR = (401, 403)


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
            sampler = _Sampler([s for _, _, s in batch], temperature, top_p, max_tokens, self._top)
            made = self._batch([ids for _, ids, _ in batch], sampler, max_tokens)
            for (place, _, _), completion in zip(batch, made, strict=True):
                answer = answers[place]
                assert isinstance(answer, list)
                answer += [completion] * (1 if temperature else n)
        return answers

    def _batch(self, rows: list[list[int]], sampler: _Sampler, max_tokens: int) -> list[Completion]:
        import torch

        batch = self._tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(self._model.device)
        before, self._model.generation_config = self._model.generation_config, self._config
        try:
            with torch.inference_mode():
                ids_BT = self._model.generate(**batch, max_new_tokens=max_tokens, do_sample=False, logits_processor=[sampler])
        finally:
            self._model.generation_config = before
        new_BT = ids_BT[:, batch["input_ids"].shape[1] :].tolist()
        logp_BT = torch.stack(sampler.logp, dim=1).tolist() if self._logprobs else None
        top_BT = list(zip(*sampler.top, strict=True))  # a row: one list of (token, log p) a step
        kept = [ids[: next((t + 1 for t, i in enumerate(ids) if i in self._ends), len(ids))] for ids in new_BT]
        return [
            Completion(
                text, ids, "stop" if ids[-1] in self._ends else "length", logp_BT[row][: len(ids)] if logp_BT else None,
                places(self._tokenizer, ids, top_BT[row]) if top_BT else None,
            )
            for row, (ids, text) in enumerate(zip(kept, decode(self._tokenizer, kept, self._ends), strict=True))
        ]  # fmt: skip

    def close(self) -> None:
        """Free the model."""
        import torch

        self._model = None
        gc.collect()
        torch.cuda.empty_cache()


class _Sampler:
    """Temperature, top-p and a random stream of its own for every row, as a logits processor.

    transformers draws all rows from one global stream, so that a row's samples would depend on its neighbours. Here each
    step uses one number u of the row's own and picks the token at which the cumulated probabilities pass u. Its logit is
    set to inf, so that greedy decoding takes it.
    """

    def __init__(self, seeds: list[int], temperature: float, top_p: float, steps: int, most: int = 0) -> None:
        import torch

        streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.u_BT = torch.stack([torch.rand(steps, dtype=torch.float64, generator=stream) for stream in streams])
        self.temperature, self.top_p, self.most = temperature, top_p, most
        self.logp: list[Any] = []  # of the chosen tokens, one (B,) a step, before temperature and top-p
        self.top: list[list[list[tuple[int, float]]]] = []  # the likeliest tokens: a list a step of a list a row

    def __call__(self, ids_BT: Any, logits_BV: Any) -> Any:
        logp_BV = logits_BV.float().log_softmax(-1)
        choice_B1 = self._draw(logp_BV) if self.temperature else logits_BV.argmax(-1, keepdim=True)
        self.logp.append(logp_BV.gather(1, choice_B1)[:, 0])
        if self.most:
            logp_BK, token_BK = logp_BV.topk(min(self.most, logp_BV.shape[1]))
            self.top.append([list(zip(*row, strict=True)) for row in zip(token_BK.tolist(), logp_BK.tolist(), strict=True)])
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
        u_B1 = self.u_BT[:, len(self.logp), None].to(upto_BV.device)
        return torch.searchsorted(upto_BV, u_B1 * upto_BV[:, -1:], right=True)


class Server:
    """A model behind an OpenAI-compatible address: http://host:port/v1#model (without #model: the only one it serves).

    concurrency: requests under way at once. timeout: seconds a request may take. retries: of a request that was refused for
    load (429), failed (5xx) or timed out, with growing pauses. key_env: the variable that holds the key, if one is needed.
    top_logprobs: also ask for this many of the likeliest tokens at each place (`Completion.top`; servers allow 20).
    Token ids are asked for and kept where the server gives them (vLLM does). A vLLM 0.32 server on a CPU must be started
    with --no-enable-chunked-prefill: it dies of a seeded request whose prompt it splits.
    """

    def __init__(
        self, model: str, concurrency: int = 32, timeout: float = 600, retries: int = 5, key_env: str = "OPENAI_API_KEY",
        top_logprobs: int = 0,
    ) -> None:  # fmt: skip
        need("urllib3", "models")
        url, _, self._model = model.partition("#")
        self._url, self._timeout, self._retries, self._concurrency = url.rstrip("/"), timeout, retries, concurrency
        key = os.environ.get(key_env)
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._pool = _pool(self._url, concurrency)
        self._extra: dict[str, Any] = {"logprobs": True, "top_logprobs": top_logprobs} if top_logprobs else {}
        self._wants_ids: bool | None = None  # None: not known yet whether the server takes `return_token_ids`
        served = self._served()
        if not self._model:
            if len(served) != 1:
                choices = ", ".join(served) or "it names none"
                raise ModelError(f"{self._url} serves {len(served)} models; say which: {self._url}#NAME ({choices})")
            self._model = served[0]
        self.name = "server"
        self.facts: dict[str, Any] = {"url": self._url, "model": self._model}

    def _served(self) -> list[str]:
        """The models of the server; also the proof that there is one."""
        from urllib3.exceptions import HTTPError

        try:
            status, body = self._send("/models", retries=1, timeout=30)
            if status in DOOR:
                raise ModelError(f"{self._url} does not let us in: {_message(status, body)}; is the key set (key_env=NAME)?")
            return [str(one["id"]) for one in json.loads(body)["data"]]
        except HTTPError as failure:
            raise ModelError(f"no server answers at {self._url}: {one_line(failure)}") from None
        except (ValueError, TypeError, KeyError):
            return []  # not every server keeps a list; a wrong name shows at the first request

    def _send(self, path: str, body: Any = None, retries: int | None = None, timeout: float | None = None) -> tuple[int, bytes]:
        """A request, sent again where that may help; the status and the body of the last answer."""
        from urllib3.exceptions import HTTPError

        data = None if body is None else json.dumps(body).encode()
        last = self._retries if retries is None else retries
        for attempt in itertools.count():
            asked_for = None
            try:
                answer = self._pool.request(
                    "POST" if data else "GET", self._url + path, body=data, headers=self._headers, retries=False,
                    timeout=timeout or self._timeout,
                )  # fmt: skip
                if attempt == last or answer.status not in AGAIN:
                    return answer.status, answer.data
                asked_for = answer.headers.get("Retry-After")
            except HTTPError:
                if attempt == last:
                    raise
            time.sleep(_pause(attempt, asked_for))
        raise AssertionError

    def generate(
        self, prompts: Sequence[Messages], n: int = 1, temperature: float = 1.0, top_p: float = 1.0,
        max_tokens: int = 1024, seed: int = 0,
    ) -> Answers:  # fmt: skip
        """`n` samples for each prompt, in order; one request a prompt."""
        settings(n, temperature, top_p, max_tokens)
        sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}

        def answer(prompt: Messages) -> list[Completion] | Refused:
            return self._answer(prompt, n, seed, sampling)

        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                return list(pool.map(answer, prompts))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _answer(self, prompt: Messages, n: int, seed: int, sampling: dict[str, Any]) -> list[Completion] | Refused:
        from urllib3 import exceptions

        if empty(prompt):
            return Refused("the prompt is empty")
        wanted = n if sampling["temperature"] else 1
        made: list[Completion] = []
        try:
            while len(made) < wanted:  # some servers give one answer, whatever n says
                place = {"n": wanted - len(made), "seed": (prompt_seed(prompt, seed) + len(made)) % 2**31}
                status, body = self._ask({"messages": prompt} | sampling | place)
                if status in DOOR or status == 404:
                    raise ModelError(f"{self._url}#{self._model}: {_message(status, body)}")
                if not 200 <= status < 300:
                    return Refused(f"the server refused: {_message(status, body)}")
                got = _choices(json.loads(body))
                if not got:
                    return Refused("the server's answer holds no choices")
                made += [_completion(choice) for choice in got[: wanted - len(made)]]
            return made * (1 if sampling["temperature"] else n)
        except exceptions.TimeoutError:
            return Refused("the server did not answer in time")
        except exceptions.HTTPError as failure:
            self._served()  # raises if the server is gone, and then it is not the prompt's fault
            return Refused(f"the server broke off: {one_line(failure)}")
        except (ValueError, RecursionError) as failure:
            return Refused(f"the server's answer cannot be read: {one_line(failure)}")

    def _ask(self, body: dict[str, Any]) -> tuple[int, bytes]:
        """One request, with `return_token_ids` unless the server is known to reject it."""
        whole = {"model": self._model} | body | self._extra
        if self._wants_ids is False:
            return self._send("/chat/completions", whole)
        status, answer = self._send("/chat/completions", whole | {"return_token_ids": True})
        if status in (400, 422) and not self._wants_ids:
            status, answer = self._send("/chat/completions", whole)  # it was the field, or the prompt, which fails again
            if 200 <= status < 300:
                self._wants_ids = False
        elif 200 <= status < 300:
            self._wants_ids = True
        return status, answer

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()


def _pool(url: str, size: int) -> Any:
    """Connections to keep, through the proxy that the environment names for this address, if any."""
    import urllib.request

    import urllib3

    parts = urllib3.util.parse_url(url)
    proxy = None if urllib.request.proxy_bypass(parts.host or "") else urllib.request.getproxies().get(parts.scheme or "http")
    return urllib3.ProxyManager(proxy, maxsize=size) if proxy else urllib3.PoolManager(maxsize=size)


def _pause(attempt: int, asked_for: str | None) -> float:
    """Seconds before the next attempt: what the server asks for, up to a minute, else growing from half a second to 8."""
    try:
        wanted = float(asked_for or "")
    except ValueError:  # a date, or nothing
        wanted = 0.0
    return wanted if 0 < wanted <= 60 else min(0.5 * 2**attempt, 8.0) * random.uniform(0.75, 1.0)


def _message(status: int, body: bytes) -> str:
    """What a server said, in one line: its own message where it gave one."""
    told: Any = None
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        found = json.loads(body)
        error = found.get("error", found)
        told = error if isinstance(error, str) else error.get("message") or error.get("detail")
    return one_line(ValueError(told)) if told else f"HTTP {status}"


def _choices(answer: Any) -> list[Any]:
    """The choices of an answer, which may be any JSON at all."""
    if isinstance(answer, dict) and isinstance(answer.get("choices"), list):
        return list(answer["choices"])
    raise ValueError(f"it has no choices: {str(answer)[:200]}")


def _completion(choice: Any) -> Completion:
    message = choice.get("message") if isinstance(choice, dict) else None
    content = (message.get("content") or "") if isinstance(message, dict) else None
    if not isinstance(content, str):
        raise ValueError(f"a choice has no text: {str(choice)[:200]}")
    # JSON can hold half a character (an unpaired surrogate), which no file takes.
    text = content.encode("utf-8", "replace").decode()
    reason = "length" if choice.get("finish_reason") == "length" else "stop"
    ids = choice.get("token_ids")
    known = isinstance(ids, list) and all(isinstance(i, int) for i in ids)
    return Completion(text, ids if known else None, reason, top=_top(choice.get("logprobs")))


def _top(logprobs: Any) -> list[Place] | None:
    """The likeliest tokens at each place, as the OpenAI protocol gives them; None where it does not."""
    try:
        return [(one["token"], {t["token"]: float(t["logprob"]) for t in one["top_logprobs"]}) for one in logprobs["content"]]
    except (TypeError, KeyError):
        return None
