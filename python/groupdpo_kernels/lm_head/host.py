"""The head's ops on the host side: values are checked, ignored rows are removed, and the C++ op or torch_blocks.py
computes the rest, as `impl` says. Small functions that every device shares are here too.

It reads values of CPU tensors; on other devices only impl="reference" comes here, and it synchronises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import Head, HeadGradients, HeadOptions, LogpStats, log_probs
from . import sparse, torch_blocks
from .sparse import Candidates


def check_targets(targets: Tensor, V: int, ignore_index: int) -> Tensor:
    """Indices of the rows that are not ignored. ValueError for an id outside the vocabulary. It reads values."""
    live = targets != ignore_index
    wrong = live & ((targets < 0) | (targets >= V))
    if wrong.any():
        at = int(wrong.reshape(-1).nonzero()[0, 0])
        raise ValueError(
            f"targets must be in [0, V = {V}) or ignore_index = {ignore_index}; targets.view(-1)[{at}] is"
            f" {int(targets.reshape(-1)[at])} ({int(wrong.sum())} such rows)"
        )
    return live.reshape(-1).nonzero()[:, 0]


def _take(x: Tensor | None, rows: Tensor) -> Tensor | None:
    """Live rows of a (..., n) tensor as (t, n), without a copy if all are live and the leading dimensions collapse."""
    if x is None:
        return None
    x = x.reshape(-1, x.shape[-1])
    return x if rows.numel() == x.shape[0] else x.index_select(0, rows)


def _put(x: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_take`: ignored rows hold zero."""
    n = rows.numel()
    flat = (
        x.new_zeros((shape.numel() // max(1, x.shape[1:].numel()), *x.shape[1:]))
        if x.shape[1:].numel()
        else x.new_zeros(shape)
    )
    if flat.shape[0] == n:
        return x.reshape(shape)
    return flat.index_copy_(0, rows, x).reshape(shape)


def _live_head(head: Head, rows: Tensor) -> Head:
    hidden = _take(head.hidden, rows)
    assert hidden is not None
    return Head(hidden, head.weight, head.bias, _take(head.low_rank_hidden, rows), head.low_rank_weight)


def _of_extension(options: HeadOptions) -> tuple[float, float | None, float, int]:
    """The options that the C++ ops take, in the order of their schemas; without ignore_index, as rows are live."""
    return options.logit_scale, options.softcap, options.temperature, options.workspace_bytes


def forward(
    head: Head,
    targets: Tensor,
    options: HeadOptions,
    stats: bool,
    impl: str,
    products: Tensor | None = None,  # (T, K) float32 logit cache for impl "cpu": the first rows are the live ones
) -> LogpStats:  # lse in float64
    rows = check_targets(targets, head.weight.shape[0], options.ignore_index)
    live = _live_head(head, rows)
    live_targets = targets.reshape(-1)[rows]
    if impl == "cpu":
        op = torch.ops.groupdpo_kernels.linear_logps_forward_cpu
        kept = None if products is None else products[: rows.numel()]
        out = op(*live, live_targets, *_of_extension(options), stats, kept)
    else:
        out = torch_blocks.forward_in_blocks(*live, live_targets, options)
    return LogpStats(*(_put(x, rows, targets.shape) if stats or i < 2 else x.new_empty(0) for i, x in enumerate(out)))


def backward(
    head: Head,
    targets: Tensor,
    lse: Tensor,  # float64, from forward
    d_target: Tensor,
    d_softmax: Tensor,
    options: HeadOptions,
    needs: tuple[bool, ...],
    impl: str,
    products: Tensor | None = None,  # the logit cache that forward filled
) -> HeadGradients:
    rows = check_targets(targets, head.weight.shape[0], options.ignore_index)
    live = _live_head(head, rows)
    rowwise = (lse, d_target, d_softmax)
    y, z, at_y, elsewhere = (x.reshape(-1)[rows] for x in (targets, *rowwise))
    out: tuple[Tensor | None, ...]
    if impl == "cpu":
        op = torch.ops.groupdpo_kernels.linear_logps_backward_cpu
        kept = None if products is None else products[: rows.numel()]
        out = op(*live, y, z, at_y, elsewhere, *_of_extension(options), *needs, kept)
    else:
        out = torch_blocks.backward_in_blocks(*live, y, z, at_y, elsewhere, options, needs)
    gradients = [x if needed else None for x, needed in zip(out, needs)]
    for i, source in ((0, head.hidden), (3, head.low_rank_hidden), (5, targets)):  # by row: these get the input's shape
        gradient = gradients[i]
        if gradient is not None and source is not None:
            gradients[i] = _put(gradient, rows, source.shape)
    return HeadGradients(*gradients)


def jacobian(
    head: Head, targets: Tensor, options: HeadOptions, grad_tol: float, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(token_logps, lse, d token_logps / d hidden, d token_logps / d low_rank_hidden, doubts, dropped); the last two,
    non-target probability and bound on what is left out, are None without grad_tol.
    """
    rows = check_targets(targets, head.weight.shape[0], options.ignore_index)
    live, y = _live_head(head, rows), targets.reshape(-1)[rows]
    # The forward takes half of the tolerance, as the sizes of the upstream gradients are known in the backward only.
    forward_tol, least = grad_tol / 2, sparse.least_probability(grad_tol)
    if impl == "cpu":
        op = torch.ops.groupdpo_kernels.linear_logps_expectations_cpu
        at_target = torch_blocks.target_logits(*live, y, options) if grad_tol > 0 else None
        found = torch_blocks.Expectations(*op(*live, y, at_target, *_of_extension(options), forward_tol, least))
        if grad_tol == 0:
            found = found._replace(doubts=None, dropped=None)
    else:
        found = torch_blocks.expectations_in_blocks(*live, y, options, forward_tol, least)
    d_hidden, d_low_rank = torch_blocks.jacobian(found, live, y, options)
    low_rank_hidden = head.low_rank_hidden
    return (
        _put(found.token_logps, rows, targets.shape),
        _put(found.lse, rows, targets.shape),
        _put(d_hidden, rows, head.hidden.shape),
        None if d_low_rank is None or low_rank_hidden is None else _put(d_low_rank, rows, low_rank_hidden.shape),
        None if found.doubts is None else _put(found.doubts, rows, targets.shape),
        None if found.dropped is None else _put(found.dropped, rows, targets.shape),
    )


def token_logps_of(head: Head, targets: Tensor, lse: Tensor, options: HeadOptions) -> Tensor:  # (...)
    """token_logps from a known lse in float64: 2 T D FLOP. A wrong id is a ValueError on a CPU and NaN on a GPU."""
    V = head.weight.shape[0]
    live = targets != options.ignore_index
    if head.hidden.device.type == "cpu":
        rows = check_targets(targets, V, options.ignore_index)
    else:  # all rows, since the number of live ones is not read back
        rows = torch.arange(targets.numel(), device=targets.device)
    y = targets.reshape(-1)[rows]
    z = torch_blocks.target_logits(*_live_head(head, rows), y.clamp(0, V - 1), options)
    token_logps = torch.where((y >= 0) & (y < V), log_probs(z, lse.reshape(-1)[rows]), torch.nan)
    return torch.where(live, _put(token_logps, rows, targets.shape), 0)


def candidates(
    head: Head, targets: Tensor, options: HeadOptions, grad_tol: float, impl: str, seed: Tensor | None = None
) -> Candidates:
    V = head.weight.shape[0]
    rows = check_targets(targets, V, options.ignore_index)
    live, y = _live_head(head, rows), targets.reshape(-1)[rows]
    least = sparse.least_probability(grad_tol, seed is not None)
    most = sparse.capacity(targets.numel(), V, options.workspace_bytes)
    if impl == "cpu":
        at_target = torch_blocks.target_logits(*live, y, options)
        op = torch.ops.groupdpo_kernels.linear_logps_candidates_cpu
        at = None if seed is None else int(seed)
        found = Candidates(*op(*live, y, at_target, *_of_extension(options), least, most, at))
    else:
        found = sparse.candidates_in_blocks(*live, y, options, least, most)
        if seed is not None:
            found = sparse.with_tail(found, live, y, options, int(seed))
    shapes = [targets.shape] * 5 + [(*targets.shape, most + sparse.samples(seed))] * 2
    return Candidates(*(_put(x, rows, torch.Size(shape)) for x, shape in zip(found, shapes)))


def sparse_backward(
    head: Head,
    targets: Tensor,
    found: Candidates,
    d_token_logps: Tensor,
    d_lse: Tensor,
    options: HeadOptions,
    grad_tol: float | None,
    needs: tuple[bool, ...],
    impl: str,
) -> HeadGradients:
    """Gradients through the exact path for the rows that need it, over their candidates for the others. A grad_tol of
    None means candidates with a sampled tail: then only rows that are not finite need the exact path.
    """
    live = targets != options.ignore_index
    if grad_tol is None:
        exact = live & ~torch.isfinite(found.lse + found.dropped + d_token_logps + d_lse)
    else:
        exact = sparse.exact_rows(found.doubts, found.dropped, d_token_logps, d_lse, live, grad_tol)
    rest = torch.where(exact, targets, options.ignore_index)
    d_target, d_softmax = d_token_logps * found.doubts + d_lse * (1 - found.doubts), d_lse - d_token_logps
    gradients = backward(head, rest, found.lse, d_target, d_softmax, options, (*needs, False), impl)

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(-1, x.shape[-1])

    hidden, low_rank_hidden = flat(head.hidden), flat(head.low_rank_hidden)
    assert hidden is not None
    sparse.add_candidates(
        gradients._replace(d_hidden=flat(gradients.d_hidden), d_low_rank_hidden=flat(gradients.d_low_rank_hidden)),
        Head(hidden, head.weight, head.bias, low_rank_hidden, head.low_rank_weight),
        targets.reshape(-1),
        Candidates(*(x.reshape(-1) for x in found[:5]), *(x.reshape(-1, x.shape[-1]) for x in found[5:])),
        d_target.reshape(-1),
        d_softmax.reshape(-1),
        (live & ~exact).reshape(-1),
        options,
        _add_weighted_rows if impl == "cpu" else sparse.add_weighted_rows,
    )
    return gradients


def _add_weighted_rows(
    out: Tensor, source: Tensor, owned: Tensor, index: Tensor, coefficients: Tensor, options: HeadOptions
) -> None:
    if out.dtype == torch.float16 or source.stride(-1) != 1:  # the C++ op has no float16
        return sparse.add_weighted_rows(out, source, owned, index, coefficients, options)
    torch.ops.groupdpo_kernels.add_weighted_rows_cpu(out, source, owned, index, coefficients)
