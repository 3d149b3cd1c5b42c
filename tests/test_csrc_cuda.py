"""The extension's device code without a GPU: it compiles for every architecture within a budget of registers, the
built module holds it and loads on a machine without CUDA, a machine without nvcc builds the rest, and launcher and
kernel, compiled for the host, do what the specification says. On a GPU: test_gpu.py.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from weighted_rows import Problem, check, make_problem

from groupdpo_kernels.lm_head import extension

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "csrc" / "cuda" / "weighted_rows.cu"
NVCC = shutil.which(os.environ.get("CUDACXX", "nvcc"))
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc (on PATH, or CUDACXX)")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# 80 leave three blocks of 256 threads on an SM, 128 two.
REGISTERS = {"sm_80": 80, "sm_90a": 80, "sm_100": 128}


def build_info() -> dict[str, object]:
    assert not extension.extension_why_not()
    from groupdpo_kernels import _C

    return _C.build_info()


def cuobjdump() -> str | None:
    """The toolkit's, or the one in Triton's wheel."""
    if (found := shutil.which("cuobjdump")) is not None:
        return found
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    inside = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(inside) if inside.exists() else None


# ------------------------------------------------------------------------------------------------------------- the code


@needs_nvcc
@pytest.mark.parametrize("architecture", REGISTERS)
def test_device_code_within_its_budget(architecture: str, tmp_path: Path) -> None:
    """No spills, and registers that leave enough warps to cover the latency of memory."""
    cubin = tmp_path / "weighted_rows.cubin"
    flags = f"-std=c++17 -O3 -Werror all-warnings -Xptxas -v -cubin -arch={architecture}".split()
    command = [str(NVCC), *flags, "-I", str(ROOT / "csrc"), "-o", str(cubin), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    registers = [int(x) for x in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == 6, done.stderr  # three dtypes, rows aligned or not
    assert max(registers) <= REGISTERS[architecture], registers
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr) == [("0", "0")] * 6
    if (tool := cuobjdump()) is not None:
        code = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
        found = re.findall(r"LDG\.E\.128\.CONSTANT|FFMA", code)
        batches = re.findall("l+", "".join("f" if name == "FFMA" else "l" for name in found))
        assert len(batches) == 6 and set(batches) == {"l" * 8}  # three dtypes, short rows and long: no load waits


@needs_nvcc
def test_the_module_holds_every_architecture() -> None:
    """Where nvcc is, the build has found it; machine code for each and PTX for those to come."""
    assert build_info()["cuda_architectures"] == ("sm_80", "sm_90a", "sm_100", "compute_100")
    tool = cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump (of the toolkit, or in Triton's wheel)")
    from groupdpo_kernels import _C

    listed = subprocess.run([tool, "-lelf", "-lptx", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert {"sm_80", "sm_90a", "sm_100"} <= set(re.findall(r"\.(sm_\w+)\.cubin", listed))
    assert "sm_100" in re.findall(r"\.(sm_\w+)\.ptx", listed)


def test_loads_without_a_library_of_cuda() -> None:
    """The runtime is inside, and the driver is looked for at the first call: the module asks the loader for neither."""
    from groupdpo_kernels import _C

    needed = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"NEEDED.*\[(.*)\]", needed)
    assert any("torch_cpu" in name for name in libraries)
    assert not [name for name in libraries if "cuda" in name]


def test_reasons_and_errors_without_a_gpu() -> None:
    reasons = extension.cuda_extension_why_not(torch.device("cpu"))
    assert any("device is cpu" in reason for reason in reasons)
    assert bool(build_info()["cuda_architectures"]) != any("without device code" in reason for reason in reasons)
    x = torch.zeros(2, 3)
    rows, entries = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="add_weighted_rows_cuda"):
        extension.add_weighted_rows_cuda(x, x, rows, rows, entries, torch.ones(1))


def test_without_nvcc_the_rest_is_configured_and_says_so(tmp_path: Path) -> None:
    """A PATH without nvcc: nothing of CUDA is in the rules of what is built then."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("c++", "g++", "cc", "gcc", "ld", "as", "ar", "ranlib", "uname"):
        if (found := shutil.which(name)) is not None:
            (tools / name).symlink_to(found)
    beside = Path(sys.executable).parent
    cmake, ninja = (shutil.which(name, path=f"{beside}{os.pathsep}{os.environ['PATH']}") for name in ("cmake", "ninja"))
    assert cmake and ninja
    environment = {name: x for name, x in os.environ.items() if not name.startswith("CUDA")} | {"PATH": str(tools)}
    options = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]

    def configure(wish: str) -> subprocess.CompletedProcess[str]:
        command = [cmake, "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja", *options]
        command += [f"-DGROUPDPO_KERNELS_CUDA={wish}"]
        return subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    done = configure("AUTO")
    assert done.returncode == 0, done.stdout
    assert len(re.findall("no device code", done.stdout)) == 1
    rules = (tmp_path / "build" / "build.ninja").read_text()
    assert "csrc/cpu/weighted_rows.cpp" in rules and "csrc/cuda" not in rules and "CUDA_CODE" not in rules
    done = configure("ON")
    assert done.returncode != 0 and "no CUDA compiler that works" in done.stdout


# ------------------------------------------------------------------------------------------------------- the kernel


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Launcher and kernel compiled by the C++ compiler: tests/cuda_on_host/cuda_runtime.h says what that shows."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    assert compiler is not None
    here = ROOT / "tests" / "cuda_on_host"
    library = tmp_path_factory.mktemp("host") / "weighted_rows.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command = [compiler, *flags, "-I", str(here), "-I", str(ROOT / "csrc"), "-o", str(library)]
    subprocess.run([*command, str(here / "weighted_rows.cpp")], check=True)
    return ctypes.CDLL(str(library))


def run(library: ctypes.CDLL, problem: Problem) -> Tensor:
    p = problem
    out = p.out.clone()
    tensors = (out, p.source, p.begins, p.ends, p.index, p.coefficients)
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in tensors)
    sizes = (ctypes.c_int64(x) for x in (*out.shape, p.source.stride(0)))
    assert library.add_weighted_rows(DTYPES[out.dtype], *pointers, *sizes) == 0
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "padding"), [(1, 0), (37, 0), (264, 0), (264, 3), (520, 8)])
def test_kernel_on_the_host(on_host: ctypes.CDLL, dtype: torch.dtype, n: int, padding: int) -> None:
    problem = make_problem(dtype, n, padding=padding)
    check(run(on_host, problem), problem)


def test_many_rows_on_the_host(on_host: ctypes.CDLL) -> None:
    """More than 1024 blocks of 8 rows: blocks of 32. The last block has rows past the end."""
    lengths = tuple(torch.randint(3, (1031,), generator=torch.Generator().manual_seed(0)).tolist())
    problem = make_problem(torch.float32, 128 * 8, lengths)
    check(run(on_host, problem), problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ways_through_memory_give_the_same_bits(on_host: ctypes.CDLL, dtype: torch.dtype) -> None:
    problem = make_problem(dtype, 264)
    spread = torch.zeros(problem.source.shape[0], 265, dtype=dtype)[:, :264].copy_(problem.source)  # not 16 bytes
    one, other = run(on_host, problem), run(on_host, problem._replace(source=spread))
    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_an_entry_of_coefficient_zero_is_not_read(on_host: ctypes.CDLL) -> None:
    problem = make_problem(torch.float32, 8)
    problem.source[problem.index[0]] = torch.nan
    problem.coefficients[problem.index == problem.index[0]] = 0
    assert not run(on_host, problem)[problem.begins < problem.ends].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_of_every_value(on_host: ctypes.CDLL, dtype: torch.dtype) -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    # Around every representable value and every tie between two.
    x = bits.view(dtype).float()
    x = torch.where(torch.arange(2**16) % 3 == 0, x, x + (x.nan_to_num(0).abs() * 2.0**-9))
    wide, narrowed = torch.empty(2**16), torch.empty(2**16, dtype=torch.uint16)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (bits, x, wide, narrowed))
    on_host.convert(DTYPES[dtype], *pointers, ctypes.c_int64(2**16))
    assert torch.equal(wide.nan_to_num(7), bits.view(dtype).float().nan_to_num(7))
    found, right = narrowed.view(dtype), x.to(dtype)
    assert torch.equal(found.isnan(), right.isnan())
    assert torch.equal(found.nan_to_num(7), right.nan_to_num(7))
