"""The implementations of an LM head, and which of them can run: Triton on a GPU, C++ on a CPU, plain PyTorch anywhere.

The module never falls back from an implementation that was asked for by name. It reads devices, dtypes and what is
installed, never a value inside a tensor. It needs torch alone, microseconds, and once the import of an implementation.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..checks import NO_TRITON
from .extension import extension_why_not

IMPLS = ("triton", "cpu", "reference")  # in the order "auto" tries them


def _triton_why_not(hidden: Tensor, weight: Tensor) -> list[str]:
    try:
        launcher = importlib.import_module("groupdpo_kernels.kernels.linear_logps_forward")
    except ImportError as error:
        return [NO_TRITON.format(error)]
    return launcher.why_not(hidden, weight)


def cpu_why_not(hidden: Tensor, weight: Tensor) -> list[str]:
    reasons = extension_why_not()
    if hidden.device.type != "cpu":
        reasons.append(f"hidden is on {hidden.device}: the C++ op wants CPU tensors")
    if hidden.dtype == torch.float64:
        reasons.append("hidden is float64: only the reference computes in float64")
    return reasons


def why_not(impl: str, hidden: Tensor, weight: Tensor) -> list[str]:
    """Every reason why `impl` cannot compute linear_logps on these tensors; empty if it can."""
    if impl == "triton":
        return _triton_why_not(hidden, weight)
    if impl == "cpu":
        return cpu_why_not(hidden, weight)
    return []


def resolve(impl: str, hidden: Tensor, weight: Tensor) -> str:
    """The implementation that runs. ValueError with every reason for an explicit choice that cannot run."""
    if impl == "auto":
        return next(name for name in IMPLS if not why_not(name, hidden, weight))
    reasons = why_not(impl, hidden, weight)
    if reasons:
        raise ValueError(f"impl={impl!r} cannot run here: " + "; ".join(reasons))
    return impl
