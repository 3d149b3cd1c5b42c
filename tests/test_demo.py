"""The demo in its quick form, as a user runs it, and what it leaves behind."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
DEMO = [sys.executable, str(EXAMPLES / "group_arithmetic.py"), "--quick"]


def test_the_quick_demo_leaves_a_report_and_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "some" / "where"
    run = subprocess.run([*DEMO, "--seed", "3", "--out", str(out)], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    for part in ("held-out accuracy", "tokens/s", "two passes", "own answers to held-out prompts"):
        assert part in run.stdout
    assert "\r" not in run.stdout  # the progress line is for terminals

    report = json.loads((out / "report.json").read_text())
    assert not report["interrupted"] and report["options"]["seed"] == 3
    assert report["environment"]["torch"] == torch.__version__ and report["environment"]["cpus"] == os.cpu_count()
    start, *rest = report["curve"]
    assert start == {"step": 0, "accuracy": 0.5, "margin": 0.0}  # the policy is the reference: all are ties
    assert [at["step"] for at in rest] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(at["loss"]) and at["tokens_per_second"] > 0 for at in rest)
    assert rest[-1]["accuracy"] > 0.5 and report["final"]["accuracy"] == rest[-1]["accuracy"]
    peaks = {(at["backward"], at["group"]): at["peak_bytes"] for at in report["memory"]}
    assert peaks.keys() == {(backward, group) for backward in ("coupled", "two_pass") for group in (2, 4)}
    assert peaks["coupled", 4] > peaks["two_pass", 4] > 0
    assert report["seconds"]["total"] > report["seconds"]["training"] > 0

    picture = (out / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_an_interrupt_keeps_what_there_is(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [*DEMO, "--steps", "100000", "--out", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    for line in run.stdout:
        if line.split()[:1] == ["0"]:  # the row before the first step
            break
    time.sleep(0.5)
    run.send_signal(signal.SIGINT)
    stdout, stderr = run.communicate(timeout=60)
    assert run.returncode == 130, stderr
    assert "interrupted" in stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["interrupted"] and report["curve"][0]["accuracy"] == 0.5
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import group_arithmetic

    return group_arithmetic


def test_the_task_is_what_it_says(demo: Any) -> None:
    """Labels are true by adding up; a wrong answer is a right answer of another prompt; sides are shuffled."""
    numbers = demo.NUMBERS[:40]
    data = demo.make_data(numbers, numbers, random.Random(0))
    texts = [
        "".join(demo.ALPHABET[i] for i in row) for row in torch.cat([data.input_ids[:, :1], shifted(data)], 1).tolist()
    ]
    for text, positive in zip(texts, data.positive.tolist()):
        prompt, _, answer = text.partition("=")
        assert demo.is_right(int(prompt), answer) == positive
        assert sum(map(int, answer.split("+"))) in numbers
    assert data.groups.num_groups == 40 and not data.groups.positives_first()


def shifted(data: Any) -> torch.Tensor:
    """The tokens after the first: from the inputs in the prompt, from the targets in the answer."""
    inputs = torch.cat([data.input_ids[:, 1:], data.targets[:, -1:]], 1)
    return torch.where(data.targets == -100, inputs, data.targets)


def test_answers_are_judged_by_adding_up(demo: Any) -> None:
    assert demo.is_right(579, "123+456") and demo.is_right(579, "190+389")
    for wrong in ("123+457", "123456", "123+", "+579", "12=+345", "1+2+576"):
        assert not demo.is_right(579, wrong)
