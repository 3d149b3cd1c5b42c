"""The demo in its quick form, as a user runs it, and what it leaves behind."""

import json
import math
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Script, run_script

EXAMPLES = Path(__file__).parent.parent / "examples"
DEMO = [EXAMPLES / "group_arithmetic.py", "--quick"]


def test_the_quick_demo_leaves_a_report_and_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "some" / "where"
    run = run_script(*DEMO, "--seed", 3, "--out", out)
    assert run.returncode == 0, run.stderr
    for part in (
        "held-out accuracy",
        "tokens/s",
        "two passes",
        "prompt shared",
        "own answers to held-out",
        "shared start",
    ):
        assert part in run.stdout
    assert "\r" not in run.stdout  # the progress line is for terminals

    report = json.loads((out / "report.json").read_text())
    assert not report["interrupted"] and report["options"]["seed"] == 3
    assert report["environment"]["torch"] == torch.__version__ and report["environment"]["cpus"] == os.cpu_count()
    assert [method["name"] for method in report["runs"]] == ["MPO + NLL", "DPO", "AdaDPO", "sDPO"]
    for method in report["runs"]:
        check_run(method, report["start"])
    first_losses = {method["name"]: method["curve"][1]["loss"] for method in report["runs"]}
    assert all(abs(first_losses[name] - math.log(2)) < 1e-6 for name in ("DPO", "AdaDPO", "sDPO"))
    stage_2 = report["runs"][-1]["curve"][4]  # after three of six steps the reference is the policy once more
    assert abs(stage_2["loss"] - math.log(2)) < 1e-6 and stage_2["accuracy"] != 0.5
    peaks = {(at["backward"], at["group"]): at["peak_bytes"] for at in report["memory"]}
    assert peaks.keys() == {(backward, group) for backward in ("coupled", "two_pass") for group in (2, 4)}
    assert peaks["coupled", 4] > peaks["two_pass", 4] > 0
    rates = report["tokens_per_second"]
    assert [at["group"] for at in rates] == [2, 4]
    assert all(min(at["whole_sequences"], at["shared_prompt"]) > 0 for at in rates)
    assert report["seconds"] > sum(sum(method["seconds"].values()) for method in report["runs"]) > 0

    picture = (out / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def check_run(run: dict[str, Any], start: dict[str, float]) -> None:
    """Six steps from the shared start, where the policy is the reference and all are ties, in the right direction."""
    first, *rest = run["curve"]
    assert first == {"step": 0, "accuracy": 0.5, "margin": 0.0, "right_logp": start["right_logp"]}
    assert [at["step"] for at in rest] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(at["loss"]) and at["tokens_per_second"] > 0 for at in rest)
    assert rest[-1]["accuracy"] > 0.5 and run["final"]["accuracy"] == rest[-1]["accuracy"]
    assert run["seconds"]["training"] > 0


def test_an_interrupt_keeps_what_there_is(tmp_path: Path) -> None:
    with Script(*DEMO, "--steps", 100000, "--out", tmp_path) as run:
        run.until(lambda: "\nMPO + NLL      0 " in run.stdout.read_text())  # the row before the first step
        time.sleep(0.5)
        run.send_signal(signal.SIGINT)
        assert run.wait(60) == 130, run.stderr.read_text()
        assert "interrupted" in run.stdout.read_text() and "Warning" not in run.stderr.read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    (run_so_far,) = report["runs"]
    assert report["interrupted"] and run_so_far["curve"][0]["accuracy"] == 0.5
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import arithmetic_task

    return arithmetic_task


def test_the_task_is_what_it_says(task: Any) -> None:
    """Labels are true by adding up; a wrong answer is a right answer of another prompt; sides are shuffled."""
    numbers = task.NUMBERS[:40]
    data = task.make_data(numbers, numbers, random.Random(0))
    texts = [
        "".join(task.ALPHABET[i] for i in row) for row in torch.cat([data.input_ids[:, :1], shifted(data)], 1).tolist()
    ]
    for text, positive in zip(texts, data.positive.tolist()):
        prompt, _, answer = text.partition("=")
        assert task.is_right(int(prompt), answer) == positive
        assert sum(map(int, answer.split("+"))) in numbers
    assert data.groups.num_groups == 40 and not data.groups.positives_first()


def shifted(data: Any) -> torch.Tensor:
    """The tokens after the first: from the inputs in the prompt, from the targets in the answer."""
    inputs = torch.cat([data.input_ids[:, 1:], data.targets[:, -1:]], 1)
    return torch.where(data.targets == -100, inputs, data.targets)


def test_answers_are_judged_by_adding_up(task: Any) -> None:
    assert task.is_right(579, "123+456") and task.is_right(579, "190+389")
    for wrong in ("123+457", "123456", "123+", "+579", "12=+345", "1+2+576"):
        assert not task.is_right(579, wrong)


def test_pairs_are_a_right_and_a_wrong_answer_of_one_prompt(task: Any) -> None:
    data = task.make_data(task.NUMBERS[:40], task.NUMBERS[:40], random.Random(1))
    chosen = torch.tensor([7, 0, 31])
    rows = data.pairs(chosen).view(-1, 2)
    assert data.positive[rows].tolist() == [[True, False]] * len(rows)
    assert (rows // task.GROUP == chosen.repeat_interleave(task.GROUP // 2)[:, None]).all()
    for group, right, wrong in zip(chosen, *rows.view(3, -1, 2).unbind(2)):  # no answer twice before all were taken
        P = int(data.positive.view(-1, task.GROUP)[group].sum())
        assert len(set(right.tolist())) == min(P, 4) and len(set(wrong.tolist())) == min(task.GROUP - P, 4)


def test_other_prompts_take_the_answers_as_they_are(task: Any) -> None:
    data = task.make_data(task.NUMBERS[:4], task.NUMBERS[:40], random.Random(2))
    swapped = data.under(task.NUMBERS[50:56])
    assert len(swapped) == 6
    assert torch.equal(swapped.targets[32:], data.targets[:16]) and torch.equal(swapped.positive[:32], data.positive)
    texts = ["".join(task.ALPHABET[i] for i in row) for row in swapped.input_ids[:, :4].tolist()]
    assert texts == [f"{number}=" for number in task.NUMBERS[50:56] for _ in range(task.GROUP)]
