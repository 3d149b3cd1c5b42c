"""PairedPrompts finds the prompts that the two halves of a batch share, so that each runs once.

A trainer of pairs holds (2B, L) token ids, all chosen responses first, each after its prompt and padded on the right.
Row i and row B + i then begin with the same prompt. Their B prompts become one batch, padded on the left, and the 2B
responses another; what leaves has the places of the batch that came in.

The module never guesses: where a prompt differs by a token, where a row is padded elsewhere, or where nothing is saved,
`of` gives None, and the batch runs as it is. It reads a few numbers back from the device, once a call. The cost of the
forward is B (P - 1) + 2 B n positions instead of 2 B L, for the longest prompt P and the longest response n.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .api import attach

_SHARE = 0.95  # of the positions: a forward more is not worth less


@dataclass(frozen=True)
class PairedPrompts:
    """The prompts and responses of a batch of pairs: `PairedPrompts.of(...).logps(model)`."""

    prompts: Tensor  # (B, P-1) int64, padded on the left
    prompt_mask: Tensor  # (B, P-1) int64
    rows: Tensor  # (2B, n) int64, each prompt's last token and a response without its last
    targets: Tensor  # (2B, n) int64, -100 in the padding
    positions: Tensor  # (2B, n) int64
    places: Tensor  # (2B, n) int64, where each belongs in a row of the batch; L in the padding
    length: int  # L

    @classmethod
    def of(
        cls,
        input_ids: Tensor,  # (2B, L) int64
        targets: Tensor,  # (2B, L) int64: the id that each position predicts, -100 outside the responses
        attention_mask: Tensor | None,  # (2B, L)
    ) -> PairedPrompts | None:
        """The batch taken apart, or None where its halves do not share their prompts or would save nothing."""
        (rows, L), live = input_ids.shape, targets != -100
        if rows % 2 or attention_mask is None or attention_mask.shape != input_ids.shape:
            return None
        B, column = rows // 2, torch.arange(L, device=input_ids.device)
        count = live.sum(1)
        last = live.int().argmax(1)  # the place of each prompt's last token
        in_prompt = column <= last.unsqueeze(1)
        whole = live == ((column >= last.unsqueeze(1)) & (column < (last + count).unsqueeze(1)))
        seen = attention_mask.bool() | (column > (last + count).unsqueeze(1))
        equal = (input_ids[:B] == input_ids[B:]) | ~in_prompt[:B]
        fits = (count > 0).all() & (last > 0).all() & (last[:B] == last[B:]).all() & whole.all() & seen.all()
        numbers = torch.stack([fits & equal.all(), last.max(), count.max()])
        ok, P, n = (int(x) for x in numbers.tolist())  # P: the longest prompt without its last token
        if not ok or B * P + rows * n > _SHARE * rows * L:
            return None
        from_left = torch.arange(P, device=input_ids.device) - (P - last[:B]).unsqueeze(1)  # negative in the padding
        taken = last.unsqueeze(1) + torch.arange(n, device=input_ids.device)
        padding = torch.arange(n, device=input_ids.device) >= count.unsqueeze(1)
        places = taken.clamp(max=L - 1)
        return cls(
            input_ids[:B].gather(1, from_left.clamp(min=0)),
            (from_left >= 0).long(),
            input_ids.gather(1, places),
            targets.gather(1, places).masked_fill(padding, -100),
            # The padding repeats a position, so that there is one for it.
            taken.minimum((last + count - 1).unsqueeze(1)),
            places.masked_fill(padding, L),
            L,
        )

    def logps(
        self, model: Any, *, no_sync: Callable[[], contextlib.AbstractContextManager[Any]] | None = None
    ) -> Tensor:  # (2B, L) float32
        """What `model_logps` gives for the batch. `no_sync` is around the prompts' forward, which is not the last."""
        score = attach(model)
        with contextlib.nullcontext() if no_sync is None else no_sync():
            positions = (self.prompt_mask.cumsum(1) - 1).clamp(min=0)
            prefix = score.prefix(self.prompts, attention_mask=self.prompt_mask, position_ids=positions)
        prompt_of = torch.arange(len(self.prompts), device=self.rows.device).repeat(2)
        live = (self.targets != -100).long()
        mask = torch.cat([self.prompt_mask[prompt_of], live], 1)
        more = {"position_ids": self.positions, "attention_mask": mask, "prompt_of": prompt_of}
        values = score(self.rows, self.targets, prefix=prefix, **more)
        return values.new_zeros(len(values), self.length + 1).scatter(1, self.places, values)[:, :-1]
