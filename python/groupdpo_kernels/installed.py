"""Checks whether the installed version of another project is one that a module here was written for.

Names of other projects may be private, and what they do may change, so versions and signatures are compared before they
are used.

It never imports a project before it is asked to, and needs the standard library alone. The cost is that import.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

REQUIRED = inspect.Parameter.empty  # in a record of parameters, for one without a default

Versions = tuple[tuple[int, int], tuple[int, int]]  # from, up to but without


def imported(package: str, project: str, how: str) -> Any:
    """The module `package`, or an ImportError that says how to install the project."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise ImportError(f"{project} is not installed: {how}") from error


def distribution_version(name: str) -> str:
    """The version of an installed distribution; "unknown" where there is none, as for a source tree on sys.path."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def wanted(who: str, project: str, supported: Versions | None) -> str:
    if supported is None:
        return f"{who} knows one {project}"
    at_least, before = (".".join(map(str, version)) for version in supported)
    return f"{who} knows {project} {at_least} and later, before {before}"


def check(
    who: str,  # the function that the error names
    project: str,
    found: str,  # the installed version
    supported: Versions | None,  # None where the project's version says nothing
    *functions: tuple[Callable[..., Any], Mapping[str, Any]],  # (function of the project, {parameter: default})
) -> None:
    """RuntimeError if the version is not at least the first and before the second of `supported`, or if a function's
    parameters (self and ctx aside) have other names, another order or other defaults."""
    knows = wanted(who, project, supported)
    version = re.match(r"(\d+)\.(\d+)", found)
    if supported and not (version and supported[0] <= (int(version[1]), int(version[2])) < supported[1]):
        raise RuntimeError(f"{knows}; installed is {found}")
    for function, expected in functions:
        parameters = inspect.signature(function).parameters.values()
        actual = {p.name: p.default for p in parameters if p.name not in ("self", "ctx")}
        if list(actual.items()) != list(expected.items()):
            raise RuntimeError(
                f"{knows}, whose {function.__qualname__} takes ({', '.join(expected)}); in the installed {found}"
                f" it takes ({', '.join(actual)}) or has other defaults"
            )


def installed_trl(who: str, supported: Versions) -> Any:
    """The module trl, if its version is at least the first and before the second; else ImportError or RuntimeError."""
    trl = imported("trl", "TRL", "pip install 'groupdpo-kernels[trl]'")
    check(who, "TRL", trl.__version__, supported)
    return trl
