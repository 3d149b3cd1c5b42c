"""Checks of arguments that several parts of the package share. Each error names the argument, what it must be, and what
it was.

Never: reads a value inside a tensor. Needs torch alone. Cost: none worth counting.
"""

from __future__ import annotations

import numbers
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)


def check_number(name: str, value: Any) -> None:
    """TypeError unless it is one: Python's, numpy's, or a tensor of one element that wants no gradient."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{name} must be a number, and gets no gradient; got a tensor that requires one")
    real = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, numbers.Real)
    if not real or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")


def check_tensors(**named: Any) -> None:
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")


def one_of(name: str, value: Any, known: Collection[str]) -> None:
    """ValueError unless the argument has one of the known values."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")


class NotUnderVmap(torch.autograd.Function):
    """A Function over ops that know one batch: torch.vmap raises, and says what to do in its place."""

    instead: str

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *args: Any) -> Any:
        raise RuntimeError(f"torch.vmap does not go through {cls.__name__}: {cls.instead}")
