"""The matrix of engines: GroupDPOTrainer on two and four ranks ends with the weights of one process.

engine x {all weights, adapter} x {tied, own head} x {two_pass, coupled} x {prompts shared, not} x {equal, unequal
groups}. `make test-distributed` runs it, and writes what came out into docs/project/distributed.md; `make test` holds
a slice, in test_trl_engines.py.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_runs import Case, check_as_one, one_process, results, start_ranks, train_cases

pytestmark = pytest.mark.distributed

CASES: dict[str, Case] = {}
for _engine, _adapter, _tied, _strategy, _share, _equal in itertools.product(
    ("ddp", "fsdp2", "zero1", "zero2", "zero3"), *[(False, True)] * 2, ("two_pass", "coupled"), *[(False, True)] * 2
):
    _words = [
        _engine,
        "adapter" if _adapter else "all",
        "tied" if _tied else "untied",
        _strategy,
        "shared" if _share else "unshared",
        "equal" if _equal else "unequal",
    ]
    _options = {"strategy": _strategy, "share_prompt": _share, "max_steps": 4}
    CASES["-".join(_words)] = Case(_engine, _adapter, _tied, _equal, _options)
WORLDS = (2, 4)
PAGE = Path(__file__).resolve().parents[1] / "docs" / "project" / "distributed.md"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the ranks of a case ended with. The cases of one family share their processes, which end at an error."""
    folder, started = tmp_path_factory.mktemp("ranks"), set()

    def of(name: str, world: int) -> list[Any]:
        family = CASES[name].family
        place = folder / f"{family}-{world}"
        if place not in started:
            started.add(place)
            place.mkdir()
            cases = {other: case for other, case in CASES.items() if case.family == family}
            try:
                start_ranks(train_cases, world, str(place), cases, seconds=3600)
            except RuntimeError as error:
                (place / "error").write_text(str(error))
        return results(place, name, world)

    return of


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    known: dict[Any, Any] = {}

    def of(case: Case) -> Any:
        key = case.adapter, case.tied, case.equal
        if key not in known:
            known[key] = one_process(case._replace(options={"max_steps": 4}), tmp_path_factory.mktemp("one"))
        return known[key]

    return of


@pytest.fixture(scope="module")
def distances() -> Iterator[dict[tuple[str, int], float]]:
    """How far each case ended from one process, relative to the way. If all have run, the page gets them."""
    found: dict[tuple[str, int], float] = {}
    yield found
    if len(found) == len(CASES) * len(WORLDS):
        head, foot = re.split(r"(?<=<!-- matrix -->\n).*(?=<!-- /matrix -->)", PAGE.read_text(), flags=re.DOTALL)
        PAGE.write_text(head + "\n".join(table(found, world) for world in WORLDS) + foot)


def table(found: dict[tuple[str, int], float], world: int) -> str:
    """A Markdown table of these distances, in millionths."""
    columns = list(itertools.product(("untied", "tied"), ("unshared", "shared")))
    rows = [
        "| ".join([f"\n| {world} ranks, trains, strategy ", *(f"{tied}, {share} " for tied, share in columns), "\n"]),
        "|---" * (1 + len(columns)) + "|\n",
    ]
    kinds = dict.fromkeys((name.split("-")[0], name.split("-")[1], name.split("-")[3]) for name in CASES)
    for engine, what, strategy in kinds:
        cells = [
            " / ".join(
                f"{1e6 * found['-'.join([engine, what, tied, strategy, share, sizes]), world]:.2f}"
                for sizes in ("equal", "unequal")
            )
            for tied, share in columns
        ]
        rows.append("| ".join(["", f"{engine}, {what}, `{strategy}` ", *(f"{cell} " for cell in cells), "\n"]))
    return re.sub(" $", "", "".join(rows), flags=re.MULTILINE)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_ranks_are_one_process_with_the_whole_batch(
    name: str, world: int, runs: Any, alone: Any, distances: dict[tuple[str, int], float]
) -> None:
    distances[name, world] = max(check_as_one(found, alone(CASES[name])) for found in runs(name, world))
