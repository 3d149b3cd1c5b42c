"""The command line, `groupdpo-kernels`. Importing it needs torch alone; running it needs the extra [cli].

app.py       the list of commands, and how errors are printed;  options.py: options from the fields of dataclasses
check.py     what runs on this machine;  inspection.py: its tables;  selftest.py: numbers against float64
logps.py     log-probabilities of responses in a file;  scoring.py: windows, and a file that survives a kill
train.py     preference training from a file or flags;  training.py: the run, its folder, its report;  curves.py
memory.py    profile, plan and report;  loading.py: models, tokenizers and rows from disk;  console.py: progress bar
"""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point of the console script."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"groupdpo-kernels needs {error.name}: pip install 'groupdpo-kernels[cli]'")
    app()
