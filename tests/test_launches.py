"""What the launchers of the Triton kernels decide: how products are summed, which device is known, what is launched."""

from __future__ import annotations

import contextlib
import threading
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from test_workspace import launching_nothing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from groupdpo_kernels import linear_logps
from groupdpo_kernels.kernels import gemm, launch, row_limited_gemm
from groupdpo_kernels.kernels.frozen_head import frozen_head, rescale_sums_kernel
from groupdpo_kernels.kernels.linear_logps_backward import linear_logps_backward
from groupdpo_kernels.reference import HeadOptions, RowGradients, head_of
from groupdpo_kernels.testing import CASES, make_inputs, triton_on_cpu

BY_NAME = {case.name: case for case in CASES}
SETTINGS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


def settings() -> list[bool]:
    return [getattr(torch.backends.cuda.matmul, name) for name in SETTINGS]


@pytest.fixture
def one_allowed() -> Iterator[None]:
    """Of bf16 and fp16 the first may add up in 16 bits, the second may not: both must be there again afterwards."""
    before = settings()
    for name, value in zip(SETTINGS, (True, False)):
        setattr(torch.backends.cuda.matmul, name, value)
    yield
    for name, value in zip(SETTINGS, before):
        setattr(torch.backends.cuda.matmul, name, value)


@pytest.mark.usefixtures("one_allowed")
def test_a_gradient_of_16_bits_is_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS may split the sum over tokens and add the parts in bf16, unless it is told not to."""
    seen = []
    mm = torch.mm

    def watched(a: Tensor, b: Tensor, **named: Any) -> Tensor:
        if "out" in named:
            seen.append((named["out"].dtype, *settings()))
        return mm(a, b, **named)

    monkeypatch.setattr(torch, "mm", watched)
    inputs = make_inputs(BY_NAME["ragged_bf16"])
    with triton_on_cpu():
        linear_logps(inputs.hidden, inputs.weight, inputs.targets, impl="triton").sum().backward()
    assert seen == [(torch.bfloat16, False, False)]
    assert settings() == [True, False]


@pytest.mark.usefixtures("one_allowed")
def test_the_setting_is_back_after_the_last_of_several_threads() -> None:
    """Were each thread to put back what it had found, the second would find and leave what the first had set."""
    inside, done, after = threading.Event(), threading.Event(), []

    def first() -> None:
        with gemm._float32_sums():
            inside.set()
            done.wait()
        after.append(settings())

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with gemm._float32_sums():
        done.set()
        thread.join()
        assert settings() == [False, False] and after == [[False, False]]
    assert settings() == [True, False]


class Calls(TorchDispatchMode):
    """The names of the operators that run on tensors of at least two dimensions while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].dim() > 1:
            self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["ragged_bf16", "everything_fp16"])
def test_no_block_is_rounded_before_it_is_added_on_amd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm's library has no float32 output for 16-bit inputs: our own GEMMs take its place, with float32 sums."""
    case = BY_NAME[name]
    inputs = make_inputs(case)
    lse = torch.full(inputs.targets.shape, 10.0, dtype=torch.float64)
    rows = RowGradients(*(torch.rand(inputs.targets.shape) for _ in range(3)))

    def run() -> list[Tensor]:
        *_, d_hidden, d_low_rank_hidden = frozen_head(inputs.head, inputs.targets, case.options)
        gradients = linear_logps_backward(inputs.head, inputs.targets, lse, rows, case.options, inputs.needs)
        return [d_hidden, d_low_rank_hidden, *(x for x in gradients if x is not None)]

    with triton_on_cpu():
        wanted = run()
        monkeypatch.setattr(torch.version, "hip", "6.4")
        with Calls() as calls:
            found = run()
    assert calls.names["mm"] == calls.names["addmm"] == calls.names["addmm_"] == 0
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(case.dtype).eps, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "known"),
    [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx950", "gfx950"), ("gfx1201", "gfx1201"), ("gfx1030", None)],
)
def test_an_amd_gpu_goes_by_its_own_name(name: str, known: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = types.SimpleNamespace(gcnArchName=name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = torch.device("cuda", 0)
    assert launch.architecture(device) == known
    reasons = launch.device_why_not("hidden", device)
    assert (reasons == []) == (known is not None)
    assert known or "the GPU is gfx1030: the Triton kernels have launch shapes for gfx1100, gfx1201" in reasons[0]


def test_float32_is_rounded_to_tf32_only_where_matrix_units_take_it() -> None:
    assert {name for (name, _), shape in launch.TABLE.items() if shape.tf32 and name.startswith("gfx")} == {"gfx942"}
    try:
        torch.set_float32_matmul_precision("high")
        found = {name: launch.precision(torch.float32, launch.TABLE[name, 4]) for name in ("sm_90", "gfx950")}
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found == {"sm_90": "tf32", "gfx950": "ieee"}


def test_offsets_into_a_large_transposed_head() -> None:
    """D V > 2^31: a factor whose columns are far apart. Only the pages that are used exist."""
    apart, N, K = 2**27, 18, 5
    storage = torch.empty((N - 1) * apart + K, dtype=torch.bfloat16)
    b = storage.as_strided((K, N), (1, apart))
    b.copy_(torch.arange(K * N).view(K, N))
    a = torch.zeros(3, 256, dtype=torch.bfloat16)
    a[:, :K] = torch.tensor([[1.0, 0, 0, 0, 2], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0]])
    out, count = torch.ones(3, N), torch.tensor([2], dtype=torch.int32)
    with triton_on_cpu():
        assert launch.interpreting is not None
        row_limited_gemm.add_rows(out, a[:, :K], b, count, 0, launch.interpreting)
    wanted = torch.ones(3, N)
    wanted[:2] += a[:2, :K].float() @ b.float()
    assert torch.equal(out, wanted)


@contextlib.contextmanager
def launches() -> Iterator[list[tuple[str, int]]]:
    """The growing list of what is launched within it: kernel, programs. To be left before the interpreter is, which
    puts back what it has found.
    """
    found: list[tuple[str, int]] = []
    run = JITFunction.run

    def watched(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        found.append((self.fn.__name__, grid[0]))
        return run(self, *args, grid=grid, warmup=warmup, **named)

    with mock.patch.object(JITFunction, "run", watched):
        yield found


def test_pairs_to_visit_are_no_programs_of_their_own() -> None:
    """A row of 128256 entries has 501 tiles, of which a few hold candidates: a grid over all pairs would be 64,128
    programs for 8192 rows, nearly all with nothing to do.
    """
    from groupdpo_kernels.kernels.sparse_forward import sparse_forward

    with launching_nothing(), launches() as found:
        head = head_of(torch.empty(8192, 64, device="meta"), torch.empty(128256, 64, device="meta"))
        sparse_forward(head, torch.empty(8192, dtype=torch.int64, device="meta"), HeadOptions(), 1e-4, 64)
    assert {programs for name, programs in found if name == "visit_kernel"} == {3}  # the interpreter's processors


def test_no_pass_over_all_sums_of_a_frozen_head() -> None:
    """Most rows meet their maximum in one of the first blocks: from then on their sums are added to, not rescaled."""
    case = BY_NAME["tiny_workspace"]
    inputs = make_inputs(case)
    with triton_on_cpu(), launches() as found, Calls() as calls:
        frozen_head(inputs.head, inputs.targets, case.options)
    assert sum(name == "rescale_sums_kernel" for name, *_ in found) > 1
    assert calls.names["mul_"] == 0


def test_a_row_that_has_not_moved_keeps_its_sums() -> None:
    """Ignored rows, which come last, and rows of the factor 1."""
    expected, rescale = torch.randn(5, 1100), torch.tensor([1.0, 0.5, 0.0, 1.0, 0.25])
    before = expected.clone()
    with triton_on_cpu():
        rescale_sums_kernel[(3,)](expected, rescale, torch.tensor([3], dtype=torch.int32), 1, 3, 1100, BLOCK_N=1024)
    assert torch.equal(expected, before * torch.tensor([1, 0.5, 0, 1, 1])[:, None])
