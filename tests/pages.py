"""Pages of docs/ that a long job writes: its text stands between two marks, and people write the rest."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def marks(name: str) -> tuple[str, str]:
    return f"<!-- begin: {name} -->", f"<!-- end: {name} -->"


def written(page: Path, name: str) -> str:
    """What stands between the marks of a job, such as "make compat"."""
    begin, end = marks(name)
    return page.read_text().split(begin)[1].split(end)[0]


def write(page: Path, name: str, text: str) -> None:
    begin, end = marks(name)
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")


def commit() -> str:
    """Of this checkout; "-dirty" where a file differs from it."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
