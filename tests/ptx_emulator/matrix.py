"""Products of matrices: mma.sync of one warp, wgmma of four.

Operands are bf16 or fp16, sums float32: rounded once a step of 16, where the units of a GPU keep a few bits less. The
layouts of fragments and of matrix descriptors are those of the PTX manual.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .asynchronous import number
from .memory import SHARED_BASE
from .moves import whole_warps
from .program import Immediate, Instruction, Vector
from .types import Array, PtxError, bf16_to_f32

if TYPE_CHECKING:
    from .machine import Machine, Step


def widened(halves: Array, kind: str) -> Array:
    if kind == "bf16":
        return bf16_to_f32(halves)
    return halves.view(np.float16).astype(np.float32)


# Fragments lie in registers as these permutations of a warp's halves (registers, lanes, 2) or floats say.
def order_of_a(warps: int) -> Array:
    """To (warps, 16, 16): register 2 k + r of a lane has row 8 r + lane / 4, columns 8 k + 2 (lane % 4) and on."""
    halves = np.arange(4 * warps * 64).reshape(2, 2, warps, 8, 4, 2)
    return halves.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, 16)


def order_of_b(warps: int) -> Array:
    """To (warps, 16, 8): register k has rows 8 k + 2 (lane % 4) and the next, column lane / 4."""
    halves = np.arange(2 * warps * 64).reshape(2, warps, 8, 4, 2)
    return halves.transpose(1, 0, 3, 4, 2).reshape(warps, 16, 8)


def order_of_sums(groups: int, rows: int, n: int) -> Array:
    """From (groups, rows, n) to (n rows / 128 registers, threads), for 16 rows a warp: register 4 j + 2 r + e of a lane
    has row 16 warp + 8 r + lane / 4, column 8 j + 2 (lane % 4) + e.
    """
    sums = np.arange(groups * rows * n).reshape(groups, rows // 16, 2, 8, n // 8, 4, 2)
    return sums.transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, -1)


def stacked(registers: list[Array]) -> Array:
    return np.stack(registers).view(np.uint16).reshape(-1)


def mma(m: Machine, i: Instruction) -> Step:
    kinds = i.modifiers[-4:]
    if "m16n8k16" not in i.modifiers or kinds[1] != kinds[2] or kinds[1] not in ("bf16", "f16") or kinds[0] != "f32":
        raise PtxError(f"this mma is not emulated: {i}")
    d, *sources = i.operands
    assert isinstance(d, Vector)
    outs = [m.target(item, "f32") for item in d.items]
    a, b = ([m.source(item, "b32") for item in x.items] for x in sources[:2] if isinstance(x, Vector))
    assert isinstance(sources[2], Vector)
    starts = [m.source(item, "f32") for item in sources[2].items]
    warps = m.threads // 32
    of_a, of_b, of_sums = m.once(order_of_a, warps), m.once(order_of_b, warps), m.once(order_of_sums, warps, 16, 8)

    def step(where: Array) -> None:
        whole_warps(m, where, i)
        product = widened(stacked(a)[of_a], kinds[1]) @ widened(stacked(b)[of_b], kinds[1])
        for out, start, part in zip(outs, starts, product.reshape(-1)[of_sums]):
            np.add(start, part, out, where=where)

    return step, ()


# ---------------------------------------------------------------------------------------------------------------- wgmma


def chunks(descriptors: Array, rows: int, mn_major: bool, i: Instruction) -> Array:
    """Addresses of the chunks of eight 16-bit elements that make the matrix (rows, 16) which descriptors name: (groups,
    rows, 2), or (groups, rows / 8, 16) where rows, not columns, lie side by side.
    """
    fields = [((descriptors >> np.uint64(s)) & np.uint64(0x3FFF)).astype(np.int64) << 4 for s in (0, 16, 32)]
    start, leading, stride = (x[:, None, None] for x in fields)
    swizzles = np.unique(descriptors >> np.uint64(62))
    if swizzles.size != 1 or ((descriptors >> np.uint64(49)) & np.uint64(7)).any():
        raise PtxError(f"descriptors of this form are not emulated: {i}")
    swizzle = int(swizzles[0])
    span = {0: 16, 1: 128, 2: 64, 3: 32}[swizzle]
    if mn_major:
        if swizzle == 0:
            raise PtxError(f"a transposed matrix without a swizzle is not emulated: {i}")
        row, k = np.arange(0, rows, 8)[:, None], np.arange(16)[None, :]
        across = span // 2  # rows side by side
        at = start + (row // across) * leading + (k // 8) * stride + (k % 8) * span + (row % across) * 2
    else:
        row, k = np.arange(rows)[:, None], np.array([[0, 8]])
        at = start + (row // 8) * stride + (row % 8) * span + (k * 2 if swizzle else k // 8 * leading)
    return at ^ (((at >> 7) & {0: 0, 1: 7, 2: 3, 3: 1}[swizzle]) << 4)


def gathered(m: Machine, at: Array, rows: int, mn_major: bool, kind: str) -> Array:
    """The matrices (groups, rows, 16) of chunks at these offsets."""
    halves = m.shared.view(8)[(at // 8)[..., None] + np.arange(2)].view(np.uint16)
    if mn_major:
        halves = halves.transpose(0, 1, 3, 2)
    return widened(halves.reshape(-1, rows, 16), kind)


def wgmma(m: Machine, i: Instruction) -> Step:
    operation, products = i.modifiers[0], m.asynchronous.products
    if operation == "commit_group":
        return products.commit, ()
    if operation == "wait_group":
        most = number(i.operands[0], i)

        def wait(where: Array) -> None:
            products.wait(where, most)

        return wait, ()
    if operation == "fence":
        return (lambda where: None), ()
    shape = re.fullmatch(r"m64n(\d+)k16", i.modifiers[3]) if len(i.modifiers) > 3 else None
    kind = i.type
    if operation != "mma_async" or shape is None or kind not in ("bf16", "f16") or i.modifiers[-3] != "f32":
        raise PtxError(f"this wgmma is not emulated: {i}")
    n = int(shape.group(1))
    d, a, b, scale, *flags = i.operands
    assert isinstance(d, Vector)
    numbers = [number(flag, i) for flag in flags]
    if numbers[:2] != [1, 1]:
        raise PtxError(f"a negated operand of wgmma is not emulated: {i}")
    from_registers = isinstance(a, Vector)
    transposed_a = not from_registers and numbers[2] == 1
    transposed_b = numbers[-1] == 1
    descriptor_b = m.source(b, "u64")
    registers_a = [m.source(item, "b32") for item in a.items] if isinstance(a, Vector) else []
    descriptor_a = None if isinstance(a, Vector) else m.source(a, "u64")
    adds = m.source(scale, "pred") if not isinstance(scale, Immediate) else np.array([scale.value != 0])
    neighbours = m.rows(d, "f32")
    rows_of_d = m.indices(d)
    file = m.files[4].view(np.float32)
    group_of = np.arange(m.threads) // 128
    sums_of = m.once(order_of_sums, m.threads // 128, 64, n)
    of_a = m.once(order_of_a, m.threads // 32)

    def places_of(descriptors: Array, rows: int, mn_major: bool, groups: Array) -> Array:
        at = chunks(np.broadcast_to(descriptors, (m.threads,))[groups * 128], rows, mn_major, i) - SHARED_BASE
        if at.min() < 0 or at.max() + 16 > m.shared.size:
            raise PtxError(f"out of bounds: a product outside of shared memory: {i}")
        return at + m.origin[groups * 128][:, None, None]

    def multiply(where: Array, groups: Array, places: list[Array], kept: Array) -> None:
        matrix_b = gathered(m, places[0], n, transposed_b, kind)
        if descriptor_a is not None:
            matrix_a = gathered(m, places[1], 64, transposed_a, kind)
        else:
            matrix_a = widened(stacked(registers_a)[of_a], kind).reshape(-1, 64, 16)[groups]
        product = matrix_a @ matrix_b.transpose(0, 2, 1)
        order = sums_of if groups.size * 128 == m.threads else order_of_sums(groups.size, 64, n)
        parts = product.reshape(-1)[order]
        keep = kept[where]
        if where.all() and neighbours is not None:
            if keep.all():
                np.add(neighbours, parts, neighbours)
            else:
                np.copyto(neighbours, np.where(keep, neighbours + parts, parts))
            return
        threads = np.nonzero(where)[0]
        before = file[rows_of_d[:, None], threads]
        file[rows_of_d[:, None], threads] = np.where(keep, before + parts, parts)

    def step(where: Array) -> None:
        active = where.reshape(-1, 128)
        if (active.any(1) != active.all(1)).any():
            raise PtxError(f"part of a warp group runs what all of it must: {i}")
        groups = np.nonzero(active.all(1))[0]
        places = [places_of(descriptor_b, n, transposed_b, groups)]
        if descriptor_a is not None:
            places.append(places_of(descriptor_a, 64, transposed_a, groups))
        kept = np.broadcast_to(adds, (m.threads,)).copy()
        bits = [np.bitwise_or.reduce(m.warp_bits[group * 128 : group * 128 + 128]) for group in groups]
        for place in places:
            for at, mine in zip(place, bits):
                m.shared.product_begins(at.reshape(-1), mine, i)

        def finish(which: Array) -> None:
            ended = np.isin(groups, np.unique(group_of[which]))
            if not m.settings.late:
                multiply(which, groups[ended], [place[ended] for place in places], kept)
            for place in places:
                for k in np.nonzero(ended)[0]:
                    m.shared.product_ends(place[k].reshape(-1), bits[k])

        if m.settings.late:
            multiply(where, groups, places, kept)
        products.add(where, finish)

    return step, ()


HANDLERS = {"mma": mma, "wgmma": wgmma}
