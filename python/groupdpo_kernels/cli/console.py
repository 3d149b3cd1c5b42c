"""What the commands share before anything heavy is imported: the packages that they need, and the progress bar."""

from __future__ import annotations

import importlib.util

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def needs(command: str, *packages: str) -> None:
    """ImportError that says what to install."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ImportError(f"{command} needs {', '.join(missing)}: pip install 'groupdpo-kernels[cli]'")


def bar(console: Console) -> Progress:
    """How far long work is, and how long it takes still."""
    counts = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    times = TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left")
    return Progress(*counts, *times, console=console)
