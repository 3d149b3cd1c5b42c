"""The autograd Functions over the ops: what plugs into any model.

They save their inputs and one lse a row, never anything of size (T, V). First order only: a second backward through
them raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops
from .ops import Head
from .reference import HeadOptions


class LinearLogps(torch.autograd.Function):
    """`LinearLogps.apply(hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, options, stats, impl)`.

    hidden (..., D), weight (V, D), targets (...) int64, bias (V,) or None, low_rank_hidden (..., R) and low_rank_weight
    (V, R) or None, `options` a HeadOptions, `impl` as in linear_logps. Returns the six tensors of LogpStats in order.
    token_logps and lse are differentiable; the other four are of size 0 unless `stats`, and carry no gradient
    (linear_logp_stats makes a gradient into them an error).
    """

    @staticmethod
    def forward(
        hidden: Tensor,  # (..., D)
        weight: Tensor,  # (V, D)
        targets: Tensor,  # (...) int64
        bias: Tensor | None,  # (V,)
        low_rank_hidden: Tensor | None,  # (..., R)
        low_rank_weight: Tensor | None,  # (V, R)
        options: HeadOptions,
        stats: bool,
        impl: str,
    ) -> tuple[Tensor, ...]:
        return tuple(
            ops.linear_logps_forward(
                Head(hidden, weight, bias, low_rank_hidden, low_rank_weight), targets, options, stats, impl
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, ctx.options, _, ctx.impl = inputs
        ctx.save_for_backward(hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, output[1])
        ctx.mark_non_differentiable(*output[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token_logps: Tensor, d_lse: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *head, targets, lse = ctx.saved_tensors
        need = ctx.needs_input_grad  # (hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, ...)
        needs = (need[0], need[1], need[3], need[4], need[5])
        g = ops.linear_logps_backward(Head(*head), targets, lse, d_token_logps, d_lse, ctx.options, needs, ctx.impl)
        return g.d_hidden, g.d_weight, None, g.d_bias, g.d_low_rank_hidden, g.d_low_rank_weight, None, None, None


class RefuseGradient(torch.autograd.Function):
    """`RefuseGradient.apply(value, anchor, name)`: `value`, tied to the graph of `anchor` so that a gradient into it
    raises instead of vanishing.
    """

    @staticmethod
    def forward(value: Tensor, anchor: Tensor, name: str) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        if not torch.compiler.is_compiling():
            raise ops.not_differentiable(ctx.name)
        # An op, so that a compiled backward raises when it runs, not when it is traced.
        return None, ops.refuse_gradient(gradient, ctx.name), None
