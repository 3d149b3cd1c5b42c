"""The gradient of the entropy where CASES cannot judge it: closed forms, rows of nothing, other paths, wrong ids.

d entropy / d logits_v = -p_v (log p_v + entropy).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_launches import Calls
from torch import Tensor

from groupdpo_kernels import explain, linear_logp_stats, reference
from groupdpo_kernels.kernels.linear_logps_backward import linear_logps_backward
from groupdpo_kernels.lm_head.torch_blocks import backward_in_blocks
from groupdpo_kernels.reference import RowGradients
from groupdpo_kernels.testing import Case, eager, make_inputs, run, triton_on_cpu

IMPLS = ("reference", "cpu", "triton")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def d_logits(impl: str, logits: Tensor, upstream: Tensor) -> Tensor:
    """d entropy / d logits as d bias: the hidden state is 0, so the bias is the row's logits."""
    bias = logits.detach().clone().requires_grad_()
    hidden, weight = bias.new_zeros(1, 16), bias.new_zeros(bias.shape[0], 16)
    with triton_on_cpu():
        stats = linear_logp_stats(hidden, weight, torch.zeros(1, dtype=torch.int64), bias, impl=impl)
        assert stats.entropy is not None
        return torch.autograd.grad(stats.entropy, bias, upstream)[0]


def closed_form(logits: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits.double(), 0)
    p = log_p.exp()
    log_p = torch.where(p == 0, 0, log_p)
    return -p * (log_p - (p * log_p).sum())


def by_eager(logits: Tensor) -> Tensor:
    z = logits.detach().clone().requires_grad_()
    log_p = torch.log_softmax(z.float(), 0)
    p = log_p.exp()
    return torch.autograd.grad(-(p * torch.where(p == 0, 0, log_p)).sum(), z)[0]


Z = torch.randn(700, generator=torch.Generator().manual_seed(0))
ID = torch.arange(700)
LOGITS: dict[str, Tensor] = {
    "random": Z,
    "sure": torch.where(ID == 3, 18.0, Z),
    "certain": torch.where(ID == 3, 60.0, Z),
    "beyond doubt": torch.where(ID == 3, 2e4, Z),
    "two": torch.where((ID == 3) | (ID == 650), 60.0, Z),
    "equal": torch.zeros(700),
    "equal at 1e4": torch.full((700,), 1e4),
    "offset": Z - 1e4,
    "masked": torch.where(ID % 3 == 0, Z, -torch.inf),
    "one left": torch.where(ID == 600, Z, -torch.inf),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOGITS)
def test_closed_forms(name: str, dtype: str, impl: str, poisoned_memory: None) -> None:
    """At most twice eager's error; nothing that is no number, and nothing where p = 0."""
    z = LOGITS[name].to(DTYPES[dtype])
    truth, upstream = closed_form(z), torch.tensor([1.7])
    found = d_logits(impl, z, upstream)
    assert found.dtype == z.dtype and found.isfinite().all()
    assert not found[z == -torch.inf].any()
    error = (found.double() - 1.7 * truth).abs()
    peer = 1.7 * (by_eager(z).double() - truth).abs().max()
    # Where eager is right by luck: a rounding of the largest entry, and four of p log p at log p = -log 700.
    rounding = 4 * torch.finfo(torch.float32).eps * math.log(700) * torch.softmax(z.double(), 0)
    unit = torch.finfo(z.dtype).eps * truth.abs().max() + rounding
    assert (error <= 2 * peer + 1.7 * unit).all(), (float(error.max()), float(peer))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_without_a_gradient_of_its_own_has_none_of_the_entropys(impl: str) -> None:
    """An upstream gradient of 0 for the entropy gives the bits of none; rows that are ignored get nothing."""
    inputs = make_inputs(Case("", 20, 24, 300, "", bias=True, R=3))
    leaves = list(inputs.leaves.values())
    results = []
    for weight in (None, torch.zeros(20)):
        with triton_on_cpu():
            stats = linear_logp_stats(
                inputs.hidden, inputs.weight, inputs.targets, inputs.bias, low_rank=inputs.low_rank, impl=impl
            )
            loss = (stats.token_logps * inputs.d_token_logps).sum()
            if weight is not None:
                loss = loss + (stats.entropy * weight).sum()
            results.append(torch.autograd.grad(loss, leaves, retain_graph=True))
            (d_hidden,) = torch.autograd.grad(stats.entropy.sum(), inputs.hidden)
    assert all(map(torch.equal, *results))
    assert not d_hidden[inputs.targets == -100].any() and d_hidden[inputs.targets != -100].any(1).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{"grad_tol": 2**-4}, {"grad_tol": 2**-4, "grad_tail": "sample"}], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_a_tolerance_leaves_out_nothing_of_it(frozen: bool, options: dict[str, Any], impl: str) -> None:
    """Its bound is on the gradient of the log-probabilities, so a call that asks for the entropy is exact."""
    inputs = make_inputs(Case("", 20, 24, 300, "", hidden_scale=6.0))
    weight = inputs.weight.detach() if frozen else inputs.weight
    leaves = [inputs.hidden] if frozen else [inputs.hidden, weight]
    results = []
    for more in ({}, options):
        with triton_on_cpu():
            stats = linear_logp_stats(inputs.hidden, weight, inputs.targets, impl=impl, **more)
            loss = (stats.token_logps * inputs.d_token_logps + stats.entropy * inputs.d_lse).sum()
            results.append(torch.autograd.grad(loss, leaves))
    assert all(map(torch.equal, *results))


def test_a_wrong_id_is_no_number_in_its_row() -> None:
    """As a GPU has it, where no value is read back: in hidden's row, and in every row of the weight."""
    inputs = make_inputs(Case("", 20, 24, 300, "", ignored="none"))
    targets = inputs.targets.index_fill(0, torch.tensor([4]), 300)
    with triton_on_cpu():
        entropy = linear_logp_stats(inputs.hidden, inputs.weight, targets, impl="triton").entropy
        d_hidden, d_weight = torch.autograd.grad((entropy * inputs.d_lse).sum(), [inputs.hidden, inputs.weight])
    assert d_hidden.isnan().all(1).nonzero().tolist() == [[4]] and d_weight.isnan().all()


@pytest.mark.parametrize("backward", [backward_in_blocks, linear_logps_backward], ids=["reference", "triton"])
def test_the_entropy_takes_no_gemm_of_its_own(backward: Callable[..., Any]) -> None:
    case = Case("", 200, 24, 900, "", bias=True, R=3, ignored="none", workspace_bytes=2**17)
    inputs = make_inputs(case)
    upstream = inputs.d_token_logps.float()
    counts = []
    for rows in (RowGradients(upstream, upstream), RowGradients(upstream, upstream, upstream)):
        with triton_on_cpu(), Calls() as calls:
            backward(inputs.head, inputs.targets, upstream.double(), rows, case.options, inputs.needs)
        counts.append({name: count for name, count in calls.names.items() if "mm" in name})
    assert counts[0] == counts[1] and sum(counts[0].values()) > 3


def test_the_entropy_of_a_frozen_head_takes_the_exact_path() -> None:
    """Two derivatives would be two GEMMs in the forward: as many as the backward saves."""
    inputs = make_inputs(Case("", 20, 24, 300, ""))
    frozen = inputs.hidden, inputs.weight.detach(), inputs.targets
    assert explain(*frozen).path == "frozen head"
    stats = linear_logp_stats(*frozen)
    assert stats.entropy is not None and "ExactLinearLogps" in stats.entropy.grad_fn.name()  # type: ignore[union-attr]


def test_eager_and_the_specification_agree() -> None:
    """In float64: the peers of the budget differentiate the entropy too."""
    inputs = make_inputs(Case("", 20, 24, 300, "", torch.float64, entropy=True))
    options = Case("", 20, 24, 300, "").options
    a, b = run(eager, inputs, options), run(reference.linear_logp_stats, inputs, options)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-11)
