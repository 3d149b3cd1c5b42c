"""Adapters of a model, whichever way they were put on: a `peft.PeftModel`, or PEFT inside a transformers model.

`AutoModelForCausalLM.from_pretrained` of an adapter's folder gives the second kind. Both have `peft_config`, a dict by
name, but their methods to switch adapters have different names; the functions here work with both.

The module never imports peft where there is no adapter, and changes `requires_grad` of a weight in `let_adapter_train`
alone. It needs nothing: a model without adapters has an empty list of them. It costs a look at the model's attributes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any


def is_peft_model(model: Any) -> bool:
    peft = sys.modules.get("peft")  # no PeftModel exists before this is imported
    return peft is not None and isinstance(model, peft.PeftModel)


def has_adapter(model: Any) -> bool:
    return is_peft_model(model) or bool(getattr(model, "_hf_peft_config_loaded", False))


def adapter_configs(model: Any) -> dict[str, Any]:
    """The configs of all adapters by name, active or not."""
    return dict(model.peft_config) if has_adapter(model) else {}


def active_adapters(model: Any) -> list[str]:
    """Names of the adapters that the layers use: `active_adapter` of a PeftModel names one even where several are."""
    if not has_adapter(model):
        return []
    if is_peft_model(model):
        return list(model.active_adapters)
    active: str | list[str] = next((m.active_adapter for m in _layers(model)), [])
    return [active] if isinstance(active, str) else list(active)


def _layers(model: Any) -> Iterator[Any]:
    """The modules that hold weights of adapters. They are switched one by one, because transformers' own methods refuse
    all but the newest PEFT, while loading an adapter's folder works with older ones."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    return (module for module in model.modules() if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)))


def copy_config(model: Any, source: str, target: str) -> None:
    """Adds an adapter `target` with the config of `source`; the active adapter stays active."""
    config = model.peft_config[source]
    if is_peft_model(model):
        model.add_adapter(target, config)
        return
    from peft import inject_adapter_in_model

    active = active_adapters(model)
    with _same_requires_grad(model):
        inject_adapter_in_model(config, model, target)
        model.peft_config[target] = config
        _set(model, active)
    for name, parameter in model.named_parameters():
        if target in name.split("."):
            parameter.requires_grad_(False)


def delete_adapter(model: Any, name: str) -> None:
    if is_peft_model(model):
        model.delete_adapter(name)
        return
    with _same_requires_grad(model):
        for layer in _layers(model):
            layer.delete_adapter(name)
    model.peft_config.pop(name, None)


@contextlib.contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """A context in which the model runs without its adapters."""
    if is_peft_model(model):
        with model.disable_adapter():
            yield
        return
    with _same_requires_grad(model):
        for layer in _layers(model):
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in _layers(model):
                layer.enable_adapters(True)


@contextlib.contextmanager
def with_adapter(model: Any, name: str) -> Iterator[None]:
    """A context in which this adapter takes the place of the active ones."""
    active = active_adapters(model)
    with _same_requires_grad(model):
        _set(model, [name])
        try:
            yield
        finally:
            _set(model, active)


def _set(model: Any, names: list[str]) -> None:
    chosen = names[0] if len(names) == 1 else names
    if is_peft_model(model):
        (model if len(names) == 1 else model.base_model).set_adapter(chosen)  # a PeftModel itself takes one name
        return
    for layer in _layers(model):
        layer.set_adapter(chosen)


def save_adapter(model: Any, folder: str, state_dict: Any = None) -> None:
    """Writes the active adapter of a transformers model into `folder` in PEFT's format; several active adapters go into
    folders of their names in there. state_dict: whole weights, where the model holds shards; None takes the model's."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    active = active_adapters(model)
    for name in active:
        place = folder if len(active) == 1 else os.path.join(folder, name)
        os.makedirs(place, exist_ok=True)
        found = get_peft_model_state_dict(model, state_dict=state_dict or None, adapter_name=name)
        tensors = {f"base_model.model.{key}": x.detach().cpu().contiguous() for key, x in found.items()}
        save_file(tensors, os.path.join(place, "adapter_model.safetensors"), metadata={"format": "pt"})
        model.peft_config[name].save_pretrained(place)


@contextlib.contextmanager
def _same_requires_grad(model: Any) -> Iterator[None]:
    """A context that restores `requires_grad` at its end, since PEFT sets it for training when adapters switch."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, trains in before.items():
            if parameter.requires_grad != trains:
                parameter.requires_grad_(trains)


def let_adapter_train(model: Any) -> None:
    """Makes the active adapter trainable, with a warning, where nothing in a model with an adapter trains: PEFT loads
    an adapter for inference unless told otherwise."""
    if not has_adapter(model) or any(p.requires_grad for p in model.parameters()):
        return
    active = {*active_adapters(model)}
    for name, parameter in model.named_parameters():
        if active & {*name.split(".")} and parameter.is_floating_point():
            parameter.requires_grad_(True)
    warnings.warn(f"model has an adapter but trains nothing: {', '.join(active)} is made trainable", stacklevel=3)


def why_not_scored(model: Any) -> str:
    """Why a model with its active adapter has no log-probability for each token of its input; empty if it has.

    Prompt tuning, p-tuning and prefix tuning put virtual tokens, or keys and values for them, before the input: the
    model then sees other positions than those that have targets.
    """
    if "forward" in vars(model) and is_peft_model(model):
        return ""  # inside disable_adapter(), where peft calls the base model
    configs = adapter_configs(model)
    for name in active_adapters(model):
        if name in configs and (why := why_config_not_scored(configs[name])):
            return why
    return ""


def why_config_not_scored(config: Any) -> str:
    if not getattr(config, "is_prompt_learning", False):
        return ""
    kind = getattr(config.peft_type, "value", config.peft_type)
    return f"an adapter without virtual tokens (LoRA, IA3, OFT ...); got {kind}, whose tokens have no targets"
