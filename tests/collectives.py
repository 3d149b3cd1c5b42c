"""Counts the collective calls of a rank, and the bytes that it receives by them, as the planner names them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

# What torch dispatches: the kind, and which argument is the whole tensor; None for the result.
OPS = {
    "c10d::_allgather_base_": ("weights", 0),
    "c10d::_reduce_scatter_base_": ("gradients", 1),
    "c10d::allreduce_": ("activations", 0),
    "c10d::broadcast_": ("agreements", 0),
    "_c10d_functional::all_gather_into_tensor": ("weights", None),
    "_c10d_functional::reduce_scatter_tensor": ("gradients", 0),
    "_c10d_functional::all_reduce": ("activations", 0),
}
AGREED = (torch.int32, torch.int64, torch.float64)  # of sums that are no data
NO_CALL = ("wait_tensor", "barrier", "_wrap_tensor_autograd")


def units(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """FSDP2 as accelerate cuts it: layers, the embedding, norm and head as one unit that stays gathered, the rest."""
    base = next(m for m in model.modules() if hasattr(m, "embed_tokens"))
    for module in (*base.layers, base.embed_tokens):
        fully_shard(module, mesh=mesh)
    fully_shard([base.norm, model.get_output_embeddings()], mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh)


class Collectives(TorchDispatchMode):
    """`calls` and `bytes` by kind, in process groups of `world` ranks.

    A rank receives all but its own share of what is gathered or scattered, and twice that of a sum that all get. A sum
    of whole numbers or of float64 is an agreement.
    """

    def __init__(self, world: int) -> None:
        super().__init__()
        self.world = world
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its own collective calls come here by themselves
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if "c10d" in name and not name.endswith(NO_CALL):
            kind, place = OPS[name]
            found = out if place is None else args[place]
            x: Tensor = found[0] if isinstance(found, (list, tuple)) else found
            times = 2 if kind == "activations" else 1
            kind = "agreements" if kind == "activations" and x.dtype in AGREED else kind
            self.calls[kind] += 1
            self.bytes[kind] += times * x.nbytes * (self.world - 1) // self.world
        return out
