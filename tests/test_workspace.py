"""Memory, counted tensor by tensor inside the ops: bounded by the budget whatever T and V, nothing for a gradient that
is not needed, never the logits. The Triton launchers are counted at full size too, on the meta device: no memory, no
arithmetic, and nothing that could be read back."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from groupdpo_kernels import linear_logp_stats, linear_logps
from groupdpo_kernels.lm_head import ops
from groupdpo_kernels.testing import Case, Inputs, make_inputs, triton_on_cpu

IMPLS = ("reference", "descriptors", "pointers")


class Allocations(TorchDispatchMode):
    """The bytes of tensors made while it is on: live now, at the peak, and each one. It looks inside our own ops."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.made: list[Tensor] = []  # on the meta device: shapes and dtypes, no memory
        self.known: dict[int, int] = {}
        self.inside = {op._opoverload: op._init_fn for op in (ops._linear_logps_forward, ops._linear_logps_backward)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self.track(x, 0)  # it was there before
        if func in self.inside:
            with self:
                return self.inside[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.track(x, x.untyped_storage().nbytes())
        return out

    def track(self, x: Tensor, size: int) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        self.known[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        if size:
            self.made.append(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"))
        weakref.finalize(storage, self.release, key)

    def release(self, key: int) -> None:
        self.live -= self.known.pop(key)


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name to pass as impl=, within the interpreter where it takes that."""
    if request.param == "reference":
        yield "reference"
        return
    with triton_on_cpu(BLOCK_T=128, BLOCK_V=256, BLOCK_D=64, tma=request.param == "descriptors"):
        yield "triton"


def step(
    case: Case, impl: str, *frozen: str, outputs: tuple[str, ...] = ("lse",), inputs: Inputs | None = None
) -> tuple[Allocations, Inputs]:
    """A forward and a backward, counted."""
    inputs = inputs or make_inputs(case)
    for name, leaf in inputs.leaves.items():
        leaf.requires_grad_(name not in frozen)
    upstream = inputs.d_token_logps.float()
    with Allocations() as counted:
        stats = linear_logp_stats(
            inputs.hidden, inputs.weight, inputs.targets, inputs.bias, low_rank=inputs.low_rank, outputs=outputs,
            softcap=case.softcap, workspace_bytes=case.workspace_bytes, impl=impl,
        )  # fmt: skip
        if inputs.hidden.requires_grad or inputs.weight.requires_grad:
            values = [x for x in (stats.token_logps, stats.entropy) if x is not None]
            torch.autograd.backward(values, [upstream] * len(values))
    return counted, inputs


def test_the_count_is_right() -> None:
    x = torch.zeros(1000)
    with Allocations() as counted:
        y = x + 1
        z = y[:10] * 2
        del y
        w = x.view(10, 100)
    assert (counted.peak, counted.live) == (4040, 40) and len(counted.made) == 2
    del z, w
    assert counted.live == 0


def within_budget(counted: Allocations, inputs: Inputs, case: Case) -> None:
    """Beyond the gradients: one float32 (T, D) buffer, the workspace, and a few numbers a row."""
    results = sum(x.numel() * x.element_size() for x in inputs.leaves.values() if x.requires_grad)
    rows = 4 * case.T * (case.D + 2 * case.R) + 128 * case.T
    assert counted.peak <= results + rows + case.workspace_bytes


# T, V, workspace: many rows, many columns, both.
SIZES = [(700, 300, 2**20), (60, 9000, 2**20), (300, 3000, 2**19), (300, 3000, 2**22)]


@pytest.mark.parametrize("outputs", [("lse",), ("lse", "entropy")], ids=["bare", "stats"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_peak_of_the_reference(size: tuple[int, int, int], outputs: tuple[str, ...]) -> None:
    T, V, workspace = size
    case = Case("bound", T, 48, V, "", bias=True, R=4, softcap=20.0, workspace_bytes=workspace)
    within_budget(*step(case, "reference", outputs=outputs), case)


@pytest.fixture(params=["reference", "triton"])
def host_only(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name to pass as impl=, with kernels that do nothing: the interpreter itself keeps references for a while."""
    with launching_nothing():
        yield request.param


@contextlib.contextmanager
def launching_nothing(tma: bool = True, library: bool = False) -> Iterator[None]:
    """The launchers with the tile of an H200 and no device: kernels allocate nothing, so the count is that of a GPU."""
    tile = triton_on_cpu(BLOCK_T=128, BLOCK_V=256, BLOCK_D=64, tma=tma, library=library)
    with tile, pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda self, *args, grid, warmup, **kwargs: None)
        yield


# Llama 3 8B, Gemma 2 2B, a packed batch, one row; and budgets from small to large.
FULL_SIZES = [
    Case("llama3_8b", 8192, 4096, 128256, ""),
    Case("gemma2_2b", 8192, 2304, 256000, "", bias=True, softcap=30.0),
    Case("packed", 70000, 2048, 151936, "", R=16),
    Case("one_row", 1, 4096, 128256, "", bias=True),
    Case("small_budget", 8192, 4096, 128256, "", bias=True, workspace_bytes=2**25),
    Case("smaller_budget", 8192, 4096, 128256, "", bias=True, R=8, workspace_bytes=2**24),
    Case("smallest_budget", 1000, 64, 9000, "", bias=True, workspace_bytes=2**18),
    Case("large_budget", 8192, 4096, 128256, "", bias=True, workspace_bytes=2**32),
]


def on_meta(case: Case) -> Inputs:
    def leaf(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", requires_grad=True)

    pair = (leaf(case.T, case.R), leaf(case.V, case.R)) if case.R else None
    rows = [torch.empty(case.T, dtype=dtype, device="meta") for dtype in (torch.int64, torch.float64, torch.float64)]
    bias = leaf(case.V) if case.bias else None
    return Inputs(leaf(case.T, case.D), leaf(case.V, case.D), rows[0], bias, pair, *rows[1:])


@pytest.mark.parametrize("frozen", [(), ("weight", "bias", "low_rank_weight")], ids=["trained_head", "frozen_head"])
@pytest.mark.parametrize("outputs", [("lse",), ("lse", "entropy")], ids=["bare", "stats"])
@pytest.mark.parametrize("case", FULL_SIZES, ids=lambda case: case.name)
def test_the_peak_of_the_launchers(case: Case, outputs: tuple[str, ...], frozen: tuple[str, ...]) -> None:
    with launching_nothing():
        within_budget(*step(case, "triton", *frozen, outputs=outputs, inputs=on_meta(case)), case)


@pytest.mark.parametrize("frozen", [(), ("weight", "bias", "low_rank_weight")], ids=["trained_head", "frozen_head"])
@pytest.mark.parametrize("case", FULL_SIZES[:2] + FULL_SIZES[3:4] + FULL_SIZES[-2:], ids=lambda case: case.name)
def test_the_peak_where_a_library_multiplies(case: Case, frozen: tuple[str, ...]) -> None:
    with launching_nothing(library=True):
        within_budget(*step(case, "triton", *frozen, outputs=("lse", "entropy"), inputs=on_meta(case)), case)


def test_the_target_of_the_documentation() -> None:
    """At T = 8192 and V = 128256 the memory beyond gradients and one float32 (T, D) buffer is below 300 MiB."""
    case = FULL_SIZES[0]
    with launching_nothing():
        counted, inputs = step(case, "triton", inputs=on_meta(case))
    gradients = sum(x.numel() * x.element_size() for x in inputs.leaves.values())
    assert counted.peak - gradients - 4 * case.T * case.D < 300 * 2**20


def test_memory_does_not_depend_on_the_vocabulary() -> None:
    """With the head frozen, eight times the vocabulary is no more. (A sixteenth of the budget is for roundings of the
    block's shape.)"""
    for impl in ("reference", "triton"):
        peaks = []
        for V in (2000, 16000):
            case = Case("wide", 100, 48, V, "", workspace_bytes=2**20)
            with launching_nothing():
                counted, _ = step(case, impl, "weight", inputs=make_inputs(case))
            peaks.append(counted.peak)
        assert peaks[1] <= peaks[0] + 2**16


def test_no_logits(impl: str) -> None:
    """Nothing of T x V numbers exists, in any shape, for a forward alone or with a backward."""
    case = Case("logits", 200, 16, 1500, "", bias=True, workspace_bytes=2**18)
    for frozen in ((), ("hidden", "weight", "bias")):
        counted, _ = step(case, impl, *frozen, outputs=("lse", "entropy", "is_top1"))
        assert max(x.numel() for x in counted.made) < case.T * case.V // 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_head_costs_nothing(dtype: torch.dtype, impl: str) -> None:
    """No (V, D) tensor, in any dtype; with a trained head exactly one, in the dtype of the weight."""
    case = Case("frozen_head", 40, 128, 1500, "", dtype, workspace_bytes=2**17)
    counted, inputs = step(case, impl, "weight")
    assert max(x.numel() for x in counted.made) < case.V * case.D // 4
    assert inputs.hidden.grad is not None and inputs.weight.grad is None
    counted, inputs = step(case, impl)
    heads = [x for x in counted.made if x.numel() >= case.V * case.D]
    assert [x.dtype for x in heads] == [dtype] and inputs.weight.grad is not None


def test_a_frozen_trunk_costs_nothing(impl: str) -> None:
    """No float32 (T, D) buffer for the gradient of hidden. (A Triton launcher has a compact copy of hidden itself.)"""
    case = Case("frozen_trunk", 600, 64, 200, "", torch.bfloat16, workspace_bytes=2**16, ignored="none")
    counted, inputs = step(case, impl, "hidden")
    rows = [x for x in counted.made if x.numel() >= case.T * case.D]
    assert all(x.dtype == torch.bfloat16 for x in rows) and len(rows) <= (0 if impl == "reference" else 2)
    assert inputs.hidden.grad is None and inputs.weight.grad is not None


def test_a_pass_without_gradients_keeps_nothing(host_only: str) -> None:
    """After a reference model's pass the log-probabilities are all that lives."""
    inputs = make_inputs(Case("no_grad", 200, 32, 600, ""))
    with Allocations() as counted, torch.no_grad():
        logps = linear_logps(inputs.hidden, inputs.weight, inputs.targets, impl=host_only)
    assert counted.live == logps.untyped_storage().nbytes()


def test_the_graph_keeps_the_inputs_and_two_numbers_a_row(host_only: str) -> None:
    """token_logps in float32, which the caller has anyway, and the lse in float64."""
    inputs = make_inputs(Case("graph", 200, 32, 600, ""))
    with Allocations() as counted:
        logps = linear_logps(inputs.hidden, inputs.weight, inputs.targets, impl=host_only)
    assert logps.requires_grad and counted.live <= 3 * logps.untyped_storage().nbytes()
