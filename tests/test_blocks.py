"""The blocked form of the specification, which impl="reference" runs, against autograd of the specification."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_reference import OPTIONS, small

from groupdpo_kernels import reference
from groupdpo_kernels.lm_head import torch_blocks
from groupdpo_kernels.reference import HeadOptions, LogpStats, Needs, RowGradients
from groupdpo_kernels.testing import Case, make_inputs

SHAPES = [(16, 16), (7, 40), (17, 31), (100, 9), (1, 45), (30, 1), (30, 90), (1000, 1000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_blocks_of_any_shape(options: HeadOptions, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocked forms are the specification and its autograd in float64, whatever the blocks."""
    monkeypatch.setattr(torch_blocks, "block_shape", lambda *_: shape)
    inputs = small(T=30, D=11, V=90, R=4, ignored="none", hidden_scale=3.0, entropy=True)
    stats = torch_blocks.forward_in_blocks(inputs.head, inputs.targets, options)
    expected = reference.linear_logp_stats(
        inputs.hidden, inputs.weight, inputs.targets, inputs.bias, inputs.low_rank, options
    )
    for field, actual, wanted in zip(LogpStats._fields, stats, expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11, msg=lambda m, f=field: f"{f}: {m}")
    assert stats.lse is not None and expected.lse is not None
    assert expected.entropy is not None and inputs.d_entropy is not None
    upstream = (inputs.d_token_logps, inputs.d_lse)
    needs = Needs(*[True] * 6)
    rows = reference.row_gradients(stats.token_logps, *upstream, stats.entropy, inputs.d_entropy)
    actual = torch_blocks.backward_in_blocks(inputs.head, inputs.targets, stats.lse, rows, options, needs)
    loss = (expected.token_logps * upstream[0] + expected.lse * upstream[1]).sum()
    loss = loss + (expected.entropy * inputs.d_entropy).sum()
    for name, a, b in zip(inputs.leaves, actual, torch.autograd.grad(loss, list(inputs.leaves.values()))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"d_{n}: {m}")
    torch.testing.assert_close(actual.mass, torch.ones(30, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_expectations_are_the_derivative(
    options: HeadOptions, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """d token_logps / d hidden from one pass, and the logits of the targets alone, against autograd in float64."""
    monkeypatch.setattr(torch_blocks, "block_shape", lambda *_: shape)
    inputs = small(T=30, D=11, V=90, R=4, ignored="none", hidden_scale=3.0)
    found = torch_blocks.expectations_in_blocks(inputs.head, inputs.targets, options)
    assert inputs.low_rank is not None
    expected = reference.linear_logp_stats(
        inputs.hidden, inputs.weight, inputs.targets, inputs.bias, inputs.low_rank, options
    )
    torch.testing.assert_close(found.token_logps, expected.token_logps)
    torch.testing.assert_close(found.lse, expected.lse)
    wanted = torch.autograd.grad(expected.token_logps.sum(), (inputs.hidden, inputs.low_rank[0]))
    chain = options.logit_scale / options.temperature
    for factor, expectation, gradient in zip(
        (inputs.weight, inputs.low_rank[1]), (found.expected_weight, found.expected_low_rank), wanted
    ):
        actual = chain * (found.coefficients[:, None] * factor.detach()[inputs.targets] - expectation)
        torch.testing.assert_close(actual, gradient, rtol=1e-10, atol=1e-10)
    logits = torch_blocks.target_logits(inputs.head, inputs.targets, options)
    torch.testing.assert_close(logits - found.lse, expected.token_logps.detach())


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=6)), ids=str)
def test_blocks_compute_what_is_needed(needs: tuple[bool, ...]) -> None:
    inputs = small(T=20, ignored="none", entropy=True)
    arguments = (
        inputs.head,
        inputs.targets,
        torch_blocks.forward_in_blocks(inputs.head, inputs.targets, HeadOptions()).lse,
    )
    upstream = RowGradients(inputs.d_token_logps, inputs.d_lse, inputs.d_entropy)
    full = torch_blocks.backward_in_blocks(*arguments, upstream, HeadOptions(), Needs(*[True] * 6))
    some = torch_blocks.backward_in_blocks(*arguments, upstream, HeadOptions(), Needs(*needs))
    for needed, a, b in zip(needs, some, full):
        assert (a is not None) == needed and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_blocks_accumulate_in_float32(dtype: torch.dtype) -> None:
    """16-bit inputs are widened first: the same bits as on widened inputs, and one rounding of each gradient."""
    inputs = make_inputs(Case("wide", 40, 24, 200, "", dtype, True, 3, 1.2, 9.0, ignored="none"))
    wide, options = inputs.to(torch.float32), HeadOptions(1.2, 9.0)
    upstream = RowGradients(inputs.d_token_logps.float(), inputs.d_lse.float())
    results = []
    for x in ((inputs.head, inputs.targets), (wide.head, wide.targets)):
        stats = torch_blocks.forward_in_blocks(*x, options)
        results.append((stats, torch_blocks.backward_in_blocks(*x, stats.lse, upstream, options, Needs(*[True] * 6))))
    (stats, gradients), (wide_stats, wide_gradients) = results
    assert all(map(torch.equal, stats, wide_stats))
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(gradients, wide_gradients))


def test_blocks_know_masks_and_ties() -> None:
    """Rows that begin with whole blocks of -inf, rows of NaN, ties across blocks."""
    options = HeadOptions(workspace_bytes=1)
    inputs = make_inputs(Case("masks", 20, 8, 100, "", torch.float64, bias=True, ignored="none"))
    targets = inputs.targets
    hidden, weight, bias, *_ = inputs.head
    bias[:48] = -torch.inf
    hidden[4] = torch.nan
    weight[99], bias[[60, 99]] = weight[60].clone(), 50.0
    targets[:2] = torch.tensor([60, 99])
    stats = torch_blocks.forward_in_blocks(inputs.head, targets, options)
    expected = reference.linear_logp_stats(hidden, weight, targets, bias)
    for field, a, e in zip(LogpStats._fields, stats, expected):
        torch.testing.assert_close(a, e, equal_nan=True, msg=lambda m, f=field: f"{f}: {m}")
    assert stats.is_top1 is not None and stats.is_top1[0] and not stats.is_top1[1]


@pytest.mark.parametrize("budget", [1, 2**12, 2**20, 2**28, 2**40])
def test_block_shape_stays_within_the_budget(budget: int) -> None:
    """Eight blocks of logits, and twice a widened slice of the weight, its gradient and a block of hidden."""
    for T, D, V in itertools.product([1, 37, 8192, 70000], [1, 64, 4096], [1, 300, 151936]):
        rows, columns = torch_blocks.block_shape(T, D, V, budget, 4)
        assert rows >= 16 and columns >= 16
        rows, columns = min(rows, T), min(columns, V)
        used = 4 * (8 * rows * columns + 4 * columns * D + 2 * rows * D)
        assert used <= max(budget, 4 * (8 * 256 + 4 * 16 * D + 2 * 16 * D)), (T, D, V)
