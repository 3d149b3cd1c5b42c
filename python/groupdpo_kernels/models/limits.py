"""The most positions that a model has, where they are learned or in a table, and the most token ids.

They are read from the modules that hold the tables, not from a config field: the same field is a hard limit in one
model (GPT-2, OPT, BERT, GPT-J) and advice in another (rotary or ALiBi positions, recurrent layers).

The module never reads values back from a GPU. Its cost is a walk over the modules, once per model.
"""

from __future__ import annotations

import re
import weakref
from typing import Any

from torch import Tensor, nn

_known: weakref.WeakKeyDictionary[nn.Module, list[int]] = weakref.WeakKeyDictionary()


def position_limit(model: nn.Module) -> int | None:
    """The most tokens that a sequence may have; None where the model has no table of positions."""
    if model not in _known:
        _known[model] = [limit for name, module in model.named_modules() for limit in _tables(name, module)]
    return min(_known[model], default=None)


def _tables(name: str, module: nn.Module) -> list[int]:
    *above, last = name.split(".")
    own = module._buffers
    tables = [
        held.get(key) for held in (own, vars(module)) for key in ("embed_positions", "pos_encoding")
    ]  # GPT-J, CTRL
    found = [len(x) for x in tables if isinstance(x, Tensor) and x.dim() == 2]
    vision = any(re.search("vis|image|audio|encoder$", part) for part in above)  # these count patches, not tokens
    named = last == "wpe" or ("pos" in last and "rel" not in last)
    if isinstance(module, nn.Embedding) and named and not vision:
        taken = getattr(module, "offset", None)  # rows before the first position: OPT, BART
        if taken is None:
            taken = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa
        found.append(module.num_embeddings - int(taken))
    return found


def token_limit(model: Any) -> int | None:
    """The number of token ids that the model has an embedding of; None where that is not known."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    while table is not None and not hasattr(table, "num_embeddings"):  # adapters wrap the embedding
        table = next((m for n in ("base_layer", "original_module") if (m := table._modules.get(n)) is not None), None)
    return None if table is None else int(table.num_embeddings)


def check_inputs(model: Any, inputs: dict[str, Any]) -> None:
    """ValueError for more positions than the model has, and, where ids are plain tensors on the CPU, for an id that has
    no embedding. Torch would raise an IndexError, and on a GPU end the process with an assertion."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return
    positions, limit = inputs.get("position_ids"), position_limit(model)
    length = ids.shape[1]
    if isinstance(positions, Tensor):  # in packed rows each sequence counts from 0
        length = int(positions.max()) + 1 if _readable(positions) and positions.numel() else 0
    if limit is not None and length > limit:
        raise ValueError(
            f"input_ids must have at most {limit} positions, those that {type(model).__name__} has; got {length}"
        )
    rows = token_limit(model)
    if rows is None or not _readable(ids):
        return
    wrong = (ids < 0) | (ids >= rows)
    if wrong.any():
        found = sorted({*ids[wrong].tolist()} - placeholders(model))
        if found:
            raise ValueError(f"input_ids must be in [0, {rows}), the embeddings of the model; got {found[-1]}")


def placeholders(model: Any) -> set[int]:
    """Ids that stand for images and sounds: models replace them before the embedding."""
    configs = [getattr(model, "config", None)]
    named = [item for config in configs for item in getattr(config, "__dict__", {}).items()]
    return {value for name, value in named if isinstance(value, int) and name.endswith(("_token_id", "_token_index"))}


def _readable(x: Tensor) -> bool:
    return type(x) is Tensor and x.device.type == "cpu"  # a fake tensor has no values
