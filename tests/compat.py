"""The versions that the package says it works with, each in an environment of its own, and the table of
docs/project/versions.md. `make compat` runs it.

From the environment in .venv one package at a time changes; what pip must change with it (the triton of a torch, the
hub library of a transformers) changes too. The rows are the axes and not their product. In each the same wheel is
installed, built once from this tree, and a slice of the tests runs on it. A row is written when it is there (a line of
JSON in build/compat/, in a file that is named by the wheel), so that a run that was stopped goes on where it was. The
page keeps a row of an earlier wheel, with its date, until that version is tried again.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pages
from kept_rows import add_row, read_rows

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "project" / "versions.md"
WORK = ROOT / "build" / "compat"


@dataclass(frozen=True)
class Axis:
    """Versions of one package, the slice of tests that each of them runs, and what pip may change with it."""

    versions: tuple[str, ...]
    slice: str  # arguments of pytest
    beside: str = ""  # requirements that move only where they must
    older: tuple[tuple[str, str], ...] = ()  # (version, a requirement that it has and does not state)

    def requirements(self, name: str, version: str) -> list[str]:
        stated = [requirement for of, requirement in self.older if of == version]
        return [f"{name}=={version}", *self.beside.split(), *stated]


GROUPS = "tests/test_trl_groups.py::test_strategies_and_layouts_give_one_gradient"
AXES = {
    "torch": Axis(
        ("2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0"),
        f"tests/test_csrc.py tests/test_ops.py {GROUPS} -k not inductor and not number_that_changes",
    ),
    "triton": Axis(
        ("3.6.0", "3.7.1", "3.8.0", "3.9.0"),
        "tests/test_interpreter.py tests/test_sparse_triton.py tests/test_frozen_head.py -k triton or interpreter",
        older=(("3.6.0", "numpy<2.4"),),  # its interpreter; kernels on a device need no numpy
    ),
    "transformers": Axis(
        ("5.2.0", "5.6.2", "5.12.1", "5.18.0", "5.23.0", "5.24.0"),
        f"tests/test_models.py {GROUPS} tests/test_trl_groups.py::test_a_peft_model_is_its_own_reference"
        " -k not minicpm3",  # which older ones do not have
        "trl>=1.15 peft>=0.18 accelerate datasets",
    ),
    "trl": Axis(
        ("1.15.0", "1.16.0"),
        "tests/test_trl_patch.py",  # `DPOTrainer` and the online trainer say that they want 1.16
        "transformers>=5 peft>=0.18 accelerate datasets",
    ),
}
RECORDED = (*AXES, "peft", "huggingface_hub", "numpy")  # packages whose version a row keeps


def rows() -> list[tuple[str, str]]:
    return [(name, version) for name, axis in AXES.items() for version in axis.versions]


def wheel() -> Path:
    """The package as it is installed from a file, built from this tree."""
    shutil.rmtree(WORK / "wheel", ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        WORK / "wheel",
        ROOT,
    ]
    subprocess.run(command, check=True, env=os.environ | {"GROUPDPO_KERNELS_BUILD": "1"})
    (found,) = (WORK / "wheel").glob("*.whl")
    return found


def contents(file: Path) -> str:
    """Of the wheel and the tests, without times."""
    found = hashlib.sha256()
    with zipfile.ZipFile(file) as archive:
        for name in sorted(archive.namelist()):
            found.update(archive.read(name))
    return found.hexdigest()[:12]


def environment(folder: Path, requirements: list[str], file: Path) -> Path:
    """A Python that has `requirements` and the wheel; all else it finds in the one that runs this, by a path."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    here = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "borrowed.pth").write_text("\n".join(here))  # a path, whose own .pth files (editable installs) rest
    pip = [python, "-m", "pip", "install", "-q", "--no-compile", "--no-cache-dir"]
    subprocess.run([*pip, *requirements], check=True)
    subprocess.run([*pip, "--no-deps", "--force-reinstall", file], check=True)
    return python


def versions(python: Path) -> dict[str, str]:
    program = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {RECORDED}}}))"
    return json.loads(subprocess.run([python, "-c", program], check=True, capture_output=True, text=True).stdout)


def tried(name: str, version: str, file: Path) -> dict[str, object]:
    """What a row of the table says: the versions that were there, and how many tests passed and failed."""
    folder = WORK / f"{name}-{version}"
    axis, began = AXES[name], time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        python = environment(folder, axis.requirements(name, version), file)
        row: dict[str, object] = {"package": name, "version": version, "beside": versions(python)}
        words, _, chosen = axis.slice.partition(" -k ")
        command = [python, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
        command += ["-m", "not gpu and not distributed", *words.split(), *(["-k", chosen] if chosen else [])]
        log = WORK / f"{name}-{version}.log"
        with log.open("w") as out:
            subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, check=False)
        summary = re.findall(r"^(.*) in [\d.]+s", log.read_text(), re.M)[-1:]  # other lines may follow
        counts = {what: int(n) for line in summary for n, what in re.findall(r"(\d+) (passed|failed|error)", line)}
        row |= {"passed": counts.get("passed", 0), "failed": counts.get("failed", 0) + counts.get("error", 0)}
    except subprocess.CalledProcessError as error:
        row = {"package": name, "version": version, "refused": f"cannot be installed: {error.cmd[-1]}"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a torch with CUDA takes five gigabytes
    today = datetime.date.today().isoformat()
    return row | {"date": today, "seconds": round(time.perf_counter() - began)}


def good(row: dict[str, object]) -> bool:
    return bool(row.get("passed")) and not row["failed"]


def table(found: dict[tuple[str, str], dict[str, object]], before: str) -> str:
    lines = ["| package | version | with | tests | date |", "|---|---|---|---|---|"]
    for key in rows():
        earlier = re.search(rf"^\| {key[0]} \| {re.escape(key[1])} \|.*$", before, re.M)
        if row := found.get(key):
            beside: dict[str, str] = row.get("beside", {})  # type: ignore[assignment]
            others = ", ".join(f"{n} {v}" for n, v in beside.items() if n in AXES and n != key[0])
            failed = f", {row['failed']} failed" if row.get("failed") else ""
            said = row.get("refused") or f"{row['passed']} passed{failed}"
            lines.append(f"| {key[0]} | {key[1]} | {others} | {said} | {row['date']} |")
        elif earlier:
            lines.append(earlier[0])
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression over `package version`")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    file = wheel()
    results = WORK / f"{contents(file)}.jsonl"
    found = {(row["package"], row["version"]): row for row in read_rows(results)}
    for key in rows():
        if key in found or not re.search(options.only, " ".join(key)):
            continue
        found[key] = tried(*key, file)
        add_row(results, found[key])
        print(json.dumps(found[key]), flush=True)
    pages.write(PAGE, "make compat", table(found, before=pages.written(PAGE, "make compat")))
    return 0 if all(map(good, found.values())) else 1


if __name__ == "__main__":
    raise SystemExit(main())
