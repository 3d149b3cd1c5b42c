"""What of another project is replaced by ours, when that is refused, and the way back.

A module that replaces something has one `Replacement`; its `accelerate` and `restore` are what users call. Before
anything is replaced, `check` compares what is installed with what the module was written for: names of other projects
may be private, and what stands behind them may change.

Never: imports a project before `accelerate()`, or leaves one half replaced. Cost: one pass over the names of the
project's modules at the beginning and at the end.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import re
import sys
import threading
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

REQUIRED = inspect.Parameter.empty  # in a record of parameters: no default

Versions = tuple[tuple[int, int], tuple[int, int]]  # from, to before


class Swap(NamedTuple):
    """What a project looks up at each call, and what it shall find."""

    pairs: list[tuple[Any, Any]]  # (theirs, ours)
    classes: tuple[type, ...] = ()  # those with theirs as methods; modules are found by themselves


class Replacement:
    """Of functions in all modules of a project, and of methods in classes of it.

    Args:
        package: the project's top-level module.
        find: imports the project, checks it (ImportError, RuntimeError) and says what to swap. Called when the first
            acceleration begins.
    """

    def __init__(self, package: str, find: Callable[[], Swap]) -> None:
        self._package, self._find = package, find
        self._lock = threading.RLock()
        self._swap: Swap | None = None
        self._holds: set[Acceleration] = set()

    def accelerate(self) -> Acceleration:
        return Acceleration(self).__enter__()

    def restore(self) -> None:
        """Theirs are back, whoever has called `accelerate` and however often. Without it, nothing happens."""
        with self._lock:
            if self._swap is not None:
                self._put([(ours, theirs) for theirs, ours in self._swap.pairs], self._swap.classes)
            self._holds.clear()
            self._swap = None

    def _begin(self, hold: Acceleration) -> None:
        with self._lock:
            if not self._holds:
                self._swap = self._find()
                self._put(self._swap.pairs, self._swap.classes)
            self._holds.add(hold)

    def _end(self, hold: Acceleration) -> None:
        with self._lock:
            if self._holds == {hold}:
                self.restore()
            self._holds.discard(hold)

    def _put(self, pairs: list[tuple[Any, Any]], classes: tuple[type, ...]) -> None:
        """In every module of the project that holds the first of a pair, under whatever name, and in the classes."""
        modules = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == self._package]
        for owner in (*(m for m in modules if isinstance(m, types.ModuleType)), *classes):
            for name, value in list(vars(owner).items()):
                for old, new in pairs:
                    if value is old:
                        setattr(owner, name, new)


class Acceleration(contextlib.AbstractContextManager["Acceleration"]):
    """What `accelerate()` returns. Leaving it as a context ends this acceleration; the project's own is back when the
    last one has ended, in whatever order and thread.
    """

    def __init__(self, replacement: Replacement) -> None:
        self._replacement = replacement

    def __enter__(self) -> Acceleration:
        self._replacement._begin(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._replacement._end(self)


# ----------------------------------------------------------------------------------------------------------- their side


def imported(package: str, project: str, how: str) -> Any:
    """The module `package`; ImportError that says how to install the project where there is none."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise ImportError(f"{project} is not installed: {how}") from error


def distribution_version(name: str) -> str:
    """Of an installed distribution; "unknown" where there is none, as for a source tree on sys.path."""
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
    who: str,  # refuses
    project: str,
    found: str,  # version
    supported: Versions | None,  # None: the project's version says nothing
    *functions: tuple[Callable[..., Any], Mapping[str, Any]],  # of the project, and {parameter: default}
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
