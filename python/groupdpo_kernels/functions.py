"""The autograd Functions over the ops: what plugs into any model.

They save their inputs and two numbers a row (a frozen head's: the derivative; with a tolerance: the candidates), and of
products only what kept.py's budget allows. First order only: a second backward through them raises.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import kept, ops, preference_ops
from .preference_ops import LossSpec
from .reference import Head, HeadOptions, row_gradients
from .replay import KnownLse
from .sparse import Candidates, exact_rows


class LinearLogps(torch.autograd.Function):
    """`LinearLogps.apply(hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, options, stats, impl,
    known)`.

    hidden (..., D), weight (V, D), targets (...) int64, bias (V,) or None, low_rank_hidden (..., R) and low_rank_weight
    (V, R) or None, `options` a HeadOptions, `impl` as in linear_logps, `known` None, or without `stats` a KnownLse: the
    forward then computes the logits of the targets alone. Returns the six tensors of LogpStats in order. token_logps
    and lse are differentiable; the other four are of size 0 unless `stats`, and carry no gradient (linear_logp_stats
    makes a gradient into them an error).
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
        known: KnownLse | None,
    ) -> tuple[Tensor, ...]:
        head = Head(hidden, weight, bias, low_rank_hidden, low_rank_weight)
        if known is not None:
            return ops.token_logps_of(head, targets, known.lse, options), known.lse.clone(), *_no_stats(known.lse)
        return cast(tuple[Tensor, ...], tuple(ops.linear_logps_forward(head, targets, options, stats, impl)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, ctx.options, _, ctx.impl, ctx.known = inputs
        ctx.save_for_backward(hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, *output[:2])
        ctx.mark_non_differentiable(*output[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token_logps: Tensor, d_lse: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        *head, targets, token_logps, lse = ctx.saved_tensors
        need = ctx.needs_input_grad  # (hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, ...)
        needs = (need[0], need[1], need[3], need[4], need[5], ctx.known is not None)
        rows = row_gradients(token_logps, d_token_logps, d_lse)
        g = ops.linear_logps_backward(Head(*head), targets, lse, *rows, ctx.options, needs, ctx.impl)
        if ctx.known is not None and g.mass is not None:
            ctx.known.drift = torch.where(targets == ctx.options.ignore_index, 0, g.mass.log())
        return g.d_hidden, g.d_weight, None, g.d_bias, g.d_low_rank_hidden, g.d_low_rank_weight, *[None] * 4


class KeptLinearLogps(torch.autograd.Function):
    """`KeptLinearLogps.apply(hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, options, stats,
    columns)`.

    As LinearLogps with impl="cpu", for the same bits: the products with the first `columns` of the vocabulary are
    computed once (kept.py). They are a seventh output, (T, columns) float32, for the backward alone: memory is theirs
    until the graph and that output are gone.
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
        columns: int,
    ) -> tuple[Tensor, ...]:
        head = Head(hidden, weight, bias, low_rank_hidden, low_rank_weight)
        out, products = kept.keeping_forward(head, targets, options, stats, columns)
        return *cast(tuple[Tensor, ...], tuple(out)), products

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, ctx.options, *_ = inputs
        saved = (*output[:2], output[6])
        ctx.save_for_backward(hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, *saved)
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)  # zeros for the products would be as large as they are

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token_logps: Tensor | None, d_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        *head, targets, token_logps, lse, products = ctx.saved_tensors
        need = ctx.needs_input_grad  # (hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, ...)
        needs = (need[0], need[1], need[3], need[4], need[5])
        upstream = (torch.zeros_like(lse) if x is None else x for x in (d_token_logps, d_lse))
        rows = row_gradients(token_logps, *upstream)
        g = kept.keeping_backward(Head(*head), targets, lse, *rows, products, ctx.options, needs)
        return g.d_hidden, g.d_weight, None, g.d_bias, g.d_low_rank_hidden, g.d_low_rank_weight, *[None] * 3


def _no_stats(like: Tensor) -> tuple[Tensor, ...]:
    return (*(like.new_empty(0) for _ in range(3)), like.new_empty(0, dtype=torch.bool))


class FrozenLinearLogps(torch.autograd.Function):
    """`FrozenLinearLogps.apply(hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, options, grad_tol,
    impl)`.

    As LinearLogps, for a head that needs no gradient of its own: d token_logps / d hidden does not depend on the
    upstream gradient, so the forward stores it, in the dtype of hidden, and the backward scales its rows. Two products
    in all, not three. With grad_tol > 0 the forward leaves out what it can (sparse.py), by the bound for upstream
    gradients of one size; the backward knows their sizes, and sends rows through the exact path until it holds for
    them. Returns (token_logps, lse); only token_logps is differentiable, in hidden and low_rank_hidden.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (..., D)
        weight: Tensor,  # (V, D)
        targets: Tensor,  # (...) int64
        bias: Tensor | None,  # (V,)
        low_rank_hidden: Tensor | None,  # (..., R)
        low_rank_weight: Tensor | None,  # (V, R)
        options: HeadOptions,
        grad_tol: float,
        impl: str,
    ) -> tuple[Tensor, Tensor]:
        head = Head(hidden, weight, bias, low_rank_hidden, low_rank_weight)
        token_logps, lse, *found = ops.linear_logps_jacobian(head, targets, options, grad_tol, impl)
        ctx.save_for_backward(*found, *((lse, targets, *head) if grad_tol > 0 else ()))
        ctx.options, ctx.grad_tol, ctx.impl = options, grad_tol, impl
        ctx.mark_non_differentiable(lse)
        return token_logps, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token_logps: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        need_hidden, need_low_rank = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        d_hidden, d_low_rank_hidden = (
            None if x is None or not needed else (x * d_token_logps[..., None]).to(x.dtype)
            for x, needed in zip(ctx.saved_tensors, (need_hidden, need_low_rank))
        )
        if ctx.grad_tol > 0:
            _, _, doubts, dropped, lse, targets, *head = ctx.saved_tensors
            d_lse, live = torch.zeros_like(lse), targets != ctx.options.ignore_index
            rows = exact_rows(doubts, dropped, d_token_logps, d_lse, live, ctx.grad_tol)
            rest = torch.where(rows, targets, ctx.options.ignore_index)
            needs = (need_hidden, False, False, need_low_rank, False, False)
            upstream = (d_token_logps * doubts, -d_token_logps)
            g = ops.linear_logps_backward(Head(*head), rest, lse, *upstream, ctx.options, needs, ctx.impl)
            d_hidden, d_low_rank_hidden = (
                None if x is None or exact is None else torch.where(rows[..., None], exact, x)
                for x, exact in ((d_hidden, g.d_hidden), (d_low_rank_hidden, g.d_low_rank_hidden))
            )
        return d_hidden, None, None, None, d_low_rank_hidden, None, None, None, None


class SparseLinearLogps(torch.autograd.Function):
    """`SparseLinearLogps.apply(hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, options, grad_tol,
    impl, seed)`.

    As LinearLogps, with gradients over few vocabulary entries a row. Without a seed their relative L1 error in d_logits
    over the call is at most `grad_tol` > 0, whatever the data and the upstream gradient; with one, () int64, they are
    unbiased, and what the entries leave out is drawn (sparse.py). Returns (token_logps, lse), both differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (..., D)
        weight: Tensor,  # (V, D)
        targets: Tensor,  # (...) int64
        bias: Tensor | None,  # (V,)
        low_rank_hidden: Tensor | None,  # (..., R)
        low_rank_weight: Tensor | None,  # (V, R)
        options: HeadOptions,
        grad_tol: float,
        impl: str,
        seed: Tensor | None,  # () int64, on the CPU
    ) -> tuple[Tensor, Tensor]:
        head = Head(hidden, weight, bias, low_rank_hidden, low_rank_weight)
        token_logps, lse, *found = ops.linear_logps_candidates(head, targets, options, grad_tol, impl, seed)
        ctx.save_for_backward(*head, targets, lse, *found)
        ctx.options, ctx.grad_tol, ctx.impl, ctx.sampled = options, grad_tol, impl, seed is not None
        return token_logps, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token_logps: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        head, targets, found = Head(*saved[:5]), saved[5], Candidates(saved[6], *saved[6:])
        need = ctx.needs_input_grad  # (hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, ...)
        needs = (need[0], need[1], need[3], need[4], need[5])
        g = ops.linear_logps_sparse_backward(
            head, targets, found, d_token_logps, d_lse, ctx.options, ctx.grad_tol, needs, ctx.impl, ctx.sampled
        )
        return g.d_hidden, g.d_weight, None, g.d_bias, g.d_low_rank_hidden, g.d_low_rank_weight, *[None] * 4


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
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        if not torch.compiler.is_compiling():
            raise ops.not_differentiable(ctx.name)
        # An op, so that a compiled backward raises when it runs, not when it is traced.
        return None, ops.refuse_gradient(gradient, ctx.name), None


class PreferenceWeights(torch.autograd.Function):
    """`PreferenceWeights.apply(token_logps, ref_logps, cu_seqlens, cu_groups, positive, spec, max_group, impl)`.

    token_logps (T,) float32, ref_logps (S,), (T,) or None, cu_seqlens (S+1,), cu_groups (G+1,), positive (S,) bool,
    `spec` a LossSpec, `max_group` a bound on the responses of a group, `impl` "triton" or "cpu". Returns the five
    tensors of PreferenceLoss in order; only loss is differentiable, in token_logps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        token_logps: Tensor,  # (T,) float32
        ref_logps: Tensor | None,  # (S,) or (T,) float32
        cu_seqlens: Tensor,  # (S+1,) int32 | int64
        cu_groups: Tensor,  # (G+1,) int32 | int64
        positive: Tensor,  # (S,) bool
        spec: LossSpec,
        max_group: int,
        impl: str,
    ) -> tuple[Tensor, ...]:
        *outputs, coefficients = preference_ops.preference_weights_forward(
            token_logps, ref_logps, cu_seqlens, cu_groups, positive, spec, max_group, impl
        )
        # d loss / d seq_logps is known in closed form by now: nothing of the forward is kept but these S numbers.
        ctx.save_for_backward(coefficients, cu_seqlens)
        ctx.set_materialize_grads(False)  # the five outputs but loss have no gradient to make zeros for
        ctx.T, ctx.impl = token_logps.shape[0], impl
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, cu_seqlens = ctx.saved_tensors
        d_token_logps = preference_ops.preference_weights_backward(d_loss, coefficients, cu_seqlens, ctx.T, ctx.impl)
        return d_token_logps, *[None] * 7
