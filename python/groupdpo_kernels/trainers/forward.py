"""StepForward is the forward of a trainer's step, as `group_backward` and `forward_parts` call it.

It runs prompts and micro-batches under autocast, adds a router's auxiliary loss where a mixture of experts has one, and
notes the log-probabilities of both passes. It never knows a loss. The cost is that of `model_logps`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.batches import MicroBatch, Prompts
from ..models.api import attach
from ..preference.group_backward import forward_parts
from ..preference.segments import seq_logps

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]  # makes the context of a forward


@torch.no_grad()
def response_logps(model: Any, parts: list[Any], autocast: Autocast) -> Tensor:  # (S,) float32
    """Log-probabilities of the responses of a step's parts, in order: what a reference's scores are."""
    token_logps, cu_seqlens, _ = forward_parts(parts, StepForward(model, autocast))
    return seq_logps(token_logps, cu_seqlens)


class StepForward:
    """A SharedForward over the parts of a PreferenceBatch.

    Args:
        model: the model to call. bare: the one to call without gradients, past its wrapper; None means `model`.
        autocast: makes the context of each forward.
        aux_coef: weight of the auxiliary loss of a mixture of experts; it is a mean over `tokens`, the positions of all
            prompts and micro-batches. 0 leaves it out.
    """

    def __init__(
        self,
        model: Any,
        autocast: Autocast,
        *,
        bare: Any = None,
        aux_coef: float = 0.0,
        tokens: float = 1,
    ) -> None:
        self.model, self.bare, self.autocast = model, model if bare is None else bare, autocast
        self.aux_coef, self.tokens = aux_coef, tokens
        self.options = {"output_router_logits": True} if aux_coef else {}
        self.seen: dict[bool, list[Tensor]] = {False: [], True: []}  # seq_logps without a graph and with one
        self.auxiliary: list[Tensor] = []  # of the forwards with a graph, weighted and detached
        self._begins = False  # whether the next micro-batch is the first after its prompt

    def prefix(self, prompts: Prompts) -> tuple[Tensor | None, ...]:
        """Keys and values of the prompts and, after them, the prompts' auxiliary loss where there is one."""
        with self.autocast():
            prefix, outputs = self._attached().prefix_with_outputs(prompts.input_ids, **prompts.inputs, **self.options)
        self._begins = True
        return (*prefix, self._weighted(outputs, prompts.input_ids)) if self.aux_coef else (*prefix,)

    def rows(self, mb: MicroBatch, prefix: Sequence[Tensor | None] = ()) -> tuple[Tensor, ...]:
        """(token_logps (t,), cu_seqlens (s+1,)), and the auxiliary loss () where there is one."""
        states = prefix[: len(prefix) // 2 * 2]
        with self.autocast():
            values, outputs = self._attached().with_outputs(
                mb.input_ids, mb.targets, prefix=states, **mb.inputs, **self.options
            )
        token_logps = mb.live(values)
        graph = torch.is_grad_enabled()
        self.seen[graph].append(seq_logps(token_logps.detach(), mb.cu_seqlens))
        if not self.aux_coef:
            return token_logps, mb.cu_seqlens
        auxiliary = self._weighted(outputs, mb.input_ids)
        if len(states) < len(prefix) and self._begins and prefix[-1] is not None:
            auxiliary = auxiliary + prefix[-1]
        auxiliary = auxiliary * bool(len(mb.live_index))  # an empty one counts for nothing
        self._begins = False
        if graph:
            self.auxiliary.append(auxiliary.detach())
        return token_logps, mb.cu_seqlens, auxiliary

    def _attached(self) -> Any:
        # DistributedDataParallel synchronises buffers at each forward, a collective, so pass 1 goes past it.
        return attach(self.model if torch.is_grad_enabled() else self.bare)

    def _weighted(self, outputs: Any, input_ids: Tensor) -> Tensor:  # ()
        return self.aux_coef * input_ids.numel() / self.tokens * outputs.aux_loss

    def drift(self) -> Tensor:  # ()
        """The largest difference of a response's log-probability between the passes."""
        gaps = (torch.cat(self.seen[True]) - torch.cat(self.seen[False])).abs()
        return gaps.max() if len(gaps) else gaps.sum()  # a rank may have none of the responses of a step
