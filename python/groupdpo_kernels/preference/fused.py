"""The torch.library ops of the preference losses: schema, fake and the choice of an implementation; the twin of ops.py
for the vectors after the head.

`groupdpo_kernels::preference_weights_forward` returns, besides what a user sees, the closed-form coefficients d loss /
d seq_logps; `groupdpo_kernels::preference_weights_backward` spreads them over tokens. The reference has no op:
objective.py is plain PyTorch and autograd's own. Imports torch alone. Values inside tensors are checked in
objective.py on a CPU, and give NaN on a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import NotUnderVmap
from ..lm_head.extension import extension_why_not
from .segments import as_offsets

IMPLS = ("triton", "cpu", "reference")  # in the order "auto" tries them
_LIBRARY = torch.library.Library("groupdpo_kernels", "FRAGMENT")

_VECTORS = "Tensor token_logps, Tensor? ref_logps, Tensor cu_seqlens, Tensor cu_groups, Tensor positive"
_SPEC = (
    "str loss, float beta, bool average, bool subtract_reference, float nll_weight, float label_smoothing, float gamma,"
    " float alpha, float tau, float ceiling, bool balance_reference, bool balance_normalize"
)
_RESULTS = (
    "(Tensor loss, Tensor seq_logps, Tensor rewards, Tensor group_losses, Tensor balance_weights, Tensor coefficients)"
)
# The C++ op takes the place of a loss in its own list, and int64 offsets.
_LIBRARY.define(f"preference_weights_forward_cpu({_VECTORS}, {_SPEC.replace('str loss', 'int loss')}) -> {_RESULTS}")
_LIBRARY.define(
    "preference_weights_backward_cpu(Tensor d_loss, Tensor coefficients, Tensor cu_seqlens, int T) -> Tensor"
)


class LossSpec(NamedTuple):
    """An Objective with its conventions resolved, in the order of the ops' schema. ceiling 0: no balance."""

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


def extension_losses() -> tuple[str, ...]:
    """The losses that the C++ op knows."""
    return tuple(getattr(importlib.import_module("groupdpo_kernels._C"), "PREFERENCE_LOSSES", ()))


def why_not(impl: str, device: torch.device, dtype: torch.dtype, loss: object, max_group: int) -> list[str]:
    """Every reason why `impl` cannot compute a preference loss of token_logps on `device`; empty if it can."""
    if impl == "triton":
        try:
            launcher = importlib.import_module("groupdpo_kernels.kernels.preference_weights")
        except ImportError as error:
            return [f"triton does not import: {error}; run `pip install 'triton>=3.6,<3.8'`"]
        return launcher.why_not(device, dtype, loss, max_group)
    if impl == "cuda":
        return ["preference_loss has no CUDA C++ kernel: its device kernels are in Triton"]
    if impl == "cpu":
        reasons = extension_why_not()
        if device.type != "cpu":
            reasons.append(f"token_logps is on {device}: the C++ op wants CPU tensors")
        if dtype == torch.float64:
            reasons.append("token_logps is float64: only the reference computes in float64")
        if not isinstance(loss, str):
            reasons.append(f"loss {loss!r} is a callable: only the reference calls it")
        elif not reasons and loss not in extension_losses():
            reasons.append(f"loss {loss!r} is not in the C++ op")
        return reasons
    return []


def resolve(impl: str, device: torch.device, dtype: torch.dtype, loss: object, max_group: int) -> str:
    """The implementation that runs. An explicit choice never falls back: it raises with every reason."""
    if impl == "auto":
        return next(name for name in IMPLS if not why_not(name, device, dtype, loss, max_group))
    reasons = why_not(impl, device, dtype, loss, max_group)
    if reasons:
        raise ValueError(f"impl={impl!r} cannot run here: " + "; ".join(reasons))
    return impl


# What torch.compiler.assume_constant_result does, less its import of dynamo: a trace calls it and keeps the answer.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@torch.library.custom_op(
    "groupdpo_kernels::preference_weights_forward",
    mutates_args=(),
    schema=f"({_VECTORS}, {_SPEC}, int max_group, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _preference_weights_forward(*args):
    *inputs, max_group, impl = args
    if impl == "triton":
        launcher = importlib.import_module("groupdpo_kernels.kernels.preference_weights")
        return launcher.preference_weights_forward(*inputs, max_group)
    token_logps, ref_logps, cu_seqlens, cu_groups, positive, loss, *rest = inputs
    op = torch.ops.groupdpo_kernels.preference_weights_forward_cpu
    vectors = (token_logps.contiguous(), ref_logps if ref_logps is None else ref_logps.contiguous())
    offsets = (cu_seqlens.long().contiguous(), cu_groups.long().contiguous())
    return op(*vectors, *offsets, positive.contiguous(), extension_losses().index(loss), *rest)


@_preference_weights_forward.register_fake
def _(token_logps, ref_logps, cu_seqlens, cu_groups, positive, *rest):
    S, G = positive.shape[0], cu_groups.shape[0] - 1
    return tuple(token_logps.new_empty(shape) for shape in ((), (S,), (S,), (G,), (S,), (S,)))


@torch.library.custom_op(
    "groupdpo_kernels::preference_weights_backward",
    mutates_args=(),
    schema="(Tensor d_loss, Tensor coefficients, Tensor cu_seqlens, SymInt T, str impl) -> Tensor",
)
def _preference_weights_backward(d_loss, coefficients, cu_seqlens, T, impl):
    if impl == "triton":
        launcher = importlib.import_module("groupdpo_kernels.kernels.preference_weights")
        return launcher.preference_weights_backward(d_loss, coefficients, cu_seqlens, T)
    op = torch.ops.groupdpo_kernels.preference_weights_backward_cpu
    return op(d_loss, coefficients, cu_seqlens.long().contiguous(), T)


@_preference_weights_backward.register_fake
def _(d_loss, coefficients, cu_seqlens, T, impl):
    return coefficients.new_empty(T)


# Typed doors to the ops.


def preference_weights_forward(
    token_logps: Tensor,  # (T,) float32
    ref_logps: Tensor | None,  # (S,) or (T,) float32
    cu_seqlens: Tensor,  # (S+1,) int32 | int64
    cu_groups: Tensor,  # (G+1,) int32 | int64
    positive: Tensor,  # (S,) bool
    spec: LossSpec,
    max_group: int,
    impl: str,
) -> tuple[Tensor, ...]:
    op: Callable[..., Any] = torch.ops.groupdpo_kernels.preference_weights_forward
    return tuple(op(token_logps, ref_logps, cu_seqlens, cu_groups, positive, *spec, max_group, impl))


def preference_weights_backward(
    d_loss: Tensor,  # () float32
    coefficients: Tensor,  # (S,) float32
    cu_seqlens: Tensor,  # (S+1,) int32 | int64
    T: int,
    impl: str,
) -> Tensor:  # (T,) float32
    return torch.ops.groupdpo_kernels.preference_weights_backward(d_loss, coefficients, cu_seqlens, T, impl)


class PreferenceWeights:
    """`PreferenceWeights.apply(token_logps, ref_logps, cu_seqlens, cu_groups, positive, spec, max_group, impl)`.

    token_logps (T,) float32, ref_logps (S,), (T,) or None, integers cu_seqlens (S+1,) and cu_groups (G+1,), positive
    (S,) bool, `spec` a LossSpec, `max_group` a bound on the responses of a group, `impl` "triton" or "cpu". Returns the
    five tensors of PreferenceLoss in order; only loss is differentiable, in token_logps.
    """

    @staticmethod
    def apply(
        token_logps: Tensor, ref_logps: Tensor | None, cu_seqlens: Tensor, cu_groups: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        offsets = (as_offsets("cu_seqlens", cu_seqlens), as_offsets("cu_groups", cu_groups))
        return WeightedPreference.apply(token_logps, ref_logps, *offsets, *rest)[:5]


class WeightedPreference(NotUnderVmap):
    """What PreferenceWeights applies. A sixth output is d loss / d seq_logps, (S,), without a gradient."""

    instead = "preference_loss takes all groups in one call (PreferenceGroups)"

    @staticmethod
    def forward(
        token_logps: Tensor,  # (T,) float32
        ref_logps: Tensor | None,  # (S,) or (T,) float32
        cu_seqlens: Tensor,  # (S+1,) int32 | int64
        cu_groups: Tensor,  # (G+1,) int32 | int64
        positive: Tensor,  # (S,) bool
        spec: LossSpec,
        max_group: int,
        impl: str,
    ) -> tuple[Tensor, ...]:
        return preference_weights_forward(
            token_logps, ref_logps, cu_seqlens, cu_groups, positive, spec, max_group, impl
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        token_logps, _, cu_seqlens, *_, ctx.impl = inputs
        # d loss / d seq_logps is known in closed form by now: nothing of the forward is kept but these S numbers.
        ctx.save_for_backward(output[5], cu_seqlens)
        ctx.set_materialize_grads(False)  # the outputs but loss have no gradient to make zeros for
        ctx.T = token_logps.shape[0]
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, cu_seqlens = ctx.saved_tensors
        d_token_logps = preference_weights_backward(d_loss, coefficients, cu_seqlens, ctx.T, ctx.impl)
        return d_token_logps, *[None] * 7
