"""Packed sequences in which the responses to one prompt share it: nothing is computed twice, nothing is padding.

    ids        [prompt A][resp A1][resp A2] ... [prompt B][resp B1] ...      one row of T tokens
    positions   0..a-1    a..      a..           0..b-1    b..               as if each response stood alone
    attention  a prompt sees itself; a response sees its prompt and itself; nothing else

The last token of a response predicts nothing that is asked for, so it is left out of the input; a prompt's last
token predicts the first token of each of its responses. `Attention` plugs into transformers' attention interface.
What is left out: attention that is not causal softmax attention (sinks, biases); such models take the plain path.

Shapes: T tokens, H heads, D head size, S segments (a prompt or a response each).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Ids = list[int]


class Unsupported(Exception):
    """A model asks for attention that the packed path does not know."""


@dataclass
class Pack:
    """One packed sequence. segments: (start, end, prompt start, prompt end), the last two equal for a prompt itself.

    predictors and targets: the positions whose output predicts a response token, and these tokens; rows: for each
    response, its row and its number of tokens, in the order of the targets.
    """

    ids: Ids = field(default_factory=list)
    positions: Ids = field(default_factory=list)
    segments: list[tuple[int, int, int, int]] = field(default_factory=list)
    predictors: Ids = field(default_factory=list)
    targets: Ids = field(default_factory=list)
    rows: list[tuple[int, int]] = field(default_factory=list)

    def add(self, prompt: Ids, responses: Iterable[tuple[int, Ids]]) -> None:
        """Append a prompt and its responses, each given with its row number."""
        start = len(self.ids)
        end = start + len(prompt)
        self._segment(prompt, 0, start, start)
        for row, response in responses:
            first = len(self.ids)
            if len(response) > 1:
                self._segment(response[:-1], len(prompt), start, end)
            self.predictors += [end - 1, *range(first, len(self.ids))]
            self.targets += response
            self.rows.append((row, len(response)))

    def pad(self, multiple: int) -> None:
        """Fill up to a multiple of so many tokens, as a segment of its own that nobody reads.

        CPU kernels are compiled and kept for every new shape; a few round lengths keep memory flat.
        """
        if rest := -len(self.ids) % multiple:
            self._segment([0] * rest, 0, len(self.ids), len(self.ids))

    def _segment(self, ids: Ids, position: int, prompt_start: int, prompt_end: int) -> None:
        start = len(self.ids)
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.segments.append((start, len(self.ids), prompt_start, prompt_end))


def packs(rows: Sequence[tuple[Ids, Ids]], budget: int) -> Iterable[Pack]:
    """Rows (prompt, response) as packs of about `budget` tokens; a pack holds at least one response."""
    groups: dict[tuple[int, ...], list[tuple[int, Ids]]] = {}
    for row, (prompt, response) in enumerate(rows):
        if response:
            groups.setdefault(tuple(prompt), []).append((row, response))
    pack = Pack()
    for shared, waiting in groups.items():
        prompt = list(shared)
        while waiting:
            room, taken = budget - len(pack.ids) - len(prompt), 0
            while taken < len(waiting) and (room := room - len(waiting[taken][1]) + 1) >= 0:
                taken += 1
            if not taken and pack.ids:
                yield pack
                pack = Pack()
                continue
            taken = max(taken, 1)
            pack.add(prompt, waiting[:taken])
            waiting = waiting[taken:]
    if pack.ids:
        yield pack


class Attention:
    """Block attention for the pack at hand, as a transformers attention function."""

    def __init__(self) -> None:
        self.layout: Layout | None = None

    def __call__(
        self, module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None,
        sliding_window: int | None = None, softcap: float | None = None, s_aux: Any = None, **_: Any,
    ) -> tuple[Any, None]:  # fmt: skip
        """query (1, H, T, D), key and value (1, H or fewer, T, D) -> (1, T, H, D)."""
        assert self.layout is not None
        if s_aux is not None or getattr(module, "is_causal", True) is False:
            raise Unsupported(type(module).__name__)
        layout = self.layout
        window = sliding_window if sliding_window and sliding_window < layout.longest else None
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        if layout.varlen and softcap is None and query.dtype.itemsize == 2 and query.shape[-1] <= 256:
            return layout.attend_at_once(query, key, value, scale, window), None
        return layout.attend_in_turn(query, key, value, scale, window, softcap), None


class Layout:
    """Where the segments of a pack lie, in the forms that the attention kernels want."""

    def __init__(self, pack: Pack, device: Any) -> None:
        import torch

        self.segments = pack.segments
        self.longest = max(e - s + pe - ps for s, e, ps, pe in pack.segments)
        self.varlen = device.type == "cuda"
        if not self.varlen:
            return
        queries = [e - s for s, e, _, _ in pack.segments]
        keys = [e - s + pe - ps for s, e, ps, pe in pack.segments]
        self.key_index = torch.cat([torch.arange(a, b) for s, e, ps, pe in pack.segments for a, b in ((ps, pe), (s, e))]).to(
            device
        )
        self.ends_q, self.ends_k = (
            torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32) for lengths in (queries, keys)
        )  # fmt: skip
        self.longest_q = max(queries)

    def attend_at_once(self, query: Any, key: Any, value: Any, scale: float, window: int | None) -> Any:
        """One variable-length flash attention call; the prompt's keys are repeated before those of each response."""
        from torch.nn.attention.varlen import varlen_attn

        q_THD, k_UHD, v_UHD = (
            query[0].transpose(0, 1),
            key[0].transpose(0, 1)[self.key_index],
            value[0].transpose(0, 1)[self.key_index],
        )
        if k_UHD.shape[1] != q_THD.shape[1]:
            k_UHD, v_UHD = (x.repeat_interleave(q_THD.shape[1] // x.shape[1], dim=1) for x in (k_UHD, v_UHD))
        out_THD: Any = varlen_attn(
            q_THD.contiguous(), k_UHD, v_UHD, self.ends_q, self.ends_k, self.longest_q, self.longest, scale=scale,
            window_size=((window - 1) if window else -1, 0),
        )  # fmt: skip
        return out_THD.unsqueeze(0)

    def attend_in_turn(self, query: Any, key: Any, value: Any, scale: float, window: int | None, softcap: float | None) -> Any:
        """One call a segment: a prompt is plainly causal, a response sees its prompt whole and itself causally."""
        import torch
        from torch.nn.functional import scaled_dot_product_attention as sdpa

        out_1HTD = torch.empty_like(query)
        grouped = key.shape[1] != query.shape[1]
        for start, end, prompt_start, prompt_end in self.segments:
            q, k, v = query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]
            before = prompt_end - prompt_start
            if before:
                k, v = (torch.cat([x[:, :, prompt_start:prompt_end], y], dim=2) for x, y in ((key, k), (value, v)))
            if not before and not softcap and not (window and end - start > window):
                out_1HTD[:, :, start:end] = sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
                continue
            place_q = torch.arange(before, before + end - start, device=q.device)[:, None]
            place_k = torch.arange(before + end - start, device=q.device)
            seen = place_k <= place_q
            if window:
                seen &= place_k > place_q - window
            if softcap:
                out_1HTD[:, :, start:end] = capped(q, k, v, seen, scale, softcap)
            else:
                out_1HTD[:, :, start:end] = sdpa(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)
        return out_1HTD.transpose(1, 2)


def capped(query: Any, key: Any, value: Any, seen: Any, scale: float, softcap: float) -> Any:
    """Attention with capped scores, softcap * tanh(score / softcap), as Gemma 2 has it."""
    import torch

    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value
