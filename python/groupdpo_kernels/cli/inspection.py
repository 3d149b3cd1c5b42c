"""Gathers and prints what `check` shows: versions, devices, implementations and why not others, the self-test."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import __version__
from ..lm_head.api import explain
from ..lm_head.extension import cuda_extension_why_not, extension_why_not
from ..preference import fused
from .selftest import Outcome, probe, self_test

PACKAGES = ("triton", "transformers", "trl", "peft", "accelerate", "datasets", "typer", "rich", "matplotlib")
DTYPES = (torch.float32, torch.bfloat16)


# ----------------------------------------------------------------------------------------------------------- gathering


def versions() -> dict[str, str | None]:
    """The versions of Python, torch, this package, and of what its extras install; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    found["groupdpo_kernels"] = __version__
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def describe_machine() -> dict[str, Any]:
    """Versions, extension, devices, and what impl="auto" picks on each device, as plain values."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "extension": _extension(),
        "devices": [_device(device) for device in devices()],
        "no_gpu": [] if torch.cuda.is_available() else [_why_no_gpu()],
        "auto": [row for device in devices() for row in _choices(device)],
    }


def _extension() -> dict[str, Any]:
    if reasons := extension_why_not():
        return {"built": False, "cuda": False, "why_not": reasons}
    info = dict(importlib.import_module("groupdpo_kernels._C").build_info())
    cuda = bool(info["cuda_architectures"])
    reasons = cuda_extension_why_not(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {"built": True, "cuda": cuda, **info, "cuda_why_not": reasons}


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        about = {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": capability,
            "units": units(),
        }
        return {"device": "cpu", "name": _processor(), **about}
    found = torch.cuda.get_device_properties(device)
    capability = f"sm_{found.major}{found.minor}" if torch.version.hip is None else found.gcnArchName
    return {"device": str(device), "name": found.name, "memory_bytes": found.total_memory, "capability": capability}


# Environment variables that change which instructions a library uses.
SWITCHES = (
    "GROUPDPO_KERNELS_CPU_CAPABILITY",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
    "OPENBLAS_CORETYPE",
)


def units() -> dict[str, Any]:
    """Which units of the processor are used by torch's own loops, by the C++ op's and for bfloat16 GEMMs, and which of
    SWITCHES are set.
    """
    found: dict[str, Any] = {"torch": torch.backends.cpu.get_cpu_capability()}
    if not extension_why_not():
        info = importlib.import_module("groupdpo_kernels._C").build_info()
        found |= {"cpp": info["cpu_capability"], "widest": info["widest_cpu_capability"], "bf16": info["bf16_products"]}
    return found | {"switches": {name: os.environ[name] for name in SWITCHES if name in os.environ}}


def units_line(found: dict[str, Any]) -> str:
    """`units` in one line."""
    words = [f"torch uses {found['torch']}"]
    if "cpp" in found:
        words.append(f"the C++ op {found['cpp']} (the processor has {found['widest']})")
        words.append(f"bfloat16 GEMMs {'bf16 units' if found['bf16'] else 'float32'}")
    return ", ".join([*words, *(f"{name}={value}" for name, value in found["switches"].items())])


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA and ROCm"
    return f"torch {torch.__version__} finds no GPU (driver, or CUDA_VISIBLE_DEVICES)"


def _choices(device: torch.device) -> list[dict[str, Any]]:
    """What impl="auto" picks on a device, for the head by dtype, and for the losses after it."""
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        found = explain(*probe(device, dtype), torch.zeros(8, dtype=torch.long, device=device))
        row: dict[str, Any] = {"device": str(device), "function": "linear_logps", "impl": found.impl}
        row["why_not"] = {k: v for k, v in found.why_not.items() if k != found.impl}
        name = str(dtype).removeprefix("torch.")
        if rows and all(rows[-1][key] == value for key, value in row.items()):
            rows[-1]["dtypes"].append(name)
        else:
            rows.append({**row, "dtypes": [name]})
    arguments: tuple[Any, ...] = (device, torch.float32, "mpo", 8)
    picked = fused.resolve("auto", *arguments)
    why_not = {name: fused.why_not(name, *arguments) for name in fused.IMPLS if name != picked}
    rows.append({"device": str(device), "function": "preference_loss", "impl": picked})
    rows[-1] |= {"why_not": why_not, "dtypes": ["float32"]}
    return rows


# ------------------------------------------------------------------------------------------------------------- showing


def print_machine(console: Console, report: dict[str, Any]) -> None:
    extension = report["extension"]
    if extension["built"]:
        architectures = ", ".join(extension["cuda_architectures"])
        code = f"device code for {architectures}" if extension["cuda"] else "without device code"
        console.print(f"C++ extension: built by {extension['compiler']}, {code}", highlight=False)
    else:
        reasons = escape("; ".join(extension["why_not"]))
        console.print(f"[yellow]Without the C++ op, CPUs are several times slower: {reasons}[/]", highlight=False)
    console.print("  ".join(f"{name} [bold]{version or '-'}[/]" for name, version in report["versions"].items()))
    for device in report["devices"]:
        if device["device"] == "cpu":
            about = f"{device['cores']} cores, {device['threads']} threads; {units_line(device['units'])}"
        else:
            about = f"{device['memory_bytes'] / 2**30:.0f} GiB, {device['capability']}"
        console.print(f"{device['device']}: {escape(device['name'])}, {about}", highlight=False)
    for reason in report["no_gpu"]:
        console.print(f"GPU: none, {escape(reason)}", highlight=False)
    table = Table(title='What impl="auto" picks', title_justify="left")
    for heading in ("device", "function", "dtypes", "picked"):
        table.add_column(heading)
    for row in report["auto"]:
        picked = row["impl"]
        table.add_row(row["device"], row["function"], ", ".join(row["dtypes"]), f"[bold]{picked}[/]")
    console.print(table)
    # The reasons are lines, not a column of the table: a terminal of 80 columns would cut the advice in them.
    console.print("Why not the others", highlight=False)
    for row in report["auto"]:
        where = f"{row['device']}, {row['function']}, {', '.join(row['dtypes'])}"
        for name, reasons in row["why_not"].items():
            why = "; ".join(reasons) or f"could run; {row['impl']} comes first"
            console.print(escape(f"  {where}: {name}: {why}"), highlight=False, soft_wrap=True)


def test_and_print(console: Console) -> list[Outcome]:
    with console.status("comparing with float64") as status:
        outcomes = self_test(
            devices(), lambda done: status.update(f"{done.device} {done.impl}: {done.what} {done.case}")
        )
    table = Table(title="Largest error, in units of what is allowed (twice eager PyTorch's)", title_justify="left")
    for heading in ("device", "implementation", "what", "case: share", "result"):
        table.add_column(heading)
    rows: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault((outcome.device, outcome.impl, outcome.what), []).append(outcome)
    for key, group in rows.items():
        shares = ", ".join(f"{o.case}: {'-' if o.share is None else f'{o.share:.2f}'}" for o in group)
        passed = all(o.passed for o in group)
        table.add_row(*key, shares, "[green]pass[/]" if passed else "[bold red]FAIL[/]")
    console.print(table)
    for outcome in outcomes:
        if not outcome.passed:
            about = f"{outcome.device} {outcome.impl}: {outcome.what}, {outcome.case}"
            reason = outcome.detail or f"its error is {outcome.share:.3g} of what is allowed"
            console.print(f"[bold red]FAIL[/] {escape(f'{about}: {reason}')}", highlight=False)
    return outcomes
