"""Token log-probabilities and lse from hidden states and the LM head; the logits are never stored.

Each (token x vocabulary) tile of logits is reduced where it stands to a maximum and a sum of exponentials a row; a
second, small kernel combines the tiles of a row. Tile sums rather than a running row let every tile be an independent
program: the order is free (L2), small T still fills the GPU, and the result does not depend on the order, so it is
deterministic. Cost: 2 T D V FLOP; workspace 8 T V / BLOCK_V bytes (20 with statistics) by token chunks within the byte
budget, and one compact copy of hidden. Ignored rows are compacted away on the device. docs/math.md, section 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from groupdpo_kernels.reference import Head, HeadOptions, LogpStats

from .compaction import compact_head
from .gemm import forward_shape, new_products, write_products
from .launch import head_arguments, on_its_device, programs, why_not
from .tile import (
    LOG2_E,
    exp_difference,
    finite_or_zero,
    log_probs,
    logits_tile,
    lse_of,
    products_pointer,
    rows_from,
    tile_position,
)

__all__ = ["linear_logps_forward", "why_not"]


@triton.jit(do_not_specialize=["row0", "rows", "column0", "columns", "T"], do_not_specialize_on_alignment=["count_ptr"])
def linear_logps_fwd_kernel(
    hidden,  # (T, D) pointer or descriptor, compact; or products (tile.py, products_pointer)
    weight,  # (V, D) pointer or descriptor
    bias_ptr,  # (V,)
    low_rank_hidden_ptr,  # (T, R) compact
    low_rank_weight_ptr,  # (V, R)
    targets_ptr,  # (T,) int64, compact
    count_ptr,  # (1,) int32: live rows
    target_logits_ptr,  # (T,) float32
    tile_max_ptr,  # (tiles_v, rows) float32, like all tile_*
    tile_sum_ptr,
    tile_plain_ptr,
    tile_weighted_ptr,  # sum of e log2(e), with e = exp(z - the tile's maximum)
    tile_squares_ptr,
    target_leads_ptr,  # (T,) int8: the target is the first maximum of its tile
    row0,  # the chunk is rows row0 : row0 + rows, columns column0 : column0 + columns
    rows,
    column0,  # a multiple of BLOCK_V
    columns,
    T,
    V,
    strides,  # of weight (v, d), then of low_rank_weight (v, r)
    scale,
    cap,
    D: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
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
    tiles_t = tl.cdiv(tl.maximum(live - row0, 0), BLOCK_T)
    tiles_v = tl.cdiv(columns, BLOCK_V)
    column = tl.arange(0, BLOCK_V)
    hidden = products_pointer(hidden, row0, column0, strides, LIBRARY)
    for tile in tl.range(tl.program_id(0), tiles_t * tiles_v, tl.num_programs(0), flatten=FLATTEN):
        tile_t, tile_v = tile_position(tile, tiles_t, tiles_v, GROUP_T)
        t0 = row0 + tile_t * BLOCK_T
        v0 = column0 + tile_v * BLOCK_V
        z = logits_tile(
            hidden, weight, bias_ptr, low_rank_hidden_ptr, low_rank_weight_ptr, rows_from(t0, T, BLOCK_T), t0, v0, V,
            strides, scale,
            D, R, HAS_BIAS, HAS_SOFTCAP, BLOCK_R, BLOCK_T, BLOCK_V, BLOCK_D, TMA, LIBRARY, PRECISION, ACCURATE,
        )  # fmt: skip
        if HAS_SOFTCAP:
            z *= cap
        if v0 + BLOCK_V > V:
            # Columns past V would be phantom logits of value 0.
            z = tl.where((column < V - v0)[None, :], z, -float("inf"))
        t = t0 + tl.arange(0, BLOCK_T)
        top = tl.max(z, 1)
        # The steps of exp_difference: with statistics its exponent is used twice, and so is the register that has it.
        bits = (z - finite_or_zero(top)[:, None]) * LOG2_E
        e = tl.exp2(bits)
        # The workspace is laid out by vocabulary tile, so that a tile's rows are contiguous.
        at = (v0 // BLOCK_V).to(tl.int64) * rows + (t - row0)
        tl.store(tile_max_ptr + at, top, mask=t < live)
        tl.store(tile_sum_ptr + at, tl.sum(e, 1), mask=t < live)
        if STATS:
            tl.store(tile_squares_ptr + at, tl.sum(e * e, 1), mask=t < live)
            # 0 * -inf is no number: a column of probability 0 adds nothing.
            tl.store(tile_weighted_ptr + at, tl.sum(e * tl.maximum(bits, -1e38), 1), mask=t < live)
            tl.store(tile_plain_ptr + at, tl.sum(tl.where((column < V - v0)[None, :], z, 0.0), 1), mask=t < live)
        target = tl.load(targets_ptr + t, mask=t < live, other=-1) - v0
        inside = (target >= 0) & (target < tl.minimum(BLOCK_V, V - v0))
        target_logit = tl.zeros((BLOCK_T,), tl.float32)
        leads = tl.zeros((BLOCK_T,), tl.int32)
        if tl.max(inside.to(tl.int32), 0) > 0:  # most tiles hold no row's target
            target_column = tl.where(inside, target, -1).to(tl.int32)[:, None]
            target_logit = tl.sum(tl.where(column[None, :] == target_column, z, 0.0), 1)
            if STATS:
                earlier = (column[None, :] < target_column) & (z == target_logit[:, None])
                leads = 1 - tl.max(((z > target_logit[:, None]) | earlier).to(tl.int32), 1)
        # One tile at most holds a given row's target: no atomics.
        tl.store(target_logits_ptr + t, target_logit, mask=inside)
        if STATS:
            tl.store(target_leads_ptr + t, leads.to(tl.int8), mask=inside)


@triton.jit(do_not_specialize=["row0", "rows"], do_not_specialize_on_alignment=["count_ptr"])
def combine_kernel(
    tile_max_ptr,  # (tiles_v, rows) float32, like all tile_*
    tile_sum_ptr,
    tile_plain_ptr,
    tile_weighted_ptr,
    tile_squares_ptr,
    target_leads_ptr,  # (T,) int8, compact
    target_logits_ptr,  # (T,) float32, compact
    targets_ptr,  # (T,) int64, compact
    rows_ptr,  # (T,) int32: original row of a compact one
    count_ptr,  # (1,) int32
    token_logps_ptr,  # (T,) float32, original order, like all that follow
    lse_ptr,  # float64
    entropy_ptr,
    mean_logits_ptr,
    log_sum_sq_probs_ptr,
    is_top1_ptr,  # bool
    row0,
    rows,
    V,
    STATS: tl.constexpr,
    TILE_V: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    local = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    t = row0 + local
    inside = (local < rows) & (t < tl.load(count_ptr))
    tiles_v = tl.cdiv(V, TILE_V)
    target_logit = tl.load(target_logits_ptr + t, mask=inside, other=0.0)
    target_tile = tl.load(targets_ptr + t, mask=inside, other=0) // TILE_V
    top = tl.full((BLOCK_ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    plain = tl.zeros((BLOCK_ROWS,), tl.float32)
    weighted = tl.zeros((BLOCK_ROWS,), tl.float32)
    squares = tl.zeros((BLOCK_ROWS,), tl.float32)
    beaten = tl.zeros((BLOCK_ROWS,), tl.int32)
    for k0 in range(0, tiles_v, BLOCK_TILES):
        k = k0 + tl.arange(0, BLOCK_TILES)
        mask = (k < tiles_v)[:, None] & inside[None, :]
        at = k[:, None].to(tl.int64) * rows + local[None, :]
        tile_max = tl.load(tile_max_ptr + at, mask=mask, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(tile_max, 0))
        shift = finite_or_zero(new_top)
        rescale = exp_difference(top, shift)
        factor = exp_difference(tile_max, shift[None, :])
        tile_sum = tl.load(tile_sum_ptr + at, mask=mask, other=0.0)
        if STATS:
            plain += tl.sum(tl.load(tile_plain_ptr + at, mask=mask, other=0.0), 0)
            # Relative to the new maximum, as the sums are; where there is no sum yet, its maximum is no number to move.
            moved = tl.where(total == 0.0, 0.0, total * (finite_or_zero(top) - shift))
            tile_moved = tl.where(tile_sum == 0.0, 0.0, tile_sum * (finite_or_zero(tile_max) - shift[None, :]))
            tile_weighted = tl.load(tile_weighted_ptr + at, mask=mask, other=0.0) / LOG2_E + tile_moved
            weighted = (weighted + moved) * rescale + tl.sum(tile_weighted * factor, 0)
            squares = squares * rescale * rescale + tl.sum(
                tl.load(tile_squares_ptr + at, mask=mask, other=0.0) * factor * factor, 0
            )
            earlier = (k[:, None] < target_tile[None, :]) & (tile_max == target_logit[None, :])
            beaten += tl.sum((mask & ((tile_max > target_logit[None, :]) | earlier)).to(tl.int32), 0)
        total = total * rescale + tl.sum(tile_sum * factor, 0)
        top = new_top
    lse = lse_of(finite_or_zero(top), total)
    out = tl.load(rows_ptr + t, mask=inside, other=0)
    tl.store(lse_ptr + out, lse, mask=inside)
    tl.store(token_logps_ptr + out, log_probs(target_logit, lse), mask=inside)
    if STATS:
        tl.store(entropy_ptr + out, tl.log(total) - weighted / total, mask=inside)
        tl.store(mean_logits_ptr + out, plain / V, mask=inside)
        tl.store(log_sum_sq_probs_ptr + out, tl.log(squares) - 2.0 * tl.log(total), mask=inside)
        leads = tl.load(target_leads_ptr + t, mask=inside, other=0)
        # A wrong id has the target logit NaN, and no tile has written its leads.
        leads = (leads != 0) & (target_logit == target_logit)
        tl.store(is_top1_ptr + out, (beaten == 0) & leads, mask=inside)


@on_its_device
def linear_logps_forward(
    head: Head,  # fp32 | bf16 | fp16
    targets: Tensor,  # (...) int64
    options: HeadOptions,
    stats: bool,
) -> LogpStats:
    """All fields, lse in float64, the last four of size 0 unless `stats`."""
    V, T = head.weight.shape[0], targets.numel()
    device = head.hidden.device
    # Ignored rows keep these zeros.
    shapes = [targets.shape] * 2 + [targets.shape if stats else (0,)] * 4
    dtypes = (torch.float32, torch.float64, *[torch.float32] * 3, torch.bool)
    outputs = LogpStats(*(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, dtypes)))
    if T == 0:
        return outputs

    compact = compact_head(head, targets, options)
    live, launch = compact.live, compact.launch
    # NaN stays where no tile holds the target: a wrong id is never a plausible number.
    target_logits = torch.full((T,), torch.nan, dtype=torch.float32, device=device)
    target_leads = torch.empty(T if stats else 0, dtype=torch.int8, device=device)

    tiles_v = triton.cdiv(V, launch.BLOCK_V)
    fields = 5 if stats else 2
    chunk, width = forward_shape(T, head.weight, 4 * fields * tiles_v, options.workspace_bytes, launch)
    products = new_products(compact.head, chunk, width, launch)
    arguments = head_arguments(compact.head, launch, options, products)
    tiles = [torch.empty((tiles_v, chunk), dtype=torch.float32, device=device) for _ in range(fields)]
    tile_fields = (tiles * 3)[:5]
    for row0 in range(0, T, chunk):
        rows = min(chunk, T - row0)
        # With fewer rows than `chunk` the workspace is used as (tiles_v, rows).
        for column0 in range(0, V, width):
            columns = min(width, V - column0)
            write_products(products, compact.head, row0, rows, column0, columns)
            grid = triton.cdiv(rows, launch.BLOCK_T) * triton.cdiv(columns, launch.BLOCK_V)
            linear_logps_fwd_kernel[programs(launch, grid, device)](
                *arguments.tensors, compact.targets, live.live, target_logits, *tile_fields, target_leads,
                row0, rows, column0, columns, T, V, arguments.strides, arguments.scale, arguments.cap,
                STATS=stats, **arguments.constants,
            )  # fmt: skip
        combine_kernel[(triton.cdiv(rows, 32),)](
            *tile_fields, target_leads, target_logits, compact.targets, live.rows, live.live, *outputs,
            row0, rows, V,
            STATS=stats, TILE_V=launch.BLOCK_V, BLOCK_ROWS=32, BLOCK_TILES=64, num_warps=4,
        )  # fmt: skip
    return outputs
