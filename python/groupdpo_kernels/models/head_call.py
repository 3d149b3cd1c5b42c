"""HeadCall makes a model's output head return token log-probabilities instead of logits, for one forward of the model.

`HeadCall.installed()` replaces the `forward` of the head during a model's forward. The module is still called as
before: whatever gathers a sharded weight (FSDP2, ZeRO-3, offloading hooks) does so around the replacement, and the
result leaves through the module's output, where its gradient meets the same hooks.

A linear head, and plain LoRA on it, go through `linear_logps`; any other head (quantised, DoRA, custom) is called
itself, on chunks of rows whose logits are rebuilt in the backward. Rows whose target is ignored are left out.
It never reads a weight outside the call of the module that owns it, or stores (T, V) logits.
It needs a head that scores each row by itself (probe.py checks). The cost is `linear_logps`, or the head twice, and
`workspace_bytes` beyond the gradients. docs/math.md has the formulas.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

from ..lm_head.api import linear_logps


@dataclass(frozen=True)
class LogitMap:
    """How a model turns its head's output into logits: logits = cap(logit_scale * output)[..., :vocab]."""

    vocab: int
    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class ScoreOptions:
    """Options of `linear_logps` under the same names, and `strict` of `model_logps`."""

    ignore_index: int = -100
    temperature: float = 1.0
    grad_tol: float = 0.0
    workspace_bytes: int = 2**28
    impl: str = "auto"
    strict: bool = False


class Tie(torch.autograd.Function):
    """`Tie.apply(value, path)` returns value, and its backward also sends exact zeros down `path`. There they fire the
    hooks that gather and reduce parameters, before the backward of what made both begins."""

    @staticmethod
    def forward(value: Tensor, path: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.path = inputs[1].shape, inputs[1].dtype, inputs[1].device

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.path
        return gradient, torch.zeros(shape, dtype=dtype, device=device)


@dataclass
class HeadCall:
    """The replacement of `head` for one forward of its model, and its result."""

    head: nn.Module
    targets: Tensor  # (B, L) integer
    logit_map: LogitMap
    options: ScoreOptions
    count: int = 0  # calls of the head
    reason: str = ""  # why the head gave real logits after all
    token_logps: Tensor = field(init=False)  # (B, L), once the model has run

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        self.rows = (self.targets != self.options.ignore_index).reshape(-1).nonzero()[:, 0]
        self.leaf = leaf_of(self.head)
        self.parts = linear_parts(self.leaf)  # read before the swap hides them
        hook = self.head.register_forward_hook(self._leave)  # registered last, to run after FSDP's and ZeRO-3's
        try:
            with swapped(self.leaf, self._forward) as self.real:
                yield
        finally:
            hook.remove()

    def _forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs in place of the head's forward: (B, L, D) -> (B, L, 1)."""
        self.count += 1
        if args or kwargs:
            self.reason = f"its output head takes more than the hidden states: {[*map(type, args), *kwargs]}"
        else:
            self.reason = why_split(self.leaf, hidden)
        if self.reason or self.count > 1:
            return self.real(hidden, *args, **kwargs)
        total = self.targets.numel()
        if hidden.shape[:-1] not in (self.targets.shape, (total,)):
            raise ValueError(
                f"targets must have the positions that reach the output head, {tuple(hidden.shape[:-1])}; got"
                f" {tuple(self.targets.shape)} (leave logits_to_keep out; pad targets for virtual tokens)"
            )
        self.targets, self.rows = self.targets.to(hidden.device), self.rows.to(hidden.device)
        token_logps = self._score(hidden)
        if token_logps.numel() < total:
            token_logps = token_logps.new_zeros(total).index_copy(0, self.rows, token_logps)
        # A clone, since FSDP2's hooks would be lost if an operation in place hit a view.
        self.produced, self.logits_dtype = token_logps.reshape(*hidden.shape[:-1], 1).clone(), hidden.dtype
        return self.produced

    def _leave(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Takes the log-probabilities from the head's output and sends a placeholder of logits on through the model."""
        if self.reason or self.count != 1:
            return None
        # Where FSDP2 casts to its output_dtype, its hooks are on the tensor before the cast, which has all digits.
        whole = output if output.dtype == self.produced.dtype else self.produced
        self.token_logps = whole.reshape(self.targets.shape)
        placeholder = torch.zeros_like(output, dtype=self.logits_dtype)
        return Tie.apply(placeholder, output) if output.requires_grad else placeholder

    def _live(self, x: Tensor) -> Tensor:
        """(B, L, n) -> (t, n): the rows whose target is not ignored."""
        x = x.reshape(-1, x.shape[-1])
        return x if self.rows.numel() == x.shape[0] else x.index_select(0, self.rows)

    def _score(self, hidden: Tensor) -> Tensor:
        """(t,) log-probabilities of the live rows."""
        targets = self._live(self.targets.unsqueeze(-1))[:, 0].long()
        if self.parts is None:
            real = self.real  # the graph keeps logits_of, which must not hold self: self holds the graph

            def logits_of(x: Tensor) -> Tensor:
                return real(x.unsqueeze(0))[0]  # a custom head may insist on three dimensions

            return logps_in_chunks(logits_of, self._live(hidden), targets, self.logit_map, self.options)
        base, adapters = self.parts
        if base is self.leaf:
            return self._linear(targets, base.bias, self._live(hidden), base.weight)
        calls: list[tuple[nn.Module, Tensor]] = [(base, self._live(hidden))]
        x = hidden
        for a in adapters:
            x = a.cast(x)
            # Dropout draws for every position, as peft's does, so that the same random state drops the same entries.
            live = self._live(x) if a.dropout is None else self._live(a.dropout(x))
            calls.append((a.up, a.down(live) * a.scaling))

        def compute(h: Tensor, *lows: Tensor) -> Tensor:
            biases: list[Tensor] = [] if base.bias is None else [base.bias]
            biases += [a.up.bias * a.scaling for a in adapters if a.up.bias is not None]
            bias = sum(biases[1:], biases[0]).to(h.dtype) if biases else None
            if not adapters:
                return self._linear(targets, bias, h, base.weight)
            # peft keeps float32 adapters over a bfloat16 head, and rounds the sum to bfloat16.
            up = torch.cat([a.up.weight for a in adapters], 1).to(h.dtype)
            return self._linear(targets, bias, h, base.weight, (torch.cat(lows, -1).to(h.dtype), up))

        return inside(calls, compute)

    def _linear(
        self,
        targets: Tensor,  # (t,)
        bias: Tensor | None,  # (V,)
        hidden: Tensor,  # (t, D)
        weight: Tensor,  # (V, D)
        low_rank: tuple[Tensor, Tensor] | None = None,  # (t, R), (V, R)
    ) -> Tensor:  # (t,)
        m, o = self.logit_map, self.options
        if m.vocab < weight.shape[0]:  # the model cuts the padding of its vocabulary
            weight, bias = weight[: m.vocab], None if bias is None else bias[: m.vocab]
            low_rank = None if low_rank is None else (low_rank[0], low_rank[1][: m.vocab])
        return linear_logps(
            hidden,
            weight,
            targets,
            bias,
            low_rank=low_rank,
            logit_scale=m.logit_scale,
            softcap=m.softcap,
            temperature=o.temperature,
            ignore_index=o.ignore_index,
            grad_tol=o.grad_tol,
            workspace_bytes=o.workspace_bytes,
            impl=o.impl,
        )


def logps_in_chunks(
    logits_of: Callable[[Tensor], Tensor],  # (t, n) -> (t, V)
    x: Tensor,  # (T, n)
    targets: Tensor,  # (T,) int64
    logit_map: LogitMap,
    options: ScoreOptions,
) -> Tensor:  # (T,) float32 | float64
    """Log-probabilities from logits that are computed a chunk of rows at a time, and again in the backward."""

    def chunk_logps(x: Tensor, targets: Tensor) -> Tensor:
        live = targets != options.ignore_index
        z = logits_of(x)[..., : logit_map.vocab]
        z = torch.where(live.unsqueeze(-1), z, 0)  # a NaN in an ignored row must not reach the gradient
        z = z.to(torch.float64 if z.dtype == torch.float64 else torch.float32)
        if logit_map.softcap is None:
            z = z * (logit_map.logit_scale / options.temperature)
        else:
            z = torch.tanh(z * (logit_map.logit_scale / logit_map.softcap)) * (logit_map.softcap / options.temperature)
        inside_vocab = (targets >= 0) & (targets < z.shape[-1])
        logps = z.gather(-1, torch.where(inside_vocab, targets, 0).unsqueeze(-1)).squeeze(-1) - torch.logsumexp(z, -1)
        return torch.where(live, torch.where(inside_vocab, logps, torch.nan), 0)

    if targets.device.type == "cpu":  # on a GPU nothing is read back: a wrong id gives NaN
        wrong = (targets != options.ignore_index) & ((targets < 0) | (targets >= logit_map.vocab))
        if wrong.any():
            allowed = f"[0, V = {logit_map.vocab}) or ignore_index = {options.ignore_index}"
            raise ValueError(f"targets must be in {allowed}; got {targets[wrong][0]:d} ({int(wrong.sum())} such rows)")
    # At the peak, in the backward, about six float32 tensors of the size of a chunk of logits are alive.
    step = max(1, options.workspace_bytes // (24 * max(1, logit_map.vocab)))
    chunks = zip(x.split(step), targets.split(step))
    if not torch.is_grad_enabled():
        return torch.cat([chunk_logps(x, t) for x, t in chunks])
    return torch.cat([checkpoint(chunk_logps, x, t, use_reentrant=False) for x, t in chunks])


# ------------------------------------------------------------------------------------------------------- module calls


@contextlib.contextmanager
def swapped(module: nn.Module, forward: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """A context that puts `forward` in place of the module's own forward, and yields the latter. The offloading hook of
    accelerate wraps it as `_old_forward`: there the replacement goes inside the hook."""
    name = "_old_forward" if hasattr(module, "_hf_hook") and "_old_forward" in vars(module) else "forward"
    was_set, real = name in vars(module), getattr(module, name)
    vars(module)[name] = forward
    try:
        yield real
    finally:
        if was_set:
            vars(module)[name] = real
        else:
            del vars(module)[name]


def inside(calls: list[tuple[nn.Module, Tensor]], compute: Callable[..., Tensor]) -> Tensor:
    """Runs compute(*inputs) inside the nested calls of all the modules, when each has its weight gathered; the result
    leaves through the outputs of all."""
    if not calls:
        return compute().clone()  # as in HeadCall._forward: no view for FSDP2
    (module, x), *rest = calls
    with swapped(module, lambda y: inside(rest, functools.partial(compute, y))):
        return module(x)


def leaf_of(head: nn.Module) -> nn.Module:
    """The module that does the work, under the wrappers of torch.compile, FSDP 1 and peft's modules_to_save."""
    modules = head._modules
    for name in ("_orig_mod", "_fsdp_wrapped_module"):
        if (wrapped := modules.get(name)) is not None:
            return leaf_of(wrapped)
    choices, original = modules.get("modules_to_save"), modules.get("original_module")
    if choices is None or original is None:
        return head
    active = () if head.disable_adapters else head.active_adapters
    return leaf_of(choices[active[0]] if active and active[0] in choices else original)  # type: ignore[index,operator]


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the module computes x @ weight.T + bias from a weight that can be read: neither a subclass nor the
    instance has a forward of its own, and nothing is quantised. (A DTensor is plain inside the module's call.)"""
    if type(module).forward is not nn.Linear.forward:
        return False
    own = vars(module).get("_old_forward" if hasattr(module, "_hf_hook") else "forward")
    if own is not None and getattr(own, "__func__", None) is not nn.Linear.forward:
        return False
    weight: Any = module.weight
    return weight.is_floating_point() and (_is_dtensor(weight) or not is_traceable_wrapper_subclass(weight))


def why_split(leaf: nn.Module, hidden: Tensor) -> str:
    """Why the head is split over devices even inside its call, after FSDP2 has gathered its weight; empty if whole."""
    split = any(map(_is_dtensor, (hidden, *leaf.parameters(recurse=False))))
    return "its output head is split over devices (tensor parallelism)" if split else ""


def _is_dtensor(x: Tensor) -> bool:
    return "torch.distributed.tensor" in sys.modules and isinstance(x, torch.distributed.tensor.DTensor)


class Adapter(NamedTuple):
    """One active LoRA adapter of a linear layer: it adds up(down(dropout(cast(x)))) * scaling."""

    down: nn.Linear
    up: nn.Linear
    scaling: float
    dropout: nn.Module | None  # None where it would do nothing
    cast: Callable[[Tensor], Tensor]


class LinearParts(NamedTuple):
    base: nn.Linear
    adapters: list[Adapter]


def linear_parts(module: nn.Module) -> LinearParts | None:
    """The linear terms whose sum the module computes at present: itself, or the base layer and active adapters of a
    peft LoRA layer. None for anything else, DoRA and other variants included."""
    if is_linear(module):
        return LinearParts(module, [])
    peft = sys.modules.get("peft.tuners.lora.layer")  # no LoRA layer exists before this is imported
    if peft is None or type(module).forward is not peft.Linear.forward or "forward" in vars(module):
        return None
    layer: Any = module
    base = layer.get_base_layer()
    if not is_linear(base) or (layer.disable_adapters and layer.merged):  # peft would unmerge the weight here
        return None
    adapters: list[Adapter] = []
    for name in layer.active_adapters if not (layer.disable_adapters or layer.merged) else ():
        if name not in layer.lora_A:
            continue
        down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        if name in layer.lora_variant or not is_linear(down) or not is_linear(up):
            return None
        idle = isinstance(dropout, nn.Identity) or not dropout.training
        cast = functools.partial(layer._cast_input_dtype, dtype=down.weight.dtype)
        adapters.append(Adapter(down, up, layer.scaling[name], None if idle else dropout, cast))
    return LinearParts(base, adapters)
