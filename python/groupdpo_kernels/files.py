"""Files that are there whole or not at all, and errors that say which file it was.

`replacing` and `write_json` write under another name, synchronise, then rename. `locked` keeps a second process away,
`check_writable` finds out before hours of work whether a folder can be written, and `naming` puts the path into an
error of the operating system that lacks it (a full disk).

It never shows a half-written file under its name, whenever the process dies and however many write at once, and never
removes what a living process writes. It needs a POSIX file system, on which a rename replaces. The cost is that of a
file and its synchronisation.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A context that adds the path to an OSError without one: a write to a full disk does not say where."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A context that yields a file to write in place of `path`. At its end the file is at `path`, whole and on disk;
    until then, and after an exception, `path` is as it was."""
    with naming(path):
        _remove_left_behind(path.parent)
        temporary = _beside(path)
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error counts: on a read-only disk this is a second one
                temporary.unlink(missing_ok=True)
            raise
        synchronise_folder(path.parent)


def synchronise_folder(folder: Path) -> None:
    """Puts the names of a folder on disk: a new file's name is an entry of its folder."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot synchronise folders
            os.fsync(opened)
    finally:
        os.close(opened)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON that is there whole or not at all. ValueError for a number that JSON lacks (NaN)."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as file:
        file.write(text.encode() + b"\n")


def check_writable(folder: Path) -> None:
    """Makes the folder if need be. An OSError that names it if no file can be made in it."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = _beside(folder / "writable")
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise OSError(error.errno, f"no file can be written here: {error.strerror}", str(folder)) from error


def locked(path: Path, what: Path) -> IO[bytes]:
    """Opens a file to append to, and locks it until it is closed. ValueError where another process holds the lock."""
    while True:
        file = open(path, "ab")  # noqa: SIM115  the caller closes it
        try:
            _lock(file.fileno(), what)
            # Its writer may have renamed it after it was opened here: the lock is then of another file.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """A context in which no other process can lock this folder. ValueError where one has."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        _lock(opened, folder)
        yield
    finally:
        os.close(opened)


def _lock(descriptor: int, what: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{what} is being written by another process") from None
    except OSError:
        pass  # a network file system without locks


def _beside(path: Path) -> Path:
    """A new name for what is written in place of `path`, which says who writes it."""
    return path.with_name(f".{path.name}~{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex}.tmp")


def _remove_left_behind(folder: Path) -> None:
    """Removes the temporary files that killed processes of this machine have left."""
    for path in folder.glob(f".*~{socket.gethostname()}~*~*.tmp"):
        try:
            os.kill(int(path.name.split("~")[-2]), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except PermissionError:
            pass  # the process lives, under another user
