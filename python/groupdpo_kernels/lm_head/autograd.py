"""The autograd Functions over the ops, which plug into any model.

They save their inputs and two numbers a row, 12 bytes (with statistics a third, the entropy; for a frozen head the
derivative; with a tolerance the candidates), and never more logits than the budget of logit_cache.py allows. Gradients
are of first order: a second backward through them raises.

torch.func.grad and vjp need whatever a backward reads to be an input or an output of its forward, so some outputs serve
the backward alone: the graph holds them once the caller has dropped them. torch.vmap raises, and says what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import NotUnderVmap
from ..reference import (
    Candidates,
    Head,
    HeadGradients,
    HeadOptions,
    LogpStats,
    Needs,
    RowGradients,
    head_of,
    row_gradients,
)
from ..replay import KnownLse
from . import logit_cache, ops
from .sparse import exact_rows


@dataclass(frozen=True)
class CallOptions:
    """What a call is asked for, besides its tensors. A Function reads what concerns it."""

    head: HeadOptions
    impl: str = "auto"  # as in linear_logps, as are the next two
    grad_tol: float = 0.0
    stats: bool = False  # whether the fields of LogpStats after lse are asked for
    columns: int = 0  # of the vocabulary in the logit cache
    known: KnownLse | None = None  # of the first of two passes: the forward computes the logits of the targets alone


class OfHead(NotUnderVmap):
    """Every Function here takes the tensors of a Head, targets and CallOptions, in this order: by their names, because
    torch.compile counts the parameters of a forward.
    """

    instead = (
        "linear_logps takes any leading dimensions, hidden (..., D) and targets (...); pass the whole batch at once"
    )


def _needs(ctx: Any, mass: bool = False) -> Needs:
    hidden, weight, bias, low_rank_hidden, low_rank_weight = ctx.needs_input_grad[:5]
    return Needs(hidden, weight, bias, low_rank_hidden, low_rank_weight, mass)


def _by_input(ctx: Any, g: HeadGradients) -> tuple[Tensor | None, ...]:
    """What a backward returns."""
    others = [None] * (len(ctx.needs_input_grad) - 5)
    return g.d_hidden, g.d_weight, g.d_bias, g.d_low_rank_hidden, g.d_low_rank_weight, *others


class LinearLogps:
    """`LinearLogps.apply(hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, options, stats, impl,
    known)`.

    hidden (..., D), weight (V, D), targets (...) int64, bias (V,) or None, low_rank_hidden (..., R) and low_rank_weight
    (V, R) or None, `options` a HeadOptions, `impl` as in linear_logps, `known` None, or without `stats` a KnownLse: the
    forward then computes the logits of the targets alone. It returns the six tensors of LogpStats in order. Those after
    lse have size 0 unless `stats`, and those after entropy carry no gradient (linear_logp_stats makes a gradient into
    them an error).
    """

    @staticmethod
    def apply(
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
        head = head_of(hidden, weight, bias, low_rank_hidden, low_rank_weight)
        return ExactLinearLogps.apply(*head, targets, CallOptions(options, impl, stats=stats, known=known))[:6]


class ExactLinearLogps(OfHead):
    """The autograd function of LinearLogps. Its seventh output is the lse in float64, (...), without a gradient; with a
    known lse the eighth are the token_logps that are known with it, for the backward alone.
    """

    @staticmethod
    def forward(
        hidden: Tensor,  # (..., D)
        weight: Tensor,  # (V, D)
        bias: Tensor,  # (V,) or (0,)
        low_rank_hidden: Tensor,  # (..., R)
        low_rank_weight: Tensor,  # (V, R)
        targets: Tensor,  # (...) int64
        options: CallOptions,
    ) -> tuple[Tensor, ...]:
        head = Head(hidden, weight, bias, low_rank_hidden, low_rank_weight)
        if options.known is None:
            return _with_lse(ops.linear_logps_forward(head, targets, options.head, options.stats, options.impl))
        token_logps = ops.token_logps_of(head, targets, options.known.lse, options.head)
        results = _with_lse(LogpStats(token_logps, options.known.lse.clone(), *_no_stats(token_logps)))
        return *results, options.known.token_logps.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[6]
        token_logps = output[0] if ctx.options.known is None else output[7]
        ctx.save_for_backward(*inputs[:6], token_logps, output[2], output[6])
        mark_differentiable(ctx, output, ctx.options.stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        *head, targets, token_logps, entropy, lse = ctx.saved_tensors
        options: CallOptions = ctx.options
        rows = rows_of(token_logps, entropy, *upstream[:3])
        needs = _needs(ctx, mass=options.known is not None)
        g = ops.linear_logps_backward(Head(*head), targets, lse, rows, options.head, needs, options.impl)
        if options.known is not None and g.mass is not None:
            options.known.drift = torch.where(targets == options.head.ignore_index, 0, g.mass.log())
        return _by_input(ctx, g)


class CachedLinearLogps(OfHead):
    """It gives the bits of ExactLinearLogps with impl="cpu", but hidden @ weight[:columns].T is computed once: this
    logit cache (logit_cache.py) is an eighth output, (T, columns) float32, for the backward alone. It is freed when the
    graph and that output are gone.
    """

    @staticmethod
    def forward(
        hidden: Tensor,  # (..., D)
        weight: Tensor,  # (V, D)
        bias: Tensor,  # (V,) or (0,)
        low_rank_hidden: Tensor,  # (..., R)
        low_rank_weight: Tensor,  # (V, R)
        targets: Tensor,  # (...) int64
        options: CallOptions,
    ) -> tuple[Tensor, ...]:
        head = Head(hidden, weight, bias, low_rank_hidden, low_rank_weight)
        out, cache = logit_cache.forward(head, targets, options.head, options.stats, options.columns)
        return *_with_lse(out), cache

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[6]
        ctx.save_for_backward(*inputs[:6], output[0], output[2], *output[6:])
        mark_differentiable(ctx, output, ctx.options.stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        *head, targets, token_logps, entropy, lse, cache = ctx.saved_tensors
        rows = rows_of(token_logps, entropy, *upstream[:3])
        needs = _needs(ctx)
        return _by_input(ctx, logit_cache.backward(Head(*head), targets, lse, rows, cache, ctx.options.head, needs))


def mark_differentiable(ctx: Any, output: tuple[Tensor, ...], stats: bool) -> None:
    """token_logps, lse and, with statistics, the entropy."""
    ctx.mark_non_differentiable(*output[3 if stats else 2 :])
    # None says that nobody uses the entropy's gradient; and zeros for a logit cache would be as large as it is.
    ctx.set_materialize_grads(False)


def rows_of(
    token_logps: Tensor,  # (...)
    entropy: Tensor,  # (...), or (0,) without statistics
    d_token_logps: Tensor | None,  # (...), as are the next two
    d_lse: Tensor | None,
    d_entropy: Tensor | None,
) -> RowGradients:
    if entropy.shape != token_logps.shape:
        d_entropy = None  # torch.compile has (0,) zeros for it
    return row_gradients(token_logps, *_or_zeros(token_logps, d_token_logps, d_lse), entropy, d_entropy)


def _with_lse(stats: LogpStats) -> tuple[Tensor, ...]:
    """The six tensors for the user, whose lse carries the gradient, and the lse in float64, which does not."""
    assert stats.lse is not None
    rounded = stats.lse.to(stats.token_logps.dtype, copy=True)
    return *cast(tuple[Tensor, ...], tuple(stats._replace(lse=rounded))), stats.lse


def _no_stats(like: Tensor) -> tuple[Tensor, ...]:
    return (*(like.new_empty(0) for _ in range(3)), like.new_empty(0, dtype=torch.bool))


def _or_zeros(like: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(like) if a is None else a, torch.zeros_like(like) if b is None else b


class FrozenLinearLogps(OfHead):
    """LinearLogps for a head that needs no gradient of its own. d token_logps / d hidden does not depend on the
    upstream gradient, so the forward stores it, in the dtype of hidden, and the backward scales its rows: two GEMMs in
    all, not three. With grad_tol > 0 the forward leaves out what it can (sparse.py), by the bound for upstream
    gradients of one size; the backward knows their sizes, and sends rows through the exact path until the bound holds.
    Only token_logps is differentiable, in hidden and low_rank_hidden. The outputs after lse, for the backward alone,
    are the fields of ops.FrozenHead from its lse on.
    """

    @staticmethod
    def forward(
        hidden: Tensor,  # (..., D)
        weight: Tensor,  # (V, D)
        bias: Tensor,  # (V,) or (0,)
        low_rank_hidden: Tensor,  # (..., R)
        low_rank_weight: Tensor,  # (V, R)
        targets: Tensor,  # (...) int64
        options: CallOptions,
    ) -> tuple[Tensor, ...]:
        head = Head(hidden, weight, bias, low_rank_hidden, low_rank_weight)
        token_logps, lse, *rest = ops.frozen_head(head, targets, options.head, options.grad_tol, options.impl)
        return token_logps, lse.to(token_logps.dtype, copy=True), lse, *rest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options = inputs[6]
        ctx.save_for_backward(
            *output[3:5], *((*output[5:], output[2], *inputs[:6]) if ctx.options.grad_tol > 0 else ())
        )
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros for the derivative would be as large as it is

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token_logps: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        options: CallOptions = ctx.options
        needs = Needs(hidden=ctx.needs_input_grad[0], low_rank_hidden=ctx.needs_input_grad[3])
        if d_token_logps is None:
            return _by_input(ctx, HeadGradients(None, None, None, None, None))
        d_hidden, d_low_rank_hidden = (
            (x * d_token_logps[..., None]).to(x.dtype) if needed else None
            for x, needed in zip(ctx.saved_tensors, (needs.hidden, needs.low_rank_hidden))
        )
        if options.grad_tol > 0:
            _, _, non_target_probs, dropped, lse, *head, targets = ctx.saved_tensors
            d_lse, live = torch.zeros_like(non_target_probs), targets != options.head.ignore_index
            rows = exact_rows(non_target_probs, dropped, d_token_logps, d_lse, live, options.grad_tol)
            rest = torch.where(rows, targets, options.head.ignore_index)
            upstream = RowGradients(d_token_logps * non_target_probs, -d_token_logps)
            g = ops.linear_logps_backward(Head(*head), rest, lse, upstream, options.head, needs, options.impl)
            d_hidden, d_low_rank_hidden = (
                None if x is None or exact is None else torch.where(rows[..., None], exact, x)
                for x, exact in ((d_hidden, g.d_hidden), (d_low_rank_hidden, g.d_low_rank_hidden))
            )
        return _by_input(ctx, HeadGradients(d_hidden, None, None, d_low_rank_hidden, None))


class SparseLinearLogps(OfHead):
    """LinearLogps with gradients over few vocabulary entries a row. It takes one more input, a seed, () int64 on the
    CPU, or None. Without a seed the relative L1 error of the gradients in d_logits over the call is at most `grad_tol`
    > 0, whatever the data and the upstream gradient; with a seed they are unbiased, and the tail is sampled
    (sparse.py). token_logps and lse are differentiable; the outputs after them, for the backward alone, are the fields
    of Candidates.
    """

    @staticmethod
    def forward(
        hidden: Tensor,  # (..., D)
        weight: Tensor,  # (V, D)
        bias: Tensor,  # (V,) or (0,)
        low_rank_hidden: Tensor,  # (..., R)
        low_rank_weight: Tensor,  # (V, R)
        targets: Tensor,  # (...) int64
        options: CallOptions,
        seed: Tensor | None,  # () int64, on the CPU
    ) -> tuple[Tensor, ...]:
        head = Head(hidden, weight, bias, low_rank_hidden, low_rank_weight)
        token_logps, found = ops.sparse_forward(head, targets, options.head, options.grad_tol, options.impl, seed)
        return token_logps, found.lse.to(token_logps.dtype, copy=True), *found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.options, ctx.grad_tol = inputs[6], inputs[6].grad_tol if inputs[7] is None else None
        ctx.save_for_backward(*inputs[:6], *output[2:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)  # zeros for the candidates would be as large as they are

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token_logps: Tensor | None, d_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        head, targets, found = Head(*saved[:5]), saved[5], Candidates(*saved[6:])
        options: CallOptions = ctx.options
        upstream = _or_zeros(found.non_target_probs, d_token_logps, d_lse)
        arguments = (head, targets, found, *upstream, options.head, ctx.grad_tol, _needs(ctx), options.impl)
        return _by_input(ctx, ops.sparse_backward(*arguments))


class RefuseGradient(torch.autograd.Function):
    """`RefuseGradient.apply(value, anchor, name)` returns `value`, tied to the graph of `anchor` so that a gradient
    into it raises instead of vanishing.
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
        # This is an op, so that a compiled backward raises when it runs, not when it is traced.
        return None, ops.refuse_gradient(gradient, ctx.name), None
