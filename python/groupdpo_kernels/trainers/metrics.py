"""The metrics that the trainers log for a loss on groups, under TRL's names where TRL has them.

Each number is a mean over the responses of a group (or its pairs), then over groups; for groups of one positive and one
negative it is the number that TRL's DPOTrainer logs. The rewards are the scores u of the objective: beta times the
log-ratio for the losses that TRL has, a mean over tokens or without a reference where the objective says so.

A pair whose scores differ by less than the rounding of float32 is a tie, as equal scores are: the accuracy of a policy
that is still its reference is 0.0, and no last digit decides it.

The cost is O(number of pairs), and one read-back for all numbers of a step. The metrics are never differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..preference.groups import PreferenceGroups
from ..preference.losses import mean
from ..preference.objective import Objective, PreferenceLoss
from ..preference.segments import seq_logps


@torch.no_grad()
def preference_metrics(
    result: PreferenceLoss,
    groups: PreferenceGroups,
    objective: Objective,
    lengths: Tensor,  # (S,) integer
) -> dict[str, Tensor]:  # () floating each
    """rewards/{chosen,rejected,accuracies,margins}, logps/{chosen,rejected}, positive_mass; balance_weight with AdaDPO.

    A pair counts as right where the positive's reward is higher; a tie counts as wrong, as in TRL. positive_mass is the
    share of the positives in the softmax of the rewards over the group: sigma of the margin for a pair.
    """
    u, sides = result.rewards, {"chosen": groups.positive, "rejected": ~groups.positive}
    rewards = {name: mean(u, side, groups) for name, side in sides.items()}  # (G,) each
    positive, negative = groups.pair_indices(every=True)
    noise = _noise(result, objective, lengths)
    right = (u[positive] - u[negative] > noise[positive] + noise[negative]).to(u.dtype)
    offsets = groups.pair_offsets()
    highest = torch.full_like(rewards["chosen"], -torch.inf).scatter_reduce(0, groups.ids, u, "amax")
    mass = (u - highest[groups.ids]).exp()
    values = {
        "rewards/chosen": rewards["chosen"],
        "rewards/rejected": rewards["rejected"],
        "rewards/accuracies": seq_logps(right, offsets) / offsets.diff(),
        "rewards/margins": rewards["chosen"] - rewards["rejected"],
        **{f"logps/{name}": mean(result.seq_logps, side, groups) for name, side in sides.items()},
        "positive_mass": seq_logps(mass * groups.positive, groups.cu_groups) / seq_logps(mass, groups.cu_groups),
    }
    if objective.balance is not None:
        values["balance_weight"] = mean(result.balance_weights, groups.positive, groups)
    return {name: value.mean() for name, value in values.items()}


def means_of(seen: dict[str, list[float]]) -> dict[str, float]:
    """The mean of each metric since the last call; empties `seen`."""
    means = {name: math.fsum(values) / len(values) for name, values in seen.items()}
    seen.clear()
    return means


def _noise(result: PreferenceLoss, objective: Objective, lengths: Tensor) -> Tensor:  # (S,)
    """The most that rounding changes a score that is a difference from the reference; 0 without a reference.

    Two forwards may round the same log-probability, a float32 number, differently: by 8 units in the last place of its
    size, plus as many of 1 for each token, since logits may be large where the log-probability is small.
    """
    if not objective.subtracts_reference:
        return torch.zeros_like(result.rewards)
    n = lengths.to(result.rewards.dtype)
    of_a_sum = 8 * torch.finfo(torch.float32).eps * (result.seq_logps.abs().to(n.dtype) + n)
    return objective.beta * (of_a_sum / n if objective.averages else of_a_sum)


def record(
    into: dict[str, list[float]],
    values: dict[str, Tensor],  # () each
    gather: Callable[[Tensor], Tensor],
    weight: float | None = None,
) -> None:
    """Appends the mean over ranks of each value; waits for the device once.

    weight: the weight of this rank's values in the mean, the same kind of number on all ranks; without one all weigh
    the same. Where no rank has any, nothing is appended.
    """
    local = torch.stack([value.detach().float() for value in values.values()])
    if weight is None:
        means = gather(local[None]).mean(0).tolist()
    else:
        own = torch.where(torch.tensor(weight > 0, device=local.device), weight * local, 0)
        *sums, total = gather(torch.cat([own, own.new_tensor([weight])])[None]).sum(0).tolist()
        means = [each / total for each in sums] if total else []
    for name, value in zip(values, means):
        into[name].append(value)
