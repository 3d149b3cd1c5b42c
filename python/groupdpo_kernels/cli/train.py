"""The command `train` runs preference training from a config file or from flags, which override the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from .console import bar, needs

# flag -> (section, name) of the setting; "" is the top level.
PLACES = {
    **{name: ("", name) for name in ("model", "data", "output_dir", "eval_data", "tokenizer", "device", "dtype")},
    **{name: ("objective", name) for name in ("loss", "beta", "average", "reference_free", "nll_weight")},
    **{name: ("objective", name) for name in ("label_smoothing", "gamma", "alpha", "tau", "balance")},
    "lora_rank": ("lora", "r"),
    **{name: ("training", name) for name in ("strategy", "learning_rate", "max_length", "seed", "max_steps", "bf16")},
    **{
        name: ("training", name)
        for name in ("micro_batch_sequences", "micro_batch_tokens", "save_steps", "rule", "on_bad")
    },
    "epochs": ("training", "num_train_epochs"),
    "groups_per_step": ("training", "per_device_train_batch_size"),
    "merge_prompts": ("training", "merge_prompts"),
}


def train(
    config: Path | None = typer.Argument(None, help="A .toml or .json file of settings; flags override it."),
    model: str | None = typer.Option(None, help="The model: a folder, a hub name, or a config.json (random weights)."),
    data: str | None = typer.Option(None, help="JSONL file of preferences to train on: pairs, sets, ratings, ranks."),
    output_dir: str | None = typer.Option(None, "--out", help="Folder of the run; a run that it holds is resumed."),
    eval_data: str | None = typer.Option(None, help="JSONL file of held-out preferences, for evaluation."),
    tokenizer: str | None = typer.Option(None, help="The tokenizer's folder or hub name. Default: the model's."),
    device: str | None = typer.Option(None, help="Device that trains: auto, cpu or cuda."),
    dtype: str | None = typer.Option(None, help="Type of the weights: float32 (default), bfloat16, auto (as saved)."),
    loss: str | None = typer.Option(None, help="Name of the loss: sigmoid (DPO, default), mpo, all_pairs, simpo, ..."),
    beta: float | None = typer.Option(None, help="The scale of the scores (default 0.1)."),
    average: bool | None = typer.Option(None, "--average/--sum", help="Whether scores are per token or per response."),
    reference_free: bool | None = typer.Option(
        None, "--reference-free/--reference", help="Scores without a reference model, or with one."
    ),
    nll_weight: float | None = typer.Option(None, help="Weight of the negative log-likelihood of the positives."),
    label_smoothing: float | None = typer.Option(None, help="The probability that a preference is wrong (default 0)."),
    gamma: float | None = typer.Option(None, help="Target margin of simpo."),
    alpha: float | None = typer.Option(None, help="Reward for each token in rdpo."),
    tau: float | None = typer.Option(None, help="Width of discopop's change of loss (default 0.05)."),
    balance: bool | None = typer.Option(None, "--balance/--no-balance", help="Whether to use AdaDPO's balance."),
    strategy: str | None = typer.Option(None, help="How a step runs: auto (default), two_pass, one_pass or coupled."),
    learning_rate: float | None = typer.Option(
        None, "--learning-rate", "--lr", help="The peak learning rate (default 1e-6)."
    ),
    epochs: float | None = typer.Option(None, help="Passes over the data (default 3)."),
    max_steps: int | None = typer.Option(None, help="Number of steps, in place of --epochs."),
    groups_per_step: int | None = typer.Option(None, help="Groups in a step (default 8)."),
    micro_batch_sequences: int | None = typer.Option(None, help="The most responses of a micro-batch (default 4)."),
    micro_batch_tokens: int | None = typer.Option(None, help="The most tokens of a micro-batch, padding included."),
    max_length: int | None = typer.Option(None, help="The most tokens of a prompt with its response (default 1024)."),
    rule: str | None = typer.Option(None, help="How ratings become preferred and rejected (default best_vs_rest)."),
    on_bad: str | None = typer.Option(None, help="What to do with a row that cannot be used: drop (default) or error."),
    merge_prompts: bool | None = typer.Option(None, help="Whether rows of one prompt become one group."),
    lora_rank: int | None = typer.Option(None, help="Rank of a LoRA adapter on every linear layer (default: none)."),
    bf16: bool | None = typer.Option(None, "--bf16/--fp32", help="Arithmetic of the forward (default: bf16 on a GPU)."),
    seed: int | None = typer.Option(None, help="The seed of shuffling and of new adapters (default 42)."),
    save_steps: int | None = typer.Option(None, help="Number of steps between checkpoints (default 100)."),
) -> None:
    """Train a model on groups of preferences. The same command again resumes where it was stopped or killed."""
    given = dict(locals())
    del given["config"]
    needs("train", "transformers", "accelerate", "matplotlib")
    if lora_rank is not None:
        needs("train --lora-rank", "peft")
    from .training import Listener, TrainSettings, read_settings
    from .training import train as run

    if epochs is not None and max_steps is not None:
        raise ValueError(
            f"--epochs must be left out with --max-steps, which decides alone; got {epochs} and {max_steps}"
        )
    settings = read_settings(config) if config is not None else {}
    for name, value in given.items():
        section, key = PLACES[name]
        if value is not None and section:
            settings[section] = {**(settings.get(section) or {}), key: value}
        elif value is not None:
            settings[key] = value
    for name, flag in {"model": "--model", "data": "--data", "output_dir": "--out"}.items():
        if name not in settings:
            raise ValueError(f"{flag} must be given, or {name} in the config file")
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    with bar(console) as progress:
        task = progress.add_task("training", total=None)

        def step(done: int, total: int, numbers: dict[str, float]) -> None:
            words = [f"{word} {numbers[name]:.3f}" for name, word in SHOWN.items() if name in numbers]
            progress.update(task, completed=done, total=total, description=" ".join(words) or "training")
            if words and not console.is_terminal and (done % max(1, total // 20) == 0):
                console.print(f"step {done} of {total}: {', '.join(words)}")

        report = run(TrainSettings(**settings), Listener(progress.console.print, step))
    _print_report(console, report, settings["output_dir"])


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
