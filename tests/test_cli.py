"""The command line as a whole, and `check`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_cli import SCRIPT, invoke, refused

import groupdpo_kernels
from groupdpo_kernels.cli import selftest
from groupdpo_kernels.cli.app import COMMANDS
from groupdpo_kernels.testing import triton_on_cpu


def test_the_console_script_checks_this_machine() -> None:
    done = subprocess.run([SCRIPT, "check", "--json"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["versions"]["torch"] == torch.__version__ and report["versions"]["python"]
    assert report["versions"]["groupdpo_kernels"] == groupdpo_kernels.__version__
    assert report["devices"][0]["device"] == "cpu" and report["devices"][0]["cores"] >= 1
    assert bool(report["no_gpu"]) == (not torch.cuda.is_available())
    picked = {(row["device"], row["function"]): row for row in report["auto"]}
    head = picked["cpu", "linear_logps"]
    assert head["impl"] == ("cpu" if report["extension"]["built"] else "reference") and "float32" in head["dtypes"]
    assert any("want a GPU" in reason for reason in head["why_not"]["triton"])
    found = {(outcome["impl"], outcome["what"]) for outcome in report["self_test"]}
    for impl in {head["impl"], "reference"}:
        assert {(impl, what) for what in ("values and gradients", "frozen head", "grad_tol")} <= found
    assert (picked["cpu", "preference_loss"]["impl"], "preference_loss") in found | {("reference", "preference_loss")}
    assert all(outcome["passed"] and 0 < outcome["share"] <= 1 for outcome in report["self_test"])
    assert report["passed"] is True


def test_tables_say_what_and_why() -> None:
    result = invoke("check", "--no-test")
    assert result.exit_code == 0
    for words in (f"torch {torch.__version__}", "C++ extension: ", "auto", "linear_logps", "preference_loss"):
        assert words in result.output


@pytest.mark.parametrize("wrong", ["value", "nan", "raises"])
def test_a_wrong_number_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient off by a thousandth, a result that is no number, a kernel that does not run: exit code 1, by name."""
    true = selftest.linear_logps

    def broken(*arguments: Any, **options: Any) -> torch.Tensor:
        if wrong == "raises":
            raise RuntimeError("no such kernel image")
        return true(*arguments, **options) * (1.001 if wrong == "value" else float("nan"))

    monkeypatch.setattr(selftest, "linear_logps", broken)
    monkeypatch.setattr(selftest, "HEAD_CASES", ())
    monkeypatch.setattr(selftest, "TOLERANCES", (1e-4,))
    result = invoke("check", "--json")
    assert result.exit_code == 1
    outcomes = json.loads(result.stdout)["self_test"]
    failed = {outcome["what"] for outcome in outcomes if not outcome["passed"]}
    assert failed == {"frozen head", "grad_tol"}
    details = [outcome["detail"] for outcome in outcomes if outcome["what"] == "frozen head"]
    assert all(("no such kernel image" if wrong == "raises" else "exceeds the budget") in text for text in details)
    shown = invoke("check").output
    assert "FAIL" in shown and "frozen head" in shown


def test_triton_is_compared_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted here; one comparison of each kind, each of which the kernels pass."""
    for name, value in {"HEAD_CASES": ("everything",), "FROZEN_CASES": ("everything",), "TOLERANCES": (0.1,)}.items():
        monkeypatch.setattr(selftest, name, value)
    with triton_on_cpu():
        found = selftest.self_test([torch.device("cpu")])
    kinds = {"values and gradients", "frozen head", "grad_tol", "preference_loss"}
    assert {outcome.what for outcome in found if outcome.impl == "triton"} == kinds
    assert all(outcome.passed for outcome in found), found


def test_help_and_version() -> None:
    shown = invoke("--help").output
    assert all(command.__name__ in shown for command in COMMANDS)
    for command in COMMANDS:
        assert command.__doc__ is not None
        assert command.__doc__.split()[0] in invoke(command.__name__, "--help").output
    assert invoke("--version").output.strip() == groupdpo_kernels.__version__
    assert invoke("chekc").exit_code == 2


def test_without_typer_one_line_says_what_to_install() -> None:
    program = """
import sys
class Hiding:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("typer", "rich"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hiding())
from groupdpo_kernels.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/")
    assert done.returncode == 1
    assert done.stderr.strip() == "groupdpo-kernels needs typer: pip install 'groupdpo-kernels[cli]'"


def test_what_a_command_needs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    hidden = ("transformers", "peft", "matplotlib")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in hidden else found(name, *more))
    assert "logps needs transformers: pip install 'groupdpo-kernels[cli]'" in refused("logps", "m", tmp_path, tmp_path)
    assert "train needs transformers, matplotlib: pip install" in refused("train", "--model", "m")


def test_tracebacks_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUPDPO_KERNELS_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="rows must be a file"):
        invoke("logps", tmp_path, tmp_path / "none.jsonl", tmp_path / "out.jsonl")
