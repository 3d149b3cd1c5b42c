"""The packages that this one may bring with it: their licences, for docs/project/dependencies.md, and known
vulnerabilities, by pip-audit. `make audit` runs it; it needs the network, and is in no test.

What an extra brings is read from the metadata of what is installed, down to the last dependency, for this machine and
this Python. With --list the page alone is written, without the network.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import subprocess
import sys
import tempfile
from pathlib import Path

import pages
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "project" / "dependencies.md"
OURS = "groupdpo-kernels"
# What a user installs; what builds, tests and documents the package goes nowhere with it.
EXTRAS = ("", "triton", "hf", "trl", "cli")


def brought(name: str, extra: str, found: set[str] | None = None) -> set[str]:
    """The installed packages that a package with this extra wants, and all that these want."""
    found = set() if found is None else found
    for line in metadata.requires(name) or ():
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        own = canonicalize_name(wanted.name)
        if own == OURS:
            for more in wanted.extras:
                brought(OURS, more, found)
            continue
        try:
            metadata.version(own)
        except metadata.PackageNotFoundError:
            continue  # of another machine, or of a torch with CUDA
        if own not in found:
            found.add(own)
            for more in ("", *wanted.extras):
                brought(own, more, found)
    return found


def licence(name: str) -> str:
    about = metadata.metadata(name)
    if stated := about.get("License-Expression"):
        return stated
    classes = [x.rpartition(" :: ")[2] for x in about.get_all("Classifier") or () if x.startswith("License ::")]
    stated = (about.get("License") or "").strip().splitlines()
    return " or ".join(classes) or (stated[0][:60] if stated else "not stated")


def table(by_extra: dict[str, set[str]]) -> str:
    lines = ["| package | version | licence | comes with |", "|---|---|---|---|"]
    for name in sorted(set().union(*by_extra.values())):
        extras = [extra or "the package" for extra, names in by_extra.items() if name in names]
        with_ = extras[0] if extras[0] == "the package" else ", ".join(extras)
        lines.append(f"| {name} | {metadata.version(name)} | {licence(name)} | {with_} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="write the page alone")
    parser.add_argument("--pip-audit", default="pip-audit", help="the program")
    options = parser.parse_args()
    by_extra = {extra: brought(OURS, extra) for extra in EXTRAS}
    pages.write(PAGE, "make audit", table(by_extra))
    if options.list:
        return 0
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        names = sorted(set().union(*by_extra.values()))
        file.write("".join(f"{name}=={metadata.version(name).partition('+')[0]}\n" for name in names))
        file.flush()
        return subprocess.run([options.pip_audit, "--strict", "--no-deps", "--disable-pip", "-r", file.name]).returncode


if __name__ == "__main__":
    sys.exit(main())
