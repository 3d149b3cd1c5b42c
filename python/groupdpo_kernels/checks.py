"""Checks of arguments that several parts of the package share. Each error names the argument, what it must be, and what
it was.

They never read a value inside a tensor, and need torch alone.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
# Why an op has no kernels, with the error of the import in its place. The range is that of the extra `triton`.
NO_TRITON = "triton does not import: {}; run `pip install 'triton>=3.6,<3.10'`"


def check_number(name: str, value: Any) -> None:
    """TypeError unless the value is a number: Python's, numpy's, or a tensor of one element without requires_grad."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{name} must be a number, and gets no gradient; got a tensor that requires one")
    real = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, numbers.Real)
    if not real or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {shown(value)}")
    if isinstance(value, int) and not torch.compiler.is_compiling() and abs(value) > sys.float_info.max:
        raise ValueError(f"{name} must be a number that a float can hold; got an integer of {value.bit_length()} bits")


def shown(value: Any, most: int = 60) -> str:
    """The start of the value's repr, for a message. A value may be nested too deep to have one."""
    try:
        return f"{value[:most] if isinstance(value, (str, bytes)) else value!r:.{most}}"
    except Exception as error:
        return f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"


def check_tensors(**named: Any) -> None:
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
        if value.layout != torch.strided:  # sparse, nested: few operations take them
            raise TypeError(f"{name} must be a dense tensor; got one with layout {value.layout}")


def one_of(name: str, value: Any, known: Collection[str]) -> None:
    """ValueError unless the argument has one of the known values."""
    # Anything else may have no hash, or an == of its own.
    if not isinstance(value, (str, bool, type(None))) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}; got {shown(value)}")


def check_kind(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """TypeError unless the value is of this kind; `what` says that in words, "a dict"."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}; got {shown(value)}")


def check_iterable(name: str, value: Any, what: str) -> None:
    try:
        iter(value)
    except TypeError:
        raise TypeError(f"{name} must be {what}; got {shown(value)}") from None


def check_count(name: str, value: Any, least: int = 1) -> None:
    """TypeError unless the value is an integer, ValueError if it is below `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer of at least {least}; got {shown(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {shown(value)}")
    if int(value) >= 2**63:
        raise ValueError(f"{name} must be an integer of 64 bits; got one of {int(value).bit_length()} bits")


def check_flags(**named: Any) -> None:
    """TypeError for what is not True or False: a text such as "no" would count as True."""
    for name, value in named.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; got {shown(value)}")


def check_callable(name: str, value: Any, what: str) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be {what}; got {shown(value)}")


def check_device(name: str, value: Any) -> None:
    try:
        torch.device(value)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"{name} must be a torch.device, or text that names one; got {shown(value)}") from None


def check_group(name: str, group: Any) -> None:
    """TypeError unless this is a process group or None, ValueError unless this rank belongs to it."""
    if group is None:
        return
    distributed = torch.distributed.is_available()
    if distributed and group is torch.distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{name} must be a process group that this rank belongs to; got another")
    if not distributed or not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"{name} must be a torch.distributed process group or None; got {type(group).__name__}")


class NotUnderVmap(torch.autograd.Function):
    """An autograd Function that takes one batch: under torch.vmap it raises, and `instead` says what to do."""

    instead: str

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *args: Any) -> Any:
        raise RuntimeError(f"torch.vmap does not go through {cls.__name__}: {cls.instead}")
