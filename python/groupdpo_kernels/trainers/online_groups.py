"""Completions with rewards become groups with two sides, and groups become the slices of a generation.

It never touches TRL or a model, moves data between ranks, or splits a group. The cost is linear in the tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.batches import TokenGroup
from ..data.rules import Rule
from ..preference.losses import LOSSES
from ..preference.objective import Objective


class Drawn(NamedTuple):
    """The groups of one generation on this rank."""

    groups: list[TokenGroup]  # those with both sides, responses in the order of the rule
    drawn: int  # the number of groups before those without a side were dropped
    spare: TokenGroup  # two responses of one token, for a step of weight zero


def draw_groups(
    scored: Mapping[str, Any],
    rewards: Tensor,  # (N,) floating; NaN for a completion without a score
    G: int,
    rule: Rule,
) -> Drawn:
    """Groups of G rows in turn, as the rule sorts them; rows without tokens or without a score are left out before.

    scored: prompt_ids and prompt_mask (N, P), padded on the left, completion_ids and completion_mask (N, C), padded on
    the right, as TRL has them; the mask is all zero for a completion that is to be left out.

    Raises ValueError for a rule that returns something else than pairs (index, positive) of different indices of the
    scores.
    """
    prompts, texts = (
        [ids[live.bool()].int().cpu() for ids, live in zip(scored[f"{part}_ids"], scored[f"{part}_mask"])]
        for part in ("prompt", "completion")
    )
    scores = rewards.double().tolist()
    groups = []
    for g in range(len(prompts) // G):
        rows = range(g * G, g * G + G)
        kept = [i for i in rows if len(texts[i]) and not math.isnan(scores[i])]
        picked = _picked(rule, [scores[i] for i in kept])
        sides = [side for _, side in picked]
        if any(sides) and not all(sides):
            groups.append(TokenGroup(prompts[g * G], [texts[kept[i]] for i, _ in picked], sides, g))
    spare = TokenGroup(prompts[0], [*scored["completion_ids"][:2, :1].int().cpu()], [True, False], 0)
    return Drawn(groups, len(prompts) // G, spare)


def check_whole(prompts: Sequence[Mapping[str, Any]], G: int) -> None:
    """ValueError unless these rows are whole groups: G times one prompt, then G times the next."""
    firsts = [prompts[i - i % G].get("prompt") for i in range(len(prompts))]
    apart = next((i for i, row in enumerate(prompts) if row.get("prompt") != firsts[i]), None)
    if apart is not None or len(prompts) % G:
        got = f"{len(prompts)} rows" if apart is None else f"another prompt in row {apart}"
        raise ValueError(
            f"a rank's batch must hold whole groups of {G} completions, one prompt after the other: its size must be a"
            f" multiple of {G}, and split_batches False; got {got}"
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


def slices(groups: Sequence[TokenGroup], n: int) -> list[list[TokenGroup]]:
    """The groups, shuffled by torch's generator, in n slices of equal size, or of sizes that differ by one."""
    order = torch.randperm(len(groups)).tolist()
    cuts = [i * len(groups) // n for i in range(n + 1)]
    return [[groups[i] for i in order[start:end]] for start, end in itertools.pairwise(cuts)]


def weights(
    counts: Tensor,  # (R, n) integer: the number of groups in each slice of each rank
    rank: int,
    accumulation: int,
) -> list[float]:
    """What the mean over the groups of each slice of this rank counts, so that an optimizer step, which averages over
    ranks and over the slices it accumulates, takes the mean over all of its groups.

    Where a generation is no whole number of optimizer steps, and no step a whole number of generations, each slice
    counts by itself.
    """
    R, n = counts.shape
    together = n if accumulation % n == 0 else accumulation if n % accumulation == 0 else 1
    totals = counts.sum(0).view(-1, together).sum(1).tolist()
    own = counts[rank].tolist()
    return [R * together * own[i] / max(1, totals[i // together]) for i in range(n)]


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
