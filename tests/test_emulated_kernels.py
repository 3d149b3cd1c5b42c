"""The kernels as they are compiled for a GPU, executed without one: some of CASES through every path, on the
architectures that the emulator knows. `make emulate` runs all of them, and docs/project/emulation.md has its table.
"""

from __future__ import annotations

import math
import re
import subprocess
from typing import Any

import pytest
import torch
from emulated_cases import BY_NAME, paths_of, run_case
from ptx_emulator import Findings, GlobalMemory, Program, execute, reverse, shuffled
from ptx_emulator.launch import storage
from test_csrc_cuda import NVCC, SOURCE, needs_nvcc
from weighted_rows import LENGTHS, Problem, check, make_problem

# Cases that differ in the code that is made for them; those of one line share theirs.
SM_90 = (
    "ragged_bf16",  # tensor maps, several steps over D
    "everything_bf16",  # a low-rank segment, bias and softcap
    "unaligned_bf16",  # rows that tensor maps cannot load: pointers
    *("offset_bf16", "strided_bf16"),  # one step over D, with a bias and without
    *("negative", "offset_1e2", "offset_1e4", "offset_1e6", "offset_impossible"),  # float32: no matrix units
    "entropy_bf16",  # the backward with a gradient of the entropy
)
SM_80 = ("column_bf16", "strided_bf16", "everything_bf16", "unaligned_bf16")
RUNS = [
    # Both extremes of what a GPU may do, in turn.
    pytest.param(path, name, architecture, (i + j) % 2 == 0, id=f"{architecture} {name} {path}")
    for architecture, names in (("sm_90", SM_90), ("sm_80", SM_80))
    for i, name in enumerate(names)
    for j, path in enumerate(paths_of(BY_NAME[name]))
]


@pytest.mark.parametrize(("path", "name", "architecture", "late"), RUNS)
def test_case(path: str, name: str, architecture: str, late: bool) -> None:
    emulation = run_case(path, name, architecture, late, order=range if late else reverse)
    kernel = {"trained": "linear_logps_bwd_kernel", "frozen": "frozen_head_fwd_kernel", "sparse": "visit_kernel"}[path]
    assert emulation.launches[kernel] > 0


def test_approximate_instructions_may_err_as_much_as_they_are_allowed() -> None:
    """In any order of programs."""
    run_case("trained", "ragged_bf16", "sm_90", noise=7, order=shuffled)


@pytest.mark.parametrize("name", ["mpo 1", "sigmoid 2", "plackett_luce 0"])
def test_preference(name: str) -> None:
    """Programs in reverse: whichever comes last takes the mean."""
    emulation = run_case("preference", name, "sm_90", order=reverse)
    assert emulation.launches["preference_weights_fwd_kernel"] == 3


# ----------------------------------------------------------------------------------------------- CUDA C++, through nvcc


@pytest.fixture(scope="module")
def weighted_rows_ptx(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("ptx") / "weighted_rows.ptx"
    flags = ["-std=c++17", "-O3", "-ptx", "-arch=sm_90a", "-I", str(SOURCE.parents[1])]
    subprocess.run([str(NVCC), *flags, "-o", str(out), str(SOURCE)], check=True)
    return out.read_text()


def add_rows(ptx: str, problem: Problem, vector: bool, rows_of_a_block: int, findings: Findings) -> torch.Tensor:
    """As csrc/cuda/weighted_rows.cu launches it; no result depends on the rows of a block."""
    out = problem.out.clone()
    size = out.element_size()
    # kValues of a lane: 16 bytes where it loads them at once; else as many columns, one by one.
    marks = {torch.float32: "f", torch.bfloat16: "NS_4Bf16E", torch.float16: "NS_4Fp16E"}
    mangled = rf"\.entry (\w*add_rowsI{marks[out.dtype]}Lb{int(vector)}E\w*)\("
    found = re.search(mangled, ptx)
    assert found is not None
    groups = math.ceil(out.shape[0] / rows_of_a_block)
    work = groups * math.ceil(out.shape[1] / (32 * 16 // size))
    tensors = (out, problem.source, problem.begins, problem.ends, problem.index, problem.coefficients)
    memory = GlobalMemory()
    for tensor in tensors:
        owned = storage(tensor)
        assert owned is not None
        memory.add(*owned, f"a tensor of shape {tuple(tensor.shape)}")
    arguments: list[Any] = [tensor.data_ptr() for tensor in tensors]
    arguments += [*out.shape, problem.source.stride(0), groups, work]
    execute(Program(ptx, found.group(1)), min(work, 7), arguments, memory, findings, order=reverse)
    return out


@needs_nvcc
@pytest.mark.parametrize(
    ("dtype", "n", "padding", "vector", "rows_of_a_block"),
    [
        (torch.float32, 37, 3, False, 8),
        (torch.bfloat16, 264, 0, True, 32),
        (torch.float16, 37, 0, False, 32),
    ],
    ids=str,
)
def test_weighted_rows(
    dtype: torch.dtype, n: int, padding: int, vector: bool, rows_of_a_block: int, weighted_rows_ptx: str
) -> None:
    """Short rows and long ones, loaded 16 bytes at a time and one by one."""
    findings: Findings = Findings()
    problem = make_problem(dtype, n, tuple(min(length, 520) for length in LENGTHS), padding=padding)
    check(add_rows(weighted_rows_ptx, problem, vector, rows_of_a_block, findings), problem)
    assert not findings
