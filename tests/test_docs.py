"""What README and docs/ say is so: their Python runs, their commands and options exist, their lists are complete."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser
from tiny_models import make
from tiny_tokenizers import byte_level_bpe

import groupdpo_kernels
from groupdpo_kernels.data import FORMATS, RULES
from groupdpo_kernels.data.formats import REASONS
from groupdpo_kernels.preference.losses import LOSSES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL = ("sh", "bash", "console")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(name: str) -> str:
    return (DOCS / name).read_text()


# ------------------------------------------------------------------------------------------------------ Python snippets


def dpo_trainer() -> Any:
    """TRL's own trainer, as a user has it before these kernels come in."""
    import trl
    from datasets import Dataset

    rows = {"prompt": ["Tea?", "Hi."], "chosen": [" Green.", " Hello."], "rejected": [" Coffee.", " No idea."]}
    config = trl.DPOConfig("out", max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no")
    data = Dataset.from_dict(rows)
    return trl.DPOTrainer(make("llama"), make("llama"), config, train_dataset=data, processing_class=byte_level_bpe())


def saved(folder: str) -> str:
    """A model and its tokenizer on disk, as `from_pretrained` wants them."""
    make("llama").save_pretrained(folder)
    byte_level_bpe().save_pretrained(folder)
    return folder


TINY = SimpleNamespace(model=lambda: make("llama"), tokenizer=byte_level_bpe, dpo_trainer=dpo_trainer, saved=saved)


def snippets(page: Path) -> list[Any]:
    """The examples of a page, its hidden ones in HTML comments included. They share one namespace."""
    document = Document.parse(str(page), PythonCodeBlockParser())
    document.namespace |= {"tiny": TINY}
    return list(document.examples())


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=name_of)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the same everywhere
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    examples = snippets(page)
    shown = sum(language == "python" for language, _ in FENCE.findall(page.read_text()))
    assert shown and len(examples) >= shown
    for example in examples:
        example.evaluate()


def test_no_code_hides_from_the_tests() -> None:
    """Blocks have a language, and one that is known here; none is indented, where it would not be found."""
    for page in PAGES:
        assert not re.search(r"^ +```", page.read_text(), re.MULTILINE), page
        opened = [line for line in page.read_text().splitlines() if line.startswith("```")]
        languages = {line[3:] for line in opened[::2]}
        assert languages <= {"python", "json", "toml", "yaml", "text", *SHELL}, (page, languages)


# ------------------------------------------------------------------------------------------------------- shell snippets


def commands() -> Iterator[tuple[Path, list[str]]]:
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text()):
            if language in SHELL:
                for line in block.replace("\\\n", " ").splitlines():
                    if words := shlex.split(line.removeprefix("$ "), comments=True):
                        yield page, words


def options_of(command: str) -> set[str]:
    import typer.main

    from groupdpo_kernels.cli.app import app

    group: Any = typer.main.get_command(app)
    assert command in group.commands, command
    parameters = group.commands[command].params
    return {name for p in parameters for name in (*p.opts, *p.secondary_opts) if name.startswith("-")} | {"--help"}


def check_command(words: list[str]) -> None:
    while words and "=" in words[0] and not words[0].startswith("-"):  # variables of the environment
        words = words[1:]
    program, rest = words[0], words[1:]
    flags = {word.split("=")[0] for word in rest if word.startswith("--")}
    if program == "groupdpo-kernels":
        if rest[0] not in ("--help", "--version"):
            assert flags <= options_of(rest[0]), flags - options_of(rest[0])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in rest if "=" not in word} <= set(targets), rest
    elif program == "pip":
        extras = re.findall(r"\[([\w,]+)\]", " ".join(rest))
        known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert {name for group in extras for name in group.split(",")} <= set(known), extras
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), rest[1]
    elif program in ("python", "torchrun", "accelerate"):
        scripts = [word for word in rest if word.endswith(".py")]
        assert scripts and all((ROOT / script).is_file() or script == "train.py" for script in scripts), rest
        for script in scripts:
            source = (ROOT / script).read_text() if (ROOT / script).is_file() else None
            mine = {word.split("=")[0] for word in rest[rest.index(script) :] if word.startswith("--")}
            assert source is None or all(flag in source for flag in mine), (script, mine)
    else:
        assert program in ("git", "cd", "export"), words


def test_commands_and_their_options_exist() -> None:
    found = list(commands())
    assert len(found) > 20
    for page, words in found:
        try:
            check_command(words)
        except AssertionError as error:
            raise AssertionError(f"{name_of(page)}: {' '.join(words)}: {error}") from None


# --------------------------------------------------------------------------------------------------- what pages promise


def test_paths_and_names_exist() -> None:
    """Paths in backticks, and names below the package, written as code."""
    folders = (ROOT, ROOT / "python" / "groupdpo_kernels", DOCS)
    for page in PAGES:
        if page.name in ("log.md", "math.md"):
            continue
        code = re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))
        for path in code:
            if re.fullmatch(r"[\w./-]+/[\w.-]+\.(py|cpp|h|cu|md|png|toml)", path):
                assert any((folder / path).exists() for folder in folders), f"{name_of(page)}: {path}"
            elif re.fullmatch(r"groupdpo_kernels(\.\w+)+", path):
                importable(path)
    for page in DOCS.rglob("*.md"):
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE):
            importable(name)


def importable(dotted: str) -> None:
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError as error:
            if error.name != ".".join(parts[:cut]):
                raise
            continue
        for name in parts[cut:]:
            thing = getattr(thing, name)
        return
    raise AssertionError(dotted)


def test_lists_are_complete() -> None:
    from groupdpo_kernels.trainers import GroupDPOConfig

    formats = text_of("how-to/data.md")
    assert not [name for name in (*FORMATS, *RULES, *REASONS) if f"`{name}`" not in formats]
    losses = text_of("reference/losses.md")
    assert not [name for name in LOSSES if f"`{name}`" not in losses]
    configuration = text_of("reference/configuration.md")
    own = set(GroupDPOConfig.__annotations__)
    fields = {
        f.name for kind in (groupdpo_kernels.Objective, groupdpo_kernels.AdaBalance) for f in dataclasses.fields(kind)
    }
    assert not [name for name in own | fields if f"`{name}`" not in configuration]
    api = text_of("reference/api.md")
    assert not [name for name in groupdpo_kernels.__all__ if not re.search(rf"^::: .*\.{name}$", api, re.MULTILINE)]


def test_every_option_of_the_command_line_is_in_the_reference() -> None:
    from groupdpo_kernels.cli.app import COMMANDS

    spec: Any = importlib.util.spec_from_file_location("options_of_the_docs", DOCS / "options.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = hook.on_page_markdown(text_of("reference/command-line.md"))
    assert "{{" not in page and "| *rows* | required | JSONL file of prompts" in page
    assert "| `--eos`, `--no-eos` | `--eos` | Whether plain text ends" in page
    for command in COMMANDS:
        section = page.split(f"## {command.__name__}\n")[1].split("\n## ")[0]
        missing = {name for name in options_of(command.__name__) - {"--help"} if f"`{name}`" not in section}
        assert not missing, (command.__name__, missing)


def test_defaults_of_configurations() -> None:
    """The tables of the configuration page give the default of each option, as Python writes it."""
    from groupdpo_kernels.trainers import GroupDPOConfig

    page = text_of("reference/configuration.md")
    for kind in (groupdpo_kernels.Objective, groupdpo_kernels.AdaBalance, GroupDPOConfig):
        own = inspect.get_annotations(kind)
        for field in dataclasses.fields(kind):
            if field.name in own:
                assert re.search(rf"\| `{field.name}` \| `{re.escape(repr(field.default))}` \|", page), field.name


def test_readme_is_short_and_says_what_has_not_been_tried() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 140
    assert any("pip install" in line for line in lines[:25]) and any("No GPU has run it" in line for line in lines[:40])


def test_the_import_law_on_the_architecture_page_is_the_law() -> None:
    from test_laws import MAY_IMPORT

    section = text_of("project/architecture.md").split("## The import law")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", section, re.MULTILINE)
    assert {part: set(re.findall(r"`(\w+)`", may)) for part, may in rows} == {
        part: may for part, may in MAY_IMPORT.items() if part not in ("__init__", "bench", "examples")
    }


# -------------------------------------------------------------------------------------------------- errors and warnings


def heads() -> dict[str, str]:
    """The beginning of every message that the package raises or warns of, up to what varies: where it stands."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "python").rglob("*.py")):
        if path.name == "testing.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            call: Any = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = ast.unparse(call.func)
            if not (isinstance(node, ast.Raise) or name in ("warnings.warn", "BadRow")) or name == "AttributeError":
                continue
            message = call.args[1] if name == "BadRow" else call.args[0]
            first = message.values[0] if isinstance(message, ast.JoinedStr) else message
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                head = re.split(r" must | cannot |[:;,(]", first.value)[0].strip().rstrip("'")
                if len(head) > 2:
                    found[head] = f"{path.name}:{node.lineno}"
    return found


def test_troubleshooting_names_every_error() -> None:
    page = text_of("how-to/troubleshooting.md")
    # A single word is the name of an argument, and stands in backticks or begins a message that is quoted.
    missing = {h: where for h, where in heads().items() if h not in page or (h.isidentifier() and f"`{h}" not in page)}
    assert not missing, "\n".join(f"{where}: {head}" for head, where in missing.items())
