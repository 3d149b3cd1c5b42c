"""Inputs of a case, the correctness gate, and the clock.

The gate: no figure for a function whose values or gradients are further from float64 than twice the error of eager
PyTorch at the same precision. Upstream gradients are random, one a token: a kernel that is right only under a uniform
one does not pass.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bench.peers import TokenLogps, log_softmax_gather
from bench.recorded_rows import draw_profile
from groupdpo_kernels.reference import TAIL_SAMPLES
from groupdpo_kernels.testing import Case, error

# The bare matrix products of each mode, 2 T D V FLOP each: the limit for who does not store the logits.
# forward: the logits. trained: the logits, the logits again, d_hidden, d_weight. frozen: the logits, d_hidden.
# Eager and compiled PyTorch store (T, V) and need one product less of a trained head: their ratio can be below 1.
MODES = {"forward": 1, "trained": 4, "frozen": 2}

RANDOM = "random"  # the profile of inputs that are no profile


@dataclass(frozen=True)
class Inputs:
    """No ignored row. Never zeros: a GPU multiplies them at less power and so faster."""

    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (T,) int64
    d_token_logps: Tensor  # (T,) float32


def draw(case: Case, device: torch.device, seed: int = 0, profile: str = RANDOM) -> Inputs:
    """Drawn on the device: a CPU would take seconds for an LM head. `random`: logits of unit variance; else a profile
    of bench.recorded_rows, for what depends on how peaked the rows are."""
    generator = torch.Generator(device).manual_seed(seed)
    if profile != RANDOM:
        drawn = draw_profile(profile, case.T, case.D, case.V, case.dtype, seed, device)
        return Inputs(*drawn, torch.randn(case.T, generator=generator, device=device))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    weight = normal(case.V, case.D).mul_(case.D**-0.5).to(case.dtype)
    targets = torch.randint(0, case.V, (case.T,), generator=generator, device=device)
    return Inputs(normal(case.T, case.D).to(case.dtype), weight, targets, normal(case.T))


# ------------------------------------------------------------------------------------------------------- what is timed


class Step(Protocol):
    def forward(self) -> Tensor: ...

    def backward(self, out: Tensor) -> tuple[Tensor, ...]: ...


class Differentiated:
    """A function under autograd: gradients in hidden and weight (trained), in hidden (frozen), no graph (forward)."""

    def __init__(self, function: TokenLogps, inputs: Inputs, mode: str) -> None:
        self.function, self.inputs, self.graph = function, inputs, mode != "forward"
        self.hidden = inputs.hidden.detach().requires_grad_(self.graph)
        self.weight = inputs.weight.detach().requires_grad_(mode == "trained")
        self.leaves = [x for x in (self.hidden, self.weight) if x.requires_grad]

    def forward(self) -> Tensor:
        with torch.set_grad_enabled(self.graph):
            return self.function(self.hidden, self.weight, self.inputs.targets)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.leaves, self.inputs.d_token_logps.to(out.dtype)) if self.graph else ()


class Products:
    """The limit: the library's matrix products of the mode and nothing else, into buffers that exist."""

    def __init__(self, inputs: Inputs, mode: str) -> None:
        self.hidden, self.weight, self.mode = inputs.hidden, inputs.weight, mode
        self.logits = inputs.hidden.new_empty(inputs.hidden.shape[0], inputs.weight.shape[0])
        self.d_hidden = torch.empty_like(inputs.hidden)
        self.d_weight = torch.empty_like(inputs.weight) if mode == "trained" else None

    def forward(self) -> Tensor:
        return torch.mm(self.hidden, self.weight.T, out=self.logits)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        if self.mode == "trained":
            torch.mm(self.hidden, self.weight.T, out=self.logits)
        if self.mode != "forward":
            torch.mm(self.logits, self.weight, out=self.d_hidden)  # the logits stand for d_logits: random, same shape
        if self.d_weight is not None:
            torch.mm(self.logits.T, self.hidden, out=self.d_weight)
        return ()


@dataclass(frozen=True)
class Seconds:
    forward: float
    both: float


def clock(step: Step, device: torch.device) -> Seconds:
    """One forward and backward. On a GPU by events on the stream, behind ten milliseconds of sleep: what launches cost
    the CPU is not counted, of a hundred small operators as of one, as it is not in training."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        out = step.forward()
        marks.append(time.perf_counter())
        step.backward(out)
        marks.append(time.perf_counter())
        return Seconds(marks[1] - marks[0], marks[2] - marks[0])
    events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)
    events[0].record()
    out = step.forward()
    events[1].record()
    step.backward(out)
    events[2].record()
    torch.cuda.synchronize()
    return Seconds(events[0].elapsed_time(events[1]) / 1e3, events[0].elapsed_time(events[2]) / 1e3)


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """Median, quartiles and minimum."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {k: round(v, digits) for k, v in {"median": middle, "q25": low, "q75": high, "min": min(values)}.items()}


# ------------------------------------------------------------------------------------------------------------ the gate


class Gate:
    """Float64 results of a case: all values, a sample of the rows of the gradients, and the error that each may have.

    The truth shares no code with the package: plain log_softmax under autograd, a block of rows at a time. The same
    function at the inputs' precision is what eager PyTorch computes, and its error sets the budget. Gradients are
    checked at 64 rows of hidden and 256 of the vocabulary (both ends and targets among them), each of them a sum over
    everything; the rest must be finite.
    """

    def __init__(self, case: Case, inputs: Inputs, factor: float = 2.0) -> None:
        T, V = case.T, case.V
        device = inputs.hidden.device
        generator = torch.Generator().manual_seed(1)
        some_rows = torch.randint(0, T, (62,), generator=generator)
        self.rows = torch.cat([torch.tensor([0, T - 1]), some_rows]).unique().to(device)
        ends = torch.tensor([*range(min(8, V)), *range(max(0, V - 8), V)])
        some_ids = torch.randint(0, V, (112,), generator=generator)
        self.ids = torch.cat([ends, some_ids, inputs.targets[:128].cpu()]).unique().to(device)
        self.inputs = inputs
        self.truth = self._eager(case, inputs, torch.float64)
        peer = self._eager(case, inputs, case.dtype)
        floor = {name: 8 * torch.finfo(x.dtype).eps for name, x in peer.items()}  # for results on which eager is exact
        self.budget = {name: max(factor * error(peer[name], x), floor[name]) for name, x in self.truth.items()}

    def _eager(self, case: Case, inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
        hidden, weight = inputs.hidden.to(dtype), inputs.weight.to(dtype)
        block = max(16, 2**28 // (8 * case.V))
        token_logps, d_rows, d_columns = [], [], []
        for start in range(0, case.T, block):
            t = slice(start, start + block)
            logits = (hidden[t] @ weight.T).requires_grad_()
            out = log_softmax_gather(logits, inputs.targets[t], case.softcap)
            (d_block,) = torch.autograd.grad(out, logits, inputs.d_token_logps[t].to(out.dtype))
            token_logps.append(out.detach())
            d_rows.append(d_block[self.rows[(self.rows >= start) & (self.rows < start + block)] - start])
            d_columns.append(d_block[:, self.ids])
        # One product each, as in eager: row by row the library sums in another order, with ten times the error.
        d_hidden, d_weight = torch.cat(d_rows) @ weight, torch.cat(d_columns).T @ hidden
        return {"token_logps": torch.cat(token_logps), "d_hidden": d_hidden, "d_weight": d_weight}

    def bound(self, grad_tol: float) -> dict[str, float]:
        """What grad_tol allows beyond the budget: the sum of the norms of a gradient's errors by row, in units of the
        same sum of the rows sampled (docs/math.md)."""
        non_target_probs = -torch.expm1(self.truth["token_logps"].double())
        allowed = grad_tol * float((self.inputs.d_token_logps.double().abs() * non_target_probs).sum())
        factors = {"d_hidden": self.inputs.weight, "d_weight": self.inputs.hidden}
        return {
            name: allowed * float(factor.norm(dim=-1, dtype=torch.float32).max() / self.truth[name].norm(dim=-1).sum())
            for name, factor in factors.items()
        }

    def spread(self) -> dict[str, float]:
        """What a sampled tail allows beyond the budget: five times the root of a bound on the expected squared error,
        which is at most (g (1 - p_y))^2 / samples a row of d_logits (docs/math.md), in units of the truth's norm."""
        non_target_probs = -torch.expm1(self.truth["token_logps"].double())
        size = self.inputs.d_token_logps.double() * non_target_probs
        norms = self.inputs.hidden.norm(dim=-1, dtype=torch.float32)
        widest = self.inputs.weight.norm(dim=-1, dtype=torch.float32).max()
        found = {"d_hidden": size[self.rows].norm() * widest, "d_weight": (size * norms).norm()}
        return {k: 5 * float(x / self.truth[k].norm()) / TAIL_SAMPLES**0.5 for k, x in found.items()}

    def check(
        self, out: Tensor, gradients: tuple[Tensor, ...], grad_tol: float = 0.0, sampled: bool = False
    ) -> tuple[dict[str, list[float]], list[str]]:
        """({result: [error, budget]}, complaints). Errors are the largest, in units of the truth's root mean square;
        those of gradients with a tolerance are as in `bound`, with a sampled tail as in `spread`."""
        found = {"token_logps": out.detach()}
        found |= {name: x[keep] for name, keep, x in zip(("d_hidden", "d_weight"), (self.rows, self.ids), gradients)}
        errors = {name: [error(x, self.truth[name]), self.budget[name]] for name, x in found.items()}
        if sampled:
            for name, allowed in self.spread().items():
                if name in found:
                    difference = found[name].double() - self.truth[name].double()
                    norm = float(difference.norm() / self.truth[name].double().norm())
                    errors[name] = [norm, allowed + self.budget[name]]
        elif grad_tol > 0:
            for name, allowed in self.bound(grad_tol).items():
                if name in found:
                    difference = found[name].double() - self.truth[name].double()
                    norms = difference.norm(dim=-1).sum() / self.truth[name].double().norm(dim=-1).sum()
                    errors[name] = [float(norms), allowed + self.budget[name]]
        red = [f"{name} off by {e:.1e}, budget {budget:.1e}" for name, (e, budget) in errors.items() if not e <= budget]
        red += [f"{name} is not finite" for name, x in zip(found, (out, *gradients)) if not x.isfinite().all()]
        return errors, red
