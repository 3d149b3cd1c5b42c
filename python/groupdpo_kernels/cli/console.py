"""Parts that the commands share and that import nothing heavy: a check for packages, and the progress bar."""

from __future__ import annotations

import importlib.util

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def needs(command: str, *packages: str) -> None:
    """ImportError that says what to install, where a package that the command needs is missing."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ImportError(f"{command} needs {', '.join(missing)}: pip install 'groupdpo-kernels[cli]'")


def bar(console: Console) -> Progress:
    """A progress bar that shows how far the work is, and how long it still takes."""
    counts = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    times = TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left")
    return Progress(*counts, *times, console=console)
