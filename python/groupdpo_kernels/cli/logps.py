"""`logps`: a file of prompts and responses -> their log-probabilities under a model."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from .console import bar, needs


def logps(
    model: str = typer.Argument(help="A folder, or a name on the hub."),
    rows: Path = typer.Argument(
        help="JSONL: prompt, and response or completion, as text or messages; or rows of any preference format."
    ),
    out: Path = typer.Argument(help="JSONL: row, response, logp, num_tokens; a line for each response."),
    tokenizer: str | None = typer.Option(None, help="Where the tokenizer is. Default: with the model."),
    token_logps: bool = typer.Option(False, "--tokens", help="Also the log-probability of each token."),
    dtype: str = typer.Option("auto", help="auto (as saved), float32, bfloat16 or float16."),
    device: str = typer.Option("auto", help="auto, cpu, cuda or cuda:N."),
    max_tokens: int = typer.Option(8192, help="Of a batch, padding included."),
    max_length: int | None = typer.Option(None, help="The most tokens of prompt and response."),
    too_long: str = typer.Option("skip", help="What is longer: skip (a line says so) or truncate_prompt."),
    chat: bool | None = typer.Option(
        None, "--chat/--plain", help="Text prompts as a user's turn; conversations of one turn as plain text."
    ),
    add_eos: bool = typer.Option(True, "--eos/--no-eos", help="Whether plain text ends with the end of text."),
    on_bad: str = typer.Option("error", help="A row that cannot be read: error, or drop (a line says why)."),
    window: int = typer.Option(256, help="Responses sorted by length, and written, together."),
    overwrite: bool = typer.Option(False, help="Begin again whatever is there."),
) -> None:
    """Score responses with a model. The same command again goes on where it was stopped or killed."""
    needs("logps", "transformers")
    from ..checks import one_of
    from .loading import DTYPES, check_fit, check_place, device_of, existing, load_model, load_tokenizer
    from .scoring import ScoringOptions, read, score_file

    options = ScoringOptions(max_length, too_long, max_tokens, window, token_logps, chat, add_eos, on_bad)
    # What costs nothing to look at comes before the rows, and these before a model is loaded.
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
