"""Describes what a figure was measured on: the machine, the versions, the command."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return f"{model[1] if model else platform.processor()}, {torch.get_num_threads()} threads"


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The versions of Python and of these packages; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def describe(device: torch.device, command: str) -> dict[str, Any]:
    """The header of a file of figures: date, command, device and versions."""
    packages = ("groupdpo-kernels", "torch", "triton", "transformers", "peft")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "device": device_name(device),
        "versions": versions(packages),
    }
