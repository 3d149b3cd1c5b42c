"""Every implementation over the CASES: values, statistics and gradients within the error budget, no unwritten output,
the same bits twice. The Triton kernels run interpreted, on both their loads: tensor descriptors and pointers."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from groupdpo_kernels import LogpStats, linear_logp_stats, linear_logps
from groupdpo_kernels.kernels import launch
from groupdpo_kernels.lm_head import ops
from groupdpo_kernels.reference import HeadGradients, HeadOptions, Needs, RowGradients
from groupdpo_kernels.testing import CASES, Case, Result, check_budget, make_inputs, run, triton_on_cpu

EVERYTHING = ("lse", "entropy", "mean_logits", "log_sum_sq_probs", "is_top1")
BY_NAME = {case.name: case for case in CASES}
# "descriptors", "pointers" and "library" are impl="triton", interpreted.
IMPLS = ("reference", "cpu", "descriptors", "pointers")


def through(impl: str, outputs: tuple[str, ...] = EVERYTHING) -> Callable[..., LogpStats]:
    """linear_logp_stats in the shape that testing.run wants."""

    def stats(
        h: Tensor, w: Tensor, y: Tensor, b: Tensor | None, low_rank: tuple[Tensor, Tensor] | None, o: HeadOptions
    ):
        options = {name: getattr(o, name) for name in ("logit_scale", "softcap", "temperature", "workspace_bytes")}
        return linear_logp_stats(h, w, y, b, low_rank=low_rank, outputs=outputs, impl=impl, **options)

    return stats


@contextlib.contextmanager
def running(impl: str, case: Case) -> Iterator[str]:
    """The name to pass as impl=. Interpreted blocks are big, cost is per block, but leave several tiles a dimension."""
    if impl in ("reference", "cpu"):
        yield impl
        return
    if case.V < 2000:
        blocks = (64 if case.T <= 130 else 128, 256 if case.V <= 600 else 512, 64)
    else:
        blocks = (16, 16384 if case.V < 60000 else 65536, 16)
    with triton_on_cpu(*blocks, tma=impl == "descriptors", library=impl == "library"):
        yield "triton"


def result_of(impl: str, case: Case) -> Result:
    with running(impl, case) as name:
        return run(through(name), make_inputs(case), case.options)


def same_bits(a: Result, b: Result) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# All loads meet every shape; what comes after the product is the same code, and an interpreted tile is slow.
LOADS = ("plain", "one_column", "ragged_all", "gpt2_vocab", "ragged_bf16", "unaligned_bf16", "fp16", "everything")
LOADS += ("everything_bf16", "low_rank_wide_bf16", "most_ignored_bf16", "strided_bf16", "tiny_workspace_bf16")


@pytest.mark.parametrize(
    ("case", "impl"),
    [(case, impl) for case in CASES for impl in IMPLS if impl != "pointers"]
    + [(BY_NAME[name], impl) for name in LOADS for impl in ("pointers", "library")],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_case(case: Case, impl: str, poisoned_memory: None) -> None:
    result = result_of(impl, case)
    assert set(result) == {"token_logps", *EVERYTHING, *(f"d_{name}" for name in make_inputs(case).leaves)}
    check_budget(result, make_inputs(case), case.options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["tiny_workspace", "strided_bf16"])
def test_same_bits_twice(name: str, impl: str, poisoned_memory: None) -> None:
    """Also whatever memory held before: one run is on memory full of NaN, the other on what the allocator gives."""
    first = result_of(impl, BY_NAME[name])
    torch.utils.deterministic.fill_uninitialized_memory = False
    assert same_bits(first, result_of(impl, BY_NAME[name]))


@pytest.mark.parametrize("impl", IMPLS)
def test_without_statistics_the_same_bits(impl: str) -> None:
    """Statistics are read off the same tiles: asking for them changes no other result."""
    case = Case("bare", 20, 24, 300, "", torch.bfloat16, True, 3, 1.3, 12.0, 0.8)
    with running(impl, case) as name:
        inputs = make_inputs(case)
        full = run(through(name), inputs, case.options)
        bare = run(through(name, ("lse",)), inputs, case.options)
    assert bare.keys() < full.keys() and all(torch.equal(bare[name], full[name]) for name in bare)


@pytest.mark.parametrize("impl", ["reference", "cpu", "pointers"])
def test_every_subset_of_gradients(impl: str) -> None:
    """Each gradient has the same bits whichever others are asked for; what is not asked for is not there."""
    case = Case("subset", 20, 24, 70, "", torch.bfloat16, True, 3, 1.3, 12.0, 0.8)
    inputs = make_inputs(case)
    head = inputs.head
    upstream = RowGradients(inputs.d_token_logps.float(), inputs.d_lse.float(), inputs.d_lse.float())
    with running(impl, case) as name:
        lse = ops.linear_logps_forward(head, inputs.targets, case.options, False, name).lse
        assert lse is not None

        def gradients(*needs: bool) -> HeadGradients:
            return ops.linear_logps_backward(head, inputs.targets, lse, upstream, case.options, Needs(*needs), name)

        full = gradients(*[True] * 6)
        assert not any(torch.equal(x, torch.zeros_like(x)) for x in full)
        subsets = list(itertools.product([False, True], repeat=5))
        for asked in subsets[::3] if impl == "pointers" else subsets:
            needs = (*asked, sum(asked) % 2 == 0)
            for field, needed, gradient, expected in zip(HeadGradients._fields, needs, gradients(*needs), full):
                assert (gradient is not None) == needed
                assert gradient is None or torch.equal(gradient, expected), (field, needs)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_grad(impl: str) -> None:
    """A reference model's pass: no graph, the same bits."""
    case = BY_NAME["strided_bf16"]
    inputs = make_inputs(case)
    with running(impl, case) as name:
        with torch.no_grad():
            logps = linear_logps(inputs.hidden, inputs.weight, inputs.targets, impl=name)
        assert not logps.requires_grad
        assert torch.equal(logps, linear_logps(inputs.hidden, inputs.weight, inputs.targets, impl=name).detach())


def layouts() -> dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Views of (hidden, weight) that hold the same numbers in another layout."""

    def inside(x: Tensor) -> Tensor:  # rows of a wider buffer, 16-byte aligned
        return torch.cat((x, torch.full_like(x, torch.nan)), 1)[:, : x.shape[1]]

    def shifted(x: Tensor) -> Tensor:  # rows start off alignment
        return torch.cat((torch.full_like(x[:, :1], torch.nan), x), 1)[:, 1:]

    def transposed(x: Tensor) -> Tensor:  # a head stored as (D, V)
        return x.T.contiguous().T

    def every_other(x: Tensor) -> Tensor:
        return torch.stack((x, torch.full_like(x, torch.nan)), 1).flatten(0, 1)[::2]

    return {
        "weight_rows_of_a_wider_buffer": lambda h, w: (h, inside(w)),
        "weight_off_alignment": lambda h, w: (h, shifted(w)),
        "weight_transposed": lambda h, w: (h, transposed(w)),
        "weight_every_other_row": lambda h, w: (h, every_other(w)),
        "hidden_rows_of_a_wider_buffer": lambda h, w: (inside(h), w),
        "hidden_transposed": lambda h, w: (transposed(h), w),
        "hidden_every_other_row": lambda h, w: (every_other(h), w),
        "hidden_one_row_expanded": lambda h, w: (h[:1].expand_as(h), w),
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", layouts())
def test_layouts(layout: str, impl: str) -> None:
    """What lies beside a view is never read (it is NaN)."""
    case = Case("layout", 21, 40, 300, "", torch.bfloat16)
    inputs = make_inputs(case)
    hidden, weight = layouts()[layout](inputs.hidden.detach(), inputs.weight.detach())
    inputs = dataclasses.replace(inputs, hidden=hidden.requires_grad_(), weight=weight.requires_grad_())
    with running(impl, case) as name:
        check_budget(run(through(name, ("lse",)), inputs, case.options), inputs, case.options)


@pytest.mark.parametrize("impl", IMPLS)
def test_upstream_gradients_of_any_layout(impl: str) -> None:
    """sum().backward() feeds an expanded scalar, a mean over a transposed view a strided tensor."""
    case = Case("upstream", 12, 16, 40, "", leading=(3, 4))
    inputs = make_inputs(case)
    leaves = list(inputs.leaves.values())
    with running(impl, case) as name:
        logps = linear_logps(inputs.hidden, inputs.weight, inputs.targets, impl=name)
        by_sum = torch.autograd.grad(logps.sum(), leaves, retain_graph=True)
        by_ones = torch.autograd.grad(logps, leaves, torch.ones(3, 4), retain_graph=True)
        upstream = torch.randn(4, 3).T
        strided = torch.autograd.grad(logps, leaves, upstream, retain_graph=True)
        contiguous = torch.autograd.grad(logps, leaves, upstream.contiguous())
    assert all(map(torch.equal, by_sum, by_ones)) and all(map(torch.equal, strided, contiguous))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.uint16, torch.uint32])
def test_integer_targets_of_any_width(dtype: torch.dtype) -> None:
    case = Case("targets", 9, 16, 100, "", ignored="none")
    inputs = make_inputs(case)
    expected = linear_logps(inputs.hidden, inputs.weight, inputs.targets)
    assert torch.equal(linear_logps(inputs.hidden, inputs.weight, inputs.targets.to(dtype)), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ignore_index", [-1, 5])
def test_ignore_index(ignore_index: int, impl: str) -> None:
    """Any integer, an id of the vocabulary included; ignored rows give exactly 0 and no gradient, even from NaN."""
    case = Case("ignore", 16, 16, 50, "", ignored="none")
    inputs = make_inputs(case)
    targets = inputs.targets.clone()
    targets[targets == 5] = 6
    targets[::3] = ignore_index
    hidden = inputs.hidden.detach().clone()
    hidden[::3] = torch.nan
    hidden.requires_grad_()
    with running(impl, case) as name:
        stats = linear_logp_stats(
            hidden, inputs.weight, targets, ignore_index=ignore_index, outputs=EVERYTHING, impl=name
        )
        assert stats.lse is not None
        d_hidden, d_weight = torch.autograd.grad(stats.token_logps.sum() + stats.lse.sum(), (hidden, inputs.weight))
    for value in stats:
        assert value is not None and not value[::3].any() and value.isfinite().all()
    assert not d_hidden[::3].any() and d_hidden.isfinite().all() and d_weight.isfinite().all()
    assert d_hidden[1].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_not_finite_stays_in_its_row(impl: str) -> None:
    """As in eager: the row's results and gradient are not finite, all others have the bits they have without it."""
    case = Case("not_finite", 70, 16, 300, "", ignored="none")
    inputs = make_inputs(case)
    bad = {7: torch.nan, 20: torch.inf, 69: -torch.inf}
    hidden = inputs.hidden.detach().clone()
    for row, value in bad.items():
        hidden[row, 3] = value
    hidden.requires_grad_()
    rows = list(bad)
    others = torch.ones(case.T, dtype=torch.bool).index_fill(0, torch.tensor(rows), False)
    with running(impl, case) as name:
        clean = linear_logp_stats(inputs.hidden, inputs.weight, inputs.targets, outputs=EVERYTHING, impl=name)
        dirty = linear_logp_stats(hidden, inputs.weight, inputs.targets, outputs=EVERYTHING, impl=name)
        upstream = (inputs.d_token_logps.float(), inputs.d_lse.float())
        (d_clean,) = torch.autograd.grad((clean.token_logps, clean.entropy), inputs.hidden, upstream)
        (d_dirty,) = torch.autograd.grad((dirty.token_logps, dirty.entropy), hidden, upstream)
    for field, a, b in zip(LogpStats._fields, clean, dirty):
        assert a is not None and b is not None and torch.equal(a[others], b[others]), field
        assert field == "is_top1" or not b[rows].isfinite().any(), field
    assert torch.equal(d_clean[others], d_dirty[others]) and d_dirty[rows].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_vocabulary(impl: str) -> None:
    """A bias of -inf takes ids out of the vocabulary, whole tiles included: the rest is as if they did not exist."""
    case = Case("masked", 40, 32, 700, "", bias=True, ignored="none")
    inputs = make_inputs(case)
    keep = torch.arange(case.V) % 3 == 0
    keep[256:512] = False  # a whole tile
    bias = torch.where(keep, inputs.bias.detach(), -torch.inf).requires_grad_()
    ids = keep.nonzero()[:, 0]
    position = torch.arange(case.T) % len(ids)
    small = (inputs.weight.detach()[keep].requires_grad_(), inputs.bias.detach()[keep].requires_grad_())
    with running(impl, case) as name:
        outputs = ("lse", "entropy", "log_sum_sq_probs", "is_top1")
        masked = linear_logp_stats(inputs.hidden, inputs.weight, ids[position], bias, outputs=outputs, impl=name)
        dense = linear_logp_stats(inputs.hidden, small[0], position, small[1], outputs=outputs, impl=name)
        leaves = (inputs.hidden, inputs.weight, bias)
        upstream = (inputs.d_token_logps.float(), inputs.d_lse.float())
        gradients = torch.autograd.grad((masked.token_logps, masked.entropy), leaves, upstream)
        wanted = torch.autograd.grad((dense.token_logps, dense.entropy), (inputs.hidden, *small), upstream)
        # Ids out of the vocabulary are impossible, not wrong: log 0.
        impossible = linear_logps(inputs.hidden, inputs.weight, torch.full_like(position, 1), bias, impl=name)
    assert masked.mean_logits is None and (impossible == -torch.inf).all()
    for a, b in zip(masked, dense):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], wanted[0], rtol=1e-4, atol=1e-5)
    for g, w in zip(gradients[1:], wanted[1:]):
        torch.testing.assert_close(g[keep], w, rtol=1e-4, atol=1e-5)
        assert not g[~keep].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_ties(impl: str) -> None:
    """is_top1 goes to the lowest id among equal logits, within a tile and across tiles."""
    case = Case("ties", 4, 16, 600, "", ignored="none")
    weight = torch.zeros(case.V, case.D)
    weight[[30, 31, 290, 599]] = 1.0
    hidden = torch.ones(4, case.D)
    targets = torch.tensor([30, 31, 290, 599])
    with running(impl, case) as name:
        stats = linear_logp_stats(hidden, weight, targets, outputs=("is_top1",), impl=name)
        flat = linear_logp_stats(hidden, torch.zeros_like(weight), targets * 0, outputs=("is_top1",), impl=name)
    assert stats.is_top1 is not None and stats.is_top1.tolist() == [True, False, False, False]
    assert flat.is_top1 is not None and flat.is_top1.all()


def test_float64_runs_on_the_reference() -> None:
    """float64 in and out, and impl="auto" finds the way."""
    case = Case("float64", 30, 40, 300, "", torch.float64, True, 4, 1.3, 12.0, 0.8)
    for impl in ("auto", "reference"):
        check_budget(run(through(impl), make_inputs(case), case.options), make_inputs(case), case.options)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_strided_bias_is_read_by_its_stride(impl: str) -> None:
    case = BY_NAME["everything"]
    inputs = make_inputs(case)
    assert inputs.bias is not None
    apart = torch.stack((inputs.bias.detach(), torch.full_like(inputs.bias, torch.nan)), 1)[:, 0]
    with running(impl, case) as name:
        dense, strided = (
            run(through(name), dataclasses.replace(inputs, bias=bias.detach().requires_grad_()), case.options)
            for bias in (inputs.bias, apart)
        )
    assert same_bits(dense, strided)


def test_float32_products_follow_either_of_torchs_settings() -> None:
    """The getter of the older one raises where the newer has been used, as transformers does for tf32=True."""
    shape = launch.TABLE["sm_90", 4]
    assert launch.precision(torch.float32, shape) == launch.precision(torch.bfloat16, shape) == "ieee"
    try:
        torch.set_float32_matmul_precision("high")
        assert launch.precision(torch.float32, shape) == "tf32"
        assert launch.precision(torch.bfloat16, shape) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
    lines = ["import torch", "torch.backends.fp32_precision = 'tf32'"]  # in a process of its own: it cannot be unset
    lines += ["from groupdpo_kernels.kernels import launch", "shape = launch.TABLE['sm_90', 4]"]
    lines += ["assert launch.precision(torch.float32, shape) == 'tf32'"]
    subprocess.run([sys.executable, "-c", "; ".join(lines)], check=True)
