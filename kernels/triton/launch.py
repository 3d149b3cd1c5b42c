"""Launch shapes by architecture, in one small table, and what a device must have to run them.

The shapes come from compile-only figures (registers, spills, shared memory: tests/test_compile_only.py holds the
budgets). Rows of `Launch` never depend on T or V.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from groupdpo_kernels.reference import Head, HeadOptions

# Set by testing.py alone: kernels then run on CPU tensors in Triton's interpreter.
interpreting: Launch | None = None


@dataclass(frozen=True)
class Launch:
    """One launch shape of a (BLOCK_T x BLOCK_V) tile of logits, reduced over the hidden size in steps of BLOCK_D."""

    BLOCK_T: int
    BLOCK_V: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    tma: bool = False  # load through tensor descriptors; wants 16-byte aligned rows
    persistent: bool = False  # one program a multiprocessor loops over tiles
    flatten_low_rank: bool = True  # the loop over tiles is also flattened when a low-rank segment follows
    library: bool = False  # a library multiplies, a block at a time; kernels read its products
    tf32: bool = True  # the matrix units take float32 rounded to tf32
    GROUP_T: int = 16  # token tiles that share a sweep over the vocabulary, for the L2 cache


# (architecture, bytes of an element) -> launch shape; the second table is for rows that tensor descriptors cannot load.
TABLE: dict[tuple[str, int], Launch] = {
    ("sm_80", 2): Launch(128, 128, 64, 8, 3),
    ("sm_80", 4): Launch(128, 128, 32, 8, 3),
    ("sm_86", 2): Launch(128, 128, 32, 8, 3),  # 99 KiB of shared memory: sm_86, sm_89, sm_120
    ("sm_86", 4): Launch(128, 64, 32, 8, 2),
    ("sm_90", 2): Launch(128, 256, 64, 8, 4, tma=True, persistent=True),
    ("sm_90", 4): Launch(128, 128, 32, 8, 3),  # through descriptors an exact float32 GEMM spills 10 KB a thread
    # Triton 3.6 and 3.7 fail to place the accumulators of two GEMMs in one flattened loop.
    ("sm_100", 2): Launch(128, 256, 64, 8, 4, tma=True, persistent=True, flatten_low_rank=False),
    ("sm_100", 4): Launch(128, 128, 32, 8, 3),
    ("gfx942", 2): Launch(128, 128, 64, 8, 2),
    ("gfx942", 4): Launch(128, 128, 32, 8, 2),
    ("gfx950", 2): Launch(128, 128, 64, 8, 2, tf32=False),
    ("gfx950", 4): Launch(128, 128, 32, 8, 2, tf32=False),
    ("gfx90a", 2): Launch(128, 128, 64, 8, 2, tf32=False),
    ("gfx90a", 4): Launch(128, 128, 32, 8, 2, tf32=False),
    ("gfx1100", 2): Launch(128, 64, 32, 8, 2, tf32=False),
    ("gfx1100", 4): Launch(64, 64, 16, 8, 1, tf32=False),
    ("gfx1201", 2): Launch(128, 128, 32, 8, 2, tf32=False),
    ("gfx1201", 4): Launch(64, 32, 32, 4, 1, tf32=False),
}
# Whether products are a library's, where it gives them in float32. Only figures of a device can decide.
LIBRARY = False

UNALIGNED: dict[tuple[str, int], Launch] = {
    ("sm_90", 2): Launch(128, 128, 64, 8, 3),
    ("sm_100", 2): Launch(128, 128, 64, 8, 3),
}


def architecture(device: torch.device) -> str | None:
    """The table's name for a device; None where no kernel runs."""
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]  # what follows are features
        return name if (name, 2) in TABLE else None
    major, minor = torch.cuda.get_device_capability(device)
    if major == 10:
        return "sm_100"
    if (major, minor) in ((8, 0), (9, 0)):
        return f"sm_{major}{minor}"
    return "sm_86" if major >= 8 else None


def device_why_not(name: str, device: torch.device) -> list[str]:
    """Every reason why no Triton kernel runs on `device`, where the tensor `name` is."""
    reasons: list[str] = []
    if interpreting is not None:
        return reasons
    if device.type != "cuda":
        reasons.append(f"{name} is on {device}: the Triton kernels want a GPU")
    elif architecture(device) is None:
        if torch.version.hip:
            chip = torch.cuda.get_device_properties(device).gcnArchName
            known = ", ".join(sorted({architecture for architecture, _ in TABLE if architecture.startswith("gfx")}))
            reasons.append(f"the GPU is {chip}: the Triton kernels have launch shapes for {known}")
        else:
            capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
            reasons.append(f"the GPU has compute capability {capability}: the Triton kernels want 8.0 or later")
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        reasons.append(f"triton is {triton.__version__}: the kernels want 3.6 or later")
    return reasons


def why_not(hidden: Tensor, weight: Tensor) -> list[str]:
    """Every reason why the Triton kernels of an LM head cannot run on these tensors."""
    reasons = device_why_not("hidden", hidden.device)
    if hidden.dtype == torch.float64:
        reasons.append("hidden is float64: only the reference computes in float64")
    return reasons


def on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be that of the tensors: it becomes that of the first, which
    may stand in a Head.
    """

    @functools.wraps(launcher)
    def run(first: Tensor | Head, *rest: Any, **named: Any) -> Any:
        x = first.hidden if isinstance(first, Head) else first
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            return launcher(first, *rest, **named)

    return run


def launch_for(head: Head, library: bool) -> Launch:
    """The launch shape for this head on its device. `library`: its products may be a library's."""
    launch = _launch_for(head.weight)
    if library and LIBRARY and not library_rounds(head.weight.dtype):
        # What is left is to read a tile and to reduce it: one that leaves registers for several programs.
        rows = min(64, launch.BLOCK_T)
        return replace(launch, BLOCK_T=rows, tma=False, persistent=False, num_stages=1, library=True)
    if head.low_rank_weight.shape[1] == 0 or head.weight.shape[1] > launch.BLOCK_D:
        return launch
    # A hidden size of one step leaves no loop over D. The compiler then pipelines the loop over tiles, with every step
    # of the low-rank segment in it, and asks for up to 622,624 bytes of shared memory.
    return replace(launch, num_stages=1)


def _launch_for(weight: Tensor) -> Launch:
    if interpreting is not None:
        return interpreting if _aligned(weight) else replace(interpreting, tma=False, persistent=False)
    key = (architecture(weight.device) or "", weight.element_size())
    launch = TABLE[key]
    return launch if not launch.tma or _aligned(weight) else UNALIGNED[key]


def library_rounds(dtype: torch.dtype) -> bool:
    """Whether a library rounds products to 16 bits before they are read or added: on AMD it has no float32 output for
    16-bit inputs.
    """
    return torch.version.hip is not None and dtype.itemsize == 2


def _aligned(weight: Tensor) -> bool:
    """Tensor descriptors want a contiguous last dimension and 16-byte aligned rows."""
    row = weight.stride(0) * weight.element_size()
    return (
        weight.stride(1) == 1
        and row % 16 == 0
        and weight.data_ptr() % 16 == 0
        and weight.shape[1] * weight.element_size() % 16 == 0
    )


def programs(launch: Launch, tiles: int, device: torch.device) -> tuple[int]:
    """The grid for `tiles` tiles."""
    return strided_programs(tiles, 1, device) if launch.persistent else (tiles,)


def strided_programs(tasks: int, per_processor: int, device: torch.device) -> tuple[int]:
    """The grid for programs that stride over at most `tasks` tasks."""
    if interpreting is not None:
        return (min(tasks, 3),)
    return (min(tasks, per_processor * torch.cuda.get_device_properties(device).multi_processor_count),)


def precision(dtype: torch.dtype, launch: Launch) -> str:
    """How a GEMM takes its inputs. float32 follows torch's own setting, as either of its APIs has set it (the getter of
    the older one raises where the newer was used); inputs of 16 bits are exact as they are.
    """
    tf32 = launch.tf32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and tf32 else "ieee"


def scale_and_cap(options: HeadOptions) -> tuple[float, float]:
    """(scale, cap) so that logits = scale * x, or cap * tanh(scale * x) under softcap: divisions happen once, here, in
    float64.
    """
    if options.softcap is None:
        return options.logit_scale / options.temperature, 1.0
    return options.logit_scale / options.softcap, options.softcap / options.temperature


def low_rank_block(R: int) -> int:
    """BLOCK_R of the second segment: at least one tensor-core step, at most 32; 0 without a second segment. Its tiles
    lie in shared memory beside those of the first: with 64 columns the widest tile asks for 245,792 bytes, where sm_90
    has 232,448.
    """
    return 0 if R == 0 else min(32, max(16, 2 ** math.ceil(math.log2(R))))


class HeadArguments(NamedTuple):
    """What every kernel over the tiles of an LM head takes."""

    tensors: tuple[object, ...]  # hidden, weight (pointers or descriptors), then what the head has of the others
    strides: tuple[int, ...]
    scale: float  # the logit is scale * x, or cap * tanh(scale * x) under softcap
    cap: float
    constants: dict[str, object]


def head_arguments(
    head: Head,  # hidden (T, D) and low_rank_hidden (T, R) contiguous
    launch: Launch,
    options: HeadOptions,
    products: Tensor | None = None,  # (rows, columns) float32, of launches with `library`
) -> HeadArguments:
    hidden, weight, bias, _, low_rank_weight = head
    R = 0 if launch.library else low_rank_weight.shape[1]
    strides = (*weight.stride(), *(low_rank_weight.stride() if R else (0, 0)))
    sources: tuple[object, ...] = (hidden, weight)
    if products is not None:
        sources, strides = (products, None), (*products.stride(), 0, 0)
    elif launch.tma:
        sources = (
            TensorDescriptor.from_tensor(hidden, [launch.BLOCK_T, launch.BLOCK_D]),
            TensorDescriptor.from_tensor(weight, [launch.BLOCK_V, launch.BLOCK_D]),
        )
    constants = {
        # Of the model, not of the batch, so one compilation each; a loop of known length flattens without a spare copy
        # of the kernel for length 0.
        "D": hidden.shape[1],
        "R": R,
        "HAS_BIAS": bias.numel() > 0,
        "HAS_SOFTCAP": options.softcap is not None,
        "BLOCK_R": low_rank_block(R),
        "BLOCK_T": launch.BLOCK_T,
        "BLOCK_V": launch.BLOCK_V,
        "BLOCK_D": launch.BLOCK_D,
        "GROUP_T": launch.GROUP_T,
        "TMA": launch.tma,
        "LIBRARY": launch.library,
        "FLATTEN": launch.persistent and (R == 0 or launch.flatten_low_rank),
        "PRECISION": precision(hidden.dtype, launch),
        # Nobody will miss the last bits of a float32 that was made from fewer.
        "ACCURATE": hidden.dtype == torch.float32 and precision(hidden.dtype, launch) == "ieee",
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
    low_rank = (head.low_rank_hidden, low_rank_weight) if R else (None, None)
    others = (bias.contiguous() if bias.numel() else None, *low_rank)
    scale, cap = scale_and_cap(options)
    return HeadArguments((*sources, *others), strides, scale, cap, constants)


def chunk_rows(T: int, bytes_per_row: int, budget: int, launch: Launch) -> int:
    """How many rows of workspace fit: a multiple of BLOCK_T, one tile at least."""
    return min(T, max(1, budget // bytes_per_row // launch.BLOCK_T) * launch.BLOCK_T)
