"""Tracks the memory of running code, storage by storage: how much is alive, what it is, and where it peaks.

`MemoryTracker` is a TorchDispatchMode: it sees the result of every operation, counts each storage once, and drops it
when the storage is freed. It works on real tensors and on fake ones, so that the same code counts a prediction and a
measurement. torch's own MemTracker (torch.distributed._tools) would not do: it is private, knows neither logits nor
these ops, and keeps one snapshot of a whole step, where the planner extrapolates from the peaks of its parts.

Allocations inside an op are not visible; those of this package's ops are added by the rules of `lm_head.workspace`.
In a fake run floating tensors have no values, but integers do, because code reads targets and offsets.
The cost is some 10 us an operation, and that of fake.py.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..lm_head.workspace import Workspace, workspace_of
from .fake import FakeRun, tensors_in

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "head workspace", "logits")
_DEVICE, _META = torch.ops.prim.device.default, torch.device("meta")
Part = tuple[str, str]  # (category, a text: the op that made it, its shape and dtype)
BLOCK: Part = ("head workspace", "blocks inside our ops")


@dataclass
class Peak:
    """The most bytes that were alive during a part of the step, and what they were."""

    total: int = 0
    parts: dict[Part, int] = field(default_factory=dict)  # bytes
    most_block: int = 0  # what BLOCK would be with more tokens

    def by_category(self) -> dict[str, int]:
        sums = dict.fromkeys(CATEGORIES, 0)
        for (category, _), size in self.parts.items():
            sums[category] += size
        return sums


class MemoryTracker(TorchDispatchMode):
    """`with MemoryTracker(...) as tracker:` counts. `begin(name)` starts a part, and `peaks[name]` is its peak.

    Args:
        vocabulary: V. A tensor with this last dimension counts as logits.
        batch, lengths: sequences of a batch, and numbers of tokens of each: batches of any size get one name for a
            shape.
        device: "cpu" or "cuda", whose ops' workspace is added. None adds none, for workspace that is measured.
        fake: whether tensors are fake, so that the tracker must answer reads of values.
    """

    def __init__(self, vocabulary: int, batch: int, lengths: Iterable[int], device: str | None, *, fake: bool) -> None:
        super().__init__()
        self.vocabulary, self.device = vocabulary, device
        self.run = FakeRun() if fake else lambda func, args, kwargs: func(*args, **kwargs)
        self.names = {batch: "b"} | {batch * n: f"{n} b" for n in lengths}
        self.of_prompt = False  # whether the forward that runs is a shared prompt's
        self.live = 0
        self.parts: defaultdict[Part, int] = defaultdict(int)
        self._peaks: dict[str, Peak] = {}
        self.new = "activations"  # the category of new tensors
        self.gradient_shapes: set[torch.Size] = set()
        self.storages: dict[int, tuple[Part, int]] = {}
        self.steps: int | None = None  # number of operations so far in the part "head"
        self.risen = False  # whether a peak was noted whose parts are not recorded
        self.now = Peak()
        self.begin("before")

    # ---------------------------------------------------------------------------------------------------------- parts

    @property
    def peaks(self) -> dict[str, Peak]:
        """{part of the step: its peak}"""
        self._keep()
        return self._peaks

    def begin(self, name: str) -> None:
        """Counts what follows for this part, which may begin many times and has one peak.

        Each operation of the part "head" is a part by itself: its peaks must be linear in the tokens, and the larger of
        two linear peaks is not. "prompt" and "sequences" begin a forward, that of a shared prompt and any other.
        """
        if name in ("prompt", "sequences"):
            self.of_prompt = name == "prompt"
        self.steps = 0 if name == "head" else None
        self._enter(name)

    def _enter(self, name: str) -> None:
        self._keep()
        self.now = self._peaks.setdefault(name, Peak())
        self._look()

    def adopt(self, tensors: Iterator[Tensor] | list[Tensor], category: str) -> None:
        """Counts these tensors under a category, also if they were counted under another one."""
        self._keep()
        for x in tensors:
            key = x.untyped_storage()._cdata
            if key in self.storages:
                part, size = self.storages[key]
                self.parts[part] -= size
                self.live -= size
                part = self._part(x, category, part[1].partition(" ")[0])
                self.storages[key] = part, size
                self._count(part, size)
            else:
                self._track(x, category, "")

    def follow(self, model: nn.Module) -> None:
        """Counts the parameters of a model, and their gradients as they come into .grad."""
        self.adopt([*model.parameters(), *model.buffers()], "parameters")

        def arrived(p: Tensor) -> None:
            if p.grad is not None:
                self.adopt([p.grad], "gradients")

        for p in model.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(arrived)

    # ------------------------------------------------------------------------------------------------------- counting

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch.compile compiles nothing here, and what torch wraps around a dispatch costs 10 us."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            # Two dispatches of three only ask where a fake tensor is. torch's answer, without its way there.
            return _META if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
        out = self.run(func, args, kwargs or {})
        name = func._overloadpacket.__name__.replace("logit_cache", "linear_logps")  # counts like ops without one
        if self.steps is not None:
            self.steps += 1
            self._enter(f"head, operation {self.steps}")
        for x in tensors_in((out,)):
            self._track(x, self.new, name)
        if self.device is not None and func.namespace == "groupdpo_kernels":
            self._look(workspace_of(func._overloadpacket.__name__, args, self.device))
        return out

    def _track(self, x: Tensor, category: str, name: str) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.storages:
            return
        size = storage.nbytes()
        if category == "activations":
            if x.dim() > 1 and x.shape[-1] == self.vocabulary:
                category = "logits"
            elif x.shape in self.gradient_shapes and torch._C._current_graph_task_id() != -1:
                category = "gradients"
        part = self._part(x, category, name)
        self.storages[key] = part, size
        weakref.finalize(storage, self._release, key)
        self._count(part, size)

    def _part(self, x: Tensor, category: str, name: str) -> Part:
        """The name of a tensor, the same for batches of different size."""
        dims = list(map(str, x.shape))
        if dims and category in ("activations", "logits"):
            dims[0] = self.names.get(x.shape[0], dims[0])
        return category, f"{name} ({', '.join(dims)}) {str(x.dtype).removeprefix('torch.')}"

    def _count(self, part: Part, size: int) -> None:
        self.parts[part] += size
        self.live += size
        self._look()

    def _look(self, workspace: Workspace | None = None) -> None:
        """Notes the peak of this part if more is alive now than before."""
        if workspace is None:
            if self.live > self.now.total:
                self.now.total, self.risen = self.live, True
            return
        total = self.live + workspace.block + workspace.wide
        if total > self.now.total:
            self.now.total, self.risen = total, False
            self._record(workspace)

    def _keep(self) -> None:
        """Records what a noted peak holds, once before anything is freed: sums only rise until then."""
        if self.risen:
            self.risen = False
            self._record(Workspace())

    def _record(self, workspace: Workspace) -> None:
        more = {BLOCK: workspace.block, ("head workspace", "gradients inside our ops"): workspace.wide}
        self.now.most_block = workspace.most
        self.now.parts = {part: size for part, size in [*self.parts.items(), *more.items()] if size}

    def _release(self, key: int) -> None:
        self._keep()
        part, size = self.storages.pop(key)
        self.parts[part] -= size
        self.live -= size


def follow_layers(layers: nn.ModuleList, tracker: MemoryTracker) -> None:
    """Begins a part of the step at each layer's forward and backward, and at what lies between layers.

    A part's name counts layers from the nearer end, so that models of n and of n + 1 layers have the same parts, and
    keeps a shared prompt apart, whose size is not that of a batch. A layer that is computed again in the backward
    belongs to the backward.
    """
    n = len(layers)

    def name_of(what: str, i: int) -> str:
        return f"{'prompt ' if tracker.of_prompt else ''}{what} layer {i if i < n - i else i - n}"

    def hook(i: int, layer: nn.Module) -> None:
        def before(module: nn.Module, args: Any) -> None:
            if torch._C._current_graph_task_id() == -1:
                tracker.begin(name_of("forward", i))

        def after(module: nn.Module, args: Any, out: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                return
            if i == n - 1:
                tracker.begin("prompt head" if tracker.of_prompt else "head")
            hidden, name = out[0] if isinstance(out, tuple) else out, name_of("backward", i)
            if hidden.requires_grad:
                hidden.register_hook(lambda g: tracker.begin(name))

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)

    for i, layer in enumerate(layers):
        hook(i, layer)
