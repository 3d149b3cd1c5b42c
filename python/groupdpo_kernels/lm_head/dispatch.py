"""PATHS decides which path a call of linear_logps takes: the first row from the top that can take the call.

A path says what is computed and what is kept for the backward, whatever the implementation (implementations.py).
`explain` shows the path that is taken, and the reason against each path before it.

The choice never depends on a value inside a tensor. It needs torch alone, and takes microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import Head, HeadOptions, LogpStats
from ..replay import KnownLse
from .autograd import ExactLinearLogps, FrozenLinearLogps, KeptLinearLogps, SparseLinearLogps
from .logit_cache import columns_to_keep


class Call(NamedTuple):
    """The arguments of linear_logps, checked."""

    head: Head
    targets: Tensor  # (...) int64
    options: HeadOptions
    grad_tol: float
    seed: Tensor | None  # () int64 with grad_tail="sample"
    statistics: bool  # whether more than token_logps and lse is asked for
    outputs: bool  # whether more than token_logps is asked for
    impl: str
    process_group: Any
    known: KnownLse | None  # in pass 2 of a two-pass backward: the lse of pass 1

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The first arguments of every autograd Function: the tensors and the options."""
        hidden, weight, bias, low_rank_hidden, low_rank_weight = self.head
        return hidden, weight, self.targets, bias, low_rank_hidden, low_rank_weight, self.options

    @property
    def differentiates(self) -> bool:
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in self.head)


class Path(NamedTuple):
    """A row of PATHS. `why_not` gives the reason against a call, "" for none; `run` gives the statistics, and the lse
    in float64.
    """

    name: str
    computes: str
    why_not: Callable[[Call], str]
    run: Callable[[Call], tuple[LogpStats, Tensor]]


def choose(call: Call) -> Path:
    return next(path for path in PATHS if not path.why_not(call))


# ---------------------------------------------------------------------------------------------------------- conditions


def _vocab_parallel_why_not(call: Call) -> str:
    return "" if call.process_group is not None else "no process_group is given"


def _sparse_why_not(call: Call) -> str:
    if call.grad_tol == 0:
        return "grad_tol is 0"
    if call.statistics:
        return "statistics of the distribution are asked for"
    return "" if call.differentiates else "nothing needs a gradient"


def _frozen_why_not(call: Call) -> str:
    head = call.head
    if call.outputs:
        return "more than token_logps is asked for"
    if not (torch.is_grad_enabled() and head.hidden.requires_grad):
        return "hidden needs no gradient"
    if any(x is not None and x.requires_grad for x in (head.weight, head.bias, head.low_rank_weight)):
        return "the head needs a gradient"
    stored = head.hidden.numel() + (0 if head.low_rank_hidden is None else head.low_rank_hidden.numel())
    if stored * head.hidden.element_size() > call.options.workspace_bytes:
        return "the derivative in hidden takes more than workspace_bytes"
    sparse = not _sparse_why_not(call)
    # On a GPU the logits of a row are gone by the time it is known that the row needs the exact path. With a sampled
    # tail no row needs it, on any device.
    if sparse and (head.hidden.device.type != "cpu" or call.seed is not None):
        return "gradients over candidates are cheaper"
    return "" if call.known is None or sparse else "the lse is known from pass 1"


def _logit_cache_why_not(call: Call) -> str:
    if call.known is not None:
        return "the lse is known from pass 1"
    if not call.differentiates:
        return "nothing needs a gradient"
    columns = columns_to_keep(call.head, call.targets, call.options, call.impl)
    return "" if columns else "a cache does not fit or does not pay here"


def _known_lse_why_not(call: Call) -> str:
    if call.known is None:
        return "no lse is known: this is no second pass"
    return "statistics of the distribution are asked for" if call.statistics else ""


# --------------------------------------------------------------------------------------------------------------- paths


def _vocab_parallel(call: Call) -> tuple[LogpStats, Tensor]:
    from .vocab_parallel import ShardedLinearLogps  # torch.distributed is optional in a build of torch

    *results, lse = ShardedLinearLogps.apply(*call.arguments, call.statistics, call.impl, call.process_group)[:7]
    return LogpStats(*results), lse


def _frozen(call: Call) -> tuple[LogpStats, Tensor]:
    token_logps, lse, wide, *_ = FrozenLinearLogps.apply(*call.arguments, call.grad_tol, call.impl)
    return LogpStats(token_logps, lse), wide


def _sparse(call: Call) -> tuple[LogpStats, Tensor]:
    token_logps, lse, wide, *_ = SparseLinearLogps.apply(*call.arguments, call.grad_tol, call.impl, call.seed)
    return LogpStats(token_logps, lse), wide


def _logit_cache(call: Call) -> tuple[LogpStats, Tensor]:
    columns = columns_to_keep(call.head, call.targets, call.options, call.impl)
    *results, wide, _ = KeptLinearLogps.apply(*call.arguments, call.statistics, columns)
    return LogpStats(*results), wide


def _known_lse(call: Call) -> tuple[LogpStats, Tensor]:
    *results, wide = ExactLinearLogps.apply(*call.arguments, False, call.impl, call.known)
    return LogpStats(*results), wide


def _exact(call: Call) -> tuple[LogpStats, Tensor]:
    *results, wide = ExactLinearLogps.apply(*call.arguments, call.statistics, call.impl, None)
    return LogpStats(*results), wide


PATHS = (
    Path("vocabulary-parallel", "a vocabulary split over processes", _vocab_parallel_why_not, _vocab_parallel),
    Path("frozen head", "the derivative in hidden, stored by the forward", _frozen_why_not, _frozen),
    # Candidates come first even where the lse is known: they cost the one GEMM that it would save, and save two.
    Path("candidates", "gradients over the likely entries of each row", _sparse_why_not, _sparse),
    Path("logit cache", "logits kept from the forward for the backward", _logit_cache_why_not, _logit_cache),
    Path("known lse", "the logits of the targets alone", _known_lse_why_not, _known_lse),
    Path("exact", "every logit, and in the backward again", lambda call: "", _exact),
)
