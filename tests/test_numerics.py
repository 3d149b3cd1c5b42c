"""A slice of every family of `make numerics`; and the campaign itself: it finds faults, and goes on after a kill."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from campaign import heads
from campaign.frame import Family, Verdict, judged, kept, places, table
from numerics import FAMILIES, PAGE
from pages import marks

from groupdpo_kernels.reference import accumulator

# How often a slice meets each place of its report: half a minute of one core, a quarter of it in Triton's interpreter.
EACH = {"head": 6, "losses": 1, "backward": 1}


COLUMNS = {name: sorted({family.draw(n).column for n in range(64)}) for name, family in FAMILIES.items()}
SLICES = [(name, column) for name, columns in COLUMNS.items() for column in columns]


@pytest.mark.parametrize(("name", "column"), SLICES)
def test_a_slice(name: str, column: str) -> None:
    """Every row in each column of the report. A failure is repeated by `make numerics ARGS='--case head:1234'`."""
    chosen = FAMILIES[name].slice(EACH[name])
    assert sorted(chosen) == COLUMNS[name]
    verdicts = [FAMILIES[name].verdict(number) for number in chosen[column]]
    assert not [str(verdict) for verdict in verdicts if verdict.failed]


@pytest.mark.parametrize("name", FAMILIES)
def test_cases_are_drawn_from_their_number_alone(name: str) -> None:
    family = FAMILIES[name]
    numbers = range(0, family.count, family.count // 20)
    assert [family.draw(n) for n in reversed(numbers)] == [family.draw(n) for n in numbers][::-1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_its_place_on_the_page(name: str) -> None:
    text = PAGE.read_text()
    assert all(text.count(mark) == 1 for mark in marks(f"make numerics, {name}"))


def test_every_regime_and_path_is_met() -> None:
    met = {pair for number in range(heads.FAMILY.count) for pair in places(heads.draw(number))}
    for impl, paths in heads.BY_IMPL.items():
        assert {(f"values: {regime}", impl) for regime in heads.REGIMES} <= met
        assert {(f"path: {path}", impl) for path in paths} <= met


# ------------------------------------------------------------------------------------------------------- faults


def numbers_of(regime: str, impl: str, count: int) -> list[int]:
    """Cases that ask for a gradient of hidden that is not 0."""
    found = []
    for number in range(heads.FAMILY.count):
        case = heads.draw(number)
        if (case.regime, case.impl, case.path) == (regime, impl, "exact") and "hidden" in case.needs:
            found.append(number)
    return found[:count]


FAULTS = {
    "a bias in every entry": lambda x, eps: x * (1 + 100 * eps),
    "one wrong entry": lambda x, eps: torch.cat(
        (x.reshape(-1)[:1] + x.double().norm().to(x) * 0.1, x.reshape(-1)[1:])
    ).view_as(x),
    "a row left out": lambda x, eps: x * (torch.arange(x.numel()) >= x.shape[-1]).view_as(x),
    "not a number": lambda x, eps: x * torch.nan,
    "another shape": lambda x, eps: x[None],
    "another dtype": lambda x, eps: x.to(torch.float64 if x.dtype != torch.float64 else torch.float32),
}


@pytest.mark.parametrize("name", ["d_hidden", "token_logps"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = heads.computed

    def wrong(case: heads.HeadCase, inputs: object) -> dict[str, torch.Tensor]:
        result = computed(case, inputs)  # type: ignore[arg-type]
        eps = torch.finfo(case.shape.dtype if name == "d_hidden" else accumulator(case.shape.dtype)).eps
        result[name] = FAULTS[fault](result[name], eps)
        return result

    number = next(
        n
        for n in numbers_of("plain", "cpu", 50)
        if heads.draw(n).shape.ignored == "none" and heads.draw(n).shape.V > 50
    )
    assert not heads.FAMILY.verdict(number).failed
    monkeypatch.setattr(heads, "computed", wrong)
    verdict = heads.FAMILY.verdict(number)
    assert verdict.shares[name] > 1 and verdict.failed


# ------------------------------------------------------------------------------------------------------- the frame


@dataclasses.dataclass(frozen=True)
class Toy:
    number: int

    @property
    def rows(self) -> tuple[str, ...]:
        return (("even", "odd")[self.number % 2],)

    @property
    def column(self) -> str:
        return "toy"


def judge(case: Toy) -> dict[str, float]:
    if case.number == 7:
        raise ValueError("seven")
    return {"value": {3: 1.5, 5: math.nan}.get(case.number, case.number / 100)}


FAMILY = Family("toy", "Toys", 10, Toy, judge, ())


def test_the_verdicts_are_kept_and_a_kill_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "toy.jsonl"
    assert [verdict.case for verdict in judged(FAMILY, range(6), path)] == list(range(6))
    whole = path.read_text()
    path.write_text(whole[:-10])  # the last line is cut
    assert list(kept(path)) == [0, 1, 2, 3, 4]
    assert [verdict.case for verdict in judged(FAMILY, range(10), path)] == [5, 6, 7, 8, 9]
    assert sorted(kept(path)) == list(range(10))
    assert [n for n, verdict in kept(path).items() if verdict.failed] == [3, 5, 7]


def test_the_table_shows_the_worst_and_what_failed() -> None:
    text = table(FAMILY, {number: FAMILY.verdict(number) for number in range(10)})
    assert "| even | 5: 0.08 (#8) |" in text and "| odd | 5: inf (#5) |" in text
    assert "- case 3: FAILED" in text and "ValueError: seven inf" in text


def test_a_slice_meets_each_place_as_often_as_it_is_told() -> None:
    (once,), (twice,) = FAMILY.slice(1).values(), FAMILY.slice(2).values()
    assert once == [0, 1] and twice == [0, 1, 2, 3]


def test_a_share_that_is_no_number_is_a_failure() -> None:
    assert Verdict(0, {"a": 0.5, "b": math.nan}, 0.0).failed and not Verdict(0, {"a": 1.0}, 0.0).failed
