"""Options of the command line are the fields of its dataclasses; those that would do nothing are refused; what it shows
fits a terminal.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from rich.console import Console
from tiny_cli import invoke, refused
from typer.testing import CliRunner

from groupdpo_kernels import Objective
from groupdpo_kernels.cli.app import COMMANDS, app
from groupdpo_kernels.cli.console import bar
from groupdpo_kernels.cli.options import TYPES, Options, choice_of, options_of, with_options
from groupdpo_kernels.cli.training import make_objective
from groupdpo_kernels.trainers import GroupDPOConfig

# Fields that a command decides itself, or asks for in another form.
DECIDED = {
    "profile": {"strategy", "group", "lora_rank", "checkpointing", "prompts"},
    "plan": {"strategy", "group", "prompts", "memory"},
}


def fields_read(command: Any) -> dict[str, tuple[inspect.Parameter, Any]]:
    """{field: (the parameter that was read for it, the field that Python has)} of a command's dataclasses."""
    found = {}
    for options in [p.default for p in inspect.signature(command).parameters.values()]:
        if isinstance(options, Options):
            module, _, name = options.where.rpartition(".")
            kind = getattr(importlib.import_module(f"groupdpo_kernels.{module}"), name)
            own = {f.name: f for f in dataclasses.fields(kind) if f.name in inspect.get_annotations(kind)}
            read = {parameter.name: (parameter, own[parameter.name]) for parameter in options.parameters}
            plain = {
                f.name for f in own.values() if set(str(f.type).split(" | ")) & set(TYPES) or "Literal[" in str(f.type)
            }
            assert plain - DECIDED.get(command.__name__, set()) == set(read)
            found |= read
    return found


def test_every_field_is_an_option() -> None:
    """All fields of a plain type, with their types and defaults, though their classes are read and not imported."""
    other = {"plan": {"tokens": 1024, "dtype": "bfloat16", "checkpointing": True}}
    counts = {}
    for command in COMMANDS:
        fields = fields_read(command)
        counts[command.__name__] = len(fields)
        for name, (parameter, field) in fields.items():
            allowed = ["str"] if "Literal[" in str(field.type) else str(field.type).split(" | ")
            taken = get_args(parameter.annotation) or (parameter.annotation,)
            assert taken[0].__name__ in allowed
            default = other.get(command.__name__, {}).get(name, field.default)
            if command.__name__ == "train":
                assert parameter.default.default is None and type(None) in taken
            else:
                assert parameter.default.default == default and type(parameter.default.default) is type(default)
                assert ("None" in allowed) == (type(None) in taken)
    assert counts["logps"] >= 8 and counts["train"] >= 35 and counts["profile"] >= 9 and counts["plan"] >= 15


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_every_option_has_a_help_line(command: Any) -> None:
    """A sentence that begins with a capital and ends with a full stop, shown as it stands."""
    group: Any = typer.main.get_command(app)
    shown = " ".join(invoke(command.__name__, "--help").output.replace("│", " ").split())
    for parameter in group.commands[command.__name__].params:
        assert parameter.help and parameter.help[0].isupper() and parameter.help.rstrip(")")[-1] == ".", parameter.name
        assert all(word in shown for word in parameter.help.split()), parameter.name


def test_options_reach_their_command() -> None:
    taken: list[Any] = []

    def command(
        training: dict[str, Any] = options_of("trainers.config.GroupDPOConfig", unset=True),
        load: dict[str, Any] = options_of("memory.workload.Workload", but=("strategy", "share_prompt"), tokens=7),
        more: int = typer.Option(1),
    ) -> None:
        taken.append((training, load, more))

    small = typer.Typer()
    small.command()(with_options(command))
    for given, wanted in {"512": 512, "auto": "auto"}.items():
        arguments = ["--micro-batch-tokens", given, "--layers", "3", "--no-chat", "--more", "2"]
        done = CliRunner().invoke(small, arguments)
        assert done.exit_code == 0, done.output
        training, load, more = taken.pop()
        found = {name: value for name, value in training.items() if value is not None}
        assert repr(found) == repr({"micro_batch_tokens": wanted, "chat": False}) and more == 2
        assert [load[name] for name in ("layers", "tokens", "model", "workspace_bytes")] == [3, 7, "tiny", 2**28]
    wrong = CliRunner().invoke(small, ["--layers", "three"])
    assert wrong.exit_code == 2 and "Invalid value for '--layers'" in wrong.output and not taken


@pytest.mark.parametrize(
    ("loss", "option"),
    [("sigmoid", "gamma"), ("mpo", "gamma"), ("simpo", "alpha"), ("sigmoid", "tau"), ("hinge", "label_smoothing")],
)
def test_options_of_another_loss(tmp_path: Path, loss: str, option: str) -> None:
    """Refused as a flag and in a file; in code, where losses are swept over, they are carried along."""
    said = f"{option} must be left out with loss '{loss}', which does not use it"
    given = ("--model", "m", "--data", "d", "--out", tmp_path, "--loss", loss)
    assert said in refused("train", *given, f"--{option.replace('_', '-')}", 0.1)
    config = tmp_path / "c.json"
    config.write_text(json.dumps({"objective": {"loss": loss, option: 0.1}}))
    assert said in refused("train", config, *given[:6])
    assert Objective(loss, **{option: 0.1}).loss == loss  # type: ignore[arg-type]


def test_options_of_the_loss_itself() -> None:
    for given in ({"loss": "simpo", "gamma": 0.5}, {"loss": "rdpo", "alpha": 0.1}, {"label_smoothing": 0.1}):
        assert make_objective(given) == Objective(**given)  # type: ignore[arg-type]
    assert make_objective({"loss": "hinge", "balance": False}) == Objective("hinge")


def test_options_that_another_one_decides(tmp_path: Path) -> None:
    given = ("--model", "m", "--data", __file__, "--out", tmp_path)
    assert "--epochs must be left out with --max-steps" in refused("train", *given, "--epochs", 1, "--max-steps", 2)
    config = tmp_path / "c.json"
    config.write_text('{"training": {"eval_steps": 5}}')
    assert "training.eval_steps must be left out without eval_data; got 5" in refused("train", config, *given)
    said = refused("profile", "--settings", "full", "--lora-rank", 4, "--out", tmp_path / "p")
    assert "--lora-rank must be left out without lora among --settings, full; got 4" in said


@pytest.mark.parametrize("command", ["plan", "profile"])
def test_positives(command: str, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "p") if command == "profile" else ()
    assert "group must be even, for half of it is positive" in refused(command, "--groups", "3", *out)
    said = refused(command, "--groups", "2,3", "--positives", 2, *out)
    assert "positives must be less than group, which has a negative too; got 2 of 2" in said


def test_elapsed_and_left_stand_apart() -> None:
    shown = io.StringIO()
    with bar(Console(file=shown, width=120, force_terminal=True, color_system=None)) as progress:
        progress.add_task("training", total=10)
    last = " ".join(shown.getvalue().split())
    assert "0/10 0:00:00 elapsed, -:--:-- left" in last


def test_check_keeps_its_remedies_at_80_columns() -> None:
    """Each reason is a line of its own, whole."""
    narrow = CliRunner().invoke(app, ["check", "--no-test"], env={"COLUMNS": "80"})
    found: Any = json.loads(CliRunner().invoke(app, ["check", "--no-test", "--json"]).stdout)
    assert narrow.exit_code == 0
    for row in found["auto"]:
        for name, reasons in row["why_not"].items():
            why = "; ".join(reasons) or f"could run; {row['impl']} comes first"
            assert f"{name}: {why}\n" in narrow.stdout


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": False}, {"gradient_checkpointing": True}])
def test_a_config_warns_of_no_name(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        config = GroupDPOConfig("out", use_cpu=True, **options)
    assert config.gradient_checkpointing is options.get("gradient_checkpointing", True)
    assert getattr(config, "activation_checkpointing", config.gradient_checkpointing) is config.gradient_checkpointing
    off = {"activation_checkpointing": False}
    if hasattr(config, "activation_checkpointing"):
        assert GroupDPOConfig("out", use_cpu=True, **off).gradient_checkpointing is False  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["train", "--help"], ["check", "--help"]])
def test_what_needs_no_torch_imports_none(arguments: list[str]) -> None:
    program = f"""
import sys
from groupdpo_kernels.cli.app import app
try:
    app({arguments!r})
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout, found.stderr


def test_a_choice_is_one_of_its_values() -> None:
    for given, value in {"auto": "auto", "True": True, "false": False}.items():
        assert choice_of(["auto", True, False])(given) == value
    with pytest.raises(typer.BadParameter, match=r"'perhaps' is not one of auto, true, false"):
        choice_of(["auto", True, False])("perhaps")
