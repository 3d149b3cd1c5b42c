"""GEMMs of cuBLAS over a bounded block that a kernel has written: how they accumulate, and how large the block is.
Those of row_limited_gemm.py take their place where `launch.library_rounds`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from groupdpo_kernels.reference import Head

from .launch import Launch, chunk_rows


def new_products(head: Head, rows: int, columns: int, launch: Launch) -> Tensor | None:
    """Memory for the products of a block, float32; None where kernels multiply."""
    return new_block(head.hidden, rows, columns, launch, torch.float32) if launch.library else None


def write_products(
    products: Tensor | None,
    head: Head,  # compact
    row0: int,
    rows: int,
    column0: int,
    columns: int,
) -> None:
    """The logits of a block before bias, scale and softcap. Nothing where kernels multiply."""
    if products is None:
        return
    hidden, low_rank_hidden = (x[row0 : row0 + rows] for x in (head.hidden, head.low_rank_hidden))
    weight, low_rank_weight = (x[column0 : column0 + columns].T for x in (head.weight, head.low_rank_weight))
    out = products[:rows, :columns]
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight, out=out)
    elif hidden.device.type == "cuda":
        torch.ops.aten.mm.dtype_out(hidden, weight, torch.float32, out=out)
    else:
        torch.mm(hidden.float(), weight.float(), out=out)
    if low_rank_weight.shape[0]:
        add_gemm(out, low_rank_hidden, low_rank_weight)


def add_gemm(
    out: Tensor,  # (m, n) float32
    a: Tensor,  # (m, k)
    b: Tensor,  # (k, n)
) -> None:
    """out += a @ b, without rounding a @ b to the dtype of a and b first."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        out.addmm_(a.float(), b.float())


def write_gemm(
    out: Tensor,  # (m, n), of the dtype of a and b
    a: Tensor,  # (m, k)
    b: Tensor,  # (k, n)
) -> None:
    """out = a @ b, summed in float32 and rounded once."""
    with _float32_sums():
        torch.mm(a, b, out=out)


_SETTINGS = tuple(f"allow_{name}_reduced_precision_reduction" for name in ("bf16", "fp16"))
_lock = threading.Lock()
_users = 0
_allowed: list[str] = []  # those of _SETTINGS that the first user found on


@contextlib.contextmanager
def _float32_sums() -> Iterator[None]:
    """Within it cuBLAS adds up in float32. PyTorch lets it split a sum and add its parts in the dtype of the output,
    which costs a gradient of bf16 its last bits. The setting is the whole process's: it changes with the first thread
    that comes here and is put back with the last.
    """
    global _users
    settings = torch.backends.cuda.matmul
    with _lock:
        if _users == 0:
            _allowed[:] = [name for name in _SETTINGS if getattr(settings, name)]
            for name in _allowed:
                setattr(settings, name, False)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for name in _allowed:
                    setattr(settings, name, True)


def block_shape(
    T: int,
    D: int,
    V: int,
    itemsize: int,
    workspace_bytes: int,
    launch: Launch,
) -> tuple[int, int]:
    """(rows, columns) of a block. Half the budget holds the block and a library's products, a quarter the float32 rows
    of d_weight when not all T rows fit in one block; the rest is for cuBLAS's own workspace. All T rows if that leaves
    4096 columns, enough for the GEMMs to run at full speed.
    """
    itemsize += 4 * launch.library
    entries = max(launch.BLOCK_T * launch.BLOCK_V, workspace_bytes // 2 // itemsize)
    tiles = entries // _whole(T, launch.BLOCK_T) // launch.BLOCK_V
    if tiles * launch.BLOCK_V >= min(V, 4096):
        return T, min(V, tiles * launch.BLOCK_V)
    widest = min(4096, workspace_bytes // 4 // (4 * D), entries // launch.BLOCK_T)
    columns = max(1, widest // launch.BLOCK_V) * launch.BLOCK_V
    return chunk_rows(T, min(V, columns) * itemsize, workspace_bytes // 2, launch), min(V, columns)


def forward_shape(
    T: int,
    weight: Tensor,  # (V, D)
    bytes_per_row: int,  # of what a forward keeps of a row's tiles
    workspace_bytes: int,
    launch: Launch,
) -> tuple[int, int]:
    """(rows, columns) that a forward takes at once: all columns, unless a library's products take half the budget."""
    V, D = weight.shape
    if not launch.library:
        return chunk_rows(T, bytes_per_row, workspace_bytes, launch), V
    rows = chunk_rows(T, bytes_per_row, workspace_bytes // 2, launch)
    return block_shape(rows, D, V, 0, workspace_bytes, launch)


def new_block(like: Tensor, rows: int, columns: int, launch: Launch, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a block in whole tiles, so that kernels store without a mask."""
    return like.new_empty((_whole(rows, launch.BLOCK_T), _whole(columns, launch.BLOCK_V)), dtype=dtype)


def _whole(size: int, tile: int) -> int:
    return -(-size // tile) * tile
