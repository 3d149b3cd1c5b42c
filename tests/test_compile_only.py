"""Compile-only gate: kernels build for every architecture without a GPU, within budgets of registers, spills and shared
memory that are written per Triton version (tests/budgets/), and one compilation serves every batch.

The gate compiles the rows of GATE, the others take minutes: `python tests/compile_only.py` compiles and prints all.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton
from compile_budgets import BUDGETS, SHARED_LIMIT
from compile_only import (
    DEFAULT_BUDGET,
    SPARSE_KERNELS,
    TILE_KERNELS,
    Compiled,
    Row,
    all_rows,
    as_on,
    compile_rows,
    describe,
    launch_all,
    number,
    registers,
    shared_memory,
    spills,
    tma_stores,
    worst,
)
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from groupdpo_kernels.testing import CASES, Case

VERSION = ".".join(triton.__version__.split(".")[:2])
GATE = [
    Row("sm_90", "bf16", everything=True),
    Row("sm_90", "bf16"),
    Row("sm_100", "bf16", everything=True),
    Row("sm_80", "bf16", everything=True),
    Row("gfx942", "bf16", everything=True),
    Row("sm_90", "bf16", sparse=True),
    Row("sm_80", "bf16", everything=True, sparse=True),
    Row("gfx942", "bf16", everything=True, sparse=True),
    Row("sm_90", "bf16", entropy=True),
]
KERNELS = [
    "advance_kernel",
    "combine_kernel",
    "derivative_kernel",
    "frozen_head_fwd_kernel",
    "gather_rows_kernel",
    "linear_logps_bwd_kernel",
    "linear_logps_fwd_kernel",
    "rescale_block_kernel",
    "rescale_sums_kernel",
]


@pytest.fixture(scope="module")
def compiled() -> dict[Row, dict[str, Compiled]]:
    kernels = worst(compile_rows(GATE))
    return {row: {k.kernel: k for k in kernels if k.row == row} for row in GATE}


@pytest.mark.parametrize("row", GATE, ids=str)
def test_kernels_build_within_their_budgets(row: Row, compiled: dict[Row, dict[str, Compiled]]) -> None:
    backward = ["linear_logps_bwd_kernel"]
    assert sorted(compiled[row]) == sorted(SPARSE_KERNELS if row.sparse else backward if row.entropy else KERNELS)
    for name, kernel in compiled[row].items():
        most, spilled, shared = BUDGETS[VERSION][str(row)].get(name, DEFAULT_BUDGET)
        assert kernel.registers <= most, kernel
        assert kernel.spills <= spilled, kernel
        assert kernel.shared <= min(shared, SHARED_LIMIT[row.architecture]), kernel


@pytest.mark.parametrize("name", [*TILE_KERNELS, "visit_kernel", "row_limited_gemm_kernel"])
def test_products_use_the_matrix_units(name: str, compiled: dict[Row, dict[str, Compiled]]) -> None:
    for row, kernels in compiled.items():
        if row.dtype == "bf16" and name in kernels:
            unit = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}[row.architecture]
            assert kernels[name].instructions.get(unit, 0) > 0, kernels[name]
            descriptors = "LDGSTS" if name in ("visit_kernel", "row_limited_gemm_kernel") else "UTMALDG"
            load = {"sm_80": "LDGSTS", "sm_90": descriptors, "sm_100": descriptors}.get(row.architecture)
            assert load is None or kernels[name].instructions.get(load, 0) > 0, kernels[name]


def test_no_store_goes_through_a_tensor_descriptor(compiled: dict[Row, dict[str, Compiled]]) -> None:
    """Such a store has overwritten what lies past a ragged edge (triton-lang/triton#11583). Loads use descriptors."""
    assert not [kernel for kernels in compiled.values() for kernel in kernels.values() if kernel.tma_stores]


@triton.jit
def copy_kernel(source, target):
    target.store([0, 0], source.load([0, 0]))


def test_a_store_through_a_tensor_descriptor_would_be_seen() -> None:
    with as_on("sm_90") as compilations:
        block = TensorDescriptor.from_tensor(torch.empty(64, 64, dtype=torch.bfloat16, device="meta"), [64, 64])
        copy_kernel[(1,)](block, block)
    assert tma_stores(compilations[0][1]) > 0


@triton.jit
def product_kernel(source, target):
    x = source.load([0, 0])
    target.store([0, 0], triton.language.dot(x, x).to(x.dtype))


@pytest.mark.parametrize(("architecture", "maxnreg"), [("sm_80", 40), ("sm_90", 64), ("sm_100", 255)])
def test_registers_and_spills_are_the_assemblers(
    architecture: str, maxnreg: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is read from a kernel is what the assembler's log says of it, whether it spills or not."""
    with knobs.cache.scope(), knobs.nvidia.scope(), as_on(architecture) as compilations:
        knobs.cache.dir = str(tmp_path)  # a cached kernel is not assembled
        knobs.nvidia.dump_ptxas_log = True
        block = TensorDescriptor.from_tensor(torch.empty(64, 64, dtype=torch.bfloat16, device="meta"), [64, 64])
        product_kernel[(1,)](block, block, maxnreg=maxnreg)
    log = capfd.readouterr().out
    kernel = compilations[0][1]
    assert registers(kernel) == number(r"Used (\d+) registers", log) <= maxnreg
    assert spills(kernel) == number(r"(\d+) bytes spill stores", log)
    assert (spills(kernel) > 0) == (architecture == "sm_80")


RANKS = [
    Case(f"D {D}, rank {R}", 300, D, 4099, "LoRA on the head", torch.bfloat16, R=R)
    for D, ranks in ((4096, (8, 16, 32, 64, 128)), (64, (8, 128)))
    for R in ranks
]


@pytest.mark.parametrize("case", [*RANKS, *(case for case in CASES if case.R)], ids=lambda case: case.name)
def test_shared_memory_fits(case: Case) -> None:
    """A launch that asks for more than a block may have compiles without a word and fails on the first batch. These are
    the heads with a low-rank segment: all others ask for what the rows of the gate ask for.
    """
    for name, shared in shared_memory("sm_90", case).items():
        assert shared <= SHARED_LIMIT["sm_90"], name


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_100"])
def test_shared_memory_fits_elsewhere(architecture: str) -> None:
    """The head that asked for most: a hidden size of one step, and a rank of many."""
    case = Case("", 300, 32, 4099, "", torch.bfloat16, R=128)
    for name, shared in shared_memory(architecture, case).items():
        assert shared <= SHARED_LIMIT[architecture], name


@pytest.mark.parametrize("architecture", ["gfx90a", "gfx950", "gfx1100", "gfx1201"])
def test_other_gpus_of_amd(architecture: str) -> None:
    """Those whose matrix units take no tf32: a kernel that asks for it for 16-bit inputs does not compile there."""
    for dtype in ("bf16", "fp32"):
        with as_on(architecture, kernels=["row_limited_gemm_kernel"]) as compilations:
            launch_all(Row(architecture, dtype, sparse=True))
        for kernel in describe(Row(architecture, dtype), compilations):
            assert kernel.spills == 0 and kernel.shared <= SHARED_LIMIT[architecture], kernel


def test_every_row_has_a_budget() -> None:
    assert os.environ.get("TRITON_INTERPRET", "0") == "0"
    for version, budgets in BUDGETS.items():
        assert sorted(budgets) == sorted(map(str, all_rows())), version
        for row in all_rows():
            assert all(b[2] <= SHARED_LIMIT[row.architecture] for b in budgets[str(row)].values()), row
    assert VERSION in BUDGETS, f"no budgets for Triton {VERSION}: measure with `python tests/compile_only.py`"


def test_no_spills_where_it_is_trained() -> None:
    """Under Triton 3.9 a frozen head spills, and nothing else."""
    for version, budgets in BUDGETS.items():
        for row in ("sm_90 bf16 plain", "sm_90 bf16 plain sparse", "sm_90 bf16 plain entropy"):
            spilling = {name for name, (_, spilled, _) in budgets[row].items() if spilled}
            assert spilling <= ({"frozen_head_fwd_kernel"} if version == "3.9" else set()), version


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("architecture", ["sm_90", "sm_80"])
def test_one_compilation_serves_every_batch(architecture: str, everything: bool) -> None:
    """Number of rows, chunks and their starts change from batch to batch and must not make Triton compile again."""
    with as_on(architecture, build=False) as compilations:
        row = Row(architecture, "bf16", everything)
        launch_all(
            row, T=48, D=128, V=4099, workspace_bytes=2**19
        )  # several blocks: sums of a frozen head are rescaled
        first = Counter(name for name, *_ in compilations)
        assert sorted(first) == KERNELS
        assert first["linear_logps_fwd_kernel"] == first["linear_logps_bwd_kernel"] == first["combine_kernel"] == 1
        for T in (1, 2, 7, 16, 37, 1000, 4096):
            for workspace_bytes in (2**28, 2**21):
                launch_all(row, T=T, D=128, V=4099, workspace_bytes=workspace_bytes)
        assert Counter(name for name, *_ in compilations) == first


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_one_compilation_serves_every_sparse_batch(everything: bool) -> None:
    with as_on("sm_90", build=False, kernels=SPARSE_KERNELS) as compilations:
        row = Row("sm_90", "bf16", everything, sparse=True)
        launch_all(row, T=48, D=128, V=4099)
        first = Counter(name for name, *_ in compilations)
        assert sorted(first) == sorted(SPARSE_KERNELS)
        assert first["select_kernel"] == first["non_target_kernel"] == 1 and first["visit_kernel"] == 2
        for T in (1, 2, 7, 16, 37, 1000, 4096):
            launch_all(row, T=T, D=128, V=4099)
        assert Counter(name for name, *_ in compilations) == first
