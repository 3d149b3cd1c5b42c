"""A family of cases: how one is drawn from its number, judged, kept on disk, and reported.

A family is a `Family` at the end of its module, and an entry of FAMILIES in tests/numerics.py. What it must give:

- `draw(number)` makes a case from its number alone, in microseconds: a frozen dataclass that says what to compute and
  holds no tensor, so that any case can be repeated, and all can be drawn to choose among them.
- `case.rows` and `case.column` say where the case counts in the report: it may have several rows, such as its regime,
  its path and its dtype, and has one column, such as its implementation.
- `judge(case)` computes it and gives, for each result, the share of its error budget that it takes. A share above 1, or
  one that is no number, is a failure; so is an exception. It leaves the process as it was (threads, default dtype).
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from kept_rows import add_row, read_rows

ROOT = Path(__file__).resolve().parents[2]
FRAME = ("tests/campaign/frame.py",)


class Case(Protocol):
    @property
    def rows(self) -> tuple[str, ...]: ...

    @property
    def column(self) -> str: ...


@dataclass(frozen=True)
class Family:
    name: str  # one word, as in `--case head:1234`
    title: str  # what is tested, at the top of its table
    count: int  # cases of the whole campaign
    draw: Callable[[int], Any]  # a number -> a Case
    judge: Callable[[Any], dict[str, float]]  # a Case -> the share of its budget by result
    sources: tuple[str, ...]  # files that decide the results, as globs from the root; the family's own among them

    def digest(self) -> str:
        """Of the sources and of torch's version: results of other code are not these."""
        found = hashlib.sha256(torch.__version__.encode())
        for path in sorted({path for glob in (*FRAME, *self.sources) for path in ROOT.glob(glob)}):
            found.update(path.read_bytes())
        return found.hexdigest()[:12]

    def verdict(self, number: int) -> Verdict:
        began = time.perf_counter()
        try:
            shares = self.judge(self.draw(number))
        except Exception as error:  # a case that raises has failed, and the campaign goes on
            shares = {f"{type(error).__name__}: {' '.join(str(error).split())[:300]}": math.inf}
        return Verdict(number, shares, time.perf_counter() - began)

    @functools.cache  # noqa: B019 (families live as long as the process)
    def slice(self, each: int) -> dict[str, list[int]]:
        """By column, numbers of cases that meet each of its rows `each` times, or as often as the campaign does."""
        met: dict[tuple[str, str], int] = {}
        chosen: dict[str, list[int]] = {}
        for number in range(self.count):
            pairs = places(case := self.draw(number))
            if any(met.get(pair, 0) < each for pair in pairs):
                chosen.setdefault(case.column, []).append(number)
                met |= {pair: met.get(pair, 0) + 1 for pair in pairs}
        return chosen


def places(case: Case) -> list[tuple[str, str]]:
    return [(row, case.column) for row in case.rows]


@dataclass(frozen=True)
class Verdict:
    case: int
    shares: dict[str, float]
    seconds: float

    @property
    def worst(self) -> float:
        """The largest share; infinite where one is no number."""
        return max((math.inf if math.isnan(share) else share for share in self.shares.values()), default=0.0)

    @property
    def failed(self) -> bool:
        return self.worst > 1

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {share:.3g}" for name, share in sorted(self.shares.items(), key=lambda x: -x[1]))
        return f"case {self.case}: {'FAILED' if self.failed else 'right'} in {self.seconds:.2f} s; {shares}"


# -------------------------------------------------------------------------------------------------------- kept on disk


def kept(path: Path) -> dict[int, Verdict]:
    """What a file of verdicts holds. A last line that a kill has cut is taken off, so that more can follow."""
    verdicts = [Verdict(**row) for row in read_rows(path)]
    return {verdict.case: verdict for verdict in verdicts}


def judged(family: Family, numbers: Iterable[int], path: Path) -> Iterator[Verdict]:
    """The verdicts on `numbers` that `path` does not hold yet, each written as it is there."""
    done = kept(path)
    for number in numbers:
        if number not in done:
            verdict = family.verdict(number)
            add_row(path, vars(verdict))
            yield verdict


# ------------------------------------------------------------------------------------------------------------ reported


def table(family: Family, verdicts: dict[int, Verdict]) -> str:
    """For each row and column: how many cases, the largest share of the budget, and its case."""
    cells: dict[tuple[str, str], list[Verdict]] = {}
    for number, verdict in verdicts.items():
        for place in places(family.draw(number)):
            cells.setdefault(place, []).append(verdict)

    def cell(row: str, column: str) -> str:
        found = cells.get((row, column))
        if not found:
            return "-"
        worst = max(found, key=lambda verdict: verdict.worst)
        return f"{len(found)}: {worst.worst:.2f} (#{worst.case})"

    rows, columns = (sorted({place[i] for place in cells}) for i in range(2))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [f"| {row} | " + " | ".join(cell(row, column) for column in columns) + " |" for row in rows]
    failed = [verdict for verdict in verdicts.values() if verdict.failed]
    if failed:
        lines += ["", "Beyond the budget:", "", *(f"- {verdict}" for verdict in sorted(failed, key=lambda v: v.case))]
    return "\n".join(lines)
