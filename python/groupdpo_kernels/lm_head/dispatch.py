"""PATHS decides which path a call of linear_logps takes: the first row from the top that can take the call.

A path says what is computed and what is kept for the backward, whatever the implementation (implementations.py).
`explain` shows the path that is taken, and the reason against each path before it.

The choice never depends on a value inside a tensor. It needs torch alone, and takes microseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference import Head, LogpStats
from .autograd import CachedLinearLogps, CallOptions, ExactLinearLogps, FrozenLinearLogps, SparseLinearLogps
from .logit_cache import columns_to_keep


class Call(NamedTuple):
    """The arguments of linear_logps, checked."""

    head: Head
    targets: Tensor  # (...) int64
    options: CallOptions
    seed: Tensor | None = None  # () int64 with grad_tail="sample"
    token_logps_alone: bool = True  # nothing more is asked for
    process_group: Any = None

    @property
    def differentiates(self) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in self.head)


Run = Callable[[], tuple[LogpStats, Tensor]]  # gives the statistics, and the lse in float64


class Path(NamedTuple):
    """A row of PATHS. `plan` gives the function that runs a call, or the reason why this path cannot take it."""

    name: str
    computes: str
    plan: Callable[[Call], Run | str]

    def why_not(self, call: Call) -> str:
        """The reason against a call, "" for none."""
        plan = self.plan(call)
        return plan if isinstance(plan, str) else ""


def run(call: Call) -> tuple[LogpStats, Tensor]:
    """The statistics of a call, and its lse in float64, by the first path that can take it."""
    for path in PATHS:
        plan = path.plan(call)
        if not isinstance(plan, str):
            return plan()
    raise AssertionError  # the last path takes every call


# --------------------------------------------------------------------------------------------------------------- paths


def _vocab_parallel(call: Call) -> Run | str:
    return "no process_group is given" if call.process_group is None else functools.partial(_run_vocab_parallel, call)


def _run_vocab_parallel(call: Call) -> tuple[LogpStats, Tensor]:
    from .vocab_parallel import ShardedLinearLogps  # torch.distributed is optional in a build of torch

    hidden, weight, *rest = call.head
    options = call.options
    inputs = (hidden, weight, call.targets, *rest, options.head, options.stats, options.impl, call.process_group)
    *results, lse = ShardedLinearLogps.apply(*inputs)[:7]
    return LogpStats(*results), lse


def _sparse_why_not(call: Call) -> str:
    if call.options.grad_tol == 0:
        return "grad_tol is 0"
    if call.options.stats:
        return "statistics of the distribution are asked for"
    return "" if call.differentiates else "nothing needs a gradient"


def _sparse(call: Call) -> Run | str:
    return _sparse_why_not(call) or functools.partial(_run, SparseLinearLogps, 2, call, call.options, call.seed)


def _frozen_head(call: Call) -> Run | str:
    head = call.head
    if not call.token_logps_alone:
        return "more than token_logps is asked for"
    if not (torch.is_grad_enabled() and head.hidden.requires_grad):
        return "hidden needs no gradient"
    if any(x.requires_grad for x in (head.weight, head.bias, head.low_rank_weight)):
        return "the head needs a gradient"
    stored = head.hidden.numel() + head.low_rank_hidden.numel()
    if stored * head.hidden.element_size() > call.options.head.workspace_bytes:
        return "the derivative in hidden takes more than workspace_bytes"
    sparse = not _sparse_why_not(call)
    # On a GPU the logits of a row are gone by the time it is known that the row needs the exact path. With a sampled
    # tail no row needs it, on any device.
    if sparse and (head.hidden.device.type != "cpu" or call.seed is not None):
        return "gradients over candidates are cheaper"
    if call.options.known is not None and not sparse:
        return "the lse is known from pass 1"
    return functools.partial(_run, FrozenLinearLogps, 2, call, call.options)


def _logit_cache(call: Call) -> Run | str:
    if call.options.known is not None:
        return "the lse is known from pass 1"
    if not call.differentiates:
        return "nothing needs a gradient"
    columns = columns_to_keep(call.head, call.targets, call.options.head, call.options.impl)
    if not columns:
        return "a cache does not fit or does not pay here"
    return functools.partial(_run, CachedLinearLogps, 6, call, replace(call.options, columns=columns))


def _known_lse(call: Call) -> Run | str:
    if call.options.known is None:
        return "no lse is known: this is no second pass"
    if call.options.stats:
        return "statistics of the distribution are asked for"
    return functools.partial(_run, ExactLinearLogps, 6, call, call.options)


def _exact(call: Call) -> Run | str:
    options = call.options if call.options.known is None else replace(call.options, known=None)
    return functools.partial(_run, ExactLinearLogps, 6, call, options)


def _run(function: Any, values: int, call: Call, options: CallOptions, *more: Any) -> tuple[LogpStats, Tensor]:
    """By a Function of autograd.py whose outputs are the first `values` fields of LogpStats, the lse in float64, and
    what its backward reads.
    """
    out = function.apply(*call.head, call.targets, options, *more)
    return LogpStats(*out[:values]), out[values]


PATHS = (
    Path("vocabulary-parallel", "a vocabulary split over processes", _vocab_parallel),
    Path("frozen head", "the derivative in hidden, stored by the forward", _frozen_head),
    # Candidates come first even where the lse is known: they cost the one GEMM that it would save, and save two.
    Path("candidates", "gradients over the likely entries of each row", _sparse),
    Path("logit cache", "logits kept from the forward for the backward", _logit_cache),
    Path("known lse", "the logits of the targets alone", _known_lse),
    Path("exact", "every logit, and in the backward again", _exact),
)
