"""The trainers ask here which strategy and micro-batch fit in memory, and why a step did not; memory.planner answers.

A tenth of the device's memory is left to allocators and libraries. The module never measures by running out of memory.
The cost is a few seconds, once, and again when a step has run out of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data.batches import PreferenceBatch, TokenGroup
from ..memory.planner import largest_micro_batch, step_peak
from ..preference.group_backward import SharedPrompt

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


def _asked(planner: Any, *arguments: Any, **named: Any) -> Any:
    """What the planner answers. ValueError for a model whose forward depends on values, as some experts' does."""
    try:
        return planner(*arguments, **named)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            "model must be one that the planner can trace without values, for 'auto' to size its step; got"
            f" {type(error).__name__}: {error}"
        ) from error


def micro_batch_tokens_of(
    model: nn.Module,
    ref_model: Any,
    groups: Sequence[TokenGroup],
    device: torch.device,
    autocast: bool,
    memory: int,
    *,
    share_prompt: bool = False,
) -> int:
    """Tokens of the largest micro-batch of sequences in `groups` that fits in `memory` bytes, as `collate` counts them.

    The sequences are the longest ones. Where a prompt runs once, each response holds its keys and values beside the
    tokens that count, so the group that holds most for a token is asked for as well.
    """
    chosen = [max(groups, key=lambda group: group.longest)]
    if share_prompt:
        chosen.append(max(groups, key=_held_for_a_token))
    memory = max(1, memory - _still_to_move(ref_model, device))
    found = []
    for prompt, tokens in dict.fromkeys((_shared_prompt_of(g) if share_prompt else 0, g.longest) for g in chosen):
        size, one = _asked(
            largest_micro_batch,
            model,
            tokens,
            memory,
            autocast=autocast,
            device=device.type,
            prompt=prompt,
            share_prompt=prompt > 0,
        )
        if not size:
            raise ValueError(
                f"micro_batch_tokens='auto' finds no micro-batch: one sequence of {tokens} tokens takes"
                f" {one / GiB:.2f} GiB with parameters, gradients and AdamW, and {memory / GiB:.2f} GiB are there:"
                " lower max_length, train an adapter, or turn gradient_checkpointing on"
            )
        found.append(max(0, prompt - 1) + size * (tokens - prompt))
    return max(chosen[0].longest, min(found))


def strategy_that_fits(
    model: nn.Module,
    ref_model: Any,
    groups: Sequence[TokenGroup],
    groups_per_step: int,
    device: torch.device,
    autocast: bool,
    memory: int,
    *,
    share_prompt: bool = False,
) -> tuple[str, str]:
    """("coupled" or "two_pass", why): "coupled" runs each forward once, and needs room for the largest step's graph.

    The largest step has the `groups_per_step` longest of `groups`, with AdamW.
    """
    largest = sorted(groups, key=lambda group: _weight_of(group, share_prompt))[-groups_per_step:]
    step = _Step.of(largest, share_prompt)
    memory -= _still_to_move(ref_model, device)
    try:
        peak, bound = _peak_of(model, step, autocast, device, max(1, memory), "adamw")
    except ValueError as error:  # a model that the planner cannot take apart
        return "two_pass", f"what the whole graph of a step takes is not known: {error}"
    what = f"the whole graph of a step of {step} takes"
    amount = f"{'less than ' if bound else ''}{peak / GiB:.2f} GiB of the {memory / GiB:.2f} GiB that are there"
    return "coupled" if peak < memory else "two_pass", f"{what} {amount}"


def _still_to_move(ref_model: Any, device: torch.device) -> int:
    """Bytes that a reference model will take on the device, where it is not yet."""
    if not isinstance(ref_model, nn.Module):
        return 0
    return sum(p.nbytes for p in ref_model.parameters() if p.device.type != device.type)


def _tokens_of(group: TokenGroup) -> int:
    return len(group.responses) * len(group.prompt) + sum(map(len, group.responses))


def _shared_prompt_of(group: TokenGroup) -> int:
    """Tokens of the prompt that `collate` lets the group's responses share; 0 where it does not."""
    return len(group.prompt) if group.shares_prompt else 0


def _weight_of(group: TokenGroup, share_prompt: bool) -> float:
    """What the group's graph takes, in tokens: keys and values are about a tenth of what a position keeps."""
    prompt, tokens = _shared_prompt_of(group), _tokens_of(group)
    if not share_prompt or not prompt:
        return tokens
    return tokens - (len(group.responses) - 1) * prompt + 0.1 * tokens


def _held_for_a_token(group: TokenGroup) -> float:
    """Positions whose keys and values the group's responses hold, over the tokens that run."""
    prompt, n = _shared_prompt_of(group), len(group.responses)
    response = group.longest - len(group.prompt)
    return n * group.longest / (prompt - 1 + n * response) if prompt else 0.0


class _Step(NamedTuple):
    """The step that stands for that of some groups in the planner. Padding is not counted."""

    responses: int
    tokens: int  # of a response with its prompt
    prompt: int  # tokens of each prompt that runs once; 0 where none does
    prompts: int  # how many these are

    @classmethod
    def of(cls, groups: Sequence[TokenGroup], share_prompt: bool) -> _Step:
        responses = max(2, sum(len(group.responses) for group in groups))
        total = sum(map(_tokens_of, groups))
        if not share_prompt or not any(map(_shared_prompt_of, groups)):
            return cls(responses, max(2, -(-total // responses)), 0, 1)
        # Each prompt runs, and each response holds keys and values of its own: the larger mean serves for both.
        held = sum(len(group.responses) * len(group.prompt) for group in groups)
        run = sum(len(group.prompt) for group in groups)
        prompt = max(-(-held // responses), -(-run // len(groups)))
        return cls(responses, prompt + max(1, -(-(total - held) // responses)), prompt, len(groups))

    def __str__(self) -> str:
        if not self.prompt:
            return f"{self.responses} responses of some {self.tokens} tokens"
        which = "a shared prompt of" if self.prompts == 1 else f"{self.prompts} shared prompts of some"
        return f"{self.responses} responses of some {self.tokens - self.prompt} tokens after {which} {self.prompt}"


def _peak_of(
    model: nn.Module, step: _Step, autocast: bool, device: torch.device, memory: int, optimizer: str
) -> tuple[int, bool]:
    """(bytes of a step that keeps its whole graph, whether it is certain to take less).

    The planner takes seconds, and is not asked where a bound of 256 bytes a token, layer and unit of width, with AdamW,
    is less than `memory`: a decoder in float32 without checkpointing keeps about 100, and less where a prompt runs
    once. The bound leaves out the scores of eager attention and a mixture of experts.

    ValueError for a model that the planner cannot take apart.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    known = config._attn_implementation != "eager" and not hasattr(config, "output_router_logits")
    width = int(getattr(config, "num_hidden_layers", 0)) * int(getattr(config, "hidden_size", 0))
    adamw = 16 * sum(p.numel() for p in model.parameters())  # with parameters and gradients, in float32
    bound = 256 * step.responses * step.tokens * width + adamw
    if known and width and bound < memory:
        return bound, True
    peak = _asked(
        step_peak,
        model, step.responses, step.tokens, memory, autocast=autocast, device=device.type, optimizer=optimizer,
        prompt=step.prompt, share_prompt=step.prompt > 0, prompts=step.prompts,
    )  # fmt: skip
    return peak, False


def check_group_fits(
    model: nn.Module,
    groups: Sequence[TokenGroup],
    device: torch.device,
    autocast: bool,
    memory: int,
    *,
    share_prompt: bool = False,
) -> None:
    """ValueError where the graph of the largest group alone, by the planner, takes more than `memory` bytes.

    That graph, whatever the optimizer keeps, is a lower bound of a step. It is compared with all free memory, not with
    the SHARE of it that `memory` is, so that nothing is refused that would have run.
    """
    largest = max(groups, key=lambda group: _weight_of(group, share_prompt))
    step = _Step.of([largest], share_prompt)
    try:
        peak, bound = _peak_of(model, step, autocast, device, memory, "sgd")
        if bound or SHARE * peak <= memory:
            return
        size, one = _asked(
            largest_micro_batch,
            model, step.tokens, memory, autocast=autocast, device=device.type, prompt=step.prompt,
            share_prompt=step.prompt > 0,
        )  # fmt: skip
    except ValueError:  # a model that the planner cannot take apart
        return
    fits = f"'two_pass' fits with micro-batches of {size}" if size else f"'two_pass' takes {one / GiB:.2f} GiB"
    raise ValueError(
        f"strategy must be one that fits: row {largest.row} of train_dataset has {step}, whose graph takes"
        f" {peak / GiB:.2f} GiB with parameters and gradients, and {memory / GiB:.2f} GiB are there; {fits}; got"
        " 'coupled'"
    )


def explain_out_of_memory(
    model: nn.Module, parts: Sequence[Any], responses: int, strategy: str, autocast: bool, total: int
) -> str:
    """A text that says what the step asked for, and what the planner fits in `total` bytes.

    parts: those of a PreferenceBatch.
    """
    shapes = [shape for part in parts for shape in _shapes_of(part)]
    (several, prefix), (rows, length) = max(shapes, key=lambda pair: sum(b * n for b, n in pair))
    asked = (
        f"A step of {responses} responses with strategy {strategy!r} ran out of memory; the largest of its"
        f" {len(shapes)} micro-batches is {rows} x {length} tokens"
    )
    prompt = prefix + 1 if prefix else 0
    tokens, after = prompt + length, " after a prompt of that length" if prefix else ""
    if prefix:
        asked += f" after a prompt of {prompt}" if several == 1 else f" after {several} prompts of up to {prompt}"
    size, one = _asked(
            largest_micro_batch,
        model, tokens, total, autocast=autocast, device=next(model.parameters()).device.type, prompt=prompt,
        share_prompt=prompt > 0,
    )  # fmt: skip
    if not size:
        return (
            f"{asked}. Two passes with one sequence of {tokens} tokens take {one / GiB:.2f} GiB, the device has"
            f" {total / GiB:.2f}: lower max_length, train an adapter, or turn gradient_checkpointing on."
        )
    what = "micro_batch_sequences=None" if strategy == "two_pass" else "strategy='two_pass', micro_batch_sequences=None"
    return (
        f"{asked}. Two passes fit {size} x {length} tokens{after} in {total / GiB:.2f} GiB:"
        f" micro_batch_tokens={prefix + size * length}, {what}."
    )


def _shapes_of(part: Any) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(shape of the prompts that a micro-batch shares, its own shape) of each micro-batch."""
    if not isinstance(part, SharedPrompt):
        return [((0, 0), tuple(part.input_ids.shape))]
    return [(tuple(part.prompt.input_ids.shape), tuple(mb.input_ids.shape)) for mb in part.micro_batches]


def advice(
    model: nn.Module,
    step: PreferenceBatch,
    strategy: str,
    autocast: bool,
    device: torch.device,
    optimizer: Any,
    *,
    share_prompt: bool = False,
) -> str:
    """`explain_out_of_memory` for this device, or why it failed: it must not hide the error that it explains."""
    try:
        total = memory_of(model, device, optimizer)
        responses = step.groups.num_sequences
        prompts = [part.prompt for part in step.parts if isinstance(part, SharedPrompt) and part.prompt is not None]
        if any(x.is_floating_point() for each in (*step.micro_batches, *prompts) for x in each.inputs.values()):
            raise ValueError("the planner sizes a model of text, and the step has images")
        parts = step.parts if share_prompt else step.micro_batches
        return explain_out_of_memory(model, parts, responses, strategy, autocast, total)
    except Exception as error:
        return f"What would fit is not known: {error}"
