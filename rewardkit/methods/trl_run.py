"""What sft, dpo and reward_model share: rows for TRL, a model to train, one run that survives being killed, a clean folder.

The losses and the training loop are TRL's and transformers'. Left out: evaluation during training (that is `eval`),
trackers (`log.jsonl` has every step), sequence packing, and saving a sharded (FSDP, ZeRO-3) model in another dtype.

    weights    dtype=auto: fp32, with bf16 autocast on a GPU; float32: fp32 throughout; bfloat16: bf16 throughout.
               Saved in the dtype that the model had on disk; a LoRA adapter in fp32.
    a batch    batch_size rows an optimiser step = micro_batch_size x accumulation x processes (torchrun, accelerate)
    a row      longer than max_length is dropped and counted: a cut answer teaches a model to stop nowhere
    a kill     costs at most save_steps steps; on a CPU the weights come out the same
    the end    checkpoints go, or with keep_checkpoints=true stay as models, for `early_stop` to choose from
    LoRA       lora_rank puts an adapter on all linear layers; a model that is an adapter folder is trained on
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from .. import show
from ..errors import DataError, ModelError, OptionError
from ..tables import Messages, Row, Table, messages

Schedule = Literal["cosine", "linear", "constant"]
Dtype = Literal["auto", "float32", "bfloat16"]
STATE = "trainer_state.json"  # the last file that the trainer writes into a checkpoint
LONGEST_MICRO_BATCH = 8
TAIL = 10  # logged steps that a final figure is the mean of
# What architectures call their dropout.
DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout", "hidden_dropout_prob", "attn_pdrop")


@dataclass(frozen=True)
class Plan:
    """The settings that every method has."""

    model: str
    out: Path
    epochs: float
    learning_rate: float
    min_learning_rate: float
    schedule: Schedule
    warmup: float
    weight_decay: float
    batch_size: int
    micro_batch_size: int | None
    max_length: int
    max_steps: int
    lora_rank: int | None
    lora_alpha: int
    dropout: float
    dtype: Dtype
    checkpoint_activations: bool
    save_steps: int
    seed: int
    keep_checkpoints: bool = False

    @classmethod
    def of(cls, given: dict[str, Any]) -> Plan:
        """A method's `locals()`: the plan picks its settings by their names."""
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def micro(self) -> tuple[int, int]:
        """Rows in a forward pass of one process, and passes an optimiser step."""
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        each, rest = divmod(self.batch_size, processes)
        if rest or each < 1:
            raise OptionError(f"batch_size={self.batch_size} does not divide among {processes} processes")
        micro = self.micro_batch_size or max(n for n in range(1, min(each, LONGEST_MICRO_BATCH) + 1) if each % n == 0)
        if micro < 1 or each % micro:
            raise OptionError(f"micro_batch_size={micro} does not divide {each}, batch_size over {processes} process(es)")
        return micro, each // micro


# Rows


def gather(table: Table, read: Callable[[Row], Row | str], types: dict[str, Any]) -> tuple[Any, Counter[str]]:
    """The rows that `read` could use, as a `datasets` data set, and how often it gave which reason instead."""
    import datasets
    import pyarrow as pa

    schema = datasets.Features(types).arrow_schema
    chunks: list[Any] = [schema.empty_table()]
    reasons: Counter[str] = Counter()
    for batch in table.batches(10_000):
        found = [read(row) for row in batch]
        reasons.update(f for f in found if isinstance(f, str))
        chunks.append(pa.Table.from_pylist([f for f in found if isinstance(f, dict)], schema=schema))
    return datasets.Dataset(pa.concat_tables(chunks)), reasons


def message_type() -> Any:
    import datasets

    return datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})


def conversation(value: Any) -> Messages | None:
    """Messages, or None where there are none."""
    with contextlib.suppress(DataError):
        return messages(value) or None
    return None


def answer(value: Any, prompt: Messages) -> Messages | None:
    """A completion as messages, or None where nothing is said. Some data sets repeat the prompt in front of it."""
    found = [{"role": "assistant", "content": value}] if isinstance(value, str) else conversation(value)
    if found and found[: len(prompt)] == prompt:
        found = found[len(prompt) :]
    if not found or found[-1]["role"] != "assistant" or not found[-1]["content"].strip():
        return None
    return found


def pair(row: Row) -> Row | str:
    """Prompt, chosen and rejected of a preference row as messages, or why not."""
    prompt = conversation(row["prompt"])
    if not prompt:
        return "no prompt"
    chosen, rejected = answer(row["chosen"], prompt), answer(row["rejected"], prompt)
    if not chosen or not rejected:
        return "an empty answer"
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# Models


@dataclass
class Loaded:
    """A model to train, and what its folder on disk said before the settings changed it."""

    model: Any
    adapter: Any  # the LoraConfig of a new adapter, or None
    dtype: Any
    config: dict[str, Any]


def load(plan: Plan, kind: Literal["causal", "score"], frozen: bool = False) -> Loaded:
    """A causal language model, or a sequence classifier with one label; frozen: as a reference."""
    import torch
    import transformers
    from peft import PeftConfig, PeftModel

    transformers.set_seed(plan.seed)  # a new head and a new adapter are random
    adapter = (Path(plan.model) / "adapter_config.json").is_file()
    _same_rank(plan, adapter and not frozen)
    auto = transformers.AutoModelForCausalLM if kind == "causal" else transformers.AutoModelForSequenceClassification
    bf16 = plan.dtype == "bfloat16"
    try:
        base = str(PeftConfig.from_pretrained(plan.model).base_model_name_or_path) if adapter else plan.model
        labels = {"num_labels": 1} if kind == "score" else {}
        config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False, **labels)
        stored = getattr(config, "dtype", None) or torch.float32
        before = {k: getattr(config, k) for k in (*DROPOUTS, "use_cache") if hasattr(config, k)}
        for name in (k for k in before if k in DROPOUTS):
            setattr(config, name, 0.0 if frozen or plan.lora_rank else plan.dropout)
        model = auto.from_pretrained(
            base, config=config, dtype=torch.bfloat16 if bf16 else torch.float32, use_safetensors=True, trust_remote_code=False
        )
        if adapter:
            model = PeftModel.from_pretrained(model, plan.model, is_trainable=plan.lora_rank is not None and not frozen)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the model {plan.model}: {next(iter(str(error).splitlines()), '')}") from None
    if adapter and (plan.lora_rank is None or frozen):
        model = model.merge_and_unload().requires_grad_()  # type: ignore[operator]
    new = _lora(plan, plan.lora_rank, kind) if plan.lora_rank and not adapter and not frozen else None
    if bf16 and not plan.lora_rank and not frozen:
        _warn_rounding(model, plan.learning_rate)
    return Loaded(model, new, stored, before)


def _same_rank(plan: Plan, adapter: bool) -> None:
    """A folder that holds an adapter can be trained on at its own rank, or (lora_rank=none) be merged."""
    rank = json.loads((Path(plan.model) / "adapter_config.json").read_text()).get("r") if adapter else None
    if adapter and plan.lora_rank and rank != plan.lora_rank:
        known = f"{plan.model} is an adapter of rank {rank}"
        raise OptionError(f"{known}, not lora_rank={plan.lora_rank}; use its rank, or lora_rank=none to merge it")


def _lora(plan: Plan, rank: int, kind: str) -> Any:
    from peft import LoraConfig, TaskType

    task = TaskType.CAUSAL_LM if kind == "causal" else TaskType.SEQ_CLS
    return LoraConfig(r=rank, lora_alpha=plan.lora_alpha, lora_dropout=plan.dropout, target_modules="all-linear", task_type=task)


def _warn_rounding(model: Any, learning_rate: float) -> None:
    """An Adam step is about the learning rate; bf16 loses what is below 2^-9 of the weight it is added to (SPEC A.4)."""
    sizes = sorted(p.detach().abs().float().median().item() for p in model.parameters() if p.ndim > 1)
    if sizes and learning_rate < sizes[len(sizes) // 2] / 512:
        show.say(f"dtype=bfloat16: most steps of size {learning_rate:g} are rounded away; use dtype=auto, or LoRA")


def stops(model: Any, tokenizer: Any) -> None:
    """Generation ends with the tokenizer's end token, also where the base never said so; padding as the tokenizer pads."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    generation = model.generation_config
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    if tokenizer.eos_token_id not in ends:
        ends = [e for e in ends if e is not None] + [tokenizer.eos_token_id]
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
    try:
        generation.validate(strict=True)
    except ValueError:
        # Some published models carry a temperature but no do_sample; transformers then refuses to save.
        generation.do_sample = True


# The run


class Quiet:
    """Mixed into TRL's trainers: nothing is sent anywhere, and no card is written (`publish` renders the card)."""

    def _send_telemetry(self) -> None:
        pass

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        pass


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the bars and tables of transformers and datasets; the caller's settings come back."""
    import datasets

    from .. import models

    rows = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with models.quiet():
            yield
    finally:
        if not rows:
            datasets.enable_progress_bars()


def arguments(plan: Plan, kind: Any, **own: Any) -> Any:
    """TRL's configuration for a plan; `own`: what only this method has."""
    import torch

    micro, accumulation = plan.micro()
    if plan.schedule != "constant" and plan.min_learning_rate >= plan.learning_rate:
        raise OptionError(f"min_learning_rate={plan.min_learning_rate:g} is not below learning_rate={plan.learning_rate:g}")
    gpu = torch.cuda.is_available()
    name: str = "constant_with_warmup" if plan.schedule == "constant" else plan.schedule
    extra: dict[str, float] = {}
    if plan.min_learning_rate and plan.schedule == "cosine":
        name, extra = "cosine_with_min_lr", {"min_lr": plan.min_learning_rate}
    elif plan.min_learning_rate and plan.schedule == "linear":
        name, extra = "polynomial", {"lr_end": plan.min_learning_rate, "power": 1.0}
    return kind(
        output_dir=str(plan.checkpoints), per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation,
        num_train_epochs=plan.epochs, max_steps=plan.max_steps, learning_rate=plan.learning_rate, weight_decay=plan.weight_decay,
        lr_scheduler_type=name, lr_scheduler_kwargs=extra or None, warmup_steps=plan.warmup,
        use_cpu=not gpu, bf16=gpu and plan.dtype == "auto", gradient_checkpointing=plan.checkpoint_activations,
        save_strategy="steps", save_steps=plan.save_steps, save_total_limit=None if plan.keep_checkpoints else 1,
        logging_strategy="steps", logging_steps=1, report_to="none", disable_tqdm=True, dataloader_pin_memory=gpu,
        seed=plan.seed, **own,
    )  # fmt: skip


def keep_short(trainer: Any, plan: Plan, length: Callable[[Row], int]) -> int:
    """Drop the tokenised rows that are longer than max_length or the model's positions; how many."""
    config = trainer.model.config.get_text_config()
    longest = min(plan.max_length, getattr(config, "max_position_embeddings", None) or plan.max_length)
    rows = trainer.train_dataset
    trainer.train_dataset = rows.filter(lambda row: length(row) <= longest)
    return len(rows) - len(trainer.train_dataset)


def some(rows: Any, table: Table, reasons: Counter[str]) -> None:
    """Refuse to train on nothing."""
    if not len(rows):
        why = ", ".join(f"{n:,} dropped: {reason}" for reason, n in reasons.items()) or "it is empty"
        raise DataError(f"no rows left to train on in {table.name} ({why})")


def run(trainer: Any, plan: Plan, loaded: Loaded, table: Table, reasons: Counter[str], label: str) -> dict[str, Any]:
    """Train, continuing after the last complete checkpoint, save into the folder, return the facts for the manifest."""
    import torch
    from transformers import PrinterCallback
    from transformers.trainer_utils import get_last_checkpoint

    some(trainer.train_dataset, table, reasons)
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which carries only the path a verb returns
    first = trainer.accelerator.is_main_process
    if first:
        _drop_incomplete(plan.checkpoints)
    trainer.accelerator.wait_for_everyone()
    last = get_last_checkpoint(plan.checkpoints) if plan.checkpoints.is_dir() else None
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        if first:
            trainer.add_callback(_watch(stack, plan.out / "log.jsonl", label))
        trainer.train(resume_from_checkpoint=last)
    seconds = time.monotonic() - started
    _save(trainer, plan, loaded)
    gpu = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    used, dropped = len(trainer.train_dataset), sum(reasons.values())
    return {
        "rows": {"in": used + dropped, "used": used, "dropped": dropped},
        "reasons": dict(reasons),
        "base_model": plan.model,
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "train_loss": tail(trainer, "loss"),
        "tokens_per_second": round(trainer._total_train_tokens / seconds, 1),
        "lora": None if plan.lora_rank is None else {"rank": plan.lora_rank, "alpha": plan.lora_alpha},
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "processes": trainer.accelerator.num_processes,
        "peak_memory_bytes": peak,
    }


def tail(trainer: Any, key: str) -> float | None:
    """The mean of a logged figure over the last ten steps; it survives a resume, as the log is in the checkpoint."""
    values = [entry[key] for entry in trainer.state.log_history if key in entry][-TAIL:]
    return sum(values) / len(values) if values else None


def _watch(stack: contextlib.ExitStack, log: Path, label: str) -> Any:
    """One bar on stderr and one line a step in log.jsonl."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # After a kill the log may know steps that the checkpoint does not; they come again.
            log.write_text("".join(json.dumps(entry) + "\n" for entry in state.log_history))
            self.advance = stack.enter_context(show.progress(label, state.max_steps, "steps", done=state.global_step))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.advance(1)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                with log.open("a") as file:
                    file.write(json.dumps(state.log_history[-1]) + "\n")

    return Watch()


def _drop_incomplete(folder: Path) -> None:
    """A kill while a checkpoint is written leaves a folder without its last file; it must not be resumed from."""
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / STATE).read_text())
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)


def _save(trainer: Any, plan: Plan, loaded: Loaded) -> None:
    """Weights, config, tokenizer and chat template into the folder; the checkpoints go."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "peft_config"):
        _whole_base(model)
    else:
        for name, value in loaded.config.items():
            setattr(model.config, name, value)
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            model.to(loaded.dtype)
    trainer.save_model(str(plan.out))
    trainer.accelerator.wait_for_everyone()
    if not trainer.accelerator.is_main_process:
        return
    for name in ("training_args.bin", "README.md"):  # a pickle and PEFT's card; the manifest and `publish` say the same
        (plan.out / name).unlink(missing_ok=True)
    # Checkpoints first stop being complete, so that a kill between two files leaves nothing to resume from.
    for state in plan.checkpoints.glob(f"checkpoint-*/{STATE}"):
        state.unlink()
    if not plan.keep_checkpoints:
        shutil.rmtree(plan.checkpoints, ignore_errors=True)
    for path in [p for p in plan.checkpoints.glob("checkpoint-*/*") if p.suffix in (".pt", ".pth", ".bin")]:
        path.unlink()  # optimiser and random states, pickles of no further use; a model is left


def _whole_base(model: Any) -> None:
    """The adapter names its base so that it is found from any working directory."""
    for adapter in model.peft_config.values():
        if Path(adapter.base_model_name_or_path).is_dir():
            adapter.base_model_name_or_path = str(Path(adapter.base_model_name_or_path).resolve())
