"""The command `logps` writes the log-probabilities of a file's responses under a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from .console import bar, needs
from .options import options_of


def logps(
    model: str = typer.Argument(help="A model's folder, or its name on the hub."),
    rows: Path = typer.Argument(
        help="JSONL file of prompts with responses or completions, as text or messages; or of any preference format."
    ),
    out: Path = typer.Argument(help="The JSONL file to write: row, response, logp, num_tokens for each response."),
    tokenizer: str | None = typer.Option(None, help="The tokenizer's folder or hub name. Default: the model's."),
    dtype: str = typer.Option("auto", help="Data type of the weights: auto (as saved), float32, bfloat16, float16."),
    device: str = typer.Option("auto", help="Device that computes: auto, cpu, cuda or cuda:N."),
    options: dict[str, Any] = options_of(
        "cli.scoring.ScoringOptions",
        flags={"token_logps": "--tokens", "chat": "--chat/--plain", "add_eos": "--eos/--no-eos"},
    ),
    overwrite: bool = typer.Option(False, help="Begin again, even if the output file exists."),
) -> None:
    """Score responses with a model. The same command again resumes where it was stopped or killed."""
    needs("logps", "transformers")
    from ..checks import one_of
    from .loading import DTYPES, check_fit, check_place, device_of, existing, load_model, load_tokenizer
    from .scoring import ScoringOptions, read, score_file

    scoring = ScoringOptions(**options)
    # Cheap checks come before those of the rows, and these before a model is loaded.
    existing("rows", rows)
    one_of("dtype", dtype, DTYPES)
    target = device_of(device)
    for what, where in {"model": model, "tokenizer": tokenizer or model}.items():
        check_place(what, where)
    if out.is_dir():
        raise ValueError(f"out must be a file; {out} is a folder")
    for _ in read(rows, scoring.on_bad):
        pass
    words = load_tokenizer(model if tokenizer is None else tokenizer)
    scorer = load_model(model, dtype, target).eval()
    check_fit(scorer, words)
    console = Console(stderr=True)
    with bar(console) as progress:
        task = progress.add_task("scoring", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        found = score_file(scorer, words, rows, out, scoring, overwrite=overwrite, progress=show)
    if found.resumed_at:
        console.print(f"{found.resumed_at} responses were there already")
    if found.skipped:
        console.print(f"[yellow]{found.skipped} could not be scored:[/] their lines say why, under skipped")
    console.print(f"{found.responses} responses: {out}", highlight=False, soft_wrap=True)
