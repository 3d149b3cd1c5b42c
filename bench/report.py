"""What the benchmark writes: the JSON, the machine it ran on, and the tables, in Markdown ready for the README."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.measure import MODES, RANDOM
from bench.peers import PACKAGES
from groupdpo_kernels.memory.machine import device_name, versions
from groupdpo_kernels.testing import Case

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


@dataclass
class Report:
    """Rows hold the shape, dtype, mode, implementation and status; then the figures, or why there are none.

    status: ok; red (wrong, so no figure); unavailable; failed; running or gated in a run that was cut short.
    """

    head: dict[str, Any]
    path: Path | None
    rows: list[Row] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    complete: bool = False

    def write(self) -> None:
        if self.path is None:
            return
        content = self.head | {"complete": self.complete, "skipped": self.skipped, "rows": self.rows}
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(self.path)  # whole or not at all, also in a run that is killed


# ------------------------------------------------------------------------------------------------------------ tables


def dtype_name(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


def title(case: Case, profile: str = RANDOM) -> str:
    cap = "" if case.softcap is None else f", softcap {case.softcap:g}"
    rows = "" if profile == RANDOM else f", {profile} rows"
    return f"{case.name}: {case.T} x {case.D} x {case.V} {dtype_name(case)}{cap}{rows}"


def tables(cases: list[Case], modes: list[str], rows: list[Row]) -> str:
    """One table a shape: milliseconds, their ratio to the limit, and extra MiB, of each mode."""
    heading = {"forward": "forward, no grad", "trained": "both, trained head", "frozen": "both, frozen head"}
    lines = []
    for case in cases:
        of_case = [r for r in rows if r["shape"] == case.name and r["dtype"] == dtype_name(case)]
        shown = [m for m in modes if any(r["mode"] == m for r in of_case)]
        if not shown:
            continue
        products = {m: f"{MODES[m]} product{'s' if MODES[m] > 1 else ''}" for m in shown}
        columns = [f"{heading[m]}, ms (/ {products[m]}) | extra MiB" for m in shown]
        lines += ["", f"**{title(case, of_case[0]['profile'])}**", "", f"| implementation | {' | '.join(columns)} |"]
        lines.append("|---" * (1 + 2 * len(shown)) + "|")
        for name in dict.fromkeys(r["implementation"] for r in of_case):
            by_mode = {r["mode"]: r for r in of_case if r["implementation"] == name}
            lines.append(f"| {name} | " + " | ".join(_cells(by_mode.get(m)) for m in shown) + " |")
    return "\n".join(lines)


def _cells(row: Row | None) -> str:
    """Two cells: time and memory."""
    if row is None:
        return " | "
    extra = f"{row['extra_mib']:.0f}" if "extra_mib" in row else ""
    if row["status"] != "ok":
        why = row.get("why", "")
        return f"{row['status']}: {why} | " if row["status"] in ("red", "failed") else f"{why} | {extra}"
    ms = row["both_ms"]["median"]
    return f"{f'{ms:.0f}' if ms >= 100 else f'{ms:#.3g}'} ({row['ratio']['median']:.2f}) | {extra}"


# ------------------------------------------------------------------------------------------------------- the machine


def header(device: torch.device) -> dict[str, Any]:
    gpu = None
    if device.type == "cuda":
        gpu = _output("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader")
        memory = "peak of the CUDA allocator"
    else:
        memory = "resident high-water mark of a fresh process; allocator_extra_mib is PyTorch's allocations alone"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "device": device_name(device),
        "driver, max clock, power limit": gpu,
        "versions": versions(PACKAGES),
        "memory_by": memory,
    }


def directory(device_name: str) -> str:
    """ "NVIDIA H200" is h200, "AMD Instinct MI300X" is instinct-mi300x."""
    short = re.sub(r"^(nvidia|amd)\b", "", device_name.lower())
    return re.sub(r"[^a-z0-9]+", "-", short).strip("-")


def output_path(json_path: Path | None, results: Path | None, device: torch.device, kind: str = "") -> Path | None:
    """Of the options --json and --results, the first that is given; its folder is made."""
    path = json_path or (results_path(results, device, kind) if results else None)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def results_path(results: Path, device: torch.device, kind: str = "") -> Path:
    """results/<device>/<date><kind>.json, with a number where that exists: results are never overwritten. Any CPU is
    cpu.
    """
    name = directory(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu"
    date = f"{datetime.now(timezone.utc):%Y-%m-%d}{kind}"
    names = [f"{date}.json", *(f"{date}-{i}.json" for i in range(2, 1000))]
    return next(results / name / x for x in names if not (results / name / x).exists())


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
