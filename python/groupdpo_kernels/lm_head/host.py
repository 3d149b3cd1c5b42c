"""The head's ops on the host side: values are checked, ignored rows are removed, and the C++ op or torch_blocks.py
computes the rest, as `impl` says. Small functions that every device shares are here too.

It reads values of CPU tensors; on other devices only impl="reference" comes here, and it synchronises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import Candidates, Head, HeadGradients, HeadOptions, LogpStats, Needs, RowGradients, log_probs
from . import sparse, torch_blocks
from .extension import cpu_op


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


class LiveRows(NamedTuple):
    """Which rows are not ignored, in the order of the leading dimensions."""

    live: Tensor  # (t,) int64: their places
    leading: torch.Size  # of the targets

    def take(self, x: Tensor) -> Tensor:  # (...) -> (t,)
        return x.reshape(-1)[self.live]

    def take_matrix(self, x: Tensor) -> Tensor:  # (..., n) -> (t, n)
        """It makes no copy if all rows are live and the leading dimensions collapse."""
        x = flat(x)
        return x if self.live.numel() == x.shape[0] else x.index_select(0, self.live)

    def take_head(self, head: Head) -> Head:
        hidden, low_rank_hidden = self.take_matrix(head.hidden), self.take_matrix(head.low_rank_hidden)
        return head._replace(hidden=hidden, low_rank_hidden=low_rank_hidden)

    def put(self, x: Tensor) -> Tensor:  # (t, ...) -> (..., ...)
        """The inverse of the others: ignored rows hold zero."""
        n = self.leading.numel()
        if x.shape[0] != n:
            x = x.new_zeros((n, *x.shape[1:])).index_copy_(0, self.live, x)
        return x.reshape(self.leading + x.shape[1:])


def flat(x: Tensor) -> Tensor:  # (..., n) -> (rows, n)
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def live_rows(head: Head, targets: Tensor, options: HeadOptions) -> tuple[LiveRows, Head, Tensor]:
    """The rows that are not ignored, the head of these rows, and their targets (t,)."""
    rows = LiveRows(check_targets(targets, head.weight.shape[0], options.ignore_index), targets.shape)
    return rows, rows.take_head(head), rows.take(targets)


def _of_extension(options: HeadOptions) -> tuple[float, float | None, float, int]:
    """The options that the C++ ops take, in the order of their schemas; without ignore_index, as rows are live."""
    return options.logit_scale, options.softcap, options.temperature, options.workspace_bytes


def _no_cache(head: Head) -> Tensor:
    return head.hidden.new_empty((head.hidden.shape[:-1].numel(), 0), dtype=torch.float32)


def forward(
    head: Head,
    targets: Tensor,
    options: HeadOptions,
    stats: bool,
    impl: str,
    logit_cache: Tensor | None = None,  # (T, K) float32 for impl "cpu", to be filled: the first rows are the live ones
) -> LogpStats:  # lse in float64
    rows, live, y = live_rows(head, targets, options)
    if impl == "cpu":
        op = cpu_op("linear_logps_forward_cpu")
        cache = _no_cache(live) if logit_cache is None else logit_cache[: y.shape[0]]
        out = op(*live, y, *_of_extension(options), stats, cache)
    else:
        out = torch_blocks.forward_in_blocks(live, y, options)
    return LogpStats(*(rows.put(x) if stats or i < 2 else x.new_empty(0) for i, x in enumerate(out)))


def backward(
    head: Head,
    targets: Tensor,
    lse: Tensor,  # float64, from forward
    row_gradients: RowGradients,
    options: HeadOptions,
    needs: Needs,
    impl: str,
    logit_cache: Tensor | None = None,  # what forward has filled
) -> HeadGradients:
    rows, live, y = live_rows(head, targets, options)
    lse, taken = rows.take(lse), row_gradients.map(rows.take)
    if impl == "cpu":
        op = cpu_op("linear_logps_backward_cpu")
        cache = _no_cache(live) if logit_cache is None else logit_cache[: y.shape[0]]
        out = op(*live, y, lse, *taken, *_of_extension(options), *needs, cache)
        g = asked_for(out, needs)
    else:
        g = torch_blocks.backward_in_blocks(live, y, lse, taken, options, needs)
    return g._replace(
        d_hidden=None if g.d_hidden is None else rows.put(g.d_hidden),
        d_low_rank_hidden=None if g.d_low_rank_hidden is None else rows.put(g.d_low_rank_hidden),
        mass=None if g.mass is None else rows.put(g.mass),
    )


def asked_for(results: Sequence[Tensor], needs: Needs) -> HeadGradients:
    """The results of an op, without those that are empty because nobody needs them."""
    return HeadGradients(*(x if needed else None for x, needed in zip(results, needs)))


class FrozenHead(NamedTuple):
    """What the forward of a head that needs no gradient of its own leaves for the backward."""

    token_logps: Tensor  # (...)
    lse: Tensor  # (...) float64
    hidden_derivative: Tensor  # (..., D) d token_logps / d hidden, in its dtype
    low_rank_derivative: Tensor  # (..., R) d token_logps / d low_rank_hidden
    non_target_probs: Tensor  # (...) as in Candidates; (0,) without grad_tol, as the next
    dropped: Tensor  # (...)


def frozen_head(head: Head, targets: Tensor, options: HeadOptions, grad_tol: float, impl: str) -> FrozenHead:
    rows, live, y = live_rows(head, targets, options)
    # The forward takes half of the tolerance, as the sizes of the upstream gradients are known in the backward only.
    forward_tol, least = grad_tol / 2, sparse.least_probability(grad_tol, impl)
    if impl == "cpu":
        op = cpu_op("frozen_head_cpu")
        ahead = torch_blocks.target_logits(live, y, options) if grad_tol > 0 else live.hidden.new_empty(0)
        found = torch_blocks.Expectations(*op(*live, y, ahead, *_of_extension(options), forward_tol, least))
    else:
        found = torch_blocks.expectations_in_blocks(live, y, options, forward_tol, least)
    values = (found.token_logps, found.lse, *torch_blocks.derivative(found, live, y, options))
    bound = (found.non_target_probs, found.dropped)
    return FrozenHead(*map(rows.put, values), *(map(rows.put, bound) if grad_tol > 0 else bound))


def token_logps_of(head: Head, targets: Tensor, lse: Tensor, options: HeadOptions) -> Tensor:  # (...)
    """token_logps from a known lse in float64: 2 T D FLOP. A wrong id is a ValueError on a CPU and NaN on a GPU."""
    V = head.weight.shape[0]
    if head.hidden.device.type == "cpu":
        live = check_targets(targets, V, options.ignore_index)
    else:  # all rows, since the number of live ones is not read back
        live = torch.arange(targets.numel(), device=targets.device)
    rows = LiveRows(live, targets.shape)
    y = rows.take(targets)
    z = torch_blocks.target_logits(rows.take_head(head), y.clamp(0, V - 1), options)
    token_logps = torch.where((y >= 0) & (y < V), log_probs(z, rows.take(lse)), torch.nan)
    return torch.where(targets != options.ignore_index, rows.put(token_logps), 0)


def sparse_forward(
    head: Head, targets: Tensor, options: HeadOptions, grad_tol: float, impl: str, seed: Tensor | None = None
) -> tuple[Tensor, Candidates]:
    """token_logps and the candidates; with a seed, () int64, also a sampled tail."""
    rows, live, y = live_rows(head, targets, options)
    least = sparse.least_probability(grad_tol, impl, seed is not None)
    most = sparse.capacity(targets.numel(), head.weight.shape[0], options.workspace_bytes)
    if impl == "cpu":
        ahead = torch_blocks.target_logits(live, y, options)
        op = cpu_op("sparse_forward_cpu")
        drawn = None if seed is None else int(seed)
        token_logps, *fields = op(*live, y, ahead, *_of_extension(options), least, most, drawn)
        found = Candidates(*fields)
    else:
        token_logps, found = sparse.candidates_in_blocks(live, y, options, least, most)
        if seed is not None:
            found = sparse.with_tail(found, live, y, options, int(seed))
    return rows.put(token_logps), Candidates(*map(rows.put, found))


def sparse_backward(
    head: Head,
    targets: Tensor,
    found: Candidates,
    d_token_logps: Tensor,
    d_lse: Tensor,
    options: HeadOptions,
    grad_tol: float | None,
    needs: Needs,
    impl: str,
) -> HeadGradients:
    """Gradients through the exact path for the rows that need it, over their candidates for the others."""
    live = targets != options.ignore_index
    exact = sparse.rows_of_the_exact_path(found, d_token_logps, d_lse, live, grad_tol)
    rest = torch.where(exact, targets, options.ignore_index)
    rows = found.row_gradients(d_token_logps, d_lse)
    gradients = backward(head, rest, found.lse, rows, options, needs, impl)
    by_row = {name: getattr(gradients, name) for name in ("d_hidden", "d_low_rank_hidden")}
    sparse.add_candidates(
        gradients._replace(**{name: None if x is None else flat(x) for name, x in by_row.items()}),
        head._replace(hidden=flat(head.hidden), low_rank_hidden=flat(head.low_rank_hidden)),
        targets.reshape(-1),
        Candidates(*(flat(x) if name in ("ids", "weights") else x.reshape(-1) for name, x in found._asdict().items())),
        rows.d_target.reshape(-1),
        rows.d_softmax.reshape(-1),
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
    cpu_op("add_weighted_rows_cpu")(out, source, owned, index, coefficients)
