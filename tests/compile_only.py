"""Every Triton kernel of an LM head compiled for every row of the launch table, on a machine that needs no GPU.

The launchers themselves run, on meta tensors of real sizes, under a driver that answers for a GPU of the asked
architecture; where Triton would launch, it only compiles. So signatures, constants and specialisations are those of a
real launch, and a change in a launcher cannot leave this file behind. `python tests/compile_only.py` compiles all rows
and prints registers, spilled bytes and shared memory; test_compile_only.py holds the budgets. Never runs a kernel.
All is read from what was compiled, not from the assembler's log, so that what Triton's cache holds is not built again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import struct
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from compile_budgets import write
from processes import CONTEXT

from groupdpo_kernels.reference import HeadOptions, Needs, RowGradients, head_of
from groupdpo_kernels.testing import Case

TARGETS: dict[str, int | str] = {"sm_80": 80, "sm_86": 86, "sm_90": 90, "sm_100": 100, "gfx942": "gfx942"}
TARGETS |= {name: name for name in ("gfx90a", "gfx950", "gfx1100", "gfx1201")}
SPARSE_KERNELS = ("linear_logps_bwd_kernel", "non_target_kernel", "row_limited_gemm_kernel", "select_kernel")
SPARSE_KERNELS += ("draw_kernel", "select_drawn_kernel", "visit_kernel", "weighted_rows_kernel")
DEFAULT_BUDGET = (192, 0, 4096)  # registers, spilled bytes, shared bytes of what has no budget of its own
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, order=True)
class Row:
    """One row of the launch table, with every option of an LM head or none."""

    architecture: str
    dtype: str
    everything: bool = False
    aligned: bool = True
    sparse: bool = False  # the kernels that grad_tol > 0 adds, alone
    library: bool = False  # the kernels that read a library's products
    entropy: bool = False  # the backward with a gradient of the entropy, alone

    def __str__(self) -> str:
        words = [self.architecture, self.dtype, "everything" if self.everything else "plain"]
        kinds = {"unaligned": not self.aligned, "sparse": self.sparse, "library": self.library, "entropy": self.entropy}
        return " ".join([*words, *(kind for kind, it_is in kinds.items() if it_is)])


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one kernel."""

    row: Row
    kernel: str
    registers: int
    spills: int  # bytes a thread writes to local memory
    shared: int  # bytes of dynamic shared memory
    instructions: dict[str, int]  # how often the machine code holds those that matter
    tma_stores: int = 0  # stores through tensor descriptors, in PTX or in machine code


class Driver:
    """What Triton asks of a GPU before it compiles, answered without one."""

    def __init__(self, architecture: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.architecture = architecture
        target = TARGETS[architecture]
        wavefront = 32 if str(target).startswith("gfx1") else 64
        self.target = GPUTarget("cuda", target, 32) if isinstance(target, int) else GPUTarget("hip", target, wavefront)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return self.architecture  # Triton's key for what it has compiled

    def get_current_stream(self, device: str) -> int:
        return 0


def all_rows() -> list[Row]:
    """Each row of the launch table, plain and with everything; fp16 is bf16's code, so one row of it."""
    from groupdpo_kernels.kernels.launch import TABLE, UNALIGNED

    names = {2: "bf16", 4: "fp32"}
    rows = [
        Row(architecture, names[itemsize], everything, aligned)
        for table, aligned in ((TABLE, True), (UNALIGNED, False))
        for architecture, itemsize in table
        for everything in (False, True)
    ]
    sparse = [
        Row(architecture, "bf16", everything, sparse=True)
        for architecture in ("sm_80", "sm_90", "sm_100", "gfx942")
        for everything in (False, True)
    ]
    library = [Row("sm_90", "bf16", everything, library=True) for everything in (False, True)]
    entropy = [
        Row(architecture, dtype, everything, entropy=True)
        for architecture, dtype in (*((row.architecture, "bf16") for row in sparse[::2]), ("sm_90", "fp32"))
        for everything in (False, True)
    ]
    return [*rows, Row("sm_90", "fp16"), *sparse, Row("sm_90", "fp32", True, sparse=True), *library, *entropy]


@contextlib.contextmanager
def as_on(
    architecture: str, build: bool = True, kernels: Sequence[str] | None = None
) -> Iterator[list[tuple[str, Any]]]:
    """Within it a launch compiles for `architecture` and stops there; with `kernels`, of these alone. Yields the
    growing list of compilations: the kernel's name, what was compiled. Without `build` only the specialisation's key is
    made.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from groupdpo_kernels.kernels import launch

    compilations: list[tuple[str, Any]] = []
    compile_kernel, run = JITFunction._do_compile, JITFunction.run
    functions = set()

    def do_compile(self: Any, key: Any, signature: Any, device: Any, *rest: Any) -> Any:
        kernel = compile_kernel(self, key, signature, device, *rest) if build else key
        self.device_caches[device][0][key] = kernel
        compilations.append((self.fn.__name__, kernel))
        return kernel

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if kernels is not None and self.fn.__name__ not in kernels:
            return None
        if self not in functions:
            functions.add(self)
            self.device_caches.clear()
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    properties = types.SimpleNamespace(multi_processor_count=132)
    with (
        mock.patch.object(driver, "_active", Driver(architecture)),
        mock.patch.object(JITFunction, "run", warm_up),
        mock.patch.object(JITFunction, "_do_compile", do_compile),
        mock.patch.object(launch, "architecture", lambda device: architecture),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device: properties),
    ):
        try:
            yield compilations
        finally:
            for function in functions:
                function.device_caches.clear()


def launch_all(row: Row, T: int = 8192, D: int = 4096, V: int = 128256, workspace_bytes: int = 2**28) -> None:
    """Forward and backward of an LM head on meta tensors."""
    from groupdpo_kernels.kernels.frozen_head import frozen_head
    from groupdpo_kernels.kernels.linear_logps_backward import linear_logps_backward
    from groupdpo_kernels.kernels.linear_logps_forward import linear_logps_forward
    from groupdpo_kernels.kernels.sparse_backward import sparse_backward
    from groupdpo_kernels.kernels.sparse_forward import sparse_forward

    def meta(*shape: int, dtype: torch.dtype = DTYPES[row.dtype]) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    D, R = D if row.aligned else D + 1, 16
    head = head_of(meta(T, D), meta(V, D), *((meta(V), meta(T, R), meta(V, R)) if row.everything else ()))
    targets = meta(T, dtype=torch.int64)
    lse, *rowwise = (meta(T, dtype=dtype) for dtype in (torch.float64, *[torch.float32] * 3))
    options = HeadOptions(softcap=30.0 if row.everything else None, workspace_bytes=workspace_bytes)
    if row.sparse:
        _, found = sparse_forward(head, targets, options, 1e-4, min(T, 256), seed=2**40)  # the most that is launched
        needs = Needs(True, True, *(row.everything,) * 3)
        sparse_backward(head, targets, targets > 0, found, *rowwise[:2], options, needs)
        return
    linear_logps_forward(head, targets, options, row.everything)
    frozen_head(head, targets, options)
    rows = RowGradients(*rowwise[: 3 if row.entropy else 2])
    # The mass is wanted where the lse is known, which is where no statistics are asked for.
    needs = Needs(True, True, *(row.everything,) * 3, row.everything and not row.entropy)
    linear_logps_backward(head, targets, lse, rows, options, needs)


def compile_row(row: Row) -> list[Compiled]:
    """Compile every kernel that the launchers launch for a row."""
    from triton import knobs

    from groupdpo_kernels.kernels import launch

    kernels = SPARSE_KERNELS if row.sparse else TILE_KERNELS if row.library else None
    kernels = ("linear_logps_bwd_kernel",) if row.entropy else kernels
    with knobs.compilation.scope(), mock.patch.object(launch, "LIBRARY", row.library):
        knobs.compilation.disable_line_info = True
        with as_on(row.architecture, kernels=kernels) as compilations:
            launch_all(row)
        return describe(row, compilations)


def compile_rows(rows: Sequence[Row]) -> list[Compiled]:
    """compile_row over processes of their own."""
    with ProcessPoolExecutor(min(len(rows), os.cpu_count() or 1), mp_context=CONTEXT) as pool:
        return [kernel for kernels in pool.map(compile_row, rows) for kernel in kernels]


# From shared memory to a tensor in global memory, as it is or added to what is there.
TMA_STORE = re.compile(r"cp\.(?:reduce\.)?async\.bulk\.tensor\.\S*\.global\.shared")
# Those that hold tiles of a head in shared memory.
TILE_KERNELS = ("frozen_head_fwd_kernel", "linear_logps_bwd_kernel", "linear_logps_fwd_kernel")


@contextlib.contextmanager
def front_end_alone() -> Iterator[None]:
    """Within it a compilation for NVIDIA ends where shared memory has been laid out: no code is made."""
    from triton.backends.nvidia import compiler

    class LaidOut(Exception):
        pass

    make_llir = compiler.CUDABackend.make_llir

    def stop(passes: Any, *_: Any) -> None:
        raise LaidOut(passes)

    def lay_out(self: Any, source: Any, metadata: dict[str, Any], *rest: Any) -> str:
        try:
            make_llir(self, source, metadata, *rest)
        except LaidOut as laid_out:
            laid_out.args[0].run(source, "make_llir")
        metadata.update(shared=source.get_int_attr("ttg.shared"), name="not assembled")
        return ""

    with (
        mock.patch.object(compiler.nvidia.passes.ttgpuir, "add_to_llvmir", stop),
        mock.patch.object(compiler.CUDABackend, "make_llir", lay_out),
        mock.patch.object(compiler.CUDABackend, "make_ptx", lambda *_: ""),
        mock.patch.object(compiler.CUDABackend, "make_cubin", lambda *_: b""),
    ):
        yield


def shared_memory(architecture: str, case: Case) -> dict[str, int]:
    """Bytes of shared memory that each of TILE_KERNELS asks for in the forward, the backward and the frozen head's
    forward of a case, on meta tensors.
    """
    from triton import knobs

    from groupdpo_kernels.kernels.frozen_head import frozen_head
    from groupdpo_kernels.kernels.linear_logps_backward import linear_logps_backward
    from groupdpo_kernels.kernels.linear_logps_forward import linear_logps_forward

    def meta(*shape: int, dtype: torch.dtype = case.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    T, D, V, R = case.T, case.D, case.V, case.R
    head = head_of(meta(T, D), meta(V, D), meta(V) if case.bias else None, meta(T, R), meta(V, R))
    targets, options = meta(T, dtype=torch.int64), case.options
    rows = RowGradients(*(meta(T, dtype=torch.float32) for _ in range(3 if case.entropy else 2)))
    needs = Needs(True, True, case.bias, R > 0, R > 0, True)
    with knobs.cache.scope(), front_end_alone():
        knobs.cache.dir += "/front_end_alone"  # no launch may find what was not assembled
        with as_on(architecture, kernels=TILE_KERNELS) as compilations:
            linear_logps_forward(head, targets, options, True)
            frozen_head(head, targets, options)
            linear_logps_backward(head, targets, meta(T, dtype=torch.float64), rows, options, needs)
    found: dict[str, int] = {}
    for name, kernel in compilations:
        found[name] = max(found.get(name, 0), kernel.metadata.shared)
    return found


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler's output has no {pattern!r}: {text[:400]}")
    return int(found.group(1))


def describe(row: Row, compilations: Sequence[tuple[str, Any]]) -> list[Compiled]:
    """What was compiled for a row: the names of kernels, and what the compiler made of them."""
    disassemble(kernel for _, kernel in compilations if "cubin" in kernel.asm)
    return [_described(row, name, kernel) for name, kernel in compilations]


def _described(row: Row, name: str, kernel: Any) -> Compiled:
    shared = kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        used, spilled = (number(rf"\.{field}:\s+(\d+)", text) for field in ("vgpr_count", "vgpr_spill_count"))
        return Compiled(row, name, used, 4 * spilled, shared, {"MFMA": text.count("v_mfma")})
    names = ("HGMMA", "HMMA", "UTCHMMA", "UTMALDG", "LDGSTS")
    counts = {op: machine_code(kernel).count(f" {op}") for op in names}
    instructions = {op: n for op, n in counts.items() if n}
    return Compiled(row, name, registers(kernel), spills(kernel), shared, instructions, tma_stores(kernel))


def registers(kernel: Any) -> int:
    """Registers of a thread."""
    return number(rf"Function {kernel.metadata.name}:\s+REG:(\d+)", machine_code(kernel))


def spills(kernel: Any) -> int:
    """Bytes that the stores of a thread to local memory write, each counted once, as the assembler counts them."""
    stores = re.findall(r"\bSTL(?:\.(64|128))?\s", machine_code(kernel))
    return sum(int(bits or 32) // 8 for bits in stores)


def tma_stores(kernel: Any) -> int:
    """Stores through tensor descriptors, in PTX and in machine code."""
    return len(TMA_STORE.findall(kernel.asm["ptx"])) + len(re.findall(r"\bUTMA(?:STG|REDG)", machine_code(kernel)))


def machine_code(kernel: Any) -> str:
    """Use of resources and SASS, by the tools that come with Triton."""
    disassemble([kernel])
    return _read(_cache_of(kernel).get_file("disassembled"))


@functools.lru_cache(maxsize=1)  # a kernel is read for its registers, its instructions and its stores
def _read(path: str) -> str:
    return Path(path).read_text()


def _cache_of(kernel: Any) -> Any:
    import triton
    from triton.runtime.cache import get_cache_manager

    return get_cache_manager(hashlib.sha256(triton.__version__.encode() + kernel.asm["cubin"]).hexdigest())


def disassemble(kernels: Iterable[Any]) -> None:
    """Puts the machine code of kernels into Triton's cache, beside them.

    The disassembler takes 0.4 s to start, as long as the compilation of a small kernel, so it is given the code of all
    kernels of an architecture in one piece.
    """
    missing: dict[int, list[Any]] = {}  # {architecture: its kernels}
    for kernel in kernels:
        if _cache_of(kernel).get_file("disassembled") is None:
            missing.setdefault(kernel.metadata.target.arch, []).append(kernel)
    for architecture, some in missing.items():
        codes = [_code_in(kernel.asm["cubin"]) for kernel in some]
        name = f"SM{architecture}{'a' if architecture >= 90 else ''}"
        listing = _run_tool("nvdisasm", b"".join(codes), "-ndf", "--binary", name)
        lines = re.findall(r"^ +/\*[0-9a-f]{4,}\*/.*", listing, re.MULTILINE)
        if 16 * len(lines) != sum(map(len, codes)):  # 16 bytes an instruction
            raise RuntimeError(f"the disassembler found {len(lines)} instructions: {listing[:400]}")
        at = 0
        for kernel, code in zip(some, codes):
            own = lines[at : at + len(code) // 16]
            at += len(own)
            text = "\n".join([_run_tool("cuobjdump", kernel.asm["cubin"], "-res-usage"), *own])
            _cache_of(kernel).put(text, "disassembled", binary=False)


def _run_tool(name: str, data: bytes, *options: str) -> str:
    import triton

    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        command = [Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _code_in(cubin: bytes) -> bytes:
    """The instructions of the functions in a cubin, which is an ELF file with a section for each of them."""
    (first,) = struct.unpack_from("<Q", cubin, 0x28)
    size, n, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, first + i * size) for i in range(n)]
    found = []
    for name, _, _, _, at, length in sections:
        if cubin[sections[names][4] + name :].startswith(b".text."):
            found.append(cubin[at : at + length])
    return b"".join(found)


def worst(kernels: Sequence[Compiled]) -> list[Compiled]:
    """One entry a row and kernel: a kernel compiled for several shapes of input counts with its largest figures."""
    found: dict[tuple[Row, str], Compiled] = {}
    for k in kernels:
        old = found.get((k.row, k.kernel), k)
        *figures, stores = (
            max(getattr(old, field), getattr(k, field)) for field in ("registers", "spills", "shared", "tma_stores")
        )
        found[k.row, k.kernel] = Compiled(k.row, k.kernel, *figures, k.instructions, stores)
    return list(found.values())


def table(kernels: Sequence[Compiled]) -> str:
    lines = [f"{'row':34} {'kernel':24} registers  spills  shared  instructions"]
    for k in worst(kernels):
        counts = " ".join(f"{op} {n}" for op, n in k.instructions.items())
        lines.append(f"{k.row!s:34} {k.kernel:24} {k.registers:9} {k.spills:7} {k.shared:7}  {counts}")
    return "\n".join(lines)


def budgets(kernels: Sequence[Compiled]) -> dict[str, dict[str, tuple[int, int, int]]]:
    """What budgets/ holds of a Triton version: registers with a margin of 8, spills rounded up to 64."""
    found: dict[str, dict[str, tuple[int, int, int]]] = {str(k.row): {} for k in kernels}
    for k in worst(kernels):
        registers = max(k.registers, min(255, k.registers + 8))  # on AMD a thread may have more than 255
        budget = registers, -(-k.spills // 64) * 64, k.shared
        if any(most > default for most, default in zip(budget, DEFAULT_BUDGET)):
            found[str(k.row)][k.kernel] = budget
    return found


if __name__ == "__main__":
    import triton

    words = [word for word in sys.argv[1:] if word != "--budgets"]
    compiled = compile_rows([row for row in all_rows() if all(word in str(row).split() for word in words)])
    print(f"triton {triton.__version__}")
    if "--budgets" in sys.argv:  # of all rows
        print(write(".".join(triton.__version__.split(".")[:2]), budgets(compiled)))
    else:
        print(table(compiled))
