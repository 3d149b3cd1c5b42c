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

from ..reference import Head, HeadGradients, HeadOptions, LogpStats, accumulator, known_softmax, log_probs


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


def _spans(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _add_gemm(
    out: Tensor,  # (t, n), added to
    a: Tensor,  # (t, k)
    b: Tensor,  # (k, n)
) -> None:
    """out += a @ b, by parts of the sum. Some kernels of MKL add thousands of small terms one by one to what one large
    term, a token's target, has left.
    """
    for part in _spans(a.shape[1], 2048):
        out += a[:, part] @ b[part]


def _block_logits(
    hidden: Tensor,  # (t, D), already widened, as are the others
    weight: Tensor,  # (v, D)
    bias: Tensor | None,  # (v,)
    low_rank_hidden: Tensor | None,  # (t, R)
    low_rank_weight: Tensor | None,  # (v, R)
    options: HeadOptions,
) -> tuple[Tensor, Tensor | None]:
    """One block of logits and, under softcap, the derivative of the cap."""
    z = hidden @ weight.T
    if low_rank_hidden is not None and low_rank_weight is not None:
        z.addmm_(low_rank_hidden, low_rank_weight.T)
    if bias is not None:
        z += bias
    return _to_logits(z, options)


def _to_logits(z: Tensor, options: HeadOptions) -> tuple[Tensor, Tensor | None]:
    """Turns z = hidden @ weight.T (+ bias) into logits, in place; and, under softcap, the derivative of the cap."""
    z *= options.logit_scale
    d_cap = None
    if options.softcap is not None:
        z.div_(options.softcap).tanh_()
        d_cap = 1 - z * z
        z *= options.softcap
    return z.div_(options.temperature), d_cap


def forward_in_blocks(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    low_rank_hidden: Tensor | None,  # (T, R)
    low_rank_weight: Tensor | None,  # (V, R)
    targets: Tensor,  # (T,) int64, all valid
    options: HeadOptions,
) -> LogpStats:
    """All per-row results by online log-sum-exp over vocabulary blocks, with lse in float64. It takes 2 T D V FLOP, and
    keeps its workspace within the budget.
    """
    dtype = accumulator(hidden.dtype)
    (T, D), V = hidden.shape, weight.shape[0]
    R = 0 if low_rank_weight is None else low_rank_weight.shape[1]
    rows, columns = block_shape(T, D + R, V, options.workspace_bytes, dtype.itemsize)
    new = hidden.new_zeros
    dtypes = (dtype, torch.float64, dtype, dtype, dtype, torch.bool)
    results = [new(T, dtype=x) for x in dtypes]
    for t in _spans(T, rows):
        h, y = hidden[t].to(dtype), targets[t]
        x = None if low_rank_hidden is None else low_rank_hidden[t].to(dtype)
        n = h.shape[0]
        top = new(n, dtype=dtype).fill_(-math.inf)
        top_id = new(n, dtype=torch.long)
        total, weighted, squares, plain, target_logits = (new(n, dtype=dtype) for _ in range(5))
        for v in _spans(V, columns):
            b = None if bias is None else bias[v].to(dtype)
            u = None if low_rank_weight is None else low_rank_weight[v].to(dtype)
            z, _ = _block_logits(h, weight[v].to(dtype), b, x, u, options)
            target_logits += _at_target(z, y, v)
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
        lse = _lse(torch.where(torch.isfinite(top), top, 0), total)
        values = (
            log_probs(target_logits, lse),
            lse,
            total.log() - weighted / total,
            plain / V,
            squares.log() - 2 * total.log(),
            top_id == y,
        )
        for out, value in zip(results, values):
            out[t] = value
    return LogpStats(*results)


def _lse(shift: Tensor, total: Tensor) -> Tensor:  # (t,), (t,) sum exp(logits - shift) -> (t,) float64
    return shift.double() + total.double().log()


def _at_target(block: Tensor, targets: Tensor, v: slice) -> Tensor:  # (t, v), (t,) -> (t,)
    """The entries of the targets, 0 in rows whose target lies outside this block of the vocabulary."""
    at = (targets - v.start).clamp(0, block.shape[1] - 1)[:, None]
    return torch.where((targets >= v.start) & (targets < v.stop), block.gather(1, at)[:, 0], 0)


def _first_argmax(z: Tensor, top: Tensor, index: Tensor) -> Tensor:
    """The lowest index among ties, of which `Tensor.max` may return any."""
    ties = z == top[:, None]
    return torch.where(ties.any(1), ties.to(torch.int8).argmax(1), index)


def backward_in_blocks(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    low_rank_hidden: Tensor | None,  # (T, R)
    low_rank_weight: Tensor | None,  # (V, R)
    targets: Tensor,  # (T,) int64, all valid
    lse: Tensor,  # (T,) float64, from the forward
    d_target: Tensor,  # (T,) from reference.row_gradients, as is d_softmax
    d_softmax: Tensor,  # (T,)
    options: HeadOptions,
    needs: tuple[bool, ...],  # which fields of HeadGradients are needed
) -> HeadGradients:
    """The needed gradients from logits rebuilt block by block: 2 T D V FLOP and as many again for each of d_hidden and
    d_weight.

    The outer loop is over vocabulary blocks: a block of d_weight is accumulated over all rows and rounded once;
    d_hidden is accumulated in one float32 (T, D) buffer.
    """
    dtype = accumulator(hidden.dtype)
    (T, D), V = hidden.shape, weight.shape[0]
    R = 0 if low_rank_weight is None else low_rank_weight.shape[1]
    rows, columns = block_shape(T, D + R, V, options.workspace_bytes, dtype.itemsize)
    inputs = (hidden, weight, bias, low_rank_hidden, low_rank_weight)
    # Gradients by row (0 and 3) are accumulated over the whole loop, those by vocabulary (1, 2, 4) a block at a time.
    out: list[Tensor | None] = [None] * 5
    mass = hidden.new_zeros(T, dtype=dtype) if needs[5] else None
    shift, d_softmax, factor = known_softmax(lse, d_softmax.to(dtype))
    for i, needed in enumerate(needs[:5]):
        if needed:
            source = inputs[i]
            assert source is not None  # needs comes from autograd: an absent input needs nothing
            out[i] = torch.zeros(source.shape, dtype=dtype if i in (0, 3) else source.dtype, device=source.device)
    for v in _spans(V, columns):
        w = weight[v].to(dtype)
        b = None if bias is None else bias[v].to(dtype)
        u = None if low_rank_weight is None else low_rank_weight[v].to(dtype)
        shapes = {1: w.shape, 2: w.shape[:1], 4: None if u is None else u.shape}
        block = {i: w.new_zeros(shape) for i, shape in shapes.items() if needs[i] and shape is not None}
        for t in _spans(T, rows):
            h = hidden[t].to(dtype)
            x = None if low_rank_hidden is None else low_rank_hidden[t].to(dtype)
            z, d_cap = _block_logits(h, w, b, x, u, options)
            e = torch.exp(z.sub_(shift[t, None]))
            if mass is not None:
                mass[t] += e.sum(1)
            d_raw = e.mul_(d_softmax[t, None])
            local = targets[t] - v.start
            r = ((local >= 0) & (local < w.shape[0])).nonzero()[:, 0]
            d_raw[r, local[r]] = d_target[t][r].to(dtype)
            if d_cap is not None:
                d_raw *= d_cap
            d_raw *= options.logit_scale / options.temperature
            if (d_hidden := out[0]) is not None:
                _add_gemm(d_hidden[t], d_raw, w)
            if (d_x := out[3]) is not None and u is not None:
                _add_gemm(d_x[t], d_raw, u)
            if 1 in block:
                block[1].addmm_(d_raw.T, h)
            if 2 in block:
                block[2] += d_raw.sum(0)
            if 4 in block and x is not None:
                block[4].addmm_(d_raw.T, x)
        for i, gradient in block.items():
            target = out[i]
            assert target is not None
            target[v] = gradient.to(target.dtype)
    for i in (0, 3):
        if (gradient_out := out[i]) is not None:
            out[i] = gradient_out.to(hidden.dtype)
    return HeadGradients._make([*out, None if mass is None else mass * factor])


def target_logits(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    low_rank_hidden: Tensor | None,  # (T, R)
    low_rank_weight: Tensor | None,  # (V, R)
    targets: Tensor,  # (T,) int64, all valid
    options: HeadOptions,
) -> Tensor:  # (T,) float32 | float64
    """logits[t, targets[t]] alone, in blocks of rows: 2 T D FLOP. token_logps need no more where the lse is known."""
    dtype = accumulator(hidden.dtype)
    T, D = hidden.shape
    R = 0 if low_rank_weight is None else low_rank_weight.shape[1]
    out = hidden.new_empty(T, dtype=dtype)
    for t in _spans(T, max(16, options.workspace_bytes // (4 * (D + R) * dtype.itemsize))):
        y = targets[t]
        z = (hidden[t].to(dtype) * weight[y].to(dtype)).sum(1)
        if low_rank_hidden is not None and low_rank_weight is not None:
            z += (low_rank_hidden[t].to(dtype) * low_rank_weight[y].to(dtype)).sum(1)
        if bias is not None:
            z += bias[y].to(dtype)
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
    expected_low_rank: Tensor | None  # (T, R) sum over v != y of p_v c_v low_rank_weight_v
    doubts: Tensor | None = None  # (T,) non-target probability 1 - p_y; None without a tolerance
    dropped: Tensor | None = None  # (T,) at least the sum of p_v that is left out; None without a tolerance


def expectations_in_blocks(
    hidden: Tensor,  # (T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    low_rank_hidden: Tensor | None,  # (T, R)
    low_rank_weight: Tensor | None,  # (V, R)
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
    dtype = accumulator(hidden.dtype)
    (T, D), V = hidden.shape, weight.shape[0]
    R = 0 if low_rank_weight is None else low_rank_weight.shape[1]
    rows, columns = block_shape(T, D + R, V, options.workspace_bytes, dtype.itemsize)
    z_target, coefficients, doubts, left_out = (hidden.new_zeros(T, dtype=dtype) for _ in range(4))
    lse = hidden.new_zeros(T, dtype=torch.float64)
    expected_weight = hidden.new_zeros((T, D), dtype=dtype)
    expected_low_rank = None if low_rank_weight is None else hidden.new_zeros((T, R), dtype=dtype)
    for t in _spans(T, rows):
        h, y = hidden[t].to(dtype), targets[t]
        x = None if low_rank_hidden is None else low_rank_hidden[t].to(dtype)
        top, rest = h.new_full((h.shape[0],), -math.inf), h.new_zeros(h.shape[0])  # rest leaves out the target
        dropped = torch.zeros_like(rest)
        # The target's logit bounds the row's sum of exponentials from below, from the first block on.
        ahead = target_logits(hidden[t], weight, bias, x, low_rank_weight, y, options) if grad_tol > 0 else None
        for v in _spans(V, columns):
            w = weight[v].to(dtype)
            b = None if bias is None else bias[v].to(dtype)
            u = None if low_rank_weight is None else low_rank_weight[v].to(dtype)
            z, slope = _block_logits(h, w, b, x, u, options)
            here = (y >= v.start) & (y < v.stop)
            at = (y - v.start).clamp(0, z.shape[1] - 1)[:, None]
            z_target[t] += _at_target(z, y, v)
            coefficients[t] += here.to(dtype) if slope is None else _at_target(slope, y, v)
            new_top = torch.maximum(top, z.max(1).values)
            shift = torch.where(torch.isfinite(new_top), new_top, 0)
            rescale = torch.exp(torch.where(top == -math.inf, -math.inf, top - shift))
            e = torch.exp(z - shift[:, None])
            e.scatter_(1, at, torch.where(here, 0, e.gather(1, at)[:, 0])[:, None])
            rest, dropped = rest * rescale + e.sum(1), dropped * rescale
            if ahead is not None:
                total = rest + torch.exp(ahead - shift)
                unlikely = torch.where(e < least * total[:, None], e, 0)
                skips = _affordable(unlikely.sum(1) / total, (grad_tol * rest - dropped) / total)
                dropped += torch.where(skips, unlikely.sum(1), 0)
                e -= torch.where(skips[:, None], unlikely, 0)
            if slope is not None:
                e *= slope
            for expected, factor in ((expected_weight, w), (expected_low_rank, u)):
                if expected is not None and factor is not None:
                    expected[t].mul_(rescale[:, None]).addmm_(e, factor)
            top = new_top
        shift = torch.where(torch.isfinite(top), top, 0)
        total = rest + torch.exp(z_target[t] - shift)
        lse[t] = _lse(shift, total)
        total = _finite_or_nan(total)
        coefficients[t] *= rest / total
        doubts[t] = rest / total
        left_out[t] = torch.where(dropped == 0, 0, dropped / total + SUM_ERROR * doubts[t])
        for expected in (expected_weight, expected_low_rank):
            if expected is not None:
                expected[t] /= total[:, None]
    bound = (doubts, left_out) if grad_tol > 0 else ()
    return Expectations(log_probs(z_target, lse), lse, coefficients, expected_weight, expected_low_rank, *bound)


def _finite_or_nan(total: Tensor) -> Tensor:  # (t,) -> (t,)
    """NaN in place of an infinite sum of exponentials: where a logit is infinite, no probability of the row exists."""
    return torch.where(torch.isinf(total), torch.nan, total)


def _affordable(cost: Tensor, allowance: Tensor) -> Tensor:  # (t,), (t,) -> (t,) bool
    """The cheapest rows, whose costs sum to at most the sum of all allowances. Rows that are not finite never count."""
    order = cost.argsort(stable=True)
    fits = cost[order].cumsum(0) <= torch.where(torch.isfinite(allowance), allowance, 0).sum()
    return torch.zeros_like(fits).scatter_(0, order, fits)


def jacobian(
    found: Expectations,
    head: Head,  # live rows, as are targets
    targets: Tensor,  # (T,) int64, all valid
    options: HeadOptions,
) -> tuple[Tensor, Tensor | None]:  # (T, D), (T, R) in the dtype of hidden
    """d token_logps / d hidden and, with low_rank, d token_logps / d low_rank_hidden. Overwrites the expectations."""
    chain = options.logit_scale / options.temperature
    out: list[Tensor | None] = [None, None]
    for i, (expected, factor) in enumerate(
        ((found.expected_weight, head.weight), (found.expected_low_rank, head.low_rank_weight))
    ):
        if expected is None or factor is None:
            continue
        step = max(16, options.workspace_bytes // (4 * factor.shape[1] * expected.element_size()))
        for t in _spans(targets.shape[0], step):
            at_target = factor[targets[t]].to(expected.dtype).mul_(found.coefficients[t, None])
            expected[t].sub_(at_target).mul_(-chain)
        out[i] = expected.to(head.hidden.dtype)
    gradient = out[0]
    assert gradient is not None
    return gradient, out[1]
