"""Completions with rewards become groups with two sides, and groups become the slices of a generation.

It never touches TRL or a model, or moves data between ranks: it sees the completions of all of them. The cost is linear
in the tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.batches import TokenGroup
from ..data.rules import Rule
from ..preference.losses import LOSSES
from ..preference.objective import Objective

Picks = list[tuple[int, bool]]  # completions of a group, by their number among all, each with its side


def picked_groups(
    completions: Sequence[Tensor],  # (n_i,) integer each
    rewards: Tensor,  # (N,) floating; NaN for a completion without a score
    G: int,
    rule: Rule,
) -> Iterator[Picks]:
    """Yields groups of G completions in turn, as the rule sorts them, where they have both sides. Completions without
    tokens or without a score are left out before.

    Raises ValueError for a rule that returns something else than pairs (index, positive) of different indices of the
    scores.
    """
    scores = rewards.double().tolist()
    for start in range(0, len(completions), G):
        kept = [i for i in range(start, start + G) if len(completions[i]) and not math.isnan(scores[i])]
        picked = _picked(rule, [scores[i] for i in kept])
        sides = [side for _, side in picked]
        if any(sides) and not all(sides):
            yield [(kept[i], side) for i, side in picked]


def token_group(picks: Picks, prompts: Sequence[Tensor], completions: Sequence[Tensor], G: int) -> TokenGroup:
    first = picks[0][0]
    responses = [completions[i] for i, _ in picks]
    return TokenGroup(prompts[first], responses, [side for _, side in picks], first // G)


def share(groups: Sequence[TokenGroup], rank: int, R: int) -> list[TokenGroup]:
    """What of each group is this rank's, in order, if all responses are cut into R shares of equal size, or of sizes
    that differ by one. A rank may have none of a group."""
    total = sum(len(group.responses) for group in groups)
    start, end = total * rank // R, total * (rank + 1) // R
    found = []
    for group in groups:
        n = len(group.responses)
        own = slice(min(max(start, 0), n), min(max(end, 0), n))
        found.append(group._replace(responses=group.responses[own], positive=group.positive[own]))
        start, end = start - n, end - n
    return found


def check_whole(prompts: Sequence[Any], G: int) -> None:
    """ValueError unless these prompts, of the rows of all ranks, are whole groups: G times one, G times the next."""
    firsts = [prompts[i - i % G] for i in range(len(prompts))]
    apart = next((i for i, prompt in enumerate(prompts) if prompt != firsts[i]), None)
    if apart is not None or len(prompts) % G:
        got = f"{len(prompts)} rows" if apart is None else f"another prompt in row {apart}"
        raise ValueError(
            f"the batches of all ranks must together hold whole groups of {G} completions, one prompt after the other:"
            f" the sum of their sizes must be a multiple of {G}, and split_batches False; got {got}"
        )


def _picked(rule: Rule, scores: list[float]) -> list[tuple[int, bool]]:
    if not scores:
        return []
    picked = [(i, bool(side)) for i, side in rule(scores)]
    at = [i for i, _ in picked]
    if len({*at}) < len(at) or not {*at} <= {*range(len(scores))}:
        raise ValueError(f"rule must return different indices of {len(scores)} scores, each with its side; got {at}")
    return picked


def check_pairs(groups: Sequence[TokenGroup], objective: Objective) -> None:
    """ValueError for a pairwise loss where the rule leaves another number of completions than two."""
    row = LOSSES[objective.loss] if isinstance(objective.loss, str) else None
    if row is None or row.pair is None or row.every_pair:
        return
    other = next((len(group.responses) for group in groups if len(group.responses) != 2), None)
    if other is not None:
        raise ValueError(
            f"rule must keep two completions of a prompt for the pairwise loss {objective.loss!r}, as"
            f" data.top_k(1, 1) does; got {other}; all_pairs, margin, mpo and softmax take larger groups"
        )


def slices(groups: Sequence[Any], n: int) -> list[list[Any]]:
    """The groups, shuffled by torch's generator, in n slices of equal size, or of sizes that differ by one."""
    order = torch.randperm(len(groups)).tolist()
    cuts = [i * len(groups) // n for i in range(n + 1)]
    return [[groups[i] for i in order[start:end]] for start, end in itertools.pairwise(cuts)]


def weights(
    counts: Sequence[int],  # the number of groups in each slice, on all ranks together
    accumulation: int,
) -> list[float]:
    """What the mean over the groups of each slice counts, so that an optimizer step, which averages over the slices
    that it accumulates, takes the mean over all of its groups.

    Where a generation is no whole number of optimizer steps, and no step a whole number of generations, each slice
    counts by itself.
    """
    n = len(counts)
    together = n if accumulation % n == 0 else accumulation if n % accumulation == 0 else 1
    totals = [sum(counts[i - i % together :][:together]) for i in range(n)]
    return [together * count / max(1, total) for count, total in zip(counts, totals)]


def checked_reward(function: Callable[..., Any], name: str, is_async: bool) -> Callable[..., Any]:
    """The reward function, whose results are checked: one number, or None for none, for each completion.

    The wrapper raises TypeError for what is no list of numbers, and ValueError for another length, NaN and infinities.
    """

    def call(**named: Any) -> list[float | None]:
        return _checked(name, function(**named), len(named["prompts"]))

    async def call_async(**named: Any) -> list[float | None]:
        return _checked(name, await function(**named), len(named["prompts"]))

    return call_async if is_async else call


def _checked(name: str, rewards: Any, n: int) -> list[float | None]:
    try:
        values = list(rewards)
    except TypeError:
        got = type(rewards).__name__
        raise TypeError(f"reward function {name!r} must return a list of {n} numbers; got a {got}") from None
    if len(values) != n:
        raise ValueError(f"reward function {name!r} must return {n} rewards, one a completion; got {len(values)}")
    for i, value in enumerate(values):
        try:
            values[i] = None if value is None else float(value)
        except (TypeError, ValueError):
            raise TypeError(
                f"reward function {name!r} must return a number or None for each of {n} completions; got {value!r:.60}"
            ) from None
        if values[i] is not None and not math.isfinite(values[i]):
            raise ValueError(
                f"reward function {name!r} must return finite numbers, or None for no score, for each of {n}"
                f" completions; got {values[i]} for number {i}"
            )
    return values
