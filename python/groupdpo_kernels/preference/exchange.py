"""Ranks that hold parts of the same groups, or of the same responses, exchange a few numbers of each response.

    agreed     integers of every rank, before a collective call whose size depends on them
    gathered   float64 numbers of every rank, differentiable in those of this rank

Every rank computes the same result from what it gathers, so the backward talks to nobody: a rank takes its own slice
of the gradient, times the number of ranks. That is the gradient of the sum of the ranks' equal results, as that of
torch.distributed.nn.functional.all_gather is, and an average over the ranks makes it the gradient of one result.

Both carry errors: each rank comes to every collective call, also where its arguments are wrong, and all of them learn
of it there. The module never knows a loss or a token. It needs torch.distributed. A rank sends 16 bytes and 8 bytes a
number, and waits for the device once a call, to read whether a rank has failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import NotUnderVmap
from ..distributed import device_of

ELSEWHERE = "stops on every rank that holds parts of these groups, because one of them has failed; its error says why"


def agreed(
    what: str,  # who raises, for the error of the other ranks
    own: Sequence[int],  # as many on every rank
    error: Exception | None,  # what this rank is about to raise
    group: Any,
) -> tuple[list[list[int]], Exception | None]:
    """The integers of each rank, and the error that this rank must raise after its other collective calls."""
    rows = _all_gather(torch.tensor([error is not None, *own], dtype=torch.int64), group).tolist()
    return [row[1:] for row in rows], _error(what, error, [row[0] for row in rows])


def gathered(
    what: str,  # who raises, for the error of the other ranks
    values: Tensor,  # (k, n) float64; anything of this shape with an error
    most: int,  # the largest n of any rank
    mark: int,  # below 2^53
    error: Exception | None,
    group: Any,
) -> tuple[Tensor, list[int], Exception | None]:
    """(R, k, most) float64 with zeros behind a rank's n, the mark of each rank, and the error as in `agreed`."""
    padded = torch.nn.functional.pad(values, (0, most - values.shape[1]))
    header, found = Gathered.apply(padded, mark, error is not None, group)
    rows = header.tolist()
    return found, [int(row[1]) for row in rows], _error(what, error, [row[0] for row in rows])


def _error(what: str, own: Exception | None, failed: Sequence[float]) -> Exception | None:
    return ValueError(f"{what} {ELSEWHERE}") if own is None and any(failed) else own


def _all_gather(row: Tensor, group: Any) -> Tensor:  # (R, *row.shape)
    sent = row.to(device_of(group))
    rows = [torch.empty_like(sent) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(rows, sent, group)
    return torch.stack(rows).to(row.device)


class Gathered(NotUnderVmap):
    """`Gathered.apply(values, mark, failed, group)`: values (k, n) float64 -> each rank's `failed` and `mark`, (R, 2),
    and each rank's values, (R, k, n)."""

    instead = "preference_loss takes all groups in one call (PreferenceGroups)"

    @staticmethod
    def forward(
        values: Tensor,  # (k, n) float64
        mark: int,
        failed: bool,
        group: Any,
    ) -> tuple[Tensor, Tensor]:
        rows = _all_gather(torch.cat([values.new_tensor([failed, mark]), values.flatten()]), group)
        return rows[:, :2].clone(), rows[:, 2:].reshape(-1, *values.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.group = inputs[3]
        ctx.mark_non_differentiable(output[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, d_values: Tensor) -> tuple[Tensor | None, ...]:
        own = d_values[torch.distributed.get_rank(ctx.group)]
        return own * torch.distributed.get_world_size(ctx.group), None, None, None
