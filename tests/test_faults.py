"""A slice of `make faults`, and what that campaign has found: kills, full disks, damaged files, a clock set back."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import fault_jobs
import faults
import pytest
import torch
from fault_jobs import JOBS, Order
from kept_rows import add_row, read_rows
from tiny_cli import PREFERENCES, invoke, refused, save_model, write_rows
from tiny_tokenizers import byte_level_bpe
from tiny_trl import COMMON, GROUPS, PAIRS, llama, trainable

from groupdpo_kernels import Objective, files
from groupdpo_kernels.memory.sweep import Figures, read_figures
from groupdpo_kernels.stepwise import reference_logps
from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer, last_checkpoint
from groupdpo_kernels.trainers.checkpoints import NOTE, why_not_whole

PACKAGE = Path(files.__file__).parent


@pytest.fixture(scope="module")
def inputs() -> None:
    fault_jobs.prepare()


@pytest.fixture(scope="module")
def wholes(inputs: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, faults.Whole]:
    return {
        job: faults.whole(job, tmp_path_factory.mktemp("whole") / "run")
        for job in ("reference cache", "scoring (`logps`)")
    }


# --------------------------------------------------------------------------------------------------- of the campaign


@pytest.mark.parametrize(
    ("job", "kind", "where"),
    [
        ("reference cache", "SIGKILL", "in time"),
        ("reference cache", "SIGXFSZ", "inside a write"),
        ("scoring (`logps`)", "SIGTERM", "at a write"),
    ],
)
def test_a_kill_costs_nothing_that_was_told(job: str, kind: str, where: str, wholes: Any, tmp_path: Path) -> None:
    for attempt in range(5):
        row = faults.kill(job, tmp_path / str(attempt), wholes[job], random.Random(attempt), kind, where)
        if not row.get("late"):
            break
    assert row["code"] and not row["wrong"], row


def test_a_full_disk_and_one_that_cannot_be_written(wholes: Any, tmp_path: Path) -> None:
    job = "reference cache"
    found = faults.full_disk(job, tmp_path / "full", wholes[job], random.Random(1), mount=False)
    assert found == {"wrong": []}
    assert faults.read_only(job, tmp_path / "read", wholes[job], random.Random(2), mount=False) == {"wrong": []}


def test_two_processes_at_once(wholes: Any, tmp_path: Path) -> None:
    job = "reference cache"
    found = faults.at_once(job, tmp_path / "rows", wholes[job], random.Random(0), other="other rows")
    assert found == {"wrong": [], "outcome": "both right"}


def test_a_command_says_that_it_was_stopped(inputs: None, tmp_path: Path) -> None:
    found = faults.Place("scoring (`logps`)", tmp_path / "run").run(Order(signal=signal.SIGINT, write=20))
    assert found.code == 130 and "Traceback" not in found.errors
    assert "stopped; the same command goes on" in found.errors


# --------------------------------------------------------------------------------------------------------- checkpoints


def trainer(out: Path, **options: Any) -> GroupDPOTrainer:
    more = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "optim": "adamw_torch"}
    named: Any = {"train_dataset": PAIRS, "processing_class": byte_level_bpe(), "objective": Objective("simpo")}
    return GroupDPOTrainer(llama(), args=GroupDPOConfig(str(out), **COMMON | more | options), **named)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    out = tmp_path_factory.mktemp("trained")
    run = trainer(out)
    run.train()
    return out, trainable(run)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


CUT: dict[str, Any] = {
    "killed while it was written": lambda folder: (folder / NOTE).unlink(),
    "without the optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "a file cut short": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "a bit flipped": lambda folder: flip(folder / "optimizer.pt"),
    "a note cut short": lambda folder: os.truncate(folder / NOTE, 100),
}


@pytest.mark.parametrize("cut", CUT)
def test_a_checkpoint_counts_when_it_is_whole(cut: str, trained: Any, tmp_path: Path) -> None:
    out = shutil.copytree(trained[0], tmp_path / "out")
    CUT[cut](out / "checkpoint-3")
    with pytest.warns(UserWarning, match="checkpoint-3 is left out"):
        assert last_checkpoint(out) == str(out / "checkpoint-2")
    if cut != "a file cut short":  # one of them stands for all
        return
    again = trainer(out)
    with pytest.raises(ValueError, match=r"must be a whole checkpoint.*checkpoint-3: model\.safetensors must have"):
        again.train(resume_from_checkpoint=str(out / "checkpoint-3"))
    with pytest.warns(UserWarning, match="checkpoint-3 is left out"):
        again.train(resume_from_checkpoint=True)
    assert again.state.log_history[-1]["step"] == 3 and torch.equal(trainable(again), trained[1])
    assert not why_not_whole(out / "checkpoint-3"), "it is written again"


def test_a_folder_without_a_whole_checkpoint(tmp_path: Path) -> None:
    """transformers would take the folder with the largest number, whatever is in it."""
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.warns(UserWarning, match="checkpoint-7 is left out"):
        assert last_checkpoint(tmp_path) is None
    run = trainer(tmp_path)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="has no whole checkpoint; got True"):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"it was cut short: trainer_state\.json is not whole"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


def test_a_clock_that_went_back_costs_no_checkpoint(trained: Any, tmp_path: Path) -> None:
    """transformers keeps the checkpoints with the latest times: here it would delete each new one."""
    out = shutil.copytree(trained[0], tmp_path / "out")
    for path in out.glob("checkpoint-*"):
        os.utime(path, (4e9, 4e9))
    run = trainer(out, max_steps=5, save_total_limit=2)
    run.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    assert run.args.save_total_limit == 2
    kept = torch.load(out / "checkpoint-5" / "training_args.bin", weights_only=False)
    assert kept.save_total_limit == 2


def test_an_old_checkpoint_of_the_same_number_does_not_vouch_for_a_new_one(trained: Any, tmp_path: Path) -> None:
    out = shutil.copytree(trained[0], tmp_path / "out")
    run, seen = trainer(out, max_steps=1), []

    def save_model(folder: str, **named: Any) -> None:
        seen.append(Path(folder).exists())
        Path(folder).mkdir()

    run.save_model = save_model  # type: ignore[method-assign,assignment]
    run.train()
    assert seen == [False]


def test_a_checkpoint_on_a_full_disk_says_where(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says "unexpected pos" and no name. What is half there must not stay, and the last one must."""
    out = shutil.copytree(trained[0], tmp_path / "out")
    shutil.rmtree(out / "checkpoint-3")
    run = trainer(out)
    monkeypatch.setattr(torch, "save", _as_on_a_full_disk)
    with pytest.raises(OSError, match=r"checkpoint .*checkpoint-3 cannot be written, with \d+ MiB free there: "):
        run.train(resume_from_checkpoint=True)
    assert not (out / "checkpoint-3").exists() and last_checkpoint(out) == str(out / "checkpoint-2")


def _as_on_a_full_disk(*arguments: Any, **named: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


# -------------------------------------------------------------------------------------------- rows that were computed


@pytest.fixture
def scored(tmp_path: Path) -> tuple[Any, ...]:
    model = save_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", PREFERENCES)
    command = "logps", model, rows, tmp_path / "out.jsonl"
    assert invoke(*command).exit_code == 0
    return command


def test_a_changed_line_of_scores_is_not_used(scored: Any) -> None:
    out = scored[3]
    content = out.read_bytes()
    at = re.search(rb'"logp": -\d', content).end() - 1  # type: ignore[union-attr]
    out.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert "must have the lines of the earlier run; they were changed" in refused(*scored)
    out.write_bytes(content)
    assert "there already" in invoke(*scored).stderr


def test_a_changed_count_in_the_state_is_not_used(scored: Any) -> None:
    state = scored[3].with_name("out.jsonl.state.json")
    known = json.loads(state.read_text())
    state.write_text(json.dumps(known | {"responses": known["responses"] - 1}))
    assert "must be the state of a run; it is not" in refused(*scored)
    for content in (b"[]", b"\xff\xfe", b""):
        state.write_bytes(content)
        assert "must be the state of a run; it is not" in refused(*scored)


def test_a_lock_is_of_the_file_that_has_the_name_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the opening of OUT.part here and its lock, the process that wrote it has renamed it to OUT: the lock
    would be of OUT, which would then be emptied."""
    part, out = tmp_path / "out.part", tmp_path / "out"
    part.write_text("whole")
    lock, calls = files._lock, []

    def renamed_before(descriptor: int, what: Path) -> None:
        if not calls:
            part.rename(out)
        calls.append(descriptor)
        lock(descriptor, what)

    monkeypatch.setattr(files, "_lock", renamed_before)
    with files.locked(part, part) as file:
        file.truncate(0)
        with pytest.raises(ValueError, match="is being written by another process"):
            files.locked(part, part)
    assert out.read_text() == "whole" and part.read_text() == "" and len(calls) == 3


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    busy = pytest.raises(ValueError, match="is being written by another process")
    with files.locked_folder(tmp_path), busy, files.locked_folder(tmp_path):
        pass
    with files.locked_folder(tmp_path):
        pass


HEADER = {"device": "a machine", "versions": {"torch": "2"}}
ROW = {"kind": "memory", "workload": {"group": 2}, "status": "ok", "peak_bytes": 12345}


def test_figures_survive_a_kill_and_show_a_change(tmp_path: Path) -> None:
    path = tmp_path / "measured.jsonl"
    path.touch()  # a kill between the making of the file and its first line
    figures = Figures(path, HEADER, resume=False)
    figures.add(ROW)
    with pytest.raises(ValueError, match="is being written by another process"):
        Figures(path, HEADER, resume=True)
    figures.close()
    with path.open("a") as file:
        file.write('{"kind": "mem')
    figures = Figures(path, HEADER, resume=True)
    figures.add(ROW)
    figures.close()
    assert read_figures(path) == (HEADER, [ROW, ROW])
    path.write_text(path.read_text().replace("12345", "12344", 1))
    with pytest.raises(ValueError, match="line 2 is damaged: its checksum does not fit"):
        read_figures(path)
    with pytest.raises(ValueError, match="resume must be True"):
        Figures(path, HEADER, resume=False)


def test_rows_of_a_long_job_survive_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    add_row(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": ')
    assert read_rows(path) == [{"a": 1}]
    add_row(path, {"a": 2})
    assert read_rows(path) == [{"a": 1}, {"a": 2}]


# ------------------------------------------------------------------------------------------------ errors, and the clock


def test_an_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"), files.replacing(path):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="as it was"), files.replacing(path):
        raise OSError("as it was")
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_cannot_be_written_is_found_before_rows_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(path: Path, *arguments: Any, **named: Any) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(OSError, match=r"no file can be written here: Read-only file system: '.*ref-"):
        reference_logps(llama(), [{}], tmp_path, score=lambda *_: pytest.fail("it scores"), count=lambda row: 1)


def test_nothing_depends_on_the_time_of_day() -> None:
    """A machine's clock may go back. Times are noted, and nothing is decided by them."""
    found = {
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"st_[mca]time|getmtime|getctime|time\.time\(|datetime\.now|\.today\(", line)
    }
    assert {line.partition(":")[0] for line in found} == {"memory/machine.py"}, found


def test_every_job_of_the_campaign_is_killed() -> None:
    assert {*faults.SHARES} == {*JOBS} - {"other rows"}
    planned = [*faults.plan(200, 0)]
    assert abs(len(planned) - 200) < 5 and {kind for _, _, kind, _ in planned} == {*faults.SIGNALS, "SIGXFSZ"}
    assert planned == [*faults.plan(200, 0)]
    warnings.simplefilter("ignore")
    assert GROUPS and "begin: make faults" in faults.PAGE.read_text()
