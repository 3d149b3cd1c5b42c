"""The C++ CPU op through its raw schema: values and gradients in every case, only the gradients asked for, a bounded
workspace, the same bits twice, and rows that keep their NaN to themselves."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import groupdpo_kernels
from groupdpo_kernels import reference
from groupdpo_kernels.lm_head import ops, torch_blocks, workspace
from groupdpo_kernels.reference import Head, HeadOptions, Needs, head_of
from groupdpo_kernels.testing import CASES, Case, Inputs, Result, check_budget, error, exact, make_inputs

CAPABILITIES = ("default", "avx2", "avx512")
NEVER = ops.extension_why_not()


@pytest.fixture(autouse=True)
def extension() -> None:
    assert not NEVER, NEVER  # a failure, not a skip: what is not built is not tested


def forward(head: Head, targets: Tensor, options: HeadOptions, stats: bool = True) -> tuple[Tensor, ...]:
    o, no_cache = options, torch.empty(targets.shape[0], 0)
    op = torch.ops.groupdpo_kernels.linear_logps_forward_cpu
    return op(*head, targets, o.logit_scale, o.softcap, o.temperature, o.workspace_bytes, stats, no_cache)


def backward(
    head: Head,
    targets: Tensor,
    rowwise: list[Tensor],  # lse, then RowGradients
    options: HeadOptions,
    needs: Sequence[bool],  # the first of Needs
) -> tuple[Tensor, ...]:
    o, no_cache = options, torch.empty(targets.shape[0], 0)
    scalars = (o.logit_scale, o.softcap, o.temperature, o.workspace_bytes)
    op = torch.ops.groupdpo_kernels.linear_logps_backward_cpu
    lse, *rows = rowwise
    return op(*head, targets, lse, *reference.RowGradients(*rows), *scalars, *Needs(*needs), no_cache)[:5]


def live_rows(inputs: Inputs) -> tuple[Head, Tensor, list[Tensor], Tensor]:
    """The op's arguments from a case: ignored rows dropped, as ops.py does it. Also the index of the live rows."""
    rows = (inputs.targets.reshape(-1) != -100).nonzero()[:, 0]
    hidden, low_rank_hidden = (x.flatten(0, -2)[rows] for x in (inputs.head.hidden, inputs.head.low_rank_hidden))
    head = inputs.head._replace(hidden=hidden, low_rank_hidden=low_rank_hidden)
    given = (inputs.d_token_logps, inputs.d_lse, inputs.d_entropy)
    upstream = [x.reshape(-1)[rows].float() for x in given if x is not None]
    return head, inputs.targets.reshape(-1)[rows], upstream, rows


def drawn(T: int, D: int, V: int, dtype: torch.dtype = torch.float32, R: int = 0) -> tuple[Head, Tensor]:
    case = Case("drawn", T, D, V, "", dtype, bias=True, R=R, ignored="none")
    head, targets, _, _ = live_rows(make_inputs(case))
    return head, targets


@pytest.fixture
def widened() -> Iterator[None]:
    """bfloat16 as on a machine that has no instruction for it."""
    from groupdpo_kernels import _C

    before = _C.use_bf16_products(False)
    yield
    _C.use_bf16_products(before)


@pytest.mark.usefixtures("poisoned_memory", "widened")
@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == torch.bfloat16], ids=lambda case: case.name)
def test_bf16_widened_within_the_error_budget(case: Case) -> None:
    test_values_and_gradients_within_the_error_budget(case)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_within_the_error_budget(case: Case) -> None:
    inputs = make_inputs(case)
    head, targets, upstream, rows = live_rows(inputs)
    stats = forward(head, targets, case.options)
    rowwise = [stats[1], *reference.row_gradients(stats[0], *upstream[:2], stats[2], *upstream[2:])]
    gradients = backward(head, targets, rowwise, case.options, inputs.needs)

    def spread(x: Tensor, shape: torch.Size) -> Tensor:
        return x.new_zeros(case.T, *x.shape[1:]).index_copy(0, rows, x).view(shape)

    result: Result = {name: spread(x, inputs.targets.shape) for name, x in zip(reference.LogpStats._fields, stats)}
    result["lse"] = result["lse"].float()
    for i, (name, x) in enumerate(zip(Head._fields, gradients)):
        if name in inputs.leaves:
            result[f"d_{name}"] = spread(x, inputs.leaves[name].shape) if i in (0, 3) else x
        else:
            assert x.shape == (0,)
    check_budget(result, inputs, case.options)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("workspace_bytes", [2**28, 2**17])
@pytest.mark.parametrize(
    ("T", "D", "V", "R"), [(1, 64, 1, 0), (1, 65, 70, 0), (300, 96, 1, 3), (300, 130, 900, 0), (37, 64, 700, 65)]
)
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 9.0, "logit_scale": 1.3, "temperature": 0.8}], ids=["plain", "all"]
)
def test_bf16_as_it_is(T: int, D: int, V: int, R: int, workspace_bytes: int, options: dict[str, float]) -> None:
    """Heads wide enough for the units of a processor that has them."""
    case = Case("bf16", T, D, V, "", torch.bfloat16, bool(R), R, workspace_bytes=workspace_bytes, **options)
    test_values_and_gradients_within_the_error_budget(case)


@pytest.mark.parametrize(("T", "D", "V"), [(1, 1, 2), (1, 1, 1), (3, 1, 40), (1, 7, 40), (200, 1, 1), (5, 2, 1)])
@pytest.mark.parametrize("R", [0, 1])
def test_shapes_of_one(T: int, D: int, V: int, R: int) -> None:
    """A gradient of one number may cancel: errors are by the largest, not row by row."""
    for dtype in (torch.float32, torch.bfloat16):
        case = Case("one", T, D, V, "", dtype, True, R, ignored="none")
        inputs = make_inputs(case)
        head, targets, upstream, _ = live_rows(inputs)
        stats = forward(head, targets, case.options, False)
        rowwise = [stats[1], *reference.row_gradients(stats[0], *upstream)]
        gradients = backward(head, targets, rowwise, case.options, inputs.needs)
        truth = exact(inputs, case.options)
        assert error(stats[0], truth["token_logps"].reshape(-1)) < 1e-5
        for name, x in zip(Head._fields, gradients):
            if x.numel() and V > 1:  # else p_y = 1, and nothing but rounding is left
                assert error(x, truth[f"d_{name}"].reshape(x.shape)) < 8 * torch.finfo(dtype).eps, name


def test_statistics_are_empty_unless_asked_for() -> None:
    head, targets = drawn(6, 8, 50)
    with_stats, without = (forward(head, targets, HeadOptions(), stats) for stats in (True, False))
    assert [x.shape for x in without[2:]] == [(0,)] * 4
    assert all(torch.equal(a, b) for a, b in zip(with_stats[:2], without[:2]))


@pytest.mark.usefixtures("poisoned_memory")
def test_only_needed_gradients_are_computed() -> None:
    head, targets = drawn(40, 16, 300, R=4)
    rowwise = [forward(head, targets, HeadOptions())[1], torch.randn(40), torch.randn(40)]
    everything = backward(head, targets, rowwise, HeadOptions(), [True] * 5)
    for needs in itertools.product([True, False], repeat=5):
        for needed, x, whole in zip(needs, backward(head, targets, rowwise, HeadOptions(), list(needs)), everything):
            assert torch.equal(x, whole) if needed else x.shape == (0,)


def peak_bytes(function: Callable[[], tuple[Tensor, ...]]) -> int:
    """Most bytes that torch's CPU allocator held during the call, the results included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        results = function()
    events = sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert sum(changes) >= sum(x.numel() * x.element_size() for x in results)  # the profiler has seen them
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace_bytes", [2**18, 2**20])
@pytest.mark.parametrize("T, D, V", [(2500, 32, 700), (40, 32, 15000)])
def test_workspace_is_bounded(T: int, D: int, V: int, workspace_bytes: int, dtype: torch.dtype) -> None:
    head, targets = drawn(T, D, V, dtype, R=8)
    options = HeadOptions(workspace_bytes=workspace_bytes)
    row_results = T * (5 * 4 + 1)
    assert peak_bytes(lambda: forward(head, targets, options)) <= row_results + workspace_bytes

    rowwise = [forward(head, targets, options)[1], torch.randn(T), torch.randn(T)]
    gradients = sum(x.numel() * x.element_size() for x in head)
    # A 16-bit d_hidden and d_low_rank_hidden are accumulated in float32: the one thing that grows with T.
    accumulators = T * (D + 8) * 4 if dtype != torch.float32 else 0
    peak = peak_bytes(lambda: backward(head, targets, rowwise, options, [True] * 5))
    assert peak <= gradients + accumulators + workspace_bytes

    # A frozen head costs no memory of its own.
    frozen = peak_bytes(lambda: backward(head, targets, rowwise, options, [True, False, False, False, False]))
    assert frozen <= head.hidden.numel() * head.hidden.element_size() + accumulators + workspace_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_repeat(dtype: torch.dtype) -> None:
    head, targets = drawn(300, 24, 1500, dtype, R=4)
    options = HeadOptions(softcap=5.0, workspace_bytes=2**18)
    upstream = [torch.randn(300), torch.randn(300)]

    def once() -> list[Tensor]:
        stats = forward(head, targets, options)
        return [*stats, *backward(head, targets, [stats[1], *upstream], options, [True] * 5)]

    first = once()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, once()))


def test_masked_vocabulary() -> None:
    """-inf in the bias over whole blocks: those ids have probability 0, and nothing is NaN."""
    head, targets = drawn(20, 8, 600)
    hidden, weight, bias, _, _ = head
    targets %= 50
    targets += 300
    bias[:300] = -math.inf
    bias[350:] = -math.inf
    options = HeadOptions(workspace_bytes=2**13)  # blocks of a few columns: many hold -inf alone
    stats = forward(head, targets, options)
    kept = forward(head_of(hidden, weight[300:350], bias[300:350]), targets - 300, options)
    for name, masked, alone in zip(reference.LogpStats._fields, stats, kept):
        if name == "mean_logits":
            assert (masked == -math.inf).all()
        else:
            torch.testing.assert_close(masked, alone, rtol=1e-5, atol=1e-5)
    gradients = backward(head, targets, [stats[1], torch.ones(20), torch.ones(20)], options, [True] * 3 + [False] * 2)
    assert all(x.isfinite().all() for x in gradients)
    assert not gradients[1][:300].any() and not gradients[2][350:].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_rows_keep_to_themselves(value: float) -> None:
    head, targets = drawn(9, 8, 700)
    options = HeadOptions(workspace_bytes=2**13)
    clean = forward(head, targets, options)
    upstream = [torch.randn(9), torch.randn(9)]
    clean_d_hidden = backward(head, targets, [clean[1], *upstream], options, [True] + [False] * 4)[0]
    head.hidden[4, 2] = value
    stats = forward(head, targets, options)
    d_hidden = backward(head, targets, [stats[1], *upstream], options, [True] + [False] * 4)[0]
    others = torch.arange(9) != 4
    for a, b in zip((*stats, d_hidden), (*clean, clean_d_hidden)):
        torch.testing.assert_close(a[others], b[others], rtol=1e-5, atol=1e-6)
    assert not stats[0][4].isfinite() and not d_hidden[4].isfinite().any()


def test_top1_takes_the_lowest_id_among_equals() -> None:
    hidden, weight = torch.ones(4, 2), torch.zeros(100, 2)
    weight[[30, 31, 77]] = 1.0
    for workspace_bytes in (2**11, 2**28):
        top = forward(
            head_of(hidden, weight),
            torch.tensor([30, 31, 77, 0]),
            HeadOptions(workspace_bytes=workspace_bytes),
        )[5]
        assert top.tolist() == [True, False, False, False]


def test_any_strides() -> None:
    """Views that the matrix product cannot read, or would read wrongly, give what their copies give."""
    head, targets = drawn(30, 16, 200, R=4)
    upstream = [torch.randn(30), torch.randn(30)]

    def everything(arguments: Head) -> list[Tensor]:
        stats = forward(arguments, targets, HeadOptions())
        return [*stats, *backward(arguments, targets, [stats[1], *upstream], HeadOptions(), [True] * 5)]

    def every_other(x: Tensor) -> Tensor:
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)
        wide[..., ::2] = x
        return wide[..., ::2]

    views: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.T.contiguous().T if x.dim() == 2 else x,
        every_other,
        lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]] if x.dim() == 2 else x,
    ]
    expected = everything(head)
    for view in views:
        for a, b in zip(everything(Head(*map(view, head))), expected):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    expanded = head._replace(hidden=torch.randn(1, 16).expand(30, 16))
    copied = Head(*(x.contiguous() for x in expanded))
    for a, b in zip(everything(expanded), everything(copied)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_inputs_that_require_grad_change_nothing() -> None:
    """Autograd records none of the block products, 16-bit inputs that are copied to float32 included."""
    head, targets = drawn(300, 8, 4000, torch.bfloat16)
    upstream = [torch.randn(300), torch.randn(300)]
    leaves = Head(*(x.clone().requires_grad_() for x in head))
    options, needs = HeadOptions(workspace_bytes=2**18), [True] * 3 + [False] * 2
    plain = forward(head, targets, options)
    rowwise = [plain[1], *upstream]
    expected = [*plain, *backward(head, targets, rowwise, options, needs)]
    actual = [*forward(leaves, targets, options), *backward(leaves, targets, rowwise, options, needs)]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))
    peak = peak_bytes(lambda: backward(head, targets, rowwise, options, needs))
    assert peak == peak_bytes(lambda: backward(leaves, targets, rowwise, options, needs))
    assert torch.is_grad_enabled()


def test_a_wrong_id_is_never_a_plausible_number() -> None:
    head, targets = drawn(3, 8, 40)
    targets[1] = 40
    token_logps, lse, *_ = forward(head, targets, HeadOptions())
    assert token_logps.isnan().tolist() == [False, True, False]
    assert lse.isfinite().all()
    d_hidden, *_ = backward(head, targets, [lse, torch.ones(3), torch.ones(3)], HeadOptions(), [True] + [False] * 4)
    assert d_hidden.isnan().all(1).tolist() == [False, True, False]


def test_arguments_that_do_not_fit_are_refused() -> None:
    head, targets = drawn(4, 8, 40, R=2)
    hidden, weight, bias, x, u = head
    wrong = [
        (head_of(hidden[:, :7], weight), targets, "agree in D"),
        (head_of(hidden, weight, bias[:39]), targets, "bias must be"),
        (head_of(hidden, weight.bfloat16()), targets, "dtype of hidden"),
        (head_of(hidden.double(), weight.double()), targets, "float32, bfloat16 or float16"),
        (head_of(hidden, weight, low_rank_hidden=x), targets, "low_rank_weight"),
        (head_of(hidden, weight, None, x, u[:, :1]), targets, "low_rank_weight"),
        (head_of(hidden, weight), targets[:3], "targets"),
        (head_of(hidden, weight), targets.int(), "targets"),
    ]
    for arguments, ids, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            forward(arguments, ids, HeadOptions())


def test_the_build_has_the_constants_of_the_specification() -> None:
    from groupdpo_kernels import _C

    info = _C.build_info()
    assert info["block"] == (workspace.BLOCK_ROWS, workspace.BLOCK_COLUMNS)
    assert (info["sum_error"], info["tail_samples"]) == (torch_blocks.SUM_ERROR, reference.TAIL_SAMPLES)


def test_build_info() -> None:
    from groupdpo_kernels import _C

    info = _C.build_info()
    assert info["version"] == groupdpo_kernels.__version__
    assert int(info["torch"].split(".")[0]) >= 2  # built against, not necessarily the one at hand
    assert info["abi"] == "stable"
    assert info["cpu_capability"] in CAPABILITIES and info["widest_cpu_capability"] in CAPABILITIES
    assert all(name.startswith(("sm_", "compute_")) for name in info["cuda_architectures"])  # none without nvcc
    assert isinstance(info["bf16_products"], bool)
    assert info["compiler"] and isinstance(info["openmp"], bool)


def available() -> tuple[str, ...]:
    """The instruction sets of row.cpp that this processor has, narrowest first."""
    from groupdpo_kernels import _C

    return CAPABILITIES[: CAPABILITIES.index(_C.build_info()["widest_cpu_capability"]) + 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_same_bits_under_every_instruction_set(dtype: torch.dtype, softcap: float | None) -> None:
    """Of our own loops: the library's products are the same in all of these runs."""
    from groupdpo_kernels import _C

    head, targets = drawn(37, 48, 301, dtype)
    upstream = [torch.linspace(-1, 1, 37), torch.linspace(1, -2, 37), torch.linspace(0, 3, 37)]
    options = HeadOptions(logit_scale=3.0, softcap=softcap, temperature=0.7)
    results, before = [], _C.build_info()["cpu_capability"]
    try:
        for name in available():
            _C.use_cpu_capability(name)
            out = forward(head, targets, options)
            results.append(
                [*out, *backward(head, targets, [out[1], *upstream], options, [True, True, True, False, False])]
            )
    finally:
        _C.use_cpu_capability(before)
    for name, result in zip(available(), results):
        assert all(map(torch.equal, result, results[0])), name


def test_a_capability_that_is_unknown_or_missing_is_an_error_in_words() -> None:
    from groupdpo_kernels import _C

    for name in ("sse", "", "AVX2", *CAPABILITIES[len(available()) :]):
        with pytest.raises(ValueError, match=f"must be default, avx2 or avx512.*got '{name}'"):
            _C.use_cpu_capability(name)


@pytest.mark.parametrize("asked", ["default", "avx2", "avx512", "sse9", ""])
def test_the_environment_lowers_the_capability(asked: str) -> None:
    """One that the processor lacks is a warning in words, and the widest is used."""
    code = "from groupdpo_kernels import _C; print(_C.build_info()['cpu_capability'])"
    environment = os.environ | {"GROUPDPO_KERNELS_CPU_CAPABILITY": asked}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    heeded = asked in available()
    assert done.stdout.strip() == (asked if heeded else available()[-1]), done.stderr
    assert (f"got '{asked}'" in done.stderr) == (not heeded and asked != "")


def test_stable_abi_alone() -> None:
    """No symbol of torch's C++ library, whose names change between versions: the file runs on torch 2.11 and later."""
    from groupdpo_kernels import _C

    names = Path(_C.__file__).read_bytes()
    assert b"aoti_torch_cpu_mm_out" in names
    for prefix in (b"_ZN2at", b"_ZNK2at", b"_ZN3c10", b"_ZNK3c10"):
        assert prefix not in names
