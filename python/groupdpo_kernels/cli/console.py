"""Parts that the commands share and that import nothing heavy: signals, a check for packages, the progress bar."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Terminated(KeyboardInterrupt):
    """SIGTERM has come. What an interrupt by Ctrl-C leaves whole, this leaves whole too."""


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """A context in which SIGTERM raises `Terminated`, so that processes and files are left as after Ctrl-C.

    One of several ranks ends at once, for it may be waiting for another in a call that nothing interrupts.
    """

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        yield
        return
    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread, which alone may do this
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def code_of(stop: KeyboardInterrupt) -> int:
    """The exit status that says which signal stopped a command, as a shell gives it."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def needs(command: str, *packages: str) -> None:
    """ImportError that says what to install, where a package that the command needs is missing."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ImportError(f"{command} needs {', '.join(missing)}: pip install 'groupdpo-kernels[cli]'")


def bar(console: Console) -> Progress:
    """A progress bar that shows how far the work is, and how long it still takes."""
    counts = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    times = TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left")
    return Progress(*counts, *times, console=console)
