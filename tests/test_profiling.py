"""Steps that are measured: rows as they come, what runs out of memory, what an interruption leaves, and the report."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Script
from tiny_cli import SCRIPT

from groupdpo_kernels.memory.report import curves, write_report
from groupdpo_kernels.memory.sweep import Worker, profile, read_figures, table
from groupdpo_kernels.memory.worker import measure_time, out_of_memory
from groupdpo_kernels.memory.workload import Workload, sweep

SMALL = Workload(layers=1, tokens=64, micro_batch=1)
MiB = 2**20


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups under a limit that the larger one, with its logits, does not fit in."""
    path = tmp_path_factory.mktemp("profile") / "measured.jsonl"
    loads = sweep(SMALL, [2, 16], ["coupled_logits", "two_pass"])
    profile(loads, path, device="cpu", limit=250 * MiB, seconds=0.1, rounds=3, command="as tested", progress=False)
    return path


def test_a_point_out_of_memory_is_a_row_and_the_run_goes_on(measured: Path) -> None:
    header, rows = read_figures(measured)
    assert header["command"] == "as tested" and header["versions"]["torch"]
    status = {(r["kind"], r["workload"]["strategy"], r["workload"]["group"]): r["status"] for r in rows}
    assert status.pop(("memory", "coupled_logits", 16)) == "out_of_memory"
    assert status.pop(("time", "coupled_logits", 16)) == "out_of_memory"
    assert len(status) == 6 and set(status.values()) == {"ok"}, rows
    (lost,) = (r for r in rows if r["kind"] == "memory" and r["status"] != "ok")
    assert "memory" in lost["why"] or "new_empty" in lost["why"]


def test_figures_are_those_of_a_step(measured: Path) -> None:
    rows = [r for r in read_figures(measured)[1] if r["status"] == "ok"]
    parameters = sum(p.numel() for p in _model().parameters()) * 4
    for row in (r for r in rows if r["kind"] == "memory"):
        parts = row["breakdown"]
        assert sum(parts.values()) == row["peak_bytes"] and parts["not tracked"] > -MiB
        assert parts["optimizer"] == pytest.approx(2 * parameters, rel=1e-3)
        assert parts["parameters"] == pytest.approx(parameters, rel=1e-3)
        assert row["workload"]["strategy"] == "coupled_logits" or parts["logits"] == 0
    two_pass = [r["peak_bytes"] for r in rows if r["kind"] == "memory" and r["workload"]["strategy"] == "two_pass"]
    assert len(two_pass) == 2 and two_pass[1] <= 1.02 * two_pass[0]
    for row in (r for r in rows if r["kind"] == "time"):
        assert row["seconds"]["rounds"] >= 3 and row["seconds"]["median"] > 0


def _model() -> torch.nn.Module:
    from groupdpo_kernels.memory.workload import build_model

    return build_model(SMALL, torch.device("meta"))


def test_resume_measures_what_is_missing(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows stay, a line that was cut off and a failure are measured again, and nothing else is."""
    lines = measured.read_text().splitlines()
    failed = json.loads(lines[1]) | {"status": "failed", "why": "for the test"}
    del failed["checksum"]  # of the line as it was
    path = tmp_path / "measured.jsonl"
    path.write_text("\n".join([lines[0], json.dumps(failed), *lines[3:-1], lines[-1][: len(lines[-1]) // 2]]))
    asked: list[str] = []

    def ask(self: Worker, request: dict[str, Any]) -> list[dict[str, Any]]:
        asked.append(request["kind"])
        return [{"status": "ok"} for _ in request["workloads"]]

    monkeypatch.setattr(Worker, "ask", ask)
    loads = sweep(SMALL, [2, 16], ["coupled_logits", "two_pass"])
    limit: dict[str, Any] = {"device": "cpu", "limit": 250 * MiB, "progress": False}
    rows = profile(loads, path, resume=True, **limit)
    assert asked == ["memory", "memory", "time"]  # the failure, the row that was lost, the line that was cut off
    assert read_figures(path)[1] == rows
    asked.clear()
    assert profile(loads, path, resume=True, **limit) == rows and not asked


def test_interruption_keeps_what_was_measured(tmp_path: Path) -> None:
    sizes = ",".join(map(str, range(2, 60, 2)))
    options = ("--layers", 1, "--tokens", 16, "--groups", sizes, "--kinds", "memory", "--settings", "full")
    path = tmp_path / "measured.jsonl"
    with Script(SCRIPT, "profile", "--out", tmp_path, "--device", "cpu", *options) as running:
        running.until(lambda: path.exists() and len(path.read_text().splitlines()) > 1)  # the first figures are there
        running.send_signal(signal.SIGINT)
        assert running.wait() == 130
        output, errors = running.stdout.read_text(), running.stderr.read_text()
    assert "--resume goes on" in errors, errors
    assert read_figures(path)[1][0]["status"] == "ok" and "MiB" in output
    assert (tmp_path / "report.html").exists()


def test_report_is_one_file_and_pictures(measured: Path, tmp_path: Path) -> None:
    page = write_report(measured, tmp_path)
    text = page.read_text()
    assert not re.search(r"(src|href|srcset)=\"(?!data:)", text)
    assert text.count("prefers-color-scheme: dark") == 4  # three pictures and the page
    assert "out of memory" in text and "as tested" in text
    for name in ("memory", "time", "breakdown"):
        for suffix in ("", "-dark"):
            assert (tmp_path / f"{name}{suffix}.png").read_bytes().startswith(b"\x89PNG")
    points = curves(read_figures(measured)[1], "memory")["full fine-tuning"]
    assert points["coupled_logits"][16] is None and points["two_pass"][16]
    assert "out of memory" in table(read_figures(measured)[1])


def test_roofline_of_the_benchmark(tmp_path: Path) -> None:
    row = {"shape": "tiny", "T": 64, "D": 64, "V": 1000, "dtype": "float32", "mode": "trained", "products": 4}
    done = {"status": "ok", "both_ms": {"median": 2.0}, "ratio": {"median": 1.5}}
    names = ("matrix products", "ours/cpu", "eager")
    rows = [row | done | {"implementation": name} for name in names]
    rows.append(row | {"implementation": "a peer", "status": "unavailable", "why": "not installed"})
    head = {"device": "a machine", "versions": {"torch": "2"}, "date": "now", "command": "bench/run.py"}
    (tmp_path / "bench.json").write_text(json.dumps(head | {"rows": rows}))
    page = write_report(tmp_path / "bench.json", tmp_path)
    assert "unavailable" in page.read_text() and (tmp_path / "roofline.png").exists()


def test_a_shared_prompt_is_a_setting_of_its_own(measured: Path) -> None:
    """In tables and curves; its sweep leaves out strategies that cannot share, and its steps are timed."""
    rows = read_figures(measured)[1]
    shared = [row | {"workload": row["workload"] | {"prompt": 32, "share_prompt": True}} for row in rows]
    shared = [row for row in shared if row["workload"]["strategy"] == "two_pass"]
    assert "**full fine-tuning, prompt of 32 shared**" in table([*rows, *shared])
    assert list(curves([*rows, *shared], "time")) == ["full fine-tuning", "full fine-tuning, prompt of 32 shared"]
    base = replace(SMALL, tokens=8, prompt=4, share_prompt=True)
    loads = sweep(base, [2])
    assert [load.strategy for load in loads] == ["coupled", "two_pass"]
    assert [load.strategy for load in sweep(replace(base, lora_rank=1), [2])] == ["coupled", "two_pass", "one_pass"]
    timed = measure_time(loads, torch.device("cpu"), seconds=0, rounds=3)
    assert [row["status"] for row in timed] == ["ok", "ok"] and timed[1]["ratio"]["median"] > 0


def test_times_are_interleaved_and_a_failure_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = [replace(SMALL, tokens=8, group=2, strategy=name) for name in ("coupled", "two_pass")]
    rows = measure_time(loads, torch.device("cpu"), seconds=0, rounds=5)
    assert [row["seconds"]["rounds"] for row in rows] == [3, 3] and rows[0]["ratio"]["median"] == 1.0

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("groupdpo_kernels.memory.workload.group_backward", broken)
    rows = measure_time(loads, torch.device("cpu"), seconds=0, rounds=3)
    assert [row["status"] for row in rows] == ["ok", "out_of_memory"]


def test_what_counts_as_out_of_memory() -> None:
    assert out_of_memory(MemoryError()) and out_of_memory(RuntimeError("std::bad_alloc"))
    assert not out_of_memory(RuntimeError("shapes differ")) and not out_of_memory(ValueError("out of memory"))


def test_bad_input(measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loads = [SMALL]
    for arguments, message in (
        ({"workloads": []}, "workloads must hold at least one"),
        ({"kinds": ["speed"]}, "kinds must be memory or time; got 'speed'"),
        ({"limit": 0}, "limit must be at least 1 byte; got 0"),
        ({"rounds": 1}, "rounds must be at least 3; got 1"),
        ({"device": "meta"}, "device must be cpu"),
        ({"out": measured}, "out must not hold figures yet"),
    ):
        with pytest.raises(ValueError, match=message):
            profile(**({"workloads": loads, "out": tmp_path / "x.jsonl", "progress": False} | arguments))
    assert not (tmp_path / "x.jsonl").exists()
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(read_figures(measured)[0] | {"device": "another machine"}) + "\n")
    with pytest.raises(ValueError, match="resume must go on where it began"):
        profile(loads, other, resume=True, progress=False, device="cpu")
    other.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="figures must be a file that profile has written"):
        profile(loads, other, resume=True, progress=False, device="cpu")
    with pytest.raises(ValueError, match="figures must be a file"):
        write_report(tmp_path / "none.jsonl", tmp_path)
