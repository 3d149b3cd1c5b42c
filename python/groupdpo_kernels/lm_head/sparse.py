"""The backward of `grad_tol` > 0: over few vocabulary entries a row, with a bound on what it leaves out.

A trained model puts nearly all of a row's probability on few entries, so nearly all of d_logits is negligible. The
forward keeps each row's candidates, the entries of probability at least `least_probability(grad_tol)`, at most
`capacity` of them, and `dropped`, a bound on the probability of all the others. The target is kept apart with its own
1 - p_y, and nothing is renormalised. The backward knows the upstream gradient: `exact_rows` sends rows through the
exact path until what the others leave out is at most `grad_tol` of d_logits in the L1 norm over the call, whatever the
data; `add_candidates` computes the others.

With a sampled tail (`grad_tail="sample"`) no finite row needs the exact path: `TAIL_SAMPLES` entries drawn from what a
row leaves out stand for it, each with an equal part of that probability, which makes the gradients unbiased. They are
further columns of ids and weights. docs/math.md has derivations and bounds.

The code is plain PyTorch for any device: the specification of the kernels, and what `impl="reference"` runs. It never
checks values: rows must be live and ids valid.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..reference import TAIL_SAMPLES, Candidates, Head, HeadGradients, HeadOptions, log_probs
from .torch_blocks import (
    SUM_ERROR,
    HeadBlocks,
    at_target,
    finite_or_nan,
    lse_of,
    set_at_target,
    slopes_at_target,
)

AddWeightedRows = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, HeadOptions], None]


def samples(seed: Tensor | None) -> int:
    return 0 if seed is None else TAIL_SAMPLES


def least_probability(grad_tol: float, impl: str, sampled: bool = False) -> float:
    """The least probability of a candidate. A smaller one gives more candidates and fewer rows on the exact path. The
    C++ op finds candidates while their block of logits is in cache, so there more of them cost little; the kernels
    visit a tile again for each. With a sampled tail it is larger, since another draw lowers the variance by more than a
    candidate below 2^-9 does.
    """
    if sampled:
        return grad_tol / 4
    return grad_tol / (256 if impl == "cpu" else 64)


def capacity(T: int, V: int, workspace_bytes: int) -> int:
    """The most candidates a row: 256, or fewer so that their 8 bytes each, over all rows, fit in half of the budget."""
    return max(1, min(V, 256, workspace_bytes // (16 * max(T, 1))))


def candidates_in_blocks(
    head: Head,  # (T, .) rows
    targets: Tensor,  # (T,) int64, all valid
    options: HeadOptions,
    least: float,  # from least_probability
    most: int,  # from capacity
) -> tuple[Tensor, Candidates]:  # (T,)
    """token_logps and the `most` likeliest candidates, in one pass over the vocabulary: 2 T D V FLOP."""
    blocks = HeadBlocks(head, options, 3 * most)
    dtype, T = blocks.dtype, blocks.T
    new = head.hidden.new_zeros
    target_logits, non_target_probs, target_slopes, dropped = (new(T, dtype=dtype) for _ in range(4))
    lse = new(T, dtype=torch.float64)
    ids, weights = new((T, most), dtype=torch.int32), new((T, most), dtype=dtype)
    for t in blocks.tokens():
        y = targets[t]
        top, rest = new(y.shape[0], dtype=dtype).fill_(-math.inf), new(y.shape[0], dtype=dtype)  # without the target
        best = torch.full_like(weights[t], -math.inf)  # logits of the likeliest so far
        best_ids, best_slopes = y.new_zeros(best.shape), torch.ones_like(best)
        for v in blocks.vocabulary():
            z, slope = blocks.logits()
            target_logits[t] += at_target(z, y, v)
            target_slopes[t] += slopes_at_target(slope, y, v)
            new_top = torch.maximum(top, z.max(1).values)
            shift = torch.where(torch.isfinite(new_top), new_top, 0)
            set_at_target(z, y, v, -math.inf)
            rest = rest * torch.exp(torch.where(top == -math.inf, -math.inf, top - shift))
            rest += torch.exp(z - shift[:, None]).sum(1)
            logits, where = z.topk(min(most, z.shape[1]), 1)
            new_slopes = torch.ones_like(logits) if slope is None else slope.gather(1, where)
            best, kept = torch.cat((best, logits), 1).topk(most, 1)
            best_ids = torch.cat((best_ids, where + v.start), 1).gather(1, kept)
            best_slopes = torch.cat((best_slopes, new_slopes), 1).gather(1, kept)
            top = new_top
        shift = torch.where(torch.isfinite(top), top, 0)
        total = rest + torch.exp(target_logits[t] - shift)
        lse[t] = lse_of(shift, total)
        non_target_probs[t] = rest / finite_or_nan(total)
        p = torch.exp(log_probs(best, lse[t, None]))
        p = torch.where(p >= least, p, 0)
        dropped[t] = (non_target_probs[t] - p.sum(1)).clamp(min=0) + SUM_ERROR * non_target_probs[t]
        weights[t] = p * best_slopes
        ids[t] = torch.where(p > 0, best_ids, 0).to(torch.int32)
    return log_probs(target_logits, lse), Candidates(lse, non_target_probs, target_slopes, dropped, ids, weights)


def with_tail(
    found: Candidates,
    head: Head,  # (T, .) rows
    targets: Tensor,  # (T,) int64, all valid
    options: HeadOptions,
    seed: int,
) -> Candidates:
    """Adds TAIL_SAMPLES entries to each row, drawn independently in proportion to p from those that are neither target
    nor candidate: 2 T D V FLOP more. Each block of the vocabulary replaces a draw with the probability of its share of
    the tail so far; within a block the draw goes by the running sum.
    """
    blocks = HeadBlocks(head, options, 3 * found.ids.shape[1])
    device = head.hidden.device
    generator = torch.Generator(device).manual_seed(seed)
    ids = found.ids.new_zeros((blocks.T, TAIL_SAMPLES))
    weights = found.weights.new_zeros((blocks.T, TAIL_SAMPLES))
    for t in blocks.tokens():
        taken = torch.cat((torch.where(found.weights[t] != 0, found.ids[t].long(), -1), targets[t, None]), 1)
        slopes = torch.ones_like(weights[t])
        tail = slopes.new_zeros((slopes.shape[0], 1), dtype=torch.float64)
        for v in blocks.vocabulary():
            z, slope = blocks.logits()
            sums = torch.exp(log_probs(z, found.lse[t, None])).double()
            row, slot = ((taken >= v.start) & (taken < v.stop)).nonzero(as_tuple=True)
            sums[row, taken[row, slot] - v.start] = 0
            sums = sums.cumsum(1)
            tail += sums[:, -1:]
            at = tail * torch.rand(slopes.shape, generator=generator, dtype=torch.float64, device=device)
            replaced = at < sums[:, -1:]
            where = torch.searchsorted(sums, at, right=True).clamp(max=z.shape[1] - 1)
            ids[t] = torch.where(replaced, where + v.start, ids[t]).to(ids.dtype)
            if slope is not None:
                slopes = torch.where(replaced, slope.gather(1, where), slopes)
        weights[t] = (tail / TAIL_SAMPLES * slopes).to(weights.dtype)
    return found._replace(ids=torch.cat((found.ids, ids), 1), weights=torch.cat((found.weights, weights), 1))


def exact_rows(
    non_target_probs: Tensor,  # (...)
    dropped: Tensor,  # (...)
    d_token_logps: Tensor,  # (...)
    d_lse: Tensor,  # (...)
    live: Tensor,  # (...) bool: not ignored
    grad_tol: float,
) -> Tensor:  # (...) bool
    """The rows that need the exact path, those that would leave out most. Over the others, sum |d_lse - d_token_logps|
    dropped is at most grad_tol times sum |d_lse - d_token_logps| non_target_probs over all. No value is read back.

    Sums are of whole units, 2^-31 of what is allowed, with costs rounded up, because a scan of floats on a GPU rounds
    differently each time, and a row would sometimes change its path.
    """
    size = torch.where(live, (d_lse - d_token_logps).abs(), 0).double().reshape(-1)
    cost = size * dropped.reshape(-1)
    allowed = grad_tol * (size * non_target_probs.reshape(-1)).sum()
    order = cost.argsort(stable=True)
    units = torch.where(cost > 0, (cost / allowed * 2**31).ceil(), cost)
    known = units <= 2**31  # False for NaN: a row that is not finite takes the exact path
    units = torch.where(known, units, 2**31 + 1).long()
    fits = known[order] & (units[order].cumsum(0) <= 2**31)
    exact = torch.ones_like(fits).scatter_(0, order, ~fits)
    return exact.view_as(live) & live


def rows_of_the_exact_path(
    found: Candidates,
    d_token_logps: Tensor,  # (...)
    d_lse: Tensor,  # (...)
    live: Tensor,  # (...) bool: not ignored
    grad_tol: float | None,
) -> Tensor:  # (...) bool
    """Those of exact_rows; with a sampled tail, a grad_tol of None, only rows where anything is not finite."""
    if grad_tol is None:
        return live & ~torch.isfinite(found.lse + found.dropped + d_token_logps + d_lse)
    return exact_rows(found.non_target_probs, found.dropped, d_token_logps, d_lse, live, grad_tol)


def add_candidates(
    gradients: HeadGradients,  # changed in place
    head: Head,  # (T, .) rows
    targets: Tensor,  # (T,) int64, all valid
    found: Candidates,
    d_target: Tensor,  # (T,) from reference.row_gradients, as is d_softmax
    d_softmax: Tensor,  # (T,)
    rows: Tensor,  # (T,) bool: the rows to add
    options: HeadOptions,
    add_weighted_rows: AddWeightedRows,
) -> None:
    """Adds the gradients of `rows`, over candidates and target alone, each sum in a fixed order: 4 D FLOP an entry."""
    row, column, coefficients = entries(targets, found, d_target, d_softmax, rows, options)
    by_row = bounds(row, targets.shape[0])
    order = column.argsort(stable=True)
    by_column = bounds(column[order], head.weight.shape[0])
    by_token = (gradients.d_hidden, head.weight), (gradients.d_low_rank_hidden, head.low_rank_weight)
    by_id = (gradients.d_weight, head.hidden), (gradients.d_low_rank_weight, head.low_rank_hidden)
    for gradient, source in by_token:
        if gradient is not None:
            add_weighted_rows(gradient, source, by_row, column, coefficients, options)
    row, coefficients = row[order], coefficients[order]
    for gradient, source in by_id:
        if gradient is not None:
            add_weighted_rows(gradient, source, by_column, row, coefficients, options)
    if (d_bias := gradients.d_bias) is not None:
        ones = d_bias.new_ones((targets.shape[0], 1))
        add_weighted_rows(d_bias[:, None], ones, by_column, row, coefficients, options)


def entries(
    targets: Tensor,  # (T,) int64
    found: Candidates,
    d_target: Tensor,  # (T,) from reference.row_gradients, as is d_softmax
    d_softmax: Tensor,  # (T,)
    rows: Tensor,  # (T,) bool
    options: HeadOptions,
) -> tuple[Tensor, Tensor, Tensor]:  # (K,) int64, (K,) int64, (K,) float32
    """(row, vocabulary id, value) of the kept entries of d_logits times the map's slope, by row. It reads values."""
    chain = options.logit_scale / options.temperature
    at_target, others = (chain * x.to(found.weights.dtype) for x in (d_target, d_softmax))
    values = torch.cat(((found.target_slopes * at_target)[:, None], others[:, None] * found.weights), 1)
    ids = torch.cat((targets[:, None], found.ids), 1)
    kept = rows[:, None] & torch.cat((rows[:, None], found.weights != 0), 1)
    row, slot = kept.nonzero(as_tuple=True)
    return row, ids[row, slot].long(), values[row, slot]


def bounds(sorted_keys: Tensor, size: int) -> Tensor:  # (K,) ascending -> (size + 1,) int64
    """Bounds by which key k owns the entries bounds[k] : bounds[k + 1]."""
    return torch.searchsorted(sorted_keys, torch.arange(size + 1, device=sorted_keys.device))


def add_weighted_rows(
    out: Tensor,  # (m, n), added to
    source: Tensor,  # (k, n)
    owned: Tensor,  # (m+1,) int64
    index: Tensor,  # (K,) int64 into source
    coefficients: Tensor,  # (K,)
    options: HeadOptions,
) -> None:
    """out[i] += sum of coefficients[j] source[index[j]] over the entries j that i owns; rounded once."""
    dtype = coefficients.dtype
    step = max(16, options.workspace_bytes // (4 * max(1, source.shape[1]) * dtype.itemsize))
    sums = torch.empty(0)
    start = 0
    while start < out.shape[0]:
        # A block has at most `step` rows, which own about `step` entries; a row that owns more is added in pieces.
        first = int(owned[start])
        end = int(torch.searchsorted(owned[start + 1 :], first + step, right=True)) + start
        end = min(max(end, start + 1), start + step, out.shape[0])
        last = int(owned[end])
        if last > first:
            sums = out[start:end].to(dtype)
            owner = torch.repeat_interleave(torch.arange(end - start, device=out.device), owned[start : end + 1].diff())
            for a in range(first, last, step):
                j = slice(a, min(a + step, last))
                rows = source[index[j]].to(dtype).mul_(coefficients[j, None])
                sums.index_add_(0, owner[a - first : j.stop - first], rows)
            out[start:end] = sums.to(out.dtype)
        start = end
