"""Sums of token log-probabilities by sequence, and checks of the offsets that say where sequences lie.

Everything after `seq_logps` works on sequences alone. It is a custom op, so that compiled graphs hold one node.

It never lets an offset read out of bounds, and needs torch alone. The values of offsets are read on a CPU alone; on a
GPU wrong ones give NaN downstream. The cost is O(T + S), in float64, and S numbers a rank where tokens lie on several.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import INTEGERS, NotUnderVmap, check_group, check_tensors
from .exchange import agreed, gathered


def seq_logps(
    token_logps: Tensor,  # (T,) floating
    cu_seqlens: Tensor,  # (S+1,) integer
    *,
    process_group: Any = None,
) -> Tensor:  # (S,) the dtype of token_logps
    """Sums of token_logps by sequence: sequence s owns tokens cu_seqlens[s] : cu_seqlens[s+1]. Differentiable.

    With a process_group the tokens of each sequence lie on its ranks (context parallelism): each rank passes those that
    it has, with offsets of its own and the same S, and none of a sequence if it has none. All get the sums over all.
    Where each rank goes on to the same loss, its gradient is R times that of its own tokens, R the number of ranks, so
    that an average over the ranks, as engines take it, is that of one process with all tokens.

    Raises TypeError for arguments that are not tensors and offsets that are not integers, and ValueError for offsets
    that do not start at 0, decrease, or do not end at T (on a GPU only shapes are checked: values are not read back).
    An error of one rank is raised on all ranks of the process_group.
    """
    if process_group is None:
        return _seq_logps(token_logps, cu_seqlens)
    check_group("process_group", process_group)
    sums, error = torch.zeros(0, dtype=torch.float64), None
    try:
        sums = _seq_logps(token_logps, cu_seqlens, torch.float64)
    except Exception as raised:  # the other ranks must know
        error = raised
    rows, wrong = agreed("seq_logps", [len(sums)], error, process_group)
    counts = [S for (S,) in rows]
    if wrong is None and len({*counts}) > 1:
        got = ", ".join(map(str, counts))
        wrong = ValueError(f"cu_seqlens must have as many sequences on every rank of process_group; got {got}")
    if wrong is not None:
        raise wrong
    found, *_ = gathered("seq_logps", sums[None], len(sums), 0, None, process_group)
    return found[:, 0].sum(0).to(token_logps.dtype)


def _seq_logps(token_logps: Tensor, cu_seqlens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    check_tensors(token_logps=token_logps, cu_seqlens=cu_seqlens)
    if token_logps.dim() != 1 or not token_logps.is_floating_point():
        raise ValueError(
            f"token_logps must be a floating (T,) tensor; got {tuple(token_logps.shape)} {token_logps.dtype}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"cu_seqlens must be an integer (S+1,) tensor; got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    if cu_seqlens.device != token_logps.device:
        raise ValueError(
            f"cu_seqlens must be on the device of token_logps, {token_logps.device}; got {cu_seqlens.device}"
        )
    return SegmentSums.apply(token_logps.to(dtype or token_logps.dtype), as_offsets("cu_seqlens", cu_seqlens))


@torch.library.custom_op("groupdpo_kernels::segment_sums", mutates_args=())
def segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """values (T,), offsets (S+1,) integer -> (S,), the dtype of values."""
    if values.device.type == "cpu":
        check_offsets("cu_seqlens", offsets, values.shape[0], "the number of tokens")
    # Each segment is summed in order, in float64. So the sum is deterministic and exact to the last float32 digit for a
    # million tokens, and a NaN stays in its segment.
    return torch.segment_reduce(values.double(), "sum", offsets=offsets.long(), axis=0, unsafe=True).to(values.dtype)


@segment_sums.register_fake
def _(values: Tensor, offsets: Tensor) -> Tensor:
    return values.new_empty(offsets.shape[0] - 1)


def segment_sums_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.T = inputs[0].shape[0]


def segment_sums_backward(ctx: Any, d_sums: Tensor) -> tuple[Tensor, None]:
    (offsets,) = ctx.saved_tensors
    return torch.repeat_interleave(d_sums, offsets.long().diff(), output_size=ctx.T), None


segment_sums.register_autograd(segment_sums_backward, setup_context=segment_sums_context)


def as_offsets(name: str, offsets: Tensor) -> Tensor:
    """Offsets of any integer dtype, as int32 or int64 so that sums of them fit. TypeError for other dtypes."""
    check_tensors(**{name: offsets})
    if offsets.dtype not in INTEGERS:
        raise TypeError(f"{name} must be an integer tensor; got {offsets.dtype}")
    return offsets if offsets.dtype in (torch.int32, torch.int64) else offsets.long()


def check_offsets(name: str, offsets: Tensor, total: int, what: str) -> None:
    """ValueError unless offsets start at 0, never decrease and end at `total`. It reads values: for the CPU only."""
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != total:
        raise ValueError(f"{name} must start at 0 and end at {what}, {total}; got {first} and {last}")
    decreases = offsets.diff() < 0
    if decreases.any():
        i = int(decreases.nonzero()[0, 0])
        raise ValueError(
            f"{name} must not decrease; {name}[{i}] is {int(offsets[i])} and {name}[{i + 1}] is {int(offsets[i + 1])}"
        )


class SegmentSums(NotUnderVmap):
    """`SegmentSums.apply(values, offsets)` runs the op segment_sums: values (T,) and offsets (S+1,) integer -> (S,). It
    exists for torch.func.grad, which does not use an op's own formula.
    """

    instead = "seq_logps takes all sequences packed into one (T,) tensor, with one cu_seqlens"
    setup_context = staticmethod(segment_sums_context)
    backward = staticmethod(segment_sums_backward)

    @staticmethod
    def forward(
        values: Tensor,  # (T,)
        offsets: Tensor,  # (S+1,) integer
    ) -> Tensor:
        return segment_sums(values, offsets)


def bounded_offsets(
    offsets: Tensor,  # (n+1,) integer
    total: int,
) -> tuple[Tensor, Tensor]:
    """(bounded, valid): offsets that start at 0, never decrease and end at `total`, so that nothing reads out of
    bounds, and a bool tensor that says whether the given offsets already did."""
    inner = offsets[1:-1].clamp(0, total).cummax(0).values if offsets.shape[0] > 2 else offsets[1:-1]
    bounded = torch.cat([torch.zeros_like(offsets[:1]), inner, torch.full_like(offsets[:1], total)])
    return bounded, (bounded == offsets).all()
