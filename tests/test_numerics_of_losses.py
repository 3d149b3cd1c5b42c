"""The campaign's families of losses and of the backward find faults that are planted."""

from typing import Any

import pytest
import torch
from campaign import backward, losses


@pytest.mark.parametrize("name", ["loss", "group_losses", "gradient", "rewards", "sums", "rewards/margins"])
def test_a_fault_of_a_loss_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    number = next(n for n in range(99) if (case := losses.draw(n)).regime == "plain" and case.dtype == torch.float32)
    ours = losses.ours

    def wrong(*arguments: Any) -> dict[str, torch.Tensor]:
        found = ours(*arguments)
        return {**found, name: found[name] * (1 + 1e-3)}

    assert not losses.FAMILY.verdict(number).failed
    monkeypatch.setattr(losses, "ours", wrong)
    verdict = losses.FAMILY.verdict(number)
    assert verdict.failed and verdict.shares[name] > 1


def draw_two_pass() -> int:
    def fits(case: backward.BackwardCase) -> bool:
        return case.strategy == "two_pass" and case.dropout > 0 and not case.frozen and case.steps[0].prompts != ()

    return next(n for n in range(999) if fits(backward.draw(n)))


@pytest.mark.parametrize("fault", ["a gradient is off", "a gradient is missing", "other dropout"])
def test_a_fault_of_the_backward_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    number, ours = draw_two_pass(), backward.ours

    def wrong(case: backward.BackwardCase) -> backward.Found:
        step_losses, gradients, state = ours(case)
        if fault == "a gradient is off":
            gradients["first"] = gradients["first"] * (1 + 1e-3)
        elif fault == "a gradient is missing":
            del gradients["second"]
        else:
            state = state.roll(1)
        return step_losses, gradients, state

    assert not backward.FAMILY.verdict(number).failed
    monkeypatch.setattr(backward, "ours", wrong)
    assert backward.FAMILY.verdict(number).failed
