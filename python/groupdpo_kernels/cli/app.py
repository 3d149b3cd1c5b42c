"""The list of commands, and how errors are printed.

A command is a function, whose parameters typer reads (options.py makes those of a dataclass), and a line in `COMMANDS`.
Heavy imports belong in its body, so that `--help` does not wait for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from .. import __version__
from .check import check
from .console import code_of, termination_as_interrupt
from .logps import logps
from .memory import plan, profile, report
from .options import with_options
from .train import train

COMMANDS: tuple[Callable[..., Any], ...] = (check, logps, train, profile, plan, report)


class _Group(TyperGroup):
    """A group of commands in which wrong input gives one message and exit code 2, without a traceback, and a signal one
    message and 128 + its number."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with termination_as_interrupt():
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            on = "; the same command goes on" if ctx.invoked_subcommand in ("logps", "train") else ""
            Console(stderr=True, soft_wrap=True).print(f"[bold]stopped[/]{on}", highlight=False)
            raise typer.Exit(code_of(stop)) from stop
        except (ValueError, TypeError, OSError, ImportError) as error:
            if isinstance(error, BrokenPipeError) or os.environ.get("GROUPDPO_KERNELS_TRACEBACK") == "1":
                raise
            Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {_plain(error)}", highlight=False)
            raise typer.Exit(2) from error


def _plain(error: BaseException) -> str:
    from rich.markup import escape

    return escape(str(error) or type(error).__name__)


app = typer.Typer(
    name="groupdpo-kernels",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="GROUPDPO_KERNELS_TRACEBACK=1 shows where an error comes from.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    """Preference optimisation of language models without the logits: check this machine, score, train."""


for command in COMMANDS:
    app.command()(with_options(command))
