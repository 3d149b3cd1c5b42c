"""All CASES through all kernels in the emulator, and the table of docs/project/emulation.md. `make emulate` runs it.

Each result is written when it is there (a line of JSON in build/emulated/, in a file that is named by the code that is
tested), so that a run that was stopped goes on where it was. `--only` takes the runs whose name matches a regular
expression; the table then has dashes for the others, unless they were run before.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages
import torch
import triton
from emulated_cases import PATHS, PREFERENCES, paths_of, run_case
from kept_rows import add_row, read_rows
from ptx_emulator import PtxError, reverse

from groupdpo_kernels.testing import CASES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "project" / "emulation.md"
ARCHITECTURES = ("sm_90", "sm_80")
MODES = {"late": True, "early": False}


def digest() -> str:
    """Of the kernels, of what runs them, and of the compiler's version."""
    paths = [
        path for folder in ("kernels/triton", "tests/ptx_emulator") for path in sorted((ROOT / folder).glob("*.py"))
    ]
    paths += [ROOT / "tests" / "emulated_cases.py", ROOT / "python" / "groupdpo_kernels" / "testing.py"]
    found = hashlib.sha256(triton.__version__.encode())
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def names() -> Iterator[tuple[str, str, str, str]]:
    """(path, case, architecture, mode); what shares compiled code side by side."""
    for case in CASES:
        for architecture in ARCHITECTURES:
            for path in paths_of(case):
                for mode in MODES:
                    yield path, case.name, architecture, mode
    for name in PREFERENCES:
        for architecture in ARCHITECTURES:
            for mode in MODES:
                yield "preference", name, architecture, mode


def judge(path: str, name: str, architecture: str, mode: str) -> str:
    """right, or what is wrong."""
    late = MODES[mode]
    try:
        # The order of programs is the GPU's affair too.
        run_case(path, name, architecture, late, order=range if late else reverse)
    except AssertionError as error:
        return "wrong: " + " ".join(str(error).split())[:300]
    except PtxError as error:
        return "refused: " + str(error).splitlines()[0][:300]
    return "right"


def run(results: Path, only: str) -> dict[tuple[str, ...], str]:
    done = {tuple(row["run"]): row["verdict"] for row in read_rows(results)}
    wanted = [key for key in names() if re.search(only, " ".join(key))]
    for k, key in enumerate(wanted, 1):
        if key in done:
            continue
        began = time.perf_counter()
        done[key] = judge(*key)
        seconds = round(time.perf_counter() - began, 1)
        add_row(results, {"run": key, "verdict": done[key], "seconds": seconds})
        print(f"{k} of {len(wanted)}: {' '.join(key)}: {done[key]} ({seconds} s)", flush=True)
    return {key: done[key] for key in names() if key in done}


def table(found: dict[tuple[str, ...], str]) -> str:
    """One row a case, a cell for each architecture and path: both extremes of time."""

    def cell(path: str, name: str, architecture: str) -> str:
        verdicts = [found.get((path, name, architecture, mode), "-").partition(":")[0] for mode in MODES]
        if len(set(verdicts)) == 1:
            return verdicts[0]
        return ", ".join(f"{mode} {verdict}" for mode, verdict in zip(MODES, verdicts))

    right, total = sum(verdict == "right" for verdict in found.values()), len(list(names()))
    columns = [(path, architecture) for architecture in ARCHITECTURES for path in PATHS]
    lines = [
        f"{len(found)} of {total} runs done, {right} of them right; Triton {triton.__version__}.",
        "",
        "| case | " + " | ".join(f"{architecture} {path}" for path, architecture in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for case in CASES:
        cells = [cell(path, case.name, architecture) for path, architecture in columns]
        lines.append(f"| `{case.name}` | " + " | ".join(cells) + " |")
    lines += ["", "| loss, way of balance | " + " | ".join(ARCHITECTURES) + " |", "|---|" + "---|" * len(ARCHITECTURES)]
    for name in PREFERENCES:
        lines.append(f"| {name} | " + " | ".join(cell("preference", name, a) for a in ARCHITECTURES) + " |")
    bad = {key: verdict for key, verdict in found.items() if verdict != "right"}
    if bad:
        lines += ["", "What is not right:", ""]
        lines += [f"- {' '.join(key)}: {verdict}" for key, verdict in bad.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression over `path case architecture mode`")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = ROOT / "build" / "emulated" / f"{digest()}.jsonl"
    found: dict[Any, str] = run(results, options.only)
    bad = [f"{' '.join(key)}: {verdict}" for key, verdict in found.items() if verdict != "right"]
    print(f"{len(found) - len(bad)} of {len(found)} runs right", *bad, sep="\n")
    pages.write(PAGE, "make emulate", table(found))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
