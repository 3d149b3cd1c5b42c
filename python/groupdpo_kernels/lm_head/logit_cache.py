"""Keeps logits of the forward, within the byte budget, so that the backward need not compute them again.

The logit cache is hidden @ weight[:K].T of all tokens, in float32. `columns_to_keep` chooses K. It keeps a cache

- for the C++ implementation alone: on a GPU (T, V) is tens of budgets, and a percent of it in a cache saves a percent
  of one GEMM in four;
- where a GEMM costs more than paging in, writing and reading its result: from D = 1024 on, or 2048 where bfloat16 is
  multiplied as it is (docs/log.md);
- in whole blocks of the vocabulary and at least a quarter of it, so that no GEMM is ragged;
- as far as the budget has room beside the blocks at work and beside the caches of other living graphs: a hundred
  forwards before their backwards keep no more than one.

A head then takes three GEMMs instead of four if all logits fit, with the same bits. Nothing is kept under
torch.compile, which traces graphs before it is known which others live.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
from collections.abc import Iterator
from dataclasses import astuple, replace

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..reference import Head, HeadGradients, HeadOptions, LogpStats
from . import host, ops
from .implementations import resolve
from .workspace import BLOCK_COLUMNS, BLOCK_ROWS

_LEAST_D = {"float32": 1024, "bfloat16": 2048}  # by the dtype that the GEMM multiplies
_FLOAT = 4  # bytes

_alive: list[tuple[StorageWeakRef, int]] = []
_off = contextvars.ContextVar("_off", default=False)


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """A context in which nothing is kept, for fake CPU tensors that stand for those of a GPU."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def columns_to_keep(head: Head, targets: Tensor, options: HeadOptions, impl: str) -> int:
    """The K of the module's rule, 0 for no cache. The caller has checked that weight or hidden gets a gradient."""
    if torch.compiler.is_compiling() or _off.get() or resolve(impl, head.hidden, head.weight) != "cpu":
        return 0
    T, V = targets.numel(), head.weight.shape[0]
    least = _LEAST_D["bfloat16" if _multiplies_bf16(head) else "float32"]
    if T == 0 or head.hidden.shape[-1] < least:
        return 0
    columns = min(V, (_budget(head.hidden, options) - _in_use()) // (_FLOAT * T))
    block = -(-V // -(-V // BLOCK_COLUMNS))  # the vocabulary is cut into even blocks
    columns = columns if columns == V else columns // block * block
    return columns if 4 * columns >= V else 0


def _multiplies_bf16(head: Head) -> bool:
    return (
        head.hidden.dtype == torch.bfloat16
        and (importlib.import_module("groupdpo_kernels._C").build_info()["bf16_products"])
    )


def _budget(hidden: Tensor, options: HeadOptions) -> int:
    """Bytes of the budget beside the blocks at work: those of logits and their gradient and, where the inputs are not
    float32, of the copies of hidden, of the weight and of its gradient.
    """
    blocks = 2 * BLOCK_ROWS * BLOCK_COLUMNS
    if hidden.dtype != torch.float32:
        blocks += (BLOCK_ROWS + 2 * BLOCK_COLUMNS) * hidden.shape[-1]
    return options.workspace_bytes - _FLOAT * blocks


def _in_use() -> int:
    """Bytes of the logit caches of living graphs."""
    _alive[:] = [(reference, size) for reference, size in _alive if not reference.expired()]
    return sum(size for _, size in _alive)


@torch.library.custom_op(
    "groupdpo_kernels::linear_logps_keeping_forward",
    mutates_args=(),
    schema=f"({ops.HEAD}, {ops.OPTIONS}, bool stats, int columns) -> ({', '.join(['Tensor'] * 7)})",
)
def _keeping_forward(hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, *rest):
    *options, stats, columns = rest
    head = Head(hidden, weight, bias, low_rank_hidden, low_rank_weight)
    products = hidden.new_empty((targets.numel(), columns), dtype=torch.float32)
    with ops.exact_arithmetic(hidden.device):
        out = host.forward(head, targets, _left(HeadOptions(*options), products), stats, "cpu", products)
    return (*out, products)


@_keeping_forward.register_fake
def _(hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, *rest):
    stats, columns = rest[-2:]
    products = hidden.new_empty((targets.numel(), columns), dtype=torch.float32)
    return (*ops.fake_stats(hidden, targets, stats), products)


@torch.library.custom_op(
    "groupdpo_kernels::linear_logps_keeping_backward",
    mutates_args=(),
    schema=f"({ops.HEAD}, Tensor lse, Tensor d_target, Tensor d_softmax, Tensor products, {ops.OPTIONS}, bool[] needs)"
    f" -> ({', '.join(['Tensor'] * 5)})",
)
def _keeping_backward(hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, *rest):
    lse, d_target, d_softmax, products, *options, needs = rest
    head = Head(hidden, weight, bias, low_rank_hidden, low_rank_weight)
    left = _left(HeadOptions(*options), products)
    with ops.exact_arithmetic(hidden.device):
        out = host.backward(head, targets, lse, d_target, d_softmax, left, (*needs, False), "cpu", products)
    return tuple(hidden.new_empty(0) if x is None else x for x in out[:5])


@_keeping_backward.register_fake
def _(hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, *rest):
    inputs = (hidden, weight, bias, low_rank_hidden, low_rank_weight)
    return tuple(hidden.new_empty(x.shape if needed else (0,)) for x, needed in zip(inputs, rest[-1]))


def _left(options: HeadOptions, products: Tensor) -> HeadOptions:
    return replace(options, workspace_bytes=max(1, options.workspace_bytes - products.nbytes))


def keeping_forward(
    head: Head, targets: Tensor, options: HeadOptions, stats: bool, columns: int
) -> tuple[LogpStats, Tensor]:
    """ops.linear_logps_forward, and the logit cache of the first `columns` of the vocabulary: (T, columns) float32,
    live rows first, the others undefined. The budget covers both.
    """
    *out, products = torch.ops.groupdpo_kernels.linear_logps_keeping_forward(
        *head, targets, *astuple(options), stats, columns
    )
    _alive.append((StorageWeakRef(products.untyped_storage()), products.nbytes))
    return LogpStats(*out), products


def keeping_backward(
    head: Head,
    targets: Tensor,
    lse: Tensor,
    d_target: Tensor,
    d_softmax: Tensor,
    products: Tensor,  # the logit cache from keeping_forward
    options: HeadOptions,
    needs: tuple[bool, ...],  # which of the first five fields of HeadGradients are needed
) -> HeadGradients:
    """ops.linear_logps_backward that reads the logit cache instead of computing those logits again."""
    op = torch.ops.groupdpo_kernels.linear_logps_keeping_backward
    out = op(*head, targets, lse, d_target, d_softmax, products, *astuple(options), list(needs))
    return HeadGradients._make([*(x if needed else None for x, needed in zip(out, needs)), None])
