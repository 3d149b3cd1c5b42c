"""Probe measures what a model does to its output head's result: a scale, a soft cap, a cut of the vocabulary.

It runs one forward in which the head returns known values z from -40 to 40, and fits the logits that come out as
s z or c tanh(s z / c). No config field is read: the same name means different things in different models.

It never trains, fills a cache, or leaves a flag or the random state changed. It needs an input that the model accepts.
The cost is one forward without gradient. docs/math.md has the formulas.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import is_dtensor
from ..threads import Change, Lock, of_this_one, one_for_each
from .head_call import LogitMap, leaf_of, linear_parts, swapped, why_split
from .split_head import like, whole


class Probe:
    """`Probe(head).run(model, inputs)` gives logits, `.fit(logits)` the LogitMap behind them, or why there is none."""

    def __init__(self, head: nn.Module) -> None:
        self.head, self.leaf = head, leaf_of(head)
        self.parts = linear_parts(self.leaf)
        self.count, self.vocab, self.reason = 0, 0, ""
        self.positions: tuple[int, ...] | None = None  # (B, L) of the input, if each position gives a row of logits

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:  # (B, L, V)
        """The model's logits when its head returns the grid; in evaluation mode and without gradient."""
        hook = self.head.register_forward_hook(of_this_one(self._leave, lambda *_: None))
        try:
            with quiet(model, self.head) as called, swapped(self.leaf, self._forward) as self.real:
                return logits_of(called(**inputs))
        finally:
            hook.remove()

    def _forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.count += 1
        self.reason = why_split(self.leaf, self.parts, hidden)
        if self.reason:
            return self.real(hidden, *args, **kwargs)
        if self.parts is not None:
            # A sharded weight is whole only within the call of its own module.
            base = self.parts.base
            self.vocab = base.weight.shape[0] if base is self.leaf else base.out_features
        else:
            logits = self.real(hidden, *args, **kwargs)
            self.vocab = logits.shape[-1]
            last = logits.reshape(-1, self.vocab)[-1].float()
            alone = self.real(hidden.reshape(1, -1, hidden.shape[-1])[:, -1:], *args, **kwargs).reshape(-1).float()
            # The tolerance is loose, because a quantised head may choose its scale by what else is in the batch.
            if not torch.allclose(alone, last, rtol=0.02, atol=0.02 * float(last.abs().max())):
                self.reason = "its output head does not score each position by itself"
        *positions, _ = hidden.shape
        if self.positions and tuple(positions) not in (self.positions, (math.prod(self.positions),)):
            self.reason = (
                f"its output head sees other positions than the input has, {(*positions,)} of {self.positions}"
            )
        self.mark = torch.linspace(1, 2, math.prod(positions), device=hidden.device).reshape(*positions, 1)
        self.split = is_dtensor(hidden)
        return like(self.mark, hidden)

    def _leave(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if not self.vocab:
            return output
        output = whole(output)
        pieces = self.split and output.shape != self.mark.shape  # hooks that leave each rank its logits
        if not pieces and (output.shape != self.mark.shape or not torch.allclose(output.float(), self.mark, rtol=0.01)):
            self.reason = "a forward hook on its output head changes the result"
        # The grid has an exact zero, and is float64 so that the model's own arithmetic rounds little.
        wide = torch.float32 if output.device.type == "mps" else torch.float64
        half = max(1, self.vocab // 2)
        self.grid = (torch.arange(self.vocab, device=output.device, dtype=wide) - half) * (40 / half)
        # Gradients are on until run() ends, so that a parameter which acts on the logits shows.
        torch.set_grad_enabled(True)
        # Each position has the grid moved on by one, which shows if the model puts positions in another order.
        rows = torch.stack([self.grid.roll(i) for i in range(self.mark.numel())])
        return rows.reshape(*self.mark.shape[:-1], self.vocab)

    def fit(self, logits: Tensor) -> LogitMap | str:
        """The map from grid to logits, or the reason why there is none."""
        if self.count == 0:
            return "its output head is not called in its forward"
        if self.count > 1:
            return f"its output head is called {self.count} times in one forward"
        if self.reason:
            return self.reason
        if logits.requires_grad:
            return "a parameter acts on the logits after the output head"
        y = logits.detach().reshape(-1, logits.shape[-1]).cpu()
        moved = "what it makes of its head's result depends on the position, or widens it"
        if len(y) != self.mark.numel() or y.shape[1] > self.vocab:
            return moved
        eps = torch.finfo(y.dtype).eps
        fitted = fit_scale_and_cap(
            y[0].double(),
            self.grid[: y.shape[1]].cpu().double(),
            (4 if eps > 1e-4 else 16) * eps,  # bfloat16 and float16 logits may differ by a few roundings
        )
        if fitted is None:
            return "what it makes of its head's result is not a scale, a soft cap or a cut of the vocabulary"
        if not all(_close(y[i, i:], y[0, : max(0, y.shape[1] - i)]) for i in range(len(y))):
            return moved
        return LogitMap(y.shape[1], *fitted)


def _close(x: Tensor, y: Tensor) -> bool:
    """Whether two results are equal but for rounding, which may differ with the place in a vector."""
    return torch.allclose(x, y, rtol=8 * torch.finfo(x.dtype).eps, atol=0)


def fit_scale_and_cap(
    y: Tensor,  # (V,) float64
    z: Tensor,  # (V,) float64, evenly spaced, one of them zero
    tol: float,
) -> tuple[float, float | None] | None:
    """(s, c) with y = c tanh(s z / c), or (s, None) with y = s z, to a relative error `tol`; None if neither holds."""

    def fits(model: Tensor) -> bool:
        return bool(((y - model).abs() <= tol * (model.abs() + 0.01 * y.abs().max())).all())

    scale = float(y @ z / (z @ z))
    if not 0 < scale < math.inf:  # NaN fails too
        return None
    if fits(scale * z):
        return (1.0 if abs(scale - 1) < tol else scale), None
    # tanh(2a) = 2 t / (1 + t^2), t = tanh(a): two points below saturation, one twice the other, give t, then s and c.
    y_up, z_up = y[z >= 0], z[z >= 0]
    k = max((k for k in range(1, (len(y_up) + 1) // 2) if y_up[2 * k] <= 0.9 * y_up.max()), default=0)
    if k == 0 or not 0 < y_up[k] < y_up[2 * k] < 2 * y_up[k]:
        return None
    t = float(2 * y_up[k] / y_up[2 * k] - 1) ** 0.5
    cap = float(y_up[k]) / t
    scale = cap * math.atanh(t) / float(z_up[k])
    for _ in range(8):  # Gauss-Newton over all points removes the rounding of these two
        th = torch.tanh(scale * z / cap)
        slope = (1 - th * th) * z
        jacobian = torch.stack([slope, th - slope * scale / cap], 1)
        d_scale, d_cap = torch.linalg.lstsq(jacobian, (y - cap * th)[:, None]).solution[:, 0].tolist()
        scale, cap = scale + d_scale, cap + d_cap
    scale = 1.0 if abs(scale - 1) < tol else scale
    return (scale, cap) if fits(cap * torch.tanh(scale * z / cap)) else None


@contextlib.contextmanager
def quiet(model: nn.Module, head: nn.Module) -> Iterator[nn.Module]:
    """A context for a forward without side effects: it yields the module to call, in evaluation mode, without gradient
    and eager; afterwards random state and modes are as before."""
    training = [m for m in model.modules() if m.training]
    devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
    device_type = next((d.type for d in devices), "cuda")
    try:
        for m in training:
            m.training = False  # eval() may be overridden with further effects
        with (
            torch.random.fork_rng(devices, device_type=device_type),
            torch.no_grad(),
            eager(model, head, always=True),
        ):
            # DDP would synchronise buffers for nothing; FSDP must be called through its wrapper.
            yield model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    finally:
        for m in training:
            m.training = True


@contextlib.contextmanager
def eager(model: nn.Module, head: nn.Module, always: bool = False) -> Iterator[None]:
    """A context that runs eagerly what was compiled together with the head. Layers compiled by themselves stay so."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled
        yield
        return
    compiled = any(
        "_orig_mod" in m._modules
        or m._compiled_call_impl is not None
        or hasattr(vars(m).get("forward"), "_torchdynamo_orig_callable")
        for m in _path(model, head)
    )
    with _force_eager.held() if always or compiled else contextlib.nullcontext():
        yield


_force_eager = Change(lambda: torch.compiler.set_stance("force_eager"))


def _path(model: nn.Module, head: nn.Module) -> tuple[nn.Module, ...]:
    """The modules from the model down to its head, found breadth first: the head lies near the top, above thousands."""
    paths: list[tuple[nn.Module, ...]] = [(model,)]
    for path in paths:
        for child in path[-1].children():
            if child is head:
                return (*path, head)
            paths.append((*path, child))
    return (model, head)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, FSDP 1, DeepSpeed and torch.compile: the first module that has its own
    get_output_embeddings, or that is none of these wrappers."""
    while not hasattr(type(model), "get_output_embeddings"):
        wrapped = (model._modules.get(name) for name in ("_orig_mod", "_fsdp_wrapped_module", "module"))
        inner = next((m for m in wrapped if m is not None), None)
        if inner is None:
            break
        model = inner
    return model


_lock_of: Callable[[nn.Module], Lock] = one_for_each(lambda module: Lock())


def one_thread(model: nn.Module) -> Lock:
    """The lock of a model whose head, or modes, change for a call: other threads then wait with theirs. Models with one
    head, as with and without an adapter, have one lock."""
    bare = unwrap(model)
    return _lock_of(head_of(bare) or bare)


def head_of(bare: nn.Module) -> nn.Module | None:
    try:
        head = bare.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def inside_adapters(bare: Any) -> Any:
    """The model that peft has wrapped, or the model itself."""
    return bare.get_base_model() if hasattr(bare, "get_base_model") else bare


def forward_parameters(bare: nn.Module) -> tuple[frozenset[str], bool]:
    """The names that the model's forward takes, and whether it takes others too (**kwargs)."""
    return _parameters_of(type(inside_adapters(bare)).forward)


def _parameters(function: Any) -> tuple[frozenset[str], bool]:
    parameters = inspect.signature(function).parameters
    return frozenset(parameters), any(p.kind is p.VAR_KEYWORD for p in parameters.values())


_parameters_of = one_for_each(_parameters)  # read at every forward, and a signature takes 0.1 ms


def without_cache(bare: nn.Module) -> dict[str, Any]:
    """{"use_cache": False} where the forward takes it: nothing is generated, so keys and values need not be kept.

    A forward of transformers may take it among its **kwargs; where it is left out there, the config decides, and a
    model in training builds a cache.
    """
    parameters, open_ended = forward_parameters(bare)
    config: Any = getattr(inside_adapters(bare), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = "use_cache" in parameters or (open_ended and any(hasattr(c, "use_cache") for c in (config, text)))
    return {"use_cache": False} if known else {}


def logits_of(outputs: Any) -> Tensor:
    if isinstance(outputs, dict):
        return outputs["logits"]
    return outputs[0] if isinstance(outputs, tuple) else outputs.logits
