"""What runs beside the threads: copies to shared memory, products of warp groups, and the barriers that count bytes.

Copies (cp.async, and TMA through tensor maps) and products (wgmma) begin where a thread says so and end where one waits
for them. When they happen between is the GPU's affair, so the emulator takes one of two extremes. `Settings.late`: a
copy lands only when it is waited for, a product reads its operands when it is issued. Otherwise the reverse: a copy
lands when it is issued, a product reads when it is waited for. A stage that is used again too soon, or a wait that is
missing, changes the result in one of the two; memory.py also sees it directly, in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import nothing
from .memory import SHARED_BASE
from .moves import address, at
from .program import Address, Immediate, Instruction
from .types import Array, PtxError

if TYPE_CHECKING:
    from .machine import Machine, Step


@dataclass
class Barrier:
    """An mbarrier: the phase ends when all have arrived and all bytes are there."""

    count: int
    pending: int
    bytes: int = 0  # expected, less those that came
    phase: int = 0

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


@dataclass
class TensorMap:
    """A tensor of two dimensions in global memory, and the box that one copy takes of it."""

    elements: Array  # (rows, columns) of unsigned integers
    box: tuple[int, int]
    swizzle: int  # 0 none, 1 to 3: 32, 64, 128 bytes

    def __post_init__(self) -> None:
        size = self.elements.dtype.itemsize
        start, (stride, one) = self.elements.__array_interface__["data"][0], self.elements.strides
        problems = {
            "its address must be a multiple of 16": start % 16,
            "its rows must be a multiple of 16 bytes apart": stride % 16,
            "its columns must lie side by side": one != size and self.elements.shape[1] > 1,
            "its box must be at most 256 by 256": max(self.box) > 256,
            "a row of its box must be a multiple of 16 bytes": self.box[1] * size % 16,
            "a row of its box must be as wide as its swizzle": self.swizzle and self.box[1] * size > self.span,
        }
        for problem, is_so in problems.items():
            if is_so:
                raise PtxError(f"a tensor map that the driver refuses: {problem}")

    @property
    def span(self) -> int:
        return (16, 32, 64, 128)[self.swizzle]

    def tile(self, row: int, column: int) -> Array:
        """The bytes of a box, in the order in which they lie in shared memory; zeros outside of the tensor."""
        rows, columns = self.box
        out = np.zeros(self.box, self.elements.dtype)
        r = slice(max(row, 0), max(min(row + rows, self.elements.shape[0]), max(row, 0)))
        c = slice(max(column, 0), max(min(column + columns, self.elements.shape[1]), max(column, 0)))
        out[r.start - row : r.stop - row, c.start - column : c.stop - column] = self.elements[r, c]
        return out.reshape(-1).view(np.uint8)


@dataclass
class Job:
    """What some threads began: `finish` is told for which of them."""

    left: Array  # threads that have not waited for it
    group: Array  # number of each thread's group
    finish: Callable[[Array], None]


class Groups:
    """Jobs in groups that each thread commits and waits for."""

    def __init__(self, threads: int) -> None:
        self._open = np.zeros(threads, np.int64)  # number of the group that is not committed yet
        self.jobs: list[Job] = []

    def reset(self) -> None:
        self._open.fill(0)
        self.jobs = []

    def add(self, where: Array, finish: Callable[[Array], None]) -> None:
        self.jobs.append(Job(where.copy(), self._open.copy(), finish))

    def commit(self, where: Array) -> None:
        self._open[where] += 1

    def wait(self, where: Array, most: int, uncommitted: bool = False) -> None:
        """Until at most `most` of the last groups are under way."""
        left = []
        for job in self.jobs:
            ready = job.left & where & (job.group < self._open - most + uncommitted)
            if ready.any():
                job.finish(ready)
                job.left = job.left & ~ready
            if job.left.any():
                left.append(job)
        self.jobs = left


@dataclass
class TensorCopy:
    block: int
    barrier: int
    at: int  # offset in shared memory
    data: Array
    swizzle: int
    landed: bool = False


class Asynchronous:
    """All that is under way in a machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.copies, self.products = Groups(machine.threads), Groups(machine.threads)
        self.reset()

    def reset(self) -> None:
        self.barriers: dict[tuple[int, int], Barrier] = {}
        self.tensor_copies: list[TensorCopy] = []
        self.copies.reset()
        self.products.reset()

    def at_the_end(self) -> None:
        m = self.machine
        for what, jobs in (
            ("copy", self.copies.jobs),
            ("tensor copy", self.tensor_copies),
            ("product", self.products.jobs),
        ):
            if jobs:
                m.findings[f"{m.program.name}: a {what} is under way where the program ends"] += 1

    # --------------------------------------------------------------------------------------------------------- mbarrier

    def barrier(self, thread: int, at_: int, i: Instruction) -> Barrier:
        key = (int(self.machine.block_of[thread]), at_)
        if key not in self.barriers:
            raise PtxError(f"no barrier has been initialised at {at_ - SHARED_BASE}: {i}")
        return self.barriers[key]

    def arrive(self, thread: int, at_: int, expected: int, i: Instruction) -> None:
        barrier = self.barrier(thread, at_, i)
        barrier.bytes += expected
        barrier.pending -= 1
        if barrier.pending < 0:
            raise PtxError(f"more arrivals than the barrier counts: {i}")
        barrier.settle()

    def wait(self, thread: int, at_: int, parity: int, i: Instruction) -> bool:
        """Whether the phase of this parity has ended. Copies land as late as they can: when one waits for them."""
        barrier = self.barrier(thread, at_, i)
        if barrier.phase % 2 == parity:
            for copy in self.tensor_copies:
                if not copy.landed and (copy.block, copy.barrier) == (self.machine.block_of[thread], at_):
                    self.land(copy)
        if barrier.phase % 2 == parity:
            return False
        key = (self.machine.block_of[thread], at_)
        for copy in self.tensor_copies:
            if copy.landed and (copy.block, copy.barrier) == key:
                self.machine.shared.tensor_copy_ends(copy.at, copy.data.size)
        self.tensor_copies = [c for c in self.tensor_copies if not c.landed or (c.block, c.barrier) != key]
        return True

    # ------------------------------------------------------------------------------------------------- tensor copies

    def begin_copy(
        self, thread: int, to: int, barrier: int, tensor_map: TensorMap, row: int, column: int, i: Instruction
    ) -> None:
        m, block = self.machine, int(self.machine.block_of[thread])
        self.barrier(thread, barrier, i)
        if to % 128:
            raise PtxError(f"a tensor copy to an address that is no multiple of 128: {i}")
        data = tensor_map.tile(row, column)
        begin = int(m.shared.offsets(np.array([to], np.uint32), m.origin[[thread]], 1, i)[0])
        m.shared.offsets(np.array([to + data.size - 1], np.uint32), m.origin[[thread]], 1, i)
        m.shared.tensor_copy_begins(begin, data.size, m.warp_bits[thread], i)
        copy = TensorCopy(block, barrier, begin, data, tensor_map.span if tensor_map.swizzle else 0)
        self.tensor_copies.append(copy)
        if not m.settings.late:
            self.land(copy)

    def land(self, copy: TensorCopy) -> None:
        m = self.machine
        where = copy.at + np.arange(copy.data.size)
        if copy.swizzle:
            # The pattern follows addresses, and blocks begin at multiples of 1024 here and there.
            where = where ^ (((where >> 7) & (copy.swizzle // 16 - 1)) << 4)
        m.shared.data[where] = copy.data
        copy.landed = True
        barrier = self.barriers[copy.block, copy.barrier]
        barrier.bytes -= copy.data.size
        barrier.settle()


# --------------------------------------------------------------------------------------------------------- instructions


def each(where: Array) -> list[int]:
    return [int(thread) for thread in np.nonzero(where)[0]]


BARRIER_WORDS = {
    "init", "inval", "arrive", "expect_tx", "try_wait", "test_wait", "parity", "shared", "shared::cta", "b64",
    "release", "acquire", "cta",
}  # fmt: skip


def mbarrier(m: Machine, i: Instruction) -> Step:
    operation, engine = i.modifiers[0], m.asynchronous
    if unknown := set(i.modifiers) - BARRIER_WORDS:
        raise PtxError(f"mbarrier.{'.'.join(sorted(unknown))} is not emulated: {i}")
    if operation in ("init", "inval"):
        base, offset = address(m, i.operands[0], "u32")
        count = np.broadcast_to(m.source(i.operands[1], "u32"), (m.threads,)) if operation == "init" else None

        def change(where: Array) -> None:
            places = at(base, offset, where)
            offsets = m.shared.offsets(places, m.origin[where], 8, i)
            m.shared.store(offsets, 8, np.zeros((offsets.size, 1), np.uint64), m.warp_bits[where], i)
            for thread, place in zip(each(where), places):
                key = (int(m.block_of[thread]), int(place))
                if count is not None:
                    engine.barriers[key] = Barrier(int(count[thread]), int(count[thread]))
                elif engine.barriers.pop(key, None) is None:
                    raise PtxError(f"no barrier has been initialised here: {i}")

        return change, ()
    base, offset = address(m, i.operands[1], "u32")
    value = (
        np.broadcast_to(m.source(i.operands[2], "u32"), (m.threads,))
        if len(i.operands) > 2
        else np.zeros(m.threads, int)
    )

    def visit(where: Array) -> Array:
        places = at(base, offset, where)
        m.shared.load(m.shared.offsets(places, m.origin[where], 8, i), 8, 1, m.warp_bits[where], i)
        return places

    if operation == "arrive":

        def arrive(where: Array) -> None:
            for thread, place in zip(each(where), visit(where)):
                engine.arrive(thread, int(place), int(value[thread]), i)

        return arrive, ()
    if operation not in ("try_wait", "test_wait") or "parity" not in i.modifiers:
        raise PtxError(f"this form of mbarrier is not emulated: {i}")
    out = m.target(i.operands[0], "pred")

    def wait(where: Array) -> None:
        places = visit(where)
        keys = np.stack((m.block_of[where], places, value[where]))
        distinct, inverse = np.unique(keys, axis=1, return_inverse=True)
        threads = np.nonzero(where)[0]
        first = [int(threads[np.argmax(inverse == k)]) for k in range(distinct.shape[1])]
        ended = np.array([engine.wait(thread, int(k[1]), int(k[2]), i) for thread, k in zip(first, distinct.T)])
        out[where] = ended[inverse]
        if not ended.all():
            failed = np.zeros(m.threads, bool)
            failed[threads[~ended[inverse]]] = True
            m.failed = failed if m.failed is None else m.failed | failed

    return wait, ()


def copy(m: Machine, i: Instruction) -> Step:
    if i.modifiers[:3] == ("async", "bulk", "tensor"):
        return tensor_copy(m, i)
    copies = m.asynchronous.copies
    if i.modifiers[0] != "async" or "bulk" in i.modifiers or "mbarrier" in i.modifiers:
        raise PtxError(f"this form of cp is not emulated: {i}")
    if i.modifiers[1] == "commit_group":
        return copies.commit, ()
    if i.modifiers[1] in ("wait_group", "wait_all"):
        everything = i.modifiers[1] == "wait_all"
        most = 0 if everything else number(i.operands[0], i)

        def wait(where: Array) -> None:
            copies.wait(where, most, everything)

        return wait, ()
    if unknown := set(i.modifiers) - {"async", "ca", "cg", "shared", "shared::cta", "global", "L2::128B", "L2::256B"}:
        raise PtxError(f"cp.{'.'.join(sorted(unknown))} is not emulated: {i}")
    (to, to_offset), (of, of_offset) = address(m, i.operands[0], "u32"), address(m, i.operands[1], "u64")
    size = number(i.operands[2], i)
    counts = np.broadcast_to(m.source(i.operands[3], "u32") if len(i.operands) > 3 else np.array([size]), (m.threads,))

    def step(where: Array) -> None:
        offsets = np.zeros(m.threads, np.int64)
        offsets[where] = m.shared.offsets(at(to, to_offset, where), m.origin[where], size, i)
        sources = np.zeros(m.threads, np.uint64)
        sources[where] = at(of, of_offset, where)
        taken = counts.copy()
        if (taken[where] % 4).any() or (taken[where] > size).any():
            raise PtxError(f"a copy of part of a word is not emulated: {i}")
        m.shared.copy_begins(offsets[where], size, m.warp_bits[where], i)

        def land(which: Array) -> None:
            counts = taken[which]
            words = np.zeros((counts.size, size // 4), np.uint32)
            for count in np.unique(counts[counts > 0]):
                rows = np.nonzero(counts == count)[0]
                align = size if count == size else 4
                for here, view, index in m.memory.parts(sources[which][rows], 4, int(count) // 4, i, align):
                    words[rows if here is None else rows[here], : count // 4] = view[
                        index[:, None] + np.arange(count // 4)
                    ]
            m.shared.view(4)[(offsets[which] // 4)[:, None] + np.arange(size // 4)] = words

        def finish(which: Array) -> None:
            if m.settings.late:
                land(which)
            m.shared.copy_ends(offsets[which], size, m.warp_bits[which])

        if not m.settings.late:
            land(where)
        copies.add(where, finish)

    return step, ()


# Triton 3.6 writes shared::cluster: without clusters that is the block's own shared memory.
TENSOR_WORDS = {
    "async", "bulk", "tensor", "2d", "shared::cta", "shared::cluster", "global", "mbarrier::complete_tx::bytes",
}  # fmt: skip


def tensor_copy(m: Machine, i: Instruction) -> Step:
    if unknown := set(i.modifiers) - TENSOR_WORDS:
        raise PtxError(f"cp.{'.'.join(sorted(unknown))} is not emulated: {i}")
    to, source, barrier = i.operands[:3]
    if "2d" not in i.modifiers or not isinstance(source, Address):
        raise PtxError(f"this form of cp is not emulated: {i}")
    (to_base, to_offset), (bar, bar_offset) = address(m, to, "u32"), address(m, barrier, "u32")
    which, (column, row) = m.source(source.base, "u64"), (m.source(x, "s32") for x in source.coordinates)

    def of(values: Array, thread: int) -> int:
        return int(values[thread] if values.size > 1 else values[0])

    def step(where: Array) -> None:
        threads = each(where)
        if len({int(m.block_of[thread]) for thread in threads}) < len(threads):
            raise PtxError(f"several threads of a block begin one tensor copy: {i}")
        for thread in threads:
            key = of(which, thread)
            if key not in m.descriptors:
                raise PtxError(f"no tensor map at {key:#x}: {i}")
            m.asynchronous.begin_copy(
                thread, of(to_base, thread) + to_offset, of(bar, thread) + bar_offset, m.descriptors[key],
                of(row, thread), of(column, thread), i,
            )  # fmt: skip

    return step, ()


def number(operand: Any, i: Instruction) -> int:
    if not isinstance(operand, Immediate):
        raise PtxError(f"a count that is no number is not emulated: {i}")
    return operand.value


def fence(m: Machine, i: Instruction) -> Step:
    if "proxy" not in i.modifiers:
        return nothing, ()
    if "async" not in i.modifiers:
        raise PtxError(f"this proxy is not emulated: {i}")

    def step(where: Array) -> None:
        warps = np.where(where, m.warp_bits, m.shared.bits(0)).reshape(m.blocks, -1)
        for block, bits in enumerate(np.bitwise_or.reduce(warps, 1)):
            m.shared.fence(block, int(bits))

    return step, ()


HANDLERS = {"mbarrier": mbarrier, "cp": copy, "fence": fence}
