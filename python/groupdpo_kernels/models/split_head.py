"""A head under tensor parallelism, whose weight is a DTensor: each rank has some rows of the vocabulary.

    part = part_of(weight, vocab)               # within the call of the module that owns the weight
    linear_logps(whole(hidden), part.rows(weight), targets, process_group=part.group)

Hidden states are made whole on every rank, as the head's own hooks would (sequence parallelism shards them by
position); weight, bias and low-rank weights become plain tensors of this rank's rows. All of that is differentiable: a
gradient comes back in the placement of its parameter.

The module never gathers a weight or logits. It needs a mesh of one dimension whose ranks all have the same targets, and
hidden states that the head's hooks, or transformers' own forward, tell to be the same on every rank: beside plain ones
the weight may be a shard of FSDP2. A weight that is split by columns is sent to the ranks of its rows, V D / ranks
numbers a forward and a backward; one that is split by rows costs what vocab_parallel.py says.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..distributed import is_dtensor


class HeadPart(NamedTuple):
    """This rank's part of a head. The group is None where the rank computes the whole head by itself."""

    vocab: int  # rows of the head that the model uses, over all ranks
    mesh: Any = None  # of a weight that is a DTensor
    group: Any = None
    start: int = 0  # the first row of this rank

    def rows(self, x: Tensor) -> Tensor:  # (V,) or (V, n) -> this rank's rows, a plain tensor
        if self.mesh is not None:
            x = whole(x) if self.group is None else self._own(x)
        kept = max(0, self.vocab - self.start)
        return x if kept >= x.shape[0] else x[:kept]

    def _own(self, x: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if not is_dtensor(x):
            x = DTensor.from_local(x, self.mesh, [Replicate()], run_check=False)
        return _plain(x.redistribute(placements=[Shard(0)]))  # type: ignore[attr-defined]


def part_of(weight: Tensor, vocab: int) -> HeadPart:
    """This rank's part of a head for which `why_not_split` has no reason."""
    if not is_dtensor(weight):
        return HeadPart(vocab)
    split: Any = weight
    mesh = split.device_mesh
    if all(placement.is_replicate() for placement in split.placements):
        return HeadPart(vocab, mesh)
    return HeadPart(vocab, mesh, mesh.get_group(), _most(weight.shape[0], mesh) * mesh.get_local_rank())


def _most(V: int, mesh: Any) -> int:
    """Rows of the first rank: a DTensor is cut as torch.chunk does it."""
    return -(-V // mesh.size())


def why_not_split(
    weight: Tensor,  # (V, D)
    hidden: Tensor,  # (..., D)
    vocab: int | None = None,  # rows that the model uses
    takes_plain: bool = False,  # whether the head's own forward says that plain hidden states are whole
) -> str:
    """Why a head that is split over ranks cannot be computed in its parts; empty if it can, and for a whole one."""
    if not is_dtensor(weight):
        return ""
    split: Any = weight
    mesh, about = split.device_mesh, "its output head is split over devices (tensor parallelism)"
    if mesh.ndim != 1:
        return f"{about} on a mesh of {mesh.ndim} dimensions"
    if is_dtensor(hidden) and hidden.device_mesh != mesh:  # type: ignore[attr-defined]
        return f"{about} on another mesh than its hidden states"
    if not is_dtensor(hidden) and not takes_plain:
        return f"{about} while its hidden states are plain tensors, which may differ between ranks"
    if hidden.shape[-1] != weight.shape[1]:
        return f"{about} and sees {hidden.shape[-1]} columns of {weight.shape[1]}"
    if any(placement.is_partial() or type(placement).__name__ == "_StridedShard" for placement in split.placements):
        return f"{about} in a way that has no rows: {split.placements}"
    if _most(weight.shape[0], mesh) * (mesh.size() - 1) >= (weight.shape[0] if vocab is None else vocab):
        return f"{about} and leaves a rank without rows of its vocabulary"
    return ""


def whole(x: Tensor) -> Tensor:
    """The whole of a DTensor on every rank, as a plain tensor that no collective still writes; others as they are."""
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Replicate

    split: Any = x
    return _plain(split.redistribute(placements=[Replicate()] * split.device_mesh.ndim))


def _plain(x: Any) -> Tensor:
    local = x.to_local()
    return local if type(local) is Tensor else local.clone()  # hooks may have begun a collective without waiting


def like(x: Tensor, hidden: Tensor) -> Tensor:
    """x, which is the same on every rank, as hooks of a module want it that was called with `hidden`."""
    if not is_dtensor(hidden):
        return x
    from torch.distributed.tensor import DTensor, Replicate

    mesh = hidden.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


def own_forward(forward: Any) -> Any:
    """The module's own forward under those with which transformers' tensor parallelism replaces it, if it does."""
    while getattr(forward, "__module__", None) == "transformers.distributed.tensor_parallel":
        names = forward.__code__.co_freevars
        if "original_forward" not in names:
            break
        forward = forward.__closure__[names.index("original_forward")].cell_contents
    return forward
