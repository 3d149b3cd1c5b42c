"""Gradients of token log-probabilities and lse in the LM head's inputs, from tiles of logits rebuilt with the saved
lse.

A kernel rebuilds a bounded block of the logits and writes d_logits of it in the input dtype, the derivative in the
result of the GEMM before bias, scale and softcap; GEMMs of cuBLAS turn the block into d_hidden and d_weight. Blocks go
over the vocabulary: each block of d_weight is finished in one GEMM over all rows (accumulated in float32, rounded
once), d_hidden is accumulated in one float32 (T, D) buffer. No floating-point atomics, no locks: the same bits every
time. Cost: 2 T D V FLOP and as many again for each of d_hidden and d_weight; what is not needed is neither computed nor
allocated. Never holds (T, V). Ignored rows cost no arithmetic here; cuBLAS runs over their zero rows,
row_limited_gemm.py, for `few` live rows, does not. docs/math.md, section 1.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compaction import LiveRows, compact_head, gather_rows
from .gemm import add_gemm, block_shape
from .launch import on_its_device, programs, why_not
from .row_limited_gemm import add_rows, reduce_rows
from .tile import exp_difference, gemm_tile, halves, rows_from, squash, tile_position

__all__ = ["linear_logps_backward", "why_not"]


@triton.jit(do_not_specialize=["row0", "rows", "column0", "columns", "T"], do_not_specialize_on_alignment=["count_ptr"])
def linear_logps_bwd_kernel(
    hidden,  # (T, D) pointer or descriptor, compact
    weight,  # (V, D) pointer or descriptor
    bias_ptr,  # (V,)
    low_rank_hidden_ptr,  # (T, R) compact
    low_rank_weight_ptr,  # (V, R)
    targets_ptr,  # (T,) int64, compact, like all rowwise inputs
    count_ptr,  # (1,) int32: live rows
    lse_ptr,  # (T,) float32: the row's lse, rounded
    d_target_ptr,  # (T,) float32: d_logits at the target
    d_softmax_ptr,  # (T,) float32: coefficient of exp(logits - lse) elsewhere
    d_logits_ptr,  # (rows, stride_d_logits) input dtype; past `columns` zeros if FEW, else written but never read
    d_bias_ptr,  # (token tiles, stride_d_logits) float32, or None
    mass_ptr,  # (vocabulary tiles, rows) float32, or None
    row0,  # the block is rows row0 : row0 + rows, columns column0 : column0 + columns
    rows,
    column0,
    columns,
    T,
    V,
    stride_d_logits,  # a multiple of BLOCK_V
    strides,  # of weight (v, d), then of low_rank_weight (v, r)
    scale,
    cap,
    D: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    NEEDS_MASS: tl.constexpr,
    FEW: tl.constexpr,  # the GEMMs are those of row_limited_gemm.py
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_T: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    live = tl.minimum(tl.load(count_ptr), row0 + rows)
    tiles_t = tl.cdiv(rows, BLOCK_T)
    live_tiles_t = tl.cdiv(tl.maximum(live - row0, 0), BLOCK_T)
    tiles_v = tl.cdiv(columns, BLOCK_V)
    row = tl.arange(0, BLOCK_T)
    slope = scale * cap
    for tile in tl.range(tl.program_id(0), live_tiles_t * tiles_v, tl.num_programs(0), flatten=FLATTEN):
        tile_t, tile_v = tile_position(tile, live_tiles_t, tiles_v, GROUP_T)
        t0 = row0 + tile_t * BLOCK_T
        v0 = column0 + tile_v * BLOCK_V
        acc = gemm_tile(
            hidden, weight, low_rank_hidden_ptr, low_rank_weight_ptr, rows_from(t0, T, BLOCK_T), t0, v0, V,
            strides,
            D, R, BLOCK_R, BLOCK_T, BLOCK_V, BLOCK_D, TMA, PRECISION,
        )  # fmt: skip
        t = t0 + row
        # cuBLAS reads the rows past the live ones: lse makes them 0 * exp(-inf), whatever the bias is.
        lse = tl.load(lse_ptr + t, mask=t < live, other=float("inf"))
        d_softmax = tl.load(d_softmax_ptr + t, mask=t < live, other=0.0) * slope
        target = tl.load(targets_ptr + t, mask=t < live, other=-1) - v0
        inside = (target >= 0) & (target < BLOCK_V)
        hit = tl.max(inside.to(tl.int32), 0) > 0  # most tiles hold no row's target
        target_column = tl.where(inside, target, -1).to(tl.int32)
        block = d_logits_ptr + (tile_t * BLOCK_T).to(tl.int64) * stride_d_logits + tile_v * BLOCK_V
        # Not logits_tile and then halves: on sm_90 with every option that spills 8 bytes more a thread.
        parts = halves(acc, BLOCK_T, BLOCK_V)
        mass = tl.zeros((BLOCK_T,), tl.float32)
        for i in tl.static_range(2):
            column = i * (BLOCK_V // 2) + tl.arange(0, BLOCK_V // 2)
            y = squash(parts[i], bias_ptr, v0 + column, V, scale, HAS_BIAS, HAS_SOFTCAP, PRECISION)
            z = cap * y if HAS_SOFTCAP else y
            e = exp_difference(z, lse[:, None])
            if NEEDS_MASS:
                mass += tl.sum(tl.where((v0 + column < V)[None, :], e, 0.0), 1)
            d = d_softmax[:, None] * e
            if hit:
                d_target = tl.load(d_target_ptr + t, mask=t < live, other=0.0) * slope
                d = tl.where(column[None, :] == target_column[:, None], d_target[:, None], d)
            if HAS_SOFTCAP:
                d *= 1.0 - y * y
            if FEW:
                d = tl.where((v0 + column < V)[None, :], d, 0.0)
            tl.store(
                block + row[:, None] * stride_d_logits + column[None, :],
                d.to(d_logits_ptr.dtype.element_ty),
                mask=(t < row0 + rows)[:, None],
            )
            if NEEDS_BIAS:
                tl.store(d_bias_ptr + tile_t.to(tl.int64) * stride_d_logits + tile_v * BLOCK_V + column, tl.sum(d, 0))
        if NEEDS_MASS:
            tl.store(mass_ptr + tile_v.to(tl.int64) * rows + (t - row0), mass, mask=t < live)
    # Tiles of ignored rows: zeros, no arithmetic; or nothing, where no GEMM reads them.
    for tile in tl.range(live_tiles_t * tiles_v + tl.program_id(0), tiles_t * tiles_v, tl.num_programs(0)):
        tile_t = tile // tiles_v
        tile_v = tile % tiles_v
        block = d_logits_ptr + (tile_t * BLOCK_T).to(tl.int64) * stride_d_logits + tile_v * BLOCK_V
        column = tl.arange(0, BLOCK_V)
        if not FEW:
            tl.store(
                block + row[:, None] * stride_d_logits + column[None, :],
                tl.zeros((BLOCK_T, BLOCK_V), d_logits_ptr.dtype.element_ty),
                mask=(tile_t * BLOCK_T + row < rows)[:, None],
            )
        if NEEDS_BIAS:
            tl.store(
                d_bias_ptr + tile_t.to(tl.int64) * stride_d_logits + tile_v * BLOCK_V + column,
                tl.zeros((BLOCK_V,), tl.float32),
            )


@on_its_device
def linear_logps_backward(
    hidden: Tensor,  # (..., D) fp32 | bf16 | fp16
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    low_rank_hidden: Tensor | None,  # (..., R)
    low_rank_weight: Tensor | None,  # (V, R)
    targets: Tensor,  # (...) int64
    lse: Tensor,  # (...) float64, from the forward
    d_target: Tensor,  # (...) float32, of reference.row_gradients, as the next
    d_softmax: Tensor,  # (...) float32
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    workspace_bytes: int,
    needs: tuple[bool, ...],
    few: bool = False,
) -> tuple[Tensor | None, ...]:
    """The fields of HeadGradients, gradients in the input dtype; None where not needed. `few`: most rows are likely to
    be ignored, so that GEMMs which count them are worth it.
    """
    V, D = weight.shape
    T = targets.numel()
    inputs = (hidden, weight, bias, low_rank_hidden, low_rank_weight)
    gradients = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed and x is not None else None
        for x, needed in zip(inputs, needs)
    ]
    mass = hidden.new_zeros(T, dtype=torch.float32) if needs[5] else None
    if T == 0 or not any(needs):
        return (
            *(None if g is None else g.zero_() for g in gradients),
            mass if mass is None else mass.view(targets.shape),
        )
    d_hidden, d_weight, d_bias, d_low_rank_hidden, d_low_rank_weight = gradients

    # d_hidden is written last: until then its memory holds the compact rows.
    memory = None if d_hidden is None else d_hidden.view(T, D)
    logit_map = (logit_scale, softcap, temperature)
    compact = compact_head(inputs, targets, logit_map, ignore_index, memory)
    live, launch, head = compact.live, compact.launch, compact.arguments
    shift, d_target, d_softmax, owed = _rowwise(live, compact.targets, lse, d_target, d_softmax, V)

    rows, columns = block_shape(T, D, V, weight.element_size(), workspace_bytes, launch)
    stride = triton.cdiv(columns, launch.BLOCK_V) * launch.BLOCK_V
    block = hidden.new_empty((rows, stride))
    new = functools.partial(torch.empty, dtype=torch.float32, device=hidden.device)
    by_row = [None if g is None else new((T, g.shape[-1])).zero_() for g in (d_hidden, d_low_rank_hidden)]
    by_column = ((d_weight, compact.hidden), (d_low_rank_weight, compact.low_rank_hidden))
    for column0 in range(0, V, columns):
        width = min(columns, V - column0)
        span = slice(column0, column0 + width)
        partial = None if d_bias is None else new(width).zero_()
        # Over several row blocks a block of d_weight is accumulated in float32; over one, the GEMM writes it
        # straight.
        accumulated = [None if g is None or rows == T else new((width, g.shape[1])).zero_() for g, _ in by_column]
        for row0 in range(0, T, rows):
            height = min(rows, T - row0)
            d_logits = block[:height, :width]
            tiles_t = triton.cdiv(height, launch.BLOCK_T)
            tile_sums = None if d_bias is None else new((tiles_t, stride))
            tile_mass = None if mass is None else new((stride // launch.BLOCK_V, height)).zero_()
            linear_logps_bwd_kernel[programs(launch, tiles_t * triton.cdiv(width, launch.BLOCK_V), hidden.device)](
                *head.tensors, compact.targets, live.live, shift, d_target, d_softmax, d_logits, tile_sums, tile_mass,
                row0, height, column0, width, T, V, stride, head.strides, head.scale, head.cap,
                NEEDS_BIAS=d_bias is not None, NEEDS_MASS=mass is not None, FEW=few, **head.constants,
            )  # fmt: skip
            for accumulator, factor in zip(by_row, (weight, low_rank_weight)):
                if accumulator is not None and factor is not None and few:
                    add_rows(accumulator[row0 : row0 + height], d_logits, factor[span], live.live, row0, launch)
                elif accumulator is not None and factor is not None:
                    add_gemm(accumulator[row0 : row0 + height], d_logits, factor[span])
            for (gradient, factor), accumulator in zip(by_column, accumulated):
                out = gradient[span] if accumulator is None and gradient is not None else accumulator
                if out is not None and factor is not None and few:
                    b = factor[row0 : row0 + height]
                    reduce_rows(out, d_logits, b, live.live, row0, launch, add=accumulator is not None)
                elif accumulator is not None and factor is not None:
                    add_gemm(accumulator, d_logits.T, factor[row0 : row0 + height])
                elif gradient is not None and factor is not None:
                    torch.mm(d_logits.T, factor, out=gradient[span])
            if mass is not None and tile_mass is not None:
                mass[row0 : row0 + height] += tile_mass.sum(0)
            if partial is not None and tile_sums is not None:
                partial += tile_sums[:, :width].sum(0)
        for (gradient, _), accumulator in zip(by_column, accumulated):
            if gradient is not None and accumulator is not None:
                gradient[span] = accumulator
        if d_bias is not None and partial is not None:
            d_bias[span] = partial
    for gradient, accumulator in zip((d_hidden, d_low_rank_hidden), by_row):
        if gradient is not None and accumulator is not None:
            gather_rows(accumulator, live.positions, gradient.view(T, -1))
    if mass is not None:
        mass = live.restore(mass * owed).view(targets.shape)
    return (*gradients, mass)


def _rowwise(
    live: LiveRows,
    targets: Tensor,  # (T,) int64, compact
    lse: Tensor,  # (...) float64
    d_target: Tensor,  # (...) float32
    d_softmax: Tensor,  # (...) float32
    V: int,
) -> tuple[Tensor, ...]:
    """The compact rows of the lse rounded to float32, of d_target and d_softmax, and of the factor that the rounding
    owes: p = exp(logits - lse) factor. d_softmax has it already, so that no entry of a tile pays for it. A wrong id
    makes d_softmax NaN.
    """
    lse, d_target, d_softmax = map(live.compact, (lse, d_target, d_softmax))
    shift = lse.float()
    factor = torch.exp(shift - lse).float()
    d_softmax = torch.where((targets >= 0) & (targets < V), d_softmax * factor, torch.nan)
    return shift, d_target, d_softmax, factor
