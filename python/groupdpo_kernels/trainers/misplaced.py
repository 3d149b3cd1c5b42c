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
# Options of TRL's GRPOConfig that would do nothing in OnlineGroupDPOTrainer, each with the reason.
_ADVANTAGE = "there are no advantages: the rule makes preferred and rejected completions of the rewards"
_RATIO = "there is no ratio to an older policy, and so nothing to clip"
_ENTROPY = "the loss has no term for the entropy"
_ENGINE = "DeepSpeed does not run here"
_SYNC = "ref_sync_steps says when the reference becomes the policy"
GRPO_OPTIONS: dict[str, str] = {
    "loss_type": "Objective(...) says the loss",
    "beta": "Objective(beta=...) says it",
    **dict.fromkeys(("scale_rewards", "multi_objective_aggregation"), _ADVANTAGE),
    **dict.fromkeys(("epsilon", "epsilon_high", "delta", "importance_sampling_level"), _RATIO),
    **dict.fromkeys(("off_policy_mask_threshold", "use_bias_correction_kl"), _RATIO),
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), "Objective(...) says the loss"),
    **dict.fromkeys((f"vespo_{x}_{side}" for x in ("k", "lambda") for side in ("pos", "neg")), _RATIO),
    **dict.fromkeys((f"vllm_importance_sampling_{x}" for x in ("correction", "mode", "clip_max", "clip_min")), _RATIO),
    "vllm_importance_sampling_cap": _RATIO,
    **dict.fromkeys(("top_entropy_quantile", "entropy_coef", "use_adaptive_entropy"), _ENTROPY),
    **dict.fromkeys((f"entropy_{x}" for x in ("coef_min", "coef_max", "coef_delta", "target")), _ENTROPY),
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _SYNC),
    "max_tool_calling_iterations": "completions call no tools here",
    "log_multimodal": "completions are of text alone here",
    "ds3_gather_for_generation": _ENGINE,
    "cast_lm_head_to_fp32": "log-probabilities are computed in float32 already",
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
