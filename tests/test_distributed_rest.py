"""What runs on several processes besides a step: checkpoints on another number of ranks, whole weights on disk, a rank
that is killed or raises, TRL's pairs, the stages of sDPO, the command line; and the memory of a step on a rank.
`make test-distributed` runs it.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers
from collectives import units
from datasets import Dataset
from engine_runs import (
    Case,
    engine_options,
    flat,
    make_trainer,
    one_process,
    results,
    run_all,
    share_of_rank,
    start_ranks,
    whole_weights,
)
from processes import run_script
from prompt_groups import groups_of
from safetensors.torch import load_file
from tiny_cli import PREFERENCES, save_model, write_rows
from tiny_models import make
from tiny_trl import COMMON, PAIRS, PROMPTS, lora, trainable
from torch.distributed.device_mesh import init_device_mesh

from groupdpo_kernels.cli.training import TrainSettings
from groupdpo_kernels.cli.training import train as command
from groupdpo_kernels.memory.rss import forget_peak, resident, return_freed_memory
from groupdpo_kernels.memory.workload import TrainingStep, Workload, build_model
from groupdpo_kernels.models.paired_prompts import PairedPrompts
from groupdpo_kernels.trainers import DPOTrainer, GroupDPOConfig, StepwiseDPO

pytestmark = pytest.mark.distributed

# Adam has a state to resume. Its eps is large, so that it does not divide small gradients by their own size.
SAVES = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "adam_epsilon": 1e-2, "learning_rate": 5e-3}
SAVED = {
    "fsdp2 full": ("fsdp2", "FULL_STATE_DICT", False),
    "fsdp2 sharded": ("fsdp2", "SHARDED_STATE_DICT", False),
    "fsdp2 adapter": ("fsdp2", "SHARDED_STATE_DICT", True),
    "zero 2": ("zero2", "", False),
    "zero 3": ("zero3", "", False),
}


def off(found: dict[str, torch.Tensor], one: tuple[Any, torch.Tensor, torch.Tensor]) -> float:
    """How far weights are off those of one process, relative to its way."""
    trainer, start, expected = one
    return float((flat(found, trainer) - expected).norm() / (expected - start).norm())


# ---------------------------------------------------------------------------------------------------------- checkpoints


def train_and_save(engine: str, case: Case, kind: str, folder: str) -> Any:
    options = share_of_rank(engine) | (engine_options(engine, kind) if kind else {})
    trainer = make_trainer(case, folder, **options)
    trainer.train()
    trainer.save_model(f"{folder}/model")
    return whole_weights(trainer)


def resume(engine: str, case: Case, kind: str, folder: str, **more: Any) -> Any:
    """Goes on from the checkpoint of the first step, on as many ranks as there are now."""
    options = share_of_rank(engine) | (engine_options(engine, kind) if kind else {})
    options.get("deepspeed", {}).update(more)
    trainer = make_trainer(case, folder, **options)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-1")
    assert trainer.state.global_step == 2
    return whole_weights(trainer)


def resume_universal(engine: str, case: Case, kind: str, folder: str) -> Any:
    return resume(engine, case, kind, folder, checkpoint={"load_universal": True})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of runs of two ranks, and the run of one process with each."""
    folder = tmp_path_factory.mktemp("saved")
    for family in ("fsdp2", "zero"):
        jobs = {}
        for name, (engine, kind, adapter) in SAVED.items():
            if engine.startswith(family):
                case = Case(engine, adapter, options=SAVES)
                jobs[name] = (engine, train_and_save, (case, kind, str(folder / name)))
        start_ranks(run_all, 2, str(folder), jobs)
    alone = {
        adapter: one_process(Case("", adapter, options={**SAVES, "save_strategy": "no"}), folder)
        for adapter in (False, True)
    }
    return folder, alone


@pytest.mark.parametrize("name", SAVED)
def test_saved_models_are_whole(name: str, saved: Any) -> None:
    (folder, alone), adapter = saved, SAVED[name][2]
    assert off(results(folder, name, 2)[0], alone[adapter]) < 5e-6
    one = alone[adapter][0].accelerator.unwrap_model(alone[adapter][0].model)
    start = alone[adapter][1]
    if adapter:
        import peft

        model = peft.PeftModel.from_pretrained(make("llama"), folder / name / "model", is_trainable=True)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / name / "model")
    found = dict(model.named_parameters())
    gap = torch.cat([(found[n] - p).flatten() for n, p in one.named_parameters() if p.requires_grad]).norm()
    assert gap < 5e-6 * (trainable(alone[adapter][0]) - start).norm()


@pytest.mark.parametrize("world", [1, 4])
def test_checkpoints_go_on_with_another_number_of_ranks(world: int, saved: Any, tmp_path: Path) -> None:
    """Under FSDP2."""
    folder, alone = saved
    jobs: dict[str, Any] = {}
    for name, (engine, kind, adapter) in SAVED.items():
        if engine == "fsdp2":
            case = Case(engine, adapter, options={**SAVES, "save_strategy": "no"})
            jobs[name] = (engine, resume, (case, kind, str(folder / name)))
    start_ranks(run_all, world, str(tmp_path), jobs)
    for name in jobs:
        assert off(results(tmp_path, name, world)[0], alone[SAVED[name][2]]) < 5e-6


def test_deepspeeds_checkpoints_are_of_one_number_of_ranks(saved: Any, tmp_path: Path) -> None:
    """Those that DeepSpeed's own script has made universal are of any number, but for ZeRO 3."""
    for name, job, message in (
        ("zero 2", resume, "under DeepSpeed; got {}/checkpoint-1, of 2, on 1. Instead make a universal checkpoint"),
        ("zero 3", resume, "under DeepSpeed; got {}/checkpoint-1, of 2, on 1. Instead start from the whole weights"),
        ("zero 3", resume_universal, "checkpoint.load_universal must be false under ZeRO 3"),
    ):
        place = saved[0] / name
        arguments = Case(SAVED[name][0], options={**SAVES, "save_strategy": "no"}), "", str(place)
        with pytest.raises(RuntimeError):
            start_ranks(run_all, 1, str(tmp_path), {"refused": (SAVED[name][0], job, arguments)})
        assert message.format(place) in torch.load(tmp_path / "refused.0.pt")

    place = tmp_path / "run"
    shutil.copytree(saved[0] / "zero 2" / "checkpoint-1", place / "checkpoint-1")
    states = place / "checkpoint-1" / "global_step1"
    folders = ["--input_folder", states, "--output_folder", f"{states}_universal"]
    made = run_script("-m", "deepspeed.checkpoint.ds_to_universal", *folders, "--inject_missing_state")
    assert made.returncode == 0, made.stderr
    arguments = Case("zero2", options={**SAVES, "save_strategy": "no"}), "", str(place)
    start_ranks(run_all, 1, str(tmp_path), {"resumed": ("zero2", resume_universal, arguments)})
    assert off(results(tmp_path, "resumed", 1)[0], saved[1][False]) < 5e-6


class Killed(transformers.TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 1 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(engine: str, case: Case, kind: str, folder: str) -> None:
    trainer = make_trainer(case, folder, **share_of_rank(engine))
    trainer.add_callback(Killed())
    trainer.train()


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_killed_run_goes_on_to_the_same_weights(engine: str, saved: Any, tmp_path: Path) -> None:
    case = Case(engine, options=SAVES)
    arguments = case, "", str(tmp_path / "run")
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="SIGKILL"):
        start_ranks(run_all, 2, str(tmp_path), {"killed": (engine, train_until_killed, arguments)})
    assert time.monotonic() - began < 120
    start_ranks(run_all, 2, str(tmp_path), {"resumed": (engine, resume, arguments)})
    assert off(results(tmp_path, "resumed", 2)[0], saved[1][False]) < 5e-6


# --------------------------------------------------------------------------------------------------- a rank that raises


def raising(engine: str, folder: str) -> Any:
    """The model of rank 1 raises in the second step."""
    rank = os.environ["RANK"]
    logging.getLogger("groupdpo_kernels").addHandler(logging.FileHandler(f"{folder}/log.{rank}"))
    trainer = make_trainer(Case(engine), folder, **share_of_rank(engine))

    def look(module: Any, args: Any, named: Any) -> None:
        if trainer.state.global_step == 1 and rank == "1":
            raise ValueError("this rank raises")

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    trainer.train()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_a_rank_that_raises_ends_all(engine: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        start_ranks(run_all, 2, str(tmp_path), {"raising": (engine, raising, (str(tmp_path),))})
    assert time.monotonic() - began < 120
    assert "this rank raises" in torch.load(tmp_path / "raising.1.pt")
    assert "rank 1 stops in the step of rows [" in (tmp_path / "log.1").read_text()


# ------------------------------------------------------------------------------------------- pairs, stages, the command


def pairs(engine: str, folder: str, adapter: bool) -> Any:
    import trl
    from tiny_tokenizers import byte_level_bpe

    more = share_of_rank(engine) if engine else {"per_device_train_batch_size": 4, "share_prompt": False}
    share = more.pop("share_prompt", "auto")
    options = COMMON | {"output_dir": folder, "gradient_checkpointing": False, "max_steps": 2} | more
    named = {"peft_config": lora()} if adapter else {}
    trainer = DPOTrainer(
        make("llama"),
        args=trl.DPOConfig(**options),
        train_dataset=Dataset.from_dict({**PAIRS.to_dict(), "prompt": [text + " Be brief." for text in PROMPTS]}),
        processing_class=byte_level_bpe(),
        share_prompt=share,
        **named,
    )
    start, shared, logps = trainable(trainer), [], PairedPrompts.logps
    with mock.patch.object(PairedPrompts, "logps", lambda *a, **k: shared.append(1) or logps(*a, **k)):
        trainer.train()
    assert bool(shared) == bool(engine)
    return whole_weights(trainer) if engine else (trainer, start, trainable(trainer))


PAIR_RUNS = [("ddp", False), ("fsdp2", False), ("fsdp2", True), ("zero2", True), ("zero2", False), ("zero3", False)]


def test_pairs_in_trl(tmp_path: Path) -> None:
    for family in ("ddp", "fsdp2", "zero"):
        jobs = {
            f"{engine}-{adapter}": (engine, pairs, (str(tmp_path / f"{engine}-{adapter}"), adapter))
            for engine, adapter in PAIR_RUNS
            if engine.startswith(family)
        }
        start_ranks(run_all, 2, str(tmp_path), jobs)
    alone = {adapter: pairs("", str(tmp_path / "one"), adapter) for adapter in (False, True)}
    for engine, adapter in PAIR_RUNS:
        found = results(tmp_path, f"{engine}-{adapter}", 2)[0]
        assert off(found, alone[adapter]) < 5e-6, (engine, adapter)


def stages(engine: str, folder: str) -> Any:
    more = share_of_rank(engine) if engine else {"per_device_train_batch_size": 4}
    options = COMMON | {"gradient_checkpointing": False, "max_steps": 1, "strategy": "two_pass"} | more
    parts = [groups_of(*[(6, [3, 2]), (2, [4, 1]), (9, [2, 5]), (3, [3, 3])], seed=seed) for seed in (1, 2)]
    stepwise = StepwiseDPO(make("llama"), GroupDPOConfig(output_dir=folder, **options), parts)
    assert stepwise.train() is stepwise.model
    losses = [rows[0]["loss"] for rows in stepwise.history.values()]
    return {name: p.detach().clone() for name, p in stepwise.model.named_parameters()}, losses


def test_stages(tmp_path: Path) -> None:
    for engine in ("ddp", "fsdp2"):
        start_ranks(run_all, 2, str(tmp_path), {engine: (engine, stages, (str(tmp_path / engine),))})
    expected, losses = stages("", str(tmp_path / "one"))
    start = {name: p.detach() for name, p in make("llama").named_parameters()}
    way = torch.cat([(expected[name] - start[name]).flatten() for name in start]).norm()
    for engine in ("ddp", "fsdp2"):
        for found, logged in results(tmp_path, engine, 2):
            gap = torch.cat([(found[name] - expected[name]).flatten() for name in start]).norm()
            assert gap < 5e-6 * way, engine
            assert logged == pytest.approx(losses, rel=1e-5)


def test_stages_are_refused_under_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GroupDPOConfig(output_dir=str(tmp_path), **COMMON)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"StepwiseDPO must run on one device.*; got DeepSpeed"):
        StepwiseDPO(make("llama"), config, [groups_of((6, [3, 2]))])


def run_command(engine: str, folder: str, out: str) -> dict[str, Any]:
    more = share_of_rank(engine) if engine else {"per_device_train_batch_size": 4}
    training = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_steps": 3, **more}
    objective = {"loss": "mpo", "average": True, "nll_weight": 1.0, "beta": 2.0}
    settings = TrainSettings(folder, f"{folder}/rows.jsonl", out, device="cpu", objective=objective, training=training)
    return dict(json.loads(json.dumps(command(settings))))  # plain values, which torch.load takes


def test_the_command_line(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    write_rows(folder / "rows.jsonl", PREFERENCES)
    engines = ("ddp", "fsdp2", "zero2", "zero3")
    for family in ("ddp", "fsdp2", "zero"):
        jobs = {e: (e, run_command, (str(folder), str(tmp_path / e))) for e in engines if e.startswith(family)}
        start_ranks(run_all, 2, str(tmp_path), jobs)
    alone = run_command("", str(folder), str(tmp_path / "one"))
    start, expected = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "one" / "model"))
    way = sum(float((expected[name] - x).square().sum()) for name, x in start.items()) ** 0.5
    for engine in engines:
        found = load_file(tmp_path / engine / "model" / "model.safetensors")
        gap = sum(float((expected[name] - x).square().sum()) for name, x in found.items()) ** 0.5
        assert gap < 5e-6 * way, engine
        for report in results(tmp_path, engine, 2):
            assert report["steps"] == 3 and report["groups_per_step"] == alone["groups_per_step"] == 4
            assert report["parameters"] == alone["parameters"]
        assert (tmp_path / engine / "report.json").exists() and (tmp_path / engine / "curves.png").exists()


# ------------------------------------------------------------------------------------------------------------- memory


def peak_of_a_step(rank: int, folder: str, group: int) -> None:
    """Writes the peak of resident memory in a step of two passes under FSDP2, beyond what there was before a model.

    malloc gives freed blocks back, so that this is memory in use. torch's record of collective calls is off: it holds
    the last 2000, 2.4 kB each.
    """
    os.environ["TORCH_FR_BUFFER_SIZE"] = "0"
    dist.init_process_group("gloo")
    return_freed_memory()
    mesh = init_device_mesh("cpu", (2,))
    for load in (Workload(layers=1, tokens=8, group=2), Workload(tokens=128, micro_batch=1, group=group)):
        gc.collect()
        before = resident("VmRSS")
        forget_peak()
        step = TrainingStep(load, "cpu", units(build_model(load, torch.device("cpu")), mesh))
        step.forward_backward(load)
        peak = resident("VmHWM") - before
        del step
    Path(folder, f"{group}.{rank}").write_text(str(peak))


def test_memory_of_a_rank_is_flat_in_the_group_size(tmp_path: Path) -> None:
    for group in (2, 64):
        start_ranks(peak_of_a_step, 2, str(tmp_path), group)
    for rank in range(2):
        small, large = (int((tmp_path / f"{group}.{rank}").read_text()) for group in (2, 64))
        print(f"rank {rank}: {small / 2**20:.1f} MiB at G = 2, {large / 2**20:.1f} at G = 64")
        assert large <= 1.02 * small
