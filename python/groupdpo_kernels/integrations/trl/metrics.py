"""What the trainers log of a loss on groups, under TRL's names where TRL has them.

Each number is a mean over the responses of a group (or its pairs), then over groups; for groups of one positive and one
negative it is the number that TRL's DPOTrainer logs. The rewards are the scores u of the objective: beta times the
log-ratio for the losses that TRL has, a mean over tokens or without a reference where the objective says so.

Cost: O(number of pairs), and one read-back for all numbers of a step. Never: differentiable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...groups import PreferenceGroups
from ...logps import seq_logps
from ...losses import mean
from ...objectives import Objective, PreferenceLoss


@torch.no_grad()
def preference_metrics(
    result: PreferenceLoss,
    groups: PreferenceGroups,
    objective: Objective,
) -> dict[str, Tensor]:  # () floating each
    """rewards/{chosen,rejected,accuracies,margins}, logps/{chosen,rejected}, positive_mass; balance_weight with AdaDPO.

    A pair counts as right where the positive's reward is higher, not where they are equal, as in TRL. positive_mass is
    the share of the positives in the softmax of the rewards over the group: sigma of the margin for a pair.
    """
    u, sides = result.rewards, {"chosen": groups.positive, "rejected": ~groups.positive}
    rewards = {name: mean(u, side, groups) for name, side in sides.items()}  # (G,) each
    positive, negative = groups.pair_indices(every=True)
    right, offsets = (u[positive] > u[negative]).to(u.dtype), groups.pair_offsets()
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


def record(
    into: dict[str, list[float]],
    values: dict[str, Tensor],  # () each
    gather: Callable[[Tensor], Tensor],
) -> None:
    """Appends the mean over ranks of each value; waits for the device once."""
    local = torch.stack([value.detach().float() for value in values.values()])
    for name, value in zip(values, gather(local[None]).mean(0).tolist()):
        into[name].append(value)
