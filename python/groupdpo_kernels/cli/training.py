"""Runs preference training in a folder: settings, checkpoints, a report, a picture. The same call again resumes it.

    output_dir/run.json          what the run depends on: settings, and hashes of model, tokenizer and data
    output_dir/ref_logps/        the reference's log-probabilities, scored once before the first step
    output_dir/checkpoint-N/     the last two; one that was cut short by a kill is removed
    output_dir/model/            the trained model (or adapter) and its tokenizer
    output_dir/report.json, curves.png

The steps are those of `trainers.GroupDPOTrainer`, a transformers.Trainer, whose checkpoints, schedules, adapters and
mixed precision another loop would have to repeat.

Under `torchrun` or `accelerate launch` all ranks run the same settings; the first one writes the report and speaks.
FSDP and DeepSpeed are those of `accelerate launch`, or of `fsdp` and `deepspeed` among the options of training.

A run never trains on other data, settings or weights than those that the folder was begun with, or shows a half-written
model under its name. A second run in the folder at the same time is refused. It needs a disk that all ranks see. The
cost is the trainer's, and a hash of weights and data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checks import check_kind, one_of
from ..files import check_writable, locked_folder, write_json
from ..preference.objective import AdaBalance, Objective
from ..stepwise.store import description, digest, file_digest, tensor_digests
from .curves import draw
from .inspection import versions
from .loading import check_fit, device_of, existing, jsonl, load_model, load_tokenizer, once, tokenizer_digest

SECTIONS = ("objective", "lora", "training")
# Options that few losses use. `Objective` ignores them with other losses; a run refuses them.
USED_BY = {
    "label_smoothing": ("sigmoid", "robust", "exo_pair"),
    "gamma": ("simpo",),
    "alpha": ("rdpo",),
    "tau": ("discopop",),
}


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The settings of a run. A file has these names at its top, and the last three as tables.

    Args:
        model: the model's folder or hub name, or a config.json, whose weights are then drawn at random.
        data: JSONL file of preferences to train on, in a format of `data.FORMATS`: pairs, sets, ratings, ranks.
        output_dir: folder of the run; a run that it holds is resumed.
        eval_data: JSONL file of held-out preferences, for evaluation.
        tokenizer: the tokenizer's folder or hub name; the model's by default.
        device: device that trains: auto, cpu or cuda.
        dtype: data type of the weights: float32, bfloat16, float16, or auto (as saved).
        objective: the fields of `Objective`, with those of `AdaBalance` (or true) as balance. An option that the loss
            does not use is refused.
        lora: the fields of peft.LoraConfig; target_modules is "all-linear" by default. None trains all weights.
        training: the fields of `GroupDPOConfig`, and so of transformers.TrainingArguments. A step takes
            per_device_train_batch_size x gradient_accumulation_steps groups.
    """

    model: str
    data: str
    output_dir: str
    eval_data: str | None = None
    tokenizer: str | None = None
    device: str = "auto"
    dtype: str = "float32"
    objective: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lora: Mapping[str, Any] | None = None
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "data", "output_dir", "eval_data", "tokenizer", "device", "dtype"):
            value = getattr(self, name)
            if value is not None or name not in ("eval_data", "tokenizer"):
                check_kind(name, value, str, "text")
        for name in SECTIONS:
            if getattr(self, name) is not None or name != "lora":
                check_kind(name, getattr(self, name), Mapping, "a table")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a .toml or .json file; what is missing is left to flags and defaults."""
    existing("config", path)
    try:
        if path.suffix == ".toml":
            found = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli").loads(
                path.read_text(encoding="utf-8")
            )
        elif path.suffix == ".json":
            found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
        else:
            raise ValueError("its name must end in .toml or .json")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config {path}: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"config {path}: must be an object; got a {type(found).__name__}")
    check_names("config", found, [field.name for field in dataclasses.fields(TrainSettings)])
    for name in SECTIONS:
        if found.get(name) is not None and not isinstance(found[name], dict):
            raise ValueError(f"config {path}: {name} must be a table; got {found[name]!r:.60}")
    return found


def check_names(what: str, given: Mapping[str, Any], known: list[str]) -> None:
    """ValueError for a name in `given` that is not in `known`."""
    import difflib

    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(known[:30])}"
            raise ValueError(f"{what} has no option {name!r}; {hint}")


def make_objective(given: Mapping[str, Any]) -> Objective:
    options = dict(given)
    check_names("objective", options, [field.name for field in dataclasses.fields(Objective)])
    balance = options.get("balance")
    if isinstance(balance, Mapping):
        check_names("objective.balance", balance, [field.name for field in dataclasses.fields(AdaBalance)])
        options["balance"] = AdaBalance(**balance)
    elif isinstance(balance, bool):
        options["balance"] = AdaBalance() if balance else None
    try:
        objective = Objective(**options)
    except TypeError as error:  # text in place of a number
        raise TypeError(f"objective must have numbers for numbers; got {options}: {error}") from None
    for name, losses in USED_BY.items():
        if options.get(name) is not None and objective.loss not in losses:
            raise ValueError(
                f"{name} must be left out with loss {objective.loss!r}, which does not use it"
                f" ({', '.join(losses)} {'does' if len(losses) == 1 else 'do'}); got {options[name]}"
            )
    return objective


# ------------------------------------------------------------------------------------------------------------ the run


@dataclasses.dataclass
class Listener:
    """Functions that a run calls with its progress; each does nothing unless it is given."""

    note: Callable[[str], None] = lambda line: None
    step: Callable[[int, int, dict[str, float]], None] = lambda done, total, numbers: None


def train(settings: TrainSettings, listener: Listener | None = None) -> dict[str, Any]:
    """Runs or resumes training to its end, and returns the content of report.json.

    Raises ValueError, TypeError or OSError before the first step for whatever is wrong with the settings, the data,
    the model or the folder.
    """
    from ..trainers.checkpoints import last_checkpoint
    from ..trainers.engines import engine_asked, not_sharded_by_transformers

    listener = listener or Listener()
    one_of("device", settings.device, ("auto", "cpu", "cuda"))
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if alone and settings.device != "cpu" and torch.cuda.device_count() > 1:
        raise ValueError(
            f"train takes one GPU a process; torch finds {torch.cuda.device_count()}: start it with accelerate launch,"
            " or set CUDA_VISIBLE_DEVICES"
        )
    objective = make_objective(settings.objective)
    folder, data = Path(settings.output_dir), {"train": existing("data", Path(settings.data))}
    if settings.eval_data is not None:
        data["eval"] = existing("eval_data", Path(settings.eval_data))
    config = _make_config(settings, objective)
    rows = {name: list(jsonl(path)) for name, path in data.items()}
    for name, found in rows.items():
        if not found:
            raise ValueError(f"{data[name]} must hold at least one row; it is empty")
    tokenizer = load_tokenizer(settings.model if settings.tokenizer is None else settings.tokenizer)
    token_hash = tokenizer_digest(tokenizer)
    # An engine takes the whole model, and shards it when training begins.
    device = torch.device("cpu") if engine_asked(config) else config.device if not alone else device_of(settings.device)
    with not_sharded_by_transformers():
        model = load_model(settings.model, settings.dtype, device, config.seed)
    check_fit(model, tokenizer)
    identity = {
        "model": digest([description(model), tensor_digests(model)]),
        "tokenizer": token_hash,
        **{f"{name} data": file_digest(path) for name, path in data.items()},
        "settings": _plain(settings),
    }
    if (done := _earlier(folder, identity)) is not None:
        listener.note(f"{folder} holds the whole run already")
        return done
    with contextlib.ExitStack() as held:
        if int(os.environ.get("RANK", 0)) == 0:
            check_writable(folder)
            held.enter_context(locked_folder(folder))
        with wider_log(listener):
            trainer = _make_trainer(model, config, objective, settings, rows, tokenizer, listener)
        ranks = trainer.accelerator
        ranks.wait_for_everyone()  # every rank has looked at what the folder holds
        if ranks.is_main_process:
            write_json(folder / "run.json", identity)  # last, so that a refused run does not claim the folder
            _remove_incomplete(folder)
        ranks.wait_for_everyone()
        for name in data:
            listener.note(f"{data[name]}: {trainer.report[name]}")
        checkpoint, began = last_checkpoint(folder), time.perf_counter()
        if checkpoint is not None:
            listener.note(f"going on from {checkpoint}")
        trainer.train(resume_from_checkpoint=checkpoint)
        if "eval" in data and not any(row["step"] == trainer.state.global_step for row in _evaluations(trainer)):
            trainer.evaluate()
        _save_model(trainer, folder / "model")
        report = _report(trainer, identity, time.perf_counter() - began, checkpoint)
        title = f"{objective.loss}, {report['steps']} steps of {report['groups_per_step']} groups, {settings.model}"
        if ranks.is_main_process:
            draw(report["history"], folder / "curves.png", title)
            write_json(folder / "report.json", report)
        ranks.wait_for_everyone()
        return report


def _make_config(settings: TrainSettings, objective: Objective) -> Any:
    """The GroupDPOConfig of the settings' options, with defaults that suit a command line."""
    from ..trainers.config import GroupDPOConfig

    given = dict(settings.training)
    ours = ["output_dir", "resume_from_checkpoint", "push_to_hub", "disable_tqdm", "use_cpu", "save_strategy"]
    ours += ["logging_first_step"]
    known = [field.name for field in dataclasses.fields(GroupDPOConfig) if field.init and field.name not in ours]
    check_names("training", given, known)
    if settings.eval_data is None:
        for name in (name for name in given if name.startswith(("eval_", "per_device_eval_", "load_best_"))):
            raise ValueError(f"training.{name} must be left out without eval_data; got {given[name]!r}")
    on_gpu = device_of(settings.device).type == "cuda"
    defaults = {
        "logging_steps": 1,
        "save_steps": 100,
        "save_total_limit": 2,
        "report_to": [],
        "bf16": on_gpu,
        "gradient_checkpointing": on_gpu,  # it trades time for memory, of which a CPU has plenty
        "precompute_ref_log_probs": objective.needs_reference,
        "eval_strategy": "no" if settings.eval_data is None else "epoch",
    }
    if (limit := given.get("save_total_limit", 2)) is not None and limit < 2:
        raise ValueError(f"training.save_total_limit must be at least 2: one may be cut short; got {limit}")
    if given.get("logging_strategy") == "no":
        raise ValueError("training.logging_strategy must be steps or epoch: the report is made of the log; got 'no'")
    fixed = {"output_dir": settings.output_dir, "disable_tqdm": True, "use_cpu": not on_gpu, "save_strategy": "steps"}
    fixed |= {"logging_first_step": True}  # so that the log has a row, however few the steps
    return GroupDPOConfig(**{**defaults, **given, **fixed})


def _make_trainer(
    model: Any,
    config: Any,
    objective: Objective,
    settings: TrainSettings,
    rows: dict[str, list[dict[str, Any]]],
    tokenizer: Any,
    listener: Listener,
) -> Any:
    from transformers import PrinterCallback, TrainerCallback

    from ..trainers.group_dpo import GroupDPOTrainer

    class Telling(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            listener.step(state.global_step, state.max_steps, dict(logs or {}))

    adapter = None
    if settings.lora is not None:
        from peft import LoraConfig

        options = {"target_modules": "all-linear", **settings.lora}
        check_names("lora", options, [field.name for field in dataclasses.fields(LoraConfig)])
        adapter = LoraConfig(task_type="CAUSAL_LM", **options)
    trainer = GroupDPOTrainer(
        model,
        args=config,
        train_dataset=rows["train"],
        eval_dataset=rows.get("eval"),
        processing_class=tokenizer,
        objective=objective,
        peft_config=adapter,
        callbacks=[Telling()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextlib.contextmanager
def wider_log(listener: Listener) -> Iterator[None]:
    """A context that passes the progress of scoring the reference on to the listener."""
    import logging

    class Passing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            listener.note(f"reference: {record.getMessage()}")

    logger, handler = logging.getLogger("groupdpo_kernels.stepwise.stages"), Passing()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


# ---------------------------------------------------------------------------------------------------------- the folder


def _plain(settings: TrainSettings) -> dict[str, Any]:
    """The settings as JSON gives them back, without paths."""
    found = json.loads(json.dumps(dataclasses.asdict(settings)))
    for name in ("output_dir", "model", "data", "eval_data", "tokenizer"):  # their hashes count, not their names
        found.pop(name)
    return found


def _earlier(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The report of a complete earlier run, or None. ValueError for a run of other settings, data or weights."""
    note = folder / "run.json"
    if not note.exists():
        if (folder / "report.json").exists() or [*folder.glob("checkpoint-*")]:
            raise ValueError(f"output_dir must be empty or hold a run; {folder} holds another trainer's")
        return None
    try:
        begun = dict(json.loads(note.read_bytes()))
    except (ValueError, TypeError):
        raise ValueError(f"{note} must be the note of a run; it is not: give another output_dir") from None
    for name in [*begun, *identity]:
        if (was := begun.get(name)) != (now := identity.get(name)):
            what = "; ".join(_changes(was, now)) if name == "settings" else f"the {name} has changed"
            raise ValueError(f"{folder} was begun otherwise: {what}; give another output_dir, or delete this one")
    report = folder / "report.json"
    try:
        return dict(json.loads(report.read_bytes())) if report.exists() else None
    except (ValueError, TypeError):
        raise ValueError(
            f"{report} must be the report of a run; it is not: delete it, and it is written again"
        ) from None


def _changes(was: Any, now: Any, name: str = "") -> Iterator[str]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*was, *now)):
            yield from _changes(was.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif was != now:
        yield f"{name} was {was!r} and is {now!r}"


def _remove_incomplete(folder: Path) -> None:
    """Removes checkpoints that a kill has cut short: they take room, and nobody reads them."""
    from ..trainers.checkpoints import NOTE

    for path in folder.glob("checkpoint-*"):
        if not (path / NOTE).exists():
            shutil.rmtree(path)


def _save_model(trainer: Any, place: Path) -> None:
    """Saves the model beside its place, then renames it: what is at the place is whole, or nothing is there."""
    beside, before = (place.with_name(f".{place.name}.{end}") for end in ("tmp", "old.tmp"))
    ranks = trainer.accelerator
    if ranks.is_main_process:
        for path in (beside, before):
            shutil.rmtree(path, ignore_errors=True)
    ranks.wait_for_everyone()
    try:
        trainer.save_model(str(beside))
    except Exception as error:  # of safetensors or torch, which do not say where
        shutil.rmtree(beside, ignore_errors=True)
        raise OSError(
            f"{place} cannot be written: {error}; the same command goes on from the last checkpoint"
        ) from error
    ranks.wait_for_everyone()
    if ranks.is_main_process:
        if place.exists():  # a folder cannot be removed at once, but renamed
            os.replace(place, before)
        os.replace(beside, place)
        shutil.rmtree(before, ignore_errors=True)


def _report(trainer: Any, identity: dict[str, Any], seconds: float, checkpoint: str | None) -> dict[str, Any]:
    from ..trainers.engines import size_of

    history = [row for row in trainer.state.log_history if "loss" in row or "eval_loss" in row]
    parameters = list(trainer.model.parameters())
    curve = [row for row in history if "loss" in row]
    last = curve[-max(1, len(curve) // 10) :]
    names = [name for name, value in curve[-1].items() if isinstance(value, (int, float)) and name != "step"]
    report = {
        "steps": trainer.state.global_step,
        "groups_per_step": trainer.args.train_batch_size
        * trainer.args.gradient_accumulation_steps
        * trainer.args.world_size,
        "parameters": sum(map(size_of, parameters)),
        "trainable_parameters": sum(size_of(p) for p in parameters if p.requires_grad),
        "device": str(trainer.args.device),
        "seconds": round(seconds, 2),
        "resumed_from": None if checkpoint is None else Path(checkpoint).name,
        "data": {name: vars(report) for name, report in trainer.report.items()},
        "first": curve[0],
        "last": {
            "mean_of_steps": len(last),
            **{n: math.fsum(row.get(n, 0.0) for row in last) / len(last) for n in names},
        },
        "evaluation": next(reversed(_evaluations(trainer)), None),
        "run": identity,
        "versions": versions(),
        "history": history,
    }
    return _without_nan(report)


def _evaluations(trainer: Any) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if "eval_loss" in row]


def _without_nan(x: Any) -> Any:
    """The value with None for every number that is not finite, as JSON has no NaN."""
    if isinstance(x, dict):
        return {name: _without_nan(value) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_without_nan(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
