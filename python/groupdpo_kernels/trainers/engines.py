"""What GroupDPOTrainer does where FSDP2 or DeepSpeed shards its model: the engines are those of accelerate.

    FSDP2       accelerate's fsdp plugin of version 2, for policy and reference
    DeepSpeed   ZeRO 1, 2 and 3; under ZeRO 3 the reference is sharded too

Each forward and backward is a collective there. So ranks agree on their number of micro-batches, and a rank with fewer
runs empty ones, which add exact zeros. `group_backward` does the rest: boundaries, resharding, errors on all ranks.

The module never imports an engine that is not in use. The cost is one all-reduce of an integer a step.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..data.batches import PreferenceBatch, empty_micro_batch

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
        "precompute_ref_log_probs": (
            args.precompute_ref_log_probs,
            "False, with an adapter or ref_model as the reference",
            "it would score with a whole model on every rank",
        ),
        "share_prompt": (args.share_prompt is True, "'auto' or False", "its collectives count forwards"),
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


def prepared_reference(trainer: Any, ref_model: nn.Module) -> Any:
    """The reference model under the trainer's engine, in evaluation mode."""
    accelerator = trainer.accelerator
    if trainer.is_fsdp_enabled:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model  # type: ignore[import-untyped]

        return fsdp2_prepare_model(accelerator, ref_model).eval()
    if trainer.is_deepspeed_enabled:
        config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
        if config["zero_optimization"]["stage"] != 3:
            return ref_model.to(accelerator.device).eval()
        import deepspeed  # type: ignore[import-untyped]

        for name in ("optimizer", "scheduler"):  # nothing trains here
            config.pop(name, None)
        config["zero_optimization"].pop("offload_optimizer", None)
        engine = deepspeed.initialize(model=ref_model, config=config)[0]
        engine.eval()  # returns None
        return engine
    return accelerator.prepare_model(ref_model, evaluation_mode=True).eval()


def as_many_micro_batches(step: PreferenceBatch) -> PreferenceBatch:
    """The step, with empty micro-batches in front so that every rank has equally many."""
    first = step.micro_batches[0]
    most = torch.tensor(len(step.parts), device=first.input_ids.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return replace(step, parts=[empty_micro_batch(first)] * (int(most) - len(step.parts)) + step.parts)
