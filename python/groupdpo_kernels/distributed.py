"""Keeps the ranks of one group_backward in step: they agree on what all must do, or all raise an error.

A wrapper reduces gradients by collectives that every rank must join: DistributedDataParallel once for each backward
outside no_sync, FSDP and ZeRO in each forward and each backward. Ranks whose groups differ in size differ in their
number of micro-batches and of shared prompts. So before the first micro-batch runs, one all-reduce (with prompts, two)
agrees on these numbers, and after pass 1 another one says whether a rank has failed: then all raise, before any
gradient is written.

Wrappers are found in `model` or, where none is given, by a hook on the first modules that `forward` calls, which runs
before the wrapper's own forward and so before its first collective. Without a wrapper, without a process group and
without groups that span ranks nothing here talks to another rank: other ranks may be busy with other things
(generation, rewards), and a collective that they do not join would never end.

The module never imports deepspeed, keeps a hook past the first forward of a pass, or guesses a group of ranks.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

N = TypeVar("N", int, float)
DDP, FSDP1, FSDP2, DEEPSPEED = "DistributedDataParallel", "FullyShardedDataParallel", "FSDP2", "DeepSpeed"


def kind_of(module: nn.Module) -> str | None:
    """The kind of wrapper that the module is: DDP, FSDP1, FSDP2 or DEEPSPEED; None for any other module."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return DDP
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
        return FSDP1
    if fsdp is not None and isinstance(module, fsdp.FSDPModule):
        return FSDP2
    return DEEPSPEED if hasattr(type(module), "set_gradient_accumulation_boundary") else None


def is_distributed() -> bool:
    """Whether this process is a rank of torch.distributed."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_dtensor(x: Tensor) -> bool:
    return "torch.distributed.tensor" in sys.modules and isinstance(x, torch.distributed.tensor.DTensor)


def reshard(model: nn.Module) -> None:
    """Returns every unit of FSDP2 to its shards, and gives these the requires_grad of the gathered parameters.

    peft switches requires_grad of the parameters that are registered at the time: `disable_adapter()` off on entry and
    on again on exit, `set_adapter` as well. A unit that stays gathered after its forward (the last one) would get one
    switch on its shards and the other on its gathered parameters, and its adapter would silently stop training.
    """
    units: list[Any] = [m for m in model.modules() if kind_of(m) == FSDP2]
    if not units:
        return
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    for unit in units:
        unit.reshard()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != wanted[name]:
            parameter.requires_grad_(wanted[name])


def shards(model: nn.Module) -> bool:
    """Whether each forward and each backward of the model may be a collective call: it has a wrapper other than DDP, or
    its parameters are ZeRO-3's."""
    if any(kind_of(m) not in (None, DDP) for m in model.modules()):
        return True
    return any(hasattr(p, "ds_id") for p in model.parameters())


def device_of(group: Any) -> torch.device:
    """The device of tensors that the collectives of a process group take; None means the default group."""
    on_gpu = "nccl" in torch.distributed.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def maxima(values: Sequence[N], groups: Sequence[Any] = (None,)) -> list[N]:
    """The maximum of each number over the ranks of these process groups, one after the other; None means all ranks.
    A collective call, with values of one type; lists of different lengths are `joint`'s. Without a group the values."""
    if not groups:
        return list(values)
    dtype = torch.float64 if isinstance(values[0], float) else torch.int64
    joined = torch.tensor(values, dtype=dtype, device=device_of(groups[0]))
    for group in groups:
        torch.distributed.all_reduce(joined, torch.distributed.ReduceOp.MAX, group)
    return joined.tolist()


def joint(calls: list[int], groups: Sequence[Any] = (None,)) -> list[int]:
    """The shortest list of calls that holds those of every rank: two collective calls.

    A list begins with the number of forwards and backwards before the first shared prompt, and has one number more for
    each prompt: its own and those that follow it. A prompt begins with a forward alone.
    """
    (length,) = maxima([len(calls)], groups)
    return maxima(calls + [0] * (length - len(calls)), groups)


_PLANNED: ContextVar[bool] = ContextVar("groupdpo_kernels_planned_as_sharded", default=False)


@contextlib.contextmanager
def planned_as_sharded() -> Iterator[None]:
    """A context in which group_backward runs in one process in the order that it has where an engine shards the model:
    a planner counts its memory. Other threads, which may be training, are not in it."""
    token = _PLANNED.set(True)
    try:
        yield
    finally:
        _PLANNED.reset(token)


class Ranks:
    """The other ranks, as one call of group_backward sees them.

    count, calls: functions that give the number of this rank's micro-batches, and its list of calls as in `joint`.
    strategy: its index among the strategies of group_backward. own_sync: whether the caller's own no_sync decides which
    backward synchronises. spanned: the process groups whose ranks hold parts of the same preference groups; they agree
    too, before those of process_group or a wrapper. apart: whether no forward of this step is a collective call.
    """

    def __init__(
        self,
        process_group: Any,
        count: Callable[[], int],
        calls: Callable[[], list[int]],
        strategy: int,
        one_pass: bool,
        own_sync: bool,
        spanned: Sequence[Any] = (),
        apart: bool = False,
    ) -> None:
        self.count, self.calls, self.strategy = count, calls, strategy
        self.one_pass, self.own_sync = one_pass, own_sync
        self.wrappers: list[nn.Module] = []
        self.again = False  # whether pass 2 has begun
        self.error: Exception | None = None  # raised within a forward, where the caller's code may have caught it
        self.spans = bool(spanned)
        self._groups = [*spanned]  # over which all agree
        self._settled = _PLANNED.get()  # whether the caller or a wrapper says which ranks must agree
        self._known = self.spans or self._settled  # whether it is known which
        if process_group is not None:
            self._settle(process_group)
        self._apart = apart
        self._own = 0
        self._own_calls: list[int] | None = None  # None until it is known that forwards may be collective calls
        self._all_calls: list[int] | None = None  # of all ranks, once agreed
        self._met = self._last = self._in_forward = False
        self._told = False  # whether all ranks know of an error
        self._open: contextlib.ExitStack | None = None  # contexts of the micro-batch that runs

    # ------------------------------------------------------------------------------------------------------- agreement

    def begin(self, model: nn.Module | None, error: Exception | None) -> None:
        """Agrees before anything runs, if it is known with which ranks. `error` is what this rank is about to raise."""
        if model is not None:
            self._add(model)
        self.meet(error)

    def meet(self, error: Exception | None = None) -> None:
        """Raises on every rank if one brings an error, if their strategies differ, or if one has no micro-batch. Where
        forwards may be collective calls it agrees on their number and order."""
        if not self._known:
            if error is not None:
                raise error
            return
        if error is None:
            try:
                self._own = self._own if self._met else self.count()
                if self._own_calls is None and self.counted:
                    self._own_calls = self.calls()
            except Exception as raised:  # the caller's iterable may raise anything, and the other ranks must know
                error = raised
        self._met = True
        calls = self._own_calls or [0]
        own = [self._own, -self._own, int(error is not None), self.strategy, -self.strategy, calls[0], len(calls)]
        most, least, failed, high, low, before, length = maxima(own, self._groups)
        self._told = bool(failed) or high != -low or least == 0
        if error is not None:
            raise error
        if failed:
            raise ValueError(
                "group_backward stops on every rank, before any gradient is written, because it has failed on another"
                " rank, whose error says why"
            )
        if high != -low:
            raise ValueError("strategy must be the same on every rank; got different ones")
        if least == 0:
            raise ValueError(
                f"micro_batches must hold at least one on every rank; got from 0 to {most}, {self._own} here"
            )
        if self._all_calls is None and self._own_calls is not None:
            self._all_calls = [before] if length == 1 else joint(calls, self._groups)

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """A context: an error in it is raised on this rank, and at its end on every other one. Where forward itself is
        a collective and fails, nothing is agreed, because the other ranks wait in that collective."""
        try:
            yield
        except Exception as error:
            if self._met and not self._told and (not self._in_forward or self._only_ddp or self.forwards_apart):
                self.meet(error)
            raise
        self.meet()

    def close(self, drift: float, error: Exception | None) -> float:
        """The largest drift of all ranks that hold parts of the same groups, after pass 2; or an error on all of them,
        if one brings one."""
        if not self.spans:
            if error is not None:
                raise error
            return drift
        failed, most = maxima([float(error is not None), drift], self._groups)
        if error is not None:
            raise error
        if failed:
            raise ValueError("pass 2 of group_backward has failed on another rank, whose error says why")
        return most

    def call(self, forward: Callable[[Any], Any], micro_batch: Any) -> Any:
        self._in_forward = True  # it stays True after an error
        outputs = forward(micro_batch)
        self._in_forward = False
        return outputs

    @property
    def _only_ddp(self) -> bool:
        return bool(self.wrappers) and all(kind_of(w) == DDP for w in self.wrappers)

    @property
    def counted(self) -> bool:
        """Whether forwards are collective calls, or may be: each rank must then make equally many, in one order."""
        return self._settled and not self._only_ddp

    @property
    def forwards_apart(self) -> bool:
        """Whether no forward and no backward is a collective call of the ranks that groups span, nor of a wrapper so
        far."""
        return self._apart and not self._settled

    @property
    def free(self) -> bool:
        """Whether it is known that no forward is a collective call. Under DistributedDataParallel one of a step is, the
        first through the wrapper: in each pass it must be the same one on every rank."""
        return not (self._settled or is_distributed())

    @property
    def all_calls(self) -> int:
        """The number of forwards with a backward that every rank makes, where calls are counted."""
        return sum(self._all_calls or ())

    def missing(self, section: int | None = None) -> int:
        """How many calls fewer than other ranks this one makes: after the prompt of this number (0: before the first),
        or in all."""
        if not self.counted or self._all_calls is None or self._own_calls is None:
            return 0
        if section is None:
            return self.all_calls - sum(self._own_calls)
        return self._all_calls[section] - (self._own_calls[section] if section < len(self._own_calls) else 0)

    @property
    def sections(self) -> int:
        """One more than the most prompts of a rank."""
        return len(self._all_calls or ())

    # -------------------------------------------------------------------------------------------------------- wrappers

    def _add(self, *roots: nn.Module) -> None:
        """Adds the wrappers in these modules, checks the strategy against them, and takes their process group."""
        found = [m for root in roots for m in root.modules() if kind_of(m) is not None and m not in self.wrappers]
        self.wrappers += dict.fromkeys(found)
        kinds = {kind_of(w) for w in self.wrappers}
        if self.one_pass and (other := kinds - {DDP}):
            raise ValueError(
                f"strategy must be 'two_pass' under {other.pop()}, whose parameters are not the leaves of the graph;"
                " got 'one_pass'"
            )
        for root in roots:
            reshard(root)
        if self.wrappers and not self._settled:
            self._settle(_group_of(self.wrappers[0]))
            self._met = False  # not with all of these ranks

    def _settle(self, group: Any) -> None:
        """Adds the ranks whose collectives a wrapper makes. They come last, for the others have agreed without them."""
        group = torch.distributed.group.WORLD if group is None else group
        self._groups += [group] * (group not in self._groups)
        self._known = self._settled = True

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A context that finds the wrappers that a forward calls, and agrees with the other ranks before they run."""
        if self.wrappers or not is_distributed():
            yield
            return
        first: list[nn.Module] = []

        def look(module: nn.Module, args: Any) -> None:
            if self.error is not None:
                raise self.error
            if self.wrappers or (first and kind_of(module) is None):
                return
            first.append(module)
            try:
                self._add(first[0], module)
                if self.wrappers:
                    if self.again and not self._only_ddp:
                        raise ValueError("model must be given where pass 1 does not run the wrapper that pass 2 runs")
                    if not self._met:
                        self.meet()
                    hook.remove()  # after an error it stays, and raises it wherever a forward is tried again
                    for wrapper in self.wrappers:
                        self._enter(wrapper)
            except Exception as error:
                self.error = error
                raise

        hook = nn.modules.module.register_module_forward_pre_hook(look)
        try:
            yield
        except Exception:
            if self.error is None:
                raise
        finally:
            hook.remove()
        if self.error is not None:
            raise self.error

    @contextlib.contextmanager
    def syncing(self, last: bool) -> Iterator[None]:
        """A context for forward and backward of one micro-batch, so that gradients are reduced once, with the last."""
        with contextlib.ExitStack() as self._open:
            self._last = last
            for wrapper in self.wrappers:
                self._enter(wrapper)
            yield
        self._open = None

    def _enter(self, wrapper: Any) -> None:
        if self._open is None or self.own_sync:
            return
        if kind_of(wrapper) == DDP and not self._last:
            self._open.enter_context(wrapper.no_sync())
        elif kind_of(wrapper) == DEEPSPEED:
            self._open.enter_context(_boundary(wrapper, self._last))


@contextlib.contextmanager
def _boundary(engine: Any, last: bool) -> Iterator[None]:
    """A context that tells DeepSpeed whether this backward ends a step, which it assumes unless told, and undoes it."""
    managed = getattr(engine, "managed_gradient_accumulation", None)  # newer versions have it
    if managed is not None and not managed():  # then only step() ends a step
        yield
        return
    before = engine._is_gradient_accumulation_boundary
    engine.set_gradient_accumulation_boundary(last and engine.is_gradient_accumulation_boundary())
    try:
        yield
    finally:
        engine._is_gradient_accumulation_boundary = before  # None restores the engine's own count


def _group_of(wrapper: Any) -> Any:
    """The process group of the wrapper's collectives; None means all ranks."""
    kind = kind_of(wrapper)
    if kind == DDP:
        return wrapper.process_group
    if kind == DEEPSPEED:
        return getattr(wrapper, "data_parallel_group", None)
    if kind == FSDP1:
        return None if getattr(wrapper, "_inter_node_pg", None) is not None else wrapper.process_group
    mesh = next((p.device_mesh for p in wrapper.parameters() if is_dtensor(p)), None)
    if mesh is not None and mesh.ndim == 1:
        return mesh.get_group()
    if mesh is not None and mesh.size() != torch.distributed.get_world_size():
        raise ValueError(f"process_group must be given for a mesh of {mesh.ndim} dimensions that is not all ranks")
    return None
