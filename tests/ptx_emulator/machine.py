"""Blocks of a program, all their threads in lock step: registers, control flow, barriers.

A `Machine` holds some blocks at once (they share nothing but global memory), because a NumPy call over 1000 threads
costs little more than one over 100. Every register is a row over all threads. An instruction is bound once to `Step`s:
a function and the rows it takes, so that executing it is one call; a mask of threads goes along as `where`, as NumPy's
own functions take it. Threads that branch apart become contexts with a mask each; the context that is furthest back in
the flow of the program runs first (`turns`), and contexts that meet become one. A barrier parks its threads until all
of their block are there.

Registers that may be read before they are written (found by a walk over the control flow) are watched. Contexts that
wait for what never comes are a hang, and raise PtxError. Memory order between threads is not modelled: what one thread
has stored, the next instruction of any thread sees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import networkx as nx  # torch requires it
import numpy as np

from .asynchronous import Asynchronous
from .memory import LOCAL_BASE, SHARED_BASE, Findings, GlobalMemory, SharedMemory
from .program import Block, Immediate, Instruction, Operand, Program, Register, Symbol, Vector
from .types import TYPES, UNSIGNED, Array, PtxError, is_float, is_signed, size_of

MOST_BLOCKS_EXECUTED = 2_000_000

Step = tuple[Callable[..., Any], tuple[Any, ...]]
Handler = Callable[["Machine", Instruction], "Step | list[Step]"]
# What changes more than a register: it is told which threads run even where threads that have ended run along.
Effects = {
    "st", "atom", "red", "cp", "mbarrier", "wgmma", "mma", "ldmatrix", "stmatrix", "fence", "shfl", "vote", "redux",
    "elect",
}  # fmt: skip


class Settings(NamedTuple):
    """What a GPU decides, and a run of the emulator is told."""

    late: bool = True  # copies land when they are waited for, products run when they are issued; else the reverse
    noise: np.random.Generator | None = None  # for the error of approximate instructions


class Bound(NamedTuple):
    """A basic block for a machine. A step's guard is None, or (predicate row or None, negated)."""

    steps: list[tuple[Callable[..., Any], tuple[Any, ...], tuple[Array | None, bool] | None]]
    instructions: list[Instruction]  # of each step
    block: Block


class Machine:
    """`blocks` blocks of a program."""

    def __init__(self, program: Program, blocks: int, dynamic_shared: int, settings: Settings) -> None:
        from .instructions import HANDLERS

        self.program, self.blocks, self.settings = program, blocks, settings
        self.findings: Findings = Counter()
        size = program.threads
        n = self.threads = blocks * size
        self.block_of = np.repeat(np.arange(blocks), size)
        thread = np.tile(np.arange(size, dtype=np.uint32), blocks)
        self.lane = thread % np.uint32(32)
        self.warp = np.arange(n) // 32  # over all blocks
        self.warps = -(-size // 32)
        self._shared_bytes = program.static_shared + dynamic_shared
        self.shared = self._new_shared()
        self.warp_bits = (np.uint64(1) << (thread // np.uint32(32)).astype(np.uint64)).astype(self.shared.bits)
        self.origin = self.block_of * self.shared.stride
        self.everyone = np.ones(n, bool)
        self.special: dict[str, Array] = {
            "%tid.x": thread,
            "%laneid": self.lane,
            "%warpid": thread // np.uint32(32),
            "%ntid.x": np.full(n, size, np.uint32),
            "%ctaid.x": np.zeros(n, np.uint32),
            "%nctaid.x": np.zeros(n, np.uint32),
            **{f"%{name}.{axis}": np.zeros(n, np.uint32) for name in ("tid", "ctaid") for axis in "yz"},
            **{f"%{name}.{axis}": np.ones(n, np.uint32) for name in ("ntid", "nctaid") for axis in "yz"},
        }
        self.parameters: dict[str, Array] = {p.name: np.zeros(1, np.uint64) for p in program.parameters}
        self.parameter_at = {p.name: 256 * i for i, p in enumerate(program.parameters)}  # in their own space
        stride = -(-program.local_size // 16) * 16  # of a thread's local memory
        self.local_memory: Array = np.full(n * stride, 0xFF, np.uint8)
        self.local_at = LOCAL_BASE + np.arange(n, dtype=np.uint64) * np.uint64(stride)
        self.memory = GlobalMemory()
        self.descriptors: dict[int, Any] = {}  # tensor maps by address
        self.asynchronous = Asynchronous(self)
        self.scratch: Array = np.empty(n, np.float64)
        self._allocate()
        self._once: dict[Any, Array] = {}
        self._constants: dict[tuple[int, bool, str], Array] = {}
        self._watched = self._maybe_unwritten()
        self.written = {name: np.zeros(n, bool) for name in self._watched}
        self.bound = [self._bind(block, HANDLERS) for block in program.blocks]
        self.turns = turns(program.blocks)

    def _new_shared(self) -> SharedMemory:
        program = self.program
        return SharedMemory(
            program.name, self.blocks, self._shared_bytes, program.granule, self.warps, program.proxies, self.findings
        )

    def once(self, function: Callable[..., Array], *arguments: int) -> Array:
        """function(*arguments), computed once a machine."""
        key = (function, *arguments)
        if key not in self._once:
            self._once[key] = function(*arguments)
        return self._once[key]

    # ------------------------------------------------------------------------------------------------------- registers

    def _allocate(self) -> None:
        """One row a register, in the order of their numbers: those of a matrix are then neighbours."""
        names: dict[int, dict[str, None]] = {1: {}, 2: {}, 4: {}, 8: {}}
        predicates: dict[str, None] = {}
        for register in self.program.registers():
            if register.type == "pred":
                predicates[register.name] = None
            elif register.name != "_":
                names[size_of(register.type)][register.name] = None
        self.files: dict[int, Array] = {}
        self.index: dict[str, int] = {}
        self._rows: dict[tuple[str, str], Array] = {}
        for size, found in names.items():
            order = sorted(found, key=lambda name: (len(name), name))
            self.files[size] = np.empty((len(order), self.threads), UNSIGNED[size])
            self.index |= {name: i for i, name in enumerate(order)}
        self.predicates = np.zeros((len(predicates), self.threads), bool)
        self.index |= {name: i for i, name in enumerate(predicates)}

    def row(self, register: Register, kind: str) -> Array:
        """The row of a register, as numbers of type `kind`: where that is narrower, the low part of each."""
        key = (register.name, kind)
        if (row := self._rows.get(key)) is None:
            if register.name == "_":
                row = np.empty(self.threads, TYPES[kind])
            elif register.type == "pred":
                row = self.predicates[self.index[register.name]]
            else:
                size, width = size_of(register.type), size_of(kind)
                if kind == "pred" or width > size:
                    raise PtxError(f"{self.program.name}: {register.name} is {register.type}, and read as {kind}")
                row = self.files[size][self.index[register.name]].view(TYPES[kind])[:: size // width]
            self._rows[key] = row
        return row

    def source(self, operand: Operand, kind: str) -> Array:
        """The values of an operand: a row, or one number for all threads."""
        if isinstance(operand, Register):
            row = self.row(operand, kind)
            if operand.negated:
                raise PtxError(f"{self.program.name}: !{operand.name} here is not emulated")
            return row
        if isinstance(operand, Immediate):
            return self._constant(operand, kind)
        if isinstance(operand, Symbol):
            if operand.name in self.special:
                return self.special[operand.name].view(TYPES[kind])
            if operand.name in self.parameter_at:
                return np.array([self.parameter_at[operand.name]], TYPES[kind])
            if operand.name in self.program.local_names:
                return np.array([self.program.local_names[operand.name]], TYPES[kind])
            if operand.name in self.program.shared_names:
                return np.array([SHARED_BASE + self.program.shared_names[operand.name]], TYPES[kind])
            if operand.name == "WARP_SZ":
                return np.array([32], TYPES[kind])
        raise PtxError(f"{self.program.name}: {operand} cannot be read as {kind}")

    def _constant(self, operand: Immediate, kind: str) -> Array:
        key = (*operand, kind)
        if (found := self._constants.get(key)) is None:
            dtype = np.dtype(TYPES[kind])
            if kind == "pred":
                found = np.array([operand.value != 0])
            elif is_float(kind) and not operand.is_bits:
                found = np.array([operand.value], dtype)
            else:
                bits = operand.value & ((1 << 8 * dtype.itemsize) - 1)
                found = np.array([bits], UNSIGNED[dtype.itemsize]).view(dtype)
            self._constants[key] = found
        return found

    def target(self, operand: Operand, kind: str) -> Array:
        """The row that a result of type `kind` goes to: as wide as the register, with the sign of `kind`."""
        if not isinstance(operand, Register):
            raise PtxError(f"{self.program.name}: {operand} cannot be written")
        if operand.type == "pred" or operand.name == "_" or size_of(operand.type) == size_of(kind):
            return self.row(operand, kind)
        if is_float(kind):
            raise PtxError(f"{self.program.name}: {operand.name} is {operand.type}, and written as {kind}")
        return self.row(operand, f"{'s' if is_signed(kind) else 'u'}{8 * size_of(operand.type)}")

    def rows(self, operand: Operand, kind: str) -> Array | None:
        """The rows of a vector of registers as one array that writes through, where they are neighbours."""
        assert isinstance(operand, Vector)
        index = self.indices(operand)
        if (np.diff(index) == 1).all():
            return self.files[size_of(kind)][index[0] : index[-1] + 1].view(TYPES[kind])
        return None

    def indices(self, operand: Vector) -> Array:
        return np.array([self.index[item.name] for item in operand.items if isinstance(item, Register)])

    # -------------------------------------------------------------------------------------------------------- binding

    def _bind(self, block: Block, handlers: Mapping[str, Handler]) -> Bound:
        steps: list[tuple[Callable[..., Any], tuple[Any, ...], tuple[Array | None, bool] | None]] = []
        instructions: list[Instruction] = []

        def emit(function: Callable[..., Any], arguments: tuple[Any, ...], guard: Any) -> None:
            steps.append((function, arguments, guard))
            instructions.append(instruction)

        for instruction in [*block.instructions, *([block.end] if block.end is not None else [])]:
            if self._watched and (read := self._watched.keys() & instruction.decides):
                for name in sorted(read):
                    emit(self._check_written, (self.written[name], name, instruction), self._guard(instruction, True))
            if instruction is block.end:
                break
            handler = handlers.get(instruction.opcode)
            if handler is None:
                raise PtxError(f"{self.program.name}: {instruction.opcode} is not emulated: {instruction}")
            found = handler(self, instruction)
            effect = instruction.opcode in Effects or (
                instruction.opcode == "ld" and "param" not in instruction.modifiers
            )
            guard = self._guard(instruction, effect)
            for function, arguments in [found] if isinstance(found, tuple) else found:
                emit(function, arguments, guard)
            if self._watched:
                for name in sorted(self._watched.keys() & instruction.writes):
                    emit(np.copyto, (self.written[name], True), self._guard(instruction, False))
        return Bound(steps, instructions, block)

    def _guard(self, instruction: Instruction, effect: bool) -> tuple[Array | None, bool] | None:
        if instruction.guard is not None:
            return self.row(instruction.guard, "pred"), instruction.guard.negated
        return (None, False) if effect else None

    def _maybe_unwritten(self) -> dict[str, None]:
        """Registers that some path reads before an unconditional write of them."""
        number: dict[str, int] = {}
        for register in self.program.registers():
            number.setdefault(register.name, len(number))
        count = len(self.program.blocks)
        sure, everything = [0] * count, (1 << len(number)) - 1
        for i, block in enumerate(self.program.blocks):
            for instruction in block.instructions:
                if instruction.guard is None:
                    for name in instruction.writes:
                        sure[i] |= 1 << number[name]
        before = [0] + [everything] * (count - 1)
        changed = True
        while changed:
            changed = False
            for i, block in enumerate(self.program.blocks):
                after = before[i] | sure[i]
                for successor in successors(i, block):
                    if successor < count and before[successor] & after != before[successor]:
                        before[successor] &= after
                        changed = True
        found: dict[str, None] = {}
        for i, block in enumerate(self.program.blocks):
            have = before[i]
            for instruction in [*block.instructions, *([block.end] if block.end else [])]:
                for name in instruction.reads:
                    if not have >> number[name] & 1:
                        found[name] = None
                if instruction.guard is None:
                    for name in instruction.writes:
                        have |= 1 << number[name]
        found.pop("_", None)
        return found

    def _check_written(self, written: Array, name: str, instruction: Instruction, where: Array) -> None:
        if (where & ~written).any():
            self.findings[f"{self.program.name}: {name} is read before it is written: {instruction}"] += 1

    # ------------------------------------------------------------------------------------------------------- execution

    def run(
        self,
        programs: Array,
        grid: int,
        parameters: dict[str, int],
        memory: GlobalMemory,
        descriptors: dict[int, Any],
        findings: Findings,
    ) -> None:
        """Run the blocks `programs` of a grid, as many as the machine has at most."""
        self.memory, self.descriptors, self.findings = memory, descriptors, findings
        if self.local_memory.size:
            self.local_memory.fill(0xFF)
            memory.add(int(LOCAL_BASE), self.local_memory, "local memory")
        for name, value in parameters.items():
            self.parameters[name][:] = value
        for size, file in self.files.items():
            file.fill(np.iinfo(UNSIGNED[size]).max)  # NaN as a float
        self.predicates.fill(False)
        for written in self.written.values():
            written.fill(False)
        self.shared = self._new_shared()
        self.asynchronous.reset()
        ids = np.zeros(self.blocks, np.uint32)
        ids[: len(programs)] = programs
        self.special["%ctaid.x"][:] = ids[self.block_of]
        self.special["%nctaid.x"].fill(grid)
        self.exited = self.block_of >= len(programs)
        self._contexts: dict[int, Array] = {0: ~self.exited}
        self._parked: list[tuple[int, Array]] = []
        self._spinning: dict[int, Array] = {}
        with np.errstate(all="ignore"):
            self._schedule()
        self.asynchronous.at_the_end()

    def _schedule(self) -> None:
        executed = idle = 0
        while self._contexts or self._spinning or self._parked:
            if not self._contexts:
                if not self._spinning or idle > 1:
                    self._hang()
                self._contexts, self._spinning = self._spinning, {}
                idle += 1
            at = min(self._contexts, key=self.turns.__getitem__)
            self.failed: Array | None = None
            self._execute(at, self._contexts.pop(at))
            executed += 1
            if self.failed is None:
                idle = 0
            if executed > MOST_BLOCKS_EXECUTED:
                raise PtxError(f"{self.program.name}: {executed} basic blocks and no end: a hang?")

    def _hang(self) -> None:
        waiting = " ".join(sorted({str(self.bound[at].block.end) for at in self._spinning}))
        parked = sum(int(mask.sum()) for _, mask in self._parked)
        raise PtxError(
            f"{self.program.name}: a hang: {parked} threads at a barrier that others do not reach; waiting for "
            f"{self.asynchronous.barriers}: {waiting}"
        )

    def _execute(self, at: int, mask: Array) -> None:
        bound = self.bound[at]
        alone = bool((mask | self.exited).all())  # threads that have ended may run along: nobody reads what they do
        i = 0
        try:
            for i, (function, arguments, guard) in enumerate(bound.steps):  # noqa: B007
                if guard is None:
                    if alone:
                        function(*arguments)
                    else:
                        function(*arguments, where=mask)
                    continue
                row, negated = guard
                where = mask if row is None else mask & ~row if negated else mask & row
                if row is None or where.any():
                    function(*arguments, where=where)
        except PtxError as error:
            raise PtxError(f"{self.program.name}, {bound.instructions[i].text.split()[0]}: {error}") from None
        self._leave(at, bound.block, mask)

    def _leave(self, at: int, block: Block, mask: Array) -> None:
        end = block.end
        if end is None:
            self._go(at + 1, mask)
        elif end.opcode == "bra":
            taken = mask
            if end.guard is not None:
                row = self.row(end.guard, "pred")
                taken = mask & ~row if end.guard.negated else mask & row
            assert block.target is not None
            if self.failed is not None and self.turns[block.target] <= self.turns[at]:
                again = taken & self.failed
                if again.any():
                    self._spinning[block.target] = self._spinning.get(block.target, False) | again
                self._go(block.target, taken & ~self.failed)
            else:
                self._go(block.target, taken)
            self._go(at + 1, mask & ~taken)
        elif end.opcode in ("ret", "exit"):
            leaving = mask
            if end.guard is not None:
                row = self.row(end.guard, "pred")
                leaving = mask & ~row if end.guard.negated else mask & row
                self._go(at + 1, mask & ~leaving)
            self.exited = self.exited | leaving
            self._release()
        elif end.opcode in ("bar", "barrier"):
            self._arrive(at, end, mask)
        else:
            raise PtxError(f"{self.program.name}: {end}")

    def _go(self, to: int, mask: Array) -> None:
        if mask.any():
            if to >= len(self.bound):
                raise PtxError(f"{self.program.name} runs off its end")
            self._contexts[to] = self._contexts[to] | mask if to in self._contexts else mask

    def _arrive(self, at: int, end: Instruction, mask: Array) -> None:
        if not {"sync"} <= set(end.modifiers) or len(end.operands) != 1 or end.guard is not None:
            raise PtxError(f"{self.program.name}: a barrier of part of the threads is not emulated: {end}")
        if end.operands[0] != Immediate(0, False):
            raise PtxError(f"{self.program.name}: only barrier 0 is emulated: {end}")
        if (mask | self.exited).all():
            for block in np.unique(self.block_of[mask]):
                self.shared.barrier(int(block))
            self._go(at + 1, mask)
            return
        here = np.add.reduceat(mask, np.arange(0, self.threads, 32))
        alive = np.add.reduceat(~self.exited, np.arange(0, self.threads, 32))
        if ((here > 0) & (here < alive)).any():
            self.findings[f"{self.program.name}: a barrier that not all lanes of a warp reach together: {end}"] += 1
        self._parked.append((at + 1, mask))
        self._release()

    def _release(self) -> None:
        """Blocks whose threads are all parked, or have ended, go on."""
        if not self._parked:
            return
        waiting = np.logical_or.reduce([mask for _, mask in self._parked])
        starts = np.arange(0, self.threads, self.program.threads)
        ready = np.logical_and.reduceat(waiting | self.exited, starts) & np.logical_or.reduceat(waiting, starts)
        if not ready.any():
            return
        for block in np.nonzero(ready)[0]:
            self.shared.barrier(int(block))
        going = ready[self.block_of]
        parked, self._parked = self._parked, []
        for to, mask in parked:
            self._go(to, mask & going)
            if (rest := mask & ~going).any():
                self._parked.append((to, rest))


def turns(blocks: list[Block]) -> dict[int, int]:
    """The turn of each block, by number. A block comes after all that lead to it, and what follows a loop after
    all of the loop. The text may have another order: a compiler may put the end of a loop's body above its beginning.
    """
    flow = nx.DiGraph()
    flow.add_nodes_from(range(len(blocks)))
    flow.add_edges_from((at, to) for at, block in enumerate(blocks) for to in successors(at, block) if to < len(blocks))
    return {at: turn for turn, at in enumerate(_in_turn(flow, 0))}


def _in_turn(flow: nx.DiGraph, first: int) -> list[int]:
    """The blocks of a loop that begins with `first`, each loop within it in one piece."""
    once = flow.copy()
    once.remove_edges_from([*flow.in_edges(first)])  # the way back
    loops = nx.condensation(once)
    members = nx.get_node_attributes(loops, "members")
    order: list[int] = []
    for loop in nx.lexicographical_topological_sort(loops, key=lambda loop: min(members[loop])):
        inside = members[loop]
        if len(inside) == 1:
            order += inside
        else:
            entries = [to for at, to in once.in_edges(inside) if at not in inside]
            order += _in_turn(once.subgraph(inside), min(entries, default=min(inside)))
    return order


def successors(at: int, block: Block) -> list[int]:
    if block.end is None or block.end.opcode in ("bar", "barrier"):
        return [at + 1]
    if block.end.opcode == "bra":
        assert block.target is not None
        return [block.target] if block.end.guard is None else [block.target, at + 1]
    return [] if block.end.guard is None else [at + 1]
