"""Token log-probabilities and their derivative in hidden, from one pass over the vocabulary: for a head that needs no
gradient of its own, whose backward then is a row scale.

With p the softmax, c the cap's slope and y the target, the derivative needs the sum of p_v c_v weight_v over v != y. A
kernel writes a bounded block of exp(z - m) c in the input dtype, m the row's maximum so far, and 0 at the target (so
that nothing cancels in a row that is sure of it, whatever the dtype). Where a tile of the block finds a larger maximum,
a second kernel brings the block to it. cuBLAS adds the block times weight to one float32 (T, D) buffer, whose rows
follow the maximum too. Cost: 4 T D V FLOP, two GEMMs instead of the three of forward and backward. Never holds
(T, V). No atomics: the same bits every time. Ignored rows cost no arithmetic in the kernels. docs/math.md, section 1.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from groupdpo_kernels.reference import Head, HeadOptions

from .compaction import compact_head, gather_rows
from .gemm import add_gemm, block_shape, new_block, new_products, write_products
from .launch import head_arguments, library_rounds, on_its_device, programs, why_not
from .row_limited_gemm import add_rows
from .tile import exp_difference, finite_or_zero, logits_tile, products_pointer, rows_from, tile_position

__all__ = ["frozen_head", "why_not"]


@triton.jit(do_not_specialize=["row0", "rows", "column0", "columns", "T"], do_not_specialize_on_alignment=["count_ptr"])
def frozen_head_fwd_kernel(
    hidden,  # (T, D) pointer or descriptor, compact; or products (tile.py, products_pointer)
    weight,  # (V, D) pointer or descriptor
    bias_ptr,  # (V,)
    low_rank_hidden_ptr,  # (T, R) compact
    low_rank_weight_ptr,  # (V, R)
    targets_ptr,  # (T,) int64, compact
    count_ptr,  # (1,) int32: live rows
    top_ptr,  # (T,) float32: maximum of the blocks before
    target_logits_ptr,  # (T,) float32
    target_slopes_ptr,  # (T,) float32
    tile_max_ptr,  # (tiles_v, rows) float32: what the tile's exponentials are relative to
    tile_sum_ptr,  # (tiles_v, rows) float32: without the target
    block_ptr,  # (rows in whole tiles, stride_block) input dtype; what lies past `columns` is written but never read
    row0,  # the block is rows row0 : row0 + rows, columns column0 : column0 + columns
    rows,
    column0,
    columns,
    T,
    V,
    stride_block,  # a multiple of BLOCK_V
    strides,  # of weight (v, d), then of low_rank_weight (v, r)
    scale,
    cap,
    D: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_T: tl.constexpr,
    TMA: tl.constexpr,
    LIBRARY: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCURATE: tl.constexpr,  # tanh, to 2 ulp
):
    live = tl.minimum(tl.load(count_ptr), row0 + rows)
    tiles_t = tl.cdiv(tl.maximum(live - row0, 0), BLOCK_T)
    tiles_v = tl.cdiv(columns, BLOCK_V)
    column = tl.arange(0, BLOCK_V)
    row = tl.arange(0, BLOCK_T)
    hidden = products_pointer(hidden, row0, column0, strides, LIBRARY)
    # Neither flattened into the loop over D nor in halves: both spill here.
    for tile in tl.range(tl.program_id(0), tiles_t * tiles_v, tl.num_programs(0)):
        tile_t, tile_v = tile_position(tile, tiles_t, tiles_v, GROUP_T)
        t0 = row0 + tile_t * BLOCK_T
        v0 = column0 + tile_v * BLOCK_V
        y = logits_tile(
            hidden, weight, bias_ptr, low_rank_hidden_ptr, low_rank_weight_ptr, rows_from(t0, T, BLOCK_T), t0, v0, V,
            strides, scale,
            D, R, HAS_BIAS, HAS_SOFTCAP, BLOCK_R, BLOCK_T, BLOCK_V, BLOCK_D, TMA, LIBRARY, PRECISION, ACCURATE,
        )  # fmt: skip
        t = t0 + row
        target = tl.load(targets_ptr + t, mask=t < live, other=-1) - v0
        inside = (target >= 0) & (target < tl.minimum(BLOCK_V, V - v0))
        target_column = tl.where(inside, target, -1).to(tl.int32)[:, None]
        hit = tl.max(inside.to(tl.int32), 0) > 0  # most tiles hold no row's target
        if hit:
            # One tile at most holds a given row's target: no atomics.
            at_target = tl.sum(tl.where(column[None, :] == target_column, y, 0.0), 1)
            tl.store(target_logits_ptr + t, cap * at_target if HAS_SOFTCAP else at_target, mask=inside)
            slope = 1.0 - at_target * at_target if HAS_SOFTCAP else tl.full((BLOCK_T,), 1.0, tl.float32)
            tl.store(target_slopes_ptr + t, slope, mask=inside)
        z = cap * y if HAS_SOFTCAP else y
        if v0 + BLOCK_V > V:
            # Columns past V would be phantom logits of value 0.
            z = tl.where((column < V - v0)[None, :], z, -float("inf"))
        # Relative to the row's maximum so far: most tiles then need no rescaling.
        top = tl.maximum(tl.load(top_ptr + t, mask=t < live, other=0.0), tl.max(z, 1))
        # cuBLAS reads the rows past the live ones: zeros, by one select a row rather than one an entry.
        shift = tl.where(t < live, finite_or_zero(top), float("inf"))
        e = exp_difference(z, shift[:, None])
        if hit:
            e = tl.where(column[None, :] == target_column, 0.0, e)
        at = tile_v.to(tl.int64) * rows + (t - row0)
        tl.store(tile_max_ptr + at, top, mask=t < live)
        tl.store(tile_sum_ptr + at, tl.sum(e, 1), mask=t < live)
        if HAS_SOFTCAP:
            e *= 1.0 - y * y
        block = block_ptr + (tile_t * BLOCK_T).to(tl.int64) * stride_block + tile_v * BLOCK_V
        tl.store(block + row[:, None] * stride_block + column[None, :], e.to(block_ptr.dtype.element_ty))
    # Tiles of ignored rows: zeros, no arithmetic.
    all_tiles_t = tl.cdiv(rows, BLOCK_T)
    for tile in tl.range(tiles_t * tiles_v + tl.program_id(0), all_tiles_t * tiles_v, tl.num_programs(0)):
        tile_t = tile // tiles_v
        tile_v = tile % tiles_v
        block = block_ptr + (tile_t * BLOCK_T).to(tl.int64) * stride_block + tile_v * BLOCK_V
        zero = tl.zeros((BLOCK_T, BLOCK_V), block_ptr.dtype.element_ty)
        tl.store(block + row[:, None] * stride_block + column[None, :], zero)


@triton.jit(do_not_specialize=["row0", "rows", "tiles_v"], do_not_specialize_on_alignment=["count_ptr"])
def advance_kernel(
    tile_max_ptr,  # (tiles_v, rows) float32
    tile_sum_ptr,  # (tiles_v, rows) float32
    count_ptr,  # (1,) int32
    top_ptr,  # (T,) float32: maximum so far; in and out, like rest
    rest_ptr,  # (T,) float32: sum of exponentials relative to it, without the target's
    rescale_ptr,  # (T,) float32, out: what the row has accumulated times this is relative to the new maximum
    row0,
    rows,
    tiles_v,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """top, rest and rescale of every row, by the tiles of a block."""
    local = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    t = row0 + local
    inside = (local < rows) & (t < tl.load(count_ptr))
    before = tl.load(top_ptr + t, mask=inside, other=0.0)
    top = before
    for k0 in range(0, tiles_v, BLOCK_TILES):
        k = k0 + tl.arange(0, BLOCK_TILES)
        mask = (k < tiles_v)[:, None] & inside[None, :]
        at = k[:, None].to(tl.int64) * rows + local[None, :]
        top = tl.maximum(top, tl.max(tl.load(tile_max_ptr + at, mask=mask, other=-float("inf")), 0))
    shift = finite_or_zero(top)
    # Nothing is there while only -inf was seen; 0 * inf would be NaN.
    rescale = tl.where(before == -float("inf"), 0.0, exp_difference(before, shift))
    rest = tl.load(rest_ptr + t, mask=inside, other=0.0) * rescale
    for k0 in range(0, tiles_v, BLOCK_TILES):
        k = k0 + tl.arange(0, BLOCK_TILES)
        mask = (k < tiles_v)[:, None] & inside[None, :]
        at = k[:, None].to(tl.int64) * rows + local[None, :]
        tile_shift = finite_or_zero(tl.load(tile_max_ptr + at, mask=mask, other=0.0))
        tile_sum = tl.load(tile_sum_ptr + at, mask=mask, other=0.0)
        rest += tl.sum(tl.where(tile_sum == 0, 0.0, tile_sum * exp_difference(tile_shift, shift[None, :])), 0)
    tl.store(top_ptr + t, top, mask=inside)
    tl.store(rest_ptr + t, rest, mask=inside)
    tl.store(rescale_ptr + t, rescale, mask=inside)


@triton.jit(do_not_specialize=["row0", "rows", "tiles_v"], do_not_specialize_on_alignment=["count_ptr"])
def rescale_block_kernel(
    tile_max_ptr,  # (tiles_v, rows) float32
    top_ptr,  # (T,) float32
    count_ptr,  # (1,) int32
    block_ptr,  # (rows, stride_block) input dtype, in place
    row0,
    rows,
    tiles_v,
    stride_block,
    TILE_V: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Brings the tiles that were relative to a smaller maximum to the row's. Reads and writes those alone."""
    tile_v = tl.program_id(0) % tiles_v
    local = (tl.program_id(0) // tiles_v) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = (local < rows) & (row0 + local < tl.load(count_ptr))
    top = tl.load(top_ptr + row0 + local, mask=inside, other=0.0)
    tile_max = tl.load(tile_max_ptr + tile_v.to(tl.int64) * rows + local, mask=inside, other=0.0)
    stale = inside & (tile_max < top)
    if tl.max(stale.to(tl.int32), 0) > 0:
        factor = exp_difference(finite_or_zero(tile_max), finite_or_zero(top))
        # A tile of -inf alone holds zeros.
        factor = tl.where(tile_max == -float("inf"), 0.0, factor)
        at = local.to(tl.int64)[:, None] * stride_block + (tile_v * TILE_V + tl.arange(0, TILE_V))[None, :]
        e = tl.load(block_ptr + at, mask=stale[:, None], other=0.0).to(tl.float32) * factor[:, None]
        tl.store(block_ptr + at, e.to(block_ptr.dtype.element_ty), mask=stale[:, None])


@triton.jit(do_not_specialize=["row0", "rows"], do_not_specialize_on_alignment=["count_ptr"])
def rescale_sums_kernel(
    expected_ptr,  # (T, N) float32, in place
    rescale_ptr,  # (T,) float32
    count_ptr,  # (1,) int32
    row0,
    rows,
    N,
    BLOCK_N: tl.constexpr,
):
    """What a row has summed up so far, relative to its new maximum. A row whose maximum has not moved is not read."""
    local = tl.program_id(0)
    t = row0 + local
    if (local < rows) & (t < tl.load(count_ptr)):
        factor = tl.load(rescale_ptr + t)
        if factor != 1.0:
            at = expected_ptr + t.to(tl.int64) * N
            for n0 in range(0, N, BLOCK_N):
                n = n0 + tl.arange(0, BLOCK_N)
                tl.store(at + n, tl.load(at + n, mask=n < N, other=0.0) * factor, mask=n < N)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["count_ptr"])
def derivative_kernel(
    expected_ptr,  # (T, N) float32, compact, times total; in place
    factor_ptr,  # (V, N): weight or low_rank_weight
    targets_ptr,  # (T,) int64, compact
    coefficients_ptr,  # (T,) float32: slope (1 - p) of the target
    total_ptr,  # (T,) float32
    count_ptr,  # (1,) int32
    T,
    V,
    N,
    stride_factor_v,
    stride_factor_n,
    chain,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """chain (coefficient factor[target] - expected / total)."""
    blocks = tl.cdiv(N, BLOCK_N)
    t = (tl.program_id(0) // blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = t < tl.load(count_ptr)
    target = tl.load(targets_ptr + t, mask=inside, other=0)
    known = inside & (target >= 0) & (target < V)  # a wrong id has NaN for its coefficient
    mask = inside[:, None] & (n < N)[None, :]
    at = t.to(tl.int64)[:, None] * N + n[None, :]
    expected = tl.load(expected_ptr + at, mask=mask, other=0.0)
    expected /= tl.load(total_ptr + t, mask=inside, other=1.0)[:, None]
    factor = factor_ptr + target[:, None] * stride_factor_v + n.to(tl.int64)[None, :] * stride_factor_n
    at_target = tl.load(factor, mask=mask & known[:, None], other=0.0).to(tl.float32)
    at_target *= tl.load(coefficients_ptr + t, mask=inside, other=0.0)[:, None]
    tl.store(expected_ptr + at, chain * (at_target - expected), mask=mask)


@on_its_device
def frozen_head(
    head: Head,  # fp32 | bf16 | fp16
    targets: Tensor,  # (...) int64
    options: HeadOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (...), (...), (..., D), (..., R)
    """(token_logps, lse, d token_logps / d hidden, d token_logps / d low_rank_hidden): lse in float64, the derivatives
    in the input dtype.
    """
    V, D = head.weight.shape
    T = targets.numel()
    new = functools.partial(torch.empty, dtype=torch.float32, device=head.hidden.device)
    derivatives = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (head.hidden, head.low_rank_hidden)
    ]
    if T == 0:
        return new(targets.shape), new(targets.shape, dtype=torch.float64), derivatives[0], derivatives[1]

    # The derivatives are written last: until then their memory holds the compact rows.
    memory = derivatives[0].view(T, -1), derivatives[1].view(T, derivatives[1].shape[-1])
    compact = compact_head(head, targets, options, *memory)
    live, launch = compact.live, compact.launch
    # NaN stays where no tile holds the target: a wrong id is never a plausible number.
    target_logits, target_slopes = (torch.full_like(new(T), torch.nan) for _ in range(2))
    top, rest, rescale = torch.full_like(new(T), -torch.inf), new(T).zero_(), new(T).zero_()

    rows, columns = block_shape(T, D, V, head.weight.element_size(), options.workspace_bytes, launch)
    products = new_products(compact.head, rows, columns, launch)
    arguments = head_arguments(compact.head, launch, options, products)
    constants = {name: value for name, value in arguments.constants.items() if name != "FLATTEN"}
    block = new_block(head.hidden, rows, columns, launch)
    stride = block.shape[1]
    tiles = [new((stride // launch.BLOCK_V, rows)) for _ in range(2)]
    # (factor, its expectation by row, the derivative)
    parts = [
        (factor, new((T, factor.shape[1])).zero_(), out)
        for factor, out in zip((head.weight, head.low_rank_weight), derivatives)
        if factor.shape[1]
    ]
    for row0 in range(0, T, rows):
        height = min(rows, T - row0)
        span = slice(row0, row0 + height)
        for column0 in range(0, V, columns):
            width = min(columns, V - column0)
            tiles_v = triton.cdiv(width, launch.BLOCK_V)
            write_products(products, compact.head, row0, height, column0, width)
            frozen_head_fwd_kernel[programs(launch, triton.cdiv(height, launch.BLOCK_T) * tiles_v, block.device)](
                *arguments.tensors, compact.targets, live.live, top, target_logits, target_slopes, *tiles, block,
                row0, height, column0, width, T, V, stride, arguments.strides, arguments.scale, arguments.cap,
                **constants,
            )  # fmt: skip
            advance_kernel[(triton.cdiv(height, 32),)](
                *tiles, live.live, top, rest, rescale, row0, height, tiles_v,
                BLOCK_ROWS=32, BLOCK_TILES=64, num_warps=4,
            )  # fmt: skip
            rescale_block_kernel[(triton.cdiv(height, 16) * tiles_v,)](
                tiles[0], top, live.live, block, row0, height, tiles_v, stride,
                TILE_V=launch.BLOCK_V, BLOCK_ROWS=16, num_warps=4,
            )  # fmt: skip
            for factor, expected, _ in parts:
                if column0 > 0:
                    rescale_sums_kernel[(height,)](
                        expected, rescale, live.live, row0, height, factor.shape[1], BLOCK_N=1024, num_warps=4
                    )
                here, part = block[:height, :width], factor[column0 : column0 + width]
                if library_rounds(here.dtype):
                    add_rows(expected[span], here, part, live.live, row0, launch)
                else:
                    add_gemm(expected[span], here, part)

    shift = torch.where(torch.isfinite(top), top, 0)
    total = rest + torch.exp(target_logits - shift)
    lse = shift.double() + total.double().log()
    # Infinite where a logit is: then no probability of the row is a number, and neither is its log (torch.log_softmax).
    total = torch.where(torch.isinf(total), torch.nan, total)
    logps = ((target_logits - shift).double() - total.double().log()).float()
    coefficients = target_slopes * (rest / total)
    token_logps, lse = (live.restore(x).view(targets.shape) for x in (logps, lse))
    chain = options.logit_scale / options.temperature
    for factor, expected, out in parts:
        N = factor.shape[1]
        BLOCK_N = min(1024, triton.next_power_of_2(N))
        BLOCK_ROWS = 4096 // BLOCK_N
        derivative_kernel[(triton.cdiv(T, BLOCK_ROWS) * triton.cdiv(N, BLOCK_N),)](
            expected, factor, compact.targets, coefficients, total, live.live, T, V, N,
            *factor.stride(), chain, BLOCK_ROWS=BLOCK_ROWS, BLOCK_N=BLOCK_N,
        )  # fmt: skip
        gather_rows(expected, live.positions, out.view(T, N))
    return token_logps, lse, derivatives[0], derivatives[1]
