"""What the tests of engines share: a tiny random Llama over bytes, prompts for it, and a real server on loopback."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WINDOW = 256


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


PROMPTS = [ask(text) for text in ("hello", "what is two plus two?", "abc " * 10, "z", "The capital of France", "why")]


def byte_tokenizer(template: str | None = TEMPLATE, window: int = WINDOW):
    """A tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<bos>", "<eos>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=window, **names)
    if template:
        tokenizer.chat_template = template
    return tokenizer


def build_model(folder: Path, seed: int = 0, template: str | None = TEMPLATE) -> str:
    """A random Llama over bytes, with weights large enough that its answers differ from prompt to prompt."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer(template)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=WINDOW, initializer_range=0.35,
            bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
        ))  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def build_judge(folder: Path, scores: dict[str, float], window: int = 4096) -> str:
    """A Llama whose next byte depends on the last one only, with weights set by hand: it says "Score:" and then one of the
    bytes `scores` with just these probabilities. Whatever it is asked, so its numbers can be computed beforehand.
    """
    import math

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer, size = byte_tokenizer(window=window), 320
    after: dict[str, dict[str, float]] = {a: {b: 1.0} for a, b in ("\u0120S", "Sc", "co", "or", "re", "e:")}
    after[":"] = scores
    logp_VV = torch.full((size, len(tokenizer)), -40.0)  # of the next byte, given the last one
    logp_VV[:, 2] = 0.0
    for last, following in after.items():
        row = logp_VV[tokenizer.convert_tokens_to_ids(last)].fill_(-40.0)
        for byte, p in following.items():
            row[tokenizer.convert_tokens_to_ids(byte)] = math.log(p)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size, intermediate_size=32, num_hidden_layers=1, num_attention_heads=5,
        num_key_value_heads=5, head_dim=64, max_position_embeddings=window, rms_norm_eps=1e-12,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    ))  # fmt: skip
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size)[: len(tokenizer)])
        model.lm_head.weight.copy_(logp_VV.T / math.sqrt(size))  # the last norm makes a one-hot vector this long
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def ids(answers):
    return [[c.token_ids for c in answer] for answer in answers]


@contextlib.contextmanager
def serve(model: str, name: str):
    """vLLM's own OpenAI-compatible server on loopback; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", name,
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
        # vLLM 0.32 on the CPU dies of a seeded request whose prompt it splits.
        "--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096",
    ]  # fmt: skip
    # Without the worker process of its own it starts in half the time.
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, text=True
    )
    try:
        _wait(process, port)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen, port: int) -> None:
    """Until the server answers; a busy machine takes minutes."""
    lines: list[str] = []
    threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True).start()
    deadline = time.monotonic() + 300
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        assert process.poll() is None and time.monotonic() < deadline, "".join(lines[-40:])
        time.sleep(0.3)
