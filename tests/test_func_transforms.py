"""torch.func over every path of linear_logps, seq_logps and preference_loss: the gradients of autograd, to the bit.
torch.vmap raises in words. Offsets of any integer dtype, forward and backward.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from groupdpo_kernels import (
    Objective,
    PreferenceGroups,
    PreferenceWeights,
    group_backward,
    linear_logp_stats,
    linear_logps,
    preference_loss,
    seq_logps,
)
from groupdpo_kernels.preference.fused import LossSpec
from groupdpo_kernels.testing import Case, make_inputs, triton_on_cpu

CASE = Case("", 24, 16, 60, "", bias=True, R=3)
OFFSETS = torch.tensor([0, 5, 11, 18, 24])
GROUPS = PreferenceGroups.pairs(2)
IMPLS = ("reference", "cpu")
PATHS: dict[str, dict[str, object]] = {
    "exact": {},
    "candidates": {"grad_tol": 0.01},
    "sampled": {"grad_tol": 0.01, "grad_tail": "sample"},
}
by_path = pytest.mark.parametrize("path", PATHS)
SPEC = LossSpec("mpo", 0.1, False, False, 0.0, 0.0, 0.0, 0.0, 0.05, 0.0, False, False)
by_impl = pytest.mark.parametrize("impl", IMPLS)


def loss_of_hidden(impl: str, train_head: bool, **options: object) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A loss over sums by sequence, as a function of hidden alone, and hidden."""
    inputs = make_inputs(CASE)
    weight = inputs.weight.detach()
    assert inputs.bias is not None and inputs.low_rank is not None
    bias, low_rank = inputs.bias.detach(), tuple(x.detach() for x in inputs.low_rank)

    def loss(hidden: Tensor) -> Tensor:
        torch.manual_seed(3)  # a sampled tail draws from here
        head = weight + 0 * hidden.sum() if train_head else weight
        logps = linear_logps(hidden, head, inputs.targets, bias, low_rank=low_rank, impl=impl, **options)
        return (seq_logps(logps, OFFSETS.to(torch.int16)) * torch.arange(1, 5)).sum()

    return loss, inputs.hidden.detach()


def by_autograd(loss: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    leaf = hidden.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    return gradient


@by_impl
@by_path
@pytest.mark.parametrize("train_head", [False, True], ids=["frozen", "trained"])
def test_grad_and_vjp_in_hidden(path: str, train_head: bool, impl: str) -> None:
    loss, hidden = loss_of_hidden(impl, train_head, **PATHS[path])
    wanted = by_autograd(loss, hidden)
    assert torch.equal(torch.func.grad(loss)(hidden), wanted)
    _, pull_back = torch.func.vjp(loss, hidden)
    assert torch.equal(pull_back(torch.ones(()))[0], wanted)


def test_grad_with_kept_products() -> None:
    """Wide enough for logit_cache.py: D = 1024."""
    inputs = make_inputs(Case("", 4, 1024, 300, "", ignored="none"))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_logps(hidden, weight, inputs.targets, impl="cpu").sum()

    arguments = (inputs.hidden.detach(), inputs.weight.detach())
    wanted = torch.autograd.grad(loss(inputs.hidden, inputs.weight), (inputs.hidden, inputs.weight))
    assert all(map(torch.equal, torch.func.grad(loss, argnums=(0, 1))(*arguments), wanted))


@by_impl
def test_grad_of_a_preference_loss_over_functional_call(impl: str) -> None:
    """What torch.func is for: gradients in the parameters of a module, here through the loss of whole groups."""
    inputs, trunk = make_inputs(CASE), nn.Linear(CASE.D, CASE.D)
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        states = torch.func.functional_call(trunk, parameters, (hidden,))
        logps = linear_logps(states, weight, inputs.targets, impl=impl)
        return preference_loss(logps, OFFSETS, GROUPS, Objective("mpo"), torch.zeros(4)).loss

    found = torch.func.grad(loss)({name: p.detach() for name, p in trunk.named_parameters()})
    loss(dict(trunk.named_parameters())).backward()
    for name, parameter in trunk.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


# ------------------------------------------------------------------------------------------------- vmap


@by_impl
@by_path
def test_vmap_says_what_to_do(path: str, impl: str) -> None:
    loss, hidden = loss_of_hidden(impl, False, **PATHS[path])
    batch = torch.stack((hidden, hidden))
    with pytest.raises(RuntimeError, match=re.escape("torch.vmap does not go through") + ".*any leading dimensions"):
        torch.vmap(loss, randomness="same")(batch)
    with pytest.raises(
        RuntimeError, match=r"torch\.vmap does not go through SegmentSums: seq_logps takes all sequences packed"
    ):
        torch.vmap(lambda x: seq_logps(x, OFFSETS))(torch.zeros(2, 24))
    with pytest.raises(RuntimeError, match=r"torch\.vmap does not go through.*all sequences packed"):
        torch.vmap(lambda x: preference_loss(x, OFFSETS, GROUPS, Objective("mpo"), torch.zeros(4)).loss)(
            torch.zeros(2, 24)
        )
    with pytest.raises(RuntimeError, match=r"torch\.vmap does not go through.*all groups in one call"):
        offsets = (OFFSETS, GROUPS.cu_groups)
        torch.vmap(lambda x: PreferenceWeights.apply(x, None, *offsets, GROUPS.positive, SPEC, 2)[0])(
            torch.zeros(2, 24)
        )


def test_leading_dimensions_instead_of_vmap() -> None:
    inputs = make_inputs(CASE)
    batch = torch.stack((inputs.hidden, 2 * inputs.hidden)).detach()
    targets = inputs.targets.expand(2, -1)
    whole = linear_logp_stats(batch, inputs.weight.detach(), targets).token_logps
    each = [linear_logp_stats(x, inputs.weight.detach(), inputs.targets).token_logps for x in batch]
    torch.testing.assert_close(whole, torch.stack(each))


# ------------------------------------------------------------------------------------------------- offsets

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_offsets_of_any_integer_dtype(dtype: torch.dtype) -> None:
    leaf = (-torch.rand(24)).requires_grad_()
    groups = PreferenceGroups(torch.tensor([0, 2, 4]).to(dtype), GROUPS.positive)
    found = []
    for offsets, g in ((OFFSETS, GROUPS), (OFFSETS.to(dtype), groups)):
        sums = seq_logps(leaf, offsets)
        (d_sums,) = torch.autograd.grad((sums * torch.arange(4)).sum(), leaf)
        loss = preference_loss(leaf, offsets, g, Objective("softmax"), torch.zeros(4)).loss
        found.append((sums, d_sums, loss, torch.autograd.grad(loss, leaf)[0]))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8], ids=str)
def test_small_offsets_straight_to_the_function(dtype: torch.dtype) -> None:
    leaf = (-torch.rand(24)).requires_grad_()
    found = []
    for kind in (torch.int64, dtype):
        offsets = (OFFSETS.to(kind), GROUPS.cu_groups.to(kind))
        with triton_on_cpu():
            out = PreferenceWeights.apply(leaf, None, *offsets, GROUPS.positive, SPEC, 2)
        assert len(out) == 5
        with triton_on_cpu():
            found.append((out[0], torch.autograd.grad(out[0], leaf)[0]))
    assert all(map(torch.equal, *found))


def test_micro_batches_with_small_offsets() -> None:
    """The offsets of all micro-batches together do not fit in the dtype of each."""
    leaf = (-torch.rand(2, 200)).requires_grad_()
    offsets, groups = torch.tensor([0, 90, 200], dtype=torch.uint8), PreferenceGroups.pairs(2)

    def forward(i: int) -> tuple[Tensor, Tensor]:
        return leaf[i] * 1.0, offsets

    group_backward([0, 1], forward, groups, Objective("mpo"), torch.zeros(4))
    found, leaf.grad = leaf.grad, None
    preference_loss(
        leaf.view(-1), torch.tensor([0, 90, 200, 290, 400]), groups, Objective("mpo"), torch.zeros(4)
    ).loss.backward()
    torch.testing.assert_close(found, leaf.grad)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_other_offsets_are_refused_by_name(dtype: torch.dtype) -> None:
    wrong = OFFSETS.to(dtype)
    message = re.escape(f"must be an integer tensor; got {dtype}")
    with pytest.raises(TypeError, match=f"cu_seqlens {message}"):
        seq_logps(torch.zeros(24), wrong)
    with pytest.raises(TypeError, match=f"cu_seqlens {message}"):
        preference_loss(torch.zeros(24), wrong, GROUPS, Objective("mpo"), torch.zeros(4))
    with pytest.raises(TypeError, match=f"cu_groups {message}"):
        PreferenceGroups(torch.tensor([0, 2, 4]).to(dtype), GROUPS.positive)
    with pytest.raises(TypeError, match=f"cu_groups {message}"):
        PreferenceWeights.apply(torch.zeros(24), None, OFFSETS, wrong, GROUPS.positive, SPEC, 2)
