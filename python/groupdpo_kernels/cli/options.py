"""Options of a command that come from the fields of a dataclass: their names, types, defaults and help.

    def plan(workload: dict[str, Any] = options_of("memory.workload.Workload"), ...) -> None:
        Workload(**workload)

The help is the field's text in the Args section of the class's docstring. The class is read from its source and is not
imported, because its module imports torch, for which `--help` must not wait. It never reads fields that a class
inherits.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import typer

# Types that an option can have; of several that a field allows, the first.
TYPES = {"str": str, "float": float, "int": int, "bool": bool}


class Options:
    """The parameters that stand for the fields of `cls`, which `where` names."""

    def __init__(self, where: str, parameters: list[inspect.Parameter]) -> None:
        self.where, self.parameters = where, parameters


def options_of(
    where: str,
    *,
    but: Collection[str] = (),
    flags: Mapping[str, str] | None = None,
    unset: bool = False,
    **defaults: Any,
) -> Any:
    """The default of a command's parameter that takes a dict of the values of a dataclass's fields.

    A field whose type is a Literal is a choice. One whose type is none of `TYPES`, alone or with others or None, is no
    option.

    Args:
        where: the module below the package, and the class in it, with a dot between.
        but: names of fields that are no options, because the command decides them.
        flags: names of options that do not follow from the field's, such as "--bf16/--fp32".
        unset: whether an option that is not given is None, for a file to decide; its help tells the default.
        defaults: values in place of the fields' own defaults.
    """
    module, _, name = where.rpartition(".")
    source = Path(__file__).parent.parent.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    found = re.search(rf"^class {name}\b.*\n(?:[ \t].*\n|\n)+", source, re.MULTILINE)
    assert found is not None, where
    (cls,) = ast.parse(found[0]).body
    assert isinstance(cls, ast.ClassDef)
    args = (ast.get_docstring(cls) or "").partition("Args:\n")[2]
    texts = {name: " ".join(text.split()) for name, text in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", args, re.M)}
    parameters = []
    for field in cls.body:
        if not isinstance(field, ast.AnnAssign) or (name := ast.unparse(field.target)) in but:
            continue
        annotation = ast.unparse(field.annotation)
        allowed = annotation.split(" | ")
        choices = ast.literal_eval(annotation.removeprefix("Literal")) if annotation.startswith("Literal[") else None
        kind: Any = str if choices else next((kind for word, kind in TYPES.items() if word in allowed), None)
        if kind is None:
            continue
        default = ... if field.value is None else _constant(field.value)
        default, text = defaults.get(name, default), texts.get(name, "").replace("`", "")
        if unset and default not in (None, ...):
            text += f" Default: {('no', 'yes')[default] if isinstance(default, bool) else default}."
        if unset or "None" in allowed:
            kind = kind | None
        option = typer.Option(
            None if unset else default,
            *(flags or {}).get(name, "").split(),
            help=text[:1].upper() + text[1:],
            parser=choice_of(choices) if choices else number_or_text if {"int", "str"} <= set(allowed) else None,
        )
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind))
    return Options(where, parameters)


def _constant(written: ast.expr) -> Any:
    """What is written: a constant, or a power of two."""
    if isinstance(written, ast.BinOp) and isinstance(written.op, ast.Pow):
        return _constant(written.left) ** _constant(written.right)
    return ast.literal_eval(written)


def choice_of(values: list[Any]) -> Callable[[Any], Any]:
    """A parser of one of these values, which are text, True and False."""
    by_text = {str(value).lower(): value for value in values}

    def parse(given: Any) -> Any:
        if str(given).lower() not in by_text:
            raise typer.BadParameter(f"{given!r} is not one of {', '.join(by_text)}")
        return by_text[str(given).lower()]

    return parse


def number_or_text(given: str) -> int | str:
    return int(given) if given.isdecimal() else given


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with a parameter for each field in place of its parameters that take dicts of them."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, list[str]] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if isinstance(parameter.default, Options):
            parameters += parameter.default.parameters
            groups[parameter.name] = [field.name for field in parameter.default.parameters]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        taken = {group: {name: given.pop(name) for name in names} for group, names in groups.items()}
        return command(**given, **taken)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run
