"""A head that needs no gradient: the forward stores d token_logps / d hidden, the backward scales its rows."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_workspace import FULL_SIZES, SIZES, Allocations, launching_nothing, on_meta
from torch import Tensor
from torch.library import opcheck

from groupdpo_kernels import linear_logp_stats, linear_logps
from groupdpo_kernels.lm_head import ops
from groupdpo_kernels.testing import CASES, Case, Inputs, Result, check_budget, make_inputs, triton_on_cpu

IMPLS = ("reference", "cpu", "triton")
BY_NAME = {case.name: case for case in CASES}
LOGPS_ALONE = [case for case in CASES if not case.entropy]
# Interpreted tiles are slow: the cases that differ in this kernel.
INTERPRETED = (
    "plain",
    "one_column",
    "ragged_all",
    "unaligned_bf16",
    "gpt2_vocab",
    "negative",
    "confident_bf16",
    "softcap_tight_bf16",
    "everything",
    "everything_fp16",
    "low_rank_wide_bf16",
    "most_ignored_bf16",
    "all_ignored",
    "empty",
    "strided_deep",
    "tiny_workspace",
    "tiny_workspace_bf16",
)


@contextlib.contextmanager
def able(impl: str, case: Case) -> Iterator[None]:
    blocks = (64, 256, 64) if case.V < 2000 else (16, 16384, 16)
    on_cpu = impl in ("triton", "library")
    with triton_on_cpu(*blocks, tma=True, library=impl == "library") if on_cpu else contextlib.nullcontext():
        yield


def freeze(inputs: Inputs) -> Inputs:
    """The same inputs, of which only hidden and low_rank[0] require grad; no gradient into lse."""
    pair = None if inputs.low_rank is None else (inputs.low_rank[0], inputs.low_rank[1].detach())
    bias = None if inputs.bias is None else inputs.bias.detach()
    return dataclasses.replace(inputs, weight=inputs.weight.detach(), bias=bias, low_rank=pair)


def logps_of(inputs: Inputs, case: Case, impl: str) -> Tensor:
    options = {name: getattr(case.options, name) for name in ("logit_scale", "softcap", "temperature")}
    impl = "triton" if impl == "library" else impl
    options |= {"workspace_bytes": case.workspace_bytes, "low_rank": inputs.low_rank, "impl": impl}
    return linear_logps(inputs.hidden, inputs.weight, inputs.targets, inputs.bias, **options)


def result_of(inputs: Inputs, case: Case, impl: str, interpreted: bool = True) -> Result:
    with able(impl, case) if interpreted else contextlib.nullcontext():
        logps = logps_of(inputs, case, impl)
        assert isinstance(logps.grad_fn, torch.autograd.function.BackwardCFunction)
        assert type(logps.grad_fn).__name__ == "FrozenLinearLogpsBackward"
        leaves = {"hidden": inputs.hidden} | (
            {} if inputs.low_rank is None else {"low_rank_hidden": inputs.low_rank[0]}
        )
        gradients = torch.autograd.grad((logps.double() * inputs.d_token_logps).sum(), list(leaves.values()))
    return {"token_logps": logps.detach()} | {f"d_{name}": g for name, g in zip(leaves, gradients)}


@pytest.mark.parametrize(
    ("impl", "case"),
    [(impl, case) for impl in IMPLS for case in LOGPS_ALONE if impl != "triton" or case.name in INTERPRETED]
    + [("library", BY_NAME[name]) for name in ("ragged_all", "everything_fp16", "all_ignored", "tiny_workspace_bf16")],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_case(impl: str, case: Case, poisoned_memory: None) -> None:
    if case.name == "tiny_workspace_bf16":
        case = dataclasses.replace(case, workspace_bytes=2**16)
    elif case.workspace_bytes < 2**16:
        case = dataclasses.replace(case, workspace_bytes=2**15)  # holds the derivative, and little else
    inputs = make_inputs(case)
    whole = dataclasses.replace(inputs, d_lse=torch.zeros_like(inputs.d_lse))
    check_budget(result_of(freeze(inputs), case, impl), whole, case.options)


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_twice(impl: str, poisoned_memory: None) -> None:
    case = BY_NAME["everything_bf16"]
    first = result_of(freeze(make_inputs(case)), case, impl)
    torch.utils.deterministic.fill_uninitialized_memory = False
    again = result_of(freeze(make_inputs(case)), case, impl)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_cancels_in_a_row_that_is_sure(impl: str, dtype: torch.dtype) -> None:
    """At p_y = 1 - 1e-4 the derivative is a small difference of two long vectors, were the target among the sum."""
    case = Case("sure", 24, 64, 300, "", dtype, ignored="none")
    inputs = make_inputs(case)
    with torch.no_grad():
        rows = inputs.weight[inputs.targets].float()
        inputs.hidden.copy_(15 * rows / rows.square().sum(-1, keepdim=True))
    whole = dataclasses.replace(inputs, d_lse=torch.zeros_like(inputs.d_lse))
    result = result_of(freeze(inputs), case, impl)
    assert float(result["token_logps"].exp().mean()) > 0.999
    check_budget(result, whole, case.options)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_call_forward_none_backward(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("a head product too many")

    monkeypatch.setattr(ops, "linear_logps_forward", refuse)
    monkeypatch.setattr(ops, "linear_logps_backward", refuse)
    case = BY_NAME["everything"]
    result_of(freeze(make_inputs(case)), case, impl)


def test_when_it_is_chosen() -> None:
    """The head needs no gradient, hidden does, nothing but token_logps is asked for, and the buffer fits."""
    case = BY_NAME["everything"]
    inputs = make_inputs(case)
    frozen = freeze(inputs)

    def chosen(inputs: Inputs, **changes: Any) -> bool:
        grad_fn = logps_of(inputs, dataclasses.replace(case, **changes), "reference").grad_fn
        return type(grad_fn).__name__ == "FrozenLinearLogpsBackward"

    assert inputs.low_rank is not None and frozen.low_rank is not None
    assert chosen(frozen)
    needed = (case.D + case.R) * case.T * 4
    assert chosen(frozen, workspace_bytes=needed) and not chosen(frozen, workspace_bytes=needed - 1)
    for trained in (
        dataclasses.replace(frozen, weight=inputs.weight),
        dataclasses.replace(frozen, bias=inputs.bias),
        dataclasses.replace(frozen, low_rank=(frozen.low_rank[0], inputs.low_rank[1])),
        dataclasses.replace(frozen, hidden=frozen.hidden.detach()),
    ):
        assert not chosen(trained)
    with torch.no_grad():
        assert not logps_of(frozen, case, "reference").requires_grad
    arguments = (frozen.hidden, frozen.weight, frozen.targets)
    stats = linear_logp_stats(*arguments, outputs=("lse",))
    assert stats.lse is not None and stats.lse.requires_grad  # the lse is differentiable there


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["plain", "everything_bf16", "batched", "all_ignored"])
@pytest.mark.parametrize("grad_tol", [0.0, 0.05])
def test_opcheck(name: str, grad_tol: float, impl: str) -> None:
    case = BY_NAME[name]
    inputs = make_inputs(case)
    arguments = (*inputs.head, inputs.targets, *dataclasses.astuple(case.options), grad_tol, impl)
    opcheck(torch.ops.groupdpo_kernels.frozen_head.default, arguments)


@pytest.mark.parametrize("impl", IMPLS)
def test_wrong_ids(impl: str) -> None:
    """An error on a CPU; from the kernel, which reads nothing back, NaN in the row and nowhere else."""
    case = Case("wrong", 9, 16, 40, "", ignored="none")
    frozen = freeze(make_inputs(case))
    wrong = dataclasses.replace(frozen, targets=frozen.targets.index_fill(0, torch.tensor([3]), 40))
    if impl != "triton":
        with pytest.raises(ValueError, match=r"targets must be in \[0, V = 40\).*is 40"):
            logps_of(wrong, case, impl)
        return
    result = result_of(wrong, case, impl)
    for value in result.values():
        assert value[3].isnan().all() and value[:3].isfinite().all() and value[4:].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_not_finite_stays_in_its_row(bad: float, impl: str) -> None:
    case = Case("bad", 9, 16, 40, "", bias=True, ignored="none")
    frozen = freeze(make_inputs(case))
    good = result_of(frozen, case, impl)
    with torch.no_grad():
        frozen.hidden[4, 2] = bad
    result = result_of(frozen, case, impl)
    kept = torch.arange(9) != 4
    for name, value in result.items():
        assert torch.equal(value[kept], good[name][kept]) and not value[4].isfinite().all()


def test_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear_logps, backend="aot_eager", fullgraph=True)
    for T in (9, 14, 20):
        frozen = freeze(make_inputs(Case("compile", T, 16, 50, "", torch.bfloat16)))
        torch._dynamo.mark_dynamic(frozen.hidden, 0)
        torch._dynamo.mark_dynamic(frozen.targets, 0)
        results = []
        for function in (linear_logps, compiled):
            logps = function(frozen.hidden, frozen.weight, frozen.targets)
            results.append((logps, *torch.autograd.grad((logps * frozen.d_token_logps).sum(), frozen.hidden)))
        assert all(map(torch.equal, *results))


def test_second_order_is_refused() -> None:
    frozen = freeze(make_inputs(Case("second", 5, 8, 20, "")))
    logps = linear_logps(frozen.hidden, frozen.weight, frozen.targets)
    (gradient,) = torch.autograd.grad(logps.square().sum(), frozen.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --------------------------------------------------------------------------------------------------------- memory


def peak_of(inputs: Inputs, case: Case, impl: str) -> int:
    with Allocations() as counted:
        counted.inside[ops._frozen_head._opoverload] = ops._frozen_head._init_fn
        logps = logps_of(inputs, case, impl)
        assert type(logps.grad_fn).__name__ == "FrozenLinearLogpsBackward"
        logps.backward(inputs.d_token_logps.float())
    return counted.peak


@pytest.mark.parametrize("case", [c for c in FULL_SIZES if c.workspace_bytes >= 2**28], ids=lambda case: case.name)
def test_the_peak_of_the_launcher(case: Case) -> None:
    """Beyond the stored derivative: the gradient, one float32 (T, D) buffer, the workspace, a few numbers a row."""
    case = dataclasses.replace(case, workspace_bytes=max(case.workspace_bytes, 2**30))
    inputs = freeze(on_meta(case))
    stored = 4 * case.T * (case.D + case.R)
    with launching_nothing():
        assert peak_of(inputs, case, "triton") <= 3 * stored + 128 * case.T + case.workspace_bytes


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_peak_of_the_reference(size: tuple[int, int, int]) -> None:
    T, V, workspace = size
    case = Case("bound", T, 48, V, "", bias=True, R=4, softcap=20.0, workspace_bytes=workspace)
    stored = 4 * case.T * (case.D + case.R)
    assert peak_of(freeze(make_inputs(case)), case, "reference") <= 3 * stored + 128 * T + workspace
