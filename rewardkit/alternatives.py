"""What else a model could have said: the likeliest tokens at each place of an answer, as text.

    Place = (text of the token that was sampled, {text: log-probability} of the likeliest ones)

Log-probabilities are the model's own, before temperature and top-p. Two tokens may be the same text; the likelier counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Place = tuple[str, dict[str, float]]
Likeliest = Sequence[tuple[int, float]]  # (token id, log p) at one place


def places(tokenizer: Any, ids: Sequence[int], likeliest: Iterable[Likeliest]) -> list[Place]:
    """The places of one answer with the token ids `ids`."""
    found = [list(one) for one in likeliest][: len(ids)]
    distinct = sorted({*ids, *(token for one in found for token, _ in one)})
    said = tokenizer.batch_decode([[token] for token in distinct], clean_up_tokenization_spaces=False)
    text = dict(zip(distinct, said, strict=True))
    ordered = (sorted(one, key=lambda pair: pair[1]) for one in found)
    return [(text[token], {text[i]: logp for i, logp in one}) for token, one in zip(ids, ordered, strict=True)]


def of_vllm(flat: Any) -> list[Likeliest]:
    """The likeliest tokens at each place, of vLLM's flat list of log-probabilities; nothing where there is none."""
    if flat is None:
        return []
    spans = zip(flat.start_indices, flat.end_indices, strict=True)
    return [list(zip(flat.token_ids[start:end], flat.logprobs[start:end], strict=True)) for start, end in spans]
