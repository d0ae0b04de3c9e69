"""The peer of benchmarks/ppo.py: `trl.experimental.ppo` of trl 1.12.0, the last release that has one. Run by that script.

    python benchmarks/peer_ppo.py MODEL PROMPTS.jsonl SETTINGS.json        prints one JSON line: seconds of every update

The reward model is one layer of width 8 with the same vocabulary, so that the reward costs next to nothing.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"


def main() -> None:
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        LlamaConfig,
        LlamaForSequenceClassification,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    model, prompts, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    with open(prompts) as file:
        rows = [json.loads(line)["prompt"] for line in file]
    dataset = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in rows])
    gpu = torch.cuda.is_available()

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.monotonic())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            self.ends.append(time.monotonic())

    policy, reference = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2))
    value = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    small = LlamaConfig(
        vocab_size=policy.config.vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder, per_device_train_batch_size=settings["micro"], num_mini_batches=settings["minibatches"],
            gradient_accumulation_steps=settings["batch"] // settings["micro"],  # TRL's batch is what accumulates to
            total_episodes=settings["batch"] * settings["updates"], num_ppo_epochs=1, response_length=settings["tokens"],
            local_rollout_forward_batch_size=settings["batch"], temperature=1.0, kl_coef=0.2, learning_rate=1e-6,
            num_sample_generations=0, stop_token="eos", report_to="none", save_strategy="no", use_cpu=not gpu, bf16=gpu,
            logging_steps=1,
        )  # fmt: skip
        trainer = PPOTrainer(
            config, processing_class=tokenizer, model=policy, ref_model=reference,
            reward_model=LlamaForSequenceClassification(small), value_model=value, train_dataset=dataset, callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    print(json.dumps([b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)]))


if __name__ == "__main__":
    main()
