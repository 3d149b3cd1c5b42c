"""Errors for arguments that were given to the wrong place, which say what to write instead.

A name of TRL's DPOConfig is answered with the option of `Objective` that says the same, or that none does; a misspelt
name is answered with the nearest ones. The module never corrects anything silently.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any

from transformers import TrainingArguments

from ..preference.objective import Objective

# Options of TRL's DPOConfig that describe the loss: their names in Objective, or None where no objective has them.
LOSS_OPTIONS: dict[str, str | None] = {
    "loss_type": "loss",
    "beta": "beta",
    "label_smoothing": "label_smoothing",
    "discopop_tau": "tau",
    "loss_weights": None,
    "ld_alpha": None,
    "f_divergence_type": None,
    "f_alpha_divergence_coef": None,
    "use_weighting": None,
}
_OF_OBJECTIVE = {field.name: field.name for field in dataclasses.fields(Objective)} | LOSS_OPTIONS
_OF_TRAINERS = (
    *("model", "ref_model", "train_dataset", "eval_dataset", "processing_class", "objective", "ref_logps"),
    *("peft_config", "callbacks", "optimizers"),
)
_RENAMED = {"tokenizer": "processing_class", "config": "args"}


def check_names(where: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """TypeError for a name in `given` that is not in `known`; it says where the name belongs."""
    for name, value in given.items():
        if name in known:
            continue
        ours = _OF_OBJECTIVE.get(name)
        if ours is not None:
            one = value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
            line = f"objective=Objective({one!r})" if ours == "loss" else f"objective=Objective({ours}={one!r})"
            raise TypeError(
                f"{name} must be given to Objective, not to {where}: pass {line} to the trainer; got {name}={value!r}"
            )
        if name in _OF_OBJECTIVE:
            raise TypeError(f"{name} must not be given to {where}: no objective has it; got {name}={value!r}")
        if _RENAMED.get(name) in known:
            raise TypeError(f"{name} must be given to {where} as {_RENAMED[name]}=; got {name}=a {_kind(value)}")
        if name in _OF_TRAINERS:
            raise TypeError(f"{name} must be given to the trainer, not to {where}; got {name}=a {_kind(value)}")
        near = difflib.get_close_matches(name, known, n=3)
        hint = f": did you mean {', '.join(near)}?" if near else ""
        raise TypeError(f"{where} has no option {name!r}{hint}; got {name}={value!r:.60}")


def check_order(who: str, ref_model: Any) -> None:
    """TypeError for a config given as the second argument, which is the reference model; the config is the third."""
    if isinstance(ref_model, TrainingArguments):
        raise TypeError(
            f"args must be given by name: {who}(model, args=config, ...); got a {_kind(ref_model)} as ref_model"
        )


def _kind(value: Any) -> str:
    return type(value).__name__
