"""The ops and Functions under what PyTorch does to them: opcheck, torch.compile, autocast, torch.func, subsets of
gradients, a second backward."""

from __future__ import annotations

import itertools
from dataclasses import astuple

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.library import opcheck
from torch.testing import assert_close

from groupdpo_kernels import LogpStats, linear_logp_stats, linear_logps, reference, seq_logps
from groupdpo_kernels.lm_head import ops
from groupdpo_kernels.testing import Case, Inputs, make_inputs

HOST = ("reference", "cpu")
EVERYTHING = ("lse", "entropy", "mean_logits", "log_sum_sq_probs", "is_top1")
PLAIN = Case("plain", 12, 16, 50, "")
FULL = Case("full", 12, 16, 50, "", torch.bfloat16, True, 3, 1.3, 12.0, 0.8)
SHAPES = (
    PLAIN,
    FULL,
    Case("strided", 12, 16, 50, "", leading=(3, 4), strided=True, bias=True),
    Case("all_ignored", 6, 8, 20, "", ignored="all"),
    Case("empty", 0, 8, 20, "", bias=True, ignored="none"),
    Case("scalar", 1, 8, 20, "", ignored="none", leading=(1,)),
)
by_name = pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)


def stats_of(inputs: Inputs, case: Case, impl: str = "reference") -> LogpStats:
    return linear_logp_stats(
        inputs.hidden, inputs.weight, inputs.targets, inputs.bias, low_rank=inputs.low_rank, outputs=EVERYTHING,
        logit_scale=case.logit_scale, softcap=case.softcap, temperature=case.temperature, impl=impl,
    )  # fmt: skip


def gradients(loss: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(inputs.leaves.values()))


# ------------------------------------------------------------------------------------------------------- opcheck


@pytest.mark.parametrize("impl", HOST)
@pytest.mark.parametrize("stats", [False, True])
@by_name
def test_opcheck_forward(case: Case, stats: bool, impl: str) -> None:
    inputs = make_inputs(case)
    arguments = (*inputs.head, inputs.targets, *astuple(case.options), stats, impl)
    opcheck(torch.ops.groupdpo_kernels.linear_logps_forward.default, arguments)


@pytest.mark.parametrize("impl", HOST)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("needs", [(True,) * 6, (True, *(False,) * 5), (False, True, True, False, True, False)])
@by_name
def test_opcheck_backward(case: Case, needs: tuple[bool, ...], entropy: bool, impl: str) -> None:
    inputs = make_inputs(case)
    head = inputs.head
    lse = torch.ops.groupdpo_kernels.linear_logps_forward(*head, inputs.targets, *astuple(case.options), False, impl)[1]
    upstream = (inputs.d_token_logps.float(), inputs.d_lse.float(), inputs.d_lse.float() if entropy else None)
    asked = [a and b for a, b in zip(needs, inputs.needs._replace(mass=True))]
    arguments = (*head, inputs.targets, lse, *upstream, *astuple(case.options), asked, impl)
    opcheck(torch.ops.groupdpo_kernels.linear_logps_backward.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("offsets", [[0], [0, 5], [0, 0, 2, 5, 5]], ids=str)
def test_opcheck_segment_sums(offsets: list[int], dtype: torch.dtype) -> None:
    values = torch.randn(offsets[-1], dtype=dtype)
    for index in (torch.int32, torch.int64):
        for needs in (False, True):
            arguments = (values.clone().requires_grad_(needs), torch.tensor(offsets, dtype=index))
            opcheck(torch.ops.groupdpo_kernels.segment_sums.default, arguments)


def test_opcheck_refuse_gradient() -> None:
    for shape in ((0,), (4,), (2, 3)):
        opcheck(torch.ops.groupdpo_kernels.refuse_gradient.default, (torch.zeros(shape), "mean_logits"))


# ------------------------------------------------------------------------------------------------- torch.compile


def training_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cu_seqlens: Tensor, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What a trainer compiles: a layer before, all differentiable outputs, sums by sequence, a logged statistic."""
    outputs = ("lse", "entropy", "mean_logits")
    stats = linear_logp_stats(torch.tanh(hidden), weight, targets, bias, softcap=9.0, outputs=outputs, impl=impl)
    assert stats.lse is not None and stats.entropy is not None and stats.mean_logits is not None
    sums = seq_logps(stats.token_logps, cu_seqlens)
    return (
        -torch.nn.functional.logsigmoid(sums[0] - sums[1])
        + 1e-3 * stats.lse.square().mean()
        - 1e-2 * stats.entropy.mean(),
        sums,
        stats.mean_logits.detach(),
    )


@pytest.mark.parametrize(
    ("backend", "impl", "dtype"),
    [
        ("aot_eager", "reference", torch.float32),
        ("aot_eager", "cpu", torch.bfloat16),
        ("inductor", "cpu", torch.float32),
    ],
)
def test_compile(backend: str, impl: str, dtype: torch.dtype) -> None:
    """One graph, the same numbers, and one compilation for every T."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(training_loss, backend=counter, fullgraph=True)
    for T in (12, 20, 31):
        inputs = make_inputs(Case("compile", T, 16, 50, "", dtype, bias=True))
        torch._dynamo.mark_dynamic(inputs.hidden, 0)
        torch._dynamo.mark_dynamic(inputs.targets, 0)
        cu_seqlens = torch.tensor([0, T // 3, T])
        results = []
        for function in (training_loss, compiled):
            loss, sums, mean = function(inputs.hidden, inputs.weight, inputs.bias, inputs.targets, cu_seqlens, impl)
            results.append((loss, sums, mean, *gradients(loss, inputs)))
        exact = backend == "aot_eager"
        for expected, actual in zip(*results):
            assert_close(actual, expected, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
    assert counter.frame_count == 1


def test_compile_every_option_and_statistic() -> None:
    torch._dynamo.reset()
    inputs = make_inputs(FULL)
    compiled = torch.compile(lambda: stats_of(inputs, FULL), backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, lambda: stats_of(inputs, FULL)):
        stats = function()
        assert stats.lse is not None and stats.entropy is not None
        loss = (stats.token_logps * inputs.d_token_logps + stats.lse * inputs.d_lse + stats.entropy.square()).sum()
        results.append((*stats, *gradients(loss, inputs)))
    assert all(map(torch.equal, *results))


def test_compile_frozen_head() -> None:
    """The usual DPO case: the head needs no gradient, in the compiled graph neither."""
    torch._dynamo.reset()
    inputs = make_inputs(PLAIN)
    weight = inputs.weight.detach()
    compiled = torch.compile(linear_logps, backend="aot_eager", fullgraph=True)
    (actual,) = torch.autograd.grad(compiled(inputs.hidden, weight, inputs.targets).sum(), inputs.hidden)
    (expected,) = torch.autograd.grad(linear_logps(inputs.hidden, weight, inputs.targets).sum(), inputs.hidden)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("name", "values"), [("temperature", (0.5, 0.7, 2)), ("softcap", (5.0, 7.5, 3))])
def test_compile_with_a_number_that_changes(name: str, values: tuple[float, ...], backend: str) -> None:
    """From its second value on, torch.compile traces a float as a symbol, on which math.isfinite cannot be called."""
    torch._dynamo.reset()
    inputs = make_inputs(PLAIN)

    def forward(value: float) -> Tensor:
        return linear_logps(inputs.hidden, inputs.weight, inputs.targets, **{name: value})  # type: ignore[arg-type]

    compiled = torch.compile(forward, backend=backend, fullgraph=True)
    for value in values:
        actual, expected = compiled(value), forward(value)
        assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        for x, y in zip(gradients(actual.sum(), inputs), gradients(expected.sum(), inputs)):
            assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_compile_raises_on_wrong_ids_when_it_runs() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear_logps, backend="aot_eager", fullgraph=True)
    inputs = make_inputs(PLAIN)
    compiled(inputs.hidden, inputs.weight, inputs.targets)
    with pytest.raises(ValueError, match=r"targets must be in \[0, V = 50\).*is 50 \(1 such rows\)"):
        compiled(inputs.hidden, inputs.weight, inputs.targets.index_fill(0, torch.tensor([3]), 50))


# ------------------------------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("impl", HOST)
@pytest.mark.parametrize("leave_before_backward", [False, True])
def test_autocast(leave_before_backward: bool, impl: str) -> None:
    """What F.linear does: float32 and bf16 inputs meet in bf16, gradients come back in each input's dtype. Nothing
    inside is narrowed further: the bits are those of explicit casts."""
    case = Case("autocast", 14, 16, 50, "", bias=True, R=3)
    inputs = make_inputs(case)
    hidden = inputs.hidden.detach().bfloat16().requires_grad_()  # as a layer under autocast leaves it
    assert inputs.bias is not None and inputs.low_rank is not None
    leaves = (hidden, inputs.weight, inputs.bias, *inputs.low_rank)
    with torch.autocast("cpu", torch.bfloat16):
        logps = linear_logps(hidden, inputs.weight, inputs.targets, inputs.bias, low_rank=inputs.low_rank, impl=impl)
        linear = torch.nn.functional.linear(hidden, inputs.weight, inputs.bias)
        if not leave_before_backward:
            actual = torch.autograd.grad((logps * inputs.d_token_logps).sum(), leaves)
    if leave_before_backward:
        actual = torch.autograd.grad((logps * inputs.d_token_logps).sum(), leaves)
    assert linear.dtype == torch.bfloat16 and logps.dtype == torch.float32

    def cast(x: Tensor) -> Tensor:
        return x.to(torch.bfloat16)

    pair = (cast(inputs.low_rank[0]), cast(inputs.low_rank[1]))
    explicit = linear_logps(hidden, cast(inputs.weight), inputs.targets, cast(inputs.bias), low_rank=pair, impl=impl)
    expected = torch.autograd.grad((explicit * inputs.d_token_logps).sum(), leaves)
    assert torch.equal(logps, explicit) and all(map(torch.equal, actual, expected))
    assert [g.dtype for g in actual] == [x.dtype for x in leaves]


def test_autocast_leaves_float64_alone_and_can_be_off() -> None:
    inputs = make_inputs(PLAIN)
    double = inputs.to(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_logps(double.hidden, double.weight, double.targets).dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            inside = linear_logps(inputs.hidden, inputs.weight, inputs.targets)
    assert torch.equal(inside, linear_logps(inputs.hidden, inputs.weight, inputs.targets))


def test_autocast_under_compile() -> None:
    torch._dynamo.reset()

    def forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear_logps(hidden, weight, targets)

    inputs = make_inputs(PLAIN)
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    results = []
    for function in (forward, compiled):
        logps = function(inputs.hidden, inputs.weight, inputs.targets)
        results.append((logps, *gradients(logps.sum(), inputs)))
    assert all(map(torch.equal, *results))


# -------------------------------------------------------------------------------------------------- what autograd asks


@pytest.mark.parametrize("impl", HOST)
def test_func_grad(impl: str) -> None:
    inputs = make_inputs(PLAIN)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        stats = linear_logp_stats(hidden, weight, inputs.targets, impl=impl)
        return (stats.token_logps * inputs.d_token_logps + stats.entropy * inputs.d_lse).sum()

    actual = torch.func.grad(loss, argnums=(0, 1))(inputs.hidden.detach(), inputs.weight.detach())
    assert all(map(torch.equal, actual, gradients(loss(inputs.hidden, inputs.weight), inputs)))


@pytest.mark.parametrize("impl", HOST)
def test_a_second_backward_raises(impl: str) -> None:
    """First order only: the Hessian of a loss through the head must not be a silent zero."""
    inputs = make_inputs(PLAIN)
    logps = linear_logps(inputs.hidden, inputs.weight, inputs.targets, impl=impl)
    (d_hidden,) = torch.autograd.grad(logps.square().sum(), inputs.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_hidden.sum().backward()


def test_checkpointing_recomputes() -> None:
    inputs = make_inputs(PLAIN)
    arguments = (inputs.hidden, inputs.weight, inputs.targets)
    again = torch.utils.checkpoint.checkpoint(linear_logps, *arguments, use_reentrant=False)
    assert all(map(torch.equal, gradients(again.sum(), inputs), gradients(linear_logps(*arguments).sum(), inputs)))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5)), ids=str)
def test_every_subset_of_needs_input_grad(needs: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd asks the op for exactly the gradients of the leaves that need one, and hands each to its leaf."""
    inputs = make_inputs(FULL)
    leaves = dict(zip(inputs.leaves, needs))
    for name, needed in leaves.items():
        inputs.leaves[name].requires_grad_(needed)
    asked: list[tuple[bool, ...]] = []
    real = ops.linear_logps_backward

    def backward(*arguments: object) -> object:
        asked.append(arguments[5])  # type: ignore[arg-type]
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "linear_logps_backward", backward)
    logps = stats_of(inputs, FULL).token_logps
    assert logps.requires_grad == any(needs)
    if any(needs):
        (logps * inputs.d_token_logps).sum().backward()
        assert asked == [(*needs, False)]
    truth = make_inputs(FULL)
    expected = dict(zip(leaves, gradients((stats_of(truth, FULL).token_logps * truth.d_token_logps).sum(), truth)))
    for name, needed in leaves.items():
        gradient = inputs.leaves[name].grad
        assert (gradient is not None) == needed and (gradient is None or torch.equal(gradient, expected[name]))


@pytest.mark.parametrize("used", ["token_logps", "lse", "entropy"])
def test_one_output_unused(used: str) -> None:
    """The others then have no upstream gradient; the result is the specification's."""
    inputs = make_inputs(PLAIN)
    stats = stats_of(inputs, PLAIN)
    expected = reference.linear_logp_stats(inputs.hidden, inputs.weight, inputs.targets)
    for actual, wanted in zip(
        gradients(getattr(stats, used).sum(), inputs), gradients(getattr(expected, used).sum(), inputs)
    ):
        assert_close(actual, wanted)
