"""Compaction of live rows on the device: ignored rows cost no arithmetic, and nothing is read back to the host. All
launchers of an LM head begin with compact_head.

The number of live rows stays on the GPU; kernels read it and stop there, grids are sized for all T rows. A gather of T
x D elements costs T D reads and writes, about 0.5 % of one GEMM of the head at V = 128256, and also straightens
non-contiguous leading dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from groupdpo_kernels.reference import Head, HeadOptions

from .launch import Launch, launch_for


class LiveRows(NamedTuple):
    """Where rows go. Compact row i holds original row `rows[i]`; -1 from `live` on."""

    rows: Tensor  # (T,) int32
    positions: Tensor  # (T,) int32: compact position of an original row, -1 where ignored
    live: Tensor  # (1,) int32: how many

    def compact(
        self,
        x: Tensor,  # (...) in the original order
    ) -> Tensor:  # (T,)
        """The live rows' values first. Row 0's stand where no row is."""
        return x.reshape(-1)[self.rows.clamp(min=0)]

    def restore(
        self,
        x: Tensor,  # (T,) compact
    ) -> Tensor:  # (T,) in the original order
        """Zeros stand in ignored rows."""
        return torch.where(self.positions >= 0, x[self.positions.clamp(min=0)], 0)


def live_rows(
    targets: Tensor,  # (T,) int64
    ignore_index: int,
) -> LiveRows:
    """A stable partition of the rows, by prefix sums on the device."""
    live = targets != ignore_index
    ends = live.to(torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.where(live, ends - 1, -1)
    T = targets.shape[0]
    ids = torch.arange(T, dtype=torch.int32, device=targets.device)
    # Ignored rows all scatter to a slot past the end, which is cut off.
    rows = torch.full((T + 1,), -1, dtype=torch.int32, device=targets.device)
    rows.scatter_(0, torch.where(live, positions, T).long(), torch.where(live, ids, -1))
    return LiveRows(rows[:T], positions, ends[-1:])


@triton.jit(do_not_specialize=["rows", "inner"])
def gather_rows_kernel(
    source_ptr,  # (outer, inner, N) any strides
    index_ptr,  # (rows,) int32
    out_ptr,  # (rows, N) contiguous
    rows,
    inner,
    N,
    stride_source_outer,
    stride_source_inner,
    stride_source_n,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    row = (program // blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    index = tl.load(index_ptr + row, mask=row < rows, other=-1).to(tl.int64)
    at = (index // inner) * stride_source_outer + (index % inner) * stride_source_inner
    # A missing row (-1) is zero: what is multiplied with it later must stay finite.
    mask = (n < N)[None, :] & (index >= 0)[:, None]
    x = tl.load(source_ptr + at[:, None] + n.to(tl.int64)[None, :] * stride_source_n, mask=mask, other=0.0)
    out = out_ptr + row.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (n < N)[None, :])


def gather_rows(
    source: Tensor,  # (..., N): row r is the r-th in row-major order of the leading dimensions
    index: Tensor,  # (rows,) int32, -1 for a zero row
    out: Tensor,  # (rows, N) contiguous; any floating dtype
) -> Tensor:
    """out[i] = source.view(-1, N)[index[i]], without a copy of source where its leading dimensions collapse to two."""
    if source.dim() > 3:
        source = source.flatten(0, -3)  # a view where strides allow, else a copy
    while source.dim() < 3:
        source = source.unsqueeze(-2)
    if out.numel():
        rows, N = out.shape
        BLOCK_N = min(1024, triton.next_power_of_2(N))
        BLOCK_ROWS = 4096 // BLOCK_N
        grid = (triton.cdiv(rows, BLOCK_ROWS) * triton.cdiv(N, BLOCK_N),)
        gather_rows_kernel[grid](
            source, index, out, rows, source.shape[1], N, *source.stride(), BLOCK_ROWS=BLOCK_ROWS, BLOCK_N=BLOCK_N
        )
    return out


class CompactHead(NamedTuple):
    """An LM head whose live rows come first, and how kernels over its tiles are launched."""

    live: LiveRows
    head: Head  # hidden (T, D) and low_rank_hidden (T, R) contiguous, with zeros in rows past the live ones
    targets: Tensor  # (T,) int64
    launch: Launch


def compact_head(
    head: Head,
    targets: Tensor,  # (...) int64
    options: HeadOptions,
    hidden_out: Tensor | None = None,  # (T, D): memory for the compact rows; new memory without it
    low_rank_out: Tensor | None = None,  # (T, R), the same
    library: bool = True,  # products may be a library's
) -> CompactHead:
    """The live rows of `head` gathered."""
    live = live_rows(targets.reshape(-1), options.ignore_index)

    def gathered(x: Tensor, out: Tensor | None) -> Tensor:
        return gather_rows(x, live.rows, x.new_empty((targets.numel(), x.shape[-1])) if out is None else out)

    hidden, low_rank_hidden = gathered(head.hidden, hidden_out), gathered(head.low_rank_hidden, low_rank_out)
    head = head._replace(hidden=hidden, low_rank_hidden=low_rank_hidden)
    return CompactHead(live, head, live.compact(targets), launch_for(head, library))
