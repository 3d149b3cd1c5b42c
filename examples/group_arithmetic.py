"""A small Llama learns arithmetic from groups of right and wrong answers, four ways, on a CPU, by this package's path.

The task is in arithmetic_task.py: only the prompt tells right answers from wrong ones. Held-out numbers never occur in
training, neither as a prompt nor as the sum of a wrong answer; their own wrong answers are right answers of other
held-out numbers. The four methods are in arithmetic_training.py; all begin at one shared start, with no rewards yet,
where ties count half: the held-out reward accuracy is exactly one half.

Measured on the way: the loss (mean since the row before); on held-out groups, against the shared start, the reward
accuracy (of the pairs of a right and a wrong answer to a prompt, the share in which the right one has the higher
reward), the margin (the mean difference), and the log-probability of a token of a right answer; tokens a second,
prompts included, through whole training steps. In the end: the accuracy when the same answers are scored under a
prompt that has nothing to do with them, which must be chance; how many held-out prompts the model answers rightly by
itself (greedy decoding, checked by adding up); the peak memory of one step against the size of the group, by
group_memory.py; and tokens a second with a shared prompt and without, by group_time.py.

Ctrl-C ends it early and keeps what there is. Writes report.json and curves.png to --out. With no --quick and no --steps
the exit status says whether the held-out reward accuracy of MPO + NLL has passed 0.95.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import group_memory  # type: ignore[import-not-found]  # beside this file, and so are the next four
import group_time  # type: ignore[import-not-found]
import torch
import transformers
from arithmetic_curves import draw  # type: ignore[import-not-found]
from arithmetic_task import GROUP, NUMBERS, answers_of, is_right, make_data, make_model  # type: ignore[import-not-found]
from arithmetic_training import (  # type: ignore[import-not-found]
    GROUPS_PER_STEP,
    HEADINGS,
    LEARNING_RATE,
    MAIN,
    METHODS,
    MICRO_BATCH,
    HeldOut,
    Run,
    show,
    train,
    warm_up,
)
from transformers import LlamaForCausalLM

import groupdpo_kernels
from groupdpo_kernels import explain

STEPS = 128  # of each method
WARM_UP = 60  # steps to the shared start
EPOCHS = 2
HELD_OUT = 48  # of the numbers


@dataclass
class Report:
    """What report.json holds. Filled as the runs go, so that an interrupted one keeps what it has."""

    environment: dict[str, Any]
    options: dict[str, Any]
    start: dict[str, float] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    tokens_per_second: list[dict[str, Any]] = field(default_factory=list)  # of a step, with a shared prompt and without
    seconds: float = 0.0
    interrupted: bool = False


def answer(model: LlamaForCausalLM, numbers: list[int]) -> tuple[float, str]:
    """The share of the numbers that the model answers rightly by itself; and a line about it."""
    answers = answers_of(model, numbers)
    right = [is_right(number, text) for number, text in zip(numbers, answers)]
    some = [f"{n}={a} {'right' if r else 'wrong'}" for n, a, r in zip(numbers, answers, right)][:3]
    line = f"own answers to held-out prompts: {sum(right)} of {len(right)} right, such as {', '.join(some)}"
    return sum(right) / len(right), line


def compare(report: Report) -> None:
    """The methods side by side."""
    show("\nheld-out prompts   reward accuracy   under other prompts   log p of right   own answers right")
    for name, final in [("shared start", report.start), *((run.name, run.final) for run in report.runs)]:
        control, own = final["accuracy_under_other_prompts"], final["own_answers_right"]
        show(f"{name:16}{final['accuracy']:18.3f}{control:22.3f}{final['right_logp']:17.2f}{own:20.0%}")
    show("Rewards are against the shared start, so chance is 0.5; log p is the mean over the tokens of right answers.")
    for run in report.runs:
        show(f"  {run.name}: {run.what}.")


def measure_memory(points: list[group_memory.Point], report: Report) -> None:
    show(f"\npeak memory of one step beyond model and gradients, MiB; {points[0].tokens} tokens an answer")
    show(f"{'G':>6}{'coupled':>12}{'two passes':>12}")
    for point, peak in group_memory.measure(points):
        report.memory.append({**asdict(point), "peak_bytes": peak})
        if point.backward == "two_pass":
            coupled, two_pass = (at["peak_bytes"] / 2**20 for at in report.memory[-2:])
            show(f"{point.group:6d}{coupled:12.1f}{two_pass:12.1f}")


def measure_time(sizes: list[group_time.Size], rounds: int, report: Report) -> None:
    show(f"\ntokens a second of one step; a prompt of {sizes[0].prompt} tokens, {sizes[0].answer} an answer")
    show(f"{'G':>6}{'whole sequences':>18}{'prompt shared':>16}{'times as fast':>16}")
    for size, whole, shared in group_time.measure(sizes, rounds):
        report.tokens_per_second.append({**asdict(size), "whole_sequences": whole, "shared_prompt": shared})
        show(f"{size.group:6d}{whole:18,.0f}{shared:16,.0f}{shared / whole:16.1f}")


def environment(model: LlamaForCausalLM) -> dict[str, Any]:
    weight = model.lm_head.weight
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "groupdpo_kernels": groupdpo_kernels.__version__,
        "impl": explain(weight[:1], weight, torch.zeros(1, dtype=torch.long)).impl,
        "machine": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A small Llama learns arithmetic from groups of answers, four ways")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the data and the split")
    parser.add_argument("--steps", type=int, default=None, help=f"of the optimiser, for each method ({STEPS})")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of report.json and curves.png")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it runs")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 2:
        parser.error(f"--steps must be at least 2, for sDPO has two stages; got {arguments.steps}")
    return arguments


def run_all(arguments: argparse.Namespace, steps: int, report: Report, model: LlamaForCausalLM) -> None:
    rng = random.Random(arguments.seed)
    numbers = rng.sample(NUMBERS, len(NUMBERS))
    held_out_numbers, training_numbers = numbers[:HELD_OUT], numbers[HELD_OUT:]
    prompts = rng.choices(training_numbers, k=GROUPS_PER_STEP * min(-(-steps // EPOCHS), 4 if arguments.quick else 250))
    data = make_data(prompts, training_numbers, rng)
    held_out_data = make_data(held_out_numbers * (1 if arguments.quick else 2), held_out_numbers, rng)
    report.options |= {"training_groups": len(data), "held_out_groups": len(held_out_data)}
    show(f"{len(data):,} groups of {GROUP} answers, {len(held_out_data)} held out; impl={report.environment['impl']!r}")
    warm_up(model, data, report.options["warm_up"])
    held_out = HeldOut(held_out_data, model)
    others = rng.choices(training_numbers, k=(1 if arguments.quick else 6) * len(held_out_data))
    elsewhere = HeldOut(held_out_data.under(others), model)

    def final(model: LlamaForCausalLM) -> tuple[dict[str, float], str]:
        share, line = answer(model, held_out_numbers)
        control = elsewhere(model)["accuracy"]
        return held_out(model) | {"accuracy_under_other_prompts": control, "own_answers_right": share}, line

    report.start, _ = final(model)
    show(f"\n{HEADINGS}")
    for method in METHODS:
        run = Run(method.name, method.what, asdict(method.objective), method.stages)
        report.runs.append(run)
        learner = copy.deepcopy(model)
        train(run, method, learner, data, steps, held_out)
        run.final, line = final(learner)
        show(f"{'':11}{line}")
    compare(report)


def main() -> int:
    arguments = parse()
    steps = arguments.steps or (6 if arguments.quick else STEPS)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # the matrices are so small that a second thread mostly waits, above all on a busy machine
    torch.manual_seed(arguments.seed)
    model = make_model()
    sizes = {"group": GROUP, "groups_per_step": GROUPS_PER_STEP, "micro_batch": MICRO_BATCH}
    options = {
        "seed": arguments.seed,
        "steps": steps,
        "warm_up": 12 if arguments.quick else WARM_UP,
        "learning_rate": LEARNING_RATE,
        **sizes,
    }
    report = Report(environment(model), options)
    sizes_of_group = [2, 4] if arguments.quick else [2, 4, 8, 16]
    points = group_memory.points_of(sizes_of_group)
    began = time.perf_counter()
    try:
        run_all(arguments, steps, report, model)
        measure_memory([replace(p, layers=1) for p in points] if arguments.quick else points, report)
        measure_time([group_time.Size(G) for G in sizes_of_group], 1 if arguments.quick else 3, report)
    except KeyboardInterrupt:
        report.interrupted = True
        show("interrupted; what there is so far is kept")
    report.seconds = time.perf_counter() - began
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    draw(report.runs, report.memory, steps, arguments.out / "curves.png")
    show(f"\n{report.seconds:.0f} s; report.json and curves.png are in {arguments.out}")
    if report.interrupted:
        return 130
    main_run = next(run for run in report.runs if run.name == MAIN.name)
    if arguments.quick or arguments.steps or main_run.final["accuracy"] > 0.95:
        return 0
    print(f"the held-out reward accuracy of {MAIN.name} has not passed 0.95", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
