"""The loss formulas and `LOSSES`, the only list of their names: pure functions of scores.

A pairwise loss takes the two sides of K pairs and gives (K,) losses; a group-wise loss takes scores (S,) and groups
and gives (G,). In the formulas D = u_w - u_l, the score of the preferred minus that of the dispreferred response; P and
N are the positives and negatives of a group. docs/math.md, section 3, derives them. The code is plain PyTorch,
vectorised over ragged groups and deterministic. It never builds an S x S tensor, and knows nothing of where scores come
from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid  # softplus would be linear from 20 on

from .groups import PreferenceGroups
from .segments import seq_logps


class Options(Protocol):
    """The fields of an Objective that a pairwise formula reads."""

    @property
    def beta(self) -> float: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def gamma(self) -> float: ...
    @property
    def alpha(self) -> float: ...
    @property
    def tau(self) -> float: ...


# ----------------------------------------------------------------------------------------------------------- pairwise


class Side(NamedTuple):
    """One side of K pairs."""

    scores: Tensor  # (K,) u, times `balance`
    mean_logps: Tensor  # (K,) s / n
    lengths: Tensor  # (K,) n, in the dtype of scores
    balance: Tensor | None  # (K,) AdaDPO's w; None stands for 1


def logistic(chosen: Side, rejected: Side, objective: Options) -> Tensor:
    """-log sigma(D)."""
    return -logsigmoid(chosen.scores - rejected.scores)


def sigmoid(chosen: Side, rejected: Side, objective: Options) -> Tensor:
    """DPO (arXiv 2305.18290): -(1 - e) log sigma(D) - e log sigma(-D), e the label smoothing."""
    d, e = chosen.scores - rejected.scores, objective.label_smoothing
    return -logsigmoid(d) if e == 0 else -(1 - e) * logsigmoid(d) - e * logsigmoid(-d)


def hinge(chosen: Side, rejected: Side, objective: Options) -> Tensor:
    """relu(1 - D)."""
    return torch.relu(1 - (chosen.scores - rejected.scores))


def ipo(chosen: Side, rejected: Side, objective: Options) -> Tensor:
    """IPO (arXiv 2310.12036): (D / beta - 1 / (2 beta))^2."""
    return ((chosen.scores - rejected.scores - 0.5) / objective.beta).square()


def rdpo(chosen: Side, rejected: Side, objective: Options) -> Tensor:
    """R-DPO (arXiv 2403.19159): -log sigma(D + alpha (n_w - n_l)): the reward pays alpha for each token."""
    return -logsigmoid(chosen.scores - rejected.scores + objective.alpha * (chosen.lengths - rejected.lengths))


def simpo(chosen: Side, rejected: Side, objective: Options) -> Tensor:
    """SimPO (arXiv 2405.14734): -log sigma(D - gamma)."""
    return -logsigmoid(chosen.scores - rejected.scores - objective.gamma)


def orpo(chosen: Side, rejected: Side, objective: Options) -> Tensor:
    """ORPO (arXiv 2403.07691): -m_w - beta log sigma(o_w - o_l), m the mean log-probability, o the log-odds of e^m."""
    odds_w, odds_l = (side.mean_logps - log1mexp(side.mean_logps) for side in (chosen, rejected))
    if chosen.balance is not None:
        odds_w = chosen.balance * odds_w
    return -chosen.mean_logps - objective.beta * logsigmoid(odds_w - odds_l)


def robust(chosen: Side, rejected: Side, objective: Options) -> Tensor:
    """rDPO (arXiv 2403.00409): [-(1 - e) log sigma(D) + e log sigma(-D)] / (1 - 2e), e the label smoothing."""
    d, e = chosen.scores - rejected.scores, objective.label_smoothing
    return -logsigmoid(d) - e / (1 - 2 * e) * d  # equal, since log sigma(-D) = log sigma(D) - D


def exo_pair(chosen: Side, rejected: Side, objective: Options) -> Tensor:
    """EXO (arXiv 2402.00856): KL((sigma(D), sigma(-D)) || (1 - e, e)), e the label smoothing, which must not be 0."""
    d, e = chosen.scores - rejected.scores, objective.label_smoothing
    won = torch.sigmoid(d) * (logsigmoid(d) - math.log1p(-e))
    return won + torch.sigmoid(-d) * (logsigmoid(-d) - math.log(e))


def nca_pair(chosen: Side, rejected: Side, objective: Options) -> Tensor:
    """NCA (arXiv 2402.05369): -log sigma(u_w) - (log sigma(-u_w) + log sigma(-u_l)) / 2."""
    u_w, u_l = chosen.scores, rejected.scores
    return -logsigmoid(u_w) - 0.5 * (logsigmoid(-u_w) + logsigmoid(-u_l))


def apo_zero(chosen: Side, rejected: Side, objective: Options) -> Tensor:
    """APO-zero (arXiv 2408.06266): sigma(-u_w) + sigma(u_l): the preferred response up, the other down."""
    return torch.sigmoid(-chosen.scores) + torch.sigmoid(rejected.scores)


def apo_down(chosen: Side, rejected: Side, objective: Options) -> Tensor:
    """APO-down (arXiv 2408.06266): sigma(u_w) + sigma(-D): both responses down, the dispreferred one more."""
    return torch.sigmoid(chosen.scores) + torch.sigmoid(rejected.scores - chosen.scores)


def discopop(chosen: Side, rejected: Side, objective: Options) -> Tensor:
    """DiscoPOP (arXiv 2406.08414): -(1 - m) log sigma(D) + m e^-D, m = sigma(D / tau)."""
    d, tau = chosen.scores - rejected.scores, objective.tau
    # m e^-D is one exponential, because as two factors it is 0 times infinity where D is far below 0.
    return torch.exp(logsigmoid(d / tau) - d) - torch.sigmoid(-d / tau) * logsigmoid(d)


def sppo_hard(chosen: Side, rejected: Side, objective: Options) -> Tensor:
    """SPPO (arXiv 2405.00675) with certain wins: ((u_w - 1/2) / beta)^2 + ((u_l + 1/2) / beta)^2."""
    won, lost = chosen.scores - 0.5, rejected.scores + 0.5
    return (won / objective.beta).square() + (lost / objective.beta).square()


def log1mexp(m: Tensor) -> Tensor:
    """log(1 - e^m) for m <= 0. An m closer to 0 than one unit of precision counts as that unit, as it is rounding."""
    return torch.log(-torch.expm1(m.clamp(max=-torch.finfo(m.dtype).eps)))


# --------------------------------------------------------------------------------------------------------- group-wise


def margin(
    u: Tensor,  # (S,)
    groups: PreferenceGroups,
) -> Tensor:  # (G,)
    """GroupDPO (arXiv 2604.15602): -log sigma(mean_P u - mean_N u)."""
    return -logsigmoid(mean(u, groups.side(True), groups) - mean(u, groups.side(False), groups))


def mpo(
    u: Tensor,  # (S,)
    groups: PreferenceGroups,
) -> Tensor:  # (G,)
    """MPO (set-level contrast, gupta25c): lse_all(u) - lse_P(u) = -log sigma(lse_P(u) - lse_N(u))."""
    return -logsigmoid(lse(u, groups.side(True), groups) - lse(u, groups.side(False), groups))


def softmax(
    u: Tensor,  # (S,)
    groups: PreferenceGroups,
) -> Tensor:  # (G,)
    """GroupDPO: mean_P [lse(u_i, u_N) - u_i]: each positive against all negatives at once."""
    return mean(-logsigmoid(u - lse(u, groups.side(False), groups)[groups.ids]), groups.side(True), groups)


def plackett_luce(
    u: Tensor,  # (S,)
    groups: PreferenceGroups,
) -> Tensor:  # (G,)
    """The Plackett-Luce likelihood of groups ranked best first: sum_k lse(u_k, ..., u_last) - u_k."""
    # The suffix log-sum-exp doubles its reach log2 S times, whatever the groups: no size is read back from a device.
    suffix, step = u, 1
    while step < u.shape[0]:
        inside = groups.ids[step:] == groups.ids[:-step]
        # A partner beyond the group is left out before logaddexp, so that no other group's NaN enters, and not by -inf,
        # whose second derivative would be NaN.
        own = suffix[:-step]
        partner = torch.where(inside, suffix[step:], own)
        suffix = torch.cat([torch.where(inside, torch.logaddexp(own, partner), own), suffix[-step:]])
        step *= 2
    return seq_logps(suffix - u, groups.cu_groups)


def mean(
    values: Tensor,  # (S,)
    weights: Tensor,  # (S,) bool, or floating and at least 0
    groups: PreferenceGroups,
) -> Tensor:  # (G,)
    """Weighted mean over the sequences of each group; those of weight 0 are left out."""
    weighted = torch.where(weights != 0, weights * values, 0)
    return seq_logps(weighted, groups.cu_groups) / seq_logps(weights.to(values.dtype), groups.cu_groups)


def lse(
    values: Tensor,  # (S,)
    weights: Tensor,  # (S,) bool, or floating and at least 0
    groups: PreferenceGroups,
) -> Tensor:  # (G,)
    """Log of the weighted sum of exponentials over the sequences of each group; those of weight 0 are left out."""
    values = torch.where(weights != 0, values + weights.to(values.dtype).log(), -math.inf)
    top = values.new_full((groups.num_groups,), -math.inf).scatter_reduce(0, groups.ids, values.detach(), "amax")
    top = torch.where(torch.isfinite(top), top, 0)  # an infinite maximum would give inf - inf below
    return top + torch.log(seq_logps(torch.exp(values - top[groups.ids]), groups.cu_groups))


def policy_weight(
    mean_logps: Tensor,  # (S,) s / n
    groups: PreferenceGroups,
) -> Tensor:  # (G,), a constant for the gradient
    """WPO (arXiv 2406.11827): exp(mean_P m + mean_N m), for a pair the product of its two e^m."""
    m = mean_logps.detach()
    return torch.exp(mean(m, groups.side(True), groups) + mean(m, groups.side(False), groups))


# ---------------------------------------------------------------------------------------------------------- the table


class Loss(NamedTuple):
    """A loss and its conventions: `pair` takes each group's pair (every_pair: all, averaged), `group` takes (S,)."""

    pair: Callable[[Side, Side, Options], Tensor] | None = None
    group: Callable[[Tensor, PreferenceGroups], Tensor] | None = None
    average: bool = False
    reference_free: bool = False
    every_pair: bool = False
    ranks: bool = False  # the order in a group is its ranking
    odds: bool = False  # the score's derivative in m is 1 / (1 - e^m), not a constant, and enters the balance
    no_balance: str = ""  # why AdaDPO's balance, which makes dL/du_w and -dL/du_l alike, has no meaning here

    @property
    def weighs_responses(self) -> bool:
        """Whether weights of responses mean anything: a pair's sides have one each, and a rank has no second copy."""
        return not self.ranks and (self.pair is None or self.every_pair)


APART = "it does not weigh the two sides alike"  # dL/du_w is not -dL/du_l, with or without balance


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(sigmoid),
    "hinge": Loss(hinge),
    "ipo": Loss(ipo, average=True),
    "rdpo": Loss(rdpo),
    "simpo": Loss(simpo, average=True, reference_free=True),
    "cpo": Loss(logistic, reference_free=True),
    "orpo": Loss(orpo, reference_free=True, odds=True),
    "robust": Loss(robust),
    "exo_pair": Loss(exo_pair),
    "discopop": Loss(discopop),
    "nca_pair": Loss(nca_pair, no_balance=APART),
    "apo_zero": Loss(apo_zero, no_balance=APART),
    "apo_down": Loss(apo_down, no_balance=APART),
    "sppo_hard": Loss(sppo_hard, no_balance=APART),
    "margin": Loss(group=margin),
    "mpo": Loss(group=mpo),
    "all_pairs": Loss(logistic, every_pair=True),
    "softmax": Loss(group=softmax),
    "plackett_luce": Loss(group=plackett_luce, ranks=True, no_balance="a ranking has no two sides"),
}
