"""What three papers claim of their losses, checked on the small arithmetic model of examples/, over several seeds.

    python bench/claims.py                        all claims, seeds 0 1 2; resumable, half an hour of one core
    python bench/claims.py --claims groups        one of them
    python bench/claims.py --tables               the tables of what is there, for docs/claims.md

groups    GroupDPO (arXiv 2604.15602): a loss over a group learns more than one over single pairs, more responses help
          up to about 16, and without the likelihood of positives beside it training is worse.
adadpo    AdaDPO (arXiv 2605.28440): balancing the two sides beats DPO over learning rates and betas, and narrows the
          gap between the gradients of the sides.
sdpo      sDPO (arXiv 2403.19270): the data in two or three stages, easy to hard, beats all of it at once.

Task and model are those of examples/arithmetic_task.py: a number, and sums that make it. All runs of a seed have the
same start (a short phase of next-token training), training prompts, responses and held-out prompts, so arms are
compared by their differences within a seed. Nothing is tuned: each table is at the settings that it names.

Measured at the end of a run, on held-out prompts: `right`, the share that greedy decoding answers rightly; `accuracy`,
the share of pairs whose right answer has gained more against the start; `right_logp`, the log-probability of a token of
a right answer, which falls where training collapses. Of adadpo also, as means over four moments of a run: `gap`, how
many times as large the rejected side's gradient in probability is as the preferred side's, and `norms`, the same of the
norms of the two parts of the parameters' gradient, both as base-2 logarithms.

The results file is rewritten after each run; the same command goes on, with more seeds too. Cost: about four seconds of
one core a run, 68 runs a seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# At the end of the path: the directory kernels/ must not come before a package of that name.
sys.path.append(str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

from arithmetic_task import (  # type: ignore[import-not-found]  # of examples, and so are the next two
    ANSWER,
    NUMBERS,
    answer_logps,
    answers_of,
    encode,
    is_right,
    make_data,
    make_model,
    right_answer,
)
from arithmetic_training import HeldOut, warm_up  # type: ignore[import-not-found]
from over_seeds import interval  # type: ignore[import-not-found]

from bench.report import header
from groupdpo_kernels import AdaBalance, Objective, PreferenceGroups, preference_loss, seq_logps
from groupdpo_kernels.stepwise import easy_to_hard
from groupdpo_kernels.stepwise.store import write_json

RESULTS = Path(__file__).resolve().parent / "results" / "epyc" / "claims.json"
HELD_OUT, WARM_UP, SIDE = 96, 120, 8  # prompts, steps to the start, right answers of a prompt and as many wrong ones
LOSSES = ("margin", "mpo", "all_pairs", "softmax")
SIZES = (2, 4, 8, 16)
RATES, BETAS = (5e-4, 1e-3, 2e-3, 4e-3), (0.1, 0.3, 1.0, 3.0)  # betas of summed scores
CEILINGS = (1.5, 2.0, 2.5, 5.0)


@dataclass(frozen=True)
class Arm:
    """A way to train; each step takes `prompts` of the training prompts, and of each the first `size` responses."""

    objective: Objective
    size: int = 2
    pairs: int = 1  # of a prompt in a step, where its responses are taken as so many pairs
    prompts: int = 8
    rate: float = 2e-3
    stages: int = 1
    easy_first: bool = True
    gaps: bool = False  # whether the gradients of the sides are measured


def group(loss: str, size: int, nll: float) -> Arm:
    return Arm(Objective(loss, beta=5.0, average=True, nll_weight=nll), size)


def pairwise(rate: float, beta: float, ceiling: float | None) -> Arm:
    balance = None if ceiling is None else AdaBalance(ceiling=ceiling)
    return Arm(Objective("sigmoid", beta=beta, balance=balance), pairs=4, rate=rate, gaps=True)


def arms_of(claim: str) -> dict[str, Arm]:
    if claim == "groups":
        arms = {}
        for nll in (0.0, 1.0):
            beside = " + NLL" if nll else ""
            arms[f"G = 2{beside}"] = group("sigmoid", 2, nll)
            # As many responses as G = 16 has, in pairs: what is left of a group's gain is the loss's.
            arms[f"8 pairs{beside}"] = replace(group("sigmoid", 2, nll), pairs=SIDE)
            arms |= {f"{loss}, G = {G}{beside}": group(loss, G, nll) for loss in LOSSES for G in SIZES[1:]}
        return arms
    if claim == "adadpo":
        grid = [(rate, beta) for rate in RATES for beta in BETAS]
        arms = {}
        for rate, beta in grid:
            arms[f"DPO, {rate:g}, {beta:g}"] = pairwise(rate, beta, None)
            arms[f"AdaDPO, {rate:g}, {beta:g}"] = pairwise(rate, beta, 2.0)
        return arms | {f"C = {C:g}": pairwise(2e-3, 0.3, C) for C in CEILINGS}
    dpo = pairwise(2e-3, 0.3, None)
    dpo = replace(dpo, gaps=False)
    return {
        "DPO on all": dpo,
        "2 stages, easy to hard": replace(dpo, stages=2),
        "3 stages, easy to hard": replace(dpo, stages=3),
        "2 stages at random": replace(dpo, stages=2, easy_first=False),
    }


# ------------------------------------------------------------------------------------------------------- data and start


@dataclass(frozen=True)
class Data:
    """Of each prompt SIDE right answers, then SIDE wrong ones."""

    input_ids: Tensor  # (prompts, 2 SIDE, L)
    targets: Tensor  # (prompts, 2 SIDE, L)

    @classmethod
    def make(cls, numbers: list[int], rng: random.Random) -> Data:
        texts = []
        for number in numbers:
            others = [other for other in numbers if other != number]
            sums = [number] * SIDE + [rng.choice(others) for _ in range(SIDE)]
            texts += [f"{number}={right_answer(total, rng)}" for total in sums]
        ids = encode(texts).view(len(numbers), 2 * SIDE, -1)
        targets = ids[..., 1:].clone()
        targets[..., :3] = -100
        return cls(ids[..., :-1], targets)

    def batch(self, prompts: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:  # (p,), (p or 1, c) -> (p c, L) twice
        at = (prompts[:, None], columns)
        return self.input_ids[at].flatten(0, 1), self.targets[at].flatten(0, 1)

    @torch.no_grad()
    def sums(self, model: torch.nn.Module) -> Tensor:  # (prompts, 2 SIDE)
        rows = [x.flatten(0, 1).split(512) for x in (self.input_ids, self.targets)]
        return torch.cat([seq_logps(*answer_logps(model, batch)) for batch in zip(*rows)]).view(len(self.targets), -1)


@dataclass(frozen=True)
class Start:
    """What all runs of a seed share."""

    model: Any
    data: Data
    ref_logps: Tensor  # (prompts, 2 SIDE) of the start
    held_out: HeldOut
    numbers: list[int]  # of held-out prompts
    fixed: Data  # held-out responses, on which gradients are measured

    @classmethod
    def make(cls, seed: int, steps: int, held_out: int) -> Start:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        numbers = rng.sample(NUMBERS, len(NUMBERS))
        others, training = numbers[:held_out], numbers[held_out:]
        model = make_model()
        warm_up(model, make_data(training, training, rng), steps)
        data = Data.make(training, rng)
        watched = HeldOut(make_data(others, others, rng), model)
        return cls(model, data, data.sums(model), watched, others, Data.make(others[:8], rng))


# ------------------------------------------------------------------------------------------------------------- training


def draw(arm: Arm, data: Data, among: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor, PreferenceGroups]]:
    """(prompts (p,), columns (p or 1, c), groups) of each step; whole epochs, each in a new order."""
    left = among[:0]
    for _ in range(steps):
        while len(left) < arm.prompts:
            left = torch.cat([left, among[torch.randperm(len(among))]])
        chosen, left = left[: arm.prompts], left[arm.prompts :]
        half = torch.arange(arm.size // 2)
        columns = torch.cat([half, SIDE + half])[None]
        sides = [[True] * len(half) + [False] * len(half)] * len(chosen)
        if arm.objective.loss == "sigmoid":  # pairs, right then wrong; of more than a prompt has, others each time
            some = torch.stack([torch.randperm(SIDE)[: arm.pairs] for _ in chosen]) if arm.pairs > 1 else half[None]
            columns = torch.stack([some, SIDE + some], -1).flatten(1)
            sides = [[True, False]] * (len(chosen) * arm.pairs)
        yield chosen, columns, PreferenceGroups.from_lists(sides)


def train(start: Start, arm: Arm, steps: int, seed: int) -> dict[str, float]:
    """The figures at the end."""
    torch.manual_seed(seed)
    model = copy.deepcopy(start.model)
    everything, ref_logps = torch.arange(len(start.data.input_ids)), start.ref_logps
    parts = [everything]
    if arm.stages > 1:
        pairs = PreferenceGroups.from_lists([[True] * SIDE + [False] * SIDE] * len(everything))
        order = torch.randperm(len(everything)).tensor_split(arm.stages)
        parts = [*order]
        if arm.easy_first:
            parts = [torch.tensor(part) for part in easy_to_hard(ref_logps.flatten(), pairs, arm.stages)]
    gaps: list[tuple[float, float]] = []
    for stage, part in enumerate(parts):
        if stage:
            ref_logps = start.data.sums(model)
        of_stage = steps * (stage + 1) // len(parts) - steps * stage // len(parts)
        optimizer = torch.optim.AdamW(model.parameters(), lr=arm.rate, betas=(0.9, 0.95), weight_decay=0.01)
        warm = max(1, steps // 10)
        for step, (chosen, columns, groups) in enumerate(draw(arm, start.data, part, of_stage)):
            if arm.gaps and step % max(1, of_stage // 4) == of_stage // 8:
                gaps.append(gap(start, model, arm.objective))
            optimizer.param_groups[0]["lr"] = arm.rate * min(1.0, (step + 1) / warm)
            token_logps, cu_seqlens = answer_logps(model, start.data.batch(chosen, columns))
            of_reference = ref_logps[chosen[:, None], columns].flatten()
            preference_loss(token_logps, cu_seqlens, groups, arm.objective, of_reference).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    found = dict(start.held_out(model))
    texts = answers_of(model, start.numbers)
    found["right"] = sum(map(is_right, start.numbers, texts)) / len(texts)
    for i, name in enumerate(("gap", "norms")):
        if gaps:
            found[name] = statistics.fmean(x[i] for x in gaps)
    return found


def gap(start: Start, model: torch.nn.Module, objective: Objective) -> tuple[float, float]:
    """(of gradients in probability, of norms in the parameters): log2 of the rejected side over the preferred one, on
    held-out pairs. The probability is a token's, the geometric mean over the answer."""
    data = start.fixed
    columns = torch.stack([torch.arange(SIDE), SIDE + torch.arange(SIDE)], -1).flatten()[None]
    batch = data.batch(torch.arange(len(data.input_ids)), columns)
    token_logps, cu_seqlens = answer_logps(model, batch)
    with torch.no_grad():
        of_reference = seq_logps(*answer_logps(start.model, batch))
    leaf = token_logps.detach().requires_grad_()
    groups = PreferenceGroups.pairs(len(of_reference) // 2)
    preference_loss(leaf, cu_seqlens, groups, objective, of_reference).loss.backward()
    assert leaf.grad is not None
    sums = seq_logps(leaf.detach(), cu_seqlens)
    # The gradient in a response's probability a token is that in its sum, times its length, over the probability.
    coefficients = leaf.grad[cu_seqlens[:-1].long()].abs().log2() - sums / ANSWER / torch.log(torch.tensor(2.0))
    in_probability = float((coefficients[1::2] - coefficients[::2]).mean())
    norms = []
    for side in (groups.positive, ~groups.positive):
        upstream = leaf.grad * side.repeat_interleave(cu_seqlens.diff())
        gradients = torch.autograd.grad(token_logps, [*model.parameters()], upstream, retain_graph=True)
        norms.append(torch.stack([x.square().sum() for x in gradients]).sum().sqrt())
    return in_probability, float((norms[1] / norms[0]).log2())


# --------------------------------------------------------------------------------------------------------------- tables

Runs = dict[str, dict[str, dict[str, float]]]  # of a claim: by arm and seed


def cell(runs: Runs, arm: str, name: str, scale: float = 1.0) -> str:
    values = [scale * found[name] for found in runs.get(arm, {}).values()]
    return f"{statistics.fmean(values):.2f}" if values else ""


def difference(runs: Runs, arm: str, base: str, name: str) -> str:
    """The mean over seeds of the difference within a seed, and half its interval of 95 %."""
    both = [s for s in runs.get(arm, {}) if s in runs.get(base, {})]
    values = [runs[arm][seed][name] - runs[base][seed][name] for seed in both]
    return f"{statistics.fmean(values):+.2f} ± {interval(values):.2f}" if len(values) > 1 else ""


def table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def of_groups(runs: Runs) -> str:
    rows = [["arm", *(f"{x}{beside}" for beside in ("", " + NLL") for x in ("right", "- G = 2", "accuracy", "log p"))]]
    names = [name for name in arms_of("groups") if not name.endswith("NLL")]
    for name in names:
        row = [name]
        for beside in ("", " + NLL"):
            row += [cell(runs, name + beside, "right"), difference(runs, name + beside, f"G = 2{beside}", "right")]
            row += [cell(runs, name + beside, x) for x in ("accuracy", "right_logp")]
        rows.append(row)
    return table(rows)


def of_adadpo(runs: Runs) -> str:
    """A grid of the difference in `right`, how often each is better, and the gaps."""
    rows, names = [["rate", *(f"beta = {beta:g}" for beta in BETAS)]], ("right", "accuracy", "right_logp")
    for rate in RATES:
        cells = []
        for beta in BETAS:
            one, other = (f"{name}, {rate:g}, {beta:g}" for name in ("AdaDPO", "DPO"))
            cells.append(
                f"{cell(runs, one, 'right')} / {cell(runs, other, 'right')} ({difference(runs, one, other, 'right')})"
            )
        rows.append([f"{rate:g}", *cells])
    text = table(rows)
    pairs = [(f"AdaDPO, {rate:g}, {beta:g}", f"DPO, {rate:g}, {beta:g}") for rate in RATES for beta in BETAS]
    done = [(a, b) for a, b in pairs if runs.get(a) and runs.get(b)]
    for name in names:
        ahead = sum(mean(runs[a], name) > mean(runs[b], name) for a, b in done)
        equal = sum(mean(runs[a], name) == mean(runs[b], name) for a, b in done)
        text += f"\n\n{name}: AdaDPO is ahead in {ahead} of {len(done)} cells, equal in {equal}."
    rows = [["arm", "right", "accuracy", "log p", "gap in probability, log2", "gap of norms, log2"]]
    for name in ("DPO, 0.002, 0.3", *(f"C = {C:g}" for C in CEILINGS)):
        rows.append([name, *(cell(runs, name, x) for x in (*names, "gap", "norms"))])
    return text + "\n\n" + table(rows)


def mean(runs: dict[str, dict[str, float]], name: str) -> float:
    return statistics.fmean(found[name] for found in runs.values())


def of_sdpo(runs: Runs) -> str:
    rows = [["arm", "right", "right - that of DPO", "accuracy", "accuracy - that of DPO", "log p"]]
    for name in arms_of("sdpo"):
        row = [name]
        for x in ("right", "accuracy"):
            row += [cell(runs, name, x), difference(runs, name, "DPO on all", x)]
        rows.append([*row, cell(runs, name, "right_logp")])
    return table(rows)


CLAIMS: dict[str, Callable[[Runs], str]] = {"groups": of_groups, "adadpo": of_adadpo, "sdpo": of_sdpo}


# -------------------------------------------------------------------------------------------------------------- the run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--claims", nargs="+", choices=[*CLAIMS], default=[*CLAIMS], help="default: all")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--steps", type=int, default=96, help="of each run; default: %(default)s")
    add("--minutes", type=float, default=float("inf"), help="end about then; default: no limit")
    add("--json", type=Path, default=RESULTS, help="the results; default: %(default)s")
    add("--tables", action="store_true", help="print the tables of what is there, and train nothing")
    add("--quick", action="store_true", help="hardly any training, to see that it runs; needs --json")
    options = parser.parse_args()
    if options.quick and options.json == RESULTS:
        parser.error("--quick needs --json: its results are not worth keeping")
    return options


def main() -> int:
    options = parse()
    torch.set_num_threads(1)  # the matrices are so small that a second thread mostly waits
    steps, warm, held_out = (2, 2, 8) if options.quick else (options.steps, WARM_UP, HELD_OUT)
    settings = {"steps": steps, "warm_up": warm, "held_out": held_out}
    content: dict[str, Any] = header(torch.device("cpu")) | {"settings": settings, "starts": {}, "runs": {}}
    del content["memory_by"], content["driver, max clock, power limit"]
    if options.json.exists():
        kept = json.loads(options.json.read_text())
        if kept["settings"] != settings and not options.tables:
            raise ValueError(f"--json must hold results of the settings {settings}; got those of {kept['settings']}")
        content = kept
    end = time.monotonic() + 60 * options.minutes
    for seed in [] if options.tables else options.seeds:
        start = None
        for claim in options.claims:
            arms = [*arms_of(claim).items()][: 4 if options.quick else None]
            for name, arm in arms:
                runs = content["runs"].setdefault(claim, {}).setdefault(name, {})
                if str(seed) in runs or time.monotonic() > end:
                    continue
                if start is None:
                    start = Start.make(seed, warm, held_out)
                    found = start.held_out(start.model)
                    share = sum(map(is_right, start.numbers, answers_of(start.model, start.numbers))) / held_out
                    content["starts"][str(seed)] = found | {"right": share}
                began = time.process_time()
                runs[str(seed)] = {k: round(x, 4) for k, x in train(start, arm, steps, seed).items()}
                write_json(options.json, content)
                print(
                    f"{claim}, seed {seed}, {name}: {runs[str(seed)]}, {time.process_time() - began:.1f} s", flush=True
                )
    for claim in options.claims:
        runs = content["runs"].get(claim, {})
        seeds = sorted({int(seed) for of_arm in runs.values() for seed in of_arm})
        print(f"\n{claim}, seeds {seeds}\n\n{CLAIMS[claim](runs)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
