"""The types of PTX as NumPy's, and the error of whatever the emulator refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class PtxError(RuntimeError):
    """A program that a GPU would fault on, hang in or refuse; or one that uses what is not emulated."""


TYPES: dict[str, Any] = {
    "pred": np.bool_,
    **{f"{letter}{bits}": getattr(np, f"uint{bits}") for letter in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": getattr(np, f"int{bits}") for bits in (8, 16, 32, 64)},
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
}
UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


def size_of(type_name: str) -> int:
    return int(np.dtype(TYPES[type_name]).itemsize)


def is_float(type_name: str) -> bool:
    return type_name[0] == "f"


def is_signed(type_name: str) -> bool:
    return type_name[0] == "s"


def bf16_to_f32(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: Array) -> Array:
    """Rounded to nearest, ties to even; every NaN becomes the one of PTX."""
    bits = x.view(np.uint32)
    with np.errstate(over="ignore"):
        rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(
            np.uint16
        )
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)
