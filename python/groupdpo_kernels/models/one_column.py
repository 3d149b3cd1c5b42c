"""A model with logits of one column: the log-probability of the target. For trainers that call a model, and do much
with its logits in code worth keeping: their function that picks a target's log-probability is replaced by one that
takes the column.

Never: gives a trainer numbers that look like logits; what else it computes from them must be thrown away. Cost: as
`model_logps`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .api import attach

# What a batch of TRL's DPOTrainer holds beside what its model takes.
NOT_OF_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")


class OneColumn:
    """Called as the model; `.logits` of what it returns is (B, L, 1) float32. Every other attribute is the model's."""

    def __init__(
        self,
        model: Any,
        targets: Tensor,  # (B, L) int64: the id that each position predicts, -100 where there is none
    ) -> None:
        self._model, self._targets = model, targets

    def __call__(self, input_ids: Tensor | None = None, **inputs: Any) -> Any:
        token_logps, outputs = attach(self._model).with_outputs(input_ids, self._targets, **inputs)
        outputs.logits = token_logps.unsqueeze(-1)
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def completion_targets(
    input_ids: Tensor,  # (B, L) int64
    completion_mask: Tensor,  # (B, L) int64
) -> Tensor:  # (B, L) int64
    """The token after each position where that is of a completion, -100 elsewhere."""
    targets = torch.full_like(input_ids, -100)
    targets[:, :-1] = input_ids[:, 1:].where(completion_mask[:, 1:] == 1, -100)
    return targets
