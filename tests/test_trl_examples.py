"""The examples as they are, with a trainer and without: each runs in seconds and learns what it says."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from accelerate.commands.config.config_args import ClusterConfig
from engine_runs import start_ranks

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_group_dpo(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = example("trl_group_dpo").main()
    assert found["eval_rewards/accuracies"] > 0.95 and found["eval_positive_mass"] > 0.9
    printed = capsys.readouterr().out
    assert "80 rows" in printed and "held-out reward accuracy: 1.000" in printed


def test_sdpo(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = example("trl_sdpo").main()
    assert found.keys() == {1, 2}
    for first, last in found.values():
        assert first == pytest.approx(math.log(2), abs=1e-6) and last < 0.1
    assert "stages on disk: ['stage-1', 'stage-2']" in capsys.readouterr().out


def test_adadpo(example: Any) -> None:
    found = example("adadpo").main()
    assert all(logged["eval_rewards/accuracies"] > 0.95 for logged in found.values())
    assert 1 < found["AdaDPO"]["eval_balance_weight"] <= 2
    assert found["AdaDPO"]["change"] > found["DPO"]["change"] + 0.5


def test_plain_pytorch(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    losses = example("plain_pytorch").main()
    assert len(losses) == 60 and max(losses[-8:]) < 0.6 * min(losses[:8])
    assert "step  0: loss 3." in capsys.readouterr().out


def test_the_notebook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells from top to bottom in one namespace, as a kernel runs them. It is kept without outputs."""
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    matplotlib.use("Agg")
    names: dict[str, Any] = {}
    for number, cell in enumerate(code):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert "gradients: (48, 64) (1000, 64)" in printed and "strategy coupled" in printed
    assert names["losses"][-1] < 0.9 * names["losses"][0]
    peaks = {row["strategy"]: row["peaks"] for row in names["plans"]}
    assert peaks["two_pass"][32] < 1.01 * peaks["two_pass"][8] and peaks["coupled_logits"][32] > 2e9
    lines = names["axis"].get_lines()
    assert [line.get_label() for line in lines] == ["coupled_logits", "coupled", "two_pass"]
    names["plt"].close("all")


def test_online_plain(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    means = example("online_plain").main(steps=30)
    assert len(means) == 30 and sum(means[-5:]) / 5 > 0.25 + sum(means[:5]) / 5
    assert "step  0: mean reward 0.365, 4 of 4 groups have two sides" in capsys.readouterr().out


def test_online_plain_takes_a_saved_model(example: Any, tmp_path: Path) -> None:
    task = example("trl_task")
    task.make_model().save_pretrained(tmp_path)
    task.make_tokenizer().save_pretrained(tmp_path)
    assert len(example("online_plain").main(steps=2, name=str(tmp_path))) == 2


def test_the_task_is_what_it_says(example: Any) -> None:
    task = example("trl_task")
    training, held_out = task.make_groups()
    for group in training + held_out:
        odd = int(group["prompt"][:-1]) % 2
        for side, parity in (("positives", odd), ("negatives", 1 - odd)):
            assert 1 <= len(group[side]) <= 3 and all(
                int(digit) % 2 == parity for text in group[side] for digit in text
            )
    assert not {group["prompt"] for group in training} & {group["prompt"] for group in held_out}
    assert task.make_tokenizer()("47:135")["input_ids"] == [task.SYMBOLS.index(symbol) for symbol in "47:135"]


def train_as_rank(rank: int, folder: str) -> None:
    """What torchrun starts on each rank, with what it prints in a file."""
    sys.argv = ["train.py", "--out", folder]
    with open(f"{folder}/printed.{rank}", "w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(EXAMPLES / "distributed" / "train.py"), run_name="__main__")


def test_distributed(tmp_path: Path) -> None:
    """On two processes. Every file for GPUs is one that accelerate reads."""
    start_ranks(train_as_rank, 2, str(tmp_path))
    printed = (tmp_path / "printed.0").read_text()
    assert "2 processes, prompts shared: True, reward accuracy " in printed
    assert float(printed.split()[-1]) > 0.9 and (tmp_path / "model" / "model.safetensors").exists()
    for name in ("ddp", "fsdp2", "zero2", "zero3"):
        config = ClusterConfig.from_yaml_file(str(EXAMPLES / "distributed" / f"{name}.yaml"))
        assert config.num_processes == 8 and config.mixed_precision == "bf16"
