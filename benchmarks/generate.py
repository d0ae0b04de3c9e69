"""What `rewardkit generate` adds to vLLM, in one run: `.venv/bin/python benchmarks/generate.py` (CPU or GPU).

Ours: the verb from end to end (read the table, hash the inputs, render and tokenize, 256 prompts at a time, decode, write
Parquet and manifest), with an engine that is already loaded. Bare: one `llm.generate` call on all prompts, with the same
token ids and sampling settings, made beforehand; once as vLLM does it (text and ids) and once for token ids only.
They take turns, in alternating order; the ratios of their times are taken within each turn. 1.0 means that the verb costs
nothing; the goal is 0.95 against vLLM's own text. On a machine that does other work the numbers mean little: vLLM's threads
wait for one another.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import rewardkit
from rewardkit import show, world
from rewardkit.engine import load, prompt_ids, prompt_seed

BASE = Path(rewardkit.__file__).parent / "assets" / "world" / "base"
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t for 1 to 9 degrees of freedom


class Warm:
    """A loaded engine that the verb may use but not close."""

    def __init__(self, engine: Any) -> None:
        self.generate, self.name, self.facts = engine.generate, engine.name, engine.facts

    def close(self) -> None:
        """Stay loaded."""


def warm(model: str) -> Any:
    """What the verb is given as `engine="generate.py:warm"`; it runs in another module object than this script."""
    return sys.modules["__main__"].WARM


def random_model(folder: Path) -> str:
    """A random Llama of 4M parameters, which hardly ever ends its turn, so that all answers have full length."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def bare(engine: Any, llm: Any, prompts: list[Any], options: argparse.Namespace, text: bool) -> Any:
    """A function that makes the bare call, its inputs prepared."""
    import torch
    from vllm import SamplingParams, TokensPrompt

    asked = [TokensPrompt(prompt_token_ids=prompt_ids(engine._tokenizer, p)) for p in prompts]
    same = {"n": options.n, "max_tokens": options.max_tokens, "stop_token_ids": engine._ends, "detokenize": text}

    def call() -> list[list[int]]:
        llm.reset_prefix_cache()
        params = [SamplingParams(seed=prompt_seed(p, 0), **same) for p in prompts]
        with torch.compiler.set_stance("force_eager") if engine._cpu else contextlib.nullcontext():
            outputs = llm.generate(asked, params, use_tqdm=False)
        return [list(sample.token_ids) for output in outputs for sample in output.outputs]

    return call


def contenders(options: argparse.Namespace, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The engine and what takes turns: name -> a function that yields the token ids of all samples."""
    global WARM
    import polars as pl
    import vllm

    model = random_model(folder / "random") if options.random else options.model
    rows = world.make(options.prompts, seed=1, split="base", unique=False)
    prompts, data = [r["prompt"] for r in rows], folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    engine = load("vllm", model)
    WARM = Warm(engine)
    whole = {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": 4096} if engine._cpu else {}
    size = {"kv_cache_memory_bytes": engine._llm.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes} if engine._cpu else {}
    share = {} if engine._cpu else {"gpu_memory_utilization": 0.45}
    llm = vllm.LLM(model=model, dtype=engine.facts["dtype"], seed=0, use_tqdm_on_load=False, **whole, **size, **share)

    def verb() -> Path:
        spec = f"{Path(__file__).resolve()}:warm"
        out = tempfile.mkdtemp(dir=folder)
        return rewardkit.generate(model, str(data), out, n=options.n, max_tokens=options.max_tokens, engine=spec)

    calls = {"llm.generate, text": bare(engine, llm, prompts, options, True),
             "llm.generate, ids only": bare(engine, engine._llm, prompts, options, False)}  # fmt: skip
    ours = pl.read_parquet(str(verb() / "part-*.parquet"))["token_ids"].to_list()
    for name, call in calls.items():
        theirs = call()
        same = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
        print(f"{name}: {sum(map(len, theirs)):,} tokens, {same:.1%} of the samples as ours")
    return engine, {"rewardkit generate": verb} | calls


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Let them take turns and print the table."""
    engine, all_ = contenders(options, folder)
    times: dict[str, list[float]] = {name: [] for name in all_}
    for turn in range(options.repeats):
        for name in list(all_) if turn % 2 else reversed(all_):
            start = time.perf_counter()
            all_[name]()
            times[name].append(time.perf_counter() - start)
    rows: list[list[Any]] = []
    ours = times["rewardkit generate"]
    for name, seconds in times.items():
        ratios = [theirs / mine for theirs, mine in zip(seconds, ours, strict=True)]
        middle, half = statistics.fmean(ratios), T_95[len(ratios) - 2] * statistics.stdev(ratios) / len(ratios) ** 0.5
        rows.append([name, statistics.median(seconds), middle, f"{middle - half:.3f} to {middle + half:.3f}"])
    kind = "random 4M Llama" if options.random else Path(options.model).name
    print(f"{options.prompts} prompts x {options.n}, max_tokens {options.max_tokens}, {kind}, {engine.name}\n")
    print(show.markdown(["", "seconds (median)", "its time / ours", "95 % interval"], rows))
    engine.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BASE), help="a model folder (default: the base of the embedded world)")
    parser.add_argument("--random", action="store_true", help="a random Llama of 4M parameters instead")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=6, choices=range(2, 11), metavar="2..10")
    with tempfile.TemporaryDirectory() as scratch:
        measure(parser.parse_args(), Path(scratch))
