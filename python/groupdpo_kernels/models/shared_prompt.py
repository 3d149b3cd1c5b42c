"""A prompt runs once for all of its responses: its keys and values are handed to them by the model's own cache.

    prefix = attach(model).prefix(prompt[:, :-1])            # the prompt without its last token
    token_logps = model_logps(model, rows, targets, prefix=prefix, position_ids=positions)

A row of `rows` is the prompt's last token and a response without its last one, so each token is computed once. A causal
model's states at prompt positions do not depend on what follows, and what follows sees them through keys and values
alone: values and gradients are those of whole sequences, up to rounding. Gradients flow into the prefix, or into leaves
put in its place, as `group_backward` does.

`why_not_shared` measures once per model whether it does: the hidden states of whole sequences against those of rows
after a prefix. Recurrent and hybrid layers, whose state is no key or value, fail there, and so does a model whose
forward takes no cache.

The module never changes a model: it replaces `forward` of layers that checkpoint for a call, since transformers drops
the cache there. It never holds a copy of the prompt for each response, but in the attention of the layer that runs and
in what that saves for its backward. It needs transformers 5, and prompts that lie on the left of their rows, without
padding between. The cost is a forward of the prompt, and 2 * layers * key-value width * prompt length numbers.
docs/math.md, section 4, has the method.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..threads import Change, one_for_each
from .head_call import swapped
from .probe import forward_parameters
from .prompt_attention import mark, two_parts

REENTRANT = "reentrant checkpoints give their inputs alone a gradient: take use_reentrant=False"
Prefix = Sequence[Tensor | None]  # keys and values (B, heads, P, width) of each layer, in turn; None where it has none


def without_positions(bare: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs without position_ids where the forward takes none: such a model counts from the cache's length."""
    parameters, open_ended = forward_parameters(bare)
    if "position_ids" in parameters or open_ended:
        return inputs
    return {name: value for name, value in inputs.items() if name != "position_ids"}


def cache_name(bare: Any) -> str | None:
    """The name under which the model's forward takes a cache; None where it takes none."""
    parameters, _ = forward_parameters(bare)
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def why_not_cached(bare: Any, longest: int | None = None) -> str:
    """Why the model's keys and values cannot be handed over, as far as its modules show it; empty if nothing does.

    longest: the most tokens of a prompt with a response. None stands for any number.
    """
    name = type(bare).__name__
    config: Any = getattr(bare, "config", None)
    if cache_name(bare) is None:
        return f"the forward of {name} takes no cache"
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} has an encoder"
    limit = rotary_limit(bare)
    if limit is not None and (longest is None or longest > limit):
        return f"rotary embeddings of {name} depend on the length of a sequence beyond {limit} tokens"
    flagged = _checkpointing(bare)
    if flagged and not any(map(_is_layer, flagged)):
        return f"{name} checkpoints its layers in a way of its own"
    for layer in flagged:
        function = getattr(layer, "_gradient_checkpointing_func", None)
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant"):
            return REENTRANT
    return ""


_rotary_limits: weakref.WeakKeyDictionary[Any, int | None] = weakref.WeakKeyDictionary()


def rotary_limit(bare: Any) -> int | None:
    """The length beyond which the model rotates all positions of a sequence by its length; None where it never does.

    A prompt alone would be rotated as a shorter sequence than with its responses.
    """
    if bare not in _rotary_limits:
        _rotary_limits[bare] = min((limit for module in bare.modules() for limit in _limits_of(module)), default=None)
    return _rotary_limits[bare]


def _limits_of(module: Any) -> Iterator[int]:
    kinds = getattr(module, "rope_type", None)
    for part, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
        if isinstance(kind, str) and "dynamic" in kind:
            yield int(module.original_max_seq_len)
        elif kind == "longrope":
            parameters = module.config.rope_parameters
            yield (parameters if part is None else parameters[part])["original_max_position_embeddings"]


def prefix_cache() -> Any:
    """A cache that keeps the keys and values of one forward, in its graph."""
    return _classes()[1]()


def rows_cache(
    prefix: Prefix,
    prompt_of: Tensor | None,  # (b,) integer, the prompt of each row; None where there is one prompt
) -> Any:
    """A cache that puts a prefix in front of the keys and values of every layer, and keeps nothing."""
    return _classes()[1](prefix, prompt_of)


@functools.cache
def _classes() -> tuple[type, type]:
    """The cache and its layers. They are made at their first use, because importing transformers takes seconds."""
    from transformers.cache_utils import Cache, DynamicLayer

    class PromptLayer(DynamicLayer):
        """Keeps what it is given until that is taken or, made for rows, puts a prompt's in front of what it is given.

        Either way its length stays what it was before the forward, so that a checkpointed layer, which runs again in
        the backward, finds it as it was.
        """

        def __init__(self, for_rows: bool = False, pair: Prefix = (None, None), prompt_of: Tensor | None = None):
            super().__init__()
            self.for_rows, self.prompt_of = for_rows, prompt_of
            self.keys, self.values = pair
            self.is_initialized = for_rows
            self.used = self.taken = False

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            self.used = True
            if self.for_rows:
                keys, values = self._continued(self.keys, key_states), self._continued(self.values, value_states)
                if self.keys is not None and self.prompt_of is None:
                    mark(keys, values, (key_states, value_states), (self.keys, self.values))
                return keys, values
            if self.keys is None and not self.taken:
                self.keys, self.values = key_states, value_states
            return key_states, value_states

        def take(self) -> tuple[Tensor | None, Tensor | None]:
            pair, self.keys, self.values, self.taken = (self.keys, self.values), None, None, True
            return pair

        def _continued(self, prompt: Tensor | None, states: Tensor) -> Tensor:
            if prompt is None:
                return states
            if self.prompt_of is not None:
                prompt = prompt.index_select(0, self.prompt_of)
            B, *heads, _, width = states.shape
            if (*prompt.shape[1:-2], prompt.shape[-1]) != (*heads, width):
                wanted, got = ["B", *heads, "P", width], tuple(prompt.shape)
                raise ValueError(f"prefix must be of this model, keys and values of shape {wanted}; got {got}")
            if prompt.shape[0] not in (1, B):
                raise ValueError(f"prompt_of must name one prompt for each of the {B} rows; got {prompt.shape[0]}")
            return torch.cat([prompt.expand(states.shape[0], *prompt.shape[1:]), states], -2)

        def get_seq_length(self, *args: Any) -> int:
            return self.keys.shape[-2] if self.for_rows and self.keys is not None else 0

    class PromptCache(Cache):
        def __init__(self, prefix: Prefix | None = None, prompt_of: Tensor | None = None) -> None:
            self.for_rows = prefix is not None
            if prefix is None:
                super().__init__(layer_class_to_replicate=PromptLayer)
            else:
                pairs = zip(prefix[::2], prefix[1::2])
                super().__init__(layers=[PromptLayer(True, pair, prompt_of) for pair in pairs])

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            if self.for_rows and layer_idx >= len(self.layers):
                raise ValueError(_wrong_layers(self))
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

        def take(self) -> tuple[Tensor | None, ...]:
            """The keys and values of all layers. The cache forgets them: checkpoints in their graph hold the cache."""
            layers: Any = self.layers
            return tuple(x for layer in layers for x in layer.take())

    return PromptLayer, PromptCache


def check_used(cache: Any) -> None:
    """ValueError where a forward left keys and values of a prefix aside: the prefix is of a deeper model."""
    if not all(layer.used for layer in cache.layers):
        raise ValueError(_wrong_layers(cache))


def _wrong_layers(cache: Any) -> str:
    return (
        f"prefix must be of this model, which keeps keys and values of other layers; got those of {len(cache.layers)}"
    )


def check_positions(bare: Any, positions: Tensor) -> None:
    """ValueError for positions from which on the model would have rotated the prompt in another way."""
    limit = rotary_limit(bare)
    if limit is not None and positions.numel() and (last := int(positions.max())) >= limit:
        raise ValueError(
            f"position_ids must be below {limit} with a prefix, since rotary embeddings of {type(bare).__name__} depend"
            f" on the length of a longer sequence; got {last}"
        )


# ------------------------------------------------------------------------------------------------------- checkpointing


@contextlib.contextmanager
def cache_kept(bare: nn.Module) -> Iterator[None]:
    """A context for one forward, in which layers that checkpoint keep the cache: transformers would drop it there,
    since a cache that grows would grow again in the backward. These do not grow.
    """
    flagged = _checkpointing(bare) if bare.training else set()
    with contextlib.ExitStack() as stack:
        for layer in _outermost(bare, flagged) if torch.is_grad_enabled() else ():
            inner = [m for m in layer.modules() if m in flagged]
            real: list[Any] = []
            checkpointed = functools.partial(_checkpointed, layer, real, inner)
            real.append(stack.enter_context(swapped(layer, checkpointed, around_compiled=True)))
        with _unflagged(flagged), two_parts():  # without gradients too: GPT-2 and others drop the cache even there
            yield


def _checkpointing(bare: nn.Module) -> set[nn.Module]:
    """The modules whose checkpointing is on, but for `_unflagged`: layers, and the models that hold them."""
    return {m for m in bare.modules() if "gradient_checkpointing" in vars(m) and _is_flagged(m)}


def _is_flagged(m: nn.Module) -> bool:
    with _change_of(m).standing() as held:  # read apart, the two could belong to two moments
        return held or bool(m.gradient_checkpointing)


def _is_layer(module: nn.Module) -> bool:
    """Whether transformers checkpoints the module's whole forward."""
    layers: Any = sys.modules.get("transformers.modeling_layers")
    return layers is not None and isinstance(module, layers.GradientCheckpointingLayer)


def _outermost(bare: nn.Module, flagged: set[nn.Module]) -> list[nn.Module]:
    """The flagged layers that do not lie within another one."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in bare.modules():  # a layer comes before what lies within it
        if module in flagged and _is_layer(module) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def _checkpointed(layer: Any, real: list[Any], flagged: list[nn.Module], *args: Any, **kwargs: Any) -> Any:
    """Runs what was replaced of the layer, the one item of `real`, under its own checkpoint function."""

    def run(*args: Any) -> Any:
        with _unflagged(flagged), two_parts():  # also when it runs again, in the backward
            return real[0](*args, **kwargs)

    return layer._gradient_checkpointing_func(run, *args)


@contextlib.contextmanager
def _unflagged(modules: Any) -> Iterator[None]:
    """A context in which these modules do not checkpoint, for whoever calls them."""
    with contextlib.ExitStack() as stack:
        for m in modules:
            stack.enter_context(_change_of(m).held())
        yield


@contextlib.contextmanager
def _without_flag(module: Callable[[], Any]) -> Iterator[None]:
    m = module()
    m.gradient_checkpointing = False
    try:
        yield
    finally:
        m.gradient_checkpointing = True


_change_of = one_for_each(lambda m: Change(functools.partial(_without_flag, weakref.ref(m))))
