"""OneColumn is a model whose logits have one column: the log-probability of the target. It serves trainers that do
much with the logits of a model in code worth keeping: their function that picks a target's log-probability is replaced
by one that takes the column.

The column never looks like logits, so whatever else a trainer computes from it must be thrown away. The cost is that of
`model_logps`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .api import attach

# Keys in a batch of TRL's DPOTrainer that its model does not take.
NOT_OF_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")


class OneColumn:
    """A call runs the model and returns `.logits` of (B, L, 1) float32. Every other attribute is the model's."""

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
    """The token after each position where it belongs to a completion, -100 elsewhere."""
    targets = torch.full_like(input_ids, -100)
    targets[:, :-1] = input_ids[:, 1:].where(completion_mask[:, 1:] == 1, -100)
    return targets
