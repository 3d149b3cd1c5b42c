"""Loads and stores: parameters, global and shared memory, atomics; ldmatrix and stmatrix.

Every access is checked and watched by memory.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .program import Address, Instruction, Register, Symbol, Vector
from .types import TYPES, Array, PtxError, size_of

if TYPE_CHECKING:
    from .machine import Machine, Step

# Hints, and orders of memory that the emulator keeps anyway.
HARMLESS = {
    "global", "shared", "shared::cta", "param", "nc", "ca", "cg", "cs", "cv", "wb", "wt", "lu", "volatile", "relaxed",
    "acquire", "release", "acq_rel", "weak", "cta", "gpu", "sys", "sync", "aligned", "L1::evict_last",
    "L1::evict_first", "L1::no_allocate", "L1::evict_normal", "L2::128B", "L2::256B", "L2::64B",
}  # fmt: skip


def check(i: Instruction, *more: str) -> None:
    if unknown := set(i.modifiers) - HARMLESS - TYPES.keys() - set(more):
        raise PtxError(f"{i.opcode}.{'.'.join(sorted(unknown))} is not emulated: {i}")


def space_of(i: Instruction) -> str:
    for name in i.modifiers:
        if name in ("global", "shared", "param", "local"):
            return name
        if name == "shared::cta":
            return "shared"
    return "global"  # a generic address is of global or of local memory: those of shared memory are not made


def address(m: Machine, operand: Any, kind: str) -> tuple[Array, int]:
    if not isinstance(operand, Address):
        raise PtxError(f"{m.program.name}: {operand} is no address")
    return m.source(operand.base, kind), operand.offset


def at(base: Array, offset: int, where: Array) -> Array:
    """The addresses of the threads that run."""
    found = base[where] if base.size == where.size else np.repeat(base, int(where.sum()))
    return found + np.asarray(offset).astype(base.dtype) if offset else found


def load(m: Machine, i: Instruction) -> Step:
    check(i, "v2", "v4")
    kind, space = i.type, space_of(i)
    d, a = i.operands[:2]
    if space == "param":
        assert isinstance(a, Address)
        if not isinstance(a.base, Symbol) or a.offset:
            raise PtxError(f"a part of a parameter is not emulated: {i}")
        value = m.parameters[a.base.name].view(TYPES[kind])[:1]
        return np.copyto, (m.target(d, kind), value)
    items = d.items if isinstance(d, Vector) else (d,)
    outs = [m.target(item, kind) for item in items]
    size = size_of(kind)
    if space == "global":
        base, offset = address(m, a, "u64")

        def from_global(where: Array) -> None:
            for here, view, index in m.memory.parts(at(base, offset, where), size, len(outs), i):
                which = where if here is None else np.nonzero(where)[0][here]
                for k, out in enumerate(outs):
                    out[which] = view[index + k].view(TYPES[kind])

        return from_global, ()
    if space != "shared":
        raise PtxError(f"{space} memory is not emulated: {i}")
    base, offset = address(m, a, "u32")
    width = size * len(outs)

    def from_shared(where: Array) -> None:
        offsets = m.shared.offsets(at(base, offset, where), m.origin[where], width, i)
        found = m.shared.load(offsets, size, len(outs), m.warp_bits[where], i).view(TYPES[kind])
        for k, out in enumerate(outs):
            out[where] = found[:, k]

    return from_shared, ()


def store(m: Machine, i: Instruction) -> Step:
    check(i, "v2", "v4")
    kind, space = i.type, space_of(i)
    a, d = i.operands[:2]
    plain = f"b{8 * size_of(kind)}"
    values = [m.source(item, plain) for item in (d.items if isinstance(d, Vector) else (d,))]
    size = size_of(kind)

    def taken(value: Array, where: Array) -> Array:
        return value[where] if value.size == where.size else np.repeat(value, int(where.sum()))

    if space == "global":
        base, offset = address(m, a, "u64")

        def to_global(where: Array) -> None:
            for here, view, index in m.memory.parts(at(base, offset, where), size, len(values), i):
                for k, value in enumerate(values):
                    mine = taken(value, where)
                    view[index + k] = mine if here is None else mine[here]

        return to_global, ()
    if space != "shared":
        raise PtxError(f"{space} memory is not emulated: {i}")
    base, offset = address(m, a, "u32")
    width = size * len(values)

    def to_shared(where: Array) -> None:
        offsets = m.shared.offsets(at(base, offset, where), m.origin[where], width, i)
        given = np.stack([taken(value, where) for value in values], 1)
        m.shared.store(offsets, size, given, m.warp_bits[where], i)

    return to_shared, ()


def atomic(m: Machine, i: Instruction) -> Step:
    """One thread after the other."""
    operations = {"add": np.add, "max": np.maximum, "min": np.minimum, "or": np.bitwise_or, "and": np.bitwise_and}
    name = next((name for name in i.modifiers if name in (*operations, "exch", "cas")), "")
    check(i, name)
    if space_of(i) != "global":
        raise PtxError(f"atomics on shared memory are not emulated: {i}")
    kind = i.type
    out = m.target(i.operands[0], kind) if i.opcode == "atom" else None
    a, *given = i.operands[1:] if out is not None else i.operands
    base, offset = address(m, a, "u64")
    values = [np.broadcast_to(m.source(x, kind), (m.threads,)) for x in given]
    if kind[0] == "f":
        raise PtxError(f"floating-point atomics are not emulated: {i}")

    def step(where: Array) -> None:
        threads = np.nonzero(where)[0]
        for here, view, index in m.memory.parts(at(base, offset, where), size_of(kind), 1, i):
            memory = view.view(TYPES[kind])
            for thread, place in zip(threads if here is None else threads[here], index):
                old = memory[place].copy()
                value = values[0][thread]
                if name == "exch":
                    memory[place] = value
                elif name == "cas":
                    memory[place] = values[1][thread] if old == value else old
                else:
                    memory[place] = operations[name](np.array([old]), np.array([value]))[0]
                if out is not None:
                    out[thread] = old

    return step, ()


# ------------------------------------------------------------------------------------------- 8 x 8 matrices of a warp


def matrix_rows(m: Machine, base: Array, offset: int, k: int, warps: Array, i: Instruction) -> Array:
    """Offsets (warps, 8) of the rows of matrix `k`: lanes 8 k to 8 k + 7 have their addresses."""
    lanes = (warps[:, None] * 32 + np.arange(8 * k, 8 * k + 8)).ravel()
    found = np.broadcast_to(base, (m.threads,))[lanes] + np.asarray(offset).astype(np.uint32)
    return m.shared.offsets(found, m.origin[lanes], 16, i).reshape(-1, 8)


def whole_warps(m: Machine, where: Array, i: Instruction) -> Array:
    active = where.reshape(-1, 32)
    if (active.any(1) != active.all(1)).any():
        raise PtxError(f"part of a warp runs what all its lanes must: {i}")
    return np.nonzero(active.all(1))[0]


def matrix_shape(i: Instruction) -> tuple[int, bool]:
    if "m8n8" not in i.modifiers or i.type != "b16":
        raise PtxError(f"this shape of {i.opcode} is not emulated: {i}")
    count = next(int(name[1:]) for name in i.modifiers if name in ("x1", "x2", "x4"))
    check(i, "m8n8", "x1", "x2", "x4", "trans")
    return count, "trans" in i.modifiers


def load_matrix(m: Machine, i: Instruction) -> Step:
    count, transposed = matrix_shape(i)
    d, a = i.operands
    assert isinstance(d, Vector)
    outs = [m.target(item, "b32") for item in d.items]
    base, offset = address(m, a, "u32")

    def step(where: Array) -> None:
        warps = whole_warps(m, where, i)
        bits = np.repeat(m.warp_bits[warps * 32], 8)
        found = []
        for k in range(count):  # all are read before one is written: the addresses may be in their registers
            rows = matrix_rows(m, base, offset, k, warps, i)
            words = m.shared.load(rows.ravel(), 4, 4, bits, i).reshape(-1, 8, 4)
            if transposed:
                halves = words.view(np.uint16).reshape(-1, 8, 8).transpose(0, 2, 1)
                words = np.ascontiguousarray(halves).view(np.uint32)
            found.append(words.reshape(-1))
        for out, words in zip(outs, found):
            out[where] = words

    return step, ()


def store_matrix(m: Machine, i: Instruction) -> Step:
    count, transposed = matrix_shape(i)
    a, d = i.operands
    assert isinstance(d, Vector)
    values = [m.source(item, "b32") for item in d.items if isinstance(item, Register)]
    base, offset = address(m, a, "u32")

    def step(where: Array) -> None:
        warps = whole_warps(m, where, i)
        bits = np.repeat(m.warp_bits[warps * 32], 8)
        for k in range(count):
            rows = matrix_rows(m, base, offset, k, warps, i)
            words = values[k][where].reshape(-1, 8, 4)
            if transposed:
                halves = words.view(np.uint16).reshape(-1, 8, 8).transpose(0, 2, 1)
                words = np.ascontiguousarray(halves).view(np.uint32).reshape(-1, 8, 4)
            m.shared.store(rows.ravel(), 4, words.reshape(-1, 4), bits, i)

    return step, ()


HANDLERS = {
    "ld": load,
    "st": store,
    "atom": atomic,
    "red": atomic,
    "ldmatrix": load_matrix,
    "stmatrix": store_matrix,
}
