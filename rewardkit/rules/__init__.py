"""NUMBERS -> CHOICES. A rule takes a LazyFrame and returns (kept, dropped); every row it was given is in exactly one.

Dropped rows are unchanged but for a new column `reason`. Rules run one after the other, joined by `then`:

    "dedupe then threshold min=0.2 then top per=prompt k=1"

A plain function is enough, as `file.py:function`:

    def short(frame):
        keep = pl.col("n_tokens") < 100
        return frame.filter(keep), frame.filter(~keep).with_columns(reason=pl.lit("long"))

A rule may carry two attributes, which go into the manifest: `facts`, a dict that it fills when it is applied, and `inputs`, a
function that gives what it reads besides the table: name -> {"path": ..., "fingerprint": ...}.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from .. import spec as specs
from ..errors import OptionError
from .control import KINDS as CONTROLS
from .control import anonymous, blind, controls, numbered
from .groups import scratch
from .partition import Chain, Partition, Rule, Stage, partition

__all__ = ["CONTROLS", "RULES", "Chain", "Partition", "Rule", "Stage", "anonymous", "blind", "controls", "load", "numbered",
           "partition", "scratch", "written"]  # fmt: skip

RULES = {
    # by a score
    "all": "rewardkit.rules.select:everything",
    "threshold": "rewardkit.rules.select:threshold",
    "quantile": "rewardkit.rules.select:quantile",
    "top": "rewardkit.rules.select:top",
    # pairs
    "best_vs_worst": "rewardkit.rules.pairs:best_vs_worst",
    "best_vs_random": "rewardkit.rules.pairs:best_vs_random",
    "length_matched": "rewardkit.rules.pairs:length_matched",
    "demo_vs_sample": "rewardkit.rules.pairs:demo_vs_sample",
    "margin": "rewardkit.rules.select:margin",
    # Self-Evolved Reward learning
    "confident": "rewardkit.rules.confident:Confident",
    "split": "rewardkit.rules.split:split",
    # Self-Rewarding Language Models: seed data
    "oasst": "rewardkit.rules.oasst:oasst",
    "agrees": "rewardkit.rules.oasst:agrees",
    "thin": "rewardkit.rules.oasst:thin",
    # scores out of scores
    "combine": "rewardkit.rules.combine:combine",
    "residual": "rewardkit.rules.combine:residual",
    "label": "rewardkit.rules.combine:label",
    # by the text alone
    "finished": "rewardkit.rules.select:finished",
    "length": "rewardkit.rules.select:length",
    "matches": "rewardkit.rules.select:matches",
    "keywords": "rewardkit.rules.select:keywords",
    "dedupe": "rewardkit.rules.duplicates:dedupe",
    "rouge": "rewardkit.rules.rouge:rouge",
    "decontaminate": "rewardkit.rules.decontaminate:decontaminate",
    "collapsed": "rewardkit.rules.decontaminate:collapsed",
}

Source = str | Mapping[str, Any] | specs.Spec | Sequence[Any]


def load(source: Source) -> Chain:
    """The rules that a text with `then`, a spec, or a list of specs describes."""
    return Chain(tuple(_stage(spec) for spec in parse(source)))


def parse(source: Source) -> list[specs.Spec]:
    """The specs of a chain."""
    if isinstance(source, (Mapping, specs.Spec)):
        return [specs.parse(source)]
    if not isinstance(source, str):
        return [spec for one in source for spec in parse(one)]
    try:
        words = shlex.split(source)
    except ValueError as error:
        raise OptionError(f"cannot read the rule {source!r}: {error}") from None
    if not words:
        return [specs.parse(source)]
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "then":
            parts.append([])
        else:
            parts[-1].append(word)
    if not all(parts):
        raise OptionError(f"the rule {source!r} has nothing on one side of a `then`")
    return [specs.parse(shlex.join(part)) for part in parts]


def written(source: Source) -> str:
    """A chain as text, the same however it was given."""
    return " then ".join(str(spec) for spec in parse(source))


def _stage(spec: specs.Spec) -> Stage:
    """One rule, and the score columns it reads, which its options `by` and `columns` name."""
    rule: Rule = specs.build(spec, RULES, "rule")
    takes = inspect.signature(specs.resolve(spec, RULES, "rule")).parameters
    reads: tuple[str, ...] = ()
    if "by" in takes:
        reads = (str(spec.options.get("by", takes["by"].default)),)
    elif "columns" in takes and not specs.own(spec):
        reads = tuple(specs.convert(spec.options["columns"], list, "option 'columns'"))
    per = str(spec.options["per"]) if spec.options.get("per") not in (None, "none") else None
    makes_pairs = RULES.get(spec.name, "").startswith("rewardkit.rules.pairs:")
    blind = not reads and not specs.own(spec) and spec.name != "all"
    return Stage(str(spec), rule, reads, "prompt" if makes_pairs else per, blind)
