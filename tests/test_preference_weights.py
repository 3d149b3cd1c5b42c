"""The preference-weights kernel, in the interpreter, against the losses and autograd in float64."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from groupdpo_kernels import AdaBalance, Objective, PreferenceGroups, PreferenceWeights, preference_loss
from groupdpo_kernels.kernels.preference_weights import LOSSES, PAIRWISE
from groupdpo_kernels.preference import fused
from groupdpo_kernels.preference.fused import LossSpec
from groupdpo_kernels.preference.losses import LOSSES as TABLE
from groupdpo_kernels.testing import error, triton_on_cpu

IMPLS = ("triton", "reference")
BALANCES = (None, AdaBalance(), AdaBalance(1.3, "reference", normalize=False))


def where(impl, device="cpu"):
    on_cpu = torch.device(device).type == "cpu"
    return triton_on_cpu() if impl == "triton" and on_cpu else contextlib.nullcontext()


def draw_groups(loss, generator, G=6, largest=9):
    """Ragged groups, positives anywhere; pairs for pairwise losses, positives first for a ranking."""
    groups = []
    for _ in range(G):
        size = 2 if loss in PAIRWISE else int(torch.randint(2, largest + 1, (), generator=generator))
        sides = (torch.rand(size, generator=generator) < 0.5).tolist()
        at = int(torch.randint(0, size, (), generator=generator))
        sides[at], sides[(at + 1) % size] = True, False
        groups.append(sorted(sides, reverse=True) if loss == "plackett_luce" else sides)
    return PreferenceGroups.from_lists(groups)


def draw(loss, seed, spread, per_token):
    generator = torch.Generator().manual_seed(seed)
    groups = draw_groups(loss, generator)
    lengths = torch.randint(1, 20, (groups.num_sequences,), generator=generator)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    T = int(cu_seqlens[-1])
    logps, reference = (-spread * torch.rand(T, generator=generator) for _ in range(2))
    if not per_token:
        reference = torch.segment_reduce(reference, "sum", lengths=lengths)
    return groups, cu_seqlens, logps, reference


def gradients_of(logps, cu_seqlens, groups, objective, reference, impl):
    """All results of a loss, and its gradient."""
    leaf = logps.clone().requires_grad_()
    out = preference_loss(leaf, cu_seqlens, groups, objective, reference, impl=impl)
    (0.7 * out.loss).backward()
    return {**{name: x.detach() for name, x in out._asdict().items()}, "d_token_logps": leaf.grad}


def evaluate(logps, *arguments):
    with where(arguments[-1], logps.device):
        return gradients_of(logps, *arguments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("balance", BALANCES, ids=("plain", "policy", "reference"))
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_against_float64(loss, balance, impl, poisoned_memory):
    if TABLE[loss].no_balance and balance is not None:
        with pytest.raises(ValueError, match="balance must be None"):
            Objective(loss, balance=balance)
        return
    check_against_float64(loss, balance, impl, evaluate)


def check_against_float64(loss, balance, impl, results_of):
    """Three draws of groups. results_of: gradients_of, or one that calls it where `impl` can run."""
    for seed, (average, reference_free, spread) in enumerate(
        ((None, None, 1.0), (True, None, 30.0), (None, True, 5.0))
    ):
        objective = Objective(
            loss, beta=0.7, average=average, reference_free=reference_free, nll_weight=0.5,
            label_smoothing=0.1, gamma=0.3, alpha=0.05, tau=0.3, balance=balance,
        )  # fmt: skip
        groups, cu_seqlens, logps, reference = draw(loss, seed, spread, per_token=seed % 2 == 0)
        arguments = (cu_seqlens, groups, objective)
        found = results_of(logps, *arguments, reference, impl)
        truth = results_of(logps.double(), *arguments, reference.double(), "reference")
        for name, value in found.items():
            # Both compute in float64: within two float32 roundings of the largest.
            budget = torch.finfo(torch.float32).eps * truth[name].abs().max()
            assert (value - truth[name]).abs().max() <= budget, (name, seed)


def test_the_kernels_know_every_loss_of_the_table():
    assert set(LOSSES) == set(TABLE)
    assert set(PAIRWISE) == {name for name, row in TABLE.items() if row.pair and not row.every_pair}


def test_strided_offsets_and_sides_are_read_by_their_stride():
    spec = LossSpec("mpo", 0.1, False, False, 0.0, 0.0, 0.0, 0.0, 0.05, 0.0, False, False)
    dense = (torch.tensor([0, 2, 4, 6, 8]), torch.tensor([0, 2, 4]), torch.tensor([True, False, True, False]))
    apart = [torch.stack((x, torch.zeros_like(x)), 1)[:, 0] for x in dense]
    found = []
    for cu_seqlens, cu_groups, positive in (dense, apart):
        leaf = (-torch.arange(8.0)).requires_grad_()
        with where("triton"):
            out = PreferenceWeights.apply(leaf, None, cu_seqlens, cu_groups, positive, spec, 2)
            out[0].backward()
        found.append((*out, leaf.grad))
    assert all(map(torch.equal, *found)) and found[0][0].isfinite()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_same_bits_every_time(impl):
    groups, cu_seqlens, logps, reference = draw("mpo", 3, 2.0, per_token=True)
    once, again = (evaluate(logps, cu_seqlens, groups, Objective("mpo"), reference, impl) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_scores_stay_finite(loss, impl):
    balance = None if TABLE[loss].no_balance else AdaBalance(normalize=False)
    objective = Objective(loss, beta=1.0, label_smoothing=0.1, balance=balance)
    groups = PreferenceGroups.from_lists([[True, False], [True, False]])
    logps = torch.tensor([-1e4, -1.0, -1.0, -1e4])
    out = evaluate(logps, torch.arange(5), groups, objective, torch.zeros(4), impl)
    assert all(x.isfinite().all() for x in out.values())


X = 5e3  # u_w = X, u_l = -X and the other way round; label smoothing 1/8. Then (loss, dL/du_w, dL/du_l):
LIMITS = {
    "robust": ((-X / 3, -1 / 6, 1 / 6), (7 * X / 3, -7 / 6, 7 / 6)),
    "exo_pair": ((math.log(8 / 7), 0, 0), (math.log(8), 0, 0)),
    "discopop": ((0, 0, 0), (2 * X, -1, 1)),
    "nca_pair": ((X / 2, 0.5, 0), (1.5 * X, -1, 0.5)),
    "apo_zero": ((0, 0, 0), (2, 0, 0)),
    "apo_down": ((1, 0, 0), (1, 0, 0)),
    "sppo_hard": ((2 * (X - 0.5) ** 2, 2 * X - 1, 1 - 2 * X), (2 * (X + 0.5) ** 2, -2 * X - 1, 2 * X + 1)),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss", LIMITS)
def test_extreme_scores_have_their_limits(loss, impl):
    """Values, not only finite ones: discopop by its formula is 0 times infinity in one of them."""
    groups, scores = PreferenceGroups.pairs(2), torch.tensor([X, -X, -X, X])
    objective = Objective(loss, beta=1.0, label_smoothing=0.125)
    out = evaluate(scores, torch.arange(5), groups, objective, torch.zeros(4), impl)
    limits = torch.tensor(LIMITS[loss], dtype=torch.float32)
    torch.testing.assert_close(out["group_losses"], limits[:, 0], rtol=2e-7, atol=0)
    torch.testing.assert_close(out["d_token_logps"] * 2 / 0.7, limits[:, 1:].flatten(), rtol=5e-7, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_orpo_of_an_answer_that_is_almost_certain(impl):
    """Mean log-probabilities from -1e-3 to -1e-9, and exactly 0, which counts as one unit of float64's precision."""
    groups, objective = PreferenceGroups.pairs(4), Objective("orpo", beta=0.5)
    logps = torch.tensor([-1e-3, -1.0, -1e-8, -1e-9, -1e-5, -1e-8, -0.5, 0.0])
    out = evaluate(logps, torch.arange(9), groups, objective, None, impl)
    m = logps.double().requires_grad_()
    odds = m - torch.log(-torch.expm1(m.clamp(max=-(2.0**-52))))
    losses = -m[::2] - 0.5 * torch.nn.functional.logsigmoid(odds[::2] - odds[1::2])
    (gradient,) = torch.autograd.grad(0.7 * losses.mean(), m)
    torch.testing.assert_close(out["group_losses"].double(), losses.detach(), rtol=1e-7, atol=0)
    torch.testing.assert_close(out["d_token_logps"].double(), gradient, rtol=3e-7, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_small_keeps_its_digits(impl):
    """The tails of log sigma and of a ranking, and a reference in float64, whose digits the scores need."""
    groups = PreferenceGroups.from_lists([[True, True, False, False]])
    logps = torch.tensor([-1.0, -16.0, -30.0, -1e5])
    reference = torch.tensor([0.0, 1e-9, 0.0, -1e5 + 0.001], dtype=torch.float64)
    for loss in ("plackett_luce", "all_pairs", "mpo"):
        arguments = (torch.arange(5), groups, Objective(loss, beta=1.0))
        truth = evaluate(logps.double(), *arguments, reference, "reference")
        for name, value in evaluate(logps, *arguments, reference, impl).items():
            torch.testing.assert_close(value.double(), truth[name], rtol=3e-7, atol=1e-16)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "cpo", "margin"])
def test_an_infinite_score_times_an_option_of_zero_is_not_nan(loss, impl):
    """A dispreferred response that the policy cannot give: the loss is that of the limit, for both alike."""
    logps, groups = torch.tensor([-1.0, -math.inf]), PreferenceGroups.pairs(1)
    assert evaluate(logps, torch.arange(3), groups, Objective(loss), torch.zeros(2), impl)["loss"] == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loss", LOSSES)
def test_where_a_loss_is_nan_so_is_the_gradient_of_its_group(loss, impl):
    sides = [[True, False], [True, False]] if loss in PAIRWISE else [[True, True, False, False], [True, False]]
    groups = PreferenceGroups.from_lists(sides)
    S, first = groups.num_sequences, len(sides[0])
    logps = torch.where(torch.arange(S) == 0, math.nan, -1.0)
    objective = Objective(loss, beta=1.0, nll_weight=0.5, label_smoothing=0.1)
    out = evaluate(logps, torch.arange(S + 1), groups, objective, torch.zeros(S), impl)
    assert out["group_losses"].isnan().tolist() == [True, False]
    assert out["d_token_logps"].isnan().tolist() == [s < first for s in range(S)]


def test_a_long_sequence_loses_no_digits():
    n = 10**6
    logps = -torch.rand(2 * n, generator=torch.Generator().manual_seed(0))
    groups, cu_seqlens = PreferenceGroups.pairs(1), torch.tensor([0, n, 2 * n])
    out = preference_loss(logps, cu_seqlens, groups, Objective("cpo", beta=1e-3), impl="reference")
    exact = logps.double().view(2, n).sum(1)
    assert torch.equal(out.seq_logps, exact.float())
    expected = -torch.nn.functional.logsigmoid(1e-3 * (exact[0] - exact[1]))
    assert abs(float(out.loss) - float(expected)) <= 1e-7 * float(expected)


@pytest.mark.parametrize("loss", ("mpo", "all_pairs", "softmax", "margin"))
def test_a_large_ragged_group(loss):
    generator = torch.Generator().manual_seed(0)
    sides = [(torch.rand(size, generator=generator) < 0.3).tolist() for size in (1024, 3, 700)]
    groups = PreferenceGroups.from_lists([[True, *side[1:-1], False] for side in sides])
    S = groups.num_sequences
    logps, reference = -10 * torch.rand(S, generator=generator), -10 * torch.rand(S, generator=generator)
    objective = Objective(loss, beta=0.5)
    arguments = (torch.arange(S + 1), groups, objective)
    truth = evaluate(logps.double(), *arguments, reference.double(), "reference")
    for impl in IMPLS if loss == "mpo" else ("reference",):
        for name, value in evaluate(logps, *arguments, reference, impl).items():
            rounding = torch.finfo(torch.float32).eps * truth[name].abs().max()
            assert (value - truth[name]).abs().max() <= rounding, (impl, name)


@pytest.mark.parametrize(("impl", "G"), [("triton", 200), ("reference", 100_000)])
def test_many_groups(impl, G):
    """The last program to finish takes the mean over all of them. The interpreter runs one program at a time."""
    groups, cu_seqlens = PreferenceGroups.pairs(G), torch.arange(2 * G + 1)
    logps = -torch.rand(2 * G, generator=torch.Generator().manual_seed(0))
    with where(impl):
        out = preference_loss(logps, cu_seqlens, groups, Objective("cpo"), impl=impl)
    truth = preference_loss(logps.double(), cu_seqlens, groups, Objective("cpo"), impl="reference")
    assert error(out.loss, truth.loss) < 1e-7


WRONG_OFFSETS = {
    "not from zero": [1, 2, 4, 6, 8],
    "not to the end": [0, 2, 4, 6, 7],
    "beyond the end": [0, 2, 99, 6, 8],
    "negative": [0, -2, 4, 6, 8],
    "decreasing": [0, 4, 2, 6, 8],
    "an empty response": [0, 2, 2, 6, 8],
}


@pytest.mark.parametrize("what", WRONG_OFFSETS)
def test_wrong_offsets_are_nan_where_values_are_not_read(what, poisoned_memory):
    """Straight to the op, as on a GPU: preference_loss checks values on a CPU."""
    logps = -torch.rand(8)
    spec = LossSpec("mpo", 0.1, False, False, 0.0, 0.0, 0.0, 0.0, 0.05, 0.0, False, False)
    groups = torch.tensor([0, 2, 4]), torch.tensor([True, False, True, False])
    leaf = logps.requires_grad_()
    with where("triton"):
        loss, *_ = PreferenceWeights.apply(leaf, None, torch.tensor(WRONG_OFFSETS[what]), *groups, spec, 2)
        loss.backward()
    assert loss.isnan() and leaf.grad.isnan().any()


def test_a_wrong_group_or_reference_is_nan(poisoned_memory):
    spec = LossSpec("mpo", 0.1, False, True, 0.0, 0.0, 0.0, 0.0, 0.05, 0.0, False, False)
    right = (torch.zeros(4), torch.tensor([0, 2, 4]), torch.tensor([True, False, True, False]))
    wrong = (
        (right[0], right[1], torch.tensor([True, True, True, False])),  # no negative
        (right[0], torch.tensor([0, 0, 4]), right[2]),  # an empty group
        (right[0], torch.tensor([0, 2, 3]), right[2]),  # a sequence of no group
        (right[0], torch.tensor([0, 5, 4]), right[2]),
        (torch.tensor([0.0, torch.inf, 0.0, 0.0]), *right[1:]),
        (torch.tensor([0.0, 0.0, torch.nan, 0.0]), *right[1:]),
    )
    for reference, cu_groups, positive in (right, *wrong):
        leaf = (-torch.rand(8)).requires_grad_()
        with where("triton"):
            out = PreferenceWeights.apply(leaf, reference, torch.arange(0, 9, 2), cu_groups, positive, spec, 4)
            out[0].backward()
        good = cu_groups is right[1] and positive is right[2] and reference is right[0]
        assert bool(out[0].isnan()) != good
        if cu_groups.tolist() != [0, 0, 4]:  # an empty group has no sequence to mark
            assert bool(leaf.grad.isnan().any()) != good


def test_only_the_loss_is_differentiable_and_the_graph_compiles():
    groups, cu_seqlens, logps, reference = draw("softmax", 1, 2.0, per_token=False)
    leaf = logps.requires_grad_()

    def loss(x):
        return preference_loss(x, cu_seqlens, groups, Objective("softmax", balance=AdaBalance()), reference)

    out = loss(leaf)
    assert [x.requires_grad for x in out] == [True, False, False, False, False]
    (plain,) = torch.autograd.grad(out.loss, leaf)
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf).loss, leaf)
    assert torch.equal(plain, compiled)


def test_opcheck():
    groups, cu_seqlens, logps, reference = draw("all_pairs", 2, 2.0, per_token=True)
    spec = LossSpec("all_pairs", 0.1, False, True, 0.0, 0.0, 0.0, 0.0, 0.05, 2.0, False, True)
    vectors = (logps, reference, cu_seqlens, groups.cu_groups, groups.positive)
    coefficients = torch.rand(groups.num_sequences)
    with triton_on_cpu():
        torch.library.opcheck(torch.ops.groupdpo_kernels.preference_weights_forward, (*vectors, *spec, 9))
        arguments = (torch.tensor(0.5), coefficients, cu_seqlens, logps.shape[0])
        torch.library.opcheck(torch.ops.groupdpo_kernels.preference_weights_backward, arguments)


def test_auto_and_explicit_choices():
    groups, cu_seqlens, logps, _ = draw("mpo", 0, 1.0, per_token=True)
    device, dtype = logps.device, logps.dtype
    assert fused.resolve("auto", device, dtype, "mpo", 9) == "reference"
    assert fused.resolve("auto", device, torch.float64, "mpo", 9) == "reference"
    assert fused.resolve("auto", device, dtype, lambda u, groups: u, 9) == "reference"
    with pytest.raises(ValueError, match=r"impl='triton' cannot run here: token_logps is on cpu.*want a GPU"):
        preference_loss(logps, cu_seqlens, groups, Objective("mpo", reference_free=True), impl="triton")
    with pytest.raises(ValueError, match=r"impl must be one of \('auto', 'triton', 'reference'\); got 'cpu'"):
        preference_loss(logps, cu_seqlens, groups, Objective("mpo", reference_free=True), impl="cpu")
    with pytest.raises(ValueError, match="impl must be 'triton', or call preference_loss"):
        PreferenceWeights.apply(logps, None, cu_seqlens, groups.cu_groups, groups.positive, None, 9, "cpu")
    with pytest.raises(ValueError, match="holds up to 1024"), triton_on_cpu():
        fused.resolve("triton", device, dtype, "mpo", 1025)
