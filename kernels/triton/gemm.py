"""GEMMs of cuBLAS (on AMD of its ROCm counterpart) over a bounded block that a kernel has written: how they
accumulate, and how large the block is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Launch, chunk_rows


def add_gemm(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b with float32 `out`, without rounding a @ b to the dtype of a and b first."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.device.type == "cuda" and not torch.version.hip:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    elif a.device.type == "cuda":
        out.add_(torch.mm(a, b))  # ROCm has no float32 output for 16-bit inputs
    else:
        out.addmm_(a.float(), b.float())


def block_shape(
    T: int,
    D: int,
    V: int,
    itemsize: int,
    workspace_bytes: int,
    launch: Launch,
) -> tuple[int, int]:
    """(rows, columns) of a block. Half the budget holds the block, a quarter the float32 rows of d_weight
    when not all T rows fit in one block; the rest is for cuBLAS's own workspace. All T rows if that leaves 4096
    columns, enough for the GEMMs to run at full speed.
    """
    entries = max(launch.BLOCK_T * launch.BLOCK_V, workspace_bytes // 2 // itemsize)
    tiles = entries // T // launch.BLOCK_V
    if tiles * launch.BLOCK_V >= min(V, 4096):
        return T, min(V, tiles * launch.BLOCK_V)
    widest = min(4096, workspace_bytes // 4 // (4 * D), entries // launch.BLOCK_T)
    columns = max(1, widest // launch.BLOCK_V) * launch.BLOCK_V
    return chunk_rows(T, min(V, columns) * itemsize, workspace_bytes // 2, launch), min(V, columns)
