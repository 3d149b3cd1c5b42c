"""The reference of a trainer is the model as it is given, whatever it trains. This module makes and checks it.

    full fine-tuning      a frozen copy, or the reference model given
    peft_config           the model without its adapter
    a model with adapter  base and adapter as given: a second adapter, "ref" as in TRL, holds a copy
    several active ones   a frozen copy of the whole model (a new adapter over a loaded one, for example)

It never loads anything. It needs weights outside the adapter that do not train, where an adapter tells policy and
reference apart; `check_adapter_alone_trains` raises otherwise.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from types import CellType
from typing import Any

from torch import nn

from ..distributed import is_dtensor, kind_of, reshard
from ..models.adapters import (
    active_adapters,
    adapter_configs,
    copy_config,
    has_adapter,
    why_config_not_scored,
    why_not_scored,
    with_adapter,
    without_adapter,
)


def check_on_one_device(name: str, model: Any) -> None:
    """ValueError for a model that is split over ranks, or wrapped for them, before a trainer sees it."""
    degrees = {size: getattr(model, size, None) for size in ("tp_size", "fsdp_size", "pp_size")}
    split = [f"{size}={n}" for size, n in degrees.items() if isinstance(n, int) and n > 1]
    split += [f"a {type(p).__name__} in {n!r}" for n, p in model.named_parameters() if is_dtensor(p)]
    split += [f"a module under {kind}" for kind in map(kind_of, model.modules()) if kind is not None]
    if split:
        raise ValueError(
            f"{name} must be whole on every rank and not wrapped: GroupDPOTrainer shards and wraps it itself; got"
            f" {split[0]} (DistributedConfig, tp_plan, fully_shard)"
        )


def frozen_copy(model: nn.Module) -> nn.Module:
    """A frozen copy of the model. ValueError for one that FSDP2, tensor parallelism or ZeRO-3 has sharded."""
    if any(map(is_dtensor, model.parameters())):
        raise ValueError(
            "ref_model must be given for a model whose parameters are DTensors, for no copy has them; got None"
        )
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError("ref_model must be given for a model sharded by ZeRO-3, which cannot be copied; got None")
    copied = copy.deepcopy(model).eval().requires_grad_(False)
    take_off_forwards_of(model, copied)
    return copied


def take_off_forwards_of(model: nn.Module, ref_model: nn.Module) -> None:
    """Removes the patched forwards in ref_model that run `model`.

    TRL leaves a forward on the model that it trains, with the one before in its closure. A copy of such a model, made
    here or by the user, would run the model itself: it would follow the policy and never be a reference.
    """
    modules = {*model.modules()}
    for module in ref_model.modules():
        forward = vars(module).get("forward")
        if forward is not None and _leads_to(forward, modules, set()):
            del module.forward


def _leads_to(value: Any, modules: set[nn.Module], seen: set[int]) -> bool:
    """Whether a callable holds one of the modules: it is bound to it, or has it in a closure, argument or attribute."""
    if isinstance(value, nn.Module):
        return value in modules
    if not callable(value) or isinstance(value, type) or id(value) in seen:
        return False
    seen.add(id(value))
    cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or () if cell != CellType()]
    named = [getattr(value, name, None) for name in ("__self__", "__func__", "func")]
    held = [*cells, *named, *(getattr(value, "args", None) or ()), *getattr(value, "__dict__", {}).values()]
    return any(_leads_to(each, modules, seen) for each in held)


def check_adapter(model: Any, peft_config: Any) -> None:
    """ValueError for an adapter on top of another, and for one with virtual tokens, which have no targets."""
    if peft_config is not None and has_adapter(model):
        raise ValueError("peft_config must be None for a model that has an adapter; got both")
    if peft_config is not None and (why := why_config_not_scored(peft_config)):
        raise ValueError(f"peft_config must be of {why}")
    if why := why_not_scored(model):
        raise ValueError(f"model must have {why}")


def check_no_earlier_reference(model: Any) -> None:
    """ValueError for a model with an adapter "ref": it holds what an earlier training started from, not this one."""
    if "ref" in adapter_configs(model):
        raise ValueError(
            "ref_model must be given for a model with an adapter named 'ref', which an earlier training has left"
            " behind: model.delete_adapter('ref') makes its present state the reference; got None"
        )


def check_adapter_alone_trains(model: Any, trained: bool = False) -> None:
    """ValueError where a weight outside the adapter trains: the model without its adapter would then not stay what it
    was or, if it has `trained`, already is not."""
    active = {*active_adapters(model)}
    instead = "or the rows be there before training" if trained else "or precompute_ref_log_probs=True"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not active & {*name.split(".")}:
            raise ValueError(
                f"ref_model must be given, {instead}, where weights outside the adapter train (bias='all', say), for"
                f" the reference would move with them; {name} trains, ref_model is None"
            )


def add_reference_adapter(model: Any) -> None:
    """Adds a copy of the active adapter, named "ref", that does not train."""
    (active,) = active_adapters(model)
    copy_config(model, active, "ref")
    copy_to_reference_adapter(model)


def copy_to_reference_adapter(model: Any) -> None:
    """Copies the active adapter's weights into "ref", with those of embeddings, which are parameters in a dict."""
    (active,) = active_adapters(model)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parts = name.split(".")
        if "ref" in parts:
            source = ".".join(active if part == "ref" else part for part in parts)
            parameter.data.copy_(parameters[source].data)


def reference_of(model: Any, fresh: bool, precompute: bool) -> nn.Module | None:
    """A frozen copy of the model, or None where the model itself can be the reference: before it trains, without its
    adapter, or with its adapter "ref". With several active adapters, no single one tells policy and reference apart."""
    if not has_adapter(model):
        return None if precompute else frozen_copy(model)
    if len(active_adapters(model)) > 1:
        return frozen_copy(model)
    if not precompute:
        check_adapter_alone_trains(model)
    if not fresh:
        check_no_earlier_reference(model)
        add_reference_adapter(model)
    return None


@contextlib.contextmanager
def as_reference(
    model: Any,
    ref_model: Any = None,
) -> Iterator[Any]:
    """A context that yields the reference in evaluation mode: `ref_model` if there is one, else the model itself, with
    the adapter "ref" or without its adapter. The model's mode is restored afterwards.
    """
    if ref_model is not None:
        yield ref_model
        return
    training = model.training
    model.eval()  # no dropout, no gradient checkpointing
    try:
        if not has_adapter(model):
            yield model
        elif "ref" not in adapter_configs(model):
            with without_adapter(model), _resharded(model):
                yield model
        else:
            with with_adapter(model, "ref"), _resharded(model):
                yield model
    finally:
        model.train(training)


@contextlib.contextmanager
def _resharded(model: Any) -> Iterator[None]:
    """Reshards at its end: switching an adapter off sets `requires_grad` of parameters, under FSDP of the shards."""
    try:
        yield
    finally:
        reshard(model)
