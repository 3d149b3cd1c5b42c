"""The preference losses: both implementations, every loss and option, against the loop of tests/test_objectives.py."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from dataclasses import dataclass

import torch
from test_objectives import oracle
from torch import Tensor

from groupdpo_kernels import AdaBalance, Objective, PreferenceGroups, PreferenceLoss, preference_loss, seq_logps
from groupdpo_kernels.preference.losses import LOSSES
from groupdpo_kernels.testing import triton_on_cpu
from groupdpo_kernels.trainers.metrics import preference_metrics

from .frame import Family

REGIMES = {  # how often each is drawn
    "plain": 6,
    "extreme log-ratios": 5,
    "ORPO near 0": 3,
    "long": 1,
    "ragged": 3,
    "subnormal": 2,
    "ties": 3,
    "large groups": 3,
    "weights": 3,
    "inf or NaN in one group": 3,
    "inf or NaN of weight 0": 2,
}
PLAIN, TRITON = "plain PyTorch", "Triton, interpreted"


@dataclass(frozen=True)
class LossCase:
    number: int
    regime: str
    impl: str
    dtype: torch.dtype
    objective: Objective
    lists: tuple[tuple[bool, ...], ...]
    lengths: tuple[int, ...]
    ref: str  # none, or of sequences or tokens, and its dtype
    weights: tuple[float, ...] | None
    response_weights: tuple[tuple[float, ...], ...] | None
    scale: float  # upstream gradient
    threads: int

    @property
    def rows(self) -> tuple[str, ...]:
        o = self.objective
        kinds = {
            "AdaDPO's balance": o.balance is not None,
            "WPO's weight": o.policy_weight,
            "weights of groups": self.weights is not None,
            "weights of responses": self.response_weights is not None,
            "scores by token": o.averages,
        }
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"values: {self.regime}",
            f"loss: {o.loss}",
            f"dtype: {dtype}",
            *(f"option: {name}" for name, has in kinds.items() if has),
        )

    @property
    def column(self) -> str:
        return self.impl


def draw(number: int) -> LossCase:
    chance = random.Random(number)
    (regime,) = chance.choices(list(REGIMES), list(REGIMES.values()))
    weightless = "of weight 0" in regime
    names = [name for name, row in LOSSES.items() if row.weighs_responses or not weightless]
    if regime == "large groups":
        names = [name for name in names if LOSSES[name].group or LOSSES[name].every_pair]
    loss = "orpo" if regime == "ORPO near 0" else chance.choice(names)
    row = LOSSES[loss]
    pairs = row.pair is not None and not row.every_pair
    lists = []
    for _ in range(chance.randint(1, 2 if regime in ("long", "large groups") else 5)):
        size = 2 if pairs else chance.randint(2, 4 if regime == "long" else 64 if regime == "large groups" else 8)
        positives = chance.randint(1, size - 1)
        sides = [True] * positives + [False] * (size - positives)
        lists.append(tuple(sides if row.ranks else chance.sample(sides, size)))
    S = sum(map(len, lists))
    by_weight = row.weighs_responses and (weightless or chance.random() < 0.2)
    impl = TRITON if not by_weight and chance.random() < 0.12 else PLAIN
    longest = {"long": 10**5 if impl == TRITON else 10**6, "ragged": 1024}.get(regime, 6)
    lengths = tuple(chance.randint(longest // 2 if regime == "long" else 1, longest) for _ in range(S))
    if regime == "ties":
        lengths = (chance.randint(1, 6),) * S
    huge = regime == "weights"
    return LossCase(
        number,
        regime,
        impl,
        chance.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
        Objective(
            loss,
            beta=chance.choice([0.01, 0.1, 1.0, 7.5]),
            average=chance.choice([None, True, False]),
            reference_free=chance.choice([None, None, True, False]),
            nll_weight=chance.choice([0.0, 0.0, 1.0, 0.3]),
            label_smoothing=chance.choice([0.01, 0.2, 0.45] if loss == "exo_pair" else [0.0, 0.01, 0.45]),
            gamma=chance.choice([0.0, 0.7]),
            alpha=chance.choice([0.0, 0.01, -0.3]),
            tau=chance.choice([0.05, 0.5, 1.0]),
            balance=None
            if row.no_balance or chance.random() < 0.6
            else AdaBalance(
                chance.choice([0.5, 1.05, 2.0, 100.0]), chance.choice(["policy", "reference"]), chance.random() < 0.5
            ),
            policy_weight=chance.random() < 0.2,
            divide_by=chance.choice(["weights", "count"]),
        ),
        tuple(lists),
        lengths,
        f"{chance.choice(['sequence', 'token'])} {chance.choice(['narrow', 'float32', 'float64'])}",
        weights_of(len(lists), chance, huge, sure=False) if huge or chance.random() < 0.2 else None,
        tuple(response_weights_of(sides, chance, huge, weightless) for sides in lists) if by_weight else None,
        chance.choice([1.0, 0.75, 2.0**-10, 2.0**10]),
        # Short vectors are the work of one thread anyway, and more only wait for each other on a busy machine.
        chance.choice([1, 2, 5]) if regime == "long" or chance.random() < 0.05 else 1,
    )


def weights_of(n: int, chance: random.Random, huge: bool, sure: bool) -> tuple[float, ...]:
    """Weights of which one at least is not 0. sure: nor is any other."""
    scale = 10.0 ** chance.uniform(-30, 30) if huge else 1.0
    found = [scale * 10.0 ** chance.uniform(*((-12, 12) if huge else (-1, 1))) for _ in range(n)]
    return tuple(x if sure or i == n - 1 or chance.random() < 0.8 else 0.0 for i, x in enumerate(found))


def response_weights_of(
    sides: tuple[bool, ...], chance: random.Random, huge: bool, weightless: bool
) -> tuple[float, ...]:
    found = [0.0] * len(sides)
    for side in (True, False):
        at = [i for i, label in enumerate(sides) if label is side]
        for i, x in zip(at, weights_of(len(at), chance, huge, sure=not weightless)):
            found[i] = x
    return tuple(found)


# --------------------------------------------------------------------------------------------------------------- values


def values_of(case: LossCase) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens and the reference, as they are passed."""
    generator = torch.Generator().manual_seed(case.number)
    chance = random.Random(case.number + 10**9)
    S, T = len(case.lengths), sum(case.lengths)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    spread = chance.choice([0.01, 0.1, 1.0, 10.0])
    logps, ref = -spread * uniform(2, T)
    by_token = torch.repeat_interleave(torch.tensor(case.lengths))
    if case.regime == "extreme log-ratios":
        size = 10.0 ** (3 + (1.5 if case.dtype == torch.float16 else 3) * uniform(2, S))
        logps, ref = -size[:, by_token] * (uniform(2, S) < 0.5)[:, by_token] / torch.tensor(case.lengths)[by_token]
        ref = ref - uniform(T)
    elif case.regime == "ORPO near 0":
        logps = -(10.0 ** (-8 + 5 * uniform(T)))
        logps[uniform(T) < chance.choice([0, 0.5])] = 0
    elif case.regime == "subnormal":
        smallest = torch.finfo(case.dtype).tiny
        logps, ref = -smallest * 2.0 ** (-7 + 9 * uniform(2, T))
    elif case.regime == "ties":
        same = case.lengths[0]
        logps, ref = logps[:same].repeat(S), ref[:same].repeat(S)
        if chance.random() < 0.5:
            ref = logps.clone()
    logps = logps.to(case.dtype)
    if case.regime.startswith("inf or NaN"):
        # A response that counts may lack a probability, but has none above 1.
        bad = [math.nan, -math.inf] if case.regime == "inf or NaN in one group" else [math.nan, math.inf, -math.inf]
        logps[bad_response(case) == by_token] = chance.choice(bad)
    of, dtype = case.ref.split()
    dtype = case.dtype if dtype == "narrow" else getattr(torch, dtype)
    ref = ref.clamp(min=torch.finfo(dtype).min).to(dtype)
    if of == "sequence":
        starts = [0, *itertools.accumulate(case.lengths)]
        ref = torch.stack([ref[a:b].sum().clamp(min=torch.finfo(dtype).min) for a, b in itertools.pairwise(starts)])
    return logps, ref


def bad_response(case: LossCase) -> int:
    """The response that is not finite: one of weight 0 where the regime says so, -1 where there is none."""
    if case.regime == "inf or NaN in one group":
        return case.number % len(case.lengths)
    assert case.response_weights is not None
    weights = [x for group in case.response_weights for x in group]
    return next((i for i, x in enumerate(weights) if x == 0), -1)


# ------------------------------------------------------------------------------------------------------------ judgement


def ours(case: LossCase, logps: Tensor, ref: Tensor, threads: int) -> dict[str, Tensor]:
    groups = PreferenceGroups.from_lists(case.lists, weights=case.weights, response_weights=case.response_weights)
    offsets = torch.tensor([0, *itertools.accumulate(case.lengths)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        leaf = logps.clone().requires_grad_()
        with triton_on_cpu() if case.impl == TRITON else contextlib.nullcontext():
            impl = "triton" if case.impl == TRITON else "reference"
            found = preference_loss(leaf, offsets, groups, case.objective, ref, impl=impl)
            (gradient,) = torch.autograd.grad(case.scale * found.loss, leaf)
        sums = seq_logps(leaf, offsets)
        upstream = torch.linspace(-2, 3, len(case.lengths)).to(sums.dtype)
        (d_sums,) = torch.autograd.grad(sums, leaf, upstream)
    finally:
        torch.set_num_threads(before)
    by_token = torch.repeat_interleave(torch.tensor(case.lengths))
    assert torch.equal(d_sums, upstream[by_token])  # copies, so nothing is rounded
    results = {name: x.detach() for name, x in found._asdict().items()}
    return {**results, "gradient": gradient, "sums": sums.detach(), **metrics(case, results, groups)}


def metrics(case: LossCase, results: dict[str, Tensor], groups: PreferenceGroups | None = None) -> dict[str, Tensor]:
    groups = groups or PreferenceGroups.from_lists(case.lists)
    result = PreferenceLoss(**{name: results[name] for name in PreferenceLoss._fields})
    found = preference_metrics(result, groups, case.objective, torch.tensor(case.lengths))
    del found["rewards/accuracies"]  # a step, which rounding may take either way
    return {name: x.detach() for name, x in found.items()}


def by_formula(case: LossCase, logps: Tensor, ref: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The loop over groups, in the precision `dtype`."""
    leaf = logps.to(dtype).requires_grad_()
    starts = [0, *itertools.accumulate(case.lengths)]
    lists = [[*group] for group in case.lists]
    found = oracle(leaf, starts, lists, case.objective, ref.to(dtype), case.weights, case.response_weights)
    (found["gradient"],) = torch.autograd.grad(case.scale * found["loss"], leaf)
    found = {name: x.detach() for name, x in found.items()}
    return {**found, "sums": found["seq_logps"], **metrics(case, found)}


def judge(case: LossCase) -> dict[str, float]:
    logps, ref = values_of(case)
    found = ours(case, logps, ref, case.threads)
    again = ours(case, logps, ref, 1) if case.threads > 1 and case.impl == PLAIN else found
    truth, eager = (by_formula(case, logps, ref, dtype) for dtype in (torch.float64, torch.float32))
    floors = floors_of(case, truth)
    same = all(torch.equal(found[name].nan_to_num(), again[name].nan_to_num()) for name in found)
    if case.regime == "inf or NaN in one group":
        found["gradient"] = judged_apart(case, found, truth)
    shares = {name: share(x, truth[name], eager[name], floors[name], name) for name, x in found.items()}
    return {**shares, f"other bits on {case.threads} threads": 0.0 if same else math.inf}


def judged_apart(case: LossCase, found: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """The gradient with that of the group that is not finite taken from the truth, after its own rule: all of it is
    NaN where the group's loss is. (In other losses of an infinite score, 0 times infinity is anyone's.)
    """
    sizes = [*map(len, case.lists)]
    group = torch.repeat_interleave(torch.tensor(sizes))
    at = group[bad_response(case)]
    apart = (group == at).repeat_interleave(torch.tensor(case.lengths))
    if found["group_losses"][at].isnan():
        assert found["gradient"][apart].isnan().all()
    return torch.where(apart, truth["gradient"].to(found["gradient"].dtype), found["gradient"])


def share(found: Tensor, truth: Tensor, eager: Tensor, floor: Tensor | float, name: str) -> float:
    """The largest share of its budget that an entry takes: twice the error of eager PyTorch in float32, or two
    roundings of the truth where eager is exact by luck, or `floor`."""
    assert found.shape == truth.shape, name
    info = torch.finfo(found.dtype)
    finite = truth.to(found.dtype).isfinite()
    error = (found.double() - truth).abs()
    peer = (eager.double() - truth).abs()
    budget = torch.maximum(2 * peer.nan_to_num(0, 0, 0), info.eps * truth.abs() + info.tiny * info.eps)
    of_budget = error / torch.maximum(budget, torch.as_tensor(floor, dtype=torch.float64))
    # What no number of this precision can hold must not look like a number.
    of_budget = torch.where(finite, of_budget, torch.where(found.isfinite(), math.inf, 0.0))
    return float(of_budget.nan_to_num(math.inf, math.inf).max())


def floors_of(case: LossCase, truth: dict[str, Tensor]) -> dict[str, Tensor | float]:
    """What an error may be whatever eager PyTorch's: what the truth itself, which is float64, does not know, for it
    takes differences of numbers as large as the scores; and a float32 rounding of each number that is added.
    """
    o, n = case.objective, torch.tensor(case.lengths)
    float32, float64 = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))
    group = torch.repeat_interleave(torch.tensor([*map(len, case.lists)]))

    def largest(x: Tensor) -> Tensor:  # (S,) -> (G,)
        return torch.zeros(len(case.lists)).double().scatter_reduce(0, group, finite(x).abs(), "amax")

    d_score = o.beta / n if o.averages else torch.full((len(n),), o.beta)
    sizes = finite(truth["rewards"]).abs() + d_score * finite(truth["seq_logps"]).abs()
    lost = 16 * float64 * (1 + (largest(sizes) + abs(o.alpha) * largest(n.diff(prepend=n[:1]))) / min(o.tau, 1))
    factors = finite(truth["policy_weights"])
    weights = factors * truth["shares"]
    of_gradient = torch.maximum(case.scale * weights * largest(d_score), largest(first_tokens(case, truth["gradient"])))
    losses = finite(truth["group_losses"]).abs()
    u, s = largest(truth["rewards"]).max(), largest(truth["seq_logps"]).max()
    return {
        "loss": float32 * (truth["shares"] * losses).sum() + (weights * lost).sum(),
        "group_losses": lost * factors,
        "gradient": (lost * of_gradient)[group].repeat_interleave(n),
        "rewards": 16 * float64 * sizes,
        "balance_weights": 16 * float64 * largest(sizes).max(),
        "positive_mass": 2 * float32 * max(1, u),  # of scores that are rounded
        "balance_weight": float32 * finite(truth["balance_weights"]).max(),
        **{f"rewards/{name}": 2 * float32 * u for name in ("chosen", "rejected", "margins")},
        **{f"logps/{name}": 2 * float32 * s for name in ("chosen", "rejected")},
        **dict.fromkeys(("seq_logps", "sums"), 0.0),
    }


def finite(x: Tensor) -> Tensor:
    return x.double().nan_to_num(0, 0, 0)


def first_tokens(case: LossCase, x: Tensor) -> Tensor:  # (T,) -> (S,)
    return x[torch.tensor([0, *itertools.accumulate(case.lengths)][:-1])]


FAMILY = Family(
    name="losses",
    title="Preference losses",
    count=5_000,
    draw=draw,
    judge=judge,
    sources=(
        "tests/campaign/losses.py",
        "tests/test_objectives.py",
        "python/groupdpo_kernels/testing.py",
        "python/groupdpo_kernels/preference/*.py",
        "python/groupdpo_kernels/trainers/metrics.py",
        "kernels/triton/p*.py",
        "kernels/triton/tile.py",
    ),
)
