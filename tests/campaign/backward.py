"""The backward by micro-batches: each strategy, with and without shared prompts, against one graph of all."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groupdpo_kernels import (
    AdaBalance,
    Objective,
    PreferenceGroups,
    SharedPrompt,
    group_backward,
    linear_logps,
    preference_loss,
)
from groupdpo_kernels.preference.group_backward import forward_parts
from groupdpo_kernels.preference.losses import LOSSES

from .frame import Family

VOCABULARY, WIDTH = 41, 12


@dataclass(frozen=True)
class Step:
    """A batch: its groups, the lengths of its responses, and how these lie in micro-batches."""

    lists: tuple[tuple[bool, ...], ...]
    lengths: tuple[int, ...]
    micro_batches: tuple[int, ...]  # responses of each
    prompts: tuple[int, ...]  # micro-batches that share each prompt; () where none is shared


@dataclass(frozen=True)
class BackwardCase:
    number: int
    strategy: str  # two_pass, one_pass, or coupled: the graph of everything, in parts
    objective: Objective
    steps: tuple[Step, ...]  # more than one accumulate
    dropout: float
    frozen: tuple[str, ...]
    parameters: bool  # whether group_backward is told its leaves
    auxiliary: bool
    scale: float
    weights: bool
    ref_by_token: bool
    threads: int

    @property
    def rows(self) -> tuple[str, ...]:
        several = any(len(step.micro_batches) > 1 for step in self.steps)
        kinds = {
            "prompt: shared": any(step.prompts for step in self.steps),
            "prompt: in each row": not all(step.prompts for step in self.steps),
            "micro-batches: several": several,
            "micro-batches: one": not several,
            "dropout": self.dropout > 0,
            "gradients accumulate": len(self.steps) > 1,
            "parameters: some frozen": bool(self.frozen),
            "parameters: given": self.parameters,
            "auxiliary loss": self.auxiliary,
            "weights of groups": self.weights,
        }
        return (f"loss: {self.objective.loss}", *(name for name, has in kinds.items() if has))

    @property
    def column(self) -> str:
        return self.strategy


def draw(number: int) -> BackwardCase:
    chance = random.Random(number)
    loss = chance.choice(list(LOSSES))
    row = LOSSES[loss]
    strategy = chance.choice(["two_pass", "two_pass", "one_pass", "coupled"])
    return BackwardCase(
        number,
        strategy,
        Objective(
            loss,
            beta=chance.choice([0.1, 1.0, 3.0]),
            average=chance.choice([None, True, False]),
            reference_free=chance.choice([None, True, False]),
            nll_weight=chance.choice([0.0, 1.0]),
            label_smoothing=0.1,
            gamma=0.3,
            alpha=0.01,
            tau=0.5,
            balance=None if row.no_balance or chance.random() < 0.7 else AdaBalance(),
            policy_weight=chance.random() < 0.15,
        ),
        tuple(draw_step(row, chance) for _ in range(chance.choice([1, 1, 1, 2, 3]))),
        chance.choice([0.0, 0.1, 0.5]),
        tuple(chance.sample(NAMES, chance.choice([0, 0, 1, 2, len(NAMES) - 1]))),
        chance.random() < 0.3,
        chance.random() < 0.2,
        chance.choice([1.0, 0.25, 1024.0]),
        chance.random() < 0.2,
        chance.random() < 0.3,
        chance.choice([1] * 10 + [2, 5]),  # as many cases of threads as a busy machine stands
    )


def draw_step(row: Any, chance: random.Random) -> Step:
    lists = []
    for _ in range(chance.randint(1, 3)):
        size = 2 if row.pair and not row.every_pair else chance.randint(2, 7)
        positives = chance.randint(1, size - 1)
        sides = [True] * positives + [False] * (size - positives)
        lists.append(tuple(sides if row.ranks else chance.sample(sides, size)))
    S = sum(map(len, lists))
    sizes = parted(S, chance)
    prompts = parted(len(sizes), chance) if chance.random() < 0.5 else ()
    return Step(tuple(lists), tuple(chance.randint(1, 12) for _ in range(S)), sizes, prompts)


def parted(n: int, chance: random.Random) -> tuple[int, ...]:
    """n as a sum of positive numbers, often of one."""
    cuts = chance.sample(range(1, n), chance.randint(0, n - 1)) if n > 1 and chance.random() < 0.8 else []
    return tuple(b - a for a, b in itertools.pairwise([0, *sorted(cuts), n]))


# ------------------------------------------------------------------------------------------------------------ the model


class Tiny(nn.Module):
    """A causal model of two layers, each of which mixes in a decayed sum of all states before. A prompt is handed on as
    that sum. `fused`: whether log-probabilities come from linear_logps or from the logits.
    """

    def __init__(self, number: int, dropout: float, fused: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(number)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if name != "embedding" else 1)
            setattr(self, name, nn.Parameter(value))
        self.dropout, self.fused, self.auxiliary = dropout, fused, False
        self.noise: torch.Generator | None = None

    def drop(self, x: Tensor) -> Tensor:
        """Dropout whose mask is the same in every precision."""
        if not self.dropout:
            return x
        keep = torch.rand(x.shape) >= self.dropout  # of torch's global generator
        return x * keep / (1 - self.dropout)

    def states(self, ids: Tensor, memory: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(L,) ids after a prompt's memory -> (L, WIDTH) states, and the memory after them: a sum in each layer."""
        x, after = self.drop(self.embedding[ids]), []
        for layer, before in zip((self.first, self.second), memory):
            total = before + x.cumsum(0)
            after.append(total[-1])
            x = x + self.drop(torch.tanh((x + 0.1 * total) @ layer.T))
        return x, after

    def empty(self) -> list[Tensor]:
        return [self.embedding.new_zeros(WIDTH)] * 2

    def prefix(self, prompt: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.states(prompt, self.empty())[1])

    def rows(self, micro_batch: list[Tensor], prefix: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Log-probabilities of all tokens of each row but its first, and the rows' offsets."""
        memory = prefix or self.empty()
        hidden = torch.cat([self.states(row[:-1], memory)[0] for row in micro_batch])
        targets = torch.cat([row[1:] for row in micro_batch])
        if self.fused:
            logps = linear_logps(hidden, self.head, targets)
        else:
            logps = torch.log_softmax(hidden @ self.head.T, -1).gather(1, targets[:, None])[:, 0]
        if self.noise is not None:
            sign = torch.randint(-1, 2, logps.shape, generator=self.noise)
            logps = logps + sign * torch.finfo(torch.float32).eps * (1 + logps.detach().abs())
        offsets = torch.tensor([0, *itertools.accumulate(len(row) - 1 for row in micro_batch)])
        return (logps, offsets, 0.01 * hidden.square().sum()) if self.auxiliary else (logps, offsets)


SHAPES = {
    "embedding": (VOCABULARY, WIDTH),
    "first": (WIDTH, WIDTH),
    "second": (WIDTH, WIDTH),
    "head": (VOCABULARY, WIDTH),
}
NAMES = [*SHAPES]


def model_of(case: BackwardCase, fused: bool, dtype: torch.dtype) -> Tiny:
    model = Tiny(case.number, case.dropout, fused).to(dtype)
    model.auxiliary = case.auxiliary
    for name in case.frozen:
        getattr(model, name).requires_grad_(False)
    return model


# ------------------------------------------------------------------------------------------------------------ judgement


def batch_of(case: BackwardCase, at: int) -> tuple[list[Any], PreferenceGroups, Tensor]:
    """(parts, groups, ref_logps) of a step."""
    step, generator = case.steps[at], torch.Generator().manual_seed(1000 * case.number + at)
    rows = iter([torch.randint(VOCABULARY, (n + 1,), generator=generator) for n in step.lengths])
    parts: list[Any] = [[*itertools.islice(rows, size)] for size in step.micro_batches]
    if step.prompts:
        micro_batches = iter(parts)
        parts = [
            SharedPrompt(
                torch.randint(VOCABULARY, (3 + n,), generator=generator), [*itertools.islice(micro_batches, n)]
            )
            for n in step.prompts
        ]
        if case.number % 3 == 0:  # one prompt by itself: its rows pass for micro-batches without one
            parts[-1:] = parts[-1].micro_batches
    weights = [0.3 + g for g in range(len(step.lists))] if case.weights else None
    groups = PreferenceGroups.from_lists(step.lists, weights=weights)
    size = sum(step.lengths) if case.ref_by_token else len(step.lengths)
    ref = -4 * torch.rand(size, generator=generator)
    return parts, groups, ref


Found = tuple[list[Tensor], dict[str, Tensor], Tensor]


def ours(case: BackwardCase) -> Found:
    """(losses of the steps, gradients, the random state after them)."""
    model, losses = model_of(case, True, torch.float32), []
    leaves = [p for p in model.parameters() if p.requires_grad] if case.parameters else None
    torch.manual_seed(case.number)
    for at in range(len(case.steps)):
        parts, groups, ref = batch_of(case, at)
        scale = case.scale / len(case.steps)
        if case.strategy == "coupled":
            losses.append(whole(model, parts, groups, case.objective, ref, scale))
            continue
        result = group_backward(
            parts, model if case.steps[at].prompts else lambda rows: model.rows(rows, ()), groups, case.objective, ref,
            strategy=case.strategy, scale=scale if case.number % 2 else torch.tensor(scale), parameters=leaves,
        )  # fmt: skip
        losses.append(result.loss)
    return losses, gradients_of(model), torch.get_rng_state()


def one_graph(case: BackwardCase, dtype: torch.dtype, noise: int | None = None) -> Found:
    """The same in eager PyTorch, with logits. noise: a seed of errors in log-probabilities, as float32 makes them."""
    model, losses = model_of(case, False, dtype), []
    model.noise = None if noise is None else torch.Generator().manual_seed(noise)
    torch.manual_seed(case.number)
    for at in range(len(case.steps)):
        parts, groups, ref = batch_of(case, at)
        losses.append(whole(model, parts, groups, case.objective, ref.to(dtype), case.scale / len(case.steps)))
    return losses, gradients_of(model), torch.get_rng_state()


def whole(model: Tiny, parts: list[Any], groups: PreferenceGroups, o: Objective, ref: Tensor, scale: float) -> Tensor:
    token_logps, offsets, auxiliary = forward_parts(parts, model)
    loss = preference_loss(token_logps, offsets, groups, o, ref).loss
    (scale * sum(auxiliary, loss)).backward()
    return loss.detach()


def gradients_of(model: Tiny) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def judge(case: BackwardCase) -> dict[str, float]:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    try:
        truth, eager = (one_graph(case, dtype) for dtype in (torch.float64, torch.float32))
        # What a loss makes of a rounding may be far more than a rounding, and in one run of eager PyTorch nothing by
        # luck. So roundings are drawn twice more.
        peers = [eager, *(one_graph(case, torch.float64, noise=seed) for seed in (1, 2))]
        torch.set_num_threads(case.threads)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="pass 2")
            found = ours(case)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    assert torch.equal(found[2], truth[2]), "the random state is another one"
    assert found[1].keys() == truth[1].keys(), "other parameters have gradients"
    shares = {
        "loss": max(share(x, exact, losses) for x, exact, *losses in zip(found[0], truth[0], *(p[0] for p in peers)))
    }
    return shares | {name: share(x, truth[1][name], [p[1][name] for p in peers]) for name, x in found[1].items()}


def share(found: Tensor, truth: Tensor, peers: list[Tensor]) -> float:
    """The error by what it may be: twice the peers', each as a norm over the tensor; or 8 roundings of the truth."""
    error, *others = (float((x.double() - truth).norm()) for x in (found, *peers))
    return error / max(2 * max(others), 8 * torch.finfo(torch.float32).eps * float(truth.norm()), 1e-30)


FAMILY = Family(
    name="backward",
    title="The backward by micro-batches",
    count=1_000,
    draw=draw,
    judge=judge,
    sources=(
        "tests/campaign/backward.py",
        "python/groupdpo_kernels/*.py",
        "python/groupdpo_kernels/preference/*.py",
        "python/groupdpo_kernels/lm_head/*.py",
        "csrc/**/*.[ch]*",
    ),
)
