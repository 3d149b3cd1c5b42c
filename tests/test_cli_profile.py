"""`profile`, `plan` and `report` as commands: files and tables of a real run, and what they refuse before it begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_cli import invoke, lines, refused


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with one measured point, and what was printed."""
    out = tmp_path_factory.mktemp("profile")
    small = ("--groups", "2", "--tokens", "16", "--layers", "1", "--strategies", "two_pass", "--kinds", "memory")
    return out, invoke("profile", *small, "--settings", "full", "--device", "cpu", "--out", out).stdout


def test_profile(profiled: tuple[Path, str]) -> None:
    out, said = profiled
    header, row = lines(out / "measured.jsonl")
    assert row["status"] == "ok" and row["workload"]["group"] == 2 and row["peak_bytes"] > 2**20
    assert "G = 2" in said and "two_pass" in said and str(out / "report.html") in said
    assert header["command"].startswith("groupdpo-kernels") and (out / "memory.png").exists()


def test_report_draws_again(profiled: tuple[Path, str], tmp_path: Path) -> None:
    found = invoke("report", profiled[0] / "measured.jsonl", "--out", tmp_path).stdout
    assert found.strip() == str(tmp_path / "report.html") and (tmp_path / "memory.png").stat().st_size > 1000


def test_profile_goes_on_only_when_told(profiled: tuple[Path, str]) -> None:
    assert "resume must be True" in refused("profile", "--out", profiled[0], "--device", "cpu")


def test_plan() -> None:
    asked = ("--model", "tiny", "--groups", "2,8", "--memory", "0.5", "--dtype", "float32", "--tokens", "512")
    (row,) = json.loads(invoke("plan", *asked, "--strategies", "coupled_logits", "--json").stdout)
    assert row["strategy"] == "coupled_logits" and row["peaks"]["8"] > 0.5e9 > row["peaks"]["2"]
    assert 2 <= row["largest_group"] < 8 and row["limit"]["category"] == "logits"
    said = invoke("plan", *asked, "--strategies", "coupled_logits").stdout
    assert f"({row['peaks']['8'] / 2**30:.1f})" in said and "full fine-tuning, checkpointing" in said


def test_plan_of_a_shared_prompt() -> None:
    asked = ("--groups", "2,8", "--tokens", "96", "--prompt", "64", "--share-prompt", "--strategies", "coupled")
    said = invoke("plan", *asked, "--device", "cpu").stdout
    assert "full fine-tuning, checkpointing, prompt of 64 shared, 96 tokens a response" in said
    assert "a forward computes: 127 instead of 192 at G = 2 (0.66), 319 instead of 768 at G = 8 (0.42)" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("profile", "--groups", "3"), "group must be even"),
        (("profile", "--groups", "2;4"), "groups must be whole numbers with commas between; got '2;4'"),
        (("profile", "--settings", "full,half"), "settings must be of full, checkpointing, lora; got 'half'"),
        (("profile", "--kinds", "speed"), "kinds must be memory or time; got 'speed'"),
        (("profile", "--settings", "full", "--strategies", "one_pass"), "workloads must hold at least one; got none"),
        (("plan", "--memory", "0"), "memory must be positive and finite; got 0.0"),
        (("plan", "--memory", "1e300"), "memory must be positive and finite; got 1e+300"),
        (("plan", "--strategies", "magic"), "strategy must be one of"),
        (("plan", "--share-prompt"), "prompt must be at least 2 with share_prompt"),
        (("plan", "--prompt", "9", "--share-prompt", "--strategies", "pairs"), "strategy must be one of coupled,"),
        (("profile", "--prompt", "256"), "prompt must be less than tokens, which has a response too; got 256 of 256"),
        (("plan", "--ranks", "0"), "ranks must be an int of at least 1; got 0"),
        (("report", "none.jsonl"), "figures must be a file of profile or of bench/run.py; got none.jsonl"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    more = ("--out", tmp_path / "out") if arguments[0] == "profile" else ()
    assert message in refused(*arguments, *more)
    assert not (tmp_path / "out").exists()
