"""The trainers ask here which strategy and micro-batch fit in memory, and why a step did not; memory.planner answers.

A tenth of the device's memory is left to allocators and libraries. The module never measures by running out of memory.
The cost is a few seconds, once, and again when a step has run out of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import MicroBatch, PreferenceBatch, TokenGroup
from ..memory.planner import largest_micro_batch, step_peak

GiB = 2**30
SHARE = 0.9


def memory_of(model: nn.Module, device: torch.device, optimizer: Any = None) -> int:
    """Bytes of the device that training this model may take: the free ones, and those that the model and the state of
    its optimizer hold already."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    state = [] if optimizer is None else [x for values in optimizer.state.values() for x in values.values()]
    own = [*model.parameters(), *(p.grad for p in model.parameters()), *state]
    return int(SHARE * free) + sum(x.nbytes for x in own if isinstance(x, Tensor) and x.device.type == device.type)


def micro_batch_tokens_of(
    model: nn.Module, ref_model: Any, groups: Sequence[TokenGroup], device: torch.device, autocast: bool, memory: int
) -> int:
    """Tokens of the largest micro-batch of the longest sequences in `groups` that fits in `memory` bytes."""
    longest = max(group.longest for group in groups)
    memory = max(1, memory - _still_to_move(ref_model, device))
    size, one = largest_micro_batch(model, longest, memory, autocast=autocast, device=device.type)
    if not size:
        raise ValueError(
            f"micro_batch_tokens='auto' finds no micro-batch: one sequence of {longest} tokens takes {one / GiB:.2f}"
            f" GiB with parameters, gradients and AdamW, and {memory / GiB:.2f} GiB are there: lower"
            " max_length, train an adapter, or turn gradient_checkpointing on"
        )
    return size * longest


def strategy_that_fits(
    model: nn.Module,
    ref_model: Any,
    groups: Sequence[TokenGroup],
    groups_per_step: int,
    device: torch.device,
    autocast: bool,
    memory: int,
) -> tuple[str, str]:
    """("coupled" or "two_pass", why): "coupled" runs each forward once, and needs room for the largest step's graph.

    The largest step has the `groups_per_step` longest of `groups`, with AdamW. The planner takes seconds, and is not
    asked where a bound of 256 bytes a token, layer and unit of width fits: a decoder in float32 without checkpointing
    keeps about 100. The bound leaves out the scores of eager attention and a mixture of experts.
    """
    responses, tokens = _shape_of(sorted(groups, key=_tokens_of)[-groups_per_step:])
    memory -= _still_to_move(ref_model, device)
    config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    known = config._attn_implementation != "eager" and not hasattr(config, "output_router_logits")
    bound = 256 * responses * tokens * _layers_by_width(config) + _with_adamw(model)
    if known and 0 < bound < memory:
        peak = bound
    else:
        try:
            peak = step_peak(model, responses, tokens, max(1, memory), autocast=autocast, device=device.type)
        except ValueError as error:  # a model that the planner cannot take apart
            return "two_pass", f"what the whole graph of a step takes is not known: {error}"
    what = f"the whole graph of a step of {responses} responses of some {tokens} tokens takes"
    amount = f"{'less than ' if peak == bound else ''}{peak / GiB:.2f} GiB of the {memory / GiB:.2f} GiB that are there"
    return "coupled" if peak < memory else "two_pass", f"{what} {amount}"


def _still_to_move(ref_model: Any, device: torch.device) -> int:
    """Bytes that a reference model will take on the device, where it is not yet."""
    if not isinstance(ref_model, nn.Module):
        return 0
    return sum(p.nbytes for p in ref_model.parameters() if p.device.type != device.type)


def _tokens_of(group: TokenGroup) -> int:
    return len(group.responses) * len(group.prompt) + sum(map(len, group.responses))


def _shape_of(groups: Sequence[TokenGroup]) -> tuple[int, int]:
    """(responses, tokens of each) of the planner's group that stands for these; its number of responses is even."""
    responses = sum(len(group.responses) for group in groups)
    return responses + responses % 2, max(2, -(-sum(map(_tokens_of, groups)) // responses))


def _layers_by_width(config: Any) -> int:
    return int(getattr(config, "num_hidden_layers", 0)) * int(getattr(config, "hidden_size", 0))


def _with_adamw(model: nn.Module) -> int:
    """Bytes of the parameters, their gradients and both moments of AdamW, in float32."""
    return 16 * sum(p.numel() for p in model.parameters())


def check_group_fits(
    model: nn.Module, groups: Sequence[TokenGroup], device: torch.device, autocast: bool, memory: int
) -> None:
    """ValueError where the graph of the largest group alone, by the planner, takes more than `memory` bytes.

    That graph, whatever the optimizer keeps, is a lower bound of a step. It is compared with all free memory, not with
    the SHARE of it that `memory` is, so that nothing is refused that would have run. The planner takes seconds, and is
    not asked where 64 bytes a token, layer and unit of width fit, with AdamW.
    """
    largest = max(groups, key=_tokens_of)
    n = max(2, len(largest.responses) // 2 * 2)  # the planner's groups are even
    tokens = max(2, len(largest.prompt) + sum(map(len, largest.responses)) // len(largest.responses))
    config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    if 64 * n * tokens * _layers_by_width(config) + _with_adamw(model) < memory:
        return
    try:
        peak = step_peak(model, n, tokens, memory, autocast=autocast, device=device.type, optimizer="sgd")
        size, one = largest_micro_batch(model, tokens, memory, autocast=autocast, device=device.type)
    except ValueError:  # a model that the planner cannot take apart
        return
    if SHARE * peak > memory:
        fits = f"'two_pass' fits with micro-batches of {size}" if size else f"'two_pass' takes {one / GiB:.2f} GiB"
        raise ValueError(
            f"strategy must be one that fits: row {largest.row} of train_dataset has {len(largest.responses)} responses"
            f" of some {tokens} tokens, whose graph takes {peak / GiB:.2f} GiB with parameters and gradients,"
            f" and {memory / GiB:.2f} GiB are there; {fits}; got 'coupled'"
        )


def explain_out_of_memory(
    model: nn.Module, micro_batches: Sequence[MicroBatch], responses: int, strategy: str, autocast: bool, total: int
) -> str:
    """A text that says what the step asked for, and what the planner fits in `total` bytes."""
    shapes = [tuple(mb.input_ids.shape) for mb in micro_batches]
    rows, length = max(shapes, key=lambda shape: shape[0] * shape[1])
    asked = (
        f"A step of {responses} responses with strategy {strategy!r} ran out of memory; the largest of its"
        f" {len(shapes)} micro-batches is {rows} x {length} tokens."
    )
    device = next(model.parameters()).device.type
    size, one = largest_micro_batch(model, length, total, autocast=autocast, device=device)
    if not size:
        return (
            f"{asked} Two passes with one sequence of {length} tokens take {one / GiB:.2f} GiB, the device has"
            f" {total / GiB:.2f}: lower max_length, train an adapter, or turn gradient_checkpointing on."
        )
    what = "micro_batch_sequences=None" if strategy == "two_pass" else "strategy='two_pass', micro_batch_sequences=None"
    return (
        f"{asked} Two passes fit {size} x {length} tokens in {total / GiB:.2f} GiB:"
        f" micro_batch_tokens={size * length}, {what}."
    )


def advice(
    model: nn.Module, step: PreferenceBatch, strategy: str, autocast: bool, device: torch.device, optimizer: Any
) -> str:
    """`explain_out_of_memory` for this device, or why it failed: it must not hide the error that it explains."""
    try:
        total = memory_of(model, device, optimizer)
        responses = step.groups.num_sequences
        return explain_out_of_memory(model, step.micro_batches, responses, strategy, autocast, total)
    except Exception as error:
        return f"What would fit is not known: {error}"
