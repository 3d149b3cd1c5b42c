"""The command `logps` writes the log-probabilities of a file's responses under a model."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from .console import bar, needs


def logps(
    model: str = typer.Argument(help="A model's folder, or its name on the hub."),
    rows: Path = typer.Argument(
        help="JSONL file of prompts with responses or completions, as text or messages; or of any preference format."
    ),
    out: Path = typer.Argument(help="The JSONL file to write: row, response, logp, num_tokens for each response."),
    tokenizer: str | None = typer.Option(None, help="The tokenizer's folder or hub name. Default: the model's."),
    token_logps: bool = typer.Option(False, "--tokens", help="Also write the log-probability of each token."),
    dtype: str = typer.Option("auto", help="Data type of the weights: auto (as saved), float32, bfloat16, float16."),
    device: str = typer.Option("auto", help="Device that computes: auto, cpu, cuda or cuda:N."),
    max_tokens: int = typer.Option(8192, help="The most tokens of a micro-batch, padding included."),
    max_length: int | None = typer.Option(None, help="The most tokens of a prompt with its response."),
    too_long: str = typer.Option("skip", help="What to do with longer ones: skip (noted in OUT) or truncate_prompt."),
    chat: bool | None = typer.Option(
        None, "--chat/--plain", help="Take text prompts as a user's turn, or conversations of one turn as plain text."
    ),
    add_eos: bool = typer.Option(True, "--eos/--no-eos", help="Whether plain text ends with the end-of-text token."),
    on_bad: str = typer.Option("error", help="What to do with an unreadable row: error, or drop (its line says why)."),
    window: int = typer.Option(256, help="How many responses are sorted by length and written together."),
    overwrite: bool = typer.Option(False, help="Begin again, even if the output file exists."),
) -> None:
    """Score responses with a model. The same command again resumes where it was stopped or killed."""
    needs("logps", "transformers")
    from ..checks import one_of
    from .loading import DTYPES, check_fit, check_place, device_of, existing, load_model, load_tokenizer
    from .scoring import ScoringOptions, read, score_file

    options = ScoringOptions(max_length, too_long, max_tokens, window, token_logps, chat, add_eos, on_bad)
    # Cheap checks come before those of the rows, and these before a model is loaded.
    existing("rows", rows)
    one_of("dtype", dtype, DTYPES)
    target = device_of(device)
    for what, where in {"model": model, "tokenizer": tokenizer or model}.items():
        check_place(what, where)
    if out.is_dir():
        raise ValueError(f"out must be a file; {out} is a folder")
    for _ in read(rows, on_bad):
        pass
    words = load_tokenizer(model if tokenizer is None else tokenizer)
    scorer = load_model(model, dtype, target).eval()
    check_fit(scorer, words)
    console = Console(stderr=True)
    with bar(console) as progress:
        task = progress.add_task("scoring", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        found = score_file(scorer, words, rows, out, options, overwrite=overwrite, progress=show)
    if found.resumed_at:
        console.print(f"{found.resumed_at} responses were there already")
    if found.skipped:
        console.print(f"[yellow]{found.skipped} could not be scored:[/] their lines say why, under skipped")
    console.print(f"{found.responses} responses: {out}", highlight=False, soft_wrap=True)
