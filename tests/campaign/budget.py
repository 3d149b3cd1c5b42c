"""The error budget of groupdpo_kernels.testing for tensors of a few numbers, and for results that are not finite.

The rule is that of check_budget, which holds tensors of thousands of numbers to it: at most twice the error of eager
PyTorch at the same precision (for values: in float32), against float64. But eager's error on a few numbers is one draw
of a wide distribution, and often 0 by luck. So here

- eager's error is its largest over a few cases drawn alike, each against its own truth. To compare them, a gradient's
  error is taken relative to the magnitudes that its entries are sums of, which do not cancel as the entries may;
- where eager errs by nothing a result may err by what float32 cannot avoid: one rounding of the truth, or two eps of
  each logit (of the magnitudes behind it, without what all logits of a row have in common), carried into the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from groupdpo_kernels import reference
from groupdpo_kernels.reference import HeadOptions, LogpStats, accumulator
from groupdpo_kernels.testing import Inputs, Result, eager, exact, magnitude, run

FACTOR = 2.0
OTHER = {"hidden": "weight", "weight": "hidden"}
OTHER |= {"low_rank_hidden": "low_rank_weight", "low_rank_weight": "low_rank_hidden"}


@dataclass(frozen=True)
class Truth:
    """Results in float64, and by result what its entries are sums of and what they may err by whatever eager does."""

    results: Result
    sizes: Result
    floors: Result
    logits: Tensor  # (T, V) float64
    live: Tensor  # (T,) bool: neither ignored nor of a sum that is not finite
    targets: Tensor  # (T,) ids, 0 in ignored rows


def truth_of(inputs: Inputs, options: HeadOptions, stated: float = 0.0) -> Truth:
    """`stated` is an error of each logit that an implementation says it has."""
    leaves = {name: x.detach().double() for name, x in inputs.leaves.items()}
    pair = (leaves["low_rank_hidden"], leaves["low_rank_weight"]) if inputs.low_rank is not None else None
    z = reference.logits(leaves["hidden"], leaves["weight"], leaves.get("bias"), pair, options).flatten(0, -2)
    y = inputs.targets.reshape(-1, 1)
    live = (y != options.ignore_index) & torch.isfinite(torch.logsumexp(z, 1, keepdim=True))
    y = torch.where(y == options.ignore_index, 0, y)
    logps = torch.log_softmax(torch.where(live, z, 0), 1)
    p = logps.exp()
    g, d_lse = (x.reshape(-1, 1).abs() for x in (inputs.d_token_logps, inputs.d_lse))
    # Magnitudes of d_logits. The target's is g (1 - p_y): neither eager nor a kernel lets g - g p_y cancel.
    terms = p * (g + d_lse)
    terms = terms.scatter(1, y, g * -torch.expm1(logps.gather(1, y)) + d_lse * p.gather(1, y))
    if inputs.d_entropy is not None:
        parts = p * torch.where(p == 0, 0, logps).abs()
        terms = terms + inputs.d_entropy.reshape(-1, 1).abs() * (parts + p * parts.sum(1, keepdim=True))
    by = abs(options.logit_scale) / options.temperature
    terms = torch.where(live, terms, 0) * by
    slopes = torch.ones_like(z)
    if options.softcap is not None:
        slopes = 1 - (torch.where(live, z, 0) * options.temperature / options.softcap).square()
    dtype = accumulator(inputs.hidden.dtype)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(torch.float32).tiny
    logit = 2 * eps * magnitude(inputs, options) + stated
    cancels = terms
    if dtype == torch.float64 and z.numel():
        # A float64 has room for what an offset, or 1 - p_y of a row that is sure, costs a float32. It has none for what
        # they cost a float64: of logits of 1e6 and their lse, here and in the truth, 1e-10 is known.
        logit += 2 * eps * (8 + float(torch.where(live & torch.isfinite(z), z, 0).abs().max()))
        cancels = torch.where(live, p * (g + d_lse), 0) * by + terms
    # A slope is 1 - tanh^2, which errs by eps however small it is.
    erring = cancels * (slopes * logit + 2 * eps)
    results = exact(inputs, options)
    sizes, floors = (
        {name: torch.full(x.shape, f, dtype=torch.float64) for name, x in results.items()} for f in (1.0, logit)
    )
    for name, x in leaves.items():
        if name == "bias":
            sizes["d_bias"], floors["d_bias"] = (terms * slopes).sum(0), erring.sum(0)
            continue
        other = leaves[OTHER[name]].abs()
        other = torch.where(torch.isfinite(other), other, 0).flatten(0, -2)
        rows = (lambda d: d) if name.endswith("hidden") else (lambda d: d.T)
        sizes[f"d_{name}"] = (rows(terms * slopes) @ other).view(x.shape)
        # Units that multiply 16-bit numbers may take one below 2^-126 for zero.
        floors[f"d_{name}"] = (rows(erring) @ other + rows(terms).sum(1, keepdim=True) * tiny).view(x.shape)
    return Truth(results, sizes, floors, z, live[:, 0], y[:, 0])


def views(value: Tensor, truth: Truth, name: str, by_row: bool, error: Tensor | None = None) -> dict[str, float]:
    """The error of a result, where the truth is finite in its dtype, in three views: the largest catches a wrong entry,
    the overall norm a bias too small for any entry, and the worst row a wrong gradient of a token, or of a vocabulary
    id, that is small beside the others. `by_row` is one view alone, the sum over rows of their norms.
    """
    true, size = truth.results[name], truth.sizes[name]
    if not value.numel():
        return {}
    kept = torch.isfinite(true.to(value.dtype))
    error = value.double() - true if error is None else error
    if not kept.all():
        error, size = torch.where(kept, error, 0), torch.where(kept, size, 0)
    rows, of = (x.abs() if x.dim() == 1 or not name.startswith("d_") else x.norm(dim=-1) for x in (error, size))
    if by_row:
        return {"rows": float(rows.sum() / of.sum().clamp(min=1e-30))}
    whole = size.norm().clamp(min=1e-30)
    found = {"overall": float(error.norm() / whole), "largest": float(error.abs().max() / whole) * size.numel() ** 0.5}
    if rows.shape != error.shape:
        found["row"] = float((rows / of.clamp(min=1e-30)).max())
    return found


def _gradients(function: Callable[..., LogpStats], inputs: Inputs, options: HeadOptions) -> Result:
    return {name: x for name, x in run(function, inputs, options).items() if name.startswith("d_")}


def errors_of_eager(
    inputs: Inputs, options: HeadOptions, truth: Truth, names: Iterable[str], by_row: Container[str]
) -> dict[str, dict[str, float]]:
    """By result. Values of 16-bit inputs are compared with float32, so that logits rounded to 16 bits do not pass, and
    so are gradients that eager in 16 bits cannot hold.
    """
    # What is not finite in an ignored row is none of eager's business: usual trainers have no such rows.
    ignored = (inputs.targets == options.ignore_index).unsqueeze(-1)
    inputs = replace(inputs, hidden=inputs.hidden.detach().masked_fill(ignored, 0).requires_grad_())
    dtype = inputs.hidden.dtype
    wide = inputs.to(accumulator(dtype))
    # In turn, where the one before is not finite: eager in 16 bits may overflow, and eager knows no -inf in an entropy.
    with torch.no_grad():
        arguments = (wide.hidden, wide.weight, wide.targets, wide.bias, wide.low_rank, options)
        tried = [f(*arguments)._asdict() for f in (eager, reference.linear_logp_stats)]
    if any(name.startswith("d_") for name in names):
        tried[0] |= _gradients(eager, inputs, options)
        if not all(torch.isfinite(x).all() for name, x in tried[0].items() if name.startswith("d_")):
            tried[1] |= _gradients(eager, wide, options)
            tried.append(_gradients(reference.linear_logp_stats, wide, options))
    found = {}
    for name in names:
        found[name] = tried[0][name]
        for other in tried[1:]:
            if name in other:
                value = other[name].to(found[name].dtype)
                found[name] = torch.where(torch.isfinite(found[name]), found[name], value)
    return {name: views(found[name], truth, name, name in by_row) for name in names}


def shares(
    actual: Result,
    inputs: Inputs,
    options: HeadOptions,
    truth: Truth,
    alike: Callable[[int], Inputs],
    left_out: dict[str, float],
) -> dict[str, float]:
    """The share of its budget that each result takes; infinite where it is not as it must be at all.

    `alike` draws a case alike from a seed, for eager's error. What takes less than half of a budget needs none, and
    what comes near to a budget has more.
    `left_out` bounds, by gradient, the sum over rows of the norms of what a tolerance leaves out: these are judged in
    that view alone.
    """
    of_eager = [errors_of_eager(inputs, options, truth, actual, left_out)]
    found = {name: _share(name, value, inputs, truth, of_eager, left_out) for name, value in actual.items()}
    for near, seeds in ((0.5, range(1, 3)), (0.8, range(3, 13))):
        close = {name: actual[name] for name, share in found.items() if near < share < math.inf}
        for seed in seeds if close else ():
            other = alike(seed)
            of_eager.append(errors_of_eager(other, options, truth_of(other, options), close, left_out))
        found |= {name: _share(name, value, inputs, truth, of_eager, left_out) for name, value in close.items()}
    return found


def _share(
    name: str, value: Tensor, inputs: Inputs, truth: Truth, of_eager: list[dict[str, Any]], left_out: dict[str, float]
) -> float:
    true, by_row = truth.results[name], name in left_out
    rounded = true.to(inputs.hidden.dtype if name.startswith("d_") else accumulator(inputs.hidden.dtype))
    kept = torch.isfinite(rounded)  # a gradient that its dtype cannot hold is infinite
    right = (value.shape, value.dtype) == (rounded.shape, rounded.dtype)
    if not right or not torch.equal(value[~kept].nan_to_num(0.5), rounded[~kept].nan_to_num(0.5)):
        return math.inf
    floors = [views(rounded, truth, name, by_row), views(rounded, truth, name, by_row, truth.floors[name])]
    allowed = [*floors, *(errors[name] for errors in of_eager)]
    largest = 0.0
    for view, error in views(value, truth, name, by_row).items():
        budget = FACTOR * max(x[view] for x in allowed if math.isfinite(x[view]))
        if by_row:
            rows = torch.where(kept, truth.sizes[name], 0)
            rows = rows if rows.dim() == 1 else rows.norm(dim=-1)
            budget += left_out[name] / float(rows.sum().clamp(min=1e-30))
        share = 0.0 if error == 0 else error / budget if error < math.inf and budget > 0 else math.inf
        largest = max(largest, share)
    return largest


def share_of_top1(actual: Tensor, inputs: Inputs, options: HeadOptions, truth: Truth) -> float:
    """Where `is_top1` is wrong, the gap between the target's logit and the largest other one, as a share of what
    rounding may do to it. Logits closer than that have no right answer, and a row that is not finite has none.
    """
    said, at = actual.reshape(-1), truth.targets[:, None]
    if (said & (inputs.targets.reshape(-1) == options.ignore_index)).any():
        return math.inf
    own = truth.logits.gather(1, at)[:, 0]
    gap = own - truth.logits.scatter(1, at, -math.inf).max(1).values
    wrong = torch.where(said, -gap, gap).clamp(min=0)
    eps = torch.finfo(accumulator(inputs.hidden.dtype)).eps
    allowed = FACTOR * eps * (2 * magnitude(inputs, options) + own.abs())
    judged = truth.live & torch.isfinite(own)
    return float((wrong / allowed)[judged].max()) if judged.any() else 0.0


def left_out_by_candidates(
    inputs: Inputs, options: HeadOptions, truth: Truth, grad_tol: float, sampled: bool
) -> dict[str, float]:
    """What docs/math.md allows a tolerance to leave out of each gradient, in the sum over rows of their norms."""
    p = torch.softmax(truth.logits, 1).scatter(1, truth.targets[:, None], 0)
    out = (inputs.d_lse - inputs.d_token_logps).reshape(-1).abs()
    if sampled:  # twice what is surely neither target nor candidate, and 2^-18 of it for the rounding of its sum
        likely, where = p.topk(min(256, p.shape[1]), 1)
        kept = torch.zeros_like(p).scatter(1, where, torch.where(likely > grad_tol / 4 * 1.001, likely, 0))
        out = 2 * out * (p - kept).sum(1) * (1 + 2.0**-18)
    else:
        out = grad_tol * out * p.sum(1)
    total = float(torch.where(truth.live, out, 0).sum()) * abs(options.logit_scale) / options.temperature
    found = {"d_bias": total}
    for name in inputs.leaves.keys() - {"bias"}:
        norms = inputs.leaves[OTHER[name]].detach().double().norm(dim=-1).reshape(-1)
        found[f"d_{name}"] = total * float(torch.where(torch.isfinite(norms), norms, 0).max()) if norms.numel() else 0.0
    return found
