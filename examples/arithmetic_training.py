"""Four ways to learn from the same groups of answers, from one start: METHODS, and one loop that trains any of them.

The shared start is a model after a short phase of next-token training on right answers; it is the first reference too.
Every method takes the same groups at the same rate, the pairwise ones as 4 pairs of a group of 8, with the same score
(the log-ratio to the reference per token, times beta), the same optimiser and the same path: `stepwise.run_stages`
scores the reference, then each step is `group_backward` in two passes over micro-batches. Rewards on held-out groups
are against the shared start, whatever the method: all are 0 at first, and the accuracy is one half.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from arithmetic_task import ANSWER, GROUP, Data, answer_logps, sums_of  # type: ignore[import-not-found]
from torch import Tensor

from groupdpo_kernels import AdaBalance, Objective, PreferenceGroups, group_backward, model_logps
from groupdpo_kernels.stepwise import easy_to_hard, equal_parts, reward_accuracy, run_stages

GROUPS_PER_STEP = 16
MICRO_BATCH = 64  # answers
LEARNING_RATE = 4e-3
BETA = 5.0  # per token; all answers are equally long, so this is DPO at beta = 5 / 7
DPO = Objective("sigmoid", beta=BETA, average=True)


@dataclass(frozen=True)
class Method:
    name: str
    what: str
    objective: Objective
    stages: int = 1

    @property
    def in_pairs(self) -> bool:
        return self.objective.loss == "sigmoid"


MAIN = Method(
    "MPO + NLL",
    "a group at once: its right answers against all of them, and their likelihood beside it",
    Objective("mpo", beta=BETA, average=True, nll_weight=1.0),
)
METHODS = (
    MAIN,
    Method("DPO", "a right answer against a wrong one", DPO),
    Method("AdaDPO", "the same, with the gradients of the two sides in balance", replace(DPO, balance=AdaBalance())),
    Method("sDPO", "DPO on the easier half of the groups, then on the harder with what came out as reference", DPO, 2),
)


@dataclass
class Run:
    """One method: its curve as it goes, and what is measured in the end."""

    name: str
    what: str
    objective: dict[str, Any]
    stages: int
    curve: list[dict[str, float]] = field(default_factory=list)
    final: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"reference": 0.0, "training": 0.0, "evaluation": 0.0})

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


def show(line: str, stays: bool = True) -> None:
    """Prints a line; one that does not stay is replaced by the next, and only appears on a terminal."""
    if sys.stdout.isatty():
        print(f"\r\033[K{line}", end="\n" if stays else "", flush=True)
    elif stays:
        print(line, flush=True)


class Descent:
    """AdamW; the learning rate rises over 20 steps and falls along a cosine to a twentieth."""

    def __init__(self, model: torch.nn.Module, steps: int) -> None:
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / 20) * (0.525 + 0.475 * math.cos(math.pi * step / steps))
        )

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()


def warm_up(model: torch.nn.Module, data: Data, steps: int) -> None:
    """Next-token training on right answers: what comes out knows how an answer looks, and little of adding up."""
    descent, right = Descent(model, 2 * steps), data.positive.nonzero()[:, 0]
    for _ in range(steps):
        ((input_ids, targets),) = data.batches(right[torch.randint(len(right), (MICRO_BATCH,))], MICRO_BATCH)
        (-model_logps(model, input_ids, targets)[targets != -100].mean()).backward()
        descent.step()


class HeldOut:
    """Held-out groups, measured against what the shared start makes of them."""

    def __init__(self, data: Data, start: torch.nn.Module) -> None:
        self.data, self.start_logps = data, sums_of(start, data)

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        logps = sums_of(model, self.data)
        accuracy, margin = reward_accuracy(BETA * (logps - self.start_logps) / ANSWER, self.data.groups)
        right = logps[self.data.positive].mean() / ANSWER
        return {"accuracy": float(accuracy.mean()), "margin": float(margin.mean()), "right_logp": float(right)}


HEADINGS = f"{'':11}{'step':>5}{'loss':>9}{'held-out accuracy':>20}{'margin':>9}{'log p of right':>17}{'tokens/s':>11}"


@dataclass
class Training:
    """What run_stages calls for each stage of a method; fills the curve of `run`."""

    method: Method
    steps: int  # of all stages together
    held_out: HeldOut
    run: Run
    done: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)  # since the last row

    def __call__(self, model: torch.nn.Module, data: Data, ref_logps: Tensor, stage: int) -> None:
        steps = len(equal_parts(self.steps, self.method.stages)[stage - 1])
        descent, every = Descent(model, steps), max(1, self.steps // 8)
        epochs = (torch.randperm(len(data)).split(GROUPS_PER_STEP) for _ in itertools.count())
        if stage == 1:
            self.evaluate(model)
        for groups in itertools.islice(itertools.chain.from_iterable(epochs), steps):
            with self.run.timing("training"):
                self.backward(model, data, groups, ref_logps)
                descent.step()
            self.done += 1
            if self.done % every == 0 or self.done == self.steps:
                self.evaluate(model)
            left = self.run.seconds["training"] / self.done * (self.steps - self.done)
            show(f"  {self.method.name}: step {self.done} of {self.steps}, {left:.0f} s to go", stays=False)

    def backward(self, model: torch.nn.Module, data: Data, chosen: Tensor, ref_logps: Tensor) -> None:
        if self.method.in_pairs:
            rows, groups = data.pairs(chosen), PreferenceGroups.pairs(len(chosen) * GROUP // 2)
        else:
            rows, groups = data.rows(chosen), data.select(chosen.tolist()).groups
        batches = data.batches(rows, MICRO_BATCH)
        result = group_backward(
            batches, lambda batch: answer_logps(model, batch), groups, self.method.objective, ref_logps[rows]
        )
        self.losses.append(float(result.loss))
        self.tokens += sum(input_ids.numel() for input_ids, _ in batches)

    def evaluate(self, model: torch.nn.Module) -> None:
        with self.run.timing("evaluation"):
            at = {"step": self.done, **self.held_out(model)}
        loss = speed = "-"
        if self.losses:
            at["loss"] = sum(self.losses) / len(self.losses)
            at["tokens_per_second"] = self.tokens / self.run.seconds["training"]
            loss, speed = f"{at['loss']:.3f}", f"{at['tokens_per_second']:,.0f}"
        self.run.curve.append(at)
        self.losses = []
        figures = f"{loss:>9}{at['accuracy']:20.3f}{at['margin']:9.2f}{at['right_logp']:17.2f}{speed:>11}"
        show(f"{self.method.name:11}{self.done:5d}{figures}")


def train(run: Run, method: Method, model: torch.nn.Module, data: Data, steps: int, held_out: HeldOut) -> None:
    """Trains the model in place and fills the run as it goes, so that an interrupt leaves what there is."""

    def score(model: torch.nn.Module, part: Data) -> Tensor:
        with run.timing("reference"):
            return sums_of(model, part)

    parts = [data]
    if method.stages > 1:
        parts = [data.select(part) for part in easy_to_hard(score(model, data), data.groups, method.stages)]
    training = Training(method, steps, held_out, run)
    with tempfile.TemporaryDirectory() as directory:  # nothing to resume: all of it takes half a minute
        run_stages(model, parts, training, directory, score=score, count=lambda group: GROUP)
