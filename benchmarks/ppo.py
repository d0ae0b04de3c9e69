"""PPO against `trl.experimental.ppo` of trl 1.12.0, in one run: `.venv/bin/python benchmarks/ppo.py` (CPU or GPU).

Same model (random Llama, 4.2M parameters unless --hidden, --layers say otherwise), same prompts, batch, chance that a token is
the last (--ends: 0 makes every answer as long as may be, which no real one is), four minibatches, one pass, fp32; a reward
that costs nothing. Ours and the peer take turns. The peer runs in an environment of its own: this one, with trl 1.12.0 in
front (--peer FOLDER, filled by pip on the first run).
Printed: samples per second and the ratio a turn; where our time goes; the arithmetic floor of each part, at the matrix
product rate measured just before; and the time of a step against the batch (--growth).
--memory instead: peak memory of a LoRA run in which one backbone plays all four roles, at micro-batch 1 and 256 tokens, with a
random Llama of 300M parameters in fp32 (large enough that what every program takes does not count), against 1.3 times the
backbone, the adapters and their optimiser. Resident memory above what the same run leaves behind with a model of no size:
libraries, their caches. glibc keeps freed memory, in pieces too small to use again; "given back" is the same run with
MALLOC_MMAP_THRESHOLD_=65536, which has it return what is freed.
The first update of a run is left out: it compiles and allocates.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PEER = "trl==1.12.0"
HERE = Path(__file__).resolve()
PARTS = ("sample", "score", "read", "estimate", "learn")


def make(folder: Path, hidden: int, layers: int, words: int, prompts: int, end: float = 0.0) -> Path:
    """A random Llama over words, and prompts of 16 to 48 of them. end: about how likely every token is the last one."""
    import random

    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(words - 3))]
    raw = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = "{{ messages[0].content }}"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    ))  # fmt: skip
    if end:  # one coordinate is large for every word, so about sqrt(hidden) after the last norm: it can favour a word everywhere
        with torch.no_grad():
            model.get_input_embeddings().weight[:, 0] = 8
            model.get_input_embeddings().weight[1, 0] += math.log(end / (1 - end) * words) / hidden**0.5
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = random.Random(0)
    rows = [" ".join(draw.choices(names[3:], k=draw.randint(16, 48))) for _ in range(prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    return folder


def ours(folder: Path, settings: dict[str, Any], **more: Any) -> list[dict[str, float]]:
    """The log of our run, the first buffer left out."""
    import torch

    from rewardkit import tables
    from rewardkit.methods.ppo import ppo
    from rewardkit.rewards import Score

    torch.set_num_threads(settings["threads"])
    options = {
        "buffer": settings["batch"], "batch_size": settings["batch"] // settings["minibatches"], "critic_warmup": 0,
        "micro_batch_size": settings["micro"], "max_buffers": settings["updates"], "epochs": 1e9,
        "max_tokens": settings["tokens"],
        "learning_rate": 1e-6, "stop_length": None, "stop_eos": None, "sampler": f"transformers batch_size={settings['batch']}",
        "save_buffers": 10**6,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        data = tables.open(folder / "prompts.jsonl")
        ppo(str(folder / "model"), data, Path(out), lambda s: [Score(0.0)] * len(s), **options | more)
        return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()][1:]


def theirs(folder: Path, settings: dict[str, Any], peer: Path) -> list[float]:
    """Seconds of the peer's updates, the first left out."""
    if not (peer / "trl").is_dir():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(peer), PEER], check=True)
    command = [sys.executable, str(HERE.with_name("peer_ppo.py")), str(folder / "model"), str(folder / "prompts.jsonl")]
    environment = os.environ | {"PYTHONPATH": str(peer), "OMP_NUM_THREADS": str(settings["threads"])}
    done = subprocess.run([*command, json.dumps(settings)], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"the peer failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])[1:]


def rate() -> float:
    """fp32 matrix products, operations a second."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1536
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    times = []
    for _ in range(6):
        started = time.monotonic()
        (a @ b).sum().item()
        times.append(time.monotonic() - started)
    return 2 * size**3 / min(times[1:])


def floor(folder: Path, settings: dict[str, Any], answer: float, speed: float) -> dict[str, float]:
    """Seconds that the matrix products of each part take at this speed: 2 operations a weight and token, thrice to learn."""
    config = json.loads((folder / "model" / "config.json").read_text())
    e, f = config["hidden_size"], config["intermediate_size"]
    layers = config["num_hidden_layers"] * (4 * e * e + 3 * e * f)
    n = settings["batch"]
    body = 2 * layers * n * (32 + answer)
    head = 2 * e * config["vocab_size"] * n * answer
    work = {"sample": body + head, "score": body + head, "read": body, "estimate": 0, "learn": 6 * body + 3 * head}
    return {part: work[part] / speed for part in PARTS}


def compare(folder: Path, settings: dict[str, Any], peer: Path, turns: int) -> None:
    speed = rate()
    samples = settings["batch"]
    ratios, mine, others = [], [], []
    for turn in range(turns):
        order = [0, 1] if turn % 2 == 0 else [1, 0]
        times: dict[int, float] = {}
        for side in order:
            if side == 0:
                mine += (log := ours(folder, settings))
                times[0] = statistics.median(sum(e[f"seconds_{p}"] for p in PARTS) for e in log)
            else:
                others.append(times.setdefault(1, statistics.median(theirs(folder, settings, peer))))
        ratios.append(times[1] / times[0])
        speeds = f"ours {samples / times[0]:.2f}, peer {samples / times[1]:.2f} samples/s"
        print(f"turn {turn + 1}: {speeds}, ratio {ratios[-1]:.2f}", flush=True)
    length = statistics.mean(e["length"] for e in mine)
    least = floor(folder, settings, length, speed)
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
    print(f"\nmedian ratio {spread} over {turns} turns; {settings}")
    print(f"matrix products: {speed / 1e9:.0f} GFLOP/s in fp32\n\n| part | seconds | floor |\n| --- | ---: | ---: |")
    for part in PARTS:
        print(f"| {part} | {statistics.median(e[f'seconds_{part}'] for e in mine):.3f} | {least[part]:.3f} |")
    print(f"| sum | {statistics.median(sum(e[f'seconds_{p}'] for p in PARTS) for e in mine):.3f} | {sum(least.values()):.3f} |")
    print(f"| length of the answers | {length:.1f} | |", flush=True)


def growth(folder: Path, settings: dict[str, Any]) -> None:
    print("\n| batch | seconds a buffer | seconds an answer |\n| ---: | ---: | ---: |")
    for batch in (16, 32, 64, 128, 256):
        log = ours(folder, settings | {"batch": batch, "micro": min(settings["micro"], batch // settings["minibatches"])})
        seconds = statistics.median(sum(e[f"seconds_{p}"] for p in PARTS) for e in log)
        print(f"| {batch} | {seconds:.3f} | {seconds / batch:.4f} |", flush=True)


def memory(checkpointed: bool) -> dict[str, float]:
    """MiB of a run in this process: at its peak above a run with a model of no size, and what cannot be less."""
    import resource

    import torch

    torch.set_num_threads(1)
    four_roles(64, 1, checkpointed)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    backbone, adapter, length = four_roles(1024, 21, checkpointed)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    needed = backbone + 9 * adapter  # the SFT adapter; actor and critic: weights, gradients and two moments
    return {"backbone": backbone, "adapter": adapter, "needed": needed, "peak": peak, "ratio": peak / needed, "length": length}


def four_roles(hidden: int, layers: int, checkpointed: bool, rank: int = 16, tokens: int = 256) -> tuple[float, float, float]:
    """Two buffers of two answers on one backbone; MiB of backbone and adapter, and tokens an answer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, logging

    from rewardkit import rewards, tables
    from rewardkit.methods.ppo import ppo

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        adapter = made / "sft"
        if (child := os.fork()) == 0:  # whoever makes the model takes its memory away
            make(made, hidden, layers, 32_000, 8)
            config = LoraConfig(r=rank, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
            wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(made / "model"), config)
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.02)  # else the reward is 0 everywhere
            wrapped.save_pretrained(adapter)
            os._exit(0)
        os.waitpid(child, 0)
        words = (tokens // 2 - 1) * "w1 "
        (made / "prompts.jsonl").write_text((json.dumps({"prompt": words}) + "\n") * 4)
        reward = rewards.Applied(rewards.load(f"coherent policy={adapter} base={made / 'model'}")[0])
        (made / "out").mkdir()
        facts = ppo(
            str(adapter), tables.open(made / "prompts.jsonl"), made / "out", reward, lora_rank=rank, buffer=2, batch_size=2,
            micro_batch_size=1, critic_warmup=0, max_buffers=2, max_tokens=tokens // 2, max_length=tokens, epochs=2,
            save_buffers=9, learning_rate=1e-5, checkpoint_activations=checkpointed,
        )  # fmt: skip
        assert facts["one_backbone"]
        files = (made / "model" / "model.safetensors", adapter / "adapter_model.safetensors")
        backbone, one = (file.stat().st_size / 2**20 for file in files)
    return backbone, one, facts["length_last"]


def memories() -> None:
    """Each run in a process of its own, so that its peak is its own."""
    columns: list[str] = []
    giving = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for freed, checkpointed in itertools.product(("kept", "given back"), (False, True)):
        command = [sys.executable, "-c", f"import json, ppo; print(json.dumps(ppo.memory({checkpointed})))"]
        environment = os.environ | (giving if freed == "given back" else {})
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parent, env=environment)
        found = json.loads(done.stdout.splitlines()[-1])
        if not columns:
            columns = list(found)
            names = ["freed memory", "checkpoint_activations", *columns]
            print("| " + " | ".join(names) + " |\n|" + " --- |" * 2 + " ---: |" * len(columns))
        print(f"| {freed} | {checkpointed} | " + " | ".join(f"{found[k]:,.2f}" for k in columns) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, default=Path(tempfile.gettempdir()) / "rewardkit-peer")
    for name, value in [
        ("turns", 3), ("threads", 2), ("batch", 64), ("minibatches", 4), ("micro", 16), ("tokens", 64), ("updates", 5),
        ("hidden", 256), ("layers", 4), ("words", 4096),
    ]:  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--ends", type=float, nargs="+", default=[0.0, 0.03], help="chance that a token is the last")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--memory", action="store_true")
    given = parser.parse_args()
    if given.memory:
        memories()
        return
    settings = {k: getattr(given, k) for k in ("threads", "batch", "minibatches", "micro", "tokens", "updates")}
    os.environ["REWARDKIT_QUIET"] = "1"
    for end in given.ends:
        with tempfile.TemporaryDirectory() as folder:
            print(f"\nchance that a token is the last: {end}")
            made = make(Path(folder), given.hidden, given.layers, given.words, 1024, end)
            if given.turns:
                compare(made, settings, given.peer, given.turns)
            if given.growth:
                growth(made, settings)


if __name__ == "__main__":
    main()
