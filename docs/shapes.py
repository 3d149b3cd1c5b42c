"""An extension of griffe, which reads the code for the reference pages: what the code says of a tensor in a comment
behind it, its shape, stands in the reference too.

    hidden: Tensor,  # (..., D)

becomes part of the description of the argument `hidden`, and such a comment behind the field of a class is the field's
description. Needs griffe. Never imports or changes the code.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

PARAMETER = re.compile(r"^ {4,8}\*{0,2}(\w+):[^#]*  # (.+)$")
RESULT = re.compile(r"^ *\) -> [^#]*:  # (.+)$")


class Shapes(griffe.Extension):
    """Comments of signatures and fields as documentation."""

    def on_function(self, *, func: griffe.Function, **more: Any) -> None:
        if func.docstring is None or not func.is_public:
            return
        text, entries = func.docstring.value, []
        for line in func.lines:
            if (found := PARAMETER.match(line)) and (shape := shape_of(found[2])):
                name = found[1]
                described = re.compile(rf"^(    {name}: )", re.MULTILINE)
                if described.search(text):
                    text = described.sub(lambda entry, shape=shape: f"{entry[1]}{shape}: ", text)
                else:
                    entries.append(f"    {name}: {shape}.")
            elif found := RESULT.match(line):
                text += f"\n\nReturns:\n    {shape_of(found[1])}."
            if line.lstrip().startswith(")"):
                break
        if entries and "\nArgs:\n" in text:
            text = text.replace("\nArgs:\n", "\n".join(["\nArgs:", *entries, ""]), 1)
        elif entries:
            head, *rest = text.split("\n\nReturns:\n")
            text = "\n\nReturns:\n".join(["\n".join([head, "", "Args:", *entries]), *rest])
        func.docstring.value = text

    def on_attribute(self, *, attr: griffe.Attribute, **more: Any) -> None:
        owner = attr.parent
        if attr.docstring or not (owner and owner.is_class) or attr.name.startswith("_") or not attr.lineno:
            return
        if found := PARAMETER.match(attr.lines[0]):
            attr.docstring = griffe.Docstring(shape_of(found[2]), parent=attr, lineno=attr.lineno)


def shape_of(comment: str) -> str:
    """The comment with its shape as code, without what is said to a linter."""
    comment = re.sub(r"(?: +#)? *(?:noqa|type: ignore).*", "", comment).strip()
    return re.sub(r"^(\([^()]*\)(?:, \([^()]*\))*)", r"`\1`", comment) or comment
