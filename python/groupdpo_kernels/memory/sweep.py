"""Measures peak memory and time of a training step against the size of the group, for each strategy of workload.py.

    groupdpo-kernels profile --model tiny --groups 2,4,8,16 --out profile
    groupdpo-kernels profile --settings full,checkpointing,lora --groups 2,4,8,16,32,64 --tokens 128 --out P

Each memory figure comes from a fresh process; the strategies of a group are timed in one process, in interleaved rounds
(worker.py says what is measured). Each row is written to OUT/measured.jsonl as soon as it is known; `--resume` keeps
these rows and measures the rest. A step that runs out of memory is a row that says so. OUT/report.html and the pictures
are drawn at the end, and after an interruption from the rows so far.
It never overwrites a file of figures, and a second process that would write to it is refused. It needs transformers,
peft for LoRA, and matplotlib for the report.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..files import locked, naming
from .machine import describe
from .workload import STRATEGIES, Workload, config_of, workload_of

Row = dict[str, Any]
_BASE_OF_RATIOS = "coupled"  # timed first


class Worker:
    """The process that forks another for each request. It starts with the first request, and again if it has died."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any]) -> list[Row]:
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-W", "ignore", "-m", "groupdpo_kernels.memory.worker"]
            # Imports that look for a GPU must not start CUDA in the process, because its forks could then not use CUDA.
            environment = os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
            # It has a session of its own: Ctrl-C reaches every process of a terminal, and only this one must handle it.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env=environment,
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self.process.wait()
            return [
                {"status": "failed", "why": f"the measuring process ended with {code}"} for _ in request["workloads"]
            ]
        return json.loads(line)

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Figures:
    """The file of figures: a header, then one row a line. With `resume` the rows in it are read first. It is locked
    until it is closed."""

    def __init__(self, path: Path, header: dict[str, Any], resume: bool) -> None:
        self.path, self.rows = path, list[Row]()
        if path.exists() and path.stat().st_size and not resume:
            raise ValueError(f"out must not hold figures yet, or resume must be True; {path} exists")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = locked(path, path)
        try:
            self._begin(header)
        except BaseException:
            self.close()
            raise

    def _begin(self, header: dict[str, Any]) -> None:
        path = self.path
        if path.stat().st_size:
            found, self.rows = read_figures(path)
            for name in ("device", "versions"):
                if found[name] != header[name]:
                    raise ValueError(
                        f"resume must go on where it began; {path} is of {found[name]}, this is {header[name]}"
                    )
            self.file.truncate(path.read_bytes().rfind(b"\n") + 1)  # drops a last line that an interruption cut off
        else:
            self._write(header)

    def known(self, request: Row) -> Row | None:
        """The row in the file that answers this request; None where it must be measured."""
        same = (row for row in self.rows if all(row.get(name) == value for name, value in request.items()))
        return next((row for row in same if row["status"] != "failed"), None)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._write(row)

    def _write(self, line: dict[str, Any]) -> None:
        """Writes a line with its hash: a figure that changes on disk is noticed."""
        before = os.fstat(self.file.fileno()).st_size
        try:
            with naming(self.path):
                self.file.write(json.dumps(line | {_HASH: _hash_of(line)}).encode() + b"\n")
                self.file.flush()
        except BaseException:
            with contextlib.suppress(OSError):
                self.file.close()
            os.truncate(self.path, before)
            raise

    def close(self) -> None:
        self.file.close()


_HASH = "checksum"


def _hash_of(line: dict[str, Any]) -> str:
    plain = json.dumps({name: value for name, value in line.items() if name != _HASH}, sort_keys=True)
    return hashlib.blake2b(plain.encode(), digest_size=8).hexdigest()


def read_figures(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """(header, rows) of a file that `profile` writes. A last line that was cut off is left out."""
    try:
        lines = path.read_text().split("\n")
        found = [json.loads(line) for line in lines[:-1]]
        for number, line in enumerate(found, 1):
            if line.pop(_HASH, sha := _hash_of(line)) != sha:  # a line without one is of an earlier version
                raise ValueError(f"line {number} is damaged: its checksum does not fit")
        header, *rows = found
        if "versions" not in header or any("workload" not in row for row in rows):
            raise KeyError("workload")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"figures must be a file that profile has written; got {path}: {error!r}") from None
    return header, rows


def profile(
    workloads: Sequence[Workload],
    out: Path | str,
    *,
    device: torch.device | str | None = None,
    limit: int | None = None,
    resume: bool = False,
    kinds: Sequence[str] = ("memory", "time"),
    seconds: float = 8.0,
    rounds: int = 20,
    command: str = "",
    progress: bool = True,
) -> list[Row]:
    """Measures the workloads and returns the rows, those found by `resume` included.

    Args:
        out: the file of rows, OUT.jsonl.
        device: "cpu" or "cuda". None takes cuda where there is one, else cpu.
        limit: bytes that a step may take beyond its process; more is out of memory. None sets no limit.
        resume: whether to keep the rows that `out` holds and measure the rest, with those that failed.
        kinds: "memory", "time" or both.
        seconds, rounds: limits for timing the strategies of one group: at least 3 rounds, at most `rounds`.
        command: a text that is written into the file.

    Raises ValueError where `out` exists without `resume`, or was measured on another machine or version, and whatever a
    model's config raises. Ctrl-C ends the processes and leaves the rows in `out`.
    """
    if not workloads:
        raise ValueError("workloads must hold at least one; got none")
    for kind in kinds:
        if kind not in ("memory", "time"):
            raise ValueError(f"kinds must be memory or time; got {kind!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 byte; got {limit}")
    if rounds < 3:
        raise ValueError(f"rounds must be at least 3; got {rounds}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cuda", "cpu") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device must be cpu, or cuda where PyTorch finds a GPU; got {device}")
    for model in dict.fromkeys(workloads):
        config_of(model)  # a name that does not exist ends the run before it begins
    figures = Figures(Path(out), describe(device, command), resume)
    common = {"device": device.type, "limit": limit}
    worker = Worker()
    try:
        with _bar(len(workloads) * len(kinds), progress) as done:
            for group in _together(workloads):
                for workload in group if "memory" in kinds else ():
                    request = {"kind": "memory", "workload": asdict(workload), **common}
                    done(f"memory, {workload.strategy}, G = {workload.group}, {workload.setting}")
                    if figures.known(request) is None:
                        (row,) = worker.ask(request | {"workloads": [asdict(workload)]})
                        figures.add(request | row)
                if "time" in kinds:
                    _time(group, common | {"seconds": seconds, "rounds": rounds}, figures, worker, done)
    finally:
        worker.stop()
        figures.close()
    return figures.rows


def _together(workloads: Sequence[Workload]) -> Iterator[list[Workload]]:
    """Yields the workloads that differ in strategy alone as one list, with the base of ratios first."""
    found: dict[Workload, list[Workload]] = {}
    for workload in workloads:
        # The key takes "coupled" for any strategy, since one_pass is not allowed without an adapter.
        found.setdefault(replace(workload, strategy="coupled"), []).append(workload)
    for group in found.values():
        yield sorted(group, key=lambda w: w.strategy != _BASE_OF_RATIOS)


def _time(
    group: list[Workload], options: dict[str, Any], figures: Figures, worker: Worker, done: Callable[[str], None]
) -> None:
    keys = [
        {"kind": "time", "workload": asdict(w), "device": options["device"], "limit": options["limit"]} for w in group
    ]
    open_ones = []
    for workload, key in zip(group, keys):
        done(f"time, {workload.strategy}, G = {workload.group}, {workload.setting}")
        memory = figures.known(key | {"kind": "memory"})
        if figures.known(key) is not None:
            continue
        if memory is not None and memory["status"] == "out_of_memory":
            figures.add(key | {"status": "out_of_memory", "why": memory["why"]})
        else:
            open_ones.append((workload, key))
    if not open_ones:
        return
    # A ratio needs its base in the same rounds, so the base is timed again with what is missing.
    loads, keys = [w for w, _ in open_ones], [key for _, key in open_ones]
    for key, row in zip(keys, worker.ask({"kind": "time", "workloads": [asdict(w) for w in loads], **options})):
        if loads[0].strategy != _BASE_OF_RATIOS:
            row.pop("ratio", None)
        figures.add(key | row)


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[str], None]]:
    """A context that yields a function, which shows in a progress bar what is done."""
    if not shown:
        yield lambda what: None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, unit="point", file=sys.stderr) as bar:

        def done(what: str) -> None:
            bar.set_description(what)
            bar.update()

        yield done


# --------------------------------------------------------------------------------------------------------------- tables


def table(rows: Sequence[Row]) -> str:
    """A Markdown table for each setting: MiB, and ms with the ratio to `coupled`, of each strategy and group."""
    lines: list[str] = []
    by_setting: dict[str, list[Row]] = {}
    for row in rows:
        by_setting.setdefault(workload_of(row["workload"]).setting, []).append(row)
    for setting, some in by_setting.items():
        groups = sorted({row["workload"]["group"] for row in some})
        lines += ["", f"**{setting}**", "", "| strategy | " + " | ".join(f"G = {g}" for g in groups) + " |"]
        lines.append("|---" * (len(groups) + 1) + "|")
        for strategy in (s for s in STRATEGIES if any(row["workload"]["strategy"] == s for row in some)):
            mine = [row for row in some if row["workload"]["strategy"] == strategy]
            cells = ["; ".join(_cell(r) for r in mine if r["workload"]["group"] == g) for g in groups]
            lines.append(f"| {strategy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    if row["status"] != "ok":
        return row["status"].replace("_", " ")
    if row["kind"] == "memory":
        return f"{row['peak_bytes'] / 2**20:.0f} MiB"
    ratio = f" ({row['ratio']['median']:.2f})" if "ratio" in row else ""
    return f"{1e3 * row['seconds']['median']:.0f} ms{ratio}"
