"""Processes that begin with their imports done: ranks of a process group, and scripts as a user starts them.

A fork server imports torch, transformers and TRL once for each worker of pytest, and each process here is forked from
it: a process of its own, with its own signals, memory and exit status, ten seconds earlier than from nothing. What must
begin from nothing (which modules an import loads, what is read from the environment at import) starts by subprocess.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

PRELOAD = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
    "matplotlib.pyplot",
    "peft",
    "trl.trainer.dpo_trainer",
    "groupdpo_kernels.integrations.trl",
    "groupdpo_kernels.trainers.dpo",
    "groupdpo_kernels.trainers.group_dpo",
    "groupdpo_kernels.cli.app",
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOAD)


def run_ranks(worker: Callable[..., None], *args: Any, ranks: int = 2, timeout: float = 400) -> str:
    """Runs worker(rank, *args) on so many ranks, and returns what the first of them to fail has raised, or "".

    Ranks that have not ended in time are killed, since a rank may wait for one that has failed.
    """
    context = torch.multiprocessing.start_processes(
        _run_rank, (worker, *args), ranks, join=False, start_method="forkserver"
    )
    end = time.monotonic() + timeout
    try:
        while time.monotonic() < end:
            if context.join(timeout=5):
                return ""
    except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException) as failure:
        return str(failure)
    finally:
        for process in context.processes:
            process.kill()
    return f"not ended after {timeout} s"


def _run_rank(rank: int, worker: Callable[..., None], *args: Any) -> None:
    """Ends without taking the process group down, once all ranks are here.

    In torch 2.13 that may hang. DistributedDataParallel holds the group. Where it goes last, its destructor waits for
    gloo's threads with the interpreter's lock held, and they need the lock to free what Python has given them.
    """
    gc.freeze()  # as conftest.py does, and for the same reason
    worker(rank, *args)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def report_case(case: Callable[[], None], name: str, rank: int, folder: str) -> None:
    """Runs a case on a rank, and writes for `check_reports` whether it has passed. An error is raised on, since the
    ranks are out of step after it: the cases that follow are not run."""
    report = Path(folder, f"{name}.{rank}")
    try:
        case()
        report.write_text("passed")
    except BaseException:
        report.write_text(traceback.format_exc())
        raise


def check_reports(folder: Path, name: str, ranks: Iterable[int]) -> None:
    """The assertion that a case has passed on these ranks."""
    for rank in ranks:
        report = folder / f"{name}.{rank}"
        assert report.exists(), f"rank {rank} did not finish this case; the first failure is in another"
        assert report.read_text() == "passed", f"rank {rank}\n{report.read_text()}"


class Script:
    """A Python script, or a module after `-m`, in a process of its own. Its output goes to files."""

    def __init__(self, *arguments: Any, cwd: str | Path | None = None, env: Mapping[str, str] | None = None) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.stdout, self.stderr = (Path(self.folder.name, name) for name in ("stdout", "stderr"))
        self.stdout.touch()
        self.stderr.touch()
        given = [*map(str, arguments)], str(cwd or Path.cwd()), dict(os.environ if env is None else env)
        self.process: Any = CONTEXT.Process(target=_run, args=(*given, str(self.stdout), str(self.stderr)))
        self.process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout or 0)
        return int(self.process.exitcode)

    def until(self, ready: Callable[[], bool], timeout: float = 300) -> None:
        """Waits until it is ready; an error if it ends before."""
        end = time.monotonic() + timeout
        while not ready():
            if self.returncode is not None or time.monotonic() > end:
                self.kill()
                raise AssertionError(f"never got there: {self.stderr.read_text()}")
            time.sleep(0.002)

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *error: Any) -> None:
        self.kill()
        self.process.join()
        self.folder.cleanup()


def run_script(
    *arguments: Any, cwd: str | Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run([sys.executable, *arguments], capture_output=True, text=True)."""
    with Script(*arguments, cwd=cwd, env=env) as script:
        code = script.wait(timeout)
        return subprocess.CompletedProcess(list(arguments), code, script.stdout.read_text(), script.stderr.read_text())


def forked(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """It takes the place of subprocess.run in a module that starts Python scripts."""
    assert command[0] == sys.executable and options.pop("capture_output") and options.pop("text"), command
    return run_script(*command[1:], **options)


def _run(arguments: Sequence[str], cwd: str, environment: dict[str, str], stdout: str, stderr: str) -> None:
    """Does in the new process what `python *arguments` would do."""
    for number, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if arguments[0] == "-m":
        sys.argv, sys.path = [*arguments[1:]], [cwd, *sys.path]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path = [*arguments], [str(Path(cwd, arguments[0]).parent), *sys.path]
        runpy.run_path(arguments[0], run_name="__main__")
