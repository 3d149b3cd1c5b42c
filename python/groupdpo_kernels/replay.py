"""Records what pass 2 of a two-pass backward takes from pass 1: the random state, and the results of every LM head.

With the lse known, token_logps need the logits of the targets alone, so pass 2 skips the head's forward. The backward
rebuilds the logits anyway, and sees there how far their lse has drifted from the given one. A tape belongs to one
forward and holds the results of its head calls in order. Compiled regions neither record nor replay: they run in full
both times. Nothing of size (T, D) or (T, V) is ever held. docs/math.md, section 4, has the method.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


class RandomState:
    """torch's global random state, of the CPU and, once CUDA is in use, of every CUDA device."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@dataclass
class KnownLse:
    """The results of one head call, and the drift of its lse once a backward has used it."""

    lse: Tensor  # (...) float64
    # (...) The gradient at the target is made of these: of a row that is sure of its target, 1 - p_y would lose its
    # digits in the difference of this lse and a logit that is computed again, and rounded otherwise.
    token_logps: Tensor
    drift: Tensor | None = None  # (...) log sum_v exp(logits - lse), 0 in ignored rows; set by the backward


class LseTape:
    """The results of every call of linear_logps during a forward, in order."""

    def __init__(self) -> None:
        self._calls: list[KnownLse] = []
        self._next: int | None = None  # None while recording

    def record(self) -> contextlib.AbstractContextManager[None]:
        self._calls, self._next = [], None
        return self._active()

    def replay(self) -> contextlib.AbstractContextManager[None]:
        self._next = 0
        return self._active()

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def take(self, shape: torch.Size) -> KnownLse | None:
        """What is known of the call that is about to run, or None if it must run in full."""
        if self._next is None or self._next >= len(self._calls):
            return None
        call = self._calls[self._next]
        self._next += 1
        return call if call.lse.shape == shape else None

    def note(self, lse: Tensor, token_logps: Tensor) -> None:  # (...) float64, (...)
        if self._next is None:
            self._calls.append(KnownLse(lse.detach(), token_logps.detach()))

    def drift(self, tolerance: float) -> Tensor:  # ()
        """The largest drift beyond `tolerance` relative to 1 + |lse|; 0 where no backward has run."""
        largest = torch.zeros(())
        for call in self._calls:
            if call.drift is not None and call.drift.numel():
                gap = call.drift.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
                # A row whose lse was not finite in pass 1 does not count as drift, as its loss is not finite either.
                within = (gap <= tolerance * (1 + call.lse.abs())) | ~torch.isfinite(call.lse)
                largest = torch.maximum(largest.to(gap), torch.where(within, 0, gap).max())
        return largest


_ACTIVE: ContextVar[LseTape | None] = ContextVar("groupdpo_kernels_lse_tape", default=None)


def active() -> LseTape | None:
    """The tape that linear_logps writes to or reads from at present, or None."""
    return None if torch.compiler.is_compiling() else _ACTIVE.get()
