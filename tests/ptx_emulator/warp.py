"""Instructions of a warp: its lanes' registers moved, voted on, reduced.

A lane that the instruction names and that does not take part, or one that is read and does not, is a finding: on a GPU
the result is anybody's guess.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .program import Instruction, Pair, Register
from .types import Array, PtxError

if TYPE_CHECKING:
    from .machine import Machine, Step


def taking_part(m: Machine, members: Array, where: Array, i: Instruction) -> None:
    if where.all():
        return
    present = np.where(where, np.uint32(1) << m.lane, np.uint32(0)).reshape(-1, 32)
    bits = np.bitwise_or.reduce(present, 1)[m.warp]
    named = np.broadcast_to(members, where.shape)
    if (where & ((named & ~bits) != 0)).any():
        m.findings[f"{m.program.name}: lanes that are named do not take part: {i}"] += 1


def shuffle(m: Machine, i: Instruction) -> Step:
    mode = next(name for name in i.modifiers if name in ("up", "down", "bfly", "idx"))
    d, a, b, c, members = i.operands
    first, second = (d.first, d.second) if isinstance(d, Pair) else (d, None)
    out, x, named = m.target(first, "b32"), m.source(a, "b32"), m.source(members, "u32")
    inside_out = None if second is None else m.target(second, "pred")
    lane = m.lane.astype(np.int64)
    base = m.warp * 32

    def source(by: Array, limits: Array) -> tuple[Array, Array]:
        by, clamp, segment = by.astype(np.int64) & 31, limits.astype(np.int64) & 31, (limits.astype(np.int64) >> 8) & 31
        lowest, highest = lane & segment, (lane & segment) | (clamp & ~segment)
        at = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": lowest | (by & ~segment)}[mode]
        inside = at >= highest if mode == "up" else at <= highest
        return base + np.where(inside, at, lane), inside

    by, limits = m.source(b, "u32"), m.source(c, "u32")
    known = source(by, limits) if by.size == limits.size == 1 else None

    def step(where: Array) -> None:
        taking_part(m, named, where, i)
        at, inside = known if known is not None else source(by, limits)
        if not where.all() and (where & ~where[at]).any():
            m.findings[f"{m.program.name}: a lane is read that does not take part: {i}"] += 1
        moved = x[at]
        np.copyto(out, moved, where=where)
        if inside_out is not None:
            np.copyto(inside_out, inside, where=where)

    return step, ()


def vote(m: Machine, i: Instruction) -> Step:
    mode = i.modifiers[1]
    d, p, members = i.operands
    negated = isinstance(p, Register) and p.negated
    x = m.source(p._replace(negated=False) if isinstance(p, Register) else p, "pred")
    named = m.source(members, "u32")
    out = m.target(d, "b32" if mode == "ballot" else "pred")

    def step(where: Array) -> None:
        taking_part(m, named, where, i)
        yes = ~x if negated else x
        says = np.broadcast_to(yes, where.shape)
        if mode == "ballot":
            bits = np.where(where & says, np.uint32(1) << m.lane, np.uint32(0)).reshape(-1, 32)
            result = np.bitwise_or.reduce(bits, 1)
        elif mode == "any":
            result = (where & says).reshape(-1, 32).any(1)
        elif mode == "all":
            result = (~where | says).reshape(-1, 32).all(1)
        else:
            raise PtxError(f"vote.{mode} is not emulated: {i}")
        np.copyto(out, result[m.warp], where=where)

    return step, ()


def reduce(m: Machine, i: Instruction) -> Step:
    operation, kind = i.modifiers[1], i.type
    d, a, members = i.operands
    out, x, named = m.target(d, kind), m.source(a, kind), m.source(members, "u32")
    info = np.iinfo(x.dtype)
    function, neutral = {
        "max": (np.maximum, info.min), "min": (np.minimum, info.max), "add": (np.add, 0),
        "and": (np.bitwise_and, -1 if info.min else info.max), "or": (np.bitwise_or, 0), "xor": (np.bitwise_xor, 0),
    }[operation]  # fmt: skip

    def step(where: Array) -> None:
        taking_part(m, named, where, i)
        mine = np.where(where, x, x.dtype.type(neutral)).reshape(-1, 32)
        np.copyto(out, function.reduce(mine, 1, dtype=x.dtype)[m.warp], where=where)

    return step, ()


def elect(m: Machine, i: Instruction) -> Step:
    """The first lane of each warp."""
    d, members = i.operands
    if not isinstance(d, Pair):
        raise PtxError(f"elect without its predicate: {i}")
    lane, chosen, named = m.target(d.first, "b32"), m.target(d.second, "pred"), m.source(members, "u32")

    def step(where: Array) -> None:
        taking_part(m, named, where, i)
        first = where.reshape(-1, 32).argmax(1)
        np.copyto(lane, first[m.warp], casting="unsafe", where=where)
        np.copyto(chosen, m.lane == first[m.warp], where=where)

    return step, ()


def barrier_of_a_warp(m: Machine, i: Instruction) -> Step:
    (members,) = i.operands
    named = m.source(members, "u32")

    def step(where: Any = True) -> None:
        if where is not True:
            taking_part(m, named, where, i)

    return step, ()


def active_mask(m: Machine, i: Instruction) -> Step:
    raise PtxError(f"which lanes run together is the scheduler's affair: {i}")


HANDLERS = {
    "shfl": shuffle,
    "vote": vote,
    "redux": reduce,
    "elect": elect,
    "bar": barrier_of_a_warp,
    "activemask": active_mask,
}
