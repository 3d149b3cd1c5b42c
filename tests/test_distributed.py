"""The matrix of engines: GroupDPOTrainer on two and four ranks ends with the weights of one process.

engine x {all weights, adapter} x {tied, own head} x {two_pass, coupled} x {prompts shared, not} x {equal, unequal
groups}. `make test-distributed` runs it; `make test` holds a slice, in test_trl_engines.py.
"""

from __future__ import annotations

import itertools
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
    CASES["-".join(_words)] = Case(_engine, _adapter, _tied, _equal, {"strategy": _strategy, "share_prompt": _share})


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
                start_ranks(train_cases, world, str(place), cases, seconds=1800)
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
            known[key] = one_process(case._replace(options={}), tmp_path_factory.mktemp("one"))
        return known[key]

    return of


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_ranks_are_one_process_with_the_whole_batch(name: str, world: int, runs: Any, alone: Any) -> None:
    for found in runs(name, world):
        check_as_one(found, alone(CASES[name]))
