"""What a kill, a full disk, a damaged cache or a second process does to a run, and docs/project/faults.md. It is what
`make faults` runs.

Each job of tests/fault_jobs.py runs to its end once. Then it is killed again and again, at random moments of that
run's time, at its writes and in the middle of them, and runs on: what it had told its user must be there, what a reader
takes for whole must be what the first run had, and the end must be the same bits. Between a kill and the next run the
times of all its files are set at random, so that nothing can depend on the clock.
Each result is written when it is there (a line of JSON in build/faults/, in a file that is named by the seed and by
the code that is tested), so that a campaign that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pages
import torch
from fault_jobs import JOBS, Order, begin, prepare
from kept_rows import add_row, read_rows
from processes import CONTEXT, PRELOAD
from transformers import LlamaForCausalLM

from groupdpo_kernels.stepwise import store

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "project" / "faults.md"
WORK = ROOT / "build" / "faults"
# Runs are in memory where they can be: what a kill leaves is the same there, and a busy disk costs seconds a file.
PLACES = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else WORK) / f"faults-{os.getpid()}"
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
# How often each job is killed, of 200 kills.
SHARES = {
    "reference cache": 44,
    "scoring (`logps`)": 40,
    "profile": 8,
    "checkpoints": 24,
    "GroupDPOTrainer": 16,
    "DPOTrainer": 16,
    "OnlineGroupDPOTrainer": 16,
    "StepwiseDPO": 24,
    "`train`": 12,
}
PATIENCE = 10  # seconds that a process may take to end after SIGTERM or SIGINT, or the time of a whole run


@dataclass
class Ended:
    """A process that has ended: its exit status, what it said, what it wrote to stderr, how often it wrote."""

    code: int
    said: list[str]
    errors: str
    writes: int
    result: Any
    seconds: float


class Place:
    """A folder for runs of a job: `work` for its files, `notes` for those of the watch."""

    def __init__(self, job: str, base: Path) -> None:
        self.job, self.base, self.runs = job, base, 0
        self.work = base / "work"
        self.work.mkdir(parents=True)

    def start(self, order: Any) -> tuple[Any, Path]:
        self.runs += 1
        notes = self.base / f"notes-{self.runs}"
        notes.mkdir()
        notes.chmod(0o777)
        process = CONTEXT.Process(target=begin, args=(self.job, str(self.work), str(notes), order))
        process.start()
        while process.exitcode is None and not (notes / "began").exists():
            time.sleep(0.002)
        return process, notes

    def run(self, order: Any = None, after: float | None = None, number: int = 0) -> Ended:
        """One run. With `after`, the signal is sent so many seconds after its beginning."""
        process, notes = self.start(order or Order())
        sent = time.monotonic()
        if after is not None:
            process.join(after)
            sent = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                if process.exitcode is None:
                    os.kill(process.pid, number)
        process.join(300)
        if order is not None and order.write and (noted := (notes / "writes").read_bytes()):
            sent = float(noted)  # when this process sent itself the signal
        seconds = time.monotonic() - sent
        if process.exitcode is None:
            process.kill()
            process.join()
            return Ended(-99, [], "it did not end", 0, None, seconds)
        return ended(process, notes, seconds)


def ended(process: Any, notes: Path, seconds: float) -> Ended:
    found = notes / "result"
    result = json.loads(store.read(found)["result"]) if found.exists() else None
    said = (notes / "said").read_text().split("\n")[:-1] if (notes / "said").exists() else []
    writes = int(float((notes / "writes").read_bytes() or 0)) if (notes / "writes").exists() else 0
    errors = (notes / "stderr").read_text() if (notes / "stderr").exists() else ""
    return Ended(process.exitcode, said, errors, writes, result, seconds)


@dataclass
class Whole:
    """The run that nothing befell."""

    result: Any
    kept: dict[str, str]
    seconds: float
    writes: int
    largest: int
    size: int
    said: list[str] = field(default_factory=list)


def whole(job: str, base: Path) -> Whole:
    shutil.rmtree(base, ignore_errors=True)
    place = Place(job, base)
    found = place.run()
    if found.code:
        raise RuntimeError(f"{job} fails by itself: {found.errors}")
    if CONTEXT.get_start_method() == "fork":
        for name in store.read(base / "notes-1" / "result")["modules"]:
            with contextlib.suppress(ImportError, RuntimeError):
                importlib.import_module(name)  # so that the next runs need not
    sizes = [path.stat().st_size for path in place.work.rglob("*") if path.is_file()]
    kept = JOBS[job].kept(place.work)
    return Whole(found.result, kept, found.seconds, found.writes, max(sizes), sum(sizes), found.said)


def scramble_times(folder: Path, rng: random.Random) -> None:
    """The clock of a machine may go back: every file gets a time of its own within twenty years."""
    for path in folder.rglob("*"):
        when = time.time() + rng.uniform(-10, 10) * 365 * 86400
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, (when, when))


# --------------------------------------------------------------------------------------------------------------- kills


def kill(job: str, base: Path, first: Whole, rng: random.Random, kind: str, where: str) -> dict[str, Any]:
    """One kill and the run after it; a row of the table."""
    place, number = Place(job, base), SIGNALS.get(kind, 0)
    if where == "inside a write":
        hit = place.run(Order(limit=rng.randint(1, first.largest - 1)))
    elif where == "at a write":
        hit = place.run(Order(signal=number, write=rng.randint(1, first.writes)))
    else:
        hit = place.run(after=rng.uniform(0, first.seconds), number=number)
    row: dict[str, Any] = {"job": job, "signal": kind, "where": where, "code": hit.code}
    row["seconds"] = round(hit.seconds, 1)
    if hit.code == 0:
        return row | {"late": True}
    wrong = [*_after_kill(JOBS[job], place, first, hit, kind)]
    row["stage"] = len(JOBS[job].kept(place.work)) + 1 if job == "StepwiseDPO" else 0
    scramble_times(place.work, rng)
    again = place.run()
    wrong += _after_resume(JOBS[job], place, first, hit, again)
    return row | {"wrong": wrong}


def _after_kill(job: Any, place: Place, first: Whole, hit: Ended, kind: str) -> Iterator[str]:
    asked = {"SIGTERM": (-15, 143, 1), "SIGINT": (130, 1, -2), "SIGXFSZ": (-25,)}.get(kind, (-9,))
    if hit.code not in asked:
        yield f"it ended with {hit.code}: {hit.errors[-600:]}"
    if kind in ("SIGTERM", "SIGINT"):
        if hit.seconds > max(PATIENCE, first.seconds):
            yield f"it took {hit.seconds:.0f} s to end"
        # Before anything is told the command may not have begun, and after everything it may have ended.
        silent = "Traceback" in hit.errors or not re.search("stopped|interrupted", hit.errors)
        if job.command and hit.said not in ([], first.said) and silent:
            yield f"it does not say that it was stopped: {hit.errors[-600:]}"
    try:
        kept = job.kept(place.work)
    except Exception as error:  # whatever a reader raises of what a kill has left
        yield f"what is left cannot be read: {error!r}"
        return
    for name in [name for name in hit.said[-1 if job.last else 0 :] if name not in kept]:
        yield f"{name} was told, and is lost"
    if job.repeats:
        for name in [name for name in kept if first.kept.get(name, kept[name]) != kept[name]]:
            yield f"{name} is taken for whole, and is not"


def _after_resume(job: Any, place: Place, first: Whole, hit: Ended, again: Ended) -> Iterator[str]:
    if again.code:
        yield f"the next run fails: {again.errors[-900:]}"
        return
    if again.result != first.result:
        yield "the next run ends otherwise"
    for name in sorted({*again.said} & {*(hit.said[-1:] if job.last else hit.said)}):
        yield f"{name} was done again"
    if left := [path.name for path in place.work.rglob("*.tmp")]:
        yield f"temporary files are left: {left[:3]}"


def plan(kills: int, seed: int) -> Iterator[tuple[str, int, str, str]]:
    """(job, its number, signal, where): three signals in turn, half of them at writes, one in eight inside one."""
    total, rng = sum(SHARES.values()), random.Random(seed)
    for job, share in SHARES.items():
        for k in range(max(1, round(kills * share / total))):
            if k % 8 == 7 and JOBS[job].limits:
                yield job, k, "SIGXFSZ", "inside a write"
            else:
                kind = ("SIGKILL", "SIGTERM", "SIGKILL", "SIGINT")[k % 4]
                yield job, k, kind, rng.choice(("in time", "at a write"))


# -------------------------------------------------------------------------------------------------- disks and processes


def can_mount() -> bool:
    """Whether this process may mount a small disk. If not, a limit on the size of files stands in for a full one."""
    with mounted(PLACES / "probe", 64) as there:
        return there


@contextlib.contextmanager
def mounted(folder: Path, kib: int) -> Iterator[bool]:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
    there = os.geteuid() == 0 and not subprocess.run(command, capture_output=True).returncode
    try:
        yield there
    finally:
        if there:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def full_disk(job: str, base: Path, first: Whole, rng: random.Random, mount: bool) -> dict[str, Any]:
    """A disk, or the largest file, of less than the run needs; then there is room again."""
    place = Place(job, base)
    with mounted(place.work, 2**20) if mount else contextlib.nullcontext(False):
        if mount:
            remount(place.work, f"size={max(4, int(rng.uniform(0.1, 0.9) * first.size / 1024))}k")
            hit = place.run()
        else:
            hit = place.run(Order(limit=rng.randint(1, first.largest - 1), deadly=False))
        if hit.code == 0:
            return {"late": True}
        wrong = [] if hit.code in (1, 2) else [f"it ended with {hit.code}"]
        said = hit.errors[-1500:]
        if str(place.work) not in said or not re.search("No space left|File too large|cannot be written", said):
            wrong.append(f"the error does not say which file, or why: {said}")
        if mount:
            remount(place.work, f"size={2**20}k")
        kept = JOBS[job].kept(place.work)
        wrong += [f"{name} was told, and is lost" for name in hit.said[-JOBS[job].last :] if name not in kept]
        return {"wrong": [*wrong, *_after_resume(JOBS[job], place, first, hit, place.run())]}


def read_only(job: str, base: Path, first: Whole, rng: random.Random, mount: bool) -> dict[str, Any]:
    """A folder that cannot be written, from the start or from the middle of a run on: by its disk, or by its mode."""
    place, order = Place(job, base), Order(told=True, rights=mount)
    with mounted(place.work, 2**20) if mount else contextlib.nullcontext(False):
        if begun := rng.random() < 0.5:
            place.run(Order(signal=signal.SIGKILL, write=rng.randint(1, first.writes)))
        if mount:
            remount(place.work, "ro")
        else:
            for path in (place.work, *place.work.rglob("*")):
                path.chmod(0o555 if path.is_dir() else 0o444)
        hit = place.run(order)
        wrong = [] if hit.code in (1, 2) or (begun and hit.result == first.result) else [f"it ended with {hit.code}"]
        if hit.code and "computing" in hit.said:
            wrong.append("it computes before it finds out")
        if hit.code and (str(place.work) not in hit.errors or not re.search("Read-only|Permission", hit.errors)):
            wrong.append(f"the error does not say which file, or why: {hit.errors[-900:]}")
        return {"wrong": wrong}


def at_once(job: str, base: Path, first: Whole, rng: random.Random, other: str = "") -> dict[str, Any]:
    """Two processes in one folder, the second a little later; then one more."""
    place = Place(job, base)
    one = place.start(Order())
    time.sleep(rng.uniform(0, 0.8) * first.seconds)
    place.job = other or job
    two = place.start(Order())
    place.job = job
    wrong, refused, began = [], 0, time.monotonic()
    for process, notes in (one, two):
        process.join(300)
        found = ended(process, notes, time.monotonic() - began)
        if found.code == 2 and "is being written by another process" in found.errors:
            refused += 1
        elif found.code or (found.result != first.result and not (other and process is two[0])):
            wrong.append(f"it ended with {found.code}: {found.errors[-900:]}")
    if refused == 2:
        wrong.append("each of two processes refused for the other")
    again = place.run()
    if again.code or again.result != first.result or [word for word in again.said if word in first.said]:
        wrong.append(f"the cache is not whole afterwards: {again.code} {again.said} {again.errors[-600:]}")
    return {"wrong": wrong, "outcome": "one refused" if refused else "both right"}


# -------------------------------------------------------------------------------------------------------------- damage


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def flip_header(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(min(len(content), 64))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def folder_instead(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def next_version(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content.replace(b"groupdpo_kernels 1", b"groupdpo_kernels 2", 1).replace(b": 0", b": 9", 1)[::1])


DAMAGE: dict[str, Callable[[Path, random.Random], Any]] = {
    "a bit flipped": flip,
    "a bit flipped near the beginning": flip_header,
    "truncated": lambda path, rng: os.truncate(path, rng.randrange(path.stat().st_size)),
    "a byte short": lambda path, rng: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path, rng: os.truncate(path, 0),
    "of another program": lambda path, rng: path.write_bytes(b"\x89PNG\r\n\x1a\n" + rng.randbytes(200)),
    "of another version": next_version,
    "gone": lambda path, rng: path.unlink(),
    "a folder": folder_instead,
}


def damaged(job: str, base: Path, first: Whole, rng: random.Random, damage: str) -> dict[str, Any]:
    """A file of a run that was cut short, or is over but for what its end writes, is no longer what it was."""
    place = Place(job, base)
    if rng.random() < 0.5:
        place.run(Order(signal=signal.SIGKILL, write=rng.randint(first.writes // 2, first.writes)))
    else:
        place.run()
        for path in (place.work / "run").glob("report.json"):
            path.unlink()  # or the command would only read it
    files = sorted(path for path in place.work.rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(files)
    DAMAGE[damage](path, rng)
    hit, what = place.run(), path.relative_to(place.work)
    if hit.code == 0 and hit.result == first.result:
        return {"wrong": [], "outcome": "the same bits", "file": str(what)}
    wrong = []
    if hit.code == 0:
        wrong.append(f"{what}, {damage}, is used in silence: {hit.errors[-600:]}")
    elif str(place.work) not in hit.errors or (JOBS[job].command and "Traceback" in hit.errors):
        wrong.append(f"{what}, {damage}, is not refused in words: {hit.errors[-900:]}")
    return {"wrong": wrong, "outcome": "refused", "file": str(what)}


# -------------------------------------------------------------------------------------------------- campaign and report


class Results:
    """The rows of a campaign, by their keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        self.read()

    def read(self) -> None:
        """Reads what is there by now: another campaign may do other parts, by --only."""
        self.rows = {row["key"]: row for row in read_rows(self.path)}

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = {"key": key, "date": datetime.date.today().isoformat(), **row}
        add_row(self.path, self.rows[key])
        print(key, json.dumps(row), flush=True)


def others(rounds: int) -> Iterator[tuple[str, str, str, Callable[..., dict[str, Any]]]]:
    """(key, job, fault, what to do) of all faults but kills."""
    mount = can_mount()
    jobs, caches = [*SHARES], [job for job in SHARES if job not in ("profile", "GroupDPOTrainer", "DPOTrainer")]
    for k in range(rounds):
        for job in jobs:
            if mount:
                yield f"full {job} {k}", job, "a full disk", lambda *a: full_disk(*a, mount=True)
                yield f"ro {job} {k}", job, "a disk that cannot be written", lambda *a: read_only(*a, mount=True)
            if job != "profile":  # its measuring process would have the limit, too
                yield f"limit {job} {k}", job, "a limit on the size of files", lambda *a: full_disk(*a, mount=False)
            yield f"mode {job} {k}", job, "a folder without the right to write", lambda *a: read_only(*a, mount=False)
        for job in ("reference cache", "StepwiseDPO", "scoring (`logps`)", "profile", "`train`"):
            yield f"both {job} {k}", job, "two processes at once", at_once
        rows = "two processes at once, of other rows"
        yield f"rows {k}", "reference cache", rows, lambda *a: at_once(*a, other="other rows")
        for job in [*caches, "profile"]:
            for damage in DAMAGE:
                yield f"damage {job} {damage} {k}", job, damage, lambda *a, d=damage: damaged(*a, damage=d)  # type: ignore[misc]


def campaign(results: Results, kills: int, rounds: int, seed: int, only: str) -> None:
    """What is not there yet of `kills` kills and `rounds` rounds of all else, a job after the other."""
    wholes: dict[str, Whole] = {}
    steps: list[tuple[str, str, dict[str, Any], Callable[..., dict[str, Any]]]] = []
    for job, k, kind, where in plan(kills, seed):
        steps.append((f"kill {job} {k}", job, {}, lambda *a, o=(kind, where): kill(*a, *o)))  # type: ignore[misc]
    steps += [(key, job, {"job": job, "fault": fault}, do) for key, job, fault, do in others(rounds)]
    for key, job, row, do in sorted(steps, key=lambda step: [*SHARES].index(step[1])):
        results.read()
        if key in results.rows or not re.search(only, key):
            continue
        if job not in wholes:
            wholes[job] = whole(job, PLACES / "whole")
        for attempt in range(20):
            shutil.rmtree(PLACES / "place", ignore_errors=True)
            found = do(job, PLACES / "place", wholes[job], random.Random(f"{seed} {key} {attempt}"))
            if not found.pop("late", False):  # else it ended before the fault came
                results.add(key, row | found)
                break


def tables(rows: list[dict[str, Any]], seed: int, planned: int) -> str:
    kills = [row for row in rows if "signal" in row]
    rest = [row for row in rows if "fault" in row]
    wrong = [row for row in rows if row["wrong"]]
    slowest = max((row["seconds"] for row in kills if row["signal"] in ("SIGTERM", "SIGINT")), default=0)
    dates = sorted({row["date"] for row in rows})
    survived, right = (sum(not row["wrong"] for row in some) for some in (kills, rest))
    when = " to ".join(dates[:: max(1, len(dates) - 1)])
    lines = [
        f"`make faults ARGS='--seed {seed}'`, commit {pages.commit()}, {when}: {len(kills)} of {planned} kills done,"
        f" {survived} of them survived; {len(rest)} other faults, {right} of them ended as they should. The slowest end"
        f" after SIGTERM or SIGINT took {slowest:.1f} s.",
        "",
    ]
    names = ("SIGKILL", "SIGTERM", "SIGINT", "SIGXFSZ")
    lines += ["| job | " + " | ".join(names[:3]) + " | inside a write | kills | survived |", "|---|" + "---|" * 6]

    def name_of(row: dict[str, Any]) -> str:
        return f"{row['job']}, stage {min(row['stage'], 3)}" if row.get("stage") else row["job"]

    for name in sorted(
        {name_of(row) for row in kills}, key=lambda name: ([*map(name.startswith, SHARES)].index(True), name)
    ):
        some = [row for row in kills if name_of(row) == name]
        cells = [str(sum(row["signal"] == kind for row in some)) for kind in names]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(some)} | {sum(not row['wrong'] for row in some)} |")
    lines += ["", "| fault | jobs | times | what came of it | right |", "|---|---|---|---|---|"]
    for fault in dict.fromkeys(row["fault"] for row in rest):
        some = [row for row in rest if row["fault"] == fault]
        outcomes = [
            row.get("outcome", "refused by name; then the same bits" if "file" not in row else "") for row in some
        ]
        if "cannot be written" in fault or "right to write" in fault:
            outcomes = ["refused by name, before computing"] * len(some)
        came = ", ".join(f"{what}: {outcomes.count(what)}" for what in sorted({*outcomes}))
        right = sum(not row["wrong"] for row in some)
        lines.append(f"| {fault} | {len({row['job'] for row in some})} | {len(some)} | {came} | {right} |")
    if wrong:
        lines += ["", "What is not right:", ""]
        lines += [f"- {row['key']}: {row['wrong'][0][:300]}" for row in wrong]
    return "\n".join(lines)


def code() -> str:
    """Hash of what is tested, and of the test."""
    found = hashlib.sha256()
    package = ROOT / "python" / "groupdpo_kernels"
    for path in [*sorted(package.rglob("*.py")), *sorted((ROOT / "tests").glob("fault*.py"))]:
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def import_everything() -> None:
    """What jobs would else do after each fork."""
    torch.set_num_threads(1)
    re._MAXCACHE = 10_000  # type: ignore[attr-defined]  # transformers compiles a thousand patterns to load a model
    for name in (
        *PRELOAD,
        "torch._dynamo",
        "groupdpo_kernels.trainers.online_group_dpo",
        "groupdpo_kernels.cli.training",
    ):
        importlib.import_module(name)
    if not (WORK / "inputs" / "preferences.jsonl").exists():
        prepare()
    LlamaForCausalLM.from_pretrained(WORK / "inputs" / "model")
    gc.collect()
    gc.freeze()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="kills of all jobs together")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of the other faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a regular expression over what is done, such as 'kill DPO'")
    parser.add_argument("--name", default="", help="the name of the file of results, in place of the code's hash")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    global CONTEXT
    CONTEXT = multiprocessing.get_context("fork")  # this process has all imports, and no threads
    import_everything()
    results = Results(WORK / f"{options.name or code()}-{options.seed}.jsonl")
    try:
        campaign(results, options.kills, options.rounds, options.seed, options.only)
    finally:
        shutil.rmtree(PLACES, ignore_errors=True)
    rows = [*results.rows.values()]
    found = tables(rows, options.seed, len([*plan(options.kills, options.seed)]))
    pages.write(PAGE, "make faults", found)
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
