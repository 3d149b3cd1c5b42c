"""What GroupDPOTrainer does where FSDP2 or DeepSpeed shards its model: the engines are those of accelerate.

    FSDP2       accelerate's fsdp plugin of version 2, for policy and reference
    DeepSpeed   ZeRO 1, 2 and 3; under ZeRO 3 the reference is sharded too

Each forward and backward is a collective there. So ranks agree on their numbers of prompts and of micro-batches, and a
rank with fewer runs empty ones, which add exact zeros. `group_backward` does the rest: boundaries, resharding, errors
on all ranks.

The module never imports an engine that is not in use. The cost is two all-reduces of a few integers a step.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.batches import empty_part
from ..distributed import is_dtensor, joint, shards
from ..models.layouts import why_not_packed, why_not_shared
from ..preference.group_backward import SharedPrompt, calls_of
from .reference import frozen_copy

FSDP, DEEPSPEED = "FSDP", "DeepSpeed"


def engine_asked(args: Any) -> str | None:
    """The engine that these arguments, or `accelerate launch`, ask for; None for one device or data parallelism."""
    for engine, option in {DEEPSPEED: args.deepspeed, FSDP: args.fsdp}.items():
        if option or os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "false").lower() == "true":
            return engine
    return None


def check_engine_options(args: Any) -> None:
    """ValueError for options of GroupDPOConfig that cannot work with the engine, saying what to use instead."""
    engine = engine_asked(args)
    if engine is None:
        return
    instead = {
        "strategy": (args.strategy == "one_pass", "'two_pass' or 'coupled'", "parameters are not leaves there"),
        "micro_batch_tokens": (args.micro_batch_tokens == "auto", "a number", "the planner sizes a whole model"),
        "torch_compile": (args.torch_compile, "False", "nobody has tried compiled layers there"),
        "fp16": (args.fp16, "False, with bf16", "the engine scales the loss itself"),
    }
    for name, (wrong, asked, why) in instead.items():
        if wrong:
            raise ValueError(f"{name} must be {asked} under {engine}: {why}; got {getattr(args, name)!r}")


def check_engine(trainer: Any) -> None:
    """ValueError for several GPUs in one process, and for version 1 of FSDP."""
    if trainer.args.n_gpu > 1:
        raise ValueError(
            "GroupDPOTrainer must have one GPU a process (torchrun or accelerate launch); got DataParallel over"
            f" {trainer.args.n_gpu}"
        )
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError("fsdp_config must have version 2: of FSDP, GroupDPOTrainer takes FSDP2 alone; got version 1")


def check_checkpoint(trainer: Any, folder: str | bool | None) -> None:
    """ValueError, before anything is read, for a checkpoint of DeepSpeed that would not go on, or not to the same
    weights."""
    if not folder or not trainer.is_deepspeed_enabled:
        return
    config, ranks = trainer.accelerator.state.deepspeed_plugin.deepspeed_config, trainer.args.world_size
    if config.get("checkpoint", {}).get("load_universal"):
        # Its groups of parameters, with weight decay and without, then share one counter of steps, which each
        # advances (DeepSpeed 0.19): a step of Adam ended 0.9 % of the way off.
        if zero_stage(trainer) == 3:
            raise ValueError(
                "checkpoint.load_universal must be false under ZeRO 3, where DeepSpeed then counts the optimizer's"
                " steps wrong; got true. Start from the whole weights of `save_model`"
            )
        return
    latest = Path(str(folder), "latest")
    files = (latest.parent / latest.read_text().strip()).glob("*_optim_states.pt") if latest.exists() else ()
    saved = len({found[1] for file in files if (found := re.search(r"zero_pp_rank_(\d+)_", file.name))})
    if saved not in (0, ranks):  # of 0 DeepSpeed itself says what is missing
        universal = "make a universal checkpoint (docs/how-to/processes.md), or " if zero_stage(trainer) < 3 else ""
        raise ValueError(
            f"resume_from_checkpoint must be of as many ranks as run now under DeepSpeed; got {folder}, of {saved}, on"
            f" {ranks}. Instead {universal}start from the whole weights of `save_model`"
        )


def prepared_reference(trainer: Any, ref_model: nn.Module) -> Any:
    """The reference model under the trainer's engine, in evaluation mode."""
    accelerator = trainer.accelerator
    if trainer.is_fsdp_enabled:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model  # type: ignore[import-untyped]

        return fsdp2_prepare_model(accelerator, ref_model).eval()
    if trainer.is_deepspeed_enabled:
        config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
        if zero_stage(trainer) != 3:
            return ref_model.to(accelerator.device).eval()
        import deepspeed  # type: ignore[import-untyped]

        for name in ("optimizer", "scheduler"):  # nothing trains here
            config.pop(name, None)
        config["zero_optimization"].pop("offload_optimizer", None)
        engine = deepspeed.initialize(model=ref_model, config=config)[0]
        engine.eval()  # returns None
        return engine
    return accelerator.prepare_model(ref_model, evaluation_mode=True).eval()


def in_step(parts: list[Any], device: torch.device | str) -> list[Any]:
    """The parts of a step, and empty ones, so that every rank runs as many prompts, and as many micro-batches after
    each.

    Pass 1, pass 2 and a reference then make the same forwards and backwards on all ranks, in the same order.
    """
    sections: list[list[Any]] = [[]]  # a prompt with the micro-batches that follow it; the first has no prompt
    for part in parts:
        if isinstance(part, SharedPrompt):
            sections.append([])
        sections[-1].append(part)
    for i, calls in enumerate(joint(calls_of(parts))):
        if i == len(sections):
            sections.append([empty_part(device, with_prompt=True)])
        own = sum(calls_of(sections[i]))
        sections[i] += [empty_part(device) for _ in range(calls - own)]
    return [part for section in sections for part in section]


@contextlib.contextmanager
def whole_or_sharded(trainer: Any, model: nn.Module) -> Iterator[nn.Module]:
    """A context that yields the model, which may be one that trains later, as the engine lets it score now.

    FSDP2 and ZeRO 3 shard a model when training begins. Until then it is a copy that is sharded, and freed afterwards.
    """
    accelerator = trainer.accelerator
    sharded = trainer.is_fsdp_enabled or (trainer.is_deepspeed_enabled and zero_stage(trainer) == 3)
    if not sharded or shards(model):
        yield model.to(accelerator.device) if trainer.is_deepspeed_enabled and not sharded else model
        return
    engine = prepared_reference(trainer, frozen_copy(model))
    try:
        yield accelerator.unwrap_model(engine)
    finally:
        if hasattr(engine, "destroy"):
            engine.destroy()


def zero_stage(trainer: Any) -> int:
    """The stage of ZeRO, under DeepSpeed."""
    return int(trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"])


@torch.no_grad()
def take_weights(model: nn.Module, trainer: Any) -> None:
    """Copies what a trainer under FSDP2 has trained into the whole model of which it took a copy. All ranks call it."""
    mine = dict(model.named_parameters())
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if parameter.requires_grad:
            mine[name].copy_(parameter.full_tensor() if is_dtensor(parameter) else parameter)


def size_of(parameter: torch.Tensor) -> int:
    """The number of numbers of a parameter, all shards together."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@contextlib.contextmanager
def not_sharded_by_transformers() -> Iterator[None]:
    """A context in which `from_pretrained` gives whole models, also under ZeRO 3, where it would shard them at once."""
    from transformers.integrations import deepspeed as integration

    known = getattr(integration, "_hf_deepspeed_config_weak_ref", None)
    integration._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = known


def measure_together(trainer: Any, *models: Any) -> None:
    """Measures, on all ranks at once, what a forward would measure on the ranks alone that need it."""
    for model in models:
        if model is not None and trainer.data_collator.share_prompt:
            why_not_shared(model, 0)
        if model is not None and trainer.data_collator.layout == "packed":
            why_not_packed(model)
