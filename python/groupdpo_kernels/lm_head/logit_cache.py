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
from dataclasses import replace

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..reference import Head, HeadGradients, HeadOptions, LogpStats, Needs, RowGradients
from ..threads import Lock
from . import host, ops
from .implementations import resolve
from .workspace import BLOCK_COLUMNS, BLOCK_ROWS

_LEAST_D = {"float32": 1024, "bfloat16": 2048}  # by the dtype that the GEMM multiplies
_FLOAT = 4  # bytes

_alive: list[tuple[StorageWeakRef, int]] = []
_lock = Lock()  # of _alive and _claimed
_claimed: dict[object, int] = {}  # bytes of caches that forwards in other threads are about to make
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
    columns = _that_fit(head, T, options)
    return columns if 4 * columns >= V else 0


def _that_fit(head: Head, T: int, options: HeadOptions) -> int:
    V = head.weight.shape[0]
    columns = max(0, min(V, (_budget(head.hidden, options) - _in_use()) // (_FLOAT * T)))
    block = -(-V // -(-V // BLOCK_COLUMNS))  # the vocabulary is cut into even blocks
    return columns if columns == V else columns // block * block


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
    with _lock:
        _alive[:] = [(reference, size) for reference, size in _alive if not reference.expired()]
        return sum(size for _, size in _alive) + sum(_claimed.values())


@torch.library.custom_op(
    "groupdpo_kernels::logit_cache_forward",
    mutates_args=(),
    schema=f"({ops.HEAD}, {ops.OPTIONS}, bool stats, int columns) -> ({', '.join(['Tensor'] * 7)})",
)
def _logit_cache_forward(*arguments):
    head, targets, options, _, (stats, columns) = ops.arguments_of(arguments)
    cache = _new_cache(targets, columns)
    with ops.exact_arithmetic(head.hidden.device):
        return *host.forward(head, targets, _left(options, cache), stats, "cpu", cache), cache


@_logit_cache_forward.register_fake
def _(*arguments):
    head, targets, _, _, (stats, columns) = ops.arguments_of(arguments)
    return *ops.fake_stats(head, targets, stats), _new_cache(targets, columns)


@torch.library.custom_op(
    "groupdpo_kernels::logit_cache_backward",
    mutates_args=(),
    schema=f"({ops.HEAD}, {ops.ROWS}, Tensor logit_cache, {ops.OPTIONS}, bool[] needs)"
    f" -> ({', '.join(['Tensor'] * 6)})",
)
def _logit_cache_backward(*arguments):
    head, targets, options, (lse, *rows, cache), (needs,) = ops.arguments_of(arguments, 5)
    left = _left(options, cache)
    with ops.exact_arithmetic(head.hidden.device):
        gradients = host.backward(head, targets, lse, RowGradients(*rows), left, Needs(*needs), "cpu", cache)
    return ops.without_none(gradients, head.hidden)


@_logit_cache_backward.register_fake
def _(*arguments):
    head, targets, _, _, (needs,) = ops.arguments_of(arguments, 5)
    return ops.fake_gradients(head, targets, needs)


def _new_cache(targets: Tensor, columns: int) -> Tensor:
    return targets.new_empty((targets.numel(), columns), dtype=torch.float32)


def _left(options: HeadOptions, cache: Tensor) -> HeadOptions:
    return replace(options, workspace_bytes=max(1, options.workspace_bytes - cache.nbytes))


def forward(
    head: Head, targets: Tensor, options: HeadOptions, stats: bool, columns: int
) -> tuple[LogpStats, Tensor]:  # (T, columns) float32
    """ops.linear_logps_forward, and the logit cache of the first `columns` of the vocabulary: live rows first, the
    others undefined. The budget covers both. There are fewer columns where another thread has been faster.
    """
    claim = object()
    with _lock:
        columns = min(columns, _that_fit(head, targets.numel(), options))
        _claimed[claim] = _FLOAT * targets.numel() * columns
    try:
        op = torch.ops.groupdpo_kernels.logit_cache_forward
        *out, cache = op(*head, targets, *options.as_tuple(), stats, columns)
        with _lock:
            _alive.append((StorageWeakRef(cache.untyped_storage()), cache.nbytes))
    finally:
        with _lock:
            del _claimed[claim]
    return LogpStats(*out), cache


def backward(
    head: Head,
    targets: Tensor,
    lse: Tensor,
    rows: RowGradients,
    cache: Tensor,  # (T, columns) from forward
    options: HeadOptions,
    needs: Needs,
) -> HeadGradients:
    """ops.linear_logps_backward that reads the logit cache instead of computing those logits again."""
    op = torch.ops.groupdpo_kernels.logit_cache_backward
    return host.asked_for(op(*head, targets, lse, *rows, cache, *options.as_tuple(), list(needs)), needs)
