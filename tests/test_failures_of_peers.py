"""What broke in other implementations of a fused LM head, each by name; and that the error budget, which most of these
stand on, would have seen it: the same mistakes, put into correct code, do not pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from groupdpo_kernels import LogpStats, linear_logp_stats, linear_logps
from groupdpo_kernels.kernels.linear_logps_backward import linear_logps_backward
from groupdpo_kernels.kernels.linear_logps_forward import linear_logps_forward
from groupdpo_kernels.reference import HeadOptions, Needs, RowGradients, head_of
from groupdpo_kernels.testing import (
    CASES,
    Case,
    Inputs,
    check_budget,
    eager,
    error,
    exact,
    make_inputs,
    run,
    triton_on_cpu,
)

BY_NAME = {case.name: case for case in CASES}
HOST = ("auto", "reference", "cpu")


def ours(impl: str = "auto") -> Callable[..., LogpStats]:
    def stats(
        h: Tensor, w: Tensor, y: Tensor, b: Tensor | None, low_rank: tuple[Tensor, Tensor] | None, o: HeadOptions
    ):
        options = {name: getattr(o, name) for name in ("logit_scale", "softcap", "temperature", "workspace_bytes")}
        return linear_logp_stats(h, w, y, b, low_rank=low_rank, outputs=("lse",), impl=impl, **options)

    return stats


def within_budget(case: Case, impl: str) -> None:
    inputs = make_inputs(case)
    check_budget(run(ours(impl), inputs, case.options), inputs, case.options)


# --------------------------------------------------------------------------------------------- one failure, one test


@pytest.mark.parametrize("impl", HOST)
def test_upstream_gradients_that_are_not_uniform(impl: str) -> None:
    """Liger#1298: gradients right for a mean alone. Here: one row, one negative, every other one, twelve decades."""
    case = replace(BY_NAME["ragged_all"], ignored="none")
    inputs = make_inputs(case)
    for pattern in (
        torch.eye(case.T)[5],
        -torch.eye(case.T)[5],
        torch.arange(case.T) % 2,
        torch.logspace(-6, 6, case.T),
    ):
        one = replace(inputs, d_token_logps=pattern.double(), d_lse=torch.zeros_like(inputs.d_lse))
        check_budget(run(ours(impl), one, case.options), one, case.options)


@pytest.mark.parametrize("impl", HOST)
@pytest.mark.parametrize("V", [507, 50257, 129920, 151936])
def test_no_phantom_logits_in_the_last_tile(V: int, impl: str) -> None:
    """verl#2656, #2899: padded columns of logit 0 entered the sum. With all logits near -60 one such would win."""
    within_budget(Case("phantom", 7, 16, V, "", bias=True, shift=-60.0), impl)


def test_no_phantom_logits_in_an_interpreted_tile() -> None:
    """The same in the Triton kernels, V one below, at and above the tile."""
    for V in (255, 256, 257):
        inputs = make_inputs(Case("phantom", 5, 16, V, "", bias=True, shift=-60.0))
        with triton_on_cpu(BLOCK_T=16, BLOCK_V=256, BLOCK_D=16):
            result = run(ours("triton"), inputs, HeadOptions())
        check_budget(result, inputs, HeadOptions())


@pytest.mark.parametrize("D", [8, 64, 65, 129, 260, 1000])
def test_the_bias_is_added_once(D: int) -> None:
    """CCE#52: once per block of D. A large bias and a hidden state of zero leave the bias alone."""
    bias = torch.randn(300) * 50
    hidden, weight, targets = torch.zeros(4, D), torch.randn(300, D), torch.tensor([0, 1, 150, 299])
    expected = torch.log_softmax(bias, 0)[targets]
    for impl in HOST:
        torch.testing.assert_close(linear_logps(hidden, weight, targets, bias, impl=impl), expected)
    with triton_on_cpu(BLOCK_T=16, BLOCK_V=256, BLOCK_D=64):
        torch.testing.assert_close(linear_logps(hidden, weight, targets, bias, impl="triton"), expected)


@pytest.mark.parametrize("impl", HOST)
def test_more_rows_than_a_grid_dimension(impl: str) -> None:
    """Liger#1294: 65,536 programs in the second dimension of a grid."""
    within_budget(Case("rows", 70000, 4, 16, "", workspace_bytes=2**22), impl)


def test_grids_have_one_dimension() -> None:
    """The same in Triton: a GPU takes 2^31 - 1 programs in the first dimension, 65,535 in the others."""
    grids = []

    def launch(self: object, *args: object, grid: tuple[int, ...], warmup: bool, **kwargs: object) -> None:
        grids.append(grid)

    T, D, V = 200_000, 512, 256_000
    hidden, weight = (torch.empty(n, D, device="meta", requires_grad=True) for n in (T, V))
    targets, rows = torch.empty(T, dtype=torch.int64, device="meta"), torch.empty(T, device="meta")
    head, options = head_of(hidden, weight), HeadOptions(workspace_bytes=2**40)
    for tma in (True, False):
        with triton_on_cpu(BLOCK_T=128, BLOCK_V=128, tma=tma), pytest.MonkeyPatch.context() as patch:
            patch.setattr(JITFunction, "run", launch)
            linear_logps_forward(head, targets, options, True)
            linear_logps_backward(head, targets, rows, RowGradients(rows, rows), options, Needs(True, True))
    assert len(grids) > 4 and all(len(grid) == 1 and 0 < grid[0] < 2**31 for grid in grids)


@pytest.mark.parametrize("far", ["weight", "hidden"])
def test_offsets_past_two_to_the_31(far: str) -> None:
    """32-bit offsets: rows of a view so far apart that the last begins past 2^31 elements. Only the pages of those rows
    exist, and the interpreter's integers wrap as a GPU's do: a short offset reads outside the view, and crashes."""
    T, V, D, stride = 5, 5, 16, 2**29 + 64
    inputs = make_inputs(Case("far", T, D, V, "", torch.bfloat16, ignored="none"))
    storage = torch.empty(4 * stride + D, dtype=torch.bfloat16)
    near = getattr(inputs, far).detach()
    view = storage.as_strided(near.shape, (stride, 1)).copy_(near).requires_grad_()
    expected = run(ours("reference"), inputs, HeadOptions())
    with triton_on_cpu(BLOCK_T=16, BLOCK_V=16, BLOCK_D=16, tma=False):
        actual = run(ours("triton"), replace(inputs, **{far: view}), HeadOptions())
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("impl", HOST)
@pytest.mark.parametrize("ignored", ["all", "first", "last", "some", "none"])
def test_ignored_rows_anywhere(ignored: str, impl: str) -> None:
    """All, the first, the last: zeros, not NaN, and no row's result moves to another row."""
    for T in (0, 1, 9):
        within_budget(Case("ignored", T, 8, 40, "", bias=True, ignored=ignored), impl)


def test_a_frozen_head_gets_no_gradient() -> None:
    """Liger#1441, fla#1253: d_weight computed all the same. (test_workspace.py counts the memory.)"""
    inputs = make_inputs(Case("frozen", 9, 8, 40, ""))
    inputs.weight.requires_grad_(False)
    linear_logps(inputs.hidden, inputs.weight, inputs.targets).sum().backward()
    assert inputs.weight.grad is None and inputs.hidden.grad is not None


@pytest.mark.parametrize("impl", HOST)
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)), ids=str)
def test_hidden_or_weight_alone_needs_a_gradient(needs: tuple[bool, bool], impl: str) -> None:
    """mgmalek's implementation fails when only one does."""
    inputs = make_inputs(Case("alone", 9, 8, 40, ""))
    inputs.hidden.requires_grad_(needs[0])
    inputs.weight.requires_grad_(needs[1])
    logps = linear_logps(inputs.hidden, inputs.weight, inputs.targets, impl=impl)
    assert logps.requires_grad == any(needs)
    if any(needs):
        logps.sum().backward()
    assert (inputs.hidden.grad is not None, inputs.weight.grad is not None) == needs


def test_autocast_is_not_bypassed() -> None:
    """trl#6988: a custom Function sees the uncast inputs. Float32 in, and the product is in bf16 all the same."""
    inputs = make_inputs(Case("autocast", 9, 64, 40, ""))
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear_logps(inputs.hidden, inputs.weight, inputs.targets)
    outside = linear_logps(inputs.hidden, inputs.weight, inputs.targets)
    cast = linear_logps(inputs.hidden.bfloat16(), inputs.weight.bfloat16(), inputs.targets)
    assert torch.equal(inside, cast) and not torch.equal(inside, outside)


@pytest.mark.parametrize("impl", HOST)
@pytest.mark.parametrize("option", ["softcap", "logit_scale", "temperature"])
def test_no_option_is_ignored(option: str, impl: str) -> None:
    """unsloth-zoo#593, trl#6629: each moves every result, values and gradients, to where the model's own logits are."""
    plain = Case("option", 9, 16, 40, "", hidden_scale=4.0)
    case = replace(plain, **{option: {"softcap": 5.0, "logit_scale": 0.25, "temperature": 0.7}[option]})
    within_budget(case, impl)
    results = [run(ours(impl), make_inputs(c), c.options) for c in (plain, case)]
    assert not any(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("impl", HOST)
def test_logits_are_not_rounded_to_bf16(impl: str) -> None:
    """trl#4303, NeMo-RL#3936: bf16 logits disagree with the generator. Ours are ten times nearer to the truth."""
    case = BY_NAME["ragged_bf16"]
    inputs = make_inputs(case)
    truth = exact(inputs, case.options)["token_logps"]
    rounded = error(run(eager, inputs, case.options)["token_logps"], truth)
    assert error(run(ours(impl), inputs, case.options)["token_logps"], truth) < rounded / 10


# ------------------------------------------------------------------------------- the budget sees what went wrong


def phantom_column(h: Tensor, w: Tensor, y: Tensor, b: Tensor | None, low_rank: object, o: HeadOptions) -> LogpStats:
    z = torch.nn.functional.linear(h, w, b).float()
    lse = torch.logsumexp(torch.nn.functional.pad(z, (0, 1)), -1)
    return picked(z, lse, y)


def bias_twice(h: Tensor, w: Tensor, y: Tensor, b: Tensor | None, low_rank: object, o: HeadOptions) -> LogpStats:
    assert b is not None
    return eager(h, w, y, 2 * b, low_rank, o)


def uniform_upstream(h: Tensor, w: Tensor, y: Tensor, b: Tensor | None, low_rank: object, o: HeadOptions) -> LogpStats:
    stats = eager(h, w, y, b, low_rank, o)
    logps = stats.token_logps
    mean = logps.mean() * torch.ones_like(logps)
    return LogpStats(logps.detach() + mean - mean.detach(), stats.lse)


def rounded_logits(h: Tensor, w: Tensor, y: Tensor, b: Tensor | None, low_rank: object, o: HeadOptions) -> LogpStats:
    return picked((h.float() @ w.float().T).bfloat16().float(), None, y)


def rounded_gradients(h: Tensor, w: Tensor, y: Tensor, b: Tensor | None, low_rank: object, o: HeadOptions) -> LogpStats:
    return picked(RoundedGradient.apply(h) @ w.T + (b if b is not None else 0), None, y)


def dropped_block(h: Tensor, w: Tensor, y: Tensor, b: Tensor | None, low_rank: object, o: HeadOptions) -> LogpStats:
    """Probabilities under 2^-12 get no gradient, as under a filter without a bound."""
    z = torch.nn.functional.linear(h, w, b).float()
    p = torch.softmax(z, -1).detach()
    kept = torch.where(p < 2**-12, z.detach(), z)
    return picked(kept, None, y)


def shifted_rows(h: Tensor, w: Tensor, y: Tensor, b: Tensor | None, low_rank: object, o: HeadOptions) -> LogpStats:
    """One token off, in the last row alone."""
    wrong = y.clone()
    wrong[-1] = 0
    return eager(h, w, wrong, b, low_rank, o)


def low_rank_off_a_little(
    h: Tensor, w: Tensor, y: Tensor, b: Tensor | None, low_rank: object, o: HeadOptions
) -> LogpStats:
    assert isinstance(low_rank, tuple)
    return eager(h, w, y, b, (low_rank[0] * (1 + 2e-5), low_rank[1]), o)


def picked(z: Tensor, lse: Tensor | None, y: Tensor) -> LogpStats:
    live = y != -100
    lse = torch.logsumexp(z, -1) if lse is None else lse
    target = z.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return LogpStats(torch.where(live, target - lse, 0), torch.where(live, lse, 0))


class RoundedGradient(torch.autograd.Function):
    """The gradient of hidden passes through bf16 though its dtype is float32."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g.bfloat16().float()


MISTAKES: list[tuple[Callable[..., LogpStats], str]] = [
    (phantom_column, "negative"),
    (phantom_column, "gpt2_vocab"),
    (phantom_column, "ragged_bf16"),
    (bias_twice, "bias"),
    (bias_twice, "bias_bf16"),
    (uniform_upstream, "plain"),
    (uniform_upstream, "ragged_bf16"),
    (rounded_logits, "ragged_bf16"),
    (rounded_logits, "qwen_vocab"),
    (rounded_gradients, "plain"),
    (dropped_block, "confident"),
    (dropped_block, "gpt2_vocab"),
    (shifted_rows, "ragged_bf16"),
    (low_rank_off_a_little, "low_rank"),
]


@pytest.mark.parametrize(("mistake", "name"), MISTAKES, ids=lambda x: getattr(x, "__name__", x))
def test_the_budget_sees_it(mistake: Callable[..., LogpStats], name: str) -> None:
    case = BY_NAME[name]
    inputs: Inputs = make_inputs(case)
    check_budget(run(eager, inputs.to(torch.float32), case.options), inputs.to(torch.float32), case.options)
    with pytest.raises(AssertionError, match="exceeds the budget"):
        check_budget(run(mistake, inputs, case.options), inputs, case.options)


@pytest.mark.parametrize("field", ["token_logps", "lse", "d_hidden", "d_weight", "d_bias"])
def test_the_budget_sees_one_wrong_entry(field: str) -> None:
    """A NaN, a lost entry, a wrong shape and a wrong dtype, in every field."""
    case = BY_NAME["bias"]
    inputs = make_inputs(case)
    result = run(ours(), inputs, case.options)
    x = result[field]
    at = x.abs().argmax()
    for wrong in (torch.nan, 0.0, float(x.flatten()[at]) * (1 + 1e-4)):
        broken = x.clone()
        broken.view(-1)[at] = wrong
        with pytest.raises(AssertionError, match=f"{field}: .*exceeds the budget"):
            check_budget(result | {field: broken}, inputs, case.options)
    for odd in (x[None], x.double()):
        with pytest.raises(AssertionError, match=f"{field} must be"):
            check_budget(result | {field: odd}, inputs, case.options)


def test_the_budget_sees_a_small_row() -> None:
    """A gradient of a token that hardly matters, wrong by a tenth: invisible beside the largest entries, and seen."""
    case = BY_NAME["confident"]
    inputs = make_inputs(case)
    result = run(ours(), inputs, case.options)
    norms = result["d_weight"].norm(dim=1)
    broken = result["d_weight"].clone()
    broken[norms.argmin()] *= 1.1
    assert error(broken, result["d_weight"].double()) < 1e-6
    with pytest.raises(AssertionError, match="d_weight: worst row error"):
        check_budget(result | {"d_weight": broken}, inputs, case.options)
