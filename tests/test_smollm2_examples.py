"""The examples on SmolLM2-135M in their quick form, on a tiny random model: stopped, resumed, measured."""

from __future__ import annotations

import importlib
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import Script, forked

FOLDER = Path(__file__).parent.parent / "examples" / "smollm2"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def steps_of(path: Path) -> dict[str, list[float]]:
    runs = json.loads(path.read_text())["runs"]
    return {arm: [point["step"] for point in seeds["0"]] for arm, seeds in runs.items()}


def test_online_arithmetic_goes_on_where_it_was_stopped(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """First with no time at all, so that a run ends after a step; then until Ctrl-C; then to the end."""
    module, out = example("online_arithmetic"), tmp_path / "out"
    results = out / "results.json"

    def call(*more: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["online_arithmetic.py", "--quick", "--out", str(out), *more])
        return module.main(), capsys.readouterr().out

    assert call("--minutes", "0")[0] == 0
    assert steps_of(results) == {"online GroupDPO": [1], "online DPO": [1], "offline GroupDPO": []}

    with Script(FOLDER / "online_arithmetic.py", "--quick", "--out", out) as script:
        script.until(lambda: steps_of(results)["online GroupDPO"][1:] != [])
        script.send_signal(signal.SIGINT)
        assert script.wait(60) == 130
        assert "interrupted" in script.stdout.read_text() and (out / "curves.png").exists()
    assert steps_of(results)["online GroupDPO"][:2] == [1, 2] and not steps_of(results)["offline GroupDPO"]

    status, printed = call()
    assert status == 0 and "offline GroupDPO         4      1" in printed
    assert steps_of(results) == {"online GroupDPO": [1, 2, 4], "online DPO": [1, 2, 4], "offline GroupDPO": [2, 4]}
    points = json.loads(results.read_text())["runs"]["online GroupDPO"]["0"]
    assert all(0 <= point["accuracy"] <= 1 and 0 <= point["dropped"] < 1 for point in points)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "offline" not in call()[1].partition("95 %")[0]  # nothing is left to do
    with pytest.raises(ValueError, match="of the options"):
        call("--lr", "0.1")


def test_intervals_and_curves_over_seeds(example: Any, tmp_path: Path) -> None:
    module = example("online_arithmetic")
    assert module.interval([0.2, 0.4, 0.6]) == pytest.approx(4.30 * 0.2 / 3**0.5)
    results = module.Results(tmp_path / "results.json", {})
    results.start = 0.25
    for seed, accuracies in enumerate([[0.3, 0.4, 0.5], [0.4, 0.6]]):
        results.points("online DPO", seed).extend({"step": 2 * i, "accuracy": x} for i, x in enumerate(accuracies, 1))
    assert results.curve("online DPO") == {0: [0.25, 0.25], 2: [0.3, 0.4], 4: [0.4, 0.6]}
    assert results.curve("online GroupDPO") == {0: [0.25]}


def test_measure(example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = example("measure")
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=forked))
    quick = ["--quick", "--steps", "2", "--size", "3", "--examples", "2"]
    assert module.main(quick) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    rows = {row: line for row in module.ROWS for line in printed.splitlines() if line.startswith(f"{row}  ")}
    assert len(rows) == 4 and " 1.00 " in rows["TRL"]


def test_the_task_and_what_is_missing(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = example("additions").Task(example("additions").tiny_tokenizer())
    training, held_out = task.rows(0, 100)
    assert len(training) == 710 and len(held_out) == 100
    assert not {row["prompt"] for row in training} & {row["prompt"] for row in held_out}
    assert {row["prompt"] for row in task.rows(1, 100)[0]} == {row["prompt"] for row in training}
    assert all(eval(row["prompt"].removesuffix(" =")) == row["answer"] for row in training)
    said = [" 55.", " 55, which is odd", "\nis 54", " none"]
    assert task.reward(said, [55] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert example("arms").first_and_last([0.0, 1.0, 1.0, 0.0]) == [(1, True), (0, False)]
    assert example("arms").first_and_last([1.0, 1.0]) == []

    prepare = example("prepare")
    monkeypatch.setattr(prepare, "PACKAGES", {"no_such_module": "no-such-package==1"})
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(tmp_path)])
    assert prepare.main() == 1 and "pip install --no-deps no-such-package==1" in capsys.readouterr().err
