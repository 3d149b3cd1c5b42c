"""The command `train` runs preference training from a config file or from flags, which override the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from .console import bar, needs
from .options import options_of


def train(
    config: Path | None = typer.Argument(None, help="A .toml or .json file of settings; flags override it."),
    run: dict[str, Any] = options_of("cli.training.TrainSettings", unset=True, flags={"output_dir": "--out"}),
    objective: dict[str, Any] = options_of(
        "preference.objective.Objective",
        unset=True,
        flags={"average": "--average/--sum", "reference_free": "--reference-free/--reference"},
    ),
    balance: bool | None = typer.Option(None, "--balance/--no-balance", help="Whether to use AdaDPO's balance."),
    epochs: float | None = typer.Option(None, help="Passes over the data. Default: 3."),
    max_steps: int | None = typer.Option(None, help="Number of steps, in place of --epochs."),
    groups_per_step: int | None = typer.Option(None, help="Groups in a step. Default: 8."),
    seed: int | None = typer.Option(None, help="The seed of shuffling and of new adapters. Default: 42."),
    save_steps: int | None = typer.Option(None, help="Number of steps between checkpoints. Default: 100."),
    lora_rank: int | None = typer.Option(None, help="Rank of a LoRA adapter on every linear layer. Default: none."),
    training: dict[str, Any] = options_of(
        "trainers.config.GroupDPOConfig",
        unset=True,
        flags={"learning_rate": "--learning-rate --lr", "bf16": "--bf16/--fp32", "chat": "--chat/--plain"},
        bf16="on a GPU",
        gradient_checkpointing="on a GPU",
        logging_steps=1,
        precompute_ref_log_probs="if the loss needs a reference",
    ),
) -> None:
    """Train a model on groups of preferences. The same command again resumes where it was stopped or killed."""
    needs("train", "transformers", "accelerate", "matplotlib")
    if lora_rank is not None:
        needs("train --lora-rank", "peft")
    from .training import Listener, TrainSettings, read_settings
    from .training import train as begin

    if epochs is not None and max_steps is not None:
        raise ValueError(
            f"--epochs must be left out with --max-steps, which decides alone; got {epochs} and {max_steps}"
        )
    settings = read_settings(config) if config is not None else {}
    training |= {"num_train_epochs": epochs, "max_steps": max_steps, "save_steps": save_steps, "seed": seed}
    training |= {"per_device_train_batch_size": groups_per_step}
    tables = {"objective": objective | {"balance": balance}, "training": training, "lora": {"r": lora_rank}}
    settings |= given(run) | {
        name: {**(settings.get(name) or {}), **new} for name, of in tables.items() if (new := given(of))
    }
    for name, flag in {"model": "--model", "data": "--data", "output_dir": "--out"}.items():
        if name not in settings:
            raise ValueError(f"{flag} must be given, or {name} in the config file")
    first = int(os.environ.get("RANK", 0)) == 0  # of the ranks that torchrun or accelerate launch started
    console = Console(stderr=True, soft_wrap=True, highlight=False, quiet=not first)
    with bar(console) as progress:
        task = progress.add_task("training", total=None)

        def step(done: int, total: int, numbers: dict[str, float]) -> None:
            words = [f"{word} {numbers[name]:.3f}" for name, word in SHOWN.items() if name in numbers]
            progress.update(task, completed=done, total=total, description=" ".join(words) or "training")
            if words and not console.is_terminal and (done % max(1, total // 20) == 0):
                console.print(f"step {done} of {total}: {', '.join(words)}")

        report = begin(TrainSettings(**settings), Listener(progress.console.print, step))
    _print_report(console, report, settings["output_dir"])


def given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


SHOWN = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}


def _print_report(console: Console, report: dict[str, Any], folder: str) -> None:
    table = Table(title=f"{report['steps']} steps of {report['groups_per_step']} groups in {report['seconds']:.0f} s")
    columns = {"first step": ("first", ""), f"last {report['last']['mean_of_steps']}": ("last", "")}
    if report["evaluation"] is not None:
        columns["held out"] = ("evaluation", "eval_")
    for heading in ("", *columns):
        table.add_column(heading, justify="right")
    for name, word in SHOWN.items():
        values = (report[part].get(prefix + name) for part, prefix in columns.values())
        table.add_row(word, *("-" if value is None else f"{value:.3f}" for value in values))
    console.print(table)
    console.print(f"{folder}/model  {folder}/report.json  {folder}/curves.png")
