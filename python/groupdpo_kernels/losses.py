"""The loss formulas and `LOSSES`, the only list of their names: pure functions of scores.

A pairwise loss takes the two sides of K pairs and gives (K,) losses; a group-wise loss takes scores (S,) and groups
and gives (G,). Neither knows where scores come from. Plain PyTorch, vectorised over ragged groups, float64 for
float64 inputs; deterministic; nothing of size S x S. In the formulas D = u_w - u_l, the score of the preferred minus
that of the dispreferred response; P and N are the positives and negatives of a group. Derivations: docs/math.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid  # not softplus, which is linear from 20 on

from .logps import seq_logps

if TYPE_CHECKING:
    from .groups import PreferenceGroups
    from .objectives import Objective


# ----------------------------------------------------------------------------------------------------------- pairwise


class Side(NamedTuple):
    """One side of K pairs."""

    scores: Tensor  # (K,) u, times `balance`
    mean_logps: Tensor  # (K,) s / n
    lengths: Tensor  # (K,) n, in the dtype of scores
    balance: Tensor | None  # (K,) AdaDPO's w; None for 1


def logistic(chosen: Side, rejected: Side, objective: Objective) -> Tensor:
    """-log sigma(D)."""
    return -logsigmoid(chosen.scores - rejected.scores)


def sigmoid(chosen: Side, rejected: Side, objective: Objective) -> Tensor:
    """DPO (arXiv 2305.18290): -(1 - e) log sigma(D) - e log sigma(-D), e the label smoothing."""
    d, e = chosen.scores - rejected.scores, objective.label_smoothing
    return -logsigmoid(d) if e == 0 else -(1 - e) * logsigmoid(d) - e * logsigmoid(-d)


def hinge(chosen: Side, rejected: Side, objective: Objective) -> Tensor:
    """relu(1 - D)."""
    return torch.relu(1 - (chosen.scores - rejected.scores))


def ipo(chosen: Side, rejected: Side, objective: Objective) -> Tensor:
    """IPO (arXiv 2310.12036): (D / beta - 1 / (2 beta))^2."""
    return ((chosen.scores - rejected.scores - 0.5) / objective.beta).square()


def rdpo(chosen: Side, rejected: Side, objective: Objective) -> Tensor:
    """R-DPO (arXiv 2403.19159): -log sigma(D + alpha (n_w - n_l)): the reward pays alpha for each token."""
    return -logsigmoid(chosen.scores - rejected.scores + objective.alpha * (chosen.lengths - rejected.lengths))


def simpo(chosen: Side, rejected: Side, objective: Objective) -> Tensor:
    """SimPO (arXiv 2405.14734): -log sigma(D - gamma)."""
    return -logsigmoid(chosen.scores - rejected.scores - objective.gamma)


def orpo(chosen: Side, rejected: Side, objective: Objective) -> Tensor:
    """ORPO (arXiv 2403.07691): -m_w - beta log sigma(o_w - o_l), m the mean log-probability, o the log-odds of e^m."""
    odds_w, odds_l = (side.mean_logps - log1mexp(side.mean_logps) for side in (chosen, rejected))
    if chosen.balance is not None:
        odds_w = chosen.balance * odds_w
    return -chosen.mean_logps - objective.beta * logsigmoid(odds_w - odds_l)


def log1mexp(m: Tensor) -> Tensor:
    """log(1 - e^m) for m <= 0. Closer to 0 than one unit of precision, m counts as that unit: the rest is rounding."""
    return torch.log(-torch.expm1(m.clamp(max=-torch.finfo(m.dtype).eps)))


# --------------------------------------------------------------------------------------------------------- group-wise


def margin(
    u: Tensor,  # (S,)
    groups: PreferenceGroups,
) -> Tensor:  # (G,)
    """GroupDPO (arXiv 2604.15602): -log sigma(mean_P u - mean_N u)."""
    return -logsigmoid(mean(u, groups.positive, groups) - mean(u, ~groups.positive, groups))


def mpo(
    u: Tensor,  # (S,)
    groups: PreferenceGroups,
) -> Tensor:  # (G,)
    """MPO (set-level contrast, gupta25c): lse_all(u) - lse_P(u) = -log sigma(lse_P(u) - lse_N(u))."""
    return -logsigmoid(lse(u, groups.positive, groups) - lse(u, ~groups.positive, groups))


def softmax(
    u: Tensor,  # (S,)
    groups: PreferenceGroups,
) -> Tensor:  # (G,)
    """GroupDPO: mean_P [lse(u_i, u_N) - u_i]: each positive against all negatives at once."""
    return mean(-logsigmoid(u - lse(u, ~groups.positive, groups)[groups.ids]), groups.positive, groups)


def plackett_luce(
    u: Tensor,  # (S,)
    groups: PreferenceGroups,
) -> Tensor:  # (G,)
    """Ranked groups, best first: sum_k lse(u_k, ..., u_last) - u_k."""
    # Inclusive suffix log-sum-exp by doubling: log2 S steps whatever the groups, no size to read back from a device.
    suffix, step = u, 1
    while step < u.shape[0]:
        inside = groups.ids[step:] == groups.ids[:-step]
        # Beyond the group the partner is -inf before logaddexp, not masked after: no NaN of another group enters.
        partner = torch.where(inside, suffix[step:], -math.inf)
        suffix = torch.cat([torch.logaddexp(suffix[:-step], partner), suffix[-step:]])
        step *= 2
    return seq_logps(suffix - u, groups.cu_groups)


def mean(
    values: Tensor,  # (S,)
    mask: Tensor,  # (S,) bool
    groups: PreferenceGroups,
) -> Tensor:  # (G,)
    """Mean over the masked sequences of each group."""
    return seq_logps(torch.where(mask, values, 0), groups.cu_groups) / seq_logps(
        mask.to(values.dtype), groups.cu_groups
    )


def lse(
    values: Tensor,  # (S,)
    mask: Tensor,  # (S,) bool
    groups: PreferenceGroups,
) -> Tensor:  # (G,)
    """Log-sum-exp over the masked sequences of each group."""
    values = torch.where(mask, values, -math.inf)
    top = values.new_full((groups.num_groups,), -math.inf).scatter_reduce(0, groups.ids, values.detach(), "amax")
    top = torch.where(torch.isfinite(top), top, 0)  # else inf - inf
    return top + torch.log(seq_logps(torch.exp(values - top[groups.ids]), groups.cu_groups))


# ---------------------------------------------------------------------------------------------------------- the table


class Loss(NamedTuple):
    """A row: `pair`, over the pair of each group (every_pair: the mean over all), or `group`; and its conventions."""

    pair: Callable[[Side, Side, Objective], Tensor] | None = None
    group: Callable[[Tensor, PreferenceGroups], Tensor] | None = None
    average: bool = False
    reference_free: bool = False
    every_pair: bool = False
    ranks: bool = False  # the order in a group is its ranking
    odds: bool = (
        False  # the score's derivative in m is 1 / (1 - e^m), not a constant: the balance takes it into account
    )


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(sigmoid),
    "hinge": Loss(hinge),
    "ipo": Loss(ipo, average=True),
    "rdpo": Loss(rdpo),
    "simpo": Loss(simpo, average=True, reference_free=True),
    "cpo": Loss(logistic, reference_free=True),
    "orpo": Loss(orpo, reference_free=True, odds=True),
    "margin": Loss(group=margin),
    "mpo": Loss(group=mpo),
    "all_pairs": Loss(logistic, every_pair=True),
    "softmax": Loss(group=softmax),
    "plackett_luce": Loss(group=plackett_luce, ranks=True),
}
