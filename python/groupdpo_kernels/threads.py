"""What the threads of a process share, and what a forked process finds of it.

    Lock         as threading.RLock; a forked process finds it open, whoever held it
    Change       a change of the process that begins with the first thread that wants it, and ends with the last
    of_this_one  a function for this thread alone; others keep the one that was there
    one_for_each one object for each of others, such as a lock for each model, made once and gone with it

The module knows nothing of models. It never waits for anything but a lock. It needs Python alone, and a microsecond.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Lock:
    """`with lock:` is for one thread at a time, which may hold it several times."""

    def __init__(self) -> None:
        self._renew()
        _locks.add(self)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        # In a process that was forked within the context, the lock is another one, which nobody holds.
        with contextlib.suppress(RuntimeError):
            self._lock.release()


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _open_all() -> None:
    for lock in list(_locks):
        lock._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open_all)


class Change:
    """`with change.held():` is a context that threads may enter in any order, and leave in any other. `context` is
    entered by the first of them, and left by the last."""

    def __init__(self, context: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self._context, self._lock, self._holders = context, Lock(), 0
        self._entered = contextlib.ExitStack()

    @contextlib.contextmanager
    def standing(self) -> Iterator[bool]:
        """A context in which nobody begins or ends the change: whether it is there."""
        with self._lock:
            yield self._holders > 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            if not self._holders:
                self._entered.enter_context(self._context())
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._entered.close()


def of_this_one(function: Callable[..., Any], others: Callable[..., Any]) -> Callable[..., Any]:
    """Calls `function` in the thread that asks for it now, and in any other thread the function `others`."""
    owner = threading.get_ident()

    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if threading.get_ident() == owner else others)(*args, **kwargs)

    return call


def one_for_each(make: Callable[[K], V]) -> Callable[[K], V]:
    """The function that gives make(key), the same object for each living key whichever thread asks first. The object
    must not hold its key."""
    table: weakref.WeakKeyDictionary[K, V] = weakref.WeakKeyDictionary()

    def of(key: K) -> V:
        found = table.get(key)
        return table.setdefault(key, make(key)) if found is None else found

    return of
