"""Functions of another project, replaced by ours, and put back.

Each module beside this one has one `Patch`, and two functions for users: `patch_<project>()` and
`unpatch_<project>()`. Before anything is replaced, `installed.check` compares what is installed with what the module
was written for.

Never: imports a project before it is patched, or leaves one half replaced. Needs nothing but the project. Cost: one
pass over the names of the project's modules at the beginning and at the end.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Callable
from typing import Any, NamedTuple


class Swap(NamedTuple):
    """What a project looks up at each call, and what it shall find."""

    pairs: list[tuple[Any, Any]]  # (theirs, ours)
    classes: tuple[type, ...] = ()  # those with theirs as methods; modules are found by themselves


class Patch:
    """Of functions in all modules of a project, and of methods in classes of it.

    Args:
        package: the project's top-level module.
        find: imports the project, checks it (ImportError, RuntimeError) and says what to swap. Called when the first
            patch begins.
    """

    def __init__(self, package: str, find: Callable[[], Swap]) -> None:
        self._package, self._find = package, find
        self._lock = threading.RLock()
        self._swap: Swap | None = None
        self._holds: set[Patched] = set()

    def apply(self) -> Patched:
        return Patched(self).__enter__()

    def remove(self) -> None:
        """Theirs are back, whoever has called `apply` and however often. Without it, nothing happens."""
        with self._lock:
            if self._swap is not None:
                self._put([(ours, theirs) for theirs, ours in self._swap.pairs], self._swap.classes)
            self._holds.clear()
            self._swap = None

    def _begin(self, hold: Patched) -> None:
        with self._lock:
            if not self._holds:
                self._swap = self._find()
                self._put(self._swap.pairs, self._swap.classes)
            self._holds.add(hold)

    def _end(self, hold: Patched) -> None:
        with self._lock:
            if self._holds == {hold}:
                self.remove()
            self._holds.discard(hold)

    def _put(self, pairs: list[tuple[Any, Any]], classes: tuple[type, ...]) -> None:
        """In every module of the project that holds the first of a pair, under whatever name, and in the classes."""
        modules = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == self._package]
        for owner in (*(m for m in modules if isinstance(m, types.ModuleType)), *classes):
            for name, value in list(vars(owner).items()):
                for old, new in pairs:
                    if value is old:
                        setattr(owner, name, new)


class Patched(contextlib.AbstractContextManager["Patched"]):
    """What `patch_<project>()` returns. Leaving it as a context ends this patch; the project's own functions are back
    when the last patch has ended, in whatever order and thread.
    """

    def __init__(self, patch: Patch) -> None:
        self._patch = patch

    def __enter__(self) -> Patched:
        self._patch._begin(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch._end(self)
