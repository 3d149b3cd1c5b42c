"""patch_llama_factory() runs LLaMA-Factory's `stage: dpo` (DPO, ORPO, SimPO, IPO, hinge) without the logits.

    from groupdpo_kernels.integrations.llama_factory import patch_llama_factory
    from llamafactory.train.tuner import run_exp

    with patch_llama_factory():
        run_exp(config)  # what `llamafactory-cli train` calls

It replaces `CustomDPOTrainer.concatenated_forward`, for the policy and the reference, and also in existing trainers.
The numbers are the same, ld_alpha included, but the metrics logits/chosen and logits/rejected are NaN, as there are no
logits.

It never changes a trainer object. It needs LLaMA-Factory in SUPPORTED with the parameters in PARAMETERS; otherwise it
raises a RuntimeError and replaces nothing. The cost is that of `model_logps`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..installed import REQUIRED, check, distribution_version, imported, wanted
from ..models.api import attach
from ._patching import Patch, Patched, Swap

SUPPORTED = (0, 9), (0, 10)  # from, up to but without; of 0.9, the versions from 0.9.4 on
PARAMETERS: dict[str, Any] = {"model": REQUIRED, "batch": REQUIRED, "is_ref_model": False}


def patch_llama_factory() -> Patched:
    """Patches LLaMA-Factory until `unpatch_llama_factory()`, or until the end of a `with patch_llama_factory():` block.

    Raises ImportError without LLaMA-Factory, and RuntimeError for a version that this module does not know.
    """
    return _patch.apply()


def unpatch_llama_factory() -> None:
    """Puts LLaMA-Factory's own functions back."""
    _patch.remove()


def sequence_logps(
    token_logps: Tensor,  # (2B, L) 0 where a token is not scored
    targets: Tensor,  # (2B, L) -100 where a token is not scored
    ld_alpha: float | None,
) -> tuple[Tensor, Tensor]:
    """(sums, lengths), (2B,) each, as from LLaMA-Factory's get_batch_logps. With ld_alpha (LD-DPO), tokens beyond the
    length of a pair's shorter response count ld_alpha times. Lengths count from the first scored token on."""
    live = targets != -100
    lengths = live.sum(1)
    if ld_alpha is None:
        return token_logps.sum(1), lengths
    shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
    positions = torch.arange(targets.shape[1], device=targets.device)
    shared = positions < (live.int().argmax(1) + shorter).unsqueeze(1)
    return (token_logps * torch.where(shared, 1.0, ld_alpha)).sum(1), lengths


def _find() -> Swap:
    theirs = imported("llamafactory.train.dpo.trainer", "LLaMA-Factory", "pip install llamafactory")
    original = theirs.CustomDPOTrainer.concatenated_forward
    who, found = "integrations.llama_factory", distribution_version("llamafactory")
    check(who, "LLaMA-Factory", found, SUPPORTED, (original, PARAMETERS))
    if "dict" not in str(original.__annotations__.get("return")):  # 0.9.3 returns a tuple
        knows = wanted(who, "LLaMA-Factory", SUPPORTED)
        raise RuntimeError(f"{knows}, where {original.__qualname__} returns a dict; the installed {found} returns none")

    @functools.wraps(original)
    def concatenated_forward(
        self: Any,
        model: Any,
        batch: dict[str, Tensor],  # input_ids and labels (2B, L), chosen half first, and what the model takes
        is_ref_model: bool = False,
    ) -> dict[str, Tensor]:
        inputs: dict[str, Any] = {**batch}
        targets = torch.nn.functional.pad(inputs.pop("labels")[:, 1:], (0, 1), value=-100)
        token_logps = attach(model)(inputs.pop("input_ids"), targets, **inputs, return_dict=True)
        logps, lengths = sequence_logps(token_logps, targets, None if is_ref_model else self.ld_alpha)
        averaged = logps / lengths
        if self.loss_type in ("ipo", "orpo", "simpo"):
            logps = averaged
        chosen, rejected = logps.chunk(2)
        unknown = logps.new_full((), torch.nan)
        return {
            "chosen_logps": chosen,
            "rejected_logps": rejected,
            "chosen_logits": unknown,
            "rejected_logits": unknown,
            "chosen_logps_avg": averaged.chunk(2)[0],
        }

    return Swap([(original, concatenated_forward)], (theirs.CustomDPOTrainer,))


_patch = Patch("llamafactory", _find)
