"""Gradients of token log-probabilities and lse over few vocabulary entries a row; the rows that need it, over all.

The exact rows go through linear_logps_backward.py, which writes every gradient (zeros where no row was exact). One
kernel then adds the other rows' entries of d_logits: out[i] += the sum of coefficient times source row over the entries
that i owns, in float32, rounded once, and only rows of `out` that own an entry are touched. By row for d_hidden, where
a row's entries lie side by side; sorted by vocabulary id, stably, for d_weight and d_bias. Cost: the exact rows' share
of the backward; for each of d_hidden and d_weight 2 D FLOP and D reads an entry, and a sort. The sort's workspace is
within the byte budget by row chunks (one up to 20000 rows at the default budget; d_weight is rounded
once a chunk). No atomics, a
fixed order: the same bits every time. Nothing is read back: programs stride over lists that end on the device.
The sort is PyTorch's. Sums in CUDA C++ (csrc/cuda/weighted_rows.cu), which cuts the thousands of entries of a frequent
id among warps, take the place of the kernel here where the caller has them. docs/math.md, section 1. Precondition: no
sparse row is of a wrong id or not finite (their dropped is NaN, so they are exact).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from groupdpo_kernels.reference import Candidates, Head, HeadGradients, HeadOptions, Needs

from .compaction import live_rows
from .launch import on_its_device, strided_programs
from .linear_logps_backward import linear_logps_backward, why_not

__all__ = ["sparse_backward", "why_not"]


@triton.jit(
    do_not_specialize=["row0", "inner"],
    do_not_specialize_on_alignment=["count_ptr", "starts_ptr", "ends_ptr"],
)
def weighted_rows_kernel(
    out_ptr,  # (m, N) contiguous, added to
    source_ptr,  # (outer, inner, N) any strides
    owners_ptr,  # (o,) int32: which own entries, from the start
    count_ptr,  # (1,) int32: how many
    starts_ptr,  # (o,) int64: out[row0 + i] owns the entries starts[i] : ends[i]
    ends_ptr,  # (o,) int64
    sources_ptr,  # (K,) int32: row of source
    coefficients_ptr,  # (K,) float32
    row0,
    inner,
    N,
    stride_source_outer,
    stride_source_inner,
    stride_source_n,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    for task in tl.range(tl.program_id(0), tl.load(count_ptr) * blocks, tl.num_programs(0)):
        owner = tl.load(owners_ptr + task // blocks).to(tl.int64)
        n = (task % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        start = tl.load(starts_ptr + owner)
        end = tl.load(ends_ptr + owner)
        out = out_ptr + (row0 + owner) * N + n
        sums = tl.load(out, mask=n < N, other=0.0).to(tl.float32)
        for first in range(start, end, BLOCK_E):
            entry = first + tl.arange(0, BLOCK_E)
            inside = entry < end
            coefficient = tl.load(coefficients_ptr + entry, mask=inside, other=0.0)
            index = tl.load(sources_ptr + entry, mask=inside, other=0).to(tl.int64)
            at = (index // inner) * stride_source_outer + (index % inner) * stride_source_inner
            # A slot without an entry reads nothing: what is not finite stays in its row.
            mask = (coefficient != 0)[:, None] & (n < N)[None, :]
            x = tl.load(source_ptr + at[:, None] + n.to(tl.int64)[None, :] * stride_source_n, mask=mask, other=0.0)
            sums += tl.sum(coefficient[:, None] * x.to(tl.float32), 0)
        tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=n < N)


# Of workspace for each entry or empty slot: coefficient and id, both again in order, the order, the sort's buffers.
ENTRY_BYTES = 48


# (out, source, begins, ends, index, coefficients): extension.add_weighted_rows_cuda, or None where it does not run.
CudaRows = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None] | None
INDEX_BYTES = 8  # its index is int64: more workspace for each entry


class Owned(NamedTuple):
    """Which entries each row of a gradient owns: the arguments of weighted_rows_kernel."""

    owners: Tensor  # (o,) int32
    owner_count: Tensor  # (1,) int32: how many
    starts: Tensor  # (o,) int64
    ends: Tensor  # (o,) int64
    sources: Tensor  # (K,) int32: row of the source
    coefficients: Tensor  # (K,) float32


def add_weighted_rows(
    out: Tensor,  # (m, N) contiguous, added to
    source: Tensor,  # (..., N): row r is the r-th in row-major order of the leading dimensions
    owned: Owned,
    row0: int = 0,
    cuda_rows: CudaRows = None,
) -> None:
    """out[row0 + i] += sum of coefficients[j] source[sources[j]] over the entries j that i owns; rounded once."""
    N = out.shape[1]
    # It reads a matrix whose columns lie side by side.
    is_matrix = (source.dim() == 2 or source.is_contiguous()) and (source.stride(-1) == 1 or N == 1)
    if cuda_rows is not None and is_matrix:
        rows, matrix = out[row0 : row0 + owned.starts.shape[0]], source.reshape(-1, N).to(out.dtype)
        cuda_rows(rows, matrix, owned.starts, owned.ends, owned.sources.long(), owned.coefficients)
        return
    if source.dim() > 3:
        source = source.flatten(0, -3)  # a view where strides allow, else a copy
    while source.dim() < 3:
        source = source.unsqueeze(-2)
    BLOCK_N = min(512, triton.next_power_of_2(N))
    tasks = owned.starts.shape[0] * triton.cdiv(N, BLOCK_N)
    weighted_rows_kernel[strided_programs(tasks, 8, out.device)](  # many, to hide the latency of a gather
        out, source, *owned, row0, source.shape[1], N, *source.stride(),
        BLOCK_E=min(64, 4096 // BLOCK_N), BLOCK_N=BLOCK_N, num_warps=4,
    )  # fmt: skip


@on_its_device
def sparse_backward(
    head: Head,  # fp32 | bf16 | fp16
    targets: Tensor,  # (...) int64
    exact: Tensor,  # (...) bool: of the rows that are not ignored, those that go over the whole vocabulary
    found: Candidates,  # from the forward
    d_token_logps: Tensor,  # (...) float32
    d_lse: Tensor,  # (...) float32
    options: HeadOptions,
    needs: Needs,
    cuda_rows: CudaRows = None,
) -> HeadGradients:
    """The needed gradients, in the input dtype."""
    V, T, most = head.weight.shape[0], targets.numel(), found.ids.shape[-1]
    # The candidates have the other part of the budget.
    workspace_bytes = max(options.workspace_bytes - 8 * T * most, options.workspace_bytes // 2)
    options = replace(options, workspace_bytes=workspace_bytes)
    rest = torch.where(exact, targets, options.ignore_index)
    upstream = found.row_gradients(d_token_logps, d_lse)
    gradients = linear_logps_backward(head, rest, found.lse, upstream, options, needs, few=True)
    if T == 0 or not any(needs):
        return gradients
    ones = torch.ones((), dtype=torch.float32, device=targets.device).expand(T, 1)
    by_row = [
        (g.view(T, -1), factor)
        for g, factor in (
            (gradients.d_hidden, head.weight),
            (gradients.d_low_rank_hidden, head.low_rank_weight),
        )
        if g is not None
    ]
    by_id = [
        (g.view(V, -1), factor)
        for g, factor in (
            (gradients.d_weight, head.hidden),
            (gradients.d_low_rank_weight, head.low_rank_hidden),
            (gradients.d_bias, ones),
        )
        if g is not None
    ]

    live = targets.ne(options.ignore_index) & ~exact
    flat = [x.reshape(-1) for x in (targets, live, found.target_slopes, upstream.d_target, upstream.d_softmax)]
    ids, weights = found.ids.view(T, most), found.weights.view(T, most)
    chain = options.logit_scale / options.temperature
    entry_bytes = ENTRY_BYTES + (0 if cuda_rows is None else INDEX_BYTES)
    rows = min(T, max(1, workspace_bytes // (entry_bytes * (most + 1))))
    for row0 in range(0, T, rows):
        span = slice(row0, min(row0 + rows, T))
        y, sparse, slope, at_target, at_others = (x[span] for x in flat)
        # The target first, then the candidates.
        coefficients = weights.new_empty((y.shape[0], most + 1))
        coefficients[:, 0] = chain * slope * at_target
        torch.mul((chain * at_others)[:, None], weights[span], out=coefficients[:, 1:])
        # Nothing of an exact row may pass, not even a NaN.
        coefficients.masked_fill_(~sparse[:, None], 0)
        columns = ids.new_empty(coefficients.shape)
        columns[:, 0] = y
        columns[:, 1:] = ids[span]
        if by_row:
            owned = _owned_by_row(sparse, columns, coefficients)
            for gradient, source in by_row:
                add_weighted_rows(gradient, source, owned, row0, cuda_rows)
        if by_id:
            owned = _owned_by_id(columns, coefficients, V, row0)
            for gradient, source in by_id:
                add_weighted_rows(gradient, source, owned, cuda_rows=cuda_rows)
    return gradients


def _owned_by_row(
    sparse: Tensor,  # (t,) bool
    columns: Tensor,  # (t, entries) int32
    coefficients: Tensor,  # (t, entries) float32
) -> Owned:
    """Each sparse row owns its slots, up to the last that holds something."""
    t, entries = columns.shape
    owners = live_rows(sparse.long(), 0)
    starts = torch.arange(t, device=columns.device) * entries
    slots = torch.arange(1, entries + 1, dtype=torch.int32, device=columns.device)
    ends = starts + torch.where(coefficients != 0, slots, 0).amax(1)
    return Owned(owners.rows, owners.live, starts, ends, columns.view(-1), coefficients.view(-1))


def _owned_by_id(
    columns: Tensor,  # (t, entries) int32; V on return where there is no entry
    coefficients: Tensor,  # (t, entries) float32
    V: int,
    row0: int,
) -> Owned:
    """Each vocabulary id owns the entries of its column, in the order of their rows, which count from row0."""
    columns.masked_fill_(coefficients == 0, V)
    ids, order = columns.view(-1).sort(stable=True)
    bounds = torch.searchsorted(ids, torch.arange(V + 1, dtype=torch.int32, device=ids.device))
    owners = live_rows(bounds.diff(), 0)
    coefficients = coefficients.view(-1)[order]
    rows = order.div_(columns.shape[1], rounding_mode="floor").add_(row0).to(torch.int32)
    return Owned(owners.rows, owners.live, bounds[:-1], bounds[1:], rows, coefficients)
