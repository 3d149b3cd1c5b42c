"""The autograd Functions over the ops, which plug into any model.

They save their inputs and two numbers a row, 12 bytes (for a frozen head the derivative; with a tolerance the
candidates), and never more logits than the budget of logit_cache.py allows. Gradients are of first order: a second
backward through them raises.

torch.func.grad and vjp need whatever a backward reads to be an input or an output of its forward, so some outputs serve
the backward alone: the graph holds them once the caller has dropped them. torch.vmap raises, and says what to do.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import NotUnderVmap
from ..reference import Head, HeadOptions, LogpStats, row_gradients
from ..replay import KnownLse
from . import logit_cache, ops
from .sparse import Candidates, exact_rows


class OfHead(NotUnderVmap):
    instead = (
        "linear_logps takes any leading dimensions, hidden (..., D) and targets (...); pass the whole batch at once"
    )


class LinearLogps:
    """`LinearLogps.apply(hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, options, stats, impl,
    known)`.

    hidden (..., D), weight (V, D), targets (...) int64, bias (V,) or None, low_rank_hidden (..., R) and low_rank_weight
    (V, R) or None, `options` a HeadOptions, `impl` as in linear_logps, `known` None, or without `stats` a KnownLse: the
    forward then computes the logits of the targets alone. It returns the six tensors of LogpStats in order. token_logps
    and lse are differentiable; the other four have size 0 unless `stats`, and carry no gradient (linear_logp_stats
    makes a gradient into them an error).
    """

    @staticmethod
    def apply(*arguments: Any) -> tuple[Tensor, ...]:
        return ExactLinearLogps.apply(*arguments)[:6]


class ExactLinearLogps(OfHead):
    """The autograd function of LinearLogps. Its seventh output is the lse in float64, (...), without a gradient."""

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
        if known is None:
            return _with_lse(ops.linear_logps_forward(head, targets, options, stats, impl))
        token_logps = ops.token_logps_of(head, targets, known.lse, options)
        return _with_lse(LogpStats(token_logps, known.lse.clone(), *_no_stats(token_logps)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, ctx.options, _, ctx.impl, ctx.known = inputs
        saved = (output[0], output[6])
        ctx.save_for_backward(hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, *saved)
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


class KeptLinearLogps(OfHead):
    """`KeptLinearLogps.apply(hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, options, stats,
    columns)`.

    It gives the bits of ExactLinearLogps with impl="cpu", but hidden @ weight[:columns].T is computed once: this logit
    cache (logit_cache.py) is an eighth output, (T, columns) float32, for the backward alone. It is freed when the graph
    and that output are gone.
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
        out, products = logit_cache.keeping_forward(head, targets, options, stats, columns)
        return *_with_lse(out), products

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, ctx.options, *_ = inputs
        saved = (output[0], *output[6:])
        ctx.save_for_backward(hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, *saved)
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)  # zeros for the logit cache would be as large as it is

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token_logps: Tensor | None, d_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        *head, targets, token_logps, lse, products = ctx.saved_tensors
        need = ctx.needs_input_grad  # (hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, ...)
        needs = (need[0], need[1], need[3], need[4], need[5])
        d_token_logps, d_lse = _or_zeros(token_logps, d_token_logps, d_lse)
        rows = row_gradients(token_logps, d_token_logps, d_lse)
        g = logit_cache.keeping_backward(Head(*head), targets, lse, *rows, products, ctx.options, needs)
        return g.d_hidden, g.d_weight, None, g.d_bias, g.d_low_rank_hidden, g.d_low_rank_weight, *[None] * 3


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
    """`FrozenLinearLogps.apply(hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, options, grad_tol,
    impl)`.

    LinearLogps for a head that needs no gradient of its own. d token_logps / d hidden does not depend on the upstream
    gradient, so the forward stores it, in the dtype of hidden, and the backward scales its rows: two GEMMs in all, not
    three. With grad_tol > 0 the forward leaves out what it can (sparse.py), by the bound for upstream gradients of one
    size; the backward knows their sizes, and sends rows through the exact path until the bound holds. The first two
    outputs are token_logps and lse; only token_logps is differentiable, in hidden and low_rank_hidden. The others, for
    the backward alone, are the lse in float64 and the other results of ops.linear_logps_jacobian, (0,) for an absent
    derivative.
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
        grad_tol: float,
        impl: str,
    ) -> tuple[Tensor, ...]:
        head = Head(hidden, weight, bias, low_rank_hidden, low_rank_weight)
        token_logps, lse, d_hidden, d_low_rank, *bound = ops.linear_logps_jacobian(
            head, targets, options, grad_tol, impl
        )
        derivatives = (d_hidden, hidden.new_empty(0) if d_low_rank is None else d_low_rank)
        return token_logps, lse.to(token_logps.dtype, copy=True), lse, *derivatives, *bound

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, ctx.options, ctx.grad_tol, ctx.impl = inputs
        head = (hidden, weight, bias, low_rank_hidden, low_rank_weight)
        ctx.save_for_backward(*output[3:5], *((*output[5:], output[2], targets, *head) if ctx.grad_tol > 0 else ()))
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros for the derivative would be as large as it is

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token_logps: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        need_hidden, need_low_rank = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
        if d_token_logps is None:
            return (None,) * 9
        d_hidden, d_low_rank_hidden = (
            (x * d_token_logps[..., None]).to(x.dtype) if needed else None
            for x, needed in zip(ctx.saved_tensors, (need_hidden, need_low_rank))
        )
        if ctx.grad_tol > 0:
            _, _, doubts, dropped, lse, targets, *head = ctx.saved_tensors
            d_lse, live = torch.zeros_like(doubts), targets != ctx.options.ignore_index
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


class SparseLinearLogps(OfHead):
    """`SparseLinearLogps.apply(hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, options, grad_tol,
    impl, seed)`.

    LinearLogps with gradients over few vocabulary entries a row. Without a seed their relative L1 error in d_logits
    over the call is at most `grad_tol` > 0, whatever the data and the upstream gradient; with a seed, () int64, they
    are unbiased, and the tail is sampled (sparse.py). The first two outputs are token_logps and lse, both
    differentiable; the others, for the backward alone, are the fields of Candidates after token_logps.
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
        grad_tol: float,
        impl: str,
        seed: Tensor | None,  # () int64, on the CPU
    ) -> tuple[Tensor, ...]:
        head = Head(hidden, weight, bias, low_rank_hidden, low_rank_weight)
        token_logps, lse, *found = ops.linear_logps_candidates(head, targets, options, grad_tol, impl, seed)
        return token_logps, lse.to(token_logps.dtype, copy=True), lse, *found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, ctx.options, ctx.grad_tol, ctx.impl, seed = (
            inputs
        )
        ctx.sampled = seed is not None
        saved = (output[0], *output[2:])
        ctx.save_for_backward(hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, *saved)
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)  # zeros for the candidates would be as large as they are

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_token_logps: Tensor | None, d_lse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        head, targets, found = Head(*saved[:5]), saved[5], Candidates(*saved[6:])
        need = ctx.needs_input_grad  # (hidden, weight, targets, bias, low_rank_hidden, low_rank_weight, ...)
        needs = (need[0], need[1], need[3], need[4], need[5])
        d_token_logps, d_lse = _or_zeros(found.token_logps, d_token_logps, d_lse)
        g = ops.linear_logps_sparse_backward(
            head, targets, found, d_token_logps, d_lse, ctx.options, ctx.grad_tol, needs, ctx.impl, ctx.sampled
        )
        return g.d_hidden, g.d_weight, None, g.d_bias, g.d_low_rank_hidden, g.d_low_rank_weight, *[None] * 4


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
