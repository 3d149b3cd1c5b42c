"""GEMMs of a backward over a block of d_logits whose live rows, the first ones, are few, and counted on the device:
cuBLAS would run over all the block's rows.

add_rows is for d_hidden: tiles of rows past the live ones stop at once. reduce_rows is for d_weight: its sum ends with
the live rows. Float32 sums; nothing past the live rows is read. No atomics: the same bits every time. Cost: 2 FLOP for
each live row, column and output column, at less than cuBLAS's speed: for blocks whose rows are mostly live cuBLAS is
faster. Precondition: a block's rows are padded to a multiple of BLOCK_V, with zeros for add_rows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, precision
from .tile import tile_position


@triton.jit(do_not_specialize=["row0", "M", "K"], do_not_specialize_on_alignment=["count_ptr"])
def row_limited_gemm_kernel(
    a_ptr,  # (M, K)
    b_ptr,  # (K, N)
    out_ptr,  # (M, N)
    count_ptr,  # (1,) int32: live rows
    row0,  # the block's first
    M,
    N,
    K,
    strides_a,  # (m, k)
    strides_b,  # (k, n)
    stride_out_m,
    REDUCE: tl.constexpr,  # the live rows are those of b, columns of a; else those of a and out
    ADD: tl.constexpr,  # to what out holds; else out is written
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    live = tl.maximum(tl.load(count_ptr) - row0, 0)
    if REDUCE:
        K = tl.minimum(K, live)
    else:
        M = tl.minimum(M, live)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # Nothing to add is nothing to do; but what is written is zero then.
    if (tl.program_id(0) < tiles_m * tiles_n) & ((not ADD) | (K > 0)):
        tile_m, tile_n = tile_position(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
        m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        # What is not known to be a multiple of 16 clamps or masks along rows alone: loads are narrow otherwise.
        a_m = m if REDUCE else tl.minimum(m, M - 1)
        a = a_ptr + a_m.to(tl.int64)[:, None] * strides_a[0] + k.to(tl.int64)[None, :] * strides_a[1]
        b = b_ptr + k.to(tl.int64)[:, None] * strides_b[0] + n.to(tl.int64)[None, :] * strides_b[1]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            inside = k0 + k < K
            x = tl.load(a, mask=inside[None, :], other=0.0) if REDUCE else tl.load(a)
            y = tl.load(b, mask=inside[:, None] & (n < N)[None, :], other=0.0)
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
            a += BLOCK_K * strides_a[1]
            b += BLOCK_K * strides_b[0]
        out = out_ptr + m.to(tl.int64)[:, None] * stride_out_m + n[None, :]
        mask = (m < M)[:, None] & (n < N)[None, :]
        if ADD:
            acc += tl.load(out, mask=mask, other=0.0).to(tl.float32)
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def add_rows(
    out: Tensor,  # (rows, N) float32, added to
    a: Tensor,  # (rows, columns) of a padded block
    b: Tensor,  # (columns, N)
    count: Tensor,  # (1,) int32: live rows
    row0: int,  # of them, those before the block
    launch: Launch,
) -> None:
    """out[: live] += a[: live] @ b."""
    _launch(out, a, b, count, row0, launch, reduce=False, add=True)


def reduce_rows(
    out: Tensor,  # (columns, N)
    a: Tensor,  # (rows, columns) of a padded block
    b: Tensor,  # (rows, N)
    count: Tensor,  # (1,) int32: live rows
    row0: int,  # of them, those before the block
    launch: Launch,
    add: bool,
) -> None:
    """out (+)= a[: live].T @ b[: live]."""
    _launch(out, a.T, b, count, row0, launch, reduce=True, add=add)


def _launch(
    out: Tensor, a: Tensor, b: Tensor, count: Tensor, row0: int, launch: Launch, reduce: bool, add: bool
) -> None:
    (M, N), K = out.shape, a.shape[1]
    BLOCK_M, BLOCK_N = min(128, launch.BLOCK_V if reduce else launch.BLOCK_T), min(128, launch.BLOCK_V)
    row_limited_gemm_kernel[(triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N),)](
        a, b, out, count, row0, M, N, K, a.stride(), b.stride(), out.stride(0),
        REDUCE=reduce, ADD=add, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=launch.BLOCK_D, GROUP_M=8,
        PRECISION=precision(a.dtype, launch), num_warps=8, num_stages=min(3, launch.num_stages),
    )  # fmt: skip
