"""What `impl="reference"` runs: the specification with a bounded workspace and gradients in closed form.

It is plain PyTorch over blocks of (tokens x vocabulary), on any device, in float32, or float64 for float64 inputs. It
never holds (T, V) or checks values: rows must be live and ids valid. docs/math.md has formulas, reference.py the names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import (
    LEAST_LOG_PROB,
    Head,
    HeadGradients,
    HeadOptions,
    LogpStats,
    Needs,
    RowGradients,
    accumulator,
    known_softmax,
    log_probs,
)


def block_shape(
    T: int,
    D: int,
    V: int,
    workspace_bytes: int,
    itemsize: int,
) -> tuple[int, int]:
    """(token rows, vocabulary columns) of one block. Half of the budget is for widened hidden, the other half for eight
    blocks of logits and for the widened slice of the weight and its gradient: the loops hold those of one round while
    they make the next. A block has at least 16 x 16 entries, whatever the budget.
    """
    budget = workspace_bytes // itemsize
    rows = max(16, min(T, 1024, budget // (4 * max(D, 64) + 128)))
    columns = max(16, min(V, (budget - 2 * rows * D) // (4 * D + 8 * rows)))
    return rows, columns


def spans(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


class HeadBlocks:
    """The blocks of a head that are at hand, widened. The two iterators take the next block of tokens or of the
    vocabulary, and may be nested either way.
    """

    def __init__(
        self,
        head: Head,  # (T, .) rows
        options: HeadOptions,
        columns_a_row: int = 0,  # numbers a row that the caller holds besides
    ) -> None:
        self.head, self.options = head, options
        self.dtype = accumulator(head.hidden.dtype)
        (self.T, D), (self.V, R) = head.hidden.shape, head.low_rank_weight.shape
        workspace_bytes, itemsize = options.workspace_bytes, self.dtype.itemsize
        self.shape = block_shape(self.T, D + R + columns_a_row, self.V, workspace_bytes, itemsize)

    def tokens(self) -> Iterator[slice]:
        for t in spans(self.T, self.shape[0]):
            self.hidden = self.head.hidden[t].to(self.dtype)  # (t, D)
            self.low_rank_hidden = self.head.low_rank_hidden[t].to(self.dtype)  # (t, R)
            yield t

    def vocabulary(self) -> Iterator[slice]:
        for v in spans(self.V, self.shape[1]):
            self.weight = self.head.weight[v].to(self.dtype)  # (v, D)
            self.bias = self.head.bias[v].to(self.dtype)  # (v,) or (0,)
            self.low_rank_weight = self.head.low_rank_weight[v].to(self.dtype)  # (v, R)
            yield v

    def logits(self) -> tuple[Tensor, Tensor | None]:  # (t, v), (t, v)
        """The logits of the blocks at hand and, under softcap, the derivative of the cap."""
        z = self.hidden @ self.weight.T
        if self.low_rank_weight.shape[1]:
            z.addmm_(self.low_rank_hidden, self.low_rank_weight.T)
        if self.bias.numel():
            z += self.bias
        return _to_logits(z, self.options)


def _to_logits(z: Tensor, options: HeadOptions) -> tuple[Tensor, Tensor | None]:
    """Turns z = hidden @ weight.T (+ bias) into logits, in place; and, under softcap, the derivative of the cap."""
    z *= options.logit_scale
    d_cap = None
    if options.softcap is not None:
        z.div_(options.softcap).tanh_()
        d_cap = 1 - z * z
        z *= options.softcap
    return z.div_(options.temperature), d_cap


def _add_gemm(
    out: Tensor,  # (t, n), added to
    a: Tensor,  # (t, k)
    b: Tensor,  # (k, n)
) -> None:
    """out += a @ b, by parts of the sum. Some kernels of MKL add thousands of small terms one by one to what one large
    term, a token's target, has left.
    """
    for part in spans(a.shape[1], 2048):
        out += a[:, part] @ b[part]


def forward_in_blocks(
    head: Head,  # (T, .) rows
    targets: Tensor,  # (T,) int64, all valid
    options: HeadOptions,
) -> LogpStats:
    """All per-row results by online log-sum-exp over vocabulary blocks, with lse in float64. It takes 2 T D V FLOP, and
    keeps its workspace within the budget.
    """
    blocks = HeadBlocks(head, options)
    new, dtype = head.hidden.new_zeros, blocks.dtype
    dtypes = (dtype, torch.float64, dtype, dtype, dtype, torch.bool)
    results = [new(blocks.T, dtype=x) for x in dtypes]
    for t in blocks.tokens():
        y = targets[t]
        n = y.shape[0]
        top = new(n, dtype=dtype).fill_(-math.inf)
        top_id = new(n, dtype=torch.long)
        total, weighted, squares, plain, target_logits = (new(n, dtype=dtype) for _ in range(5))
        for v in blocks.vocabulary():
            z, _ = blocks.logits()
            target_logits += at_target(z, y, v)
            plain += z.sum(1)
            block_top, block_id = z.max(1)
            # The comparison is strict, so that among ties the first block, and in it the first id, stays. NaN stays.
            top_id = torch.where(block_top > top, _first_argmax(z, block_top, block_id) + v.start, top_id)
            new_top = torch.maximum(top, block_top)
            # A finite shift avoids -inf + inf in a row of -inf so far, and inf - inf where a logit is infinite.
            shift = torch.where(torch.isfinite(new_top), new_top, 0)
            rescale = torch.exp(top - shift)
            z -= shift[:, None]
            e = torch.exp(z)
            # weighted = sum e (z - shift) must be relative to the new shift, as total is.
            moved = torch.where(total == 0, 0, total * (top - shift))
            weighted = (weighted + moved) * rescale + torch.where(e == 0, 0, e * z).sum(1)
            total = total * rescale + e.sum(1)
            squares = squares * rescale * rescale + (e * e).sum(1)
            top = new_top
        lse = lse_of(torch.where(torch.isfinite(top), top, 0), total)
        values = (
            log_probs(target_logits, lse),
            lse,
            total.log() - weighted / total,
            plain / blocks.V,
            squares.log() - 2 * total.log(),
            top_id == y,
        )
        for out, value in zip(results, values):
            out[t] = value
    return LogpStats(*results)


def lse_of(shift: Tensor, total: Tensor) -> Tensor:  # (t,), (t,) sum exp(logits - shift) -> (t,) float64
    return shift.double() + total.double().log()


def at_target(block: Tensor, targets: Tensor, v: slice) -> Tensor:  # (t, v), (t,) -> (t,)
    """The entries of the targets, 0 in rows whose target lies outside this block of the vocabulary."""
    at = (targets - v.start).clamp(0, block.shape[1] - 1)[:, None]
    return torch.where((targets >= v.start) & (targets < v.stop), block.gather(1, at)[:, 0], 0)


def slopes_at_target(slope: Tensor | None, targets: Tensor, v: slice) -> Tensor:  # (t, v), (t,) -> (t,)
    """The cap's slopes at the targets, 1 without a cap; 0 in rows whose target lies outside this block."""
    if slope is None:
        return (targets >= v.start) & (targets < v.stop)
    return at_target(slope, targets, v)


def set_at_target(block: Tensor, targets: Tensor, v: slice, value: float) -> None:  # (t, v) in place, (t,)
    """Sets the entries of the targets that lie in this block of the vocabulary."""
    here = (targets >= v.start) & (targets < v.stop)
    at = (targets - v.start).clamp(0, block.shape[1] - 1)[:, None]
    block.scatter_(1, at, torch.where(here, value, block.gather(1, at)[:, 0])[:, None])


def _first_argmax(z: Tensor, top: Tensor, index: Tensor) -> Tensor:
    """The lowest index among ties, of which `Tensor.max` may return any."""
    ties = z == top[:, None]
    return torch.where(ties.any(1), ties.to(torch.int8).argmax(1), index)


def backward_in_blocks(
    head: Head,  # (T, .) rows
    targets: Tensor,  # (T,) int64, all valid
    lse: Tensor,  # (T,) float64, from the forward
    rows: RowGradients,  # (T,)
    options: HeadOptions,
    needs: Needs,
) -> HeadGradients:
    """The needed gradients from logits rebuilt block by block: 2 T D V FLOP and as many again for each of d_hidden and
    d_weight.

    The outer loop is over vocabulary blocks: a block of d_weight is accumulated over all rows and rounded once;
    d_hidden is accumulated in one float32 (T, D) buffer.
    """
    blocks = HeadBlocks(head, options)
    dtype = blocks.dtype

    def zeros(like: Tensor, dtype: torch.dtype, needed: bool) -> Tensor | None:
        return torch.zeros(like.shape, dtype=dtype, device=like.device) if needed else None

    # Gradients by row are accumulated over the whole loop, those by vocabulary a block at a time.
    d_hidden = zeros(head.hidden, dtype, needs.hidden)
    d_low_rank_hidden = zeros(head.low_rank_hidden, dtype, needs.low_rank_hidden)
    by_vocabulary = [
        zeros(x, x.dtype, needed)
        for x, needed in (
            (head.weight, needs.weight),
            (head.low_rank_weight, needs.low_rank_weight),
            (head.bias, needs.bias),
        )
    ]
    mass = head.hidden.new_zeros(blocks.T, dtype=dtype) if needs.mass else None
    shift, (d_target, d_softmax, d_entropy), factor = known_softmax(lse, rows.map(lambda x: x.to(dtype)))
    for v in blocks.vocabulary():
        of_block = [None if g is None else zeros(g[v], dtype, True) for g in by_vocabulary]
        for t in blocks.tokens():
            z, d_cap = blocks.logits()
            e = torch.exp(z.sub_(shift[t, None]))
            if mass is not None:
                mass[t] += e.sum(1)
            coefficients = d_softmax[t, None]
            if d_entropy is not None:
                coefficients = z.clamp_(min=LEAST_LOG_PROB).mul_(-d_entropy[t, None]).add_(coefficients)
            d_raw = e.mul_(coefficients)
            local = targets[t] - v.start
            r = ((local >= 0) & (local < v.stop - v.start)).nonzero()[:, 0]
            d_raw[r, local[r]] = d_target[t][r]
            if d_cap is not None:
                d_raw *= d_cap
            d_raw *= options.logit_scale / options.temperature
            if d_hidden is not None:
                _add_gemm(d_hidden[t], d_raw, blocks.weight)
            if d_low_rank_hidden is not None:
                _add_gemm(d_low_rank_hidden[t], d_raw, blocks.low_rank_weight)
            d_weight, d_low_rank_weight, d_bias = of_block
            if d_weight is not None:
                d_weight.addmm_(d_raw.T, blocks.hidden)
            if d_low_rank_weight is not None:
                d_low_rank_weight.addmm_(d_raw.T, blocks.low_rank_hidden)
            if d_bias is not None:
                d_bias += d_raw.sum(0)
        for gradient, part in zip(by_vocabulary, of_block):
            if gradient is not None and part is not None:
                gradient[v] = part
    d_hidden, d_low_rank_hidden = (
        None if x is None else x.to(head.hidden.dtype) for x in (d_hidden, d_low_rank_hidden)
    )
    d_weight, d_low_rank_weight, d_bias = by_vocabulary
    mass = None if mass is None else mass * factor
    return HeadGradients(d_hidden, d_weight, d_bias, d_low_rank_hidden, d_low_rank_weight, mass)


def target_logits(
    head: Head,  # (T, .) rows
    targets: Tensor,  # (T,) int64, all valid
    options: HeadOptions,
) -> Tensor:  # (T,) float32 | float64
    """logits[t, targets[t]] alone, in blocks of rows: 2 T D FLOP. token_logps need no more where the lse is known."""
    dtype = accumulator(head.hidden.dtype)
    (T, D), R = head.hidden.shape, head.low_rank_weight.shape[1]
    out = head.hidden.new_empty(T, dtype=dtype)

    def at(factor: Tensor, ids: Tensor) -> Tensor:
        return factor[ids].to(dtype)

    for t in spans(T, max(16, options.workspace_bytes // (4 * (D + R) * dtype.itemsize))):
        y = targets[t]
        z = (head.hidden[t].to(dtype) * at(head.weight, y)).sum(1)
        if R:
            z += (head.low_rank_hidden[t].to(dtype) * at(head.low_rank_weight, y)).sum(1)
        if head.bias.numel():
            z += at(head.bias, y)
        out[t] = _to_logits(z, options)[0]
    return out


# Relative error of float32 sums of exponentials by block, at most (64 additions a lane, then float64).
SUM_ERROR = 2.0**-18


class Expectations(NamedTuple):
    """The parts of d token_logps / d hidden, by row. With y the target and c the cap's slope (1 without a cap),

    d token_logps / d hidden = logit_scale / temperature (coefficients weight[y] - expected_weight).

    The target stays out of the sums, so that nothing cancels in a row whose p_y is near 1.
    """

    token_logps: Tensor  # (T,)
    lse: Tensor  # (T,) float64
    coefficients: Tensor  # (T,) c_y (1 - p_y)
    expected_weight: Tensor  # (T, D) sum over v != y of p_v c_v weight_v
    expected_low_rank: Tensor  # (T, R) sum over v != y of p_v c_v low_rank_weight_v
    non_target_probs: Tensor  # (T,) 1 - p_y; (0,) without a tolerance, as the next
    dropped: Tensor  # (T,) at least the sum of p_v that is left out


def expectations_in_blocks(
    head: Head,  # (T, .) rows
    targets: Tensor,  # (T,) int64, all valid
    options: HeadOptions,
    grad_tol: float = 0.0,
    least: float = 0.0,  # probability of an entry that is never left out; 0 without a tolerance
) -> Expectations:
    """Forward and expectations in one pass over the vocabulary, by online softmax: 4 T D V FLOP.

    With grad_tol > 0, where a row's likely entries hold nearly all of a block's probability, the others are left out of
    the expectations, as long as all that is left out so far is at most grad_tol of the sum of 1 - p_y so far, over the
    rows of a block of tokens.
    """
    blocks = HeadBlocks(head, options)
    dtype, T = blocks.dtype, blocks.T
    new = head.hidden.new_zeros
    z_target, coefficients, non_target_probs, left_out = (new(T, dtype=dtype) for _ in range(4))
    lse = new(T, dtype=torch.float64)
    expected_weight, expected_low_rank = (
        new((T, x.shape[1]), dtype=dtype) for x in (head.weight, head.low_rank_weight)
    )
    for t in blocks.tokens():
        y = targets[t]
        top, rest = new(y.shape[0], dtype=dtype).fill_(-math.inf), new(y.shape[0], dtype=dtype)  # without the target
        dropped = torch.zeros_like(rest)
        ahead = None
        if grad_tol > 0:
            # The target's logit bounds the row's sum of exponentials from below, from the first block on.
            rows = head._replace(hidden=head.hidden[t], low_rank_hidden=head.low_rank_hidden[t])
            ahead = target_logits(rows, y, options)
        for v in blocks.vocabulary():
            z, slope = blocks.logits()
            z_target[t] += at_target(z, y, v)
            coefficients[t] += slopes_at_target(slope, y, v)
            new_top = torch.maximum(top, z.max(1).values)
            shift = torch.where(torch.isfinite(new_top), new_top, 0)
            rescale = torch.exp(torch.where(top == -math.inf, -math.inf, top - shift))
            e = torch.exp(z - shift[:, None])
            set_at_target(e, y, v, 0.0)
            rest, dropped = rest * rescale + e.sum(1), dropped * rescale
            if ahead is not None:
                total = rest + torch.exp(ahead - shift)
                unlikely = torch.where(e < least * total[:, None], e, 0)
                skips = _affordable(unlikely.sum(1) / total, (grad_tol * rest - dropped) / total)
                dropped += torch.where(skips, unlikely.sum(1), 0)
                e -= torch.where(skips[:, None], unlikely, 0)
            if slope is not None:
                e *= slope
            for expected, factor in ((expected_weight, blocks.weight), (expected_low_rank, blocks.low_rank_weight)):
                expected[t].mul_(rescale[:, None]).addmm_(e, factor)
            top = new_top
        shift = torch.where(torch.isfinite(top), top, 0)
        total = rest + torch.exp(z_target[t] - shift)
        lse[t] = lse_of(shift, total)
        total = finite_or_nan(total)
        coefficients[t] *= rest / total
        non_target_probs[t] = rest / total
        left_out[t] = torch.where(dropped == 0, 0, dropped / total + SUM_ERROR * non_target_probs[t])
        for expected in (expected_weight, expected_low_rank):
            expected[t] /= total[:, None]
    bound = (non_target_probs, left_out) if grad_tol > 0 else (new(0, dtype=dtype), new(0, dtype=dtype))
    return Expectations(log_probs(z_target, lse), lse, coefficients, expected_weight, expected_low_rank, *bound)


def finite_or_nan(total: Tensor) -> Tensor:  # (t,) -> (t,)
    """NaN in place of an infinite sum of exponentials: where a logit is infinite, no probability of the row exists."""
    return torch.where(torch.isinf(total), torch.nan, total)


def _affordable(cost: Tensor, allowance: Tensor) -> Tensor:  # (t,), (t,) -> (t,) bool
    """The cheapest rows, whose costs sum to at most the sum of all allowances. Rows that are not finite never count."""
    order = cost.argsort(stable=True)
    fits = cost[order].cumsum(0) <= torch.where(torch.isfinite(allowance), allowance, 0).sum()
    return torch.zeros_like(fits).scatter_(0, order, fits)


def derivative(
    found: Expectations,
    head: Head,  # live rows, as are targets
    targets: Tensor,  # (T,) int64, all valid
    options: HeadOptions,
) -> tuple[Tensor, Tensor]:  # (T, D), (T, R) in the dtype of hidden
    """d token_logps / d hidden and d token_logps / d low_rank_hidden. Overwrites the expectations."""
    chain = options.logit_scale / options.temperature

    def of(expected: Tensor, factor: Tensor) -> Tensor:
        step = max(16, options.workspace_bytes // (4 * max(1, factor.shape[1]) * expected.element_size()))
        for t in spans(targets.shape[0], step):
            at_target = factor[targets[t]].to(expected.dtype).mul_(found.coefficients[t, None])
            expected[t].sub_(at_target).mul_(-chain)
        return expected.to(head.hidden.dtype)

    return of(found.expected_weight, head.weight), of(found.expected_low_rank, head.low_rank_weight)
