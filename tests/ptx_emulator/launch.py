"""A launch: parameters laid out, blocks run a few at a time; and Triton's launches, caught on CPU tensors.

`emulated` makes the project's own launchers run on CPU tensors: where Triton would launch on a GPU, the kernel is
compiled for the asked architecture as for that launch (all but the last step, the assembler), checked for what the
driver would refuse, and its PTX is executed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import time
import types
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch

from .asynchronous import TensorMap
from .machine import Machine, Settings
from .memory import PARAMETERS, Findings, GlobalMemory
from .program import Program
from .types import TYPES, UNSIGNED, Array, PtxError, size_of

SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448}
THREADS_AT_ONCE = 2048
MACHINES_KEPT = 6


class Tensor2d:
    """A parameter that is a tensor map."""

    def __init__(self, tensor_map: TensorMap) -> None:
        self.tensor_map = tensor_map


_machines: OrderedDict[Any, Machine] = OrderedDict()


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Ten thousand small objects are made at once, none of them garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def machine_for(program: Program, blocks: int, shared: int, settings: Settings) -> Machine:
    """Binding costs as much as running, and a launcher launches one kernel several times."""
    key = (program, blocks, shared, settings)
    if key in _machines:
        _machines.move_to_end(key)
    else:
        with without_collection():
            _machines[key] = Machine(program, blocks, shared, settings)
        if len(_machines) > MACHINES_KEPT:
            _machines.popitem(last=False)
    return _machines[key]


def execute(
    program: Program,
    grid: int,
    arguments: Sequence[Any],
    memory: GlobalMemory,
    findings: Findings,
    shared: int = 0,
    settings: Settings | None = None,
    order: Callable[[int], Sequence[int]] = range,
) -> None:
    """Run a grid of blocks. `arguments`: numbers, addresses, tensor maps; Triton's own two parameters may be left out.
    `order`: in which order its blocks run, some of them at once.
    """
    parameters, descriptors = {}, {}
    arguments = [*arguments, *[0] * (len(program.parameters) - len(arguments))]
    for k, (parameter, value) in enumerate(zip(program.parameters, arguments, strict=True)):
        if isinstance(value, Tensor2d):
            descriptors[PARAMETERS + 256 * k] = value.tensor_map
            continue
        if parameter.type[0] == "f":
            bits = np.array([value], TYPES[parameter.type]).view(UNSIGNED[size_of(parameter.type)])[0]
        else:
            bits = int(value) & ((1 << 8 * size_of(parameter.type)) - 1)
        parameters[parameter.name] = int(bits)
    programs = np.array(list(order(grid)), np.uint32)
    at_once = max(1, min(len(programs), THREADS_AT_ONCE // program.threads))
    for first in range(0, len(programs), at_once):
        part = programs[first : first + at_once]
        machine = machine_for(program, at_once, shared, settings or Settings())
        machine.run(part, grid, parameters, memory, descriptors, findings)


def reverse(count: int) -> Sequence[int]:
    return range(count)[::-1]


def shuffled(count: int) -> Sequence[int]:
    return [int(i) for i in np.random.default_rng(count).permutation(count)]


# ---------------------------------------------------------------------------------------------------- Triton's launches


@dataclass
class Emulation:
    """What happened: races and the like, launches and seconds by kernel."""

    findings: Findings = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)


@functools.lru_cache(maxsize=64)
def _program(ptx: str, name: str) -> Program:
    with without_collection():
        return Program(ptx, name)


def storage(x: torch.Tensor) -> tuple[int, Array] | None:
    """The address and the bytes of all memory that a tensor's storage owns."""
    whole = x.untyped_storage()
    if whole.nbytes() == 0:
        return None
    buffer = (ctypes.c_uint8 * whole.nbytes()).from_address(whole.data_ptr())
    return whole.data_ptr(), np.frombuffer(buffer, np.uint8)


def flatten(types_: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """Arguments that are not constants, tuples taken apart."""
    for kind, value in zip(types_, values, strict=True):
        if isinstance(kind, tuple):
            yield from flatten(kind, value)
        elif kind != "constexpr":
            yield kind, value


def arguments_of(kernel: Any, bound: dict[str, Any], memory: GlobalMemory) -> list[Any]:
    """The arguments of a compiled kernel as its PTX takes them; what they point to is added to `memory`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    maps = list(getattr(kernel.metadata, "tensordesc_meta", None) or [])
    signature = kernel.src.signature
    found: list[Any] = []
    for _, value in flatten(signature.values(), [bound[name] for name in signature]):
        if isinstance(value, torch.Tensor):
            if (owned := storage(value)) is not None:
                memory.add(*owned, f"a tensor of shape {tuple(value.shape)}")
            found.append(value.data_ptr())
        elif isinstance(value, TensorDescriptor):
            found.append(Tensor2d(tensor_map(value, maps.pop(0), memory)))
            found += [*value.shape, *value.strides]
        else:
            found.append(value)
    return found


def tensor_map(descriptor: Any, layout: dict[str, Any], memory: GlobalMemory) -> TensorMap:
    base = descriptor.base
    owned = storage(base)
    assert owned is not None
    memory.add(*owned, f"a tensor of shape {tuple(base.shape)}")
    elements = owned[1].view(UNSIGNED[base.element_size()])[base.storage_offset() :]
    strides = [stride * base.element_size() for stride in descriptor.strides]
    view = np.lib.stride_tricks.as_strided(elements, tuple(descriptor.shape), strides)
    return TensorMap(view, tuple(layout["block_size"]), layout["swizzle"])


@contextlib.contextmanager
def emulated(
    architecture: str = "sm_90",
    late: bool = True,
    noise: int | None = None,
    processors: int = 2,
    order: Callable[[int], Sequence[int]] = range,
    change: Callable[[str], str] | None = None,
) -> Iterator[Emulation]:
    """Within it launches on CPU tensors run in the emulator, as on a GPU of `processors` multiprocessors.

    `noise`: a seed for the error of approximate instructions. `change`: plants a fault into PTX before it runs.
    """
    from compile_only import Driver
    from triton import knobs
    from triton.backends.nvidia import compiler
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from groupdpo_kernels.kernels import launch

    result = Emulation()
    settings = Settings(late, None if noise is None else np.random.default_rng(noise))
    run = JITFunction.run

    def launched(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        metadata = kernel.metadata
        began = time.process_time()
        if metadata.shared > SHARED_LIMIT[architecture]:
            raise PtxError(
                f"out of resources: {metadata.name} asks for {metadata.shared} bytes of shared memory; {architecture} "
                f"has {SHARED_LIMIT[architecture]}"
            )
        if metadata.num_ctas != 1:
            raise PtxError(f"cluster is not emulated: {metadata.name} has {metadata.num_ctas} blocks a cluster")
        bound = dict(zip(self.arg_names, args)) | {k: v for k, v in kwargs.items() if k in self.arg_names}
        ptx = kernel.asm["ptx"]
        program = _program(ptx if change is None else change(ptx), metadata.name)
        memory = GlobalMemory()
        arguments = arguments_of(kernel, bound, memory)
        size = grid(bound) if callable(grid) else grid
        if any(extent != 1 for extent in size[1:]):
            raise PtxError(f"a grid of more than one dimension is not emulated: {size}")
        execute(program, size[0], arguments, memory, result.findings, metadata.shared, settings, order)
        result.launches[metadata.name] += 1
        result.seconds[metadata.name] += time.process_time() - began
        return kernel

    properties = types.SimpleNamespace(multi_processor_count=processors)
    with (
        knobs.cache.scope(),
        knobs.compilation.scope(),
        mock.patch.object(compiler.CUDABackend, "make_cubin", lambda *_: b""),
        mock.patch.object(driver, "_active", Driver(architecture)),
        mock.patch.object(JITFunction, "run", launched),
        mock.patch.object(launch, "architecture", lambda device: architecture),
        mock.patch.object(launch, "device_why_not", lambda name, device: []),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device: properties),
    ):
        knobs.cache.dir += "/not_assembled"  # no launch may find what was not
        knobs.compilation.disable_line_info = True
        yield result
