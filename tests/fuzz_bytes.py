"""Bytes in the place of a JSONL file: what the commands read from disk.

    python tests/fuzz_bytes.py 0 20000    # a seed, and a number of files, mutated by atheris

A file is refused by a ValueError that names it, or gives the rows that JSON itself reads from its lines.
"""

from __future__ import annotations

import json
import math
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz_rows import ROWS

from groupdpo_kernels.cli.loading import jsonl
from groupdpo_kernels.cli.scoring import read as read_for_scoring
from groupdpo_kernels.data import read_groups

LINES = [json.dumps(row) for row in ROWS.values()]
ENCODINGS = ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1")
# What a writer, an editor or a disk leaves in a file.
PIECES = (
    *(
        b"\x00",
        b"\xff",
        b"\xfe\xff",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\r",
        b"\r\n",
        b"\n\n",
        b"\\ud800",
        b"\\u0000",
        b"\xed\xa0\x80",
    ),
    *(
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"9" * 5000,
        b"[" * 2000,
        b'{"a":' * 2000,
        b'"a":1,"a":2',
        b"null",
        b"true",
        b"{}",
        b"[]",
    ),
    *(b"\xe2\x80\xa8", b"\x85", b"\xc0\x80", b"'", b"//", b",", b'"', b"\\"),
)


def mutated(rng: random.Random) -> bytes:
    """A valid file with some bytes changed: the mutator of the slice in `make test`, which has no atheris."""
    text = "\n".join(rng.choice(LINES) for _ in range(rng.randint(1, 3))) + rng.choice(("", "\n"))
    data = bytearray(text.encode(rng.choice(ENCODINGS)))
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            data[at:at] = rng.choice(PIECES)
        elif kind == 1:
            del data[at : at + rng.randint(1, 8)]
        elif kind == 2 and at < len(data):
            data[at] = rng.randrange(256)
        else:
            data[at:at] = data[at : at + rng.randint(1, 40)]
    return bytes(data)


def _by_json(data: bytes) -> Iterator[Any]:
    for line in data.decode("utf-8-sig").split("\n"):
        if line.strip():
            yield json.loads(line)


def _equal(a: Any, b: Any) -> bool:
    """Also where both hold NaN."""
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return [*a] == [*b] and all(_equal(a[name], b[name]) for name in a)
    return bool(a == b) and type(a) is type(b)


def fault_of(data: bytes, path: Path) -> str:
    """What is wrong with how a file of these bytes is read, or ""."""
    path.write_bytes(data)
    try:
        rows = [*jsonl(path)]
    except ValueError as error:
        rows = []
        if not str(error).startswith(str(path)):
            return f"no file in: {error}"
    except Exception as error:
        return f"jsonl: {type(error).__name__}: {error!s:.200}"
    else:
        if (
            data[:2] not in (b"\xff\xfe", b"\xfe\xff")
            and data[:4] != b"\x00\x00\xfe\xff"
            and not _equal(rows, [*_by_json(data)])
        ):
            return "jsonl reads other rows than JSON"
    for row in rows:
        try:
            [*read_groups(row)]
        except ValueError as error:
            if not str(error).startswith("row 0: the columns must be"):
                return f"read_groups: {error}"
        except Exception as error:
            return f"read_groups: {type(error).__name__}: {error!s:.200}"
    try:
        [*read_for_scoring(path, "drop")]
    except ValueError as error:
        return "" if str(error).startswith(str(path)) else f"read: {error}"
    except Exception as error:
        return f"read: {type(error).__name__}: {error!s:.200}"
    return ""


def main(seed: int, count: int) -> int:
    """Runs atheris, which follows the branches of our code that an input takes, from a corpus of mutated files."""
    import atheris

    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    path, corpus = folder / "rows.jsonl", folder / "corpus"
    corpus.mkdir()
    rng = random.Random(seed)
    for i in range(200):
        (corpus / str(i)).write_bytes(mutated(rng))
    from groupdpo_kernels.cli import loading
    from groupdpo_kernels.data import formats, rules

    for module in (loading, formats, rules):
        for name, thing in vars(module).items():
            if callable(thing) and getattr(thing, "__module__", "") == module.__name__ and hasattr(thing, "__code__"):
                setattr(module, name, atheris.instrument_func(thing))

    def test(data: bytes) -> None:
        if fault := fault_of(data, path):
            print(f"fault: {fault}: {data!r:.300}", flush=True)

    atheris.Setup([sys.argv[0], f"-runs={count}", f"-seed={seed + 1}", "-max_len=8192", str(corpus)], test)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*map(int, sys.argv[1:])))
