"""Who wins: the model's answers against other answers to the same prompts, by a judge. SER, arXiv:2411.00418, C.2 and D.4.

    win_rate against=SAMPLES judge='pair_judge model=M'                        two calls, the answers exchanged in the second
    win_rate against=SAMPLES judge='judge model=M rubric=ser' mode=pointwise   one score each, as SER's code judges

SAMPLES has `prompt` and `response`; `versus` says what a win is. Wins, ties and losses are reported as they are, never folded
into one number. A prompt that the judge left undecided in either call is counted apart.
"""

from __future__ import annotations

from pathlib import Path

from .. import spec as specs
from .. import tables
from ..errors import DataError
from ..folders import digest
from ..show import progress
from ..versus import OUTCOMES, Mode, duels, replies
from . import Ready, Result, share, slug, write_samples

CHUNK = 64


def win_rate(
    model: str,
    out: Path,
    limit: int | None,
    engine: str,
    ready: Ready,
    against: str,
    judge: str,
    mode: Mode = "pairwise",
    temperature: float = 0.0,
    max_tokens: int = 256,
    template: str | None = None,
    seed: int = 0,
    label: str | None = None,
) -> Result:
    """Wins, ties and losses of the model. temperature, max_tokens, template, seed: of its answers (SER: 256 tokens)."""
    source = tables.open(against).require("prompt", "response").filled()
    asked = source.frame().collect().to_dicts()[: limit or None]
    one = specs.parse(engine)
    if template:
        one = specs.Spec(one.name, one.options | {"template": template})
    prompts = [tables.messages_or_none(row["prompt"]) for row in asked]
    said = replies(str(one), model, prompts, temperature=temperature, max_tokens=max_tokens, seed=seed)
    rows = [{"prompt": p, "ours": s, "theirs": row["response"]} for p, s, row in zip(prompts, said, asked, strict=True)]
    with ready(judge) as judged, progress("win_rate", len(rows), "prompts") as advance:
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            for row, found in zip(part, duels(judged, part, mode), strict=True):
                outcome = found["outcome"]
                metrics = {o: float(o == outcome) for o in OUTCOMES} if outcome else {}
                row |= found | {"id": digest([row["prompt"], row["theirs"]]), "metrics": metrics}
            advance(len(part))
    name = slug(specs.Spec("win_rate", {"label": label}))
    write_samples(out, name, rows)
    decided = [row["outcome"] for row in rows if row["outcome"]]
    if not decided:
        raise DataError(f"the judge decided none of the {len(rows)} prompts of {against}: {rows[0]['why']}")
    counts = {o: decided.count(o) for o in OUTCOMES}
    return {
        "task": name,
        "n": len(decided),
        "metrics": {o: share([float(d == o) for d in decided]) for o in OUTCOMES},
        "settings": {
            "against": {"file": Path(source.name).name, "rows": source.rows, "fingerprint": source.fingerprint}, "judge": judge,
            "mode": mode, "counts": counts, "undecided": len(rows) - len(decided), "engine": str(one), "limit": limit,
            "flipped": sum(row.get("flipped", False) for row in rows), "max_tokens": max_tokens, "temperature": temperature,
            "seed": seed,
        },
    }  # fmt: skip
