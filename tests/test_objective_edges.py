"""What preference_loss promises at its edges: bad policies, compiled code, devices, bad input."""

import math

import pytest
import torch
from test_objectives import RAGGED, UNBALANCED, draw, make_objective, run, shape_for
from torch import Tensor

from groupdpo_kernels import AdaBalance, Objective, PreferenceGroups, PreferenceLoss, preference_loss
from groupdpo_kernels.preference.losses import LOSSES


def test_only_loss_is_differentiable() -> None:
    token_logps, cu, ref = draw(RAGGED, seed=0)
    ref.requires_grad_()
    result = preference_loss(
        token_logps.requires_grad_(), torch.tensor(cu), PreferenceGroups.from_lists(RAGGED), Objective("mpo"), ref
    )
    assert [x.requires_grad for x in result] == [True, False, False, False, False]
    result.loss.backward()
    assert ref.grad is None


def test_loss_may_be_a_callable_on_the_scores() -> None:
    def spread(scores: Tensor, groups: PreferenceGroups) -> Tensor:
        sign = torch.where(groups.positive, -1.0, 1.0)
        return scores.new_zeros(groups.num_groups).index_add(0, groups.ids, sign * scores)

    token_logps, cu, ref = draw(RAGGED, seed=0)
    result, gradient = run(token_logps, cu, RAGGED, Objective(spread, beta=2.0), ref)
    labels = torch.tensor([x for group in RAGGED for x in group])
    torch.testing.assert_close(result.loss, (result.rewards * torch.where(labels, -1.0, 1.0)).sum() / 4)
    assert set(gradient.tolist()) == {-0.5, 0.5}
    with pytest.raises(ValueError, match=r"one value a group, \(4,\); got \(\)"):
        run(token_logps, cu, RAGGED, Objective(lambda scores, groups: scores.sum()), ref)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_bad_policy_is_not_hidden_and_stays_in_its_group(loss: str) -> None:
    lists = shape_for(loss)
    token_logps, cu, ref = draw(lists, seed=0)
    token_logps[0] = math.nan
    result, gradient = run(token_logps, cu, lists, make_objective(loss), ref)
    assert result.loss.isnan() and result.group_losses.isnan().tolist() == [True] + [False] * (len(lists) - 1)
    rest = cu[len(lists[0])]
    assert gradient[: cu[1]].isnan().all() and gradient[rest:].isfinite().all()


@pytest.mark.parametrize("loss", ["orpo", "nca_pair", "mpo", "all_pairs", "plackett_luce"])  # one of each kind of row
def test_compiles_without_a_graph_break(loss: str) -> None:
    torch.compiler.reset()  # each test compiles another function
    lists = shape_for(loss)
    token_logps, cu, ref = draw(lists, seed=4)
    groups, offsets = PreferenceGroups.from_lists(lists), torch.tensor(cu)
    balance = None if loss in UNBALANCED else AdaBalance()
    objective = Objective(loss, nll_weight=1.0, balance=balance)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor, ref: Tensor) -> PreferenceLoss:
        return preference_loss(x, offsets, groups, objective, ref)

    expected, d_expected = run(token_logps, cu, lists, objective, ref)
    leaf = token_logps.clone().requires_grad_()
    found = compiled(leaf, ref)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.autograd.grad(found.loss, leaf)[0], d_expected)
    # Values are not read there: a bad one is NaN, in the gradient too.
    ref[0] = math.inf
    bad = compiled(leaf, ref)
    assert bad.loss.isnan() != LOSSES[loss].reference_free
    assert torch.autograd.grad(bad.loss, leaf)[0].isnan().any() != LOSSES[loss].reference_free


def test_wrong_groups_are_nan_where_values_are_not_read() -> None:
    """Groups made in compiled code, which reads values no more than a GPU does: NaN, and nothing out of bounds."""
    torch.compiler.reset()
    token_logps, cu, _ = draw(RAGGED, seed=4)
    good, offsets = PreferenceGroups.from_lists(RAGGED), torch.tensor(cu)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor, cu_groups: Tensor, positive: Tensor) -> Tensor:
        return preference_loss(
            x, offsets, PreferenceGroups(cu_groups, positive), Objective("mpo", average=True, reference_free=True)
        ).loss

    assert compiled(token_logps, good.cu_groups, good.positive).isfinite()
    for cu_groups, positive in (
        (good.cu_groups, torch.ones_like(good.positive)),
        (good.cu_groups * 1000 - 5, good.positive),
        (good.cu_groups.flip(0), good.positive),
    ):
        leaf = token_logps.clone().requires_grad_()
        loss = compiled(leaf, cu_groups, positive)
        assert loss.isnan() and torch.autograd.grad(loss, leaf)[0].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("loss", LOSSES)
def test_on_a_device(loss: str) -> None:
    lists = shape_for(loss)
    token_logps, cu, ref = draw(lists, seed=4)
    objective = make_objective(loss, nll_weight=1.0, balance=None if loss in UNBALANCED else AdaBalance())
    expected, d_expected = run(token_logps, cu, lists, objective, ref)
    groups, offsets, ref = PreferenceGroups.from_lists(lists).to("cuda"), torch.tensor(cu).cuda(), ref.cuda()
    leaf = token_logps.cuda().requires_grad_()

    def loss_of(offsets: Tensor, groups: PreferenceGroups, ref: Tensor) -> tuple[PreferenceLoss, Tensor]:
        result = preference_loss(leaf, offsets, groups, objective, ref)
        return result, torch.autograd.grad(result.loss, leaf)[0]

    torch.cuda.set_sync_debug_mode("error")
    try:
        result, gradient = loss_of(offsets, groups, ref)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip((*result, gradient), (*expected, d_expected)):
        torch.testing.assert_close(a.cpu(), b)

    empty, outside = offsets.clone(), offsets.clone()
    empty[1] = 0
    outside[2], outside[-1] = -7, 10**6
    mute = PreferenceGroups(groups.cu_groups, torch.zeros_like(groups.positive))
    wild = PreferenceGroups(groups.cu_groups * 1000 - 5, groups.positive)
    hole = torch.where(torch.arange(ref.shape[0], device="cuda") == 0, math.nan, ref)
    for bad in (
        (empty, groups, ref),
        (outside, groups, ref),
        (offsets, mute, ref),
        (offsets, wild, ref),
        (offsets, groups, hole),
    ):
        result, gradient = loss_of(*bad)
        if bad[2] is not hole or not LOSSES[loss].reference_free:
            assert result.loss.isnan() and gradient.isnan().any()


# ------------------------------------------------------------------------------------------------------------ bad input


GROUPS = PreferenceGroups.from_lists([[True, False, False], [False, True]])
TOKENS = -torch.ones(10)
OFFSETS = torch.tensor([0, 2, 4, 6, 8, 10])
MPO = Objective("mpo")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dpo"}, r"loss must be a callable or one of sigmoid, .*plackett_luce; got 'dpo'"),
        ({"beta": 0.0}, "beta must be positive and finite; got 0.0"),
        ({"beta": math.nan}, "beta must be positive and finite; got nan"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\); got 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing must be in"),
        ({"loss": "exo_pair"}, r"label_smoothing must be in \(0, 0.5\) with exo_pair; got 0.0"),
        ({"tau": 0.0}, "tau must be positive and finite; got 0.0"),
        ({"tau": math.inf}, "tau must be positive and finite; got inf"),
        ({"nll_weight": -1.0}, "nll_weight must be at least 0 and finite; got -1.0"),
        ({"gamma": math.inf}, "gamma must be finite; got inf"),
        ({"alpha": math.nan}, "alpha must be finite; got nan"),
        ({"average": "yes"}, "average must be True, False or None; got 'yes'"),
        ({"balance": 2.0}, "balance must be an AdaBalance or None; got 2.0"),
        ({"loss": "plackett_luce", "balance": AdaBalance()}, "balance must be None with plackett_luce"),
        ({"loss": "nca_pair", "balance": AdaBalance()}, "balance must be None with nca_pair: .* sides alike; got Ada"),
    ],
)
def test_bad_objectives(options: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Objective(**options)


@pytest.mark.parametrize("options", [{"ceiling": 0.0}, {"ceiling": math.inf}, {"space": "log"}], ids=str)
def test_bad_balances(options: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be .*; got {next(iter(options.values()))!r}"):
        AdaBalance(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TOKENS[None], OFFSETS, GROUPS, MPO, TOKENS), r"token_logps must be a floating \(T,\) tensor; got \(1, 10\)"),
        ((TOKENS.int(), OFFSETS, GROUPS, MPO, TOKENS), r"token_logps must be a floating .* torch.int32"),
        ((TOKENS, OFFSETS[:-1], GROUPS, MPO, TOKENS), r"cu_seqlens must be .* S \+ 1 = 6 offsets.*got \(5,\)"),
        ((TOKENS, OFFSETS.float(), GROUPS, MPO, TOKENS), "cu_seqlens must be .*float32"),
        ((TOKENS, OFFSETS + 1, GROUPS, MPO, TOKENS), "cu_seqlens must start at 0 and end at the number of tokens, 10"),
        ((TOKENS, torch.tensor([0, 4, 2, 6, 8, 10]), GROUPS, MPO, TOKENS), r"must not decrease; cu_seqlens\[1\] is 4"),
        (
            (TOKENS, torch.tensor([0, 2, 2, 6, 8, 10]), GROUPS, MPO, TOKENS),
            "each sequence a token; sequence 1 has none",
        ),
        ((TOKENS, OFFSETS, GROUPS, MPO), r"ref_logps must be given: Objective\(loss='mpo'"),
        ((TOKENS, OFFSETS, GROUPS, MPO, TOKENS[:4]), r"ref_logps must be .*\(5,\) or \(T,\) = \(10,\); got \(4,\)"),
        ((TOKENS, OFFSETS, GROUPS, MPO, TOKENS * math.inf), r"ref_logps must be finite; ref_logps\[0\] is -inf"),
        (
            (TOKENS, OFFSETS, GROUPS, MPO, TOKENS.to("meta")),
            "ref_logps must be on the device of token_logps, cpu; got meta",
        ),
        ((TOKENS, OFFSETS, GROUPS, Objective(), TOKENS), "must be pairs for loss 'sigmoid'.*5 sequences in 2 groups"),
        ((TOKENS, OFFSETS, GROUPS, Objective("plackett_luce"), TOKENS), "positives must come first"),
        ((TOKENS, OFFSETS, GROUPS, "mpo", TOKENS), "objective must be an Objective; got 'mpo'"),
        (
            (TOKENS, OFFSETS, GROUPS, Objective("simpo", balance=AdaBalance(space="reference"))),
            "must be pairs|be given",
        ),
    ],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        preference_loss(*arguments)


@pytest.mark.parametrize("impl", ["triton", "cpu", "fast"])
def test_an_explicit_impl_never_falls_back(impl: str) -> None:
    message = "impl must be one of" if impl != "triton" else f"impl='{impl}' cannot run here"
    with pytest.raises(ValueError, match=message):
        preference_loss(TOKENS, OFFSETS, GROUPS, MPO, TOKENS, impl=impl)
