"""PTX text as instructions: what the assembler reads, without its checks.

One entry function of a module becomes a `Program`: its parameters, its threads, its shared variables, and basic blocks
of `Instruction`s with operands taken apart. Local scopes of inline assembly get names of their own. Never runs
anything; what it does not know raises PtxError, with the text. Clusters are refused by name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from .types import PtxError, size_of


class Register(NamedTuple):
    """A virtual register; `negated` where a predicate is read as !p."""

    name: str
    type: str  # as declared: pred, b16, b32, b64, f32, ...
    negated: bool = False


class Immediate(NamedTuple):
    """A number: an integer, or the bits of a float."""

    value: int
    is_bits: bool


class Symbol(NamedTuple):
    """A parameter, a shared variable, a label or a special register such as %tid.x."""

    name: str


class Vector(NamedTuple):
    """{a, b, ...}"""

    items: tuple[Operand, ...]


class Address(NamedTuple):
    """[base + offset], or [base, {coordinates}] of a tensor."""

    base: Operand
    offset: int
    coordinates: tuple[Operand, ...]


class Pair(NamedTuple):
    """d|p: a result and a predicate beside it."""

    first: Operand
    second: Operand


Operand = Register | Immediate | Symbol | Vector | Address | Pair


# Their first operand is no result.
NO_RESULT = frozenset(
    ("st", "red", "bra", "ret", "exit", "bar", "barrier", "fence", "membar", "cp", "stmatrix", "prefetch", "trap")
)


def registers_of(operand: Operand) -> Iterator[Register]:
    if isinstance(operand, Register):
        yield operand
    elif isinstance(operand, Vector):
        for item in operand.items:
            yield from registers_of(item)
    elif isinstance(operand, Pair):
        yield from registers_of(operand.first)
        yield from registers_of(operand.second)
    elif isinstance(operand, Address):
        yield from registers_of(operand.base)
        for item in operand.coordinates:
            yield from registers_of(item)


class Parameter(NamedTuple):
    name: str
    type: str
    bytes_of_array: int  # 0 for a number


@dataclass
class Instruction:
    opcode: str  # up to the first dot
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    text: str

    @property
    def type(self) -> str:
        return self.modifiers[-1]

    @functools.cached_property
    def _results(self) -> list[Register]:
        waits = self.opcode != "mbarrier" or self.modifiers[0] in ("try_wait", "test_wait")
        if self.opcode in NO_RESULT or not waits or not self.operands or isinstance(self.operands[0], Address):
            return []
        return list(registers_of(self.operands[0]))

    @functools.cached_property
    def _sources(self) -> list[Register]:
        operands = self.operands[1:] if self._results else self.operands
        found = [register for operand in operands for register in registers_of(operand)]
        return found if self.guard is None else [*found, self.guard]

    @property
    def registers(self) -> list[Register]:
        return self._results + self._sources

    @functools.cached_property
    def writes(self) -> frozenset[str]:
        return frozenset(register.name for register in self._results)

    @functools.cached_property
    def reads(self) -> frozenset[str]:
        found = frozenset(register.name for register in self._sources)
        # A product that adds reads its sums too, unless a predicate decides whether it does.
        adds = self.opcode == "wgmma" and self.operands[3:4] == (Immediate(1, False),)
        return found | self.writes if adds else found

    @property
    def decides(self) -> frozenset[str]:
        """What it reads that goes to memory or decides what is done: a register that holds nothing may pass through
        others, as it does in lanes whose part of a reduction nobody uses.
        """
        if self.opcode in ("st", "stmatrix", "red", "atom", "ld", "ldmatrix", "cp", "mma", "wgmma", "mbarrier", "bra"):
            return self.reads
        return frozenset() if self.guard is None else frozenset((self.guard.name,))

    def __str__(self) -> str:
        return self.text if len(self.text) <= 100 else self.text[:97] + "..."


@dataclass
class Block:
    """Instructions without a way in or out between; `end` is a branch, a barrier or the end of a thread."""

    instructions: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None
    target: int | None = None  # of a branch


REFUSED = {
    "cluster": re.compile(
        r"\.(?:reqnctapercluster|explicitcluster)|%(?:n?cluster|is_explicit)|\bmapa\b|barrier\.cluster"
        r"|multicast::cluster"
    ),
    "tensor memory": re.compile(r"\btcgen05\."),
}
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
DIRECTIVE = re.compile(r"^\s*\.(?:loc|file|pragma|section)\b[^\n]*$", re.MULTILINE)
PIECE = re.compile(r"\s*(?:([{}])|([\w$.]+)\s*:(?!:)|([^;]*);)")
CONTROL = ("bra", "ret", "exit", "bar", "barrier", "trap")
NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?")
FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})")
NAME = re.compile(r"%?[\w$]+(?:\.[xyz])?")


class Program:
    """One entry function of a PTX module."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        text = DIRECTIVE.sub("", COMMENT.sub("", text))
        for what, pattern in REFUSED.items():
            if found := pattern.search(text):
                raise PtxError(f"{name}: {what} is not emulated: {found.group()}")
        found = re.search(r"\.entry\s+" + re.escape(name) + r"\s*\((.*?)\)(.*?)\{", text, re.DOTALL)
        if found is None:
            raise PtxError(f"no entry function {name} in the module")
        self.parameters = [self._parameter(line) for line in found.group(1).split(",") if line.strip()]
        threads = re.search(r"\.(?:req|max)ntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", found.group(2))
        if threads is None:
            raise PtxError(f"{name} does not say how many threads a block has")
        self.threads = int(threads.group(1)) * int(threads.group(2) or 1) * int(threads.group(3) or 1)
        self.shared_names: dict[str, int] = {}
        self.static_shared = 0
        self.local_names: dict[str, int] = {}
        self.local_size = 0
        self._families: dict[str, str] = {}  # %r -> b32
        self._locals: dict[tuple[int, str], str] = {}  # (scope, name) -> type, or "label"
        self._parents: dict[int, int] = {}
        self._operands: dict[tuple[int, str], Operand] = {}
        dynamic = re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]", text)
        labels, statements = self._statements(text, found.end())
        self.static_shared = -(-self.static_shared // 128) * 128
        self.shared_names |= dict.fromkeys(dynamic, self.static_shared)
        self.blocks = self._blocks(labels, statements)
        self.granule = self._granule()
        self.proxies = any(
            i.opcode == "wgmma" or (i.opcode == "cp" and "bulk" in i.modifiers) for i in self.instructions()
        )

    @staticmethod
    def _parameter(line: str) -> Parameter:
        words = line.split()
        name, _, count = words[-1].partition("[")
        kind = next(word[1:] for word in words[1:] if re.fullmatch(r"\.(?:[bus]\d+|f\d+)", word))
        return Parameter(name, kind, int(count.rstrip("]")) if count else 0)

    # ------------------------------------------------------------------------------------------------------ statements

    def _statements(self, text: str, at: int) -> tuple[dict[tuple[int, str], int], list[tuple[int, str]]]:
        """Labels, by scope and name, with the number of the statement that follows; statements with their scopes."""
        labels: dict[tuple[int, str], int] = {}
        statements: list[tuple[int, str]] = []
        scope, scopes = 0, 0
        while True:
            piece = PIECE.match(text, at)
            if piece is None:
                raise PtxError(f"{self.name}: no statement in {text[at : at + 80]!r}")
            brace, label, statement = piece.groups()
            at = piece.end()
            if brace == "{":
                scopes += 1
                self._parents[scopes], scope = scope, scopes
            elif brace == "}":
                if scope == 0:
                    return labels, statements
                scope = self._parents[scope]
            elif label is not None:
                labels[scope, label] = len(statements)
                self._locals[scope, label] = "label"
            elif statement.startswith(".reg"):
                self._declare(scope, statement)
            elif statement.startswith(".shared"):
                self.static_shared = self._place(statement, self.shared_names, self.static_shared)
            elif statement.startswith(".local"):
                self.local_size = self._place(statement, self.local_names, self.local_size)
            elif statement.startswith("."):
                raise PtxError(f"{self.name}: {statement.split()[0]} is not emulated: {statement}")
            elif statement.strip():
                statements.append((scope, " ".join(statement.split())))

    def _declare(self, scope: int, statement: str) -> None:
        kind, names = statement.split(None, 2)[1:]
        for name in names.split(","):
            family, _, count = name.strip().partition("<")
            if count:
                self._families[family] = kind[1:]
            else:
                self._locals[scope, family] = kind[1:]

    def _place(self, statement: str, names: dict[str, int], size: int) -> int:
        """Puts a variable behind `size` bytes of others, and returns the size of all."""
        found = re.fullmatch(r"\.\w+\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", statement)
        if found is None:
            raise PtxError(f"{self.name}: a variable of this form is not emulated: {statement}")
        names[found.group(2)] = -(-size // int(found.group(1))) * int(found.group(1))
        return names[found.group(2)] + int(found.group(3))

    # ---------------------------------------------------------------------------------------------------- instructions

    def _local(self, scope: int, name: str) -> tuple[int, str] | None:
        """The scope whose name this is, and its type."""
        while (scope, name) not in self._locals:
            if scope == 0:
                return None
            scope = self._parents[scope]
        return scope, self._locals[scope, name]

    def _operand(self, scope: int, text: str) -> Operand:
        if (known := self._operands.get((scope, text))) is None:
            known = self._operands[scope, text] = self._read_operand(scope, text)
        return known

    def _read_operand(self, scope: int, text: str) -> Operand:
        if text[0] == "{":
            return Vector(tuple(self._operand(scope, part) for part in split(text[1:-1])))
        if text[0] == "[":
            base, *rest = split(text[1:-1])
            coordinates = self._operand(scope, rest[0]) if rest else Vector(())
            assert isinstance(coordinates, Vector)
            name, offset = base, 0
            if found := re.fullmatch(r"(\S+?)\s*\+\s*(-?\w+)", base):
                name, offset = found.group(1), int(found.group(2), 0)
            return Address(self._operand(scope, name), offset, coordinates.items)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(scope, first), self._operand(scope, second))
        if text[0] == "!":
            register = self._operand(scope, text[1:])
            assert isinstance(register, Register)
            return register._replace(negated=True)
        if found := FLOAT.fullmatch(text):
            return Immediate(int(found.group(1) or found.group(2), 16), True)
        if NUMBER.fullmatch(text):
            return Immediate(int(text.rstrip("U"), 0), False)
        if not NAME.fullmatch(text):
            raise PtxError(f"{self.name}: no operand: {text!r}")
        if (local := self._local(scope, text)) is not None:
            name = text if local[0] == 0 else f"{text}@{local[0]}"
            return Symbol(name) if local[1] == "label" else Register(name, local[1])
        if text == "_":
            return Register("_", "b64")
        if (found := re.fullmatch(r"(%[a-z]+)\d+", text)) and found.group(1) in self._families:
            return Register(text, self._families[found.group(1)])
        return Symbol(text)

    def _instruction(self, scope: int, text: str) -> Instruction:
        guard, rest = None, text
        if text[0] == "@":
            name, rest = text[1:].split(None, 1)
            register = self._operand(scope, name)
            assert isinstance(register, Register)
            guard = register
        opcode, _, operands = rest.partition(" ")
        first, *modifiers = opcode.split(".")
        return Instruction(
            first,
            tuple(modifiers),
            tuple(self._operand(scope, part) for part in split(operands)),
            guard,
            text,
        )

    def _blocks(self, labels: dict[tuple[int, str], int], statements: list[tuple[int, str]]) -> list[Block]:
        starts = sorted({0, *labels.values()} | {i + 1 for i, (_, s) in enumerate(statements) if is_control(s)})
        starts = [start for start in starts if start < len(statements)]
        number = {start: i for i, start in enumerate(starts)}
        blocks = []
        for start, end in zip(starts, [*starts[1:], len(statements)]):
            block = Block([self._instruction(*statement) for statement in statements[start:end]])
            if is_control(statements[end - 1][1]):
                block.end = block.instructions.pop()
                if block.end.opcode == "bra":
                    scope, (symbol,) = statements[end - 1][0], block.end.operands
                    assert isinstance(symbol, Symbol)
                    name = symbol.name.partition("@")[0]
                    local = self._local(scope, name)
                    assert local is not None, symbol
                    block.target = number.get(labels[local[0], name], len(starts))
            blocks.append(block)
        return blocks

    def _granule(self) -> int:
        """Bytes of shared memory that are watched as one: the smallest access."""
        smallest = 4
        for instruction in self.instructions():
            if instruction.opcode in ("ld", "st", "atom") and "shared" in instruction.modifiers:
                smallest = min(smallest, size_of(instruction.type))
        return smallest

    def registers(self) -> Iterator[Register]:
        for instruction in self.instructions():
            yield from instruction.registers

    def instructions(self) -> Iterator[Instruction]:
        for block in self.blocks:
            yield from block.instructions
            if block.end is not None:
                yield block.end


def is_control(statement: str) -> bool:
    words = statement.split(None, 2)
    opcode = words[1] if statement[0] == "@" else words[0]
    return opcode.split(".")[0] in CONTROL and not opcode.startswith("bar.warp")


def split(text: str) -> list[str]:
    """Parts between commas that stand outside all brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        if letter in "{[":
            depth += 1
        elif letter in "}]":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts
