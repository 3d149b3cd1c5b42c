"""The layers of a transformers decoder: where they are, and what a trainer asks of all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .probe import inside_adapters

# The most kinds of forward that are compiled: with gradients and without, with a mask and without, of one length and of
# any, of a first layer, whose input may need no gradient; for a policy and for a reference.
KINDS = 64
# Why a prompt runs again for each response beside compiled layers.
COMPILED = "torch_compile compiles one layer for all, and keys and values of a prompt are read by a layer's number"


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder's layers. ValueError where a model has none under a name that transformers uses."""
    bare = inside_adapters(model)
    decoder = bare.get_decoder() if hasattr(bare, "get_decoder") else bare
    for name in ("layers", "h", "blocks"):
        if isinstance(getattr(decoder, name, None), nn.ModuleList):
            return getattr(decoder, name)
    raise ValueError(f"model must have a decoder with layers; {type(bare).__name__} has none that is known")


def checkpoint_layers(model: Any, options: Any = None) -> None:
    """Turns gradient checkpointing on in a transformers model, by the method that the installed version has for it.

    options: `gradient_checkpointing_kwargs` of TrainingArguments; every_n_layers and offload are left out.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    rest = dict(options or {})
    more = {name: rest.pop(name) for name in ("every_n_layers", "offload") if name in rest}
    enable(rest or None, **more)


def compile_layers(model: Any, backend: str | None = None, mode: str | None = None) -> None:
    """Compiles each layer of a transformers decoder in place. backend, mode: as in `torch.compile`.

    The model around them stays as it is, for its head's forward is replaced during each call. A step has forwards of
    several kinds (with gradients and without, with a mask and without, of new shapes), which may be more than the eight
    that dynamo compiles before it gives up: its `recompile_limit` is raised to KINDS for the process.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, KINDS)
    for layer in layers_of(model):
        layer.compile(backend=backend or "inductor", mode=mode)
