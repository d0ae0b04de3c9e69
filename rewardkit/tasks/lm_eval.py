"""Any lm-eval task, on a local model, with local data if wanted: `gsm8k data=FOLDER shots=5`.

`evals/NAME.yaml` is looked up before lm-eval's own tasks, and without reading those: indexing 14,000 of them takes six
seconds. With data=, the splits that the task asks for are read from files instead of the Hub: `gsm8k_test.parquet`,
`test.jsonl` or `test-*.parquet`; a single file is the split that is measured. Numbers are lm-eval's own, under its default
seeds. Left out: tasks that run the model's code, and lm-eval's other backends (its vLLM one cannot use the CPU wheel).
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import spec as specs
from .. import tables
from ..errors import DataError, MissingExtra, ModelError, OptionError, need, unknown
from ..folders import digest, shipped
from . import DATA, TASKS, Result, slug, write_samples

SEED = 1234  # lm-eval's own default; seed=0 gives the numbers that its command line gives
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


def lm_eval(
    task: str,
    model: str,
    out: Path,
    limit: int | None,
    engine: str,
    data: str | None = None,
    shots: int | None = None,
    batch_size: int = 16,
    max_tokens: int | None = None,
    template: bool = False,
    seed: int = 0,
    label: str | None = None,
) -> Result:
    """Run one lm-eval task or group. template: ask in the model's chat template; label: another name for the result."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    need("lm_eval", "eval")
    loader, weights = _loader(engine), _weights(model)
    with _quiet():
        from lm_eval import evaluate

        parts, files = _find(task, data, shots)
        lm = load(*weights, batch_size, **loader)
        _room(parts, lm, max_tokens)
        _settings(parts, shots, max_tokens, seed)
        found = evaluate(
            lm=lm, task_dict=_loaded(parts), limit=limit, bootstrap_iters=1000,
            apply_chat_template=template, fewshot_as_multiturn=True,
        )  # fmt: skip
        assert found, "lm-eval returns nothing on ranks other than 0 only"
    name = slug(specs.Spec("lm_eval", {"task": task, "label": label}))
    single = len(found["samples"]) == 1
    rows = [row for part, samples in found["samples"].items() for row in _rows(samples, "" if single else f"{part}:")]
    write_samples(out, name, rows)
    return {
        "task": name,
        "n": len(rows),
        "metrics": _metrics(found["results"], single),
        "settings": {
            "lm_eval": need("lm_eval", "eval").__version__, "task": task, "data": files, "limit": limit, "template": template,
            "shots": found["n-shot"], "versions": found["versions"], "seed": seed, "batch_size": batch_size, **loader,
            "max_tokens": {t: _generates(p, max_tokens, lm) for t, p in _leaves(parts).items() if _generates(p, max_tokens, lm)},
            "truncated_prompts": _truncated(parts, lm, max_tokens),
        },
    }  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's logs down to errors, its prints to stderr: stdout carries only the path."""
    before = {name: logging.getLogger(name).level for name in ("lm_eval", "datasets", "transformers")}
    for name in before:
        logging.getLogger(name).setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        if os.environ.get("REWARDKIT_QUIET"):
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


# Tasks


def _find(task: str, data: str | None, shots: int | None) -> tuple[list[Any], dict[str, Any]]:
    """The lm-eval task objects behind a name, and what was read from `data` for them."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    own = shipped("evals") / f"{task}.yaml"
    config = _config(own) if re.fullmatch(r"[\w.-]+", task) and own.is_file() else None
    if config is None:
        manager = TaskManager()
        if task not in manager.task_index:
            raise _unknown(task, manager.all_tasks)
        if data is None:
            loaded = _build(task, lambda: manager.load(task))
            return [*(loaded["groups"].values() or loaded["tasks"].values())], {}
        file = manager.task_index[task].yaml_path
        config = _config(file) if file else {}
        if not isinstance(config.get("task"), str) or "class" in config:
            raise OptionError(f"task '{task}' is a group or a program, and data= is for one task; name one of its tasks")
    files: dict[str, Any] = {}
    if data is not None:
        config, files = _local(config, task, data, shots)
    return [_build(task, lambda: ConfigurableTask(config={k: v for k, v in config.items() if k not in ("tag", "group")}))], files


def _unknown(task: str, names: list[str]) -> OptionError:
    import difflib

    near = difflib.get_close_matches(task, [*TASKS, *names], n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else "`lm-eval ls tasks` lists them"
    return OptionError(f"unknown task '{task}': not {', '.join(TASKS)}, nor one of lm-eval's {len(names):,}; {hint}")


def _config(file: Path) -> dict[str, Any]:
    """A task file with its includes, each looked up beside the file and then in lm-eval's own task folder."""
    from lm_eval import tasks as theirs
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(file, recursive=False)
    includes = config.pop("include", [])
    merged: dict[str, Any] = {}
    for name in includes if isinstance(includes, list) else [includes]:
        places = [file.parent / name, Path(theirs.__file__).parent / name]
        place = next((p for p in places if p.is_file()), None)
        if not place:
            raise DataError(f"{file} includes {name}, which is neither beside it nor among lm-eval's tasks")
        merged |= _config(place)
    return merged | config


def _build(task: str, make: Any) -> Any:
    """Make task objects, which reads their data: say in one line why that does not work."""
    from datasets.exceptions import DatasetsError

    try:
        made = make()
    except ModuleNotFoundError as error:
        raise MissingExtra(f"task '{task}' needs {error.name}, which is not installed: pip install {error.name}") from None
    except (OSError, DatasetsError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"task '{task}' needs data from the Hub, which failed ({first}); give it data=FOLDER") from None
    for leaf in _leaves(made["tasks"].values() if isinstance(made, dict) else [made]).values():
        if getattr(leaf, "UNSAFE_CODE", False):
            raise OptionError(f"task '{task}' runs code that the model wrote, which rewardkit does not do")
    return made


def _leaves(parts: Any) -> dict[str, Any]:
    """Task objects by name; a group stands for the tasks in it."""
    found: dict[str, Any] = {}
    for part in parts:
        found |= {t.task_name: t for t in (part.get_all_tasks() if hasattr(part, "get_all_tasks") else [part])}
    return found


def _loaded(parts: Any) -> dict[str, Any]:
    """What lm-eval's own task manager returns."""
    groups = {g.name: g for part in parts if hasattr(part, "get_all_groups") for g in [part, *part.get_all_groups()]}
    return {"tasks": _leaves(parts), "groups": groups, "group_map": {name: g.child_names for name, g in groups.items()}}


def _settings(parts: Any, shots: int | None, max_tokens: int | None, seed: int) -> None:
    """What lm-eval's `simple_evaluate` sets before it evaluates; we call `evaluate` because the former also asks git."""
    import random

    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(SEED + seed)
    torch.manual_seed(SEED + seed)
    for task in _leaves(parts).values():
        if max_tokens and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value={"max_gen_toks": max_tokens}, update=True)
        default = task.get_config("num_fewshot")
        if default is None or (shots is not None and default != 0):  # a task that fixes 0 shots is not given any
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=SEED + seed)


# Local data


def _local(config: Mapping[str, Any], task: str, data: str, shots: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The task's config with its splits read from files, and the fingerprints of those."""
    named: dict[str, str] = {k: config[k] for k in SPLITS if config.get(k)}
    measured = named.get("test_split") or named.get("validation_split") or named.get("training_split") or "test"
    examples = named.get("fewshot_split") or named.get("training_split") or named.get("validation_split") or measured
    count = (config.get("num_fewshot") or 0) if shots is None else shots
    wanted = {measured, examples} if count else {measured}
    path = Path(data).expanduser()
    if path.is_dir():
        sources = {s: f for s in {*named.values(), *wanted} if (f := _file(path, task, s))}
    elif path.is_file():
        sources = {measured: [path]}
    else:
        raise DataError(f"task '{task}': there is no file or folder {data}")
    for split in sorted(wanted - sources.keys()):
        names = f"{task}_{split}.parquet, {split}.jsonl or {split}-*.parquet"
        hint = "; shots=0 needs none" if split != measured else ""
        raise DataError(f"task '{task}': {data} has no '{split}' split (looked for {names}){hint}")
    parts = {s: tables.open([str(f) for f in files]).require(*_columns(config)) for s, files in sources.items()}
    if count and parts[examples].rows < count + (examples == measured):
        few = f"{data} has {parts[examples].rows} rows to take {count} examples from"
        raise DataError(f"task '{task}': {few}; give a smaller shots=")

    def read(**_: Any) -> dict[str, Any]:
        import datasets

        return datasets.DatasetDict({s: datasets.Dataset.from_list(t.frame().collect().to_dicts()) for s, t in parts.items()})

    gone = {k: None for k, split in named.items() if split not in parts}
    facts = {s: {"files": [f.name for f in t.files], "rows": t.rows, "fingerprint": t.fingerprint} for s, t in parts.items()}
    return {**config, **gone, "test_split": measured, "custom_dataset": read, "dataset_kwargs": None}, facts


def _file(folder: Path, task: str, split: str) -> list[Path]:
    """The files of a split: named for the task first, then for the split alone."""
    plain = [f for f in sorted([*folder.iterdir(), *folder.glob("data/*"), *folder.glob(f"{task}/*")]) if f.name.endswith(DATA)]
    for pattern in (rf"{re.escape(task)}[_.-]{split}([-_.].*)?", rf"{split}([-_.].*)?"):
        if found := [f for f in plain if re.fullmatch(pattern, f.name)]:
            return found
    return []


def _columns(config: Mapping[str, Any]) -> list[str]:
    """The columns that the task's own templates name."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    named: set[str] = set()
    if config.get("process_docs"):
        return []  # the task makes its columns itself
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        with contextlib.suppress(TemplateSyntaxError):
            if isinstance(text := config.get(key), str):
                named |= meta.find_undeclared_variables(Environment().parse(text))
    return sorted(named - {"range", "zip", "enumerate", "len", "regex_replace"})


# The model


def _loader(engine: str) -> dict[str, Any]:
    """What the engine spec says about loading: lm-eval brings its own engine, on transformers."""
    one = specs.parse(engine)
    if one.name != "transformers":
        raise OptionError(f"lm-eval tasks run on engine=transformers, not '{one.name}'")
    for key in one.options:
        if key not in ("device", "dtype"):
            raise unknown("option of engine 'transformers' under lm-eval tasks", key, ["device", "dtype"])
    return one.options


def _weights(model: str) -> tuple[str, str | None, str]:
    """The folder (or Hub id) of the weights, the adapter on them, and a mark that changes when the folder does."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or (os.sep in model and folder.parent.is_dir()):
            raise ModelError(f"there is no model folder {model}")
        return model, None, ""
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{model} is not a model folder: it has no config.json")
    mark = digest([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.iterdir()) if f.is_file()])
    if not (folder / "config.json").is_file():
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
        return str(base), str(folder), mark
    return str(folder), None, mark


@functools.lru_cache(maxsize=1)
def load(path: str, adapter: str | None, mark: str, batch_size: int, device: str | None = None, dtype: str = "auto") -> Any:
    """lm-eval's transformers model. The last one is kept for the next task; `tasks.close` lets go of it."""
    import torch
    from lm_eval.models.huggingface import HFLM

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return HFLM(pretrained=path, peft=adapter, batch_size=batch_size, device=where, dtype=dtype)
    except (OSError, ValueError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"cannot load the model {path}: {first}") from None


def _generates(task: Any, max_tokens: int | None, lm: Any) -> int | None:
    """Longest answer in tokens; None for a task that only compares likelihoods."""
    if task.get_config("output_type") != "generate_until":
        return None
    return int(max_tokens or (task.get_config("generation_kwargs") or {}).get("max_gen_toks") or lm.max_gen_toks)


def _room(parts: Any, lm: Any, max_tokens: int | None) -> None:
    """lm-eval asserts that an answer fits into the model, after minutes; here it is said before."""
    for name, task in _leaves(parts).items():
        longest = _generates(task, max_tokens, lm) or 0
        if longest >= lm.max_length:
            held = f"the model holds {lm.max_length} in all"
            raise OptionError(f"task '{name}' asks for answers of {longest} tokens and {held}; give a smaller max_tokens=")


def _truncated(parts: Any, lm: Any, max_tokens: int | None) -> int:
    """Prompts that lost their beginning because the model is too short for them."""
    count = 0
    for task in _leaves(parts).values():
        longest = _generates(task, max_tokens, lm)
        texts = {i.args[0] for i in task.instances} if longest else set()
        count += sum(len(lm.tok_encode(text)) > lm.max_length - (longest or 0) for text in texts)
    return count


# Results


def _metrics(results: Mapping[str, Mapping[str, Any]], single: bool) -> dict[str, dict[str, float | None]]:
    """lm-eval's `exact_match,strict-match` as it is, `acc,none` as `acc`; in a group with the task's name before it."""
    found = {}
    for part, values in results.items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            name = ("" if single else f"{part}:") + _name(metric, kind)
            found[name] = {"value": float(value), "stderr": float(error) if isinstance(error, (int, float)) else None}
    return found


def _name(metric: str, kind: str) -> str:
    return metric if kind == "none" else f"{metric},{kind}"


def _rows(samples: list[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    """One row a question; lm-eval logs one a question and filter."""
    rows: dict[int, dict[str, Any]] = {}
    for sample in samples:
        texts = [r[0] if len(r) == 1 else r for r in sample["resps"]]
        row = rows.setdefault(sample["doc_id"], {
            "id": prefix + sample["doc_hash"][:16], "prompt": sample["arguments"][0][0],
            "response": texts[0] if len(texts) == 1 else texts, "target": sample["target"], "metrics": {},
        })  # fmt: skip
        for metric in sample["metrics"]:
            row["metrics"][prefix + _name(metric, sample["filter"])] = sample[metric]
    return list(rows.values())
