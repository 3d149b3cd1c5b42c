"""Replaces functions of another project by those of this package, and restores them.

Each module in this folder has one `Patch`, and two functions for users: `patch_<project>()` and
`unpatch_<project>()`. Before anything is replaced, `installed.check` compares the installed version and signatures with
those that the module was written for.

It never imports a project before it is patched, or leaves one half replaced. It needs the project alone. The cost is
one pass over the names in the project's modules at the beginning and at the end.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from ..threads import Lock


class Swap(NamedTuple):
    """The functions of a project that are replaced, and their replacements."""

    pairs: list[tuple[Any, Any]]  # (the project's, this package's)
    classes: tuple[type, ...] = ()  # classes with theirs as methods; modules need not be named


class Patch:
    """A patch of functions in all modules of a project, and of methods in its classes.

    Args:
        package: the project's top-level module.
        find: imports the project, checks it (ImportError, RuntimeError) and returns what to swap. It is called when
            the first patch begins. A module has one; one that is loaded again ends the patch that there was.
    """

    def __init__(self, package: str, find: Callable[[], Swap]) -> None:
        self._package, self._find = package, find
        self._lock = Lock()
        self._swap: Swap | None = None
        self._holds: set[Patched] = set()
        # A module that is loaded again would take what its former self has put in place for the project's own.
        if (former := _patches.get(find.__module__)) is not None:
            former.remove()
        _patches[find.__module__] = self

    def apply(self) -> Patched:
        return Patched(self).__enter__()

    def remove(self) -> None:
        """Restores the project's functions, however often `apply` was called; without a patch nothing happens."""
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
        """Replaces the first of each pair by the second, in the classes and under any name in the project's modules."""
        modules = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == self._package]
        for owner in (*(m for m in modules if isinstance(m, types.ModuleType)), *classes):
            for name, value in list(vars(owner).items()):
                for old, new in pairs:
                    if value is old:
                        setattr(owner, name, new)


_patches: dict[str, Patch] = {}  # by the module that each belongs to


class Patched(contextlib.AbstractContextManager["Patched"]):
    """The result of `patch_<project>()`. Leaving it as a context ends this patch; the project's own functions return
    when the last patch has ended, in any order and thread.
    """

    def __init__(self, patch: Patch) -> None:
        self._patch = patch

    def __enter__(self) -> Patched:
        self._patch._begin(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch._end(self)
