"""Bytes that the ops of an LM head allocate inside, besides their results, and the block sizes that decide them.

A planner cannot see what an op allocates inside, so it asks here. The C++ sources have these sizes as constants of
their own; a test compares them with those that the extension reports of its build.

The module never allocates or measures. It needs torch alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

BLOCK_ROWS, BLOCK_COLUMNS = 1024, 2048  # the most tokens and vocabulary entries of a block of logits on a CPU
_OPS = ("linear_logps_forward", "linear_logps_backward", "frozen_head")


class Workspace(NamedTuple):
    """Bytes that an op takes: a block of logits, which is bounded, and what grows with the tokens."""

    block: int = 0
    wide: int = 0
    most: int = 0  # what the block would be with any number of tokens


def workspace_of(op: str, args: Any, device: str) -> Workspace:
    """The workspace of a call of one of this package's ops, by the op's name and arguments; none for other ops."""
    name = op.replace("logit_cache", "linear_logps")
    if name not in _OPS:
        return Workspace()
    hidden, weight = args[0], args[1]
    T, D = hidden.numel() // hidden.shape[-1], hidden.shape[-1]
    needs = next((x for x in args if isinstance(x, list)), [])
    trains = name == "linear_logps_backward" and bool(needs[1])
    options = next(i for i, x in enumerate(args) if isinstance(x, float))  # logit_scale is the first of the options
    return head_workspace(name, T, D, weight.shape[0], weight.element_size(), args[options + 4], device, trains)


def head_workspace(
    op: str, T: int, D: int, V: int, itemsize: int, workspace_bytes: int, device: str, trains: bool
) -> Workspace:
    """The workspace of an op on "cpu" or "cuda". `trains` says whether the weight gets a gradient.

    A forward holds a block of partial sums (cuda) or of logits (cpu). The other ops hold a block of logits and, where
    hidden is not float32, its gradient in float32, which alone may exceed workspace_bytes.
    """
    if op not in _OPS:
        return Workspace()
    forward, narrow = op == "linear_logps_forward", itemsize < 4

    def block(T: int) -> int:
        if device == "cpu":  # a block of logits in float32, and one in bfloat16
            rows, columns = min(T, BLOCK_ROWS), min(V, BLOCK_COLUMNS)
            size = 4 * rows * columns * (2 if narrow and not forward else 1)
            size += 4 * columns * D if trains and narrow else 0
        elif forward:
            size = 8 * T * -(-V // 128)
        else:
            size = min(T * V * itemsize, workspace_bytes // 2) + workspace_bytes // 4
        return min(size, workspace_bytes)

    wide = 0 if forward else 4 * T * D * (narrow or op == "frozen_head")
    return Workspace(block(T), wide, block(2**62))
