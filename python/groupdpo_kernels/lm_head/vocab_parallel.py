"""linear_logps for a vocabulary split over a process group: each rank holds some rows of the head, and all ranks hold
the same hidden states and targets.

Each rank runs the ordinary ops on its rows; two all-reduces of a few floats a token, after one of the sizes of their
shards, join the results, and one of (T, D) sums the gradient of hidden. Shards may have any size and follow the order
of ranks. The weight and the logits are never gathered. Every rank of the group must call the forward and the backward.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference import LEAST_LOG_PROB, Head, HeadOptions, Needs, RowGradients, log_probs
from . import ops
from .autograd import OfHead, mark_differentiable, rows_of

_IGNORED = -100  # for the ids of a shard, among which the caller's ignore_index could be valid


class ShardedLinearLogps(OfHead):
    """`LinearLogps` over a group, with its arguments and the group; weight, bias and low_rank_weight are this rank's
    rows. is_top1 has size 0. Four more outputs serve the backward alone: the lse in float64, the targets as ids of this
    shard, whether each belongs to the shard, and whether it lies outside the vocabulary.
    """

    @staticmethod
    def forward(
        hidden: Tensor,  # (..., D)
        weight: Tensor,  # (V of this rank, D)
        targets: Tensor,  # (...) int64, global ids
        bias: Tensor,  # (V of this rank,) or (0,)
        low_rank_hidden: Tensor,  # (..., R)
        low_rank_weight: Tensor,  # (V of this rank, R)
        options: HeadOptions,
        stats: bool,
        impl: str,
        process_group: Any,
    ) -> tuple[Tensor, ...]:
        start, V = _span(weight, process_group)
        live = targets != options.ignore_index
        wrong = live & ((targets < 0) | (targets >= V))
        if targets.device.type == "cpu" and wrong.any():
            raise ValueError(
                f"targets must be in [0, V = {int(V)}) or ignore_index = {options.ignore_index};"
                f" got {int(targets[wrong][0])}"
            )
        local = targets - start
        inside = live & (local >= 0) & (local < weight.shape[0])
        ids = torch.where(live, torch.where(inside, local, 0), _IGNORED)
        head = Head(hidden, weight, bias, low_rank_hidden, low_rank_weight)
        out = ops.linear_logps_forward(head, ids, replace(options, ignore_index=_IGNORED), stats, impl)
        assert out.lse is not None

        # These are in float64, like every lse: few numbers a token, and a common offset of the logits costs no digit.
        top = out.lse.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, process_group)
        shift = torch.where(torch.isfinite(top), top, 0)
        mass = torch.exp(out.lse - shift)
        # In a shard of -inf alone, token_logps + lse would be NaN.
        own = torch.where(out.lse == -torch.inf, out.lse, out.token_logps + out.lse)
        target_logits = torch.where(inside, own, 0)
        sums = [target_logits, mass]
        if stats and out.entropy is not None and out.mean_logits is not None and out.log_sum_sq_probs is not None:
            expected_logit = torch.where(mass == 0, 0, mass * (out.lse - shift - out.entropy))
            sums += [
                expected_logit,
                out.mean_logits.double() * weight.shape[0],
                torch.where(mass == 0, 0, torch.exp(out.log_sum_sq_probs + 2 * (out.lse - shift))),
            ]
        joined = torch.stack(sums)
        dist.all_reduce(joined, dist.ReduceOp.SUM, process_group)
        target_logits, mass, *rest = joined.unbind()

        lse = torch.where(live, shift + mass.log(), 0)
        values = [torch.where(wrong, torch.nan, log_probs(target_logits, lse)), lse]
        if rest:
            values += [mass.log() - rest[0] / mass, rest[1] / V, rest[2].log() - 2 * mass.log()]
        outputs = [torch.where(live, x, 0).to(out.token_logps.dtype) for x in values]
        empty = outputs[0].new_empty(0)
        outputs += [empty.clone() for _ in range(5 - len(outputs))] + [empty.bool()]
        return *outputs, lse, ids, inside, wrong

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, _, bias, low_rank_hidden, low_rank_weight, options, stats, ctx.impl, ctx.process_group = inputs
        ctx.options = replace(options, ignore_index=_IGNORED)
        ctx.save_for_backward(hidden, weight, bias, low_rank_hidden, low_rank_weight, output[0], output[2], *output[6:])
        mark_differentiable(ctx, output, stats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, token_logps, entropy, lse, ids, inside, wrong = ctx.saved_tensors
        head = Head(*tensors)
        need = ctx.needs_input_grad
        needs = Needs(need[0], need[1], need[3], need[4], need[5])
        d_target, d_softmax, d_entropy = rows_of(token_logps, entropy, *upstream[:3])
        d_softmax = torch.where(wrong, torch.nan, d_softmax)
        # A row whose target is on another rank has id 0 here, which must count as an entry like any other.
        logps = ops.token_logps_of(head, ids, lse, ctx.options)
        others = d_softmax if d_entropy is None else d_softmax - d_entropy * logps.clamp(min=LEAST_LOG_PROB)
        rows = RowGradients(torch.where(inside, d_target, others * logps.exp()), d_softmax, d_entropy)
        gradients = list(ops.linear_logps_backward(head, ids, lse, rows, ctx.options, needs, ctx.impl))
        for i in (0, 3):
            if (partial := gradients[i]) is not None:
                total = partial.float() if partial.dtype.itemsize == 2 else partial
                dist.all_reduce(total, dist.ReduceOp.SUM, ctx.process_group)
                gradients[i] = total.to(partial.dtype)
        d_hidden, d_weight, d_bias, d_low_rank_hidden, d_low_rank_weight = gradients[:5]
        return d_hidden, d_weight, None, d_bias, d_low_rank_hidden, d_low_rank_weight, None, None, None, None


def _span(weight: Tensor, process_group: Any) -> tuple[Tensor, Tensor]:
    """(first global id of this rank, size of the whole vocabulary), as tensors: nothing is read back to the host."""
    rank = dist.get_rank(process_group)
    sizes = torch.zeros(dist.get_world_size(process_group), dtype=torch.int64, device=weight.device)
    sizes[rank] = weight.shape[0]
    dist.all_reduce(sizes, dist.ReduceOp.SUM, process_group)
    return sizes[:rank].sum(), sizes.sum()
