"""Instructions of one thread that touch registers alone: integers, floats, predicates, conversions, bits.

Each handler takes the machine and an instruction and returns the step that does it, or several. Results are those of
PTX: integers wrap, shifts by more than the width give 0, a maximum prefers a number to NaN, `.ftz` flushes subnormal
operands and results. Approximate instructions are exact, or with `Settings.noise` off by up to what PTX allows them. A
modifier that changes the result and is not known here raises PtxError.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import PARAMETERS
from .program import Instruction, Pair, Register, Vector
from .types import TYPES, UNSIGNED, Array, PtxError, bf16_to_f32, f32_to_bf16, is_float, is_signed, size_of

if TYPE_CHECKING:
    from .machine import Machine, Step

# Without a meaning here: rounding to nearest, the address space of registers, what is the default.
HARMLESS = {"rn", "approx", "full", "ftz", "lo", "wide", "hi", "sat", "uni"}
TINY = np.finfo(np.float32).tiny


def flushed(x: Array) -> Array:
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x) if x.dtype == np.float32 else x


def assign(out: Array, value: Any, where: Any = True) -> None:
    np.copyto(out, value, casting="unsafe", where=where)


def computed(function: Callable[..., Any], out: Array, *sources: Array) -> Step:
    """out = function(*sources), for what no ufunc does in one call."""

    def step(out: Array, *sources: Array, where: Any = True) -> None:
        np.copyto(out, function(*sources), casting="unsafe", where=where)

    return step, (out, *sources)


def check(i: Instruction, *more: str) -> None:
    if unknown := set(i.modifiers) - HARMLESS - TYPES.keys() - set(more):
        raise PtxError(f"{i.opcode}.{'.'.join(sorted(unknown))} is not emulated: {i}")
    if "sat" in i.modifiers and "sat" not in more:
        raise PtxError(f"saturation is not emulated: {i}")


def noisy(m: Machine, bits: float, floor: float = 0.0) -> Callable[[Array], Array]:
    """A result off by up to 2^-bits of itself, or by `floor`; exact without noise."""
    noise = m.settings.noise
    if noise is None:
        return lambda x: x

    def off(x: Array) -> Array:
        wide = x.astype(np.float64)
        size = np.maximum(np.abs(wide) * 2.0**-bits, floor)
        result: Array = (wide + noise.uniform(-1, 1, x.shape) * size).astype(x.dtype)
        return result

    return off


# ----------------------------------------------------------------------------------------------------------- arithmetic


def truncated_quotient(a: Array, b: Array) -> Array:
    if np.issubdtype(a.dtype, np.unsignedinteger):
        return a // np.where(b == 0, b.dtype.type(1), b)
    wide_a, wide_b = a.astype(np.int64), b.astype(np.int64)
    wide_b = np.where(wide_b == 0, 1, wide_b)
    quotient = np.abs(wide_a) // np.abs(wide_b)
    return np.where((wide_a < 0) != (wide_b < 0), -quotient, quotient).astype(a.dtype)


def truncated_rest(a: Array, b: Array) -> Array:
    return a - truncated_quotient(a, b) * b


# NumPy's own want their result by name.
def largest(a: Array, b: Array, out: Array | None = None, where: Any = True) -> Array:
    return np.maximum(a, b, out=out, where=where)


def smallest(a: Array, b: Array, out: Array | None = None, where: Any = True) -> Array:
    return np.minimum(a, b, out=out, where=where)


FLOATS: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.fmax, "min": np.fmin,
}  # fmt: skip
INTEGERS: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": truncated_quotient, "rem": truncated_rest,
    "max": largest, "min": smallest, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def binary(m: Machine, i: Instruction) -> Step:
    check(i, *(("NaN",) if i.opcode in ("max", "min") else ()))
    kind, (d, a, b) = i.type, i.operands
    if i.opcode == "mul" and "wide" in i.modifiers:
        return wide_product(m, i)
    out, x, y = m.target(d, kind), m.source(a, kind), m.source(b, kind)
    if i.opcode == "mul" and "hi" in i.modifiers:
        return computed(high_product, out, x, y)
    if not is_float(kind):
        function = INTEGERS[i.opcode]
        if kind == "pred":
            function = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[i.opcode]
        in_place = isinstance(function, np.ufunc) or function in (largest, smallest)
        return (function, (x, y, out)) if in_place else computed(function, out, x, y)
    function = FLOATS[i.opcode]
    if "NaN" in i.modifiers:
        function = {"max": largest, "min": smallest}[i.opcode]
    if "full" in i.modifiers or ("approx" in i.modifiers and i.opcode == "div"):
        off = noisy(m, 22)
        return computed(lambda x, y: off(np.divide(x, y)), out, x, y)
    if "ftz" in i.modifiers:
        return computed(lambda x, y: flushed(function(flushed(x), flushed(y))), out, x, y)
    return function, (x, y, out)


def wide_product(m: Machine, i: Instruction) -> Step:
    kind, (d, a, b) = i.type, i.operands
    wide = f"{kind[0]}{16 * size_of(kind)}"
    product = functools.partial(np.multiply, dtype=TYPES[wide])
    return product, (m.source(a, kind), m.source(b, kind), m.target(d, wide))


def high_product(a: Array, b: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return ((a.astype(object) * b.astype(object)) >> bits).astype(a.dtype)


def fused(m: Machine, i: Instruction) -> Step:
    """fma and mad."""
    check(i)
    kind, (d, a, b, c) = i.type, i.operands
    if "wide" in i.modifiers:
        wide = f"{kind[0]}{16 * size_of(kind)}"
        product = functools.partial(np.multiply, dtype=TYPES[wide])
        return computed(
            lambda x, y, z: product(x, y) + z, m.target(d, wide), m.source(a, kind), m.source(b, kind),
            m.source(c, wide),
        )  # fmt: skip
    if "hi" in i.modifiers:
        raise PtxError(f"{i.opcode}.hi is not emulated: {i}")
    out, *sources = m.target(d, kind), *(m.source(x, kind) for x in (a, b, c))
    if kind != "f32":
        return computed(lambda x, y, z: x * y + z, out, *sources)
    scratch = m.scratch
    if "ftz" in i.modifiers:
        exact = np.float64
        return computed(
            lambda x, y, z: flushed(
                (flushed(x).astype(exact) * flushed(y).astype(exact) + flushed(z)).astype(np.float32)
            ),
            out, *sources,
        )  # fmt: skip

    def step(x: Array, y: Array, z: Array, out: Array, where: Any = True) -> None:
        # A product of two floats is exact in a double; so is rounded once more only where a sum is a near tie.
        np.multiply(x, y, scratch, dtype=np.float64)
        np.add(scratch, z, scratch)
        np.copyto(out, scratch, casting="same_kind", where=where)

    return step, (*sources, out)


def negate(m: Machine, i: Instruction) -> Step:
    check(i)
    kind, (d, a) = i.type, i.operands
    function = {"neg": np.negative, "abs": np.absolute, "not": np.logical_not if kind == "pred" else np.invert}[
        i.opcode
    ]
    if "ftz" in i.modifiers:
        return computed(lambda x: flushed(function(flushed(x))), m.target(d, kind), m.source(a, kind))
    return function, (m.source(a, kind), m.target(d, kind))


def approximate(m: Machine, i: Instruction) -> Step:
    """Functions of one float."""
    check(i, "rnd")
    kind, (d, a) = i.type, i.operands
    single = kind == "f32" and "approx" in i.modifiers
    functions: dict[str, tuple[Callable[[Array], Array], float, float]] = {
        "ex2": (np.exp2, 22.0, 0.0),
        "lg2": (np.log2, 22.6, 2.0**-22),
        "rsqrt": (lambda x: 1 / np.sqrt(x), 22.4, 0.0),
        "rcp": (lambda x: 1 / x, 23.0, 0.0),
        "sqrt": (np.sqrt, 23.0, 0.0),
        "tanh": (np.tanh, 11.0, 0.0),
        "sin": (np.sin, 20.9, 2.0**-20.9),
        "cos": (np.cos, 20.9, 2.0**-20.9),
    }
    function, bits, floor = functions[i.opcode]
    off = noisy(m, bits, floor) if single else lambda x: x
    if kind == "f64" and "approx" in i.modifiers:
        # The upper half of the number, and of the result: what refines it afterwards must do the rest.
        def coarse(x: Array) -> Array:
            upper = np.uint64(0xFFFFFFFF00000000)
            return (function((x.view(np.uint64) & upper).view(np.float64)).view(np.uint64) & upper).view(np.float64)

        return computed(coarse, m.target(d, kind), m.source(a, kind))
    flush = "ftz" in i.modifiers

    def value(x: Array) -> Array:
        if not single:
            return function(x)
        wide = (
            function((flushed(x) if flush else x).astype(np.float64))
            if i.opcode == "rsqrt"
            else function(flushed(x) if flush else x)
        )
        result = off(wide.astype(np.float32))
        return flushed(result) if flush else result

    return computed(value, m.target(d, kind), m.source(a, kind))


# ---------------------------------------------------------------------------------------------------- moves and choices


def move(m: Machine, i: Instruction) -> Step | list[Step]:
    check(i)
    kind, (d, a) = i.type, i.operands
    if isinstance(d, Vector):
        size = size_of(kind) // len(d.items)
        parts = m.source(a, kind).view(UNSIGNED[size])
        return [
            (
                assign,
                (
                    m.target(item, f"b{8 * size}"),
                    parts[k :: len(d.items)].copy() if parts.size <= 8 else parts[k :: len(d.items)],
                ),
            )
            for k, item in enumerate(d.items)
            if not (isinstance(item, Register) and item.name == "_")
        ]
    if isinstance(a, Vector):
        size = size_of(kind) // len(a.items)
        # Into a scratch row first: a source may be the target.
        pieces = [m.source(item, f"b{8 * size}") for item in a.items]
        target = m.target(d, kind)

        def pack(out: Array, *pieces: Array, where: Any = True) -> None:
            value = np.zeros(out.shape, out.dtype)
            narrow = value.view(UNSIGNED[size])
            for k, piece in enumerate(pieces):
                narrow[k :: len(pieces)] = piece
            np.copyto(out, value, where=where)

        return pack, (target, *pieces)
    return np.copyto, (m.target(d, kind), m.source(a, kind))


def select(m: Machine, i: Instruction) -> Step:
    kind, (d, a, b, p) = i.type, i.operands
    return computed(np.where, m.target(d, kind), m.source(p, "pred"), m.source(a, kind), m.source(b, kind))


def convert_address(m: Machine, i: Instruction) -> Step:
    """Generic addresses are those of global memory and, high above, of parameters and of the threads' local memories;
    shared memory has its own.
    """
    if "shared" in i.modifiers:
        raise PtxError(f"generic addresses of shared memory are not emulated: {i}")
    d, a = i.operands
    if "param" in i.modifiers or "local" in i.modifiers:
        base = m.local_at if "local" in i.modifiers else np.array([PARAMETERS], TYPES[i.type])
        return np.add, (m.source(a, i.type), base, m.target(d, i.type))
    return np.copyto, (m.target(d, i.type), m.source(a, i.type))


# ----------------------------------------------------------------------------------------------------------- predicates


def unordered(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: function(a, b) | np.isnan(a) | np.isnan(b)


ORDERED: dict[str, Callable[..., Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
OF_FLOATS: dict[str, Callable[..., Any]] = {
    **ORDERED,
    "ne": lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b),
    "neu": np.not_equal,
    **{f"{name}u": unordered(ORDERED[name]) for name in ("eq", "lt", "le", "gt", "ge")},
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def set_predicate(m: Machine, i: Instruction) -> Step | list[Step]:
    compare, *between = i.modifiers[:-1]
    kind, (d, a, b, *with_) = i.type, i.operands
    flush = "ftz" in between
    combine = [name for name in between if name != "ftz"]
    x, y = m.source(a, kind), m.source(b, kind)
    table = OF_FLOATS if is_float(kind) else ORDERED
    function = table[UNSIGNED_NAMES.get(compare, compare)]
    first, second = (d.first, d.second) if isinstance(d, Pair) else (d, None)
    out = m.target(first, "pred")
    if flush:
        plain = function
        function = lambda a, b: plain(flushed(a), flushed(b))  # noqa: E731
    if combine or second is not None:
        other = m.source(with_[0], "pred") if with_ else np.array([True])
        join = BOOLEAN[combine[0]] if combine else np.logical_and
        steps: list[Step] = []
        if second is not None:
            steps.append(computed(lambda a, b, c: join(~function(a, b), c), m.target(second, "pred"), x, y, other))
        return [*steps, computed(lambda a, b, c: join(function(a, b), c), out, x, y, other)]
    return (function, (x, y, out)) if isinstance(function, np.ufunc) else computed(function, out, x, y)


# ---------------------------------------------------------------------------------------------------------- conversions

ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
OTHER_FLOATS = {"bf16", "bf16x2", "f16x2", "tf32"}


def convert(m: Machine, i: Instruction) -> Step:
    kinds = [name for name in i.modifiers if name in TYPES or name in OTHER_FLOATS]
    to, of = kinds[0], kinds[1]
    rounding = next((name for name in i.modifiers if name in ROUNDINGS), None)
    if unknown := set(i.modifiers) - {*kinds, *ROUNDINGS, "rn", "rna", "ftz"}:
        raise PtxError(f"cvt.{'.'.join(sorted(unknown))} is not emulated: {i}")
    d, a = i.operands[:2]
    if to in ("bf16x2", "f16x2"):
        narrow = f32_to_bf16 if to == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)

        def pack(high: Array, low: Array) -> Array:
            return (narrow(high).astype(np.uint32) << np.uint32(16)) | narrow(low)

        return computed(pack, m.target(d, "b32"), m.source(a, "f32"), m.source(i.operands[2], "f32"))
    if to == "bf16":
        return computed(f32_to_bf16, m.target(d, "b16"), m.source(a, "f32"))
    if of == "bf16":
        return computed(bf16_to_f32, m.target(d, "f32"), m.source(a, "b16"))
    if to == "tf32":
        return computed(
            lambda x: (x + np.uint32(0x1000)) & np.uint32(0xFFFFE000), m.target(d, "b32"), m.source(a, "b32")
        )
    x = m.source(a, of)
    out = m.row(d, to) if is_float(to) and isinstance(d, Register) else m.target(d, to)
    if is_float(of) and not is_float(to):
        if rounding is None:
            raise PtxError(f"a conversion to an integer without its rounding: {i}")
        limits, function = np.iinfo(TYPES[to]), ROUNDINGS[rounding]

        def clipped(x: Array) -> Array:
            whole = function(x.astype(np.float64))
            inside = np.clip(whole, limits.min, limits.max)
            # The largest float64 below 2^63 or 2^64 is less than the largest integer.
            return np.where(
                np.isnan(whole), 0, np.where(whole >= float(limits.max), limits.max, inside.astype(TYPES[to]))
            )

        return computed(clipped, out, x)
    if rounding is not None and is_float(to):
        return computed(ROUNDINGS[rounding], out, x)
    if "ftz" in i.modifiers:
        return computed(lambda x: flushed(flushed(x).astype(TYPES[to])), out, x)
    return np.copyto, (out, x, "unsafe")


# ----------------------------------------------------------------------------------------------------------------- bits


def shift(m: Machine, i: Instruction) -> Step:
    kind, (d, a, b) = i.type, i.operands
    out, x, by = m.target(d, kind), m.source(a, kind), m.source(b, "u32")
    bits = 8 * size_of(kind)
    function = np.left_shift if i.opcode == "shl" else np.right_shift
    if by.size == 1 and by[0] < bits:
        return function, (x, by.astype(x.dtype), out)

    def shifted(x: Array, by: Array) -> Array:
        result = function(x, np.minimum(by, bits - 1).astype(x.dtype))
        if is_signed(kind) and i.opcode == "shr":
            return result
        return np.where(by >= bits, x.dtype.type(0), result)

    return computed(shifted, out, x, by)


def funnel_shift(m: Machine, i: Instruction) -> Step:
    d, low, high, by = i.operands
    left, clamp = "l" in i.modifiers, "clamp" in i.modifiers

    def shifted(low: Array, high: Array, by: Array) -> Array:
        count = (np.minimum(by, 32) if clamp else by & np.uint32(31)).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        if left:
            return ((both << count) >> np.uint64(32)).astype(np.uint32)
        return (both >> count).astype(np.uint32)

    return computed(shifted, m.target(d, "b32"), *(m.source(x, "b32") for x in (low, high)), m.source(by, "u32"))


def extract(m: Machine, i: Instruction) -> Step:
    kind, (d, a, b, c) = i.type, i.operands

    def field(x: Array, at: Array, count: Array) -> Array:
        first, length = at.astype(np.int64) & 255, count.astype(np.int64) & 255
        bits = 8 * size_of(kind)
        value = np.where(first < bits, x.astype(np.int64) >> np.minimum(first, 63), 0 if not is_signed(kind) else -1)
        mask = (np.int64(1) << np.minimum(length, 62)) - 1
        value = value & mask
        if is_signed(kind):
            value = np.where((length > 0) & ((value >> np.maximum(length - 1, 0)) & 1 == 1), value - mask - 1, value)
        return value

    if size_of(kind) > 4:
        raise PtxError(f"bfe of 64 bits is not emulated: {i}")
    return computed(field, m.target(d, kind), m.source(a, kind), m.source(b, "u32"), m.source(c, "u32"))


def insert(m: Machine, i: Instruction) -> Step:
    kind, (d, a, b, c, e) = i.type, i.operands

    def inserted(x: Array, y: Array, at: Array, count: Array) -> Array:
        first, length = (v.astype(np.uint64) & np.uint64(255) for v in (at, count))
        mask = ((np.uint64(1) << np.minimum(length, 63)) - np.uint64(1)) << np.minimum(first, 63)
        return (y.astype(np.uint64) & ~mask) | ((x.astype(np.uint64) << np.minimum(first, 63)) & mask)

    sources = (m.source(a, kind), m.source(b, kind), m.source(c, "u32"), m.source(e, "u32"))
    return computed(inserted, m.target(d, kind), *sources)


def permute(m: Machine, i: Instruction) -> Step:
    if i.modifiers != ("b32",):
        raise PtxError(f"this mode of prmt is not emulated: {i}")

    def permuted(a: Array, b: Array, selector: Array) -> Array:
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        result = np.zeros(both.shape, np.uint64)
        for k in range(4):
            nibble = (selector.astype(np.uint64) >> np.uint64(4 * k)) & np.uint64(15)
            byte = (both >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            result = result | (np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * k))
        return result

    d, *sources = i.operands
    return computed(permuted, m.target(d, "b32"), *(m.source(x, "b32") for x in sources))


def logic_of_three(m: Machine, i: Instruction) -> Step:
    d, a, b, c, table = i.operands
    lookup = int(m.source(table, "u32")[0])

    def looked_up(a: Array, b: Array, c: Array) -> Array:
        result: Array = np.uint32(0) & a & b & c
        for k in range(8):
            if lookup >> k & 1:
                result = result | ((a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c))
        return result

    return computed(looked_up, m.target(d, "b32"), *(m.source(x, "b32") for x in (a, b, c)))


def leading_zeros(x: Array) -> Array:
    bits = 8 * x.dtype.itemsize
    count = np.full(x.shape, bits, np.int64)
    for k in range(bits):
        count = np.where((x >> x.dtype.type(k)) & x.dtype.type(1), bits - 1 - k, count)
    return count


def reversed_bits(x: Array) -> Array:
    result = np.zeros_like(x)
    bits, one = 8 * x.dtype.itemsize, x.dtype.type(1)
    for k in range(bits):
        result |= ((x >> x.dtype.type(k)) & one) << x.dtype.type(bits - 1 - k)
    return result


def count_bits(m: Machine, i: Instruction) -> Step:
    kind, (d, a) = i.type, i.operands
    if i.opcode == "brev":
        return computed(reversed_bits, m.target(d, kind), m.source(a, kind))
    if i.opcode == "bfind":
        if is_signed(kind):
            raise PtxError(f"bfind of signed numbers is not emulated: {i}")
        amount = "shiftamt" in i.modifiers
        plain = f"b{8 * size_of(kind)}"

        def found(x: Array) -> Array:
            zeros = leading_zeros(x)
            bits = 8 * x.dtype.itemsize
            return np.where(zeros == bits, -1, zeros if amount else bits - 1 - zeros)

        return computed(found, m.target(d, "s32"), m.source(a, plain))
    function: Callable[..., Any] = np.bitwise_count if i.opcode == "popc" else leading_zeros
    return computed(function, m.target(d, "u32"), m.source(a, kind))


def nothing(*_: Any, where: Any = True) -> None:
    """An order of memory, which the emulator keeps anyway."""


def ordered(m: Machine, i: Instruction) -> Step:
    return nothing, ()


HANDLERS = {
    **dict.fromkeys(("add", "sub", "mul", "div", "rem", "max", "min", "and", "or", "xor"), binary),
    **dict.fromkeys(("fma", "mad"), fused),
    **dict.fromkeys(("neg", "abs", "not"), negate),
    **dict.fromkeys(("ex2", "lg2", "rsqrt", "rcp", "sqrt", "tanh", "sin", "cos"), approximate),
    **dict.fromkeys(("shl", "shr"), shift),
    **dict.fromkeys(("popc", "clz", "brev", "bfind"), count_bits),
    "mov": move,
    "selp": select,
    "setp": set_predicate,
    "cvt": convert,
    "cvta": convert_address,
    "shf": funnel_shift,
    "bfe": extract,
    "bfi": insert,
    "prmt": permute,
    "lop3": logic_of_three,
    "membar": ordered,
}
