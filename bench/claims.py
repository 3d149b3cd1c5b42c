"""What three papers claim of their losses, checked on two small models, over several seeds.

    python bench/claims.py                                      a Llama of two layers; 14 minutes of one core
    python bench/claims.py --model smollm2 --path smollm2       SmolLM2-135M-Instruct, in the folder that
                                                                examples/smollm2/prepare.py has written; a smaller
                                                                choice of arms, as long
    python bench/claims.py --claims groups                      one of the claims
    python bench/claims.py --tables                             the tables of what is there, for docs/claims.md

groups    GroupDPO (arXiv 2604.15602): a loss over a group learns more than one over single pairs, more responses help
          up to about 16, and without the likelihood of positives beside it training is worse.
adadpo    AdaDPO (arXiv 2605.28440): balancing the two sides beats DPO over learning rates and betas, and narrows the
          gap between the gradients of the sides.
sdpo      sDPO (arXiv 2403.19270): the data in two or three stages, easy to hard, beats all of it at once.

Tasks and models are in claims_tasks.py, the sizes of both experiments in PLANS. All runs of a seed have the same start,
training prompts, responses and held-out prompts, so arms are compared by their differences within a seed. Nothing is
tuned: each table is at the settings that it names.

Measured at the end of a run, on held-out prompts: `right`, the share that greedy decoding answers rightly; `accuracy`,
the share of pairs whose right answer has gained more against the start; `right_logp`, the log-probability of a token of
a right answer, which falls where training collapses. Of adadpo also, as means over four moments of a run: `gap`, how
many times as large the rejected side's gradient in probability is as the preferred side's, and `norms`, the same of the
norms of the two parts of the parameters' gradient, both as base-2 logarithms.

The results file is rewritten after each run; the same command goes on, with more seeds too. Seeds come one after the
other, so that what is there when it is stopped are whole comparisons. Several processes, each with the seeds in another
order, may share a file.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import json
import os
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

from over_seeds import interval  # type: ignore[import-not-found]  # of examples

from bench.claims_tasks import Additions, Start, Sums
from bench.report import header
from groupdpo_kernels import AdaBalance, Objective, PreferenceGroups, preference_loss, seq_logps
from groupdpo_kernels.files import write_json
from groupdpo_kernels.memory.machine import versions
from groupdpo_kernels.stepwise import easy_to_hard

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Arm:
    """A way to train; each step takes `prompts` of the training prompts, and of each the first `size` responses."""

    objective: Objective
    rate: float
    prompts: int
    size: int = 2
    pairs: int = 1  # of a prompt in a step, where its responses are taken as so many pairs
    stages: int = 1
    easy_first: bool = True
    gaps: bool = False  # whether the gradients of the sides are measured


@dataclass(frozen=True)
class Plan:
    """The sizes of one model's experiment."""

    results: Path
    steps: int  # of a run
    held_out: int  # prompts
    prompts: int  # of a step
    side: int  # right answers of a prompt, and as many wrong ones
    sizes: dict[str, tuple[int, ...]]  # G of each group loss
    group_rate: float
    group_beta: float  # of scores per token
    pairs: int  # of a prompt in a step of adadpo and sdpo
    rates: tuple[float, ...]
    betas: tuple[float, ...]  # of summed scores
    rate: float  # with `beta`, where ceilings and stages are compared
    beta: float
    ceilings: tuple[float, ...]  # other than 2, which the grid has
    stages: tuple[int, ...]

    def group(self, loss: str, size: int, nll: float) -> Arm:
        objective = Objective(loss, beta=self.group_beta, average=True, nll_weight=nll)
        return Arm(objective, self.group_rate, self.prompts, size)

    def pairwise(self, rate: float, beta: float, ceiling: float | None) -> Arm:
        balance = None if ceiling is None else AdaBalance(ceiling=ceiling)
        return Arm(Objective("sigmoid", beta=beta, balance=balance), rate, self.prompts, pairs=self.pairs, gaps=True)

    def arms(self, claim: str) -> dict[str, Arm]:
        arms: dict[str, Arm] = {}
        if claim == "groups":
            for nll in (0.0, 1.0):
                beside = " + NLL" if nll else ""
                arms[f"G = 2{beside}"] = pair = self.group("sigmoid", 2, nll)
                # As many responses as the largest G has, in pairs: what is left of a group's gain is the loss's.
                arms[f"{self.side} pairs{beside}"] = replace(pair, pairs=self.side)
                for loss, sizes in self.sizes.items():
                    arms |= {f"{loss}, G = {G}{beside}": self.group(loss, G, nll) for G in sizes}
        elif claim == "adadpo":
            for rate, beta in self.grid:
                arms[f"DPO, {rate:g}, {beta:g}"] = self.pairwise(rate, beta, None)
                arms[f"AdaDPO, {rate:g}, {beta:g}"] = self.pairwise(rate, beta, 2.0)
            arms |= {f"C = {C:g}": self.pairwise(self.rate, self.beta, C) for C in self.ceilings}
        else:
            dpo = replace(self.pairwise(self.rate, self.beta, None), gaps=False)
            arms["DPO on all"] = dpo
            arms |= {f"{n} stages, easy to hard": replace(dpo, stages=n) for n in self.stages}
            arms["2 stages at random"] = replace(dpo, stages=2, easy_first=False)
        return arms

    @property
    def grid(self) -> list[tuple[float, float]]:
        return [(rate, beta) for rate in self.rates for beta in self.betas]


PLANS = {
    "sums": Plan(
        results=RESULTS / "xeon" / "claims.json",
        steps=96,
        held_out=96,
        prompts=8,
        side=8,
        sizes=dict.fromkeys(("margin", "mpo", "all_pairs", "softmax"), (4, 8, 16)),
        group_rate=2e-3,
        group_beta=5.0,
        pairs=4,
        rates=(5e-4, 1e-3, 2e-3, 4e-3),
        betas=(0.1, 0.3, 1.0, 3.0),
        rate=2e-3,
        beta=0.3,
        ceilings=(1.5, 2.5, 5.0),
        stages=(2, 3),
    ),
    # A run is twice as dear, so this is a choice of arms. Betas of groups and of pairs are those of
    # examples/smollm2/arms.py. The rate is ten times as large, for with fewer layers to train hardly anything moves in
    # twelve steps at that one (seed 0, four rates tried with three arms).
    "smollm2": Plan(
        results=RESULTS / "xeon" / "claims_smollm2.json",
        steps=12,
        held_out=64,
        prompts=4,
        side=4,
        sizes={"mpo": (4, 8), "margin": (8,), "all_pairs": (8,), "softmax": (8,)},
        group_rate=1e-3,
        group_beta=2.0,
        pairs=2,
        rates=(1e-3, 3e-3),
        betas=(0.1, 1.0),
        rate=1e-3,
        beta=0.1,
        ceilings=(1.5, 5.0),
        stages=(2,),
    ),
}


# ------------------------------------------------------------------------------------------------------------- training


def draw(arm: Arm, side: int, among: Tensor, steps: int) -> Iterator[tuple[Tensor, Tensor, PreferenceGroups]]:
    """(prompts (p,), columns (p or 1, c), groups) of each step; whole epochs, each in a new order."""
    left = among[:0]
    for _ in range(steps):
        while len(left) < arm.prompts:
            left = torch.cat([left, among[torch.randperm(len(among))]])
        chosen, left = left[: arm.prompts], left[arm.prompts :]
        half = torch.arange(arm.size // 2)
        columns = torch.cat([half, side + half])[None]
        sides = [[True] * len(half) + [False] * len(half)] * len(chosen)
        if arm.objective.loss == "sigmoid":  # pairs, right then wrong; of more than a prompt has, others each time
            some = torch.stack([torch.randperm(side)[: arm.pairs] for _ in chosen]) if arm.pairs > 1 else half[None]
            columns = torch.stack([some, side + some], -1).flatten(1)
            sides = [[True, False]] * (len(chosen) * arm.pairs)
        yield chosen, columns, PreferenceGroups.from_lists(sides)


def train(start: Start, arm: Arm, steps: int, seed: int) -> tuple[torch.nn.Module, dict[str, float]]:
    """The model at the end, and the gaps on the way, where the arm measures them."""
    torch.manual_seed(seed)
    model = copy.deepcopy(start.model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ref_logps, side = start.ref_logps, start.ref_logps.shape[1] // 2
    everything = torch.arange(len(ref_logps))
    parts = [everything]
    if arm.stages > 1:
        pairs = PreferenceGroups.from_lists([[True] * side + [False] * side] * len(everything))
        order = torch.randperm(len(everything)).tensor_split(arm.stages)
        parts = [*order]
        if arm.easy_first:
            parts = [torch.tensor(part) for part in easy_to_hard(ref_logps.flatten(), pairs, arm.stages)]
    gaps: list[tuple[float, float]] = []
    for stage, part in enumerate(parts):
        if stage:
            ref_logps = start.sums(model)
        of_stage = steps * (stage + 1) // len(parts) - steps * stage // len(parts)
        optimizer = torch.optim.AdamW(parameters, lr=arm.rate, betas=(0.9, 0.95), weight_decay=0.01)
        warm = max(1, steps // 10)
        for step, (chosen, columns, groups) in enumerate(draw(arm, side, part, of_stage)):
            if arm.gaps and step % max(1, of_stage // 4) == of_stage // 8:
                gaps.append(gap(start, model, parameters, arm.objective))
            optimizer.param_groups[0]["lr"] = arm.rate * min(1.0, (step + 1) / warm)
            token_logps, cu_seqlens = start.logps(model, chosen, columns)
            of_reference = ref_logps[chosen[:, None], columns].flatten()
            preference_loss(token_logps, cu_seqlens, groups, arm.objective, of_reference).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model, {name: statistics.fmean(of) for name, of in zip(("gap", "norms"), zip(*gaps))}


def gap(
    start: Start, model: torch.nn.Module, parameters: list[torch.nn.Parameter], objective: Objective
) -> tuple[float, float]:
    """(of gradients in probability, of norms in the parameters): log2 of the rejected side over the preferred one, on
    held-out pairs. The probability is a token's, the geometric mean over the answer."""
    token_logps, cu_seqlens = start.watched(model)
    leaf = token_logps.detach().requires_grad_()
    groups = PreferenceGroups.pairs(len(start.watched_logps) // 2)
    preference_loss(leaf, cu_seqlens, groups, objective, start.watched_logps).loss.backward()
    assert leaf.grad is not None
    mean_logps = seq_logps(leaf.detach(), cu_seqlens) / cu_seqlens.diff()
    # The gradient in a response's probability a token is that in its sum, times its length, over the probability. The
    # two answers of a pair are equally long.
    coefficients = leaf.grad[cu_seqlens[:-1].long()].abs().log2() - mean_logps / torch.log(torch.tensor(2.0))
    in_probability = float((coefficients[1::2] - coefficients[::2]).mean())
    norms = []
    for side in (groups.positive, ~groups.positive):
        upstream = leaf.grad * side.repeat_interleave(cu_seqlens.diff())
        gradients = torch.autograd.grad(token_logps, parameters, upstream, retain_graph=True)
        norms.append(torch.stack([x.square().sum() for x in gradients]).sum().sqrt())
    return in_probability, float((norms[1] / norms[0]).log2())


# --------------------------------------------------------------------------------------------------------------- tables

Runs = dict[str, dict[str, dict[str, float]]]  # of a claim: by arm and seed


def cell(runs: Runs, arm: str, name: str, scale: float = 1.0) -> str:
    values = [scale * found[name] for found in runs.get(arm, {}).values()]
    return f"{statistics.fmean(values):.2f}" if values else ""


def difference(runs: Runs, arm: str, base: str, name: str) -> str:
    """The mean over seeds of the difference within a seed, and half its interval of 95 %; nothing for the base."""
    if arm == base:
        return ""
    both = [s for s in runs.get(arm, {}) if s in runs.get(base, {})]
    values = [runs[arm][seed][name] - runs[base][seed][name] for seed in both]
    return f"{statistics.fmean(values):+.2f} ± {interval(values):.2f}" if len(values) > 1 else ""


def table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def of_groups(runs: Runs, plan: Plan) -> str:
    rows = [["arm", *(f"{x}{beside}" for beside in ("", " + NLL") for x in ("right", "- G = 2", "accuracy", "log p"))]]
    names = [name for name in plan.arms("groups") if not name.endswith("NLL")]
    for name in names:
        row = [name]
        for beside in ("", " + NLL"):
            row += [cell(runs, name + beside, "right"), difference(runs, name + beside, f"G = 2{beside}", "right")]
            row += [cell(runs, name + beside, x) for x in ("accuracy", "right_logp")]
        rows.append(row)
    return table(rows)


def of_adadpo(runs: Runs, plan: Plan) -> str:
    """A grid of the difference in `right`, how often each is better, and the gaps."""
    rows, names = [["rate", *(f"beta = {beta:g}" for beta in plan.betas)]], ("right", "accuracy", "right_logp")
    for rate in plan.rates:
        cells = []
        for beta in plan.betas:
            one, other = (f"{name}, {rate:g}, {beta:g}" for name in ("AdaDPO", "DPO"))
            cells.append(
                f"{cell(runs, one, 'right')} / {cell(runs, other, 'right')} ({difference(runs, one, other, 'right')})"
            )
        rows.append([f"{rate:g}", *cells])
    text = table(rows)
    pairs = [(f"AdaDPO, {rate:g}, {beta:g}", f"DPO, {rate:g}, {beta:g}") for rate, beta in plan.grid]
    done = [(a, b) for a, b in pairs if runs.get(a) and runs.get(b)]
    for name in names:
        ahead = sum(mean(runs[a], name) > mean(runs[b], name) for a, b in done)
        equal = sum(mean(runs[a], name) == mean(runs[b], name) for a, b in done)
        text += f"\n\n{name}: AdaDPO is ahead in {ahead} of {len(done)} cells, equal in {equal}."
    rows = [["arm", "right", "accuracy", "log p", "gap in probability, log2", "gap of norms, log2"]]
    at = f"{plan.rate:g}, {plan.beta:g}"
    ceilings = {f"C = {C:g}": f"AdaDPO, {at}" if C == 2 else f"C = {C:g}" for C in sorted((2.0, *plan.ceilings))}
    for shown, name in {"DPO": f"DPO, {at}", **ceilings}.items():
        rows.append([shown, *(cell(runs, name, x) for x in (*names, "gap", "norms"))])
    return text + "\n\n" + table(rows)


def mean(runs: dict[str, dict[str, float]], name: str) -> float:
    return statistics.fmean(found[name] for found in runs.values())


def of_sdpo(runs: Runs, plan: Plan) -> str:
    rows = [["arm", "right", "right - that of DPO", "accuracy", "accuracy - that of DPO", "log p"]]
    for name in plan.arms("sdpo"):
        row = [name]
        for x in ("right", "accuracy"):
            row += [cell(runs, name, x), difference(runs, name, "DPO on all", x)]
        rows.append([*row, cell(runs, name, "right_logp")])
    return table(rows)


CLAIMS: dict[str, Callable[[Runs, Plan], str]] = {"groups": of_groups, "adadpo": of_adadpo, "sdpo": of_sdpo}


# -------------------------------------------------------------------------------------------------------------- the run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=[*PLANS], default="sums", help="default: %(default)s, a Llama of two layers")
    add("--path", type=Path, help="the folder that examples/smollm2/prepare.py has written, for --model smollm2")
    add("--claims", nargs="+", choices=[*CLAIMS], default=[*CLAIMS], help="default: all")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--steps", type=int, help="of each run; default: as the model's plan has it")
    add("--minutes", type=float, default=float("inf"), help="end about then; default: no limit")
    add("--json", type=Path, help="the results; default: under bench/results")
    add("--tables", action="store_true", help="print the tables of what is there, and train nothing")
    add("--quick", action="store_true", help="hardly any training, of a tiny model, to see that it runs; needs --json")
    options = parser.parse_args()
    if options.quick and options.json is None:
        parser.error("--quick needs --json: its results are not worth keeping")
    if options.model == "smollm2" and not (options.quick or options.tables) and options.path is None:
        parser.error("--model smollm2 needs --path, the folder that examples/smollm2/prepare.py has written")
    return options


def begin(options: argparse.Namespace, plan: Plan, seed: int) -> Start:
    if options.model == "sums":
        return Sums.make(seed, plan.held_out, options.quick)
    return Additions.make(seed, plan.held_out, options.quick, options.path)


def kept(path: Path, otherwise: dict[str, Any]) -> dict[str, Any]:
    """What the results file holds."""
    return json.loads(path.read_text()) if path.exists() else otherwise


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """A context in which no other process of this script writes the file."""
    folder = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(folder)


def main() -> int:
    options = parse()
    torch.set_num_threads(1)  # the matrices are so small that a second thread mostly waits
    plan = PLANS[options.model]
    path = options.json or plan.results
    if options.steps or options.quick:
        plan = replace(plan, steps=options.steps or 2, held_out=8 if options.quick else plan.held_out)
    settings = {"steps": plan.steps, "held_out": plan.held_out}
    content: dict[str, Any] = header(torch.device("cpu")) | {"model": options.model, "settings": settings}
    content |= {"starts": {}, "runs": {}}
    content["versions"] |= versions(("transformers", "peft"))
    del content["memory_by"], content["driver, max clock, power limit"]
    found = kept(path, content)
    if settings.items() - found["settings"].items() and not options.tables:
        raise ValueError(f"--json must hold results of the settings {settings}; got those of {found['settings']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    for seed in [] if options.tables else options.seeds:
        start: Start | None = None
        for claim in options.claims:
            for name, arm in [*plan.arms(claim).items()][: 4 if options.quick else None]:
                runs = kept(path, content)["runs"].get(claim, {}).get(name, {})
                if str(seed) in runs or time.monotonic() > end:
                    continue
                if start is None:
                    start = begin(options, plan, seed)
                    of_start = start.figures(start.model)
                began = time.process_time()
                model, gaps = train(start, arm, plan.steps, seed)
                figures = {of: round(x, 4) for of, x in (start.figures(model) | gaps).items()}
                with alone(path):
                    content = kept(path, content)
                    content["starts"][str(seed)] = of_start
                    content["runs"].setdefault(claim, {}).setdefault(name, {})[str(seed)] = figures
                    write_json(path, content)
                print(f"{claim}, seed {seed}, {name}: {figures}, {time.process_time() - began:.1f} s", flush=True)
    content = kept(path, content)
    for claim in options.claims:
        runs = content["runs"].get(claim, {})
        seeds = sorted({int(seed) for of_arm in runs.values() for seed in of_arm})
        print(f"\n{claim}, seeds {seeds}\n\n{CLAIMS[claim](runs, plan)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
