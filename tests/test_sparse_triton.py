"""grad_tol > 0 through the Triton kernels, interpreted: the candidates of the specification and its gradients, the
bound in float64, the same bits twice, memory within the budget and nothing read back."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from test_workspace import FULL_SIZES, Allocations, launching_nothing, on_meta
from torch import Tensor

from groupdpo_kernels import linear_logps
from groupdpo_kernels.kernels import sparse_backward
from groupdpo_kernels.kernels import sparse_forward as launcher
from groupdpo_kernels.lm_head import extension, host, ops, sparse, torch_blocks
from groupdpo_kernels.reference import Candidates, HeadGradients, HeadOptions, Needs, logits
from groupdpo_kernels.testing import CASES, Case, Inputs, make_inputs, triton_on_cpu

BY_NAME = {case.name: case for case in CASES}
# Interpreted tiles are slow: the cases that differ in these kernels.
NAMES = ("plain", "one_row", "one_column", "ragged_all", "unaligned_bf16", "fp16", "negative", "confident")
NAMES += ("softcap", "softcap_tight_bf16", "everything", "everything_bf16", "low_rank_wide_bf16", "last_ignored")
NAMES += ("most_ignored_bf16", "all_ignored", "empty", "strided_deep", "tiny_workspace", "tiny_workspace_bf16")
# Of the backward: an interpreted vocabulary id takes a millisecond a gradient.
BACKWARD = ("plain", "one_row", "one_column", "unaligned_bf16", "fp16", "softcap_tight_bf16", "everything")
BACKWARD += ("low_rank_wide_bf16", "most_ignored_bf16", "strided_deep", "tiny_workspace")
TOLERANCE = 0.2


def upstream_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return inputs.d_token_logps.float(), inputs.d_lse.float()


def trained(T: int = 36, D: int = 48, V: int = 170, dtype: torch.dtype = torch.float32, **changes: Any) -> Case:
    """A case for `sure_inputs`."""
    return Case("trained", T, D, V, "", dtype, **changes)


def sure_inputs(case: Case) -> Inputs:
    """Two rows of three are sure of an id, most often their target; the others are flat."""
    inputs = make_inputs(case)
    with torch.no_grad():
        rows = inputs.weight[inputs.targets.clamp(min=0)].float()
        rows[::5] = rows[::5].roll(1, 0)
        sure = (12 * rows / rows.square().sum(-1, keepdim=True)).to(case.dtype)
        inputs.hidden.copy_(torch.where((torch.arange(case.T) % 3 > 0)[:, None], sure, inputs.hidden))
    return inputs


def forward(
    inputs: Inputs, options: HeadOptions, grad_tol: float = TOLERANCE, BLOCK_T: int = 64
) -> tuple[Tensor, Candidates]:
    """token_logps and the candidates."""
    with triton_on_cpu(BLOCK_T, 128, 64):
        return ops.sparse_forward(inputs.head, inputs.targets, options, grad_tol, "triton")


def candidates(inputs: Inputs, options: HeadOptions, grad_tol: float = TOLERANCE) -> Candidates:
    return forward(inputs, options, grad_tol)[1]


@cache
def of_case(name: str) -> tuple[Inputs, Tensor, Candidates]:
    """Inputs of a case, its token_logps and candidates, which the tests of the forward and of the backward share:
    nobody writes to them, and each of these tests asks for poisoned memory, so whoever is first computes them in it.
    """
    inputs = make_inputs(BY_NAME[name])
    return inputs, *forward(inputs, BY_NAME[name].options)


def backward(
    inputs: Inputs, found: Candidates, options: HeadOptions, grad_tol: float = TOLERANCE, BLOCK_T: int = 64
) -> HeadGradients:
    arguments = (inputs.head, inputs.targets, found, *upstream_of(inputs), options, grad_tol, inputs.needs)
    with triton_on_cpu(BLOCK_T, 128, 64):
        return ops.sparse_backward(*arguments, "triton")


def dense(found: Candidates, V: int) -> Tensor:  # (T, V)
    most = found.ids.shape[-1]
    out = torch.zeros(found.lse.numel(), V, dtype=found.weights.dtype)
    return out.scatter_add_(1, found.ids.view(-1, most).long(), found.weights.view(-1, most))


# ------------------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("name", NAMES)
def test_the_candidates_of_the_specification(name: str, poisoned_memory: None) -> None:
    case = BY_NAME[name]
    inputs, token_logps, found = of_case(name)
    expected, wanted = host.sparse_forward(inputs.head, inputs.targets, case.options, TOLERANCE, "reference")
    for x, y in zip((token_logps, *found), (expected, *wanted)):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    torch.testing.assert_close((token_logps, *found[:3]), (expected, *wanted[:3]), rtol=1e-5, atol=2e-5)
    if case.T == 0:
        return
    # The specification subtracts what it keeps from the non-target probability.
    torch.testing.assert_close(found.dropped, wanted.dropped, rtol=1e-5, atol=1e-5 + case.name.startswith("tiny"))
    if not case.name.startswith("tiny"):  # there they do not fit
        mine, its = dense(found, case.V), dense(wanted, case.V)
        assert torch.equal(mine != 0, its != 0)
        torch.testing.assert_close(mine, its, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["confident", "everything", "tiny_workspace", "last_ignored"])
def test_slots_and_the_bound_on_the_rest(name: str, poisoned_memory: None) -> None:
    """Candidates first, in the order of their ids, of probability at least `least`, never the target; `dropped` is at
    least the probability of all others, and hardly more."""
    case = BY_NAME[name]
    inputs, _, found = of_case(name)
    wide = inputs.to(torch.float64)
    pair = None if wide.low_rank is None else (wide.low_rank[0].detach(), wide.low_rank[1].detach())
    z = logits(wide.hidden.detach(), wide.weight.detach(), None if wide.bias is None else wide.bias.detach(), pair,
               case.options)  # fmt: skip
    p = z.softmax(-1)
    full = 0
    for t, y in enumerate(inputs.targets.tolist()):
        kept = int((found.weights[t] != 0).sum())
        ids = found.ids[t, :kept].long()
        assert not found.weights[t, kept:].any() and not found.ids[t, kept:].any()
        if y == case.options.ignore_index:
            assert not any(x[t].any() for x in found)
            continue
        assert (ids.diff() > 0).all() and y not in ids
        assert (p[t, ids] >= sparse.least_probability(TOLERANCE, "triton") * (1 - 1e-5)).all()
        full += kept == found.ids.shape[1]
        p[t, y], non_target = 0, float(1 - p[t, y])
        rest = float(p[t].sum() - p[t, ids].sum())
        torch.testing.assert_close(float(found.non_target_probs[t]), non_target, rtol=1e-5, atol=1e-15)
        assert rest * (1 - 1e-6) <= found.dropped[t] <= rest * (1 + 1e-5) + 2**-17 * non_target
    assert (full > 0) == (name == "tiny_workspace")


def test_nothing_cancels_in_a_row_that_is_sure() -> None:
    """At p_y = 1 - 1e-9: beyond float32's 1 - p."""
    case = Case("sure", 24, 64, 300, "", ignored="none")
    inputs = make_inputs(case)
    with torch.no_grad():
        rows = inputs.weight[inputs.targets]
        inputs.hidden.copy_(33 * rows / rows.square().sum(-1, keepdim=True))
    found = candidates(inputs, case.options)
    wide = inputs.to(torch.float64)
    p = logits(wide.hidden.detach(), wide.weight.detach()).softmax(-1).scatter(1, inputs.targets[:, None], 0)
    assert p.sum(1).median() < 1e-8
    torch.testing.assert_close(found.non_target_probs.double(), p.sum(1), rtol=3e-5, atol=0)
    assert (found.dropped.double() >= p.sum(1) * (1 - 3e-5)).all()  # not one candidate


def test_the_constant_of_the_specification() -> None:
    assert launcher.SUM_ERROR.value == torch_blocks.SUM_ERROR


def test_wrong_ids_and_rows_that_are_not_finite_go_the_exact_way(poisoned_memory: None) -> None:
    """NaN in their row and nowhere else."""
    case = trained(T=24, V=200, ignored="none")
    inputs = sure_inputs(case)
    _, clean = forward(inputs, case.options)
    bad = [3, 4, 7, 8]
    inputs.targets[3], inputs.targets[4] = case.V, -1
    with torch.no_grad():
        inputs.hidden[7, 2], inputs.hidden[8, 2] = torch.nan, torch.inf
    token_logps, found = forward(inputs, case.options)
    good = torch.ones(case.T, dtype=torch.bool).index_fill(0, torch.tensor(bad), False)
    for field, x, y in zip(Candidates._fields, found, clean):
        assert torch.equal(x[good], y[good]), field
    assert token_logps[bad].isnan().all() and found.dropped[bad].isnan().all()
    gradients = backward(inputs, found, case.options)
    assert gradients.d_hidden is not None
    assert gradients.d_hidden[bad].isnan().any(1).all() and gradients.d_hidden[good].isfinite().all()


# ------------------------------------------------------------------------------------------------------------ backward


def check_gradients(inputs: Inputs, found: Candidates, options: HeadOptions, grad_tol: float) -> Tensor:
    """Those of the reference over the same candidates, in the overall norm and in every row. Returns which rows are
    exact."""
    head, upstream = inputs.head, upstream_of(inputs)
    gradients = backward(inputs, found, options, grad_tol)
    wanted = host.sparse_backward(head, inputs.targets, found, *upstream, options, grad_tol, inputs.needs, "reference")
    eps = {torch.float32: 3e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}[inputs.hidden.dtype]
    for name, x, y, like, needed in zip(HeadGradients._fields, gradients, wanted, head, inputs.needs):
        assert (x is None) == (y is None) == (not needed)
        if x is None or y is None:
            continue
        assert (x.shape, x.dtype) == (like.shape, like.dtype) and x.is_contiguous()
        difference = (x.double() - y.double()).view(-1, x.shape[-1])
        size = y.double().view(-1, x.shape[-1]).norm(dim=1)
        assert (difference.norm(dim=1) <= eps * (size + size.max().clamp(min=0))).all(), name
        assert not x.view(size.shape[0], -1)[size == 0].any(), name
    live = inputs.targets != options.ignore_index
    return sparse.exact_rows(found.non_target_probs, found.dropped, *upstream, live, grad_tol)


@pytest.mark.parametrize("name", BACKWARD)
def test_the_gradients_of_the_specification(name: str, poisoned_memory: None) -> None:
    inputs, _, found = of_case(name)
    check_gradients(inputs, found, BY_NAME[name].options, TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_some_rows_exact_some_sparse(dtype: torch.dtype, poisoned_memory: None) -> None:
    """The flat rows have more candidates than fit."""
    case = trained(V=290, dtype=dtype, bias=True, R=4)
    inputs = sure_inputs(case)
    exact = check_gradients(inputs, candidates(inputs, case.options, 1e-3), case.options, 1e-3)
    assert 0 < int(exact.sum()) < int((inputs.targets != -100).sum())


@pytest.mark.parametrize("name", ["empty", "all_ignored"])
def test_no_live_row(name: str, poisoned_memory: None) -> None:
    inputs, _, found = of_case(name)
    for gradient in backward(inputs, found, BY_NAME[name].options):
        assert gradient is None or not gradient.any()


def test_the_error_is_within_the_tolerance() -> None:
    """Through the public function; in hidden the bound on d_logits holds times the largest row of the head."""
    case = trained()
    inputs = sure_inputs(case)
    weights = inputs.weight.detach().norm(dim=1).max()

    def gradients(grad_tol: float, impl: str) -> list[Tensor]:
        logps = linear_logps(inputs.hidden, inputs.weight, inputs.targets, grad_tol=grad_tol, impl=impl)
        return list(torch.autograd.grad(logps.sum(), [inputs.hidden, inputs.weight]))

    truth = gradients(0.0, "reference")
    logps = linear_logps(inputs.hidden, inputs.weight, inputs.targets).detach()
    non_target = (1 - logps.exp())[inputs.targets != -100].sum()
    sizes = []
    with triton_on_cpu(64, 128, 64):
        for grad_tol in (1e-3, 0.1):
            d_hidden, d_weight = (a - b for a, b in zip(gradients(grad_tol, "triton"), truth))
            assert d_hidden.norm(dim=1).sum() <= grad_tol * non_target * weights + 1e-4
            sizes.append(float(d_weight.norm()))
    assert sizes[0] < 0.1 * sizes[1]


@pytest.mark.parametrize("workspace_bytes", [2**28, 2**13])
def test_same_bits_twice(workspace_bytes: int, poisoned_memory: None) -> None:
    case = trained(24, 40, 150, torch.bfloat16, bias=True, R=4, softcap=20.0, workspace_bytes=workspace_bytes)
    inputs = sure_inputs(case)
    first = candidates(inputs, case.options)
    gradients = backward(inputs, first, case.options)
    torch.utils.deterministic.fill_uninitialized_memory = False
    again = candidates(inputs, case.options)
    assert all(map(torch.equal, first, again))
    for a, b in zip(gradients, backward(inputs, again, case.options)):
        assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def test_which_rows_share_a_tile_changes_rounding_alone() -> None:
    """The interpreter multiplies by a library, whose sums have another order for tiles of another height."""
    case = trained(24, 40, 150, torch.bfloat16, bias=True, R=4, softcap=20.0)
    inputs = sure_inputs(case)
    (tall_logps, tall), (low_logps, low) = (forward(inputs, case.options, BLOCK_T=rows) for rows in (64, 32))
    torch.testing.assert_close((low_logps, *low[:4]), (tall_logps, *tall[:4]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dense(low, case.V), dense(tall, case.V), rtol=1e-5, atol=1e-6)
    assert torch.equal(low.ids, tall.ids)  # none of these entries is near the least probability of a candidate


def test_each_gradient_alone() -> None:
    case = trained(12, 24, 90, torch.bfloat16, bias=True, R=3)
    inputs = sure_inputs(case)
    found = candidates(inputs, case.options)
    full = backward(inputs, found, case.options)
    arguments = (inputs.head, inputs.targets, found, *upstream_of(inputs), case.options, TOLERANCE)
    for i in range(5):
        with triton_on_cpu(64, 128, 64):
            alone = ops.sparse_backward(*arguments, Needs(*(j == i for j in range(5))), "triton")
        for j, (a, b) in enumerate(zip(alone, full)):
            assert (a is None) == (j != i) or b is None
            assert a is None or (b is not None and torch.equal(a, b))


def test_sums_of_rows_by_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where device code runs, the op of the extension gets what its checks ask for, and sums what the kernel would."""
    case = trained(V=150, T=24, dtype=torch.bfloat16, bias=True, R=4)
    inputs = sure_inputs(case)
    found = candidates(inputs, case.options)
    expected, sums = backward(inputs, found, case.options), []

    def add(out: Tensor, source: Tensor, begins: Tensor, ends: Tensor, index: Tensor, by: Tensor) -> None:
        assert out.is_contiguous() and source.dim() == 2 and source.dtype == out.dtype
        assert source.stride(1) == 1 or source.shape[1] == 1
        assert begins.dtype == ends.dtype == index.dtype == torch.int64 and by.dtype == torch.float32
        assert begins.shape == ends.shape == out.shape[:1] and index.shape == by.shape
        assert all(x.is_contiguous() for x in (begins, ends, index, by))
        sums.append(out.shape)
        for i in range(out.shape[0]):
            j = torch.arange(int(begins[i]), int(ends[i]))
            j = j[by[j] != 0]
            out[i] += (by[j, None] * source[index[j]].float()).sum(0).to(out.dtype)

    monkeypatch.setattr(extension, "cuda_rows", lambda device: add)
    for x, y in zip(backward(inputs, found, case.options), expected):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            torch.testing.assert_close(x, y, rtol=2**-6, atol=2**-8)
    assert sums == [(case.T, case.D), (case.T, case.R), (case.V, case.D), (case.V, case.R), (case.V, 1)]


def test_entries_in_several_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    case = trained(T=20, V=60, workspace_bytes=2**22)
    inputs = sure_inputs(case)
    found = candidates(inputs, case.options)
    whole = backward(inputs, found, case.options)
    monkeypatch.setattr(sparse_backward, "ENTRY_BYTES", 2**22 // (found.ids.shape[1] + 1) // 17)
    parts = backward(inputs, found, case.options)
    for a, b in zip(whole, parts):
        assert a is None or (b is not None and torch.allclose(a, b, rtol=1e-5, atol=1e-6))
    assert whole.d_hidden is not None and parts.d_hidden is not None and torch.equal(whole.d_hidden, parts.d_hidden)


# -------------------------------------------------------------------------------------------------------------- memory


def step(case: Case, inputs: Inputs, *frozen: str) -> Allocations:
    for name, leaf in inputs.leaves.items():
        leaf.requires_grad_(name not in frozen)
    with Allocations() as counted:
        for op in (ops._sparse_forward, ops._sparse_backward):
            counted.inside[op._opoverload] = op._init_fn
        logps = linear_logps(
            inputs.hidden, inputs.weight, inputs.targets, inputs.bias, low_rank=inputs.low_rank, softcap=case.softcap,
            workspace_bytes=case.workspace_bytes, grad_tol=0.01, impl="triton",
        )  # fmt: skip
        logps.backward(inputs.d_token_logps.float())
    return counted


@pytest.mark.parametrize("frozen", [(), ("weight", "bias", "low_rank_weight")], ids=["trained_head", "frozen_head"])
@pytest.mark.parametrize("case", FULL_SIZES, ids=lambda case: case.name)
def test_the_peak_of_the_launchers(case: Case, frozen: tuple[str, ...]) -> None:
    """On the meta device, so nothing can be read back. Beyond the gradients: one float32 (T, D) buffer, the workspace,
    a few numbers a row, and of a trained head a few a vocabulary entry."""
    inputs = on_meta(case)
    with launching_nothing():
        counted = step(case, inputs, *frozen)
    results = sum(x.numel() * x.element_size() for x in inputs.leaves.values() if x.requires_grad)
    rows = 4 * case.T * (case.D + 2 * case.R) + 192 * case.T + (0 if frozen else 48 * case.V)
    assert counted.peak <= results + rows + case.workspace_bytes
