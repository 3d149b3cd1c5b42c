"""patch_openrlhf() makes OpenRLHF's Actor score tokens without logits, for SFT, DPO, and PPO's policy and reference.

    from groupdpo_kernels.integrations.openrlhf import patch_openrlhf

    patch_openrlhf()  # in each process that trains, before or after its Actors are made; unpatch_openrlhf() undoes it

It replaces `Actor.forward` wherever that returns log-probabilities (`return_logprobs=True`, or an `action_mask`), with
the same numbers at every position, packed samples and temperature included, and with None as the output's logits. With
an action mask only its positions are scored; the others are zero in both. OpenRLHF's own forward still runs where real
logits are needed: for `return_entropy=True`, without log-probabilities, and for models with images.

It never changes an Actor object. It needs OpenRLHF in SUPPORTED with the parameters in PARAMETERS; otherwise it raises
a RuntimeError and replaces nothing. The cost is that of `model_logps`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..installed import REQUIRED, check, distribution_version, imported
from ..models.api import attach
from ._patching import Patch, Patched, Swap

SUPPORTED = (0, 10), (0, 12)  # from, up to but without
PARAMETERS: dict[str, Any] = {
    "sequences": REQUIRED,
    "action_mask": None,
    "attention_mask": None,
    "return_output": False,
    "allgather_logits": False,
    "return_logprobs": False,
    "ring_attn_group": None,
    "packed_seq_lens": None,
    "return_entropy": False,
    "mm_inputs": REQUIRED,
}


def patch_openrlhf() -> Patched:
    """Patches OpenRLHF until `unpatch_openrlhf()`, or until the end of a `with patch_openrlhf():` block.

    Raises ImportError without OpenRLHF, and RuntimeError for a version that this module does not know.
    """
    return _patch.apply()


def unpatch_openrlhf() -> None:
    """Puts OpenRLHF's own functions back."""
    _patch.remove()


def _find() -> Swap:
    theirs = imported("openrlhf.models.actor", "OpenRLHF", "pip install openrlhf")
    original = theirs.Actor.forward
    found = distribution_version("openrlhf")
    check("integrations.openrlhf", "OpenRLHF", found, SUPPORTED, (original, PARAMETERS))

    @functools.wraps(original)
    def forward(
        self: Any,
        sequences: Tensor,  # (B, L) int64
        action_mask: Tensor | None = None,  # (B, A): which of the last A tokens count
        attention_mask: Any = None,  # (B, L) int64, must be given
        return_output: bool = False,
        allgather_logits: bool = False,
        return_logprobs: bool = False,
        ring_attn_group: Any = None,
        packed_seq_lens: Any = None,
        return_entropy: bool = False,
        **mm_inputs: Any,
    ) -> Any:  # log_probs (B, L - 1) or (B, A) float32, or (log_probs, output)
        if return_entropy or (action_mask is None and not return_logprobs) or getattr(self, "is_vlm", False):
            options = (return_output, allgather_logits, return_logprobs, ring_attn_group, packed_seq_lens)
            return original(self, sequences, action_mask, attention_mask, *options, return_entropy, **mm_inputs)
        if self.packing_samples:
            ids, position_ids, targets, *layout = theirs.unpad_and_slice_tensor(
                sequences, attention_mask, ring_attn_group
            )
            attended = None
        else:
            ids, attended, targets = sequences, attention_mask, torch.roll(sequences, -1, 1)
            targets[:, -1] = -100  # the target rolled here is the first token; dropped below
            if action_mask is not None:
                A = action_mask.shape[1]
                targets[:, : -A - 1] = -100
                targets[:, -A - 1 : -1].masked_fill_(action_mask == 0, -100)
            position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
        score = attach(self.model, temperature=self.temperature).with_outputs
        log_probs, output = score(ids, targets, attention_mask=attended, position_ids=position_ids, **mm_inputs)
        if self.packing_samples:
            log_probs = theirs.gather_and_pad_tensor(log_probs, ring_attn_group, *layout, *sequences.shape)
        log_probs = log_probs[:, :-1]
        if action_mask is not None:
            log_probs = log_probs[:, -action_mask.shape[1] :] * action_mask.float()
        return (log_probs, output) if return_output else log_probs

    return Swap([(original, forward)], (theirs.Actor,))


_patch = Patch("openrlhf", _find)
