"""The commands `profile`, `plan` and `report`: memory and time of a group, measured here or predicted for a GPU."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from .console import Terminated, code_of, needs
from .options import options_of

SETTINGS = ("full", "checkpointing", "lora")

# Of profile and plan.
_STRATEGIES = typer.Option(None, help="Any of coupled_logits, coupled, two_pass, one_pass, pairs (default: all).")


def profile(
    workload: dict[str, Any] = options_of(
        "memory.workload.Workload", but=("strategy", "group", "lora_rank", "checkpointing", "prompts")
    ),
    groups: str = typer.Option("2,4,8,16", help="Group sizes: even ones, or any with --positives."),
    strategies: str | None = _STRATEGIES,
    settings: str = typer.Option("full,lora", help=f"What to train: any of {', '.join(SETTINGS)}."),
    lora_rank: int | None = typer.Option(None, help="LoRA rank of the setting lora (default 16)."),
    device: str | None = typer.Option(None, help="Device to measure: cpu or cuda (default: cuda if there is one)."),
    limit_mib: int | None = typer.Option(None, help="MiB that a step may take; more counts as out of memory."),
    kinds: str = typer.Option("memory,time", help="What to measure: memory, time or both."),
    seconds: float = typer.Option(8.0, help="Seconds spent on timing each group size."),
    rounds: int = typer.Option(20, help="The most rounds of timing each group size."),
    out: Path = typer.Option(Path("profile"), help="Folder for measured.jsonl, report.html and pictures."),
    resume: bool = typer.Option(False, help="Keep the figures of an earlier run and measure the rest."),
) -> None:
    """Measure a training step's peak memory and time against the size of its group, for each strategy."""
    needs("profile", "transformers", "matplotlib")
    from dataclasses import replace

    from ..memory.report import write_report
    from ..memory.sweep import profile as run
    from ..memory.sweep import read_figures, table
    from ..memory.workload import Workload, sweep
    from .loading import device_of

    sizes = numbers("groups", groups)
    base = Workload(**workload, group=max(sizes, default=8))
    changes: dict[str, dict[str, Any]] = {
        "full": {},
        "checkpointing": {"checkpointing": True},
        "lora": {"lora_rank": 16 if lora_rank is None else lora_rank},
    }
    chosen = words("settings", settings, SETTINGS)
    if device is not None:
        device = str(device_of(device))
    if lora_rank is not None and "lora" not in chosen:
        raise ValueError(f"--lora-rank must be left out without lora among --settings, {settings}; got {lora_rank}")
    if "lora" in chosen:
        needs("profile --settings lora", "peft")
    some = None if strategies is None else words("strategies", strategies)
    bases = [replace(base, **changes[name]) for name in chosen]
    loads = [load for setting in bases for load in sweep(setting, sizes, some)]
    path, interrupted = out / "measured.jsonl", 0  # the exit status
    try:
        run(
            loads,
            path,
            device=device,
            limit=None if limit_mib is None else limit_mib * 2**20,
            resume=resume,
            kinds=words("kinds", kinds),
            seconds=seconds,
            rounds=rounds,
            command=shlex.join(["groupdpo-kernels", *sys.argv[1:]]),
        )
    except KeyboardInterrupt as stop:
        interrupted = code_of(stop)
        typer.echo(f"interrupted: {path} holds what was measured; --resume goes on", err=True)
        if isinstance(stop, Terminated):  # who sends SIGTERM does not wait for pictures
            raise typer.Exit(interrupted) from stop
    if path.exists() and path.stat().st_size:
        typer.echo(table(read_figures(path)[1]))
        typer.echo(f"\n{write_report(path, out)}")
    if interrupted:
        raise typer.Exit(interrupted)


def plan(
    workload: dict[str, Any] = options_of(
        "memory.workload.Workload",
        but=("strategy", "group", "prompts"),
        tokens=1024,
        dtype="bfloat16",
        checkpointing=True,
    ),
    groups: str = typer.Option("2,8,32,128", help="Group sizes: even ones, or any with --positives."),
    memory: float = typer.Option(80.0, help="Memory of a GPU, in GB (10^9 bytes)."),
    strategies: str | None = _STRATEGIES,
    hardware: dict[str, Any] = options_of("memory.planner.Hardware", but=("memory",)),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
) -> None:
    """Predict which group sizes fit a GPU that need not be here, and what takes the most memory."""
    needs("plan", "transformers")
    if workload["lora_rank"]:
        needs("plan --lora-rank", "peft")
    from ..memory.planner import Hardware, plan_table, savings_text, traffic_text
    from ..memory.planner import plan as predict
    from ..memory.workload import Workload

    if not 0 < memory * 1e9 < math.inf:
        raise ValueError(f"memory must be positive and finite; got {memory}")
    sizes = numbers("groups", groups)
    base = Workload(**workload, group=max(sizes, default=8))
    devices = Hardware(round(memory * 1e9), **hardware)
    some = None if strategies is None else words("strategies", strategies)
    processes = os.cpu_count() or 1
    with Console(stderr=True).status("planning: a minute") as status:
        rows = predict(base, sizes, devices, some, lambda name: status.update(f"planning: {name} is done"), processes)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    each = f" of each of {devices.devices} GPUs" if devices.devices > 1 else ""
    what = f"{base.model}, {base.setting}, {base.tokens} tokens a response, {base.dtype}"
    typer.echo(f"{what}: GiB{each}; in brackets: does not fit\n")
    typer.echo(plan_table(rows))
    if base.share_prompt:
        typer.echo(f"\n{savings_text(rows[0])}")
    if devices.devices > 1:
        typer.echo(f"\n{traffic_text(rows)}")


def report(
    figures: Path = typer.Argument(help="The measured.jsonl of a profile, or a .json of bench/run.py."),
    out: Path = typer.Option(Path("profile"), help="Folder for the HTML file and the pictures."),
) -> None:
    """Draw measured figures again, as one HTML file and pictures."""
    needs("report", "matplotlib")
    from ..memory.report import write_report

    typer.echo(write_report(figures, out))


def words(name: str, given: str, known: tuple[str, ...] | None = None) -> list[str]:
    found = [word.strip() for word in given.split(",") if word.strip()]
    for word in found:
        if known is not None and word not in known:
            raise ValueError(f"{name} must be of {', '.join(known)}; got {word!r}")
    return found


def numbers(name: str, given: str) -> list[int]:
    try:
        return [int(word) for word in words(name, given)]
    except ValueError:
        raise ValueError(f"{name} must be whole numbers with commas between; got {given!r}") from None
