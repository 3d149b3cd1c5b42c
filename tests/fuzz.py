"""Wrong inputs by the ten thousand, and the table of docs/project/fuzzing.md. `make fuzz` runs it; parts of it are in
`make test` (test_fuzz.py).

    rows        rows of preferences, made wrong in one to three places (hypothesis)     fuzz_rows.py
    bytes       JSONL files with bytes changed by a mutator of our own                  fuzz_bytes.py
    atheris     JSONL files with bytes changed by what they reach in our code           fuzz_bytes.py
    ops         the C++ ops under torch.ops, in processes that may die                  fuzz_tensors.py
    arguments   public functions and constructors, each argument with each wrong value  fuzz_arguments.py
    commands    every option of every command
    memory      a line of a gigabyte, and a million rows: peak of resident memory

A part ends with a line of what it tried and what it found. Each kind of fault that was ever found has a test by itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pages

os.environ["HF_HUB_OFFLINE"] = "1"  # a wrong name of a model is looked for on the hub, for minutes

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "project" / "fuzzing.md"
WORK = ROOT / "build" / "fuzz"  # the row of each part, so that parts can run one by one
# How many inputs at --scale 1.
COUNTS = {"rows": 6_000, "bytes": 90_000, "atheris": 8_000, "ops": 8_000}
Found = tuple[int, list[str], str]  # inputs tried, faults, a remark


def rows(count: int, seed: int) -> Found:
    import hypothesis
    from fuzz_rows import fault_of, wrong_rows

    faults = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(wrong_rows())
    def run(row: Any) -> None:
        if fault := fault_of(row):
            faults.append(fault)

    run()
    return count, faults, ""


def bytes_(count: int, seed: int) -> Found:
    from fuzz_bytes import fault_of, mutated

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        found = [fault_of(mutated(random.Random(f"{seed}:{i}")), path) for i in range(count)]
    return count, [fault for fault in found if fault], ""


def script(name: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
    command = [sys.executable, "-W", "ignore", ROOT / "tests" / name, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True, errors="replace"
    )


def atheris(count: int, seed: int) -> Found:
    done = script("fuzz_bytes.py", seed, count)
    faults = re.findall(r"^fault: .*", done.stdout, re.M)
    if done.returncode:
        faults.append(f"the process ended with {done.returncode}: {done.stderr[-500:]}")
    covered = re.findall(r"DONE +cov: (\d+)", done.stderr)
    return count, faults, f"{covered[-1]} branches of our code" if covered else ""


def ops(count: int, seed: int) -> Found:
    """In pieces: a process that dies says where it was, and the next goes on."""
    piece, faults = 2000, []
    for k in range(-(-count // piece)):
        done = script("fuzz_tensors.py", seed + k, min(piece, count - k * piece))
        lines = done.stdout.splitlines()
        if "done" in lines:
            faults += lines[lines.index("done") + 1 :]
        else:
            faults.append(f"the process ended with {done.returncode} {lines[-1:]}: {done.stderr[-500:]}")
    return count, faults, "no process died" if not any("process ended" in fault for fault in faults) else ""


def arguments(count: int, seed: int) -> Found:
    done = script("fuzz_arguments.py")
    tried = re.findall(r"^tried (\d+)", done.stdout, re.M)
    faults = re.findall(r"^fault: .*", done.stdout, re.M)
    if not tried:
        faults.append(f"the process ended with {done.returncode}: {done.stderr[-500:]}")
    return int(tried[0]) if tried else 0, faults, ""


# What a command is given beside the option: never enough to run for long.
ENOUGH = {
    "logps": ("/no/such/model", "no-rows.jsonl", "out.jsonl"),
    "train": ("--model", "/no/such/model", "--data", "no-rows.jsonl", "--out", "out"),
    "profile": ("--model", "/no/such/model.json", "--groups", "2"),
    "plan": ("--model", "/no/such/model.json", "--groups", "2"),
    "report": ("no-figures.jsonl",),
    "check": ("--no-test",),
}
TEXTS = (
    "",
    " ",
    "text",
    "-1",
    "0",
    "nan",
    "inf",
    "1e999",
    "9" * 40,
    "true",
    "[]",
    "{}",
    "a\tb",
    "\u202e",
    "é" * 500,
    "../../x",
    "/dev/null",
    "1,2,x",
    "None",
)


def commands(count: int, seed: int) -> Found:
    """Every option with every text: it is refused with one message and status 2, or taken."""
    import typer
    from typer.testing import CliRunner

    from groupdpo_kernels.cli.app import app

    tried, faults = 0, []
    group: Any = typer.main.get_command(app)
    with tempfile.TemporaryDirectory() as folder:
        here = Path.cwd()
        os.chdir(folder)
        try:
            for name, command in group.commands.items():
                for parameter in command.params:
                    flag = next((x for x in parameter.opts if x.startswith("--")), None)
                    if flag is None or parameter.is_eager:
                        continue
                    for text in TEXTS if not parameter.is_flag else ("x",):
                        tried += 1
                        result = CliRunner().invoke(app, [name, *ENOUGH[name], flag, text])
                        if not (result.exception is None or isinstance(result.exception, SystemExit)):
                            kind = type(result.exception).__name__
                            faults.append(f"{name} {flag} {text!r:.20}: {kind}: {result.exception!s:.200}")
                        elif result.exit_code not in (0, 2):
                            faults.append(f"{name} {flag} {text!r:.20}: ends with {result.exit_code}")
        finally:
            os.chdir(here)
    return tried, faults, ""


_MEMORY = """
import json, resource, sys
from pathlib import Path
from groupdpo_kernels.cli.loading import jsonl
from groupdpo_kernels.data import read_groups
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
path, before, groups, said = Path(sys.argv[1]), peak(), 0, ""
try:
    for _ in read_groups(jsonl(path)): groups += 1
except ValueError as error:
    said = str(error)
print(json.dumps([groups, said, peak() - before]))
"""


def memory(count: int, seed: int) -> Found:
    """Mebibytes beyond what the imports take."""
    from groupdpo_kernels.cli.loading import LONGEST_LINE

    def measured(path: Path) -> Any:
        done = subprocess.run([sys.executable, "-c", _MEMORY, path], capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    faults = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("wb") as file:
            file.write(b'{"prompt": "')
            file.truncate(2**30)  # a hole: NUL bytes that take no disk
        groups, said, line = measured(path)
        if groups or "must have at most" not in said or line > 3 * LONGEST_LINE // 2**20:
            faults.append(f"a line of 1 GiB: {said!r:.100}, {line} MiB")
        with path.open("w") as out:
            for i in range(1_000_000):
                out.write(f'{{"prompt": "Question {i}?", "chosen": "Yes, {i}.", "rejected": "No."}}\n')
        groups, said, many = measured(path)
        if groups != 1_000_000 or many > 64:
            faults.append(f"a million rows: {groups} groups, {said!r:.100}, {many} MiB")
    return 2, faults, f"a line of 1 GiB is refused within {line} MiB; a million rows take {many} MiB"


PARTS: dict[str, Callable[[int, int], Found]] = {
    "rows": rows,
    "bytes": bytes_,
    "atheris": atheris,
    "ops": ops,
    "arguments": arguments,
    "commands": commands,
    "memory": memory,
}


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = ["| part | inputs | faults | seconds | | date |", "|---|---|---|---|---|---|"]
    for name in PARTS:
        if row := found.get(name):
            cells = (name, row["tried"], len(row["faults"]), row["seconds"], row["remark"], row["date"])
            lines.append(f"| {' | '.join(map(str, cells))} |")
    tried, faults = sum(row["tried"] for row in found.values()), sum(len(row["faults"]) for row in found.values())
    return "\n".join([*lines, f"| all | {tried} | {faults} | | | |"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of parts, with commas between")
    parser.add_argument("--scale", type=float, default=1.0, help="a factor of the numbers of inputs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    wrong = False
    for name in options.only.split(",") if options.only else PARTS:
        began = time.perf_counter()
        tried, faults, remark = PARTS[name](round(options.scale * COUNTS.get(name, 0)), options.seed)
        print(f"{name}: tried {tried}, found {len(faults)} {remark}", *sorted(set(faults)), sep="\n  ", flush=True)
        wrong |= bool(faults)
        row = {"tried": tried, "faults": faults, "remark": remark, "seconds": round(time.perf_counter() - began)}
        row["date"] = datetime.date.today().isoformat()
        (WORK / f"{name}.json").write_text(json.dumps(row))
    found = {path.stem: json.loads(path.read_text()) for path in WORK.glob("*.json")}
    pages.write(PAGE, "make fuzz", table(found))
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
