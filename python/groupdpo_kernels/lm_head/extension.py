"""Loads the C++ extension `groupdpo_kernels._C`, or says why it or its device code cannot be used.

`add_weighted_rows_cuda`, the op of its device code (csrc/cuda/weighted_rows.cu), is sparse.add_weighted_rows on a GPU
with separate begins and ends; the backward over candidates runs it where it can. The extension loads on first use,
never on import, and reads no value of a tensor here.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("groupdpo_kernels", "FRAGMENT")
# csrc/binding.cpp registers it for the CUDA key alone, in builds with device code.
_LIBRARY.define(
    "add_weighted_rows_cuda(Tensor(a!) out, Tensor source, Tensor begins, Tensor ends, Tensor index,"
    " Tensor coefficients) -> ()"
)


def extension_why_not() -> list[str]:
    """Why the C++ extension cannot be used; empty if it can. The first call loads it, which registers its ops."""
    try:
        importlib.import_module("groupdpo_kernels._C")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "groupdpo_kernels._C":
            return [
                "C++ extension is not built: with a C++ compiler and Python's headers, run `pip install cmake ninja"
                " pybind11 'setuptools>=77'`, then `pip install --no-build-isolation -e .` again"
            ]
        return [f"C++ extension does not load: {error}"]
    return []


_threads = threading.local()  # .used: this thread has run an op on several; .lost: and the process was forked since


def _after_fork() -> None:
    _threads.lost = getattr(_threads, "used", False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def cpu_op(name: str) -> Callable[..., Any]:
    """A C++ op of the CPU. RuntimeError where it would wait for ever: torch's threads are OpenMP's, which a forked
    process does not have, and whoever has forked it has run on them."""
    if torch.get_num_threads() > 1:
        if getattr(_threads, "lost", False):
            raise RuntimeError(
                "torch's threads must be one in a process that was forked after they had run, for OpenMP waits there"
                " for threads that it does not have: call torch.set_num_threads(1) first, or start the process by spawn"
                f" or forkserver; got {torch.get_num_threads()}"
            )
        _threads.used = True
    return getattr(torch.ops.groupdpo_kernels, name)


@functools.cache  # once a process
def warn_of_the_slow_path() -> None:
    """Warns that a CPU computes without the C++ op, and says what to do, as installers hide the output of a build."""
    message = "; ".join(extension_why_not()) + ". Plain PyTorch computes instead, several times slower."
    warnings.warn(f"groupdpo_kernels: {message}", RuntimeWarning, stacklevel=2)


def cuda_extension_why_not(device: torch.device) -> list[str]:
    """Why the extension's device code cannot run on `device`; empty if it can. The first call loads the extension."""
    if reasons := extension_why_not():
        return reasons
    module = importlib.import_module("groupdpo_kernels._C")
    reasons = []
    if not module.build_info()["cuda_architectures"]:
        reasons.append("C++ extension is built without device code: install again with nvcc on PATH")
    if torch.version.cuda is None:
        reasons.append(f"torch {torch.__version__} is not built for CUDA")
    if device.type != "cuda":
        reasons.append(f"device is {device}: the extension's device code wants an NVIDIA GPU")
    if not reasons:
        index = torch.cuda.current_device() if device.index is None else device.index
        if error := module.cuda_error(index):
            reasons.append(f"{torch.cuda.get_device_name(index)} cannot run the extension's device code: {error}")
    return reasons


@functools.cache  # asked in each backward
def cuda_rows(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None] | None:
    """add_weighted_rows_cuda where it runs, else None: the Triton kernel then sums."""
    return None if cuda_extension_why_not(device) else add_weighted_rows_cuda


def add_weighted_rows_cuda(
    out: Tensor,  # (m, n) bf16|fp16|fp32 contiguous, added to; shares no memory with the rest
    source: Tensor,  # (k, n), the dtype of out, last dim contiguous
    begins: Tensor,  # (m,) int64
    ends: Tensor,  # (m,) int64; a row whose end is not after its begin is left as it is
    index: Tensor,  # (K,) int64 into source, all valid
    coefficients: Tensor,  # (K,) float32; an entry of 0 is not read
) -> None:
    """out[i] += sum of coefficients[j] source[index[j]] over begins[i] <= j < ends[i], in float32, in an order that
    depends on the entries alone, rounded once. Call it only where `cuda_extension_why_not` is empty.
    """
    torch.ops.groupdpo_kernels.add_weighted_rows_cuda(out, source, begins, ends, index, coefficients)
