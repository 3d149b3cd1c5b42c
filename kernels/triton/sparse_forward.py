"""Token log-probabilities, lse, and each row's candidates: the vocabulary entries of probability at least `least`.

The first visit is that of linear_logps_forward.py, and leaves each (row, vocabulary tile)'s maximum. Only a tile whose
maximum reaches the row's lse + log(least) can hold a candidate: those pairs, and the one with the target, are visited
again. The rows of a vocabulary tile are gathered, their logits rebuilt, twice: once to count, and after a prefix sum
over the tiles once to write, each row's candidates in the order of their ids. What a row's capacity cannot hold, and
what is too unlikely, is summed where it stands, apart from the target: neither non_target_probs nor dropped is a
difference, so nothing cancels in a row that is sure of its target. Candidates are not written from the first visit
because lse is not known there and compacting in its epilogue spills.

With a seed, entries are drawn from what is neither target nor candidate, in proportion to their probability: its sum in
each tile is known by then, so every draw chooses a tile, and the pairs of a row and a tile that was chosen are visited
once more, where the entry is that at which the tile's running sum passes a second random number. Numbers are Philox's
of (seed, compact row, draw): no state, the same draws whatever the chunks.

Cost: 2 T D V FLOP, and 4 D BLOCK_V for each pair visited, at most T V / BLOCK_V of them, 2 D BLOCK_V for each pair that
is drawn from, at most TAIL_SAMPLES a row; workspace 20 T V / BLOCK_V bytes by token chunks within half of the byte
budget (the candidates themselves are the other half), and one compact copy of hidden. Nothing is read back: programs
stride over lists that end on the device. No atomics: the same bits every time. A wrong id, or a row that is not finite,
has NaN for its dropped.
In Triton, not CUDA C++: the tiles of logits are tile.py's, and the rest is one prefix sum. docs/math.md, section 1.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from groupdpo_kernels.reference import TAIL_SAMPLES, Candidates, Head, HeadOptions

from .compaction import compact_head
from .launch import HeadArguments, Launch, chunk_rows, head_arguments, on_its_device, programs, strided_programs
from .linear_logps_forward import combine_kernel, linear_logps_fwd_kernel, why_not
from .tile import exp_difference, finite_or_zero, log_probs, logits_tile

__all__ = ["sparse_forward", "why_not"]

# Float32 sums of exponentials err by at most this much of themselves (the specification's figure: sparse.py).
SUM_ERROR = tl.constexpr(2.0**-18)
# The two visits may round a logit differently: a pair is visited from this far below the threshold.
SLACK = 2.0**-8


@triton.jit(do_not_specialize=["row0", "rows"], do_not_specialize_on_alignment=["count_ptr"])
def select_kernel(
    tile_max_ptr,  # (tiles_v, rows) float32, like all tile_*
    tile_sum_ptr,  # (tiles_v, rows) float32
    tile_rest_ptr,  # (tiles_v, rows) float32, out: the tile's sum, to be replaced in the pairs visited
    ends_ptr,  # (tiles_v, rows) int32, out: zeros, for the counts of the pairs visited
    visited_ptr,  # (tiles_v, rows) int32, out: each tile's rows to visit, from the chunk's start, then nothing
    visited_count_ptr,  # (tiles_v,) int32, out: how many
    targets_ptr,  # (T,) int64, compact
    rows_ptr,  # (T,) int32: original row of a compact one
    count_ptr,  # (1,) int32: live rows
    lse_ptr,  # (T,) float64, original order
    row0,
    rows,
    threshold,  # log(least) - SLACK
    TILE_V: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One program a vocabulary tile: a stable partition of its rows."""
    tile_v = tl.program_id(0)
    live = tl.load(count_ptr)
    base = tile_v.to(tl.int64) * rows
    visited = 0
    for r0 in range(0, rows, BLOCK_ROWS):
        local = r0 + tl.arange(0, BLOCK_ROWS)
        t = row0 + local
        inside = (local < rows) & (t < live)
        lse = tl.load(lse_ptr + tl.load(rows_ptr + t, mask=inside, other=0), mask=inside, other=0.0).to(tl.float32)
        top = tl.load(tile_max_ptr + base + local, mask=inside, other=-float("inf"))
        target = tl.load(targets_ptr + t, mask=inside, other=-1)
        own = (target >= tile_v * TILE_V) & (target < (tile_v + 1) * TILE_V)
        wanted = (inside & (((top >= lse + threshold) & (lse < float("inf"))) | own)).to(tl.int32)
        position = visited + tl.cumsum(wanted, 0) - 1
        tl.store(visited_ptr + base + position, local, mask=wanted > 0)
        tl.store(ends_ptr + base + local, tl.zeros((BLOCK_ROWS,), tl.int32), mask=local < rows)
        tile_sum = tl.load(tile_sum_ptr + base + local, mask=inside, other=0.0)
        tl.store(tile_rest_ptr + base + local, tile_sum, mask=inside)
        visited += tl.sum(wanted, 0)
    tl.store(visited_count_ptr + tile_v, visited)


@triton.jit
def task_rows(
    task,
    visited_ptr,  # (tiles_v, rows) int32
    visited_count_ptr,  # (tiles_v,) int32
    task_ends_ptr,  # (tiles_v,) int32: blocks of rows to visit, of the tiles up to and with this one
    task_tiles_ptr,  # (tasks,) int32: the vocabulary tile of a block
    rows,
    BLOCK_T: tl.constexpr,
):
    """A task's vocabulary tile, its block of rows, counted from the chunk's first, (BLOCK_T,), and which there are."""
    tile_v = tl.load(task_tiles_ptr + task)
    visited = tl.load(visited_count_ptr + tile_v)
    # Counted from the end, where a tile's last block stands.
    first = (task - tl.load(task_ends_ptr + tile_v) + tl.cdiv(visited, BLOCK_T)) * BLOCK_T
    inside = first + tl.arange(0, BLOCK_T) < visited
    local = tl.load(visited_ptr + tile_v.to(tl.int64) * rows + first + tl.arange(0, BLOCK_T), mask=inside, other=0)
    return tile_v, local, inside


@triton.jit
def other_logits(
    hidden_ptr,  # (T, D) compact
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,)
    low_rank_hidden_ptr,  # (T, R) compact
    low_rank_weight_ptr,  # (V, R)
    targets_ptr,  # (T,) int64, compact
    t,  # (BLOCK_T,) int64
    v0,
    V,
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
    PRECISION: tl.constexpr,
    ACCURATE: tl.constexpr,
):
    """The logits of a tile, (BLOCK_T, BLOCK_V) float32; -inf at each row's target and past V."""
    y = logits_tile(
        hidden_ptr, weight_ptr, bias_ptr, low_rank_hidden_ptr, low_rank_weight_ptr, t, 0, v0, V,
        strides, scale,
        D, R, HAS_BIAS, HAS_SOFTCAP, BLOCK_R, BLOCK_T, BLOCK_V, BLOCK_D, False, False, PRECISION, ACCURATE,
    )  # fmt: skip
    column = tl.arange(0, BLOCK_V)
    target = tl.load(targets_ptr + t) - v0
    other = (column[None, :] < V - v0) & (column[None, :] != target[:, None])
    return tl.where(other, cap * y if HAS_SOFTCAP else y, -float("inf"))


@triton.jit(do_not_specialize=["row0", "rows", "tiles_v", "most", "width"])
def visit_kernel(
    hidden_ptr,  # (T, D) compact
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,)
    low_rank_hidden_ptr,  # (T, R) compact
    low_rank_weight_ptr,  # (V, R)
    targets_ptr,  # (T,) int64, compact
    rows_ptr,  # (T,) int32: original row of a compact one
    lse_ptr,  # (T,) float64, original order
    visited_ptr,  # (tiles_v, rows) int32
    visited_count_ptr,  # (tiles_v,) int32
    task_ends_ptr,  # (tiles_v,) int32: blocks of rows to visit, of the tiles up to and with this one
    task_tiles_ptr,  # (tasks,) int32: the vocabulary tile of a block
    tile_max_ptr,  # (tiles_v, rows) float32: what the tile's exponentials are relative to
    tile_sum_ptr,  # (tiles_v, rows) float32, out: sum without the target
    tile_rest_ptr,  # (tiles_v, rows) float32, out: sum of what is neither target nor written
    ends_ptr,  # (tiles_v, rows) int32, out: the tile's candidates; or in: the row's, up to and with the tile
    ids_ptr,  # (T, width) int32, original order, out
    weights_ptr,  # (T, width) float32, original order, out
    row0,
    rows,
    tiles_v,
    V,
    most,
    width,  # most, and the columns of what is drawn
    log_least,
    strides,  # of weight (v, d), then of low_rank_weight (v, r)
    scale,
    cap,
    WRITE: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCURATE: tl.constexpr,  # tanh, to 2 ulp
):
    """Counts candidates, or writes them: a task is a vocabulary tile and a block of its rows to visit. How many there
    are is known on the device alone, so few programs stride over them; those side by side share a tile's weights.
    """
    tasks = tl.load(task_ends_ptr + tiles_v - 1)
    for task in tl.range(tl.program_id(0), tasks, tl.num_programs(0)):
        tile_v, local, inside = task_rows(
            task, visited_ptr, visited_count_ptr, task_ends_ptr, task_tiles_ptr, rows, BLOCK_T
        )
        t = (row0 + local).to(tl.int64)
        v0 = tile_v * BLOCK_V
        column = tl.arange(0, BLOCK_V)
        z = other_logits(
            hidden_ptr, weight_ptr, bias_ptr, low_rank_hidden_ptr, low_rank_weight_ptr, targets_ptr, t, v0, V,
            strides, scale, cap,
            D, R, HAS_BIAS, HAS_SOFTCAP, BLOCK_R, BLOCK_T, BLOCK_V, BLOCK_D, PRECISION, ACCURATE,
        )  # fmt: skip
        at = tile_v.to(tl.int64) * rows + local
        shift = finite_or_zero(tl.load(tile_max_ptr + at, mask=inside, other=0.0))
        row = tl.load(rows_ptr + t).to(tl.int64)
        lse = tl.load(lse_ptr + row)
        # No NaN is found, and nothing in a row that holds +inf, or -inf alone.
        threshold = lse.to(tl.float32) + log_least
        threshold = tl.where(tl.abs(threshold) == float("inf"), float("nan"), threshold)
        if WRITE:
            start = tl.load(ends_ptr + at - rows, mask=inside & (tile_v > 0), other=0)
            # Never over the next tile's, had this visit found one more than the first.
            end = tl.minimum(tl.load(ends_ptr + at, mask=inside, other=0), most)
            # The next of each row in turn: they are few, and slots for a whole tile at once spill 1 KB a thread.
            last = tl.full((BLOCK_T,), -1, tl.int32)
            for slot in range(tl.max(end - start, 0)):
                found = (z >= threshold[:, None]) & (column[None, :] > last[:, None])
                c = tl.min(tl.where(found, column[None, :], BLOCK_V), 1)
                c = tl.where(start + slot < end, c, BLOCK_V)
                z_c = tl.sum(tl.where(column[None, :] == c[:, None], z, 0.0), 1)
                p = tl.exp(log_probs(z_c, lse))
                if HAS_SOFTCAP:
                    p *= 1.0 - (z_c / cap) * (z_c / cap)
                tl.store(ids_ptr + row * width + start + slot, v0 + c, mask=c < BLOCK_V)
                tl.store(weights_ptr + row * width + start + slot, p, mask=c < BLOCK_V)
                last = tl.where(c < BLOCK_V, c, last)
            e = exp_difference(z, shift[:, None])
            tl.store(tile_sum_ptr + at, tl.sum(e, 1), mask=inside)
            written = (z >= threshold[:, None]) & (column[None, :] <= last[:, None])
            tl.store(tile_rest_ptr + at, tl.sum(tl.where(written, 0.0, e), 1), mask=inside)
        else:
            tl.store(ends_ptr + at, tl.sum((z >= threshold[:, None]).to(tl.int32), 1), mask=inside)


@triton.jit(
    do_not_specialize=["row0", "rows", "tiles_v", "most", "width", "seed"],
    do_not_specialize_on_alignment=["count_ptr"],
)
def non_target_kernel(
    tile_max_ptr,  # (tiles_v, rows) float32
    tile_sum_ptr,  # (tiles_v, rows) float32: without the target
    tile_rest_ptr,  # (tiles_v, rows) float32: without the candidates either
    target_logits_ptr,  # (T,) float32, compact
    rows_ptr,  # (T,) int32: original row of a compact one
    count_ptr,  # (1,) int32
    non_target_probs_ptr,  # (T,) float32, in the original order, like all that follow
    target_slopes_ptr,
    dropped_ptr,
    chosen_ptr,  # (rows, DRAWS) int32, out: the tile of each draw, -1 for none
    weights_ptr,  # (T, width) float32, out: in the columns from `most` on, what each draw stands for
    row0,
    rows,
    tiles_v,
    most,
    width,
    seed: tl.int64,
    cap,
    HAS_SOFTCAP: tl.constexpr,
    DRAWS: tl.constexpr,  # 0 for none
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    local = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    t = row0 + local
    inside = (local < rows) & (t < tl.load(count_ptr))
    top = tl.full((BLOCK_ROWS,), -float("inf"), tl.float32)
    others = tl.zeros((BLOCK_ROWS,), tl.float32)
    rest = tl.zeros((BLOCK_ROWS,), tl.float32)
    for k0 in range(0, tiles_v, BLOCK_TILES):
        k = k0 + tl.arange(0, BLOCK_TILES)
        mask = (k < tiles_v)[:, None] & inside[None, :]
        at = k[:, None].to(tl.int64) * rows + local[None, :]
        tile_max = tl.load(tile_max_ptr + at, mask=mask, other=-float("inf"))
        new_top = tl.maximum(top, tl.max(tile_max, 0))
        shift = finite_or_zero(new_top)
        rescale = exp_difference(top, shift)
        factor = exp_difference(tile_max, shift[None, :])
        others = others * rescale + tl.sum(tl.load(tile_sum_ptr + at, mask=mask, other=0.0) * factor, 0)
        rest = rest * rescale + tl.sum(tl.load(tile_rest_ptr + at, mask=mask, other=0.0) * factor, 0)
        top = new_top
    # A wrong id has no target logit: NaN from here on.
    target_logit = tl.load(target_logits_ptr + t, mask=inside, other=0.0)
    total = others + exp_difference(target_logit, finite_or_zero(top))
    # Infinite where a logit is: then no probability of the row is a number.
    total = tl.where(total == float("inf"), float("nan"), total)
    y = target_logit / cap if HAS_SOFTCAP else finite_or_zero(target_logit) * 0.0  # NaN stays
    out = tl.load(rows_ptr + t, mask=inside, other=0)
    tl.store(non_target_probs_ptr + out, others / total, mask=inside)
    tl.store(target_slopes_ptr + out, 1.0 - y * y, mask=inside)
    tl.store(dropped_ptr + out, rest / total + SUM_ERROR * (others / total), mask=inside)
    if DRAWS > 0:
        draw = tl.arange(0, DRAWS)
        u, _, _, _ = tl.rand4x(seed, t[:, None].to(tl.int64) * DRAWS + draw[None, :])
        x = u * rest[:, None]
        chosen = tl.zeros((BLOCK_ROWS, DRAWS), tl.int32)
        before = tl.zeros((BLOCK_ROWS,), tl.float32)
        shift = finite_or_zero(top)
        for k0 in range(0, tiles_v, BLOCK_TILES):
            k = k0 + tl.arange(0, BLOCK_TILES)
            mask = (k < tiles_v)[:, None] & inside[None, :]
            at = k[:, None].to(tl.int64) * rows + local[None, :]
            factor = exp_difference(tl.load(tile_max_ptr + at, mask=mask, other=-float("inf")), shift[None, :])
            mass = tl.load(tile_rest_ptr + at, mask=mask, other=0.0) * factor
            passed = (before[None, :] + tl.cumsum(mass, 0))[:, :, None] <= x[None, :, :]
            chosen += tl.sum((passed & mask[:, :, None]).to(tl.int32), 0)
            before += tl.sum(mass, 0)
        # Two sums of the same numbers may differ in their last digits.
        chosen = tl.where((rest > 0)[:, None], tl.minimum(chosen, tiles_v - 1), -1)
        tl.store(chosen_ptr + local[:, None] * DRAWS + draw[None, :], chosen, mask=inside[:, None])
        slot = out[:, None].to(tl.int64) * width + most + draw[None, :]
        share = tl.where(rest > 0, rest / total / DRAWS, 0.0)
        tl.store(weights_ptr + slot, share[:, None] + tl.zeros((BLOCK_ROWS, DRAWS), tl.float32), mask=inside[:, None])


@triton.jit(do_not_specialize=["row0", "rows"], do_not_specialize_on_alignment=["count_ptr"])
def select_drawn_kernel(
    chosen_ptr,  # (rows, DRAWS) int32
    visited_ptr,  # (tiles_v, rows) int32, out: each tile's rows that draw from it, from the chunk's start, then nothing
    visited_count_ptr,  # (tiles_v,) int32, out: how many
    count_ptr,  # (1,) int32: live rows
    row0,
    rows,
    DRAWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One program a vocabulary tile: a stable partition of its rows."""
    tile_v = tl.program_id(0)
    live = tl.load(count_ptr)
    base = tile_v.to(tl.int64) * rows
    visited = 0
    for r0 in range(0, rows, BLOCK_ROWS):
        local = r0 + tl.arange(0, BLOCK_ROWS)
        inside = (local < rows) & (row0 + local < live)
        slots = local[:, None] * DRAWS + tl.arange(0, DRAWS)[None, :]
        chosen = tl.load(chosen_ptr + slots, mask=inside[:, None], other=-1)
        wanted = tl.max((chosen == tile_v).to(tl.int32), 1)
        position = visited + tl.cumsum(wanted, 0) - 1
        tl.store(visited_ptr + base + position, local, mask=wanted > 0)
        visited += tl.sum(wanted, 0)
    tl.store(visited_count_ptr + tile_v, visited)


@triton.jit(do_not_specialize=["row0", "rows", "tiles_v", "most", "width", "seed"])
def draw_kernel(
    hidden_ptr,  # (T, D) compact
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,)
    low_rank_hidden_ptr,  # (T, R) compact
    low_rank_weight_ptr,  # (V, R)
    targets_ptr,  # (T,) int64, compact
    rows_ptr,  # (T,) int32: original row of a compact one
    lse_ptr,  # (T,) float64, original order
    chosen_ptr,  # (rows, DRAWS) int32
    visited_ptr,  # (tiles_v, rows) int32
    visited_count_ptr,  # (tiles_v,) int32
    task_ends_ptr,  # (tiles_v,) int32: blocks of rows to visit, of the tiles up to and with this one
    task_tiles_ptr,  # (tasks,) int32: the vocabulary tile of a block
    tile_max_ptr,  # (tiles_v, rows) float32
    ends_ptr,  # (tiles_v, rows) int32: the row's candidates, up to and with the tile
    ids_ptr,  # (T, width) int32, original order, out
    weights_ptr,  # (T, width) float32, original order: what a draw stands for, out: times the cap's slope
    row0,
    rows,
    tiles_v,
    V,
    most,
    width,
    seed: tl.int64,
    log_least,
    strides,  # of weight (v, d), then of low_rank_weight (v, r)
    scale,
    cap,
    DRAWS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCURATE: tl.constexpr,  # tanh, to 2 ulp
):
    """A program for each task, a vocabulary tile and a block of the rows that draw from it. Their number has a small
    bound, so there is no loop over them: it would spill up to 700 bytes a thread.
    """
    task = tl.program_id(0)
    if task < tl.load(task_ends_ptr + tiles_v - 1):
        tile_v, local, inside = task_rows(
            task, visited_ptr, visited_count_ptr, task_ends_ptr, task_tiles_ptr, rows, BLOCK_T
        )
        t = (row0 + local).to(tl.int64)
        v0 = tile_v * BLOCK_V
        column = tl.arange(0, BLOCK_V)
        z = other_logits(
            hidden_ptr, weight_ptr, bias_ptr, low_rank_hidden_ptr, low_rank_weight_ptr, targets_ptr, t, v0, V,
            strides, scale, cap,
            D, R, HAS_BIAS, HAS_SOFTCAP, BLOCK_R, BLOCK_T, BLOCK_V, BLOCK_D, PRECISION, ACCURATE,
        )  # fmt: skip
        at = tile_v.to(tl.int64) * rows + local
        shift = finite_or_zero(tl.load(tile_max_ptr + at, mask=inside, other=0.0))
        row = tl.load(rows_ptr + t).to(tl.int64)
        lse = tl.load(lse_ptr + row)
        # The candidates of the tile are as many of the likely entries as the row had room for.
        start = tl.load(ends_ptr + at - rows, mask=inside & (tile_v > 0), other=0)
        room = tl.minimum(tl.load(ends_ptr + at, mask=inside, other=0), most) - start
        likely = z >= (lse.to(tl.float32) + log_least)[:, None]
        written = likely & (tl.cumsum(likely.to(tl.int32), 1) <= room[:, None])
        e = tl.where(written, 0.0, exp_difference(z, shift[:, None]))
        sums = tl.cumsum(e, 1)
        total = tl.max(sums, 1)
        for draw in tl.static_range(DRAWS):
            mine = inside & (tl.load(chosen_ptr + local * DRAWS + draw, mask=inside, other=-1) == tile_v)
            _, u, _, _ = tl.rand4x(seed, t * DRAWS + draw)
            passes = (sums > (u * total)[:, None]) & (e > 0)
            c = tl.min(tl.where(passes, column[None, :], BLOCK_V), 1)
            slot = row * width + most + draw
            tl.store(ids_ptr + slot, tl.where(c < BLOCK_V, v0 + c, 0), mask=mine)
            if HAS_SOFTCAP:
                z_c = tl.sum(tl.where(column[None, :] == c[:, None], z, 0.0), 1)
                share = tl.load(weights_ptr + slot, mask=mine, other=0.0)
                tl.store(weights_ptr + slot, share * (1.0 - (z_c / cap) * (z_c / cap)), mask=mine)
            # No entry, where the tile's tail has underflowed or is not finite: an id is never one that was not drawn.
            tl.store(weights_ptr + slot, 0.0, mask=mine & (c == BLOCK_V))


def visit_shape(launch: Launch) -> dict[str, int]:
    """Of the second visit: 64 rows, since a tile is visited for few."""
    return {"BLOCK_T": min(64, launch.BLOCK_T), "num_warps": 8, "num_stages": 3}


def draw_shape(launch: Launch) -> dict[str, int]:
    """Of the visit that draws: 32 rows, since beside the tile it holds its exponentials and their running sums."""
    return {"BLOCK_T": min(32, launch.BLOCK_T), "num_warps": 8, "num_stages": 3}


@on_its_device
def sparse_forward(
    head: Head,  # fp32 | bf16 | fp16
    targets: Tensor,  # (...) int64
    options: HeadOptions,
    least: float,  # probability of a candidate
    most: int,  # candidates a row
    seed: int | None = None,  # draws TAIL_SAMPLES entries a row of what is neither target nor candidate
) -> tuple[Tensor, Candidates]:  # (...) float32
    """token_logps and the candidates; with a seed, also a sampled tail."""
    V, T = head.weight.shape[0], targets.numel()
    new = functools.partial(torch.empty, device=head.hidden.device)
    # Ignored rows keep these zeros.
    token_logps, lse, non_target_probs, target_slopes, dropped = (
        new(targets.shape, dtype=torch.float64 if i == 1 else torch.float32).zero_() for i in range(5)
    )
    draws = 0 if seed is None else TAIL_SAMPLES
    width = most + draws
    ids = new((*targets.shape, width), dtype=torch.int32).zero_()
    weights = new(ids.shape, dtype=torch.float32).zero_()
    found = Candidates(lse, non_target_probs, target_slopes, dropped, ids, weights)
    if T == 0:
        return token_logps, found

    # The kernel multiplies in both visits, since the second rebuilds single tiles, and both should round alike.
    compact = compact_head(head, targets, options, library=False)
    live, launch = compact.live, compact.launch
    arguments = head_arguments(compact.head, launch, options)
    # NaN stays where no tile holds the target: a wrong id is never a plausible number.
    target_logits = torch.full_like(new(T, dtype=torch.float32), torch.nan)

    # Statistics, which these kernels have room for, are not asked for.
    unused, unused_int8, unused_bool = (new(0, dtype=dtype) for dtype in (torch.float32, torch.int8, torch.bool))

    tiles_v = triton.cdiv(V, launch.BLOCK_V)
    chunk = chunk_rows(T, 20 * tiles_v + 4 * draws, options.workspace_bytes // 2, launch)
    tiles = [new(tiles_v * chunk, dtype=torch.float32) for _ in range(3)]
    ends, visited = (new(tiles_v * chunk, dtype=torch.int32) for _ in range(2))
    visited_count = new(tiles_v, dtype=torch.int32)
    chosen = new(draws * chunk, dtype=torch.int32)
    visit = _visit_arguments(arguments, visit_shape(launch))
    drawing = _visit_arguments(arguments, draw_shape(launch))
    for row0 in range(0, T, chunk):
        rows = min(chunk, T - row0)
        # With fewer rows than `chunk` the workspace is used as (tiles_v, rows).
        linear_logps_fwd_kernel[programs(launch, triton.cdiv(rows, launch.BLOCK_T) * tiles_v, targets.device)](
            *arguments.tensors, compact.targets, live.live, target_logits, *tiles[:2], *tiles, unused_int8,
            row0, rows, 0, V, T, V, arguments.strides, arguments.scale, arguments.cap,
            STATS=False, **arguments.constants,
        )  # fmt: skip
        combine_kernel[(triton.cdiv(rows, 32),)](
            *tiles[:2], *tiles, unused_int8, target_logits, compact.targets, live.rows, live.live,
            token_logps, lse, unused, unused, unused, unused_bool, row0, rows, V,
            STATS=False, TILE_V=launch.BLOCK_V, BLOCK_ROWS=32, BLOCK_TILES=64, num_warps=4,
        )  # fmt: skip
        select_kernel[(tiles_v,)](
            *tiles, ends, visited, visited_count, compact.targets, live.rows, live.live, lse,
            row0, rows, math.log(least) - SLACK, TILE_V=launch.BLOCK_V, BLOCK_ROWS=1024, num_warps=4,
        )  # fmt: skip
        task_ends, task_tiles = _tasks(visited_count, rows, visit_shape(launch)["BLOCK_T"])
        for write in (False, True):
            visit_kernel[strided_programs(task_tiles.shape[0], 4, targets.device)](
                *compact.head[:2], *visit.tensors, compact.targets, live.rows, lse, visited, visited_count,
                task_ends, task_tiles, *tiles, ends, ids, weights,
                row0, rows, tiles_v, V, most, width, math.log(least),
                visit.strides, visit.scale, visit.cap, WRITE=write, **visit.constants,
            )  # fmt: skip
            if not write:
                ends[: tiles_v * rows].view(tiles_v, rows).cumsum_(0)
        non_target_kernel[(triton.cdiv(rows, 32),)](
            *tiles, target_logits, live.rows, live.live, non_target_probs, target_slopes, dropped, chosen, weights,
            row0, rows, tiles_v, most, width, seed or 0, arguments.cap,
            HAS_SOFTCAP=options.softcap is not None, DRAWS=draws, BLOCK_ROWS=32, BLOCK_TILES=64, num_warps=4,
        )  # fmt: skip
        if seed is None:
            continue
        select_drawn_kernel[(tiles_v,)](
            chosen, visited, visited_count, live.live, row0, rows, DRAWS=draws, BLOCK_ROWS=256, num_warps=4
        )
        BLOCK_T = draw_shape(launch)["BLOCK_T"]
        task_ends, task_tiles = _tasks(visited_count, rows, BLOCK_T)
        # Every tile may end in a block that is not full.
        draw_kernel[(min(task_tiles.shape[0], tiles_v + rows * draws // BLOCK_T),)](
            *compact.head[:2], *drawing.tensors, compact.targets, live.rows, lse, chosen, visited, visited_count,
            task_ends, task_tiles, tiles[0], ends, ids, weights,
            row0, rows, tiles_v, V, most, width, seed, math.log(least),
            drawing.strides, drawing.scale, drawing.cap, DRAWS=draws, **drawing.constants,
        )  # fmt: skip
    return token_logps, found


def _tasks(
    visited_count: Tensor,  # (tiles_v,) int32
    rows: int,
    BLOCK_T: int,
) -> tuple[Tensor, Tensor]:  # (tiles_v,), (most tasks there can be,) int32
    """What a later visit reads of its tasks."""
    ends = visited_count.add(BLOCK_T - 1).div_(BLOCK_T, rounding_mode="floor").cumsum(0, dtype=torch.int32)
    tasks = torch.arange(triton.cdiv(rows, BLOCK_T) * ends.shape[0], dtype=torch.int32, device=ends.device)
    return ends, torch.searchsorted(ends, tasks, right=True, out_int32=True)


def _visit_arguments(arguments: HeadArguments, shape: dict[str, int]) -> HeadArguments:
    """What a later visit takes besides hidden and weight: no descriptors, a tile of its own."""
    first_alone = ("GROUP_T", "TMA", "FLATTEN", "LIBRARY")
    constants = {name: x for name, x in arguments.constants.items() if name not in first_alone}
    return arguments._replace(tensors=arguments.tensors[2:], constants=constants | shape)
