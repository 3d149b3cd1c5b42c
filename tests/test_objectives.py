"""Every objective against a loop over groups, written from the formulas: in float64, and by error budget in float32."""

import itertools
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from groupdpo_kernels import AdaBalance, Objective, PreferenceGroups, PreferenceLoss, preference_loss
from groupdpo_kernels.preference.losses import LOSSES

PAIRWISE = [name for name, row in LOSSES.items() if row.pair is not None and not row.every_pair]
GROUPWISE = [name for name in LOSSES if name not in PAIRWISE]
UNBALANCED = [name for name, row in LOSSES.items() if row.no_balance]


def make_objective(loss: str, **options: object) -> Objective:
    """With the label smoothing that exo_pair cannot do without."""
    return Objective(loss, **{**({"label_smoothing": 0.2} if loss == "exo_pair" else {}), **options})


# ----------------------------------------------------------------------------------------------------------- the oracle


def oracle(
    token_logps: Tensor,
    cu: list[int],
    lists: list[list[bool]],
    o: Objective,
    ref: Tensor,
    weights: list[float] | None = None,
    response_weights: list[list[float]] | None = None,
) -> dict[str, Tensor]:
    """The formulas one group at a time, in the precision of token_logps, differentiated by autograd."""
    bounds = list(itertools.pairwise(cu))
    s = [token_logps[a:b].sum() for a, b in bounds]
    r = [ref[a:b].sum() for a, b in bounds] if ref.shape == token_logps.shape else list(ref)
    n = [b - a for a, b in bounds]
    m = [x / k for x, k in zip(s, n)]
    average = {"simpo": True, "ipo": True}.get(o.loss, False) if o.average is None else o.average
    free = o.loss in ("simpo", "cpo", "orpo") if o.reference_free is None else o.reference_free
    u = [o.beta * (x - (0 if free else y)) / (k if average else 1) for x, y, k in zip(s, r, n)]

    def level(i: int) -> Tensor:
        assert o.balance is not None
        b = s[i] - r[i] if o.balance.space == "reference" else s[i]
        b = b / n[i] if o.balance.normalize else b
        if o.loss == "orpo":
            b = b + log1mexp(m[i])
        return b.detach()

    def weight(b_positive: Tensor, b_negative: Tensor) -> float:
        return 1.0 if o.balance is None else min(math.exp(min(b_positive - b_negative, 50.0)), o.balance.ceiling)

    def softplus(x: Tensor) -> Tensor:
        return torch.logaddexp(x, torch.zeros_like(x))

    def log1mexp(x: Tensor) -> Tensor:
        return torch.log(-torch.expm1(x.clamp(max=-torch.finfo(torch.float64).eps)))

    def odds(i: int) -> Tensor:
        return m[i] - log1mexp(m[i])

    a = [1.0] * len(s) if response_weights is None else [x for group in response_weights for x in group]

    def mean(terms: dict[int, Any]) -> Any:
        return sum(a[i] * x for i, x in terms.items()) / sum(a[i] for i in terms)

    def lse(terms: dict[int, Tensor]) -> Tensor:
        return torch.logsumexp(torch.stack([x + math.log(a[i]) for i, x in terms.items()]), 0)

    losses, balances, factors, start = [], [1.0] * len(s), [], 0
    for labels in lists:
        factors.append(1.0)
        members = [i for i in range(start, start + len(labels)) if a[i] > 0]
        P, N = ([i for i in members if labels[i - start] is side] for side in (True, False))
        start += len(labels)
        if o.balance is not None:
            b = {i: level(i) for i in members}
            for i in P:
                if o.loss == "all_pairs":
                    balances[i] = mean({j: weight(b[i], b[j]) for j in N})
                else:
                    balances[i] = weight(b[i], mean({j: b[j] for j in N}))
        v = {i: balances[i] * u[i] for i in members}
        w, l = P[0], N[0]  # noqa: E741
        d = v[w] - v[l]
        if o.loss == "sigmoid":
            loss = (1 - o.label_smoothing) * softplus(-d)
            if o.label_smoothing:
                loss = loss + o.label_smoothing * softplus(d)
        elif o.loss == "hinge":
            loss = torch.relu(1 - d)
        elif o.loss == "ipo":
            loss = (d / o.beta - 1 / (2 * o.beta)) ** 2
        elif o.loss == "rdpo":
            loss = softplus(-(d + o.alpha * (n[w] - n[l])))
        elif o.loss == "simpo":
            loss = softplus(-(d - o.gamma))
        elif o.loss == "cpo":
            loss = softplus(-d)
        elif o.loss == "orpo":
            loss = -m[w] + o.beta * softplus(-(balances[w] * odds(w) - odds(l)))
        elif o.loss == "robust":
            e = o.label_smoothing
            loss = ((1 - e) * softplus(-d) - e * softplus(d)) / (1 - 2 * e)
        elif o.loss == "exo_pair":
            labels = torch.tensor([1 - o.label_smoothing, o.label_smoothing], dtype=d.dtype)
            log_p = torch.log_softmax(torch.stack([v[w], v[l]]), 0)
            loss = (log_p.exp() * (log_p - labels.log())).sum()
        elif o.loss == "discopop":
            log_mix = -softplus(-d / o.tau)
            loss = torch.sigmoid(-d / o.tau) * softplus(-d) + torch.exp(log_mix - d)
        elif o.loss == "nca_pair":
            loss = softplus(-v[w]) + (softplus(v[w]) + softplus(v[l])) / 2
        elif o.loss == "apo_zero":
            loss = torch.sigmoid(-v[w]) + torch.sigmoid(v[l])
        elif o.loss == "apo_down":
            loss = torch.sigmoid(v[w]) + torch.sigmoid(-d)
        elif o.loss == "sppo_hard":
            loss = (v[w] / o.beta - 1 / (2 * o.beta)) ** 2 + (v[l] / o.beta + 1 / (2 * o.beta)) ** 2
        elif o.loss == "margin":
            loss = softplus(-(mean({i: v[i] for i in P}) - mean({j: v[j] for j in N})))
        elif o.loss == "mpo":
            loss = lse({i: v[i] for i in members}) - lse({i: v[i] for i in P})
        elif o.loss == "all_pairs":
            scaled = {(i, j): (1 if o.balance is None else weight(b[i], b[j])) * u[i] for i in P for j in N}
            loss = mean({i: mean({j: softplus(-(scaled[i, j] - u[j])) for j in N}) for i in P})
        elif o.loss == "softmax":
            negatives = {j: v[j] for j in N}
            # A positive meets the negatives once, whatever it weighs itself.
            loss = mean({i: torch.logaddexp(v[i], lse(negatives)) - v[i] for i in P})
        else:
            assert o.loss == "plackett_luce"
            rest = [torch.stack([v[j] for j in members if j >= k]) for k in members]
            loss = sum(torch.logsumexp(x, 0) - x[0] for x in rest)
        if o.nll_weight:
            loss = loss + o.nll_weight * mean({i: -m[i] for i in P})
        if o.policy_weight:
            factor = torch.exp(sum(mean({i: m[i].detach() for i in side}) for side in (P, N)))
            factors[-1], loss = float(factor), factor * loss
        losses.append(loss)
    group_losses = torch.stack(losses)
    shares = [1.0 / len(lists)] * len(lists)
    if weights is not None:
        divisor = sum(weights) if o.divide_by == "weights" else len(weights)
        shares = [w / divisor for w in weights]
    return {
        "loss": sum(share * loss for share, loss in zip(shares, losses)),
        "seq_logps": torch.stack(s),
        "rewards": torch.stack(u),
        "group_losses": group_losses,
        "policy_weights": torch.tensor(factors, dtype=token_logps.dtype),
        "shares": torch.tensor(shares, dtype=token_logps.dtype),
        "balance_weights": torch.tensor(balances, dtype=token_logps.dtype),
    }


def draw(lists: list[list[bool]], seed: int, spread: float = 1.0) -> tuple[Tensor, list[int], Tensor]:
    """(token_logps, cu_seqlens, ref_logps by token), float64; lengths 1 to 6."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [rng.randint(1, 6) for group in lists for _ in group]
    cu = [0, *itertools.accumulate(lengths)]
    values = -spread * torch.rand(2, cu[-1], generator=generator, dtype=torch.float64) - 0.01
    return values[0], cu, values[1]


def run(
    token_logps: Tensor, cu: list[int], lists: list[list[bool]], o: Objective, ref: Tensor | None
) -> tuple[PreferenceLoss, Tensor]:
    token_logps = token_logps.clone().requires_grad_()
    result = preference_loss(token_logps, torch.tensor(cu), PreferenceGroups.from_lists(lists), o, ref)
    (gradient,) = torch.autograd.grad(result.loss, token_logps)
    return result, gradient


def check(lists: list[list[bool]], o: Objective, seed: int, spread: float = 1.0, ref_by_token: bool = True) -> None:
    token_logps, cu, ref = draw(lists, seed, spread)
    if not ref_by_token:
        ref = torch.stack([ref[a:b].sum() for a, b in itertools.pairwise(cu)])
    truth = {}
    for dtype in (torch.float64, torch.float32):
        x = token_logps.to(dtype).requires_grad_()
        expected = oracle(x, cu, lists, o, ref.to(dtype))
        expected["gradient"] = torch.autograd.grad(expected["loss"], x)[0]
        result, gradient = run(token_logps.to(dtype), cu, lists, o, ref.to(dtype))
        found = {**result._asdict(), "gradient": gradient}
        for name, value in found.items():
            assert value.dtype == dtype, name
            if dtype == torch.float64:
                truth[name] = expected[name].detach()
                torch.testing.assert_close(
                    value, truth[name], rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
                )
            else:
                scale = truth[name].abs().max().clamp(min=1.0)
                budget = 2 * (expected[name].detach().double() - truth[name]).abs().max()
                error = (value.double() - truth[name]).abs().max()
                assert error <= budget + 8 * torch.finfo(dtype).eps * scale, name


PAIRS = [[True, False], [False, True], [True, False]]
RAGGED = [[True, False, False], [False, True], [False, False, True, True, False], [True] * 3 + [False] * 6]
RANKED = [sorted(group, reverse=True) for group in RAGGED]
OPTIONS: list[dict[str, object]] = [
    {},
    {"beta": 2.0, "average": True, "nll_weight": 1.0, "label_smoothing": 0.1, "gamma": 0.7, "alpha": 0.3, "tau": 0.2},
    {"average": False, "reference_free": True, "tau": 0.7},
    {"average": True, "reference_free": False, "nll_weight": 0.5},
]
BALANCES = [
    AdaBalance(),
    AdaBalance(ceiling=1.05, normalize=False),
    AdaBalance(ceiling=30.0, space="reference"),
    AdaBalance(ceiling=0.5, space="reference", normalize=False),
]


def shape_for(loss: str) -> list[list[bool]]:
    return PAIRS if loss in PAIRWISE else RANKED if loss == "plackett_luce" else RAGGED


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradient(loss: str, options: dict) -> None:
    for balance in (None, *(BALANCES if loss not in UNBALANCED and "tau" not in options else ())):
        check(shape_for(loss), make_objective(loss, balance=balance, **options), seed=3)


def draw_lists(data: st.DataObject, loss: str) -> list[list[bool]]:
    def group() -> list[bool]:
        labels = [True] * data.draw(st.integers(1, 4)) + [False] * data.draw(st.integers(1, 5))
        return labels if loss == "plackett_luce" else data.draw(st.permutations(labels))

    if loss in PAIRWISE:
        return [data.draw(st.permutations([True, False])) for _ in range(data.draw(st.integers(1, 6)))]
    return [group() for _ in range(data.draw(st.integers(1, 6)))]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_random_ragged_groups(data: st.DataObject) -> None:
    loss = data.draw(st.sampled_from(list(LOSSES)))
    objective = make_objective(
        loss,
        beta=data.draw(st.sampled_from([0.1, 1.0, 7.5])),
        average=data.draw(st.sampled_from([None, True, False])),
        reference_free=data.draw(st.sampled_from([None, True, False])),
        nll_weight=data.draw(st.sampled_from([0.0, 1.0])),
        tau=data.draw(st.sampled_from([0.5, 1.0])),  # a small one multiplies the rounding of D, which is luck
        balance=None if loss in UNBALANCED else data.draw(st.sampled_from([None, *BALANCES])),
    )
    spread = data.draw(st.sampled_from([0.1, 1.0, 3.0]))
    check(draw_lists(data, loss), objective, data.draw(st.integers(0, 999)), spread, data.draw(st.booleans()))


@pytest.mark.parametrize("loss", LOSSES)
def test_finite_differences(loss: str) -> None:
    lists = shape_for(loss)[:3]
    token_logps, cu, ref = draw(lists, seed=1)
    groups, offsets = PreferenceGroups.from_lists(lists), torch.tensor(cu)
    objective = Objective(loss, beta=1.3, nll_weight=0.5, label_smoothing=0.2, gamma=0.1, alpha=0.1)
    token_logps.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: preference_loss(x, offsets, groups, objective, ref).loss, token_logps)


@pytest.mark.parametrize("loss", ["margin", "mpo", "all_pairs", "softmax", "plackett_luce"])
def test_a_group_of_two_is_a_pair(loss: str) -> None:
    token_logps, cu, ref = draw([[True, False]] * 3, seed=2)
    pair, d_pair = run(token_logps, cu, [[True, False]] * 3, Objective("sigmoid", beta=0.7), ref)
    group, d_group = run(token_logps, cu, [[True, False]] * 3, Objective(loss, beta=0.7), ref)
    torch.testing.assert_close(group.group_losses, pair.group_losses, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(d_group, d_pair, rtol=1e-13, atol=1e-14)


def test_coefficients_in_closed_form() -> None:
    """dL/du of the group losses, term by term."""
    u = torch.tensor([0.3, -1.2, 0.8, 0.1, -0.4], dtype=torch.float64)
    positive = torch.tensor([False, True, False, True, False])
    P, N = positive.nonzero()[:, 0], (~positive).nonzero()[:, 0]
    sigma = torch.sigmoid
    d = u[P].mean() - u[N].mean()
    expected = {name: torch.empty_like(u) for name in ("margin", "mpo", "all_pairs", "softmax")}
    expected["margin"][P], expected["margin"][N] = -sigma(-d) / len(P), sigma(-d) / len(N)
    expected["mpo"][:] = u.softmax(0)
    expected["mpo"][P] -= u[P].softmax(0)
    g = sigma(u[N][None] - u[P][:, None]) / (len(P) * len(N))
    expected["all_pairs"][P], expected["all_pairs"][N] = -g.sum(1), g.sum(0)
    q = 1 - sigma(u[P] - u[N].logsumexp(0))
    expected["softmax"][P], expected["softmax"][N] = -q / len(P), q.mean() * u[N].softmax(0)
    for name, coefficients in expected.items():
        objective = Objective(name, beta=1.0, reference_free=True)
        _, gradient = run(u, list(range(6)), [positive.tolist()], objective, None)
        torch.testing.assert_close(gradient, coefficients, rtol=1e-12, atol=1e-14)


# --------------------------------------------------------------------------------------------------------------- AdaDPO


BALANCED = [*itertools.product(set(LOSSES) - {"orpo", *UNBALANCED}, ["policy", "reference"], [True, False])]


# orpo's odds are those of the policy's mean probability, whatever the options.
@pytest.mark.parametrize(("loss", "space", "normalize"), [*sorted(BALANCED), ("orpo", "policy", True)])
def test_balance_makes_the_two_sides_equal(loss: str, space: str, normalize: bool) -> None:
    """Gradients in exp(s / n) with averaged scores and normalize, in exp(s) with sums and without."""
    token_logps, cu, ref = draw([[True, False]], seed=5, spread=0.4)
    balance = AdaBalance(ceiling=100.0, space=space, normalize=normalize)
    objective = make_objective(loss, beta=0.5, average=normalize, reference_free=False, alpha=0.01, balance=balance)
    _, gradient = run(token_logps, cu, [[True, False]], objective, ref)
    s, r = (torch.stack([x[a:b].sum() for a, b in itertools.pairwise(cu)]) for x in (token_logps, ref))
    n = torch.tensor(cu).diff()
    d_score = gradient[torch.tensor(cu[:-1])] * (n if normalize else 1)
    if loss == "orpo":
        d_score[0] += 1  # the term -m_w of the loss
    level = s if space == "policy" else s - r
    by_probability = d_score / torch.exp(level / n if normalize else level)
    assert by_probability[0] != 0
    torch.testing.assert_close(-by_probability[0], by_probability[1], rtol=1e-10, atol=0)


def test_ceiling_binds_exactly_and_negatives_weigh_one() -> None:
    token_logps = torch.tensor([-0.1, -9.0, -0.2, -9.0])
    result, _ = run(token_logps, [0, 1, 2, 3, 4], [[True, False]] * 2, Objective(balance=AdaBalance(1.7)), token_logps)
    assert result.balance_weights.tolist() == torch.tensor([1.7, 1, 1.7, 1]).tolist()


@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_scores_stay_finite(loss: str) -> None:
    lists = shape_for(loss)
    for sign in (1, -1):
        labels = torch.tensor([x for group in lists for x in group])
        token_logps = torch.where(labels, -2e4 if sign > 0 else -0.0, -0.0 if sign > 0 else -2e4)
        for balance in (None, AdaBalance()) if loss not in UNBALANCED else (None,):
            objective = make_objective(loss, beta=1.0, nll_weight=1.0, balance=balance)
            result, gradient = run(
                token_logps, list(range(len(labels) + 1)), lists, objective, -1e4 * torch.ones(len(labels))
            )
            assert all(x.isfinite().all() for x in (*result, gradient))
