"""Values worked out by hand, and changes of a batch that must change nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from groupdpo_kernels import AdaBalance, Objective, PreferenceGroups, preference_loss
from groupdpo_kernels.preference.losses import LOSSES

PAIR = PreferenceGroups.pairs(1)
TWO = torch.tensor([0, 1, 2])  # responses of one token


def loss_and_slope(objective: Objective, log_ratio: float) -> tuple[float, float]:
    """The loss of a pair whose log-ratios differ by so much, and its derivative in the preferred log-probability."""
    logps = torch.tensor([log_ratio - 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    result = preference_loss(logps, TWO, PAIR, objective, torch.full((2,), -1.0, dtype=torch.float64))
    result.loss.backward()
    assert logps.grad is not None
    return result.loss.item(), logps.grad[0].item()


@pytest.mark.parametrize(
    ("loss", "value", "slope"),
    [("hinge", 0.4, -0.1), ("ipo", 1.0, 2.0), ("sigmoid", 0.43748795, -0.03543437)],
)
def test_a_margin_of_six(loss: str, value: float, slope: float) -> None:
    """Beta 0.1: relu(1 - 0.6); (6 - 1 / 0.2)^2, past its target and so with a rising slope; -log sigma(0.6)."""
    assert loss_and_slope(Objective(loss), 6.0) == (pytest.approx(value, rel=1e-6), pytest.approx(slope, rel=1e-6))


def test_a_margin_of_minus_two_hundred() -> None:
    """-log sigma(-200) is 200, with slope -1: nothing overflows and nothing saturates."""
    assert loss_and_slope(Objective("sigmoid", beta=1.0), -200.0) == (pytest.approx(200.0), pytest.approx(-1.0))


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        *((loss, {"label_smoothing": 0.2}) for loss in ("sigmoid", "robust", "exo_pair")),
        ("simpo", {"gamma": 0.5}),
        ("rdpo", {"alpha": 0.3}),
        ("discopop", {"tau": 0.5}),
        *((loss, {"nll_weight": 0.5}) for loss in LOSSES),
        *((loss, {"beta": 0.7}) for loss in LOSSES),
        *((loss, {"balance": AdaBalance()}) for loss, row in LOSSES.items() if not row.no_balance),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else x,
)
def test_each_option_moves_the_result(loss: str, options: dict[str, Any]) -> None:
    base = {"loss": loss, "label_smoothing": 0.1} if loss == "exo_pair" else {"loss": loss}
    logps = torch.tensor([-1.0, -0.5, -2.0, -0.3], dtype=torch.float64)
    arguments = logps, torch.tensor([0, 3, 4]), PAIR
    reference = torch.tensor([-4.0, -0.2], dtype=torch.float64)
    values = [preference_loss(*arguments, Objective(**given), reference).loss for given in (base, base | options)]
    assert abs(values[0] - values[1]) > 1e-4


def padded(rows: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Token log-probabilities of responses within rows of `length`, their masked tokens left out as a trainer does."""
    batch = torch.full((len(rows), length), 7.0, dtype=torch.float64)  # what is masked is never read
    live = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        batch[i, : len(row)], live[i, : len(row)] = row, True
    return batch[live], torch.nn.functional.pad(live.sum(1).cumsum(0), (1, 0))


@pytest.mark.parametrize("loss", ["ipo", "simpo", "sigmoid", "mpo"])
def test_padding_changes_no_mean(loss: str) -> None:
    """Responses of 3 and of 30 tokens, packed, and in rows with a hundred masked tokens more."""
    generator = torch.Generator().manual_seed(0)
    rows = [-torch.rand(n, generator=generator, dtype=torch.float64) for n in (3, 30)]
    reference = torch.tensor([-2.0, -20.0], dtype=torch.float64)
    packed = torch.cat(rows), torch.tensor([0, 3, 33])
    losses = [
        preference_loss(*batch, PAIR, Objective(loss, average=True), reference).loss
        for batch in (packed, padded(rows, 30), padded(rows, 130))
    ]
    assert losses[0] == losses[1] == losses[2]
    by_hand = 0.1 * ((rows[0].sum() + 2.0) / 3 - (rows[1].sum() + 20.0) / 30)
    if loss == "ipo":
        assert losses[0].item() == pytest.approx(((by_hand - 0.5) / 0.1).item() ** 2, rel=1e-9)


def test_ada_balance_at_five_hundred_tokens() -> None:
    """A mean over tokens stays where a sum would be past every ceiling: w = exp(-0.2) here, and 2 the other way."""
    logps = torch.tensor([-1.2, -1.0], dtype=torch.float64).repeat_interleave(500)
    offsets, reference = torch.tensor([0, 500, 1000]), torch.tensor([-600.0, -500.0], dtype=torch.float64)

    def weight(balance: AdaBalance) -> float:
        found = preference_loss(logps, offsets, PAIR, Objective(balance=balance), reference)
        assert found.loss.isfinite()
        return found.balance_weights[0].item()

    assert weight(AdaBalance()) == pytest.approx(math.exp(-0.2), rel=1e-9)
    assert weight(AdaBalance(normalize=False)) == pytest.approx(math.exp(-100.0), rel=1e-9)
    logps = logps.flip(0)
    assert weight(AdaBalance(normalize=False)) == 2.0
