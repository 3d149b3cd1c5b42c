"""The command line in this process and in one of its own, and a model with its tokenizer in a folder."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from processes import Script
from tiny_models import make
from tiny_tokenizers import byte_level_bpe
from typer.testing import CliRunner

from groupdpo_kernels.cli.app import app

SCRIPT = Path(sys.executable).with_name("groupdpo-kernels")
PREFERENCES = [
    {"prompt": "Tea?", "positives": [" Green.", " Hi. Green tea."], "negatives": [" Coffee."]},
    {"prompt": "How long does tea steep?", "positives": [" Three minutes."], "negatives": [" An hour.", " No."]},
    {"prompt": "Be brief.", "positives": [" Hello."], "negatives": [" No idea.", " Be brief. Tea?"]},
    {"prompt": "Hi.", "chosen": " Hello. Tea?", "rejected": " No idea."},
]


def save_model(folder: Path, **changes: Any) -> Path:
    make("llama", **changes).save_pretrained(folder)
    byte_level_bpe(bos=True).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def invoke(*arguments: Any) -> Any:
    """Exit code, output and error output of a command, in this process; an unexpected exception is raised."""
    result = CliRunner().invoke(app, [str(x) for x in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments: Any) -> str:
    """What a command says that refuses its input: one message, no traceback."""
    result = invoke(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.stderr, result.output
    return result.stderr


def run_until(ready: Callable[[], bool], *arguments: Any) -> None:
    """The console script in a process of its own, killed without warning as soon as it is `ready`."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # the same sums as in this process
    with Script(SCRIPT, *arguments, env=os.environ | threads) as process:
        process.until(ready)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
