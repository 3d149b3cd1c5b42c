"""A hook of mkdocs: a line `{{ options of train }}` becomes a table of the options of that command, each with its help
as `--help` prints it.

Needs the extra [cli]. Never runs a command.
"""

from __future__ import annotations

import re
from typing import Any

import typer.main

from groupdpo_kernels.cli.app import app


def on_page_markdown(markdown: str, **more: Any) -> str:
    return re.sub(r"^\{\{ options of (\w+) \}\}$", lambda found: table(found[1]), markdown, flags=re.MULTILINE)


def table(command: str) -> str:
    group: Any = typer.main.get_command(app)
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for parameter in group.commands[command].params:
        meaning = parameter.help.replace("|", "\\|")
        rows.append(f"| {names_of(parameter)} | {default_of(parameter)} | {meaning} |")
    return "\n".join(rows)


def names_of(parameter: Any) -> str:
    if not parameter.opts[0].startswith("-"):
        return f"*{parameter.name}*"
    return ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))


def default_of(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if isinstance(parameter.default, bool):
        names = parameter.opts if parameter.default else parameter.secondary_opts
        return f"`{names[0]}`" if names else ""
    return "" if parameter.default is None else f"`{parameter.default}`"
