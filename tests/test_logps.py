"""The public functions beyond numbers: which outputs exist, which carry a gradient, LinearLogps.apply, seq_logps."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from groupdpo_kernels import LinearLogps, LogpStats, explain, linear_logp_stats, linear_logps, reference, seq_logps
from groupdpo_kernels.reference import HeadOptions
from groupdpo_kernels.testing import Case, Inputs, make_inputs, triton_on_cpu

EVERYTHING = ("lse", "entropy", "mean_logits", "log_sum_sq_probs", "is_top1")
PLAIN = Case("plain", 12, 16, 50, "")
FULL = Case("full", 12, 16, 50, "", torch.bfloat16, True, 3, 1.3, 12.0, 0.8)


def stats_of(inputs: Inputs, case: Case) -> LogpStats:
    return linear_logp_stats(
        inputs.hidden, inputs.weight, inputs.targets, inputs.bias, low_rank=inputs.low_rank, outputs=EVERYTHING,
        logit_scale=case.logit_scale, softcap=case.softcap, temperature=case.temperature, impl="reference",
    )  # fmt: skip


def gradients(loss: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(inputs.leaves.values()))


@pytest.mark.parametrize("name", ["mean_logits", "log_sum_sq_probs"])
def test_a_gradient_into_a_statistic_raises(name: str) -> None:
    """Never a silent zero: not eager, not mixed with a real gradient, not compiled, not through torch.func."""
    inputs = make_inputs(PLAIN)

    def loss(hidden: Tensor) -> Tensor:
        stats = linear_logp_stats(hidden, inputs.weight, inputs.targets, outputs=(name,))
        return stats.token_logps.sum() + getattr(stats, name).sum()

    message = f"{name} is not differentiable: only token_logps, lse and entropy are"
    with pytest.raises(RuntimeError, match=message):
        loss(inputs.hidden).backward()
    with pytest.raises(RuntimeError, match=message):
        getattr(linear_logp_stats(inputs.hidden, inputs.weight, inputs.targets, outputs=(name,)), name).sum().backward()
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(loss)(inputs.hidden.detach())
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=message):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(inputs.hidden).backward()


def test_a_statistic_may_be_logged() -> None:
    """Detached or merely unused, it disturbs nothing; is_top1 carries no gradient by type."""
    inputs = make_inputs(PLAIN)
    stats = stats_of(inputs, PLAIN)
    assert stats.mean_logits is not None and stats.mean_logits.requires_grad
    assert not stats.mean_logits.detach().requires_grad
    assert stats.is_top1 is not None and stats.is_top1.dtype == torch.bool and not stats.is_top1.requires_grad
    bare = linear_logps(inputs.hidden, inputs.weight, inputs.targets, impl="reference")
    assert all(map(torch.equal, gradients(stats.token_logps.sum(), inputs), gradients(bare.sum(), inputs)))
    with torch.no_grad():
        entropy = stats_of(inputs, PLAIN).entropy
    assert entropy is not None and not entropy.requires_grad


@pytest.mark.parametrize("outputs", [s for n in range(3) for s in itertools.combinations(EVERYTHING, n)], ids=str)
def test_outputs_not_asked_for_are_none(outputs: tuple[str, ...]) -> None:
    inputs = make_inputs(PLAIN)
    stats = linear_logp_stats(inputs.hidden, inputs.weight, inputs.targets, outputs=outputs, impl="reference")
    assert isinstance(stats, LogpStats)
    for name, value in stats._asdict().items():
        assert (value is not None) == (name in ("token_logps", *outputs))
        assert value is None or value.shape == inputs.targets.shape


@pytest.mark.parametrize("stats", [False, True])
def test_linear_logps_apply(stats: bool) -> None:
    """The Function is public: for code that calls it in place of a chunked head of its own."""
    inputs = make_inputs(FULL)
    assert inputs.low_rank is not None
    arguments = (inputs.hidden, inputs.weight, inputs.targets, inputs.bias, *inputs.low_rank)
    out = LinearLogps.apply(*arguments, FULL.options, stats, "reference", None)
    expected = stats_of(inputs, FULL)
    assert torch.equal(out[0], expected.token_logps) and torch.equal(out[1], expected.lse)
    assert [x.numel() for x in out[2:]] == [12 if stats else 0] * 4
    assert [x.requires_grad for x in out] == [True, True, stats, False, False, False]
    loss = (out[0] * inputs.d_token_logps + out[1] * inputs.d_lse).sum()
    wanted = (expected.token_logps * inputs.d_token_logps + expected.lse * inputs.d_lse).sum()  # type: ignore[operator]
    assert all(map(torch.equal, gradients(loss, inputs), gradients(wanted, inputs)))


def test_defaults_of_the_options() -> None:
    assert HeadOptions() == HeadOptions(1.0, None, 1.0, -100, 2**28)


# ----------------------------------------------------------------------------------------------------- seq_logps


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_seq_logps(index: torch.dtype) -> None:
    """Empty sequences at both ends and in the middle; a NaN stays in its sequence."""
    values = torch.randn(11, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 0, 4, 4, 10, 11, 11], dtype=index)
    actual = seq_logps(values, cu_seqlens)
    expected = reference.seq_logps(values, cu_seqlens)
    assert_close(actual, expected)
    upstream = torch.randn(6, dtype=torch.float64)
    for x in (actual, expected):
        (g,) = torch.autograd.grad(x, values, upstream)
        assert torch.equal(g, upstream[[1] * 4 + [3] * 6 + [4]])
    poisoned = values.detach().clone()
    poisoned[5] = torch.nan
    assert seq_logps(poisoned, cu_seqlens).isnan().tolist() == [False, False, False, True, False, False]
    assert seq_logps(values[:0], cu_seqlens[:1]).shape == (0,)
    assert torch.autograd.gradcheck(lambda x: seq_logps(x, cu_seqlens), values)


def test_seq_logps_of_a_million_tokens() -> None:
    """Every sum is the float32 nearest to the exact one, however long the sequence and wherever it lies."""
    T = 10**6
    values = -torch.rand(T) * 12
    cu_seqlens = torch.tensor([0, 1, 10, 500_000, 500_003, T])
    exact = reference.seq_logps(values.double(), cu_seqlens)
    assert torch.equal(seq_logps(values, cu_seqlens), exact.float())


def test_seq_logps_differentiates_twice() -> None:
    """It is linear, so a second order through it is fine."""
    values = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: seq_logps(x, torch.tensor([0, 2, 5])), values)


def same_graph(function: Callable[..., Tensor], *arguments: Tensor) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), function(*arguments))


def test_seq_logps_compiles() -> None:
    same_graph(seq_logps, torch.randn(7), torch.tensor([0, 3, 7]))
    same_graph(seq_logps, torch.randn(7, requires_grad=True), torch.tensor([0, 7]))


# ------------------------------------------------------------------------------------------------------- explain


def test_auto_takes_the_extension_on_a_cpu_and_says_why() -> None:
    inputs = make_inputs(PLAIN)
    explanation = explain(inputs.hidden, inputs.weight, inputs.targets)
    assert explanation.impl == "cpu" and explanation.why_not["cpu"] == [] and explanation.why_not["reference"] == []
    assert str(explanation).splitlines() == [
        "auto picks 'cpu'",
        "  triton: hidden is on cpu: the Triton kernels want a GPU",
        "  reference: could run; 'cpu' comes first",
        "the path is 'exact': every logit, and in the backward again",
        "  vocabulary-parallel: no process_group is given",
        "  frozen head: the head needs a gradient",
        "  candidates: grad_tol is 0",
        "  logit cache: a cache does not fit or does not pay here",
        "  known lse: no lse is known: this is no second pass",
    ]
    arguments = (inputs.hidden, inputs.weight, inputs.targets)
    assert torch.equal(linear_logps(*arguments), linear_logps(*arguments, impl="cpu"))


def test_auto_takes_the_reference_for_float64() -> None:
    inputs = make_inputs(FULL).to(torch.float64)
    explanation = explain(inputs.hidden, inputs.weight, inputs.targets, inputs.bias, low_rank=inputs.low_rank)
    assert explanation.impl == "reference"
    for name in ("triton", "cpu"):
        assert "hidden is float64: only the reference computes in float64" in explanation.why_not[name]


def test_each_path_is_taken_by_a_call_that_has_nothing_against_it() -> None:
    """The path that explain names is the one that the call runs: each has a node of its own in the graph."""
    nodes = {"exact": "ExactLinearLogps", "frozen head": "Frozen", "candidates": "Sparse", "logit cache": "Cached"}
    wide = make_inputs(replace(PLAIN, D=1024, T=64, V=300))
    small = make_inputs(PLAIN)
    frozen = small.hidden, small.weight.detach(), small.targets
    calls: list[tuple[str, Any, dict[str, Any]]] = [
        ("exact", (small.hidden, small.weight, small.targets), {}),
        ("frozen head", frozen, {}),
        ("exact", frozen, {"workspace_bytes": 100}),
        ("candidates", (small.hidden, small.weight, small.targets), {"grad_tol": 0.01}),
        ("frozen head", frozen, {"grad_tol": 0.01}),
        ("candidates", frozen, {"grad_tol": 0.01, "grad_tail": "sample"}),
        ("logit cache", (wide.hidden, wide.weight, wide.targets), {}),
    ]
    for path, arguments, options in calls:
        found = explain(*arguments, **options)
        assert found.path == path and all(found.path_why_not.values())
        assert nodes[path] in linear_logps(*arguments, **options).grad_fn.name()
    with torch.no_grad():
        assert explain(*frozen).path == "exact"


def test_auto_takes_triton_where_it_runs() -> None:
    inputs = make_inputs(PLAIN)
    with triton_on_cpu():
        assert explain(inputs.hidden, inputs.weight, inputs.targets).impl == "triton"
        found = explain(inputs.hidden, inputs.weight, inputs.targets, grad_tol=0.01)
        assert found.path == "candidates" and "rows run in Triton, not in CUDA C++" in str(found)
