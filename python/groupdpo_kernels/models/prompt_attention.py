"""Attention of rows to the keys and values of a prompt that they share, on a CPU, without a copy of it for each row.

A row sees the whole prompt and, of its own tokens, those before. So its attention is that to the prompt, which needs
no mask and runs for all rows at once, and that to its own tokens; the two meet by the log of their sums, lse:

    output = output_prompt exp(lse_prompt - lse) + output_own exp(lse_own - lse),  lse = log(e^lse_prompt + e^lse_own)

and the backward of each part, given the whole output and lse, is its share of the gradient. Under transformers' own
attention each row would have a copy of the prompt's keys and values, made, repeated for each query head and kept for
the backward, and each layer a mask of L x (P + L).

The rows' cache marks the keys that it returns with what they were made of. `two_parts` puts a function in place of
transformers' "sdpa" for the time of a forward. It takes marked keys in two parts, and hands on the rest: several
prompts, another device, dropout, a sliding window.
The module never changes a model, and reads no values but a mask's, once a forward. It needs torch's flash attention for
CPUs. The cost is that of B * L queries over P keys and of B causal sequences of L tokens, each at flash attention's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..threads import Change

_flash: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_flash_backward: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


class Parts(NamedTuple):
    """What the keys and values of rows after a prompt were made of."""

    own_keys: Tensor  # (B, heads, L, width)
    own_values: Tensor  # (B, heads, L, width)
    prompt_keys: Tensor  # (1, heads, P, width)
    prompt_values: Tensor  # (1, heads, P, width)
    values: Tensor  # (B, heads, P + L, width), the values that belong to the marked keys


def mark(
    keys: Tensor,  # (B, heads, P + L, width)
    values: Tensor,  # (B, heads, P + L, width)
    own: tuple[Tensor, Tensor],  # keys and values (B, heads, L, width)
    prompt: tuple[Tensor | None, Tensor | None],  # keys and values (B or 1, heads, P, width)
) -> None:
    """Remembers what these keys and values were made of, where attention may use it."""
    pk, pv = prompt
    if pk is None or pv is None or len(pk) > 1 or keys.device.type != "cpu" or torch.compiler.is_compiling():
        return
    keys._groupdpo_parts = Parts(*own, pk, pv, values)  # type: ignore[attr-defined]


def two_parts() -> contextlib.AbstractContextManager[None]:
    """A context for one forward, in which "sdpa" of transformers takes marked keys in two parts. Forwards of other
    threads, whose keys have no mark, are as ever."""
    return _change.held()


@contextlib.contextmanager
def _marked_keys_in_two_parts() -> Iterator[None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as table

    whole = table["sdpa"]
    table["sdpa"] = _in_place_of(whole)
    try:
        yield
    finally:
        table["sdpa"] = whole


_change = Change(_marked_keys_in_two_parts)


@functools.cache
def _in_place_of(whole: Any) -> Any:
    """One object for all forwards: code that is compiled looks at its identity."""
    return functools.partial(_attention, whole)


def _attention(
    whole: Any,  # transformers' own function
    module: Any,
    query: Tensor,  # (B, query heads, L, width)
    key: Tensor,  # (B, heads, P + L, width)
    value: Tensor,  # (B, heads, P + L, width)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    parts: Parts | None = None if torch.compiler.is_compiling() else getattr(key, "_groupdpo_parts", None)
    if (
        parts is None
        or parts.values is not value
        or dropout
        or any(kwargs.get(name) not in (None, False) for name in ("softcap", "output_attentions"))
        or kwargs.get("position_bias") is not None
        or kwargs.get("is_causal") is False
        or len({x.dtype for x in (query, *parts)}) > 1
        or len({x.shape[-1] for x in (query, *parts)}) > 1
        or not (_flash and _flash_backward)
        or not _is_causal(attention_mask, query.shape[-2], key.shape[-2], kwargs.get("sliding_window"))
    ):
        return whole(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    return _TwoParts.apply(query, *parts[:4], scaling), None


def _is_causal(mask: Tensor | None, L: int, whole: int, window: int | None) -> bool:
    """Whether the mask of L rows lets each see all that is before it, and nothing else. Layers share their mask, which
    remembers the answer."""
    if mask is None:
        return L == 1
    if mask.dtype != torch.bool or mask.shape[-2:] != (L, whole):
        return False
    if isinstance(mask, torch._subclasses.FakeTensor):  # of a plan: it has no values
        return window is None or window >= whole
    known: bool | None = getattr(mask, "_groupdpo_is_causal", None)
    if known is None:
        known = bool((mask == torch.ones(L, whole, dtype=torch.bool).tril(whole - L)).all())
        mask._groupdpo_is_causal = known  # type: ignore[attr-defined]
    return known


class _TwoParts(torch.autograd.Function):
    """(query, own keys and values, those of the prompt, scale) -> output (B, L, query heads, width)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, scale: float | None) -> Tensor:
        B, heads, L, width = query.shape
        H = k.shape[1]
        of_prompt, lse_prompt = _flash(_joined(query, H), _spread(pk, query), _spread(pv, query), scale=scale)
        own, lse_own = _flash(query, _repeated(k, query), _repeated(v, query), 0.0, True, scale=scale)
        lse_prompt = _apart(lse_prompt.unsqueeze(-1), B)
        lse_own = lse_own.unflatten(1, (H, -1)).unsqueeze(-1)
        share = torch.sigmoid(lse_prompt - lse_own)  # of the prompt
        output = query.new_empty(B, L, heads, width)
        parts = own.unflatten(1, (H, -1)), _apart(of_prompt, B)
        if query.dtype == share.dtype:
            torch.lerp(*parts, share, out=_split(output, H))
        else:
            wide = [x.to(share.dtype) for x in parts]
            _split(output, H).copy_(torch.lerp(wide[0], wide[1], share))
        lse = torch.logaddexp(lse_prompt, lse_own).flatten(1, 2)
        ctx.save_for_backward(query, k, v, pk, pv, output, lse)
        ctx.scale = scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        query, k, v, pk, pv, output, lse = ctx.saved_tensors
        B, H, scale = query.shape[0], k.shape[1], ctx.scale
        d_output, output = d_output.transpose(1, 2), output.transpose(1, 2)
        joined = _joined(d_output, H), _joined(query, H), _spread(pk, query), _spread(pv, query), _joined(output, H)
        d_joined, d_pk, d_pv = _flash_backward(*joined, _joined(lse, H).squeeze(-1), 0.0, False, scale=scale)
        own = d_output, query, _repeated(k, query), _repeated(v, query), output
        d_query, d_k, d_v = _flash_backward(*own, lse.squeeze(-1), 0.0, True, scale=scale)
        d_query.unflatten(1, (H, -1)).add_(_apart(d_joined, B))
        d_k, d_v = (x.unflatten(1, (H, -1)).sum(2) for x in (d_k, d_v))
        return d_query, d_k, d_v, d_pk.sum(1)[None], d_pv.sum(1)[None], None


# In the names of shapes below, heads are those of the query, H those of keys and values, and group = heads / H.


def _joined(
    x: Tensor,  # (B, heads, L, width)
    H: int,
) -> Tensor:  # (H, group, B * L, width)
    """All rows in one, since they see the same prompt. H is in the place of the batch: so the prompt's keys need not be
    repeated for each query head. It is a view where memory has the order (B, L, heads, width), as projections give it.
    """
    return x.transpose(1, 2).flatten(0, 1).unflatten(1, (H, -1)).permute(1, 2, 0, 3)


def _apart(
    x: Tensor,  # (H, group, B * L, width)
    B: int,
) -> Tensor:  # (B, H, group, L, width), a view
    return x.unflatten(2, (B, -1)).permute(2, 0, 1, 3, 4)


def _split(
    x: Tensor,  # (B, L, heads, width)
    H: int,
) -> Tensor:  # (B, H, group, L, width), a view
    return x.unflatten(2, (H, -1)).permute(0, 2, 3, 1, 4)


def _spread(
    x: Tensor,  # (1, H, P, width)
    query: Tensor,  # (B, heads, L, width)
) -> Tensor:  # (H, group, P, width), a view
    return x[0].unsqueeze(1).expand(-1, query.shape[1] // x.shape[1], -1, -1)


def _repeated(
    x: Tensor,  # (B, H, L, width)
    query: Tensor,  # (B, heads, L, width)
) -> Tensor:  # (B, heads, L, width)
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1) if query.shape[1] != x.shape[1] else x
