"""patch_ms_swift() runs ms-swift's DPO (`--rlhf_type dpo`, all its losses) without the logits.

    from groupdpo_kernels.integrations.ms_swift import patch_ms_swift
    from swift.pipelines import rlhf_main

    with patch_ms_swift():
        rlhf_main(arguments)

It replaces `DPOTrainer.concatenated_forward`, for the policy and the reference, and also in existing trainers. The
original still does all but the head: padding-free and packed batches, ld_alpha, the auxiliary loss, images. Its
`logits_to_keep` is left out, because rows that are not scored cost nothing here. The metrics logits/chosen and
logits/rejected are NaN, as there are no logits. Sequence parallelism and encoder-decoders still use real logits.

It never changes a trainer beyond the call. It needs ms-swift in SUPPORTED with the parameters in PARAMETERS; otherwise
it raises a RuntimeError and replaces nothing. The cost is that of `model_logps`.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from ..installed import REQUIRED, check, distribution_version, imported
from ..models.one_column import OneColumn
from ._patching import Patch, Patched, Swap

SUPPORTED = (4, 0), (5, 0)  # from, up to but without
PARAMETERS: dict[str, dict[str, Any]] = {
    "concatenated_forward": {"model": REQUIRED, "batch": REQUIRED, "is_ref_model": False},
    "get_per_token_logps": {"logits": REQUIRED, "labels": REQUIRED, "label_pad_token_id": -100, "reduction": "mean"},
    "get_use_logits_to_keep": {"default_value": True},
}


def patch_ms_swift() -> Patched:
    """Patches ms-swift until `unpatch_ms_swift()`, or until the end of a `with patch_ms_swift():` block.

    Raises ImportError without ms-swift, and RuntimeError for a version that this module does not know.
    """
    return _patch.apply()


def unpatch_ms_swift() -> None:
    """Puts ms-swift's own functions back."""
    _patch.remove()


def _find() -> Swap:
    theirs = imported("swift.rlhf_trainers.dpo_trainer", "ms-swift", "pip install ms-swift")
    methods = [(getattr(theirs.DPOTrainer, name), parameters) for name, parameters in PARAMETERS.items()]
    check("integrations.ms_swift", "ms-swift", distribution_version("ms-swift"), SUPPORTED, *methods)
    original = theirs.DPOTrainer.concatenated_forward

    @functools.wraps(original)
    def concatenated_forward(
        self: Any,
        model: Any,
        batch: dict[str, Any],  # labels (2B, L), chosen half first, or (1, L) of packed sequences
        is_ref_model: bool = False,
    ) -> dict[str, Tensor]:
        if self.is_encoder_decoder or self.template.sequence_parallel_size != 1:
            return original(self, model, batch, is_ref_model)
        targets = torch.roll(batch["labels"], -1, 1)  # shifted as ms-swift does; the first label of a sequence is -100
        with contextlib.ExitStack() as until_the_end:
            for name, ours in (("get_per_token_logps", _column), ("get_use_logits_to_keep", lambda *_: False)):
                vars(self)[name] = ours
                until_the_end.callback(vars(self).pop, name)
            return original(self, OneColumn(model, targets), batch, is_ref_model)

    return Swap([(original, concatenated_forward)], (theirs.DPOTrainer,))


def _column(
    logits: Tensor,  # (B, L, 1), from OneColumn
    labels: Tensor,  # (B, L), shifted
    label_pad_token_id: int = -100,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities, NaN for the mean logits, mask), (B, L) each, as from ms-swift's get_per_token_logps."""
    return logits.squeeze(-1), torch.full_like(logits.detach().squeeze(-1), torch.nan), labels != label_pad_token_id


_patch = Patch("swift", _find)
