"""HeadCall makes a model's output head return token log-probabilities instead of logits, for one forward of the model.

`HeadCall.installed()` replaces the `forward` of the head during a model's forward. The module is still called as
before: whatever gathers a sharded weight (FSDP2, ZeRO-3, offloading hooks) does so around the replacement, and the
result leaves through the module's output, where its gradient meets the same hooks.

A linear head, and plain LoRA on it, go through `linear_logps`, with this rank's rows where tensor parallelism splits it
(split_head.py); any other head (quantised, DoRA, custom) is called itself, on chunks of rows whose logits are rebuilt
in the backward. Rows whose target is ignored are left out.
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

from ..distributed import is_dtensor
from ..lm_head.api import linear_logps
from ..threads import of_this_one
from .split_head import HeadPart, like, own_forward, part_of, whole, why_not_split


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
    split: bool = False  # whether the head is called with a DTensor

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        self.rows = (self.targets != self.options.ignore_index).reshape(-1).nonzero()[:, 0]
        self.leaf = leaf_of(self.head)
        self.parts = linear_parts(self.leaf)  # read before the swap hides them
        leave = of_this_one(self._leave, lambda *_: None)
        hook = self.head.register_forward_hook(leave)  # registered last, to run after FSDP's and ZeRO-3's
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
            self.reason = why_split(self.leaf, self.parts, hidden, self.logit_map.vocab)
        if self.reason or self.count > 1:
            return self.real(hidden, *args, **kwargs)
        total = self.targets.numel()
        if hidden.shape[:-1] not in (self.targets.shape, (total,)):
            raise ValueError(
                f"targets must have the positions that reach the output head, {tuple(hidden.shape[:-1])}; got"
                f" {tuple(self.targets.shape)} (leave logits_to_keep out; pad targets for virtual tokens)"
            )
        self.targets, self.rows = self.targets.to(hidden.device), self.rows.to(hidden.device)
        token_logps = self._score(whole(hidden), hidden)
        if token_logps.numel() < total:
            token_logps = token_logps.new_zeros(total).index_copy(0, self.rows, token_logps)
        # A clone, since FSDP2's hooks would be lost if an operation in place hit a view.
        self.produced, self.logits_dtype = token_logps.reshape(*hidden.shape[:-1], 1).clone(), hidden.dtype
        self.split = is_dtensor(hidden)
        return like(self.produced, hidden)

    def _leave(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Takes the log-probabilities from the head's output and sends a placeholder of logits on through the model."""
        if self.reason or self.count != 1:
            return None
        # Where FSDP2 casts to its output_dtype, its hooks are on the tensor before the cast, which has all digits. In
        # tensor parallelism hooks lay the output out as they would logits, and a rank may be left with none of it.
        split = self.split or is_dtensor(output)
        kept = self.produced if split or output.dtype != self.produced.dtype else output
        self.token_logps = kept.reshape(self.targets.shape)
        path = output.to_local() if is_dtensor(output) else output  # type: ignore[attr-defined]
        placeholder = torch.zeros_like(kept if split else path, dtype=self.logits_dtype)
        return Tie.apply(placeholder, path) if path.requires_grad else placeholder

    def _live(self, x: Tensor) -> Tensor:
        """(B, L, n) -> (t, n): the rows whose target is not ignored."""
        x = x.reshape(-1, x.shape[-1])
        return x if self.rows.numel() == x.shape[0] else x.index_select(0, self.rows)

    def _score(
        self,
        x: Tensor,  # (B, L, D)
        hidden: Tensor,  # (B, L, D) x as the head was given it: perhaps a DTensor
    ) -> Tensor:  # (t,)
        """Log-probabilities of the live rows."""
        targets = self._live(self.targets.unsqueeze(-1))[:, 0].long()
        if self.parts is None:
            real = self.real  # the graph keeps logits_of, which must not hold self: self holds the graph

            def logits_of(x: Tensor) -> Tensor:
                return real(x.unsqueeze(0))[0]  # a custom head may insist on three dimensions

            return logps_in_chunks(logits_of, self._live(x), targets, self.logit_map, self.options)
        base, adapters, _ = self.parts
        if base is self.leaf:
            part = part_of(base.weight, self.logit_map.vocab)
            bias = None if base.bias is None else part.rows(base.bias)
            return self._linear(part, targets, bias, self._live(x), base.weight)
        calls: list[tuple[nn.Module, Tensor]] = [(base, like(self._live(x), hidden))]
        for a in adapters:
            x = a.cast(x)
            # Dropout draws for every position, as peft's does, so that the same random state drops the same entries.
            live = self._live(x) if a.dropout is None else self._live(a.dropout(x))
            calls.append((a.up, a.down(like(live, hidden)) * a.scaling))
        return inside(calls, functools.partial(self._with_adapters, targets))

    def _with_adapters(
        self,
        targets: Tensor,  # (t,)
        hidden: Tensor,  # (t, D)
        *lows: Tensor,  # (t, R) for each adapter
    ) -> Tensor:  # (t,)
        """Runs within the calls of the base layer and of the adapters."""
        assert self.parts is not None
        base, adapters, takes_plain = self.parts
        if why := why_not_split(base.weight, hidden, self.logit_map.vocab, takes_plain):
            raise ValueError(f"the output head under adapters must be whole, or in rows of its vocabulary; {why}")
        part, hidden = part_of(base.weight, self.logit_map.vocab), whole(hidden)
        biases: list[Tensor] = [] if base.bias is None else [part.rows(base.bias)]
        biases += [part.rows(a.up.bias) * a.scaling for a in adapters if a.up.bias is not None]
        bias = sum(biases[1:], biases[0]).to(hidden.dtype) if biases else None
        if not adapters:
            return self._linear(part, targets, bias, hidden, base.weight)
        # peft keeps float32 adapters over a bfloat16 head, and rounds the sum to bfloat16.
        up = torch.cat([part.rows(a.up.weight) for a in adapters], 1).to(hidden.dtype)
        low = torch.cat([whole(low) for low in lows], -1).to(hidden.dtype)
        return self._linear(part, targets, bias, hidden, base.weight, (low, up))

    def _linear(
        self,
        part: HeadPart,
        targets: Tensor,  # (t,)
        bias: Tensor | None,  # (V of the part,)
        hidden: Tensor,  # (t, D)
        weight: Tensor,  # (V, D)
        low_rank: tuple[Tensor, Tensor] | None = None,  # (t, R), (V of the part, R)
    ) -> Tensor:  # (t,)
        m, o = self.logit_map, self.options
        return linear_logps(
            hidden,
            part.rows(weight),
            targets,
            bias,
            low_rank=low_rank,
            logit_scale=m.logit_scale,
            softcap=m.softcap,
            temperature=o.temperature,
            ignore_index=o.ignore_index,
            grad_tol=o.grad_tol,
            workspace_bytes=o.workspace_bytes,
            process_group=part.group,
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
def swapped(
    module: nn.Module, forward: Callable[..., Any], around_compiled: bool = False
) -> Iterator[Callable[..., Any]]:
    """A context that puts `forward` in place of the module's own forward, for this thread, and yields the latter. The
    offloading hook of accelerate wraps it as `_old_forward`: there the replacement goes inside the hook.

    around_compiled: where the module is compiled by itself (`module.compile()`), what is replaced is the compiled code,
    with the hooks in it, so that `forward` runs eagerly and the compiled code stays one graph.
    """
    name = "_old_forward" if hasattr(module, "_hf_hook") and "_old_forward" in vars(module) else "forward"
    if around_compiled and module._compiled_call_impl is not None:
        name = "_compiled_call_impl"
    was_set, real = name in vars(module), getattr(module, name)
    vars(module)[name] = of_this_one(forward, real)
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
    past_hooks: list[Tensor] = []  # a result that hooks of tensor parallelism would lay out as they do logits

    def forward(y: Tensor) -> Tensor:
        result = inside(rest, functools.partial(compute, y))
        if not is_dtensor(y):
            return result
        past_hooks.append(result)
        return like(result.unsqueeze(-1), y)

    with swapped(module, forward):
        output = module(x)
    if not past_hooks:
        return output
    path = output.to_local() if is_dtensor(output) else output
    return Tie.apply(past_hooks[0], path) if path.requires_grad else past_hooks[0]


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
    instance has a forward of its own, and nothing is quantised. (A DTensor is plain inside the module's call, or has
    this rank's rows.)"""
    if type(module).forward is not nn.Linear.forward:
        return False
    own = own_forward(vars(module).get("_old_forward" if hasattr(module, "_hf_hook") else "forward"))
    if own is not None and getattr(own, "__func__", None) is not nn.Linear.forward:
        return False
    weight: Any = module.weight
    return weight.is_floating_point() and (is_dtensor(weight) or not is_traceable_wrapper_subclass(weight))


def why_split(leaf: nn.Module, parts: LinearParts | None, hidden: Tensor, vocab: int | None = None) -> str:
    """Why the head is split over devices, even inside its call, in a way that needs real logits; empty if it is not. A
    head under adapters is looked at in the call of its base layer."""
    if parts is None:
        split = any(map(is_dtensor, (hidden, *leaf.parameters(recurse=False))))
        return "its output head is split over devices (tensor parallelism) and is no linear layer" if split else ""
    return why_not_split(parts.base.weight, hidden, vocab, parts.takes_plain) if parts.base is leaf else ""


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
    takes_plain: bool  # whether transformers' tensor parallelism gives it hidden states that are plain and whole


def linear_parts(module: nn.Module) -> LinearParts | None:
    """The linear terms whose sum the module computes at present: itself, or the base layer and active adapters of a
    peft LoRA layer. None for anything else, DoRA and other variants included."""
    if is_linear(module):
        return LinearParts(module, [], _takes_plain(module))
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
    return LinearParts(base, adapters, _takes_plain(base))


def _takes_plain(module: nn.Linear) -> bool:
    forward = vars(module).get("forward")
    return own_forward(forward) is not forward
