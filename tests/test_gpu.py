"""What only a CUDA device can show: `python -m pytest -m gpu tests/test_gpu.py` (scripts/gpu runs it with the benchmarks)."""

import pytest
import torch

from rewardkit.logprobs import LogProbs
from tests.test_logprobs import alone, gap, model, texts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3", "Gemma2", "GPTNeoX", "Phi3"])
def test_packed_scores_on_the_gpu_equal_an_unbatched_fp32_reference(tmp_path, family):
    """fp32 takes the segment-by-segment kernels; the reference runs on the CPU, without tf32."""
    rows = texts()
    wanted = alone(model(tmp_path, family), rows, "eager" if family == "Gemma2" else "sdpa")
    scorer = LogProbs(str(tmp_path), batch_tokens=200)
    assert scorer.device.type == "cuda" and scorer.packed
    assert gap(scorer(rows), wanted) < 1e-3


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3"])
def test_bf16_takes_the_variable_length_kernel_and_stays_near_fp32(tmp_path, family):
    rows = texts()
    wanted = alone(model(tmp_path, family, torch.bfloat16), rows)
    scorer = LogProbs(str(tmp_path))
    assert scorer.packed
    assert gap(scorer(rows), wanted) < 0.5


def test_out_of_memory_halves_the_budget_and_goes_on(tmp_path, capsys):
    """A cap on this process's share of the device makes a real out-of-memory."""
    scorer = LogProbs(model(tmp_path, "Llama"), batch_tokens=1 << 20)
    rows = [([5] * 200, [7] * 300) for _ in range(4)] + [([i % 90 + 5] * 200, [7] * 300) for i in range(2000)]
    free = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (160 << 20)) / free)
    try:
        found = scorer(rows)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert scorer.batch_tokens < 1 << 20 and "out of memory: continues with" in capsys.readouterr().err
    assert all(len(f) == 300 for f in found)
