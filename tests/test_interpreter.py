"""The harness is proven before anything that stands on it: bf16 arithmetic in the interpreter has the bits of torch's
own bf16, and a process that interprets can still compile, in either order, with everything patched put back."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from groupdpo_kernels.testing import triton_on_cpu

N = 4096
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)


@triton.jit
def elementwise_kernel(a_ptr, b_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + at)
    b = tl.load(b_ptr + at)
    if OP == "add":
        x = a + b
    elif OP == "sub":
        x = a - b
    elif OP == "mul":
        x = a * b
    elif OP == "neg":
        x = -a
    elif OP == "abs":
        x = tl.abs(a)
    elif OP == "less":
        x = a < b
    elif OP == "equal":
        x = a == b
    elif OP == "not_equal":
        x = a != b
    elif OP == "greater_equal":
        x = a >= b
    elif OP == "maximum":
        x = tl.maximum(a, b)
    elif OP == "where":
        x = tl.where(a > b, a, b)
    elif OP == "mixed":  # bf16 and float32: float32
        x = a.to(tl.float32) * b + a
    elif OP == "cast":
        x = a.to(out_ptr.dtype.element_ty)
    elif OP == "bitcast":
        x = a.to(tl.int16, bitcast=True)
    else:
        x = tl.exp(a.to(tl.float32)).to(tl.bfloat16)
    tl.store(out_ptr + at, x)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m = tl.arange(0, M)[:, None]
    n = tl.arange(0, N)[None, :]
    k = tl.arange(0, K)
    a = tl.load(a_ptr + m * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n)
    tl.store(out_ptr + m * N + n, tl.dot(a, b))


@triton.jit
def reduce_kernel(a_ptr, sum_ptr, max_ptr, M: tl.constexpr, N: tl.constexpr):
    m = tl.arange(0, M)
    a = tl.load(a_ptr + m[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(sum_ptr + m, tl.sum(a.to(tl.float32), 1))
    tl.store(max_ptr + m, tl.max(a.to(tl.float32), 1))


@triton.jit
def scalars_kernel(out_ptr, plain, said: tl.float64, half: tl.bfloat16, integer):
    tl.store(out_ptr, plain.to(tl.float64))
    tl.store(out_ptr + 1, said)
    tl.store(out_ptr + 2, half.to(tl.float64))
    tl.store(out_ptr + 3, integer.to(tl.float64))


@pytest.fixture
def interpreted() -> Iterator[None]:
    with triton_on_cpu():
        yield


def numbers(seed: int = 0) -> tuple[Tensor, Tensor]:
    """bf16 of every magnitude, with zeros of both signs, infinities, NaN, subnormals and equal pairs among them."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-(2**15), 2**15, (N,), generator=generator, dtype=torch.int16) for _ in range(2))
    b[:500] = a[:500]
    a, b = a.view(torch.bfloat16), b.view(torch.bfloat16)
    a[::2], b[::2] = (torch.randn(N // 2, generator=generator).bfloat16() for _ in range(2))
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-40, 3e38], dtype=torch.bfloat16)
    a[:64], b[:64] = special.repeat_interleave(8), special.repeat(8)
    return a, b


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal bits, any NaN for a NaN."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    if actual.is_floating_point():
        assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())


EXPECTED = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "neg": lambda a, b: 0 - a if OLD else -a,  # before 3.8 Triton meant a difference by it
    "abs": lambda a, b: a.abs(),
    "less": lambda a, b: a < b,
    "equal": lambda a, b: a == b,
    "not_equal": lambda a, b: a != b,
    "greater_equal": lambda a, b: a >= b,
    "where": lambda a, b: torch.where(a > b, a, b),
    # A GPU's maximum prefers a number to NaN (as fmax does, but for signalling NaN).
    "maximum": lambda a, b: torch.where(a.isnan(), b, torch.where(b.isnan(), a, torch.maximum(a, b))),
    "mixed": lambda a, b: a.float() * b.float() + a.float(),
    "bitcast": lambda a, b: a.view(torch.int16),
    "exp": lambda a, b: a.float().exp().bfloat16(),
}


@pytest.mark.parametrize("op", EXPECTED)
def test_bf16_arithmetic(op: str, interpreted: None) -> None:
    """Each operation has the bits that torch's bf16 has: computed in float32, rounded once."""
    a, b = numbers()
    if op == "exp":  # numpy's exp and torch's differ in the last float32 digit, which may cross a bf16 rounding
        a = a.float().clamp(-20, 20).bfloat16()
    expected = EXPECTED[op](a, b)
    out = torch.empty_like(expected)
    elementwise_kernel[(1,)](a, b, out, op, N)
    if op == "exp":
        torch.testing.assert_close(out, expected, rtol=2**-8, atol=0, equal_nan=True)
        assert (out == expected).float().mean() > 0.99
    elif op == "maximum":  # of -0 and 0 either may be the larger
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    else:
        same(out, expected)


@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_cast_from_bf16(to: torch.dtype, interpreted: None) -> None:
    a, _ = numbers()
    out = torch.empty(N, dtype=to)
    elementwise_kernel[(1,)](a, a, out, "cast", N)
    same(out, a.to(to))


def test_cast_from_bf16_to_integers(interpreted: None) -> None:
    a = torch.linspace(-300, 300, N).bfloat16()
    out = torch.empty(N, dtype=torch.int32)
    elementwise_kernel[(1,)](a, a, out, "cast", N)
    same(out, a.to(torch.int32))


@pytest.mark.parametrize("of", [torch.float32, torch.float16, torch.int32], ids=str)
def test_cast_to_bf16_rounds_to_nearest_even(of: torch.dtype, interpreted: None) -> None:
    """Ties included: every bf16 of one binade with the bits below it at, just under and just over the half."""
    if of == torch.float32:
        top = torch.arange(0x3F80, 0x4000, dtype=torch.int32)
        below = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
        values = ((top[:, None] << 16) | below).view(torch.float32).flatten()
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 3.4e38, -3.4e38, 1e-45, 1e-38])
        values = torch.cat((values, -values, special))
        a = torch.nn.functional.pad(values, (0, N - values.numel()))
        nan = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(
            torch.float32
        )  # rounding must not carry
        a[-3:] = nan
    elif of == torch.float16:
        a = torch.arange(-(2**15), 2**15, 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    else:
        a = torch.arange(-N // 2, N // 2, dtype=of) * 37
    out = torch.empty(N, dtype=torch.bfloat16)
    elementwise_kernel[(1,)](a, a, out, "cast", N)
    same(out, a.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dot(dtype: torch.dtype, interpreted: None) -> None:
    """Exact where float32 sums are: small integers over 32. The stock interpreter fails this in bf16."""
    a, b = ((torch.randint(-64, 64, shape) / 32).to(dtype) for shape in ((32, 64), (64, 16)))
    out = torch.empty(32, 16)
    dot_kernel[(1,)](a, b, out, 32, 16, 64)
    assert torch.equal(out, (a.double() @ b.double()).float())


def test_reductions(interpreted: None) -> None:
    a = (torch.randint(-64, 64, (16, 32)) / 32).bfloat16()
    total, top = torch.empty(16), torch.empty(16)
    reduce_kernel[(1,)](a, total, top, 16, 32)
    assert torch.equal(total, a.float().sum(1)) and torch.equal(top, a.float().amax(1))


def test_scalars_are_rounded_as_a_launch_rounds_them(interpreted: None) -> None:
    """To float32, unless the kernel says another type; by position and by name."""
    single, half = (float(torch.tensor(0.1, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    for arguments, named in (((0.1, 0.1, 0.1, 3), {}), ((), {"integer": 3, "half": 0.1, "said": 0.1, "plain": 0.1})):
        out = torch.zeros(4, dtype=torch.float64)
        scalars_kernel[(1,)](out, *arguments, **named)
        assert out.tolist() == [single, 0.1, half, 3.0]


def test_the_stock_interpreter_is_wrong() -> None:
    """Why the harness patches anything: the day this fails, the patches can go."""
    program = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "import torch, runpy, sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_interpreter as t\n"
        "a, b = ((torch.randint(-64, 64, s) / 32).bfloat16() for s in ((32, 64), (64, 16)))\n"
        "out = torch.empty(32, 16); t.dot_kernel[(1,)](a, b, out, 32, 16, 64)\n"
        "print(torch.equal(out, a.float() @ b.float()))\n"
    )
    here = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run([sys.executable, "-c", program, here], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 or done.stdout.strip() == "False", done.stdout


# ---------------------------------------------------------------------------------------- what it leaves behind


def language() -> dict[tuple[str, str], object]:
    """Everything the interpreter patches: the language's modules and classes, and the entry points of a kernel."""
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    from groupdpo_kernels.kernels import launch

    owners = (tl, tl.core, tl.math, tl.tensor, tl.block_type, tl.core.tensor_descriptor_base, JITFunction, launch)
    owners += (interpreter, interpreter.InterpreterBuilder, interpreter.TritonSemantic)
    names = {"__index__", "__bool__", "__repr__", "__str__", "__call__", "__init__"}
    return {
        (owner.__name__, name): member
        for owner in owners
        for name, member in inspect.getmembers_static(owner)
        if not name.startswith("__") or name in names
    }


def compiles() -> None:
    """A GPU kernel through the compiler, reductions and dot included; no GPU is needed for that."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kernel, pointers, constants in (
        (reduce_kernel, ("a_ptr", "sum_ptr", "max_ptr"), {"M": 16, "N": 32}),
        (dot_kernel, ("a_ptr", "b_ptr", "out_ptr"), {"M": 32, "N": 16, "K": 64}),
    ):
        types = {name: "*bf16" if name in ("a_ptr", "b_ptr") else "*fp32" for name in pointers}
        source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
        assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm


def interprets() -> None:
    a = torch.ones(16, 32, dtype=torch.bfloat16)
    total, top = torch.empty(16), torch.empty(16)
    with triton_on_cpu():
        reduce_kernel[(1,)](a, total, top, 16, 32)
    assert total.eq(32).all() and top.eq(1).all()


def test_everything_patched_is_put_back() -> None:
    interprets()  # imports what it imports
    before = language()
    interprets()
    with pytest.raises(ZeroDivisionError), triton_on_cpu():
        _ = 1 / 0
    with pytest.raises(InterpreterError), triton_on_cpu():  # in the middle of a kernel
        dot_kernel[(1,)](torch.ones(4), None, torch.ones(4), 16, 16, 16)
    after = language()
    assert [name for name in before if before[name] is not after.get(name)] == []
    assert before.keys() == after.keys()


@pytest.mark.parametrize("order", ["interpret first", "compile first"])
def test_one_process_interprets_and_compiles(order: str, tmp_path: object) -> None:
    """In a fresh process and cache each, so that neither has anything of the other to lean on."""
    steps = (
        ["t.interprets()", "t.compiles()"] * 2 if order == "interpret first" else ["t.compiles()", "t.interprets()"] * 2
    )
    program = "import sys; sys.path.insert(0, sys.argv[1])\nimport test_interpreter as t\n" + "\n".join(steps)
    here = os.path.dirname(os.path.abspath(__file__))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program, here], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
