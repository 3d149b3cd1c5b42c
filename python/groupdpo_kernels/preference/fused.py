"""The preference losses as one kernel launch on a GPU: the torch.library ops, and whether the kernel can run.

`groupdpo_kernels::preference_weights_forward` returns, besides what a user sees, the closed-form coefficients d loss /
d seq_logps; `groupdpo_kernels::preference_weights_backward` spreads them over tokens. kernels/triton/pair_losses.py
repeats the formulas of losses.py, and tests compare both in values and gradients, for every loss.

It never reads a value inside a tensor: wrong offsets and references that are not finite give NaN. It needs torch, and
Triton to run. The cost is two launches a step, and S numbers kept in between.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import NO_TRITON, NotUnderVmap, check_tensors
from .segments import as_offsets

IMPLS = ("triton", "reference")  # in the order "auto" tries them
_VECTORS = "Tensor token_logps, Tensor? ref_logps, Tensor cu_seqlens, Tensor cu_groups, Tensor positive"
_SPEC = (
    "str loss, float beta, bool average, bool subtract_reference, float nll_weight, float label_smoothing, float gamma,"
    " float alpha, float tau, float ceiling, bool balance_reference, bool balance_normalize"
)


class LossSpec(NamedTuple):
    """An Objective with its conventions resolved, in the order of the ops' schema. A ceiling of 0 means no balance."""

    loss: str
    beta: float
    average: bool
    subtract_reference: bool
    nll_weight: float
    label_smoothing: float
    gamma: float
    alpha: float
    tau: float
    ceiling: float
    balance_reference: bool
    balance_normalize: bool


def why_not(
    impl: str, device: torch.device, dtype: torch.dtype, loss: object, max_group: int, response_weights: bool = False
) -> list[str]:
    """Every reason why `impl` cannot compute a preference loss of token_logps on `device`; empty if it can."""
    if impl == "triton":
        try:
            launcher = importlib.import_module("groupdpo_kernels.kernels.preference_weights")
        except ImportError as error:
            return [NO_TRITON.format(error)]
        reasons = launcher.why_not(device, dtype, loss, max_group)
        return reasons + ["groups have response_weights: only the reference weighs responses"] * response_weights
    return []


def resolve(
    impl: str, device: torch.device, dtype: torch.dtype, loss: object, max_group: int, response_weights: bool = False
) -> str:
    """The implementation that runs. An explicit choice never falls back: it raises with every reason."""
    call = (device, dtype, loss, max_group, response_weights)
    if impl == "auto":
        return next(name for name in IMPLS if not why_not(name, *call))
    reasons = why_not(impl, *call)
    if reasons:
        raise ValueError(f"impl={impl!r} cannot run here: " + "; ".join(reasons))
    return impl


# A trace calls `resolve` and keeps its answer. torch.compiler.assume_constant_result sets this too, but imports dynamo.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@torch.library.custom_op(
    "groupdpo_kernels::preference_weights_forward",
    mutates_args=(),
    schema=f"({_VECTORS}, {_SPEC}, int max_group) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _preference_weights_forward(*args):
    *inputs, max_group = args
    launcher = importlib.import_module("groupdpo_kernels.kernels.preference_weights")
    return launcher.preference_weights_forward(*inputs, max_group)


@_preference_weights_forward.register_fake
def _(token_logps, ref_logps, cu_seqlens, cu_groups, positive, *rest):
    S, G = positive.shape[0], cu_groups.shape[0] - 1
    return tuple(token_logps.new_empty(shape) for shape in ((), (S,), (S,), (G,), (S,), (S,)))


@torch.library.custom_op(
    "groupdpo_kernels::preference_weights_backward",
    mutates_args=(),
    schema="(Tensor d_loss, Tensor coefficients, Tensor cu_seqlens, SymInt T) -> Tensor",
)
def _preference_weights_backward(d_loss, coefficients, cu_seqlens, T):
    launcher = importlib.import_module("groupdpo_kernels.kernels.preference_weights")
    return launcher.preference_weights_backward(d_loss, coefficients, cu_seqlens, T)


@_preference_weights_backward.register_fake
def _(d_loss, coefficients, cu_seqlens, T):
    return coefficients.new_empty(T)


class PreferenceWeights:
    """`PreferenceWeights.apply(token_logps, ref_logps, cu_seqlens, cu_groups, positive, spec, max_group, impl)`.

    token_logps (T,) float32, ref_logps (S,) or (T,) in float32 or float64, or None, integers cu_seqlens (S+1,) and
    cu_groups (G+1,), positive (S,) bool, `spec` a LossSpec, `max_group` a bound on the responses of a group, `impl`
    "triton", the only one that is fused. Returns the five tensors of PreferenceLoss in order; only loss is
    differentiable, in token_logps. ValueError for another `impl`.
    """

    @staticmethod
    def apply(
        token_logps: Tensor,
        ref_logps: Tensor | None,
        cu_seqlens: Tensor,
        cu_groups: Tensor,
        positive: Tensor,
        spec: LossSpec,
        max_group: int,
        impl: str = "triton",
    ) -> tuple[Tensor, ...]:
        if impl != "triton":
            raise ValueError(f"impl must be 'triton', or call preference_loss, which chooses; got {impl!r}")
        check_tensors(token_logps=token_logps, cu_seqlens=cu_seqlens, cu_groups=cu_groups, positive=positive)
        if ref_logps is not None:
            check_tensors(ref_logps=ref_logps)
        offsets = (as_offsets("cu_seqlens", cu_seqlens), as_offsets("cu_groups", cu_groups))
        return WeightedPreference.apply(token_logps, ref_logps, *offsets, positive, spec, max_group, None, None)[:5]


class WeightedPreference(NotUnderVmap):
    """The autograd function of PreferenceWeights. Its sixth output, d loss / d seq_logps (S,), has no gradient.

    The kernel takes the plain mean over groups. Loss and gradient are linear in what a group counts, so factors (G,),
    in place of 1 / G each, multiply its results: `ids` (S,) says whose each sequence is.
    """

    instead = "preference_loss takes all groups in one call (PreferenceGroups)"

    @staticmethod
    def forward(
        token_logps: Tensor,  # (T,) float32
        ref_logps: Tensor | None,  # (S,) or (T,) float32 | float64
        cu_seqlens: Tensor,  # (S+1,) int32 | int64
        cu_groups: Tensor,  # (G+1,) int32 | int64
        positive: Tensor,  # (S,) bool
        spec: LossSpec,
        max_group: int,
        factors: Tensor | None,  # (G,) float64
        ids: Tensor | None,  # (S,) int64
    ) -> tuple[Tensor, ...]:
        op: Callable[..., Any] = torch.ops.groupdpo_kernels.preference_weights_forward
        found = tuple(op(token_logps, ref_logps, cu_seqlens, cu_groups, positive, *spec, max_group))
        if factors is None:
            return found
        return (factors * found[3]).sum().float(), *found[1:]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        token_logps, _, cu_seqlens, *_, factors, ids = inputs
        if factors is not None:  # 0 times an infinite loss: where what a group adds is NaN, so is all of its gradient
            factors = torch.where((factors * output[3]).isnan(), math.nan, factors)
        # d loss / d seq_logps is known in closed form by now, so these S numbers are all that the backward needs.
        ctx.save_for_backward(output[5], cu_seqlens, factors, ids)
        ctx.set_materialize_grads(False)  # only loss has a gradient: zeros for the others would be waste
        ctx.T = token_logps.shape[0]
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, cu_seqlens, factors, ids = ctx.saved_tensors
        op: Callable[..., Tensor] = torch.ops.groupdpo_kernels.preference_weights_backward
        if factors is not None:
            coefficients = (d_loss * len(factors) * factors[ids] * coefficients).float()  # one rounding, from float64
            d_loss = torch.ones_like(d_loss)
        return op(d_loss, coefficients, cu_seqlens, ctx.T), *[None] * 8
