"""The command line, `groupdpo-kernels`: importing this needs torch alone, running it the extra [cli].

app.py       the list of commands, and what an error looks like
check.py     what runs on this machine;  inspection.py: its tables;  selftest.py: numbers against float64
logps.py     log-probabilities of responses in a file;  scoring.py: windows, a file that a kill does no harm
train.py     preference training from a file or flags;  training.py: the run, its folder, its report; curves.py
loading.py   models, tokenizers and rows from disk;  console.py: packages that are missing, the progress bar
"""

from __future__ import annotations

import sys


def main() -> None:
    """What the console script calls."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"groupdpo-kernels needs {error.name}: pip install 'groupdpo-kernels[cli]'")
    app()
