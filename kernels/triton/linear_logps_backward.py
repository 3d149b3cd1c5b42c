"""Gradients of token log-probabilities, lse and entropy in the LM head's inputs, from tiles of logits rebuilt with the
saved lse.

A kernel rebuilds a bounded block of the logits and writes d_logits of it in the input dtype, the derivative in the
result of the GEMM before bias, scale and softcap; GEMMs of cuBLAS turn the block into d_hidden and d_weight. Blocks go
over the vocabulary: each block of d_weight is finished in one GEMM over all rows (accumulated in float32, rounded
once), d_hidden is accumulated in one float32 (T, D) buffer. No floating-point atomics: the same bits every time. Cost:
2 T D V FLOP and as many again for each of d_hidden and d_weight; what is not needed is neither computed nor allocated.
Never holds (T, V). Ignored rows cost no arithmetic here; cuBLAS runs over their zero rows,
row_limited_gemm.py, for `few` live rows, does not. docs/math.md, section 1.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from groupdpo_kernels.reference import (
    LEAST_LOG_PROB,
    Head,
    HeadGradients,
    HeadOptions,
    Needs,
    RowGradients,
    known_softmax,
)

from .compaction import LiveRows, compact_head, gather_rows
from .gemm import add_gemm, block_shape, new_block, new_products, write_gemm, write_products
from .launch import head_arguments, library_rounds, on_its_device, programs, why_not
from .row_limited_gemm import add_rows, reduce_rows
from .tile import LOG2_E, exp_difference, gemm_tile, halves, products_pointer, rows_from, squash, tile_position

__all__ = ["linear_logps_backward", "why_not"]

_LEAST_LOG_PROB = tl.constexpr(LEAST_LOG_PROB)


@triton.jit(do_not_specialize=["row0", "rows", "column0", "columns", "T"], do_not_specialize_on_alignment=["count_ptr"])
def linear_logps_bwd_kernel(
    hidden,  # (T, D) pointer or descriptor, compact; or products (tile.py, products_pointer)
    weight,  # (V, D) pointer or descriptor
    bias_ptr,  # (V,)
    low_rank_hidden_ptr,  # (T, R) compact
    low_rank_weight_ptr,  # (V, R)
    targets_ptr,  # (T,) int64, compact, like all rowwise inputs
    count_ptr,  # (1,) int32: live rows
    lse_ptr,  # (T,) float32: the row's lse, rounded
    d_target_ptr,  # (T,) float32: d_logits at the target
    d_softmax_ptr,  # (T,) float32: coefficient of exp(logits - lse) elsewhere
    d_entropy_ptr,  # (T,) float32: that of -exp(logits - lse) (logits - lse), or None
    d_logits_ptr,  # (rows in whole tiles, stride_d_logits) input dtype; past `columns` zeros if FEW, else never read
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
    HAS_ENTROPY: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    NEEDS_MASS: tl.constexpr,
    FEW: tl.constexpr,  # the GEMMs are those of row_limited_gemm.py
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_T: tl.constexpr,
    TMA: tl.constexpr,
    LIBRARY: tl.constexpr,
    FLATTEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCURATE: tl.constexpr,  # tanh, to 2 ulp
):
    live = tl.minimum(tl.load(count_ptr), row0 + rows)
    tiles_t = tl.cdiv(rows, BLOCK_T)
    live_tiles_t = tl.cdiv(tl.maximum(live - row0, 0), BLOCK_T)
    tiles_v = tl.cdiv(columns, BLOCK_V)
    row = tl.arange(0, BLOCK_T)
    slope = scale * cap
    hidden = products_pointer(hidden, row0, column0, strides, LIBRARY)
    for tile in tl.range(tl.program_id(0), live_tiles_t * tiles_v, tl.num_programs(0), flatten=FLATTEN):
        tile_t, tile_v = tile_position(tile, live_tiles_t, tiles_v, GROUP_T)
        t0 = row0 + tile_t * BLOCK_T
        v0 = column0 + tile_v * BLOCK_V
        acc = gemm_tile(
            hidden, weight, low_rank_hidden_ptr, low_rank_weight_ptr, rows_from(t0, T, BLOCK_T), t0, v0, V,
            strides,
            D, R, BLOCK_R, BLOCK_T, BLOCK_V, BLOCK_D, TMA, LIBRARY, PRECISION,
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
            y = squash(parts[i], bias_ptr, v0 + column, V, scale, HAS_BIAS, HAS_SOFTCAP, ACCURATE)
            z = cap * y if HAS_SOFTCAP else y
            if HAS_ENTROPY:
                z = tl.maximum(z - lse[:, None], _LEAST_LOG_PROB)
                e = tl.exp2(z * LOG2_E)
            else:
                e = exp_difference(z, lse[:, None])
            if NEEDS_MASS:
                mass += tl.sum(tl.where((v0 + column < V)[None, :], e, 0.0), 1)
            if HAS_ENTROPY:
                # Loaded here, not before the loop: there it spills 8 bytes a thread on sm_90.
                d_entropy = tl.load(d_entropy_ptr + t, mask=t < live, other=0.0) * slope
                d = e * (d_softmax[:, None] - d_entropy[:, None] * z)
            else:
                d = d_softmax[:, None] * e
            if hit:
                d_target = tl.load(d_target_ptr + t, mask=t < live, other=0.0) * slope
                d = tl.where(column[None, :] == target_column[:, None], d_target[:, None], d)
            if HAS_SOFTCAP:
                d *= 1.0 - y * y
            if FEW:
                d = tl.where((v0 + column < V)[None, :], d, 0.0)
            tl.store(block + row[:, None] * stride_d_logits + column[None, :], d.to(d_logits_ptr.dtype.element_ty))
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
            )
        if NEEDS_BIAS:
            tl.store(
                d_bias_ptr + tile_t.to(tl.int64) * stride_d_logits + tile_v * BLOCK_V + column,
                tl.zeros((BLOCK_V,), tl.float32),
            )


@on_its_device
def linear_logps_backward(
    head: Head,  # fp32 | bf16 | fp16
    targets: Tensor,  # (...) int64
    lse: Tensor,  # (...) float64, from the forward
    rows: RowGradients,  # (...) float32
    options: HeadOptions,
    needs: Needs,
    few: bool = False,
) -> HeadGradients:
    """The needed gradients, in the input dtype. `few`: most rows are likely to be ignored, so that GEMMs which count
    them are worth it.
    """
    V, D = head.weight.shape
    T, device = targets.numel(), head.hidden.device
    few = few or library_rounds(head.hidden.dtype)
    new = functools.partial(torch.empty, dtype=torch.float32, device=device)
    d_hidden, d_weight, d_bias, d_low_rank_hidden, d_low_rank_weight = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if needed else None for x, needed in zip(head, needs)
    )
    gradients = HeadGradients(d_hidden, d_weight, d_bias, d_low_rank_hidden, d_low_rank_weight)
    mass = new(T).zero_() if needs.mass else None
    if T == 0 or not any(needs):
        zeros = HeadGradients(*(None if g is None else g.zero_() for g in gradients))
        return zeros._replace(mass=None if mass is None else mass.view(targets.shape))

    # d_hidden is written last: until then its memory holds the compact rows.
    memory = None if d_hidden is None else d_hidden.view(T, D)
    compact = compact_head(head, targets, options, memory, library=not few)  # a library would multiply all rows
    live, launch = compact.live, compact.launch
    shift, (d_target, d_softmax, d_entropy), owed = _rowwise(live, compact.targets, lse, rows, V)

    most_rows, columns = block_shape(T, D, V, head.weight.element_size(), options.workspace_bytes, launch)
    products = new_products(compact.head, most_rows, columns, launch)
    arguments = head_arguments(compact.head, launch, options, products)
    block = new_block(head.hidden, most_rows, columns, launch)
    stride = block.shape[1]
    # (gradient, the other factor of its GEMM, its float32 accumulator)
    by_row = [
        (g, factor, new((T, factor.shape[1])).zero_())
        for g, factor in ((d_hidden, head.weight), (d_low_rank_hidden, head.low_rank_weight))
        if g is not None
    ]
    by_column = [
        (g, factor)
        for g, factor in ((d_weight, compact.head.hidden), (d_low_rank_weight, compact.head.low_rank_hidden))
        if g is not None
    ]
    for column0 in range(0, V, columns):
        width = min(columns, V - column0)
        span = slice(column0, column0 + width)
        partial = None if d_bias is None else new(width).zero_()
        # Over several row blocks a block of d_weight is accumulated in float32; over one, the GEMM writes it straight.
        several = most_rows < T
        sums = [new((width, g.shape[1])).zero_() if several else g[span] for g, _ in by_column]
        for row0 in range(0, T, most_rows):
            height = min(most_rows, T - row0)
            here = slice(row0, row0 + height)
            d_logits = block[:height, :width]
            write_products(products, compact.head, row0, height, column0, width)
            tiles_t = triton.cdiv(height, launch.BLOCK_T)
            tile_sums = None if d_bias is None else new((tiles_t, stride))
            tile_mass = None if mass is None else new((stride // launch.BLOCK_V, height)).zero_()
            linear_logps_bwd_kernel[programs(launch, tiles_t * triton.cdiv(width, launch.BLOCK_V), device)](
                *arguments.tensors, compact.targets, live.live, shift, d_target, d_softmax, d_entropy, d_logits,
                tile_sums, tile_mass, row0, height, column0, width, T, V, stride,
                arguments.strides, arguments.scale, arguments.cap,
                HAS_ENTROPY=d_entropy is not None, NEEDS_BIAS=d_bias is not None, NEEDS_MASS=mass is not None, FEW=few,
                **arguments.constants,
            )  # fmt: skip
            for _, factor, accumulator in by_row:
                if few:
                    add_rows(accumulator[here], d_logits, factor[span], live.live, row0, launch)
                else:
                    add_gemm(accumulator[here], d_logits, factor[span])
            for out, (_, factor) in zip(sums, by_column):
                if few:
                    reduce_rows(out, d_logits, factor[here], live.live, row0, launch, add=several)
                elif several:
                    add_gemm(out, d_logits.T, factor[here])
                else:
                    write_gemm(out, d_logits.T, factor)
            if mass is not None and tile_mass is not None:
                mass[here] += tile_mass.sum(0)
            if partial is not None and tile_sums is not None:
                partial += tile_sums[:, :width].sum(0)
        if several:
            for out, (gradient, _) in zip(sums, by_column):
                gradient[span] = out
        if d_bias is not None and partial is not None:
            d_bias[span] = partial
    for gradient, _, accumulator in by_row:
        gather_rows(accumulator, live.positions, gradient.view(T, -1))
    return gradients._replace(mass=None if mass is None else live.restore(mass * owed).view(targets.shape))


def _rowwise(
    live: LiveRows,
    targets: Tensor,  # (T,) int64, compact
    lse: Tensor,  # (...) float64
    rows: RowGradients,  # (...) float32
    V: int,
) -> tuple[Tensor, RowGradients, Tensor]:  # (T,)
    """reference.known_softmax of the compact rows. A wrong id makes d_softmax NaN."""
    shift, compact, factor = known_softmax(live.compact(lse), rows.map(live.compact))
    known = (targets >= 0) & (targets < V)
    return shift, compact._replace(d_softmax=torch.where(known, compact.d_softmax, torch.nan)), factor
