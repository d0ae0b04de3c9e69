"""How likely a causal language model finds given text: log p(response token | prompt, earlier response tokens).

fp32 log-softmax at temperature 1 over the response tokens (SPEC A.2.3); prompt tokens contribute nothing. Rows are
sorted by length and batched by a token budget; only response positions meet the vocabulary matrix. Left out:
sampling, and anything that is not standard causal attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from .errors import ModelError

Ids = list[int]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class LogProbs:
    """A frozen model that scores token ids.

    Call it with (prompt_ids, response_ids) pairs; it returns one list of log-probabilities a pair, one per
    response token, in the order given. The prompt must hold at least one token, from which the first response
    token is predicted.
    """

    def __init__(self, model: str, dtype: Dtype = "auto", batch_tokens: int = 8_192) -> None:
        self.model, self.device = load_causal(model, dtype)
        self.batch_tokens = batch_tokens
        config = self.model.config.get_text_config()
        self.longest: int = getattr(config, "max_position_embeddings", None) or 1 << 30

    def __call__(self, rows: Sequence[tuple[Ids, Ids]], advance: Callable[[int], None] | None = None) -> list[list[float]]:
        """Log-probabilities of every response token; advance: told how many rows are done."""
        found: list[list[float]] = [[] for _ in rows]
        order = sorted((i for i, (_, response) in enumerate(rows) if response), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
        while order:
            longest = sum(map(len, rows[order[0]]))
            size = max(1, self.batch_tokens // longest)
            batch, order = order[:size], order[size:]
            for index, values in zip(batch, self._batch([rows[i] for i in batch]), strict=True):
                found[index] = values
            if advance:
                advance(len(batch))
        return found

    def _batch(self, rows: Sequence[tuple[Ids, Ids]]) -> list[list[float]]:
        """One forward pass; shapes: B rows, T tokens (right-padded), K kept positions, V vocabulary."""
        import torch

        longest = max(len(p) + len(r) for p, r in rows)
        ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for place, (prompt, response) in enumerate(rows):
            ids_BT[place, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            mask_BT[place, : len(prompt) + len(response)] = 1
        # Position t predicts token t+1, so the last prompt token is the first position that matters.
        first = min(len(p) for p, _ in rows) - 1
        kept_K = torch.arange(first, longest - 1, device=self.device)
        with torch.inference_mode():
            logits_BKV = self.model(
                input_ids=ids_BT.to(self.device), attention_mask=mask_BT.to(self.device), use_cache=False, logits_to_keep=kept_K
            ).logits
            targets_BK = ids_BT[:, first + 1 :].to(self.device)
            logp_BK = torch.stack(
                [
                    row.float().log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)
                    for row, target in zip(logits_BKV, targets_BK, strict=True)
                ]
            ).cpu()
        starts = [len(p) - 1 - first for p, _ in rows]
        return [logp_BK[b, s : s + len(r)].tolist() for b, (s, (_, r)) in enumerate(zip(starts, rows, strict=True))]


def load_causal(model: str, dtype: Dtype = "auto") -> tuple[Any, Any]:
    """A frozen causal LM (LoRA adapter folders too) on the GPU if there is one, and its device."""
    import torch
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype if dtype == "auto" else getattr(torch, dtype), use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the model {model}: {next(iter(str(error).splitlines()), '')}") from None
    return loaded.to(device).eval().requires_grad_(False), device
