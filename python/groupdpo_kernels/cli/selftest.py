"""Compares every implementation that can run here with float64, to see whether an install computes what it should.

Cases and error budget are those of the tests, which have many more (testing.py). The self-test never has a tolerance of
its own or a result that is not compared. It costs about ten seconds on two cores; a GPU also compiles its kernels.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..lm_head import implementations
from ..lm_head.api import linear_logp_stats, linear_logps
from ..preference import fused
from ..preference.groups import PreferenceGroups
from ..preference.objective import AdaBalance, Objective, preference_loss
from ..reference import HeadOptions, LogpStats
from ..testing import CASES, Case, check_budget, make_inputs, run

# One case of each kind: ragged tiles, all options at once with LoRA on the head, few live rows, soft cap, peaked rows.
HEAD_CASES = ("ragged_all", "ragged_bf16", "everything", "most_ignored_bf16", "softcap_tight_bf16", "confident")
FROZEN_CASES = ("everything", "most_ignored_bf16")
TOLERANCES = (2.0**-7, 0.1)
OBJECTIVES = (
    Objective("sigmoid", beta=0.7, balance=AdaBalance()),
    Objective("mpo", beta=0.7, average=True, nll_weight=0.5),
    Objective("all_pairs", beta=0.7),
    Objective("plackett_luce", beta=0.7),
)
BY_NAME = {case.name: case for case in CASES}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One comparison: `share` is the largest error in units of what is allowed; None where nothing was compared."""

    device: str
    impl: str
    what: str
    case: str
    passed: bool
    share: float | None
    detail: str
    seconds: float


def self_test(devices: list[torch.device], progress: Callable[[Outcome], None] = lambda found: None) -> list[Outcome]:
    """Runs every comparison on every device by every implementation that can run there; errors are outcomes too."""
    found = []
    for device, impl, what, case, compare in _comparisons(devices):
        began = time.perf_counter()
        share, detail = None, ""
        try:
            share = compare()
            passed = share <= 1
            if not math.isfinite(share):
                share, detail = None, f"its error is {share}"
        except Exception as error:  # a driver, a compiler or a broken install may raise anything: the test goes on
            passed, detail = False, f"{type(error).__name__}: {error}".strip()
        found.append(Outcome(str(device), impl, what, case, passed, share, detail, time.perf_counter() - began))
        progress(found[-1])
    return found


def _comparisons(devices: list[torch.device]) -> Iterator[tuple[torch.device, str, str, str, Callable[[], float]]]:
    for device in devices:
        for impl in implementations.IMPLS:
            if not implementations.why_not(impl, *probe(device, torch.float32)):
                for name in HEAD_CASES:
                    yield device, impl, "values and gradients", name, _bound(_head, BY_NAME[name], device, impl)
                for name in FROZEN_CASES:
                    yield device, impl, "frozen head", name, _bound(_frozen_head, BY_NAME[name], device, impl)
                for tolerance in TOLERANCES:
                    yield device, impl, "grad_tol", f"{tolerance:.3g}", _bound(_grad_tol, tolerance, device, impl)
        for impl in fused.IMPLS[:-1]:  # without the reference, with which they are compared
            for objective in OBJECTIVES:
                if not fused.why_not(impl, device, torch.float32, objective.loss, 9):
                    compare = _bound(_preference, objective, device, impl)
                    yield device, impl, "preference_loss", str(objective.loss), compare


def _bound(compare: Callable[..., float], *arguments: Any) -> Callable[[], float]:
    return lambda: compare(*arguments)


def probe(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A small hidden and weight with which to ask `implementations.why_not` and `explain`."""
    return torch.zeros(8, 64, device=device, dtype=dtype), torch.zeros(128, 64, device=device, dtype=dtype)


def _options(options: HeadOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("logit_scale", "softcap", "temperature", "workspace_bytes")}


def _head(case: Case, device: torch.device, impl: str) -> float:
    """The error share of forward and backward, with a gradient into the log-sum-exp too."""

    def stats(h: Tensor, w: Tensor, y: Tensor, b: Tensor | None, low_rank: Any, o: HeadOptions) -> LogpStats:
        outputs = ("lse", "entropy", "mean_logits", "log_sum_sq_probs", "is_top1")
        return linear_logp_stats(h, w, y, b, low_rank=low_rank, outputs=outputs, impl=impl, **_options(o))

    inputs = make_inputs(case, device)
    return check_budget(run(stats, inputs, case.options), inputs, case.options)


def _frozen_head(case: Case, device: torch.device, impl: str) -> float:
    """The error share where the head needs no gradient, so that the forward stores the derivative in hidden."""
    inputs = make_inputs(case, device)
    bias = None if inputs.bias is None else inputs.bias.detach()
    pair = None if inputs.low_rank is None else (inputs.low_rank[0], inputs.low_rank[1].detach())
    logps = linear_logps(
        inputs.hidden, inputs.weight.detach(), inputs.targets, bias, low_rank=pair, impl=impl, **_options(case.options)
    )
    leaves = {"hidden": inputs.hidden} | ({} if pair is None else {"low_rank_hidden": pair[0]})
    gradients = torch.autograd.grad((logps.double() * inputs.d_token_logps).sum(), list(leaves.values()))
    whole = dataclasses.replace(inputs, d_lse=torch.zeros_like(inputs.d_lse))
    found = {"token_logps": logps.detach()} | {f"d_{name}": g for name, g in zip(leaves, gradients)}
    return check_budget(found, whole, case.options)


def _grad_tol(tolerance: float, device: torch.device, impl: str, T: int = 60, V: int = 600) -> float:
    """The share of its bound that grad_tol leaves out of d_logits, which is d_hidden as the head is the identity."""
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(T, V, generator=generator), torch.randint(V, (T,), generator=generator)
    z.mul_(torch.logspace(-2, 1.3, T)[:, None])[::2].scatter_(1, y[::2, None], 25.0)  # flat to peaked; half near 1
    upstream = torch.randn(T, generator=generator)
    hidden, weight = z.clone().to(device).requires_grad_(), torch.eye(V, device=device).requires_grad_()
    linear_logps(hidden, weight, y.to(device), grad_tol=tolerance, impl=impl).backward(upstream.to(device))
    g = upstream.double()[:, None]
    truth = (-g * z.double().softmax(-1)).scatter_add_(1, y[:, None], g)
    assert hidden.grad is not None
    return float((hidden.grad.cpu().double() - truth).abs().sum() / (tolerance * truth.abs().sum()))


def _preference(objective: Objective, device: torch.device, impl: str) -> float:
    """The largest error of a result or the gradient, in units of twice plain float32's. Groups are ragged, or pairs
    for a pairwise loss."""
    sizes = [(1, 1)] * 6 if objective.loss == "sigmoid" else [(1, 1), (3, 2), (1, 7), (4, 4), (2, 1), (5, 4)]
    groups = PreferenceGroups.from_lists([True] * p + [False] * n for p, n in sizes)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (groups.num_sequences,), generator=generator)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    logps, reference = (-3 * torch.rand(int(cu_seqlens[-1]), generator=generator) for _ in range(2))

    def evaluate(dtype: torch.dtype, impl: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        leaf = logps.to(device, dtype).requires_grad_()
        moved = cu_seqlens.to(device), groups.to(device)
        out = preference_loss(leaf, *moved, objective, reference.to(device, dtype), impl=impl)
        (gradient,) = torch.autograd.grad(0.7 * out.loss, leaf)
        return {name: x.detach().cpu().double() for name, x in {**out._asdict(), "d_token_logps": gradient}.items()}

    truth, peer = evaluate(torch.float64, "reference"), evaluate(torch.float32, "reference")
    shares = []
    for name, value in evaluate(torch.float32, impl, device).items():
        rounding = torch.finfo(torch.float32).eps * truth[name].abs().max()  # if plain float32 is exact by luck
        budget = max(2 * (peer[name] - truth[name]).abs().max(), rounding)
        shares.append(float((value - truth[name]).abs().max() / budget))
    return max(shares)
