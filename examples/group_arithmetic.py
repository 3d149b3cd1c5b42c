"""A small Llama learns arithmetic from groups of right and wrong answers, on a CPU, by this package's own path.

The task. A prompt is a number, `137=`, and any sum that makes it is a right answer: `58+79`. Each prompt comes with a
group of 8 answers, 2 to 6 of them right. A wrong answer is a right answer of another prompt: nothing in an answer gives
it away, only the prompt tells the two apart. Held-out numbers never occur in training, neither as a prompt nor as the
sum of a wrong answer; their own wrong answers are right answers of other held-out numbers.

Training starts from random weights, and these are the reference too: its log-probabilities are computed once, before
the first step. There is no supervised phase, because the NLL term of the objective does its work. So all rewards are 0
at first, ties count half, and the held-out reward accuracy starts at exactly one half.

    log-probabilities   model_logps: straight from the hidden states, the logits never exist
    objective           mpo + NLL on the right answers, scores averaged over tokens
    backward            group_backward: two passes over micro-batches

Measured on the way: the loss (mean since the row before); on held-out groups the reward accuracy (of the pairs of a
right and a wrong answer, the share in which the right one has the higher reward) and the margin (the mean difference);
tokens a second, prompts included, through whole training steps. In the end: the accuracy when the same answers are
scored under a prompt that has nothing to do with them, which must be chance; how many held-out prompts the model
answers rightly by itself (greedy decoding, checked by adding up); and the peak memory of one step against the size of
the group, by group_memory.py.

Ctrl-C ends it early and keeps what there is. Writes report.json and curves.png to --out. With no --quick and no --steps
the exit status says whether the held-out reward accuracy has passed 0.95.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import groupdpo_kernels
from groupdpo_kernels import (
    Objective,
    PreferenceGroups,
    explain,
    group_backward,
    model_logps,
    preference_loss,
    seq_logps,
)

OBJECTIVE = Objective("mpo", beta=5.0, average=True, nll_weight=1.0)
GROUP = 8  # answers to a prompt
GROUPS_PER_STEP = 16
MICRO_BATCH = 64  # answers
LEARNING_RATE = 4e-3
ALPHABET = "0123456789+="
NUMBERS = range(20, 179)  # each is the sum of two numbers of two digits in many ways


# ------------------------------------------------------------------------------------------------------------- the task


@dataclass(frozen=True)
class Data:
    """Groups of GROUP rows each. All rows have the same length: three digits, "=", and an answer of five characters."""

    input_ids: Tensor  # (S, L)
    targets: Tensor  # (S, L) the token that each position predicts; -100 in the prompt
    positive: Tensor  # (S,) bool

    def __len__(self) -> int:
        return len(self.input_ids) // GROUP

    def take(self, groups: Tensor) -> tuple[Data, Tensor]:
        """The groups of these indices, and the indices of their rows."""
        rows = (groups[:, None] * GROUP + torch.arange(GROUP)).flatten()
        return Data(self.input_ids[rows], self.targets[rows], self.positive[rows]), rows


def right_answer(number: int, rng: random.Random) -> str:
    first = rng.randint(max(0, number - 99), min(99, number))
    return f"{first:02d}+{number - first:02d}"


def is_right(number: int, answer: str) -> bool:
    first, plus, second = answer.partition("+")
    return plus == "+" and first.isdecimal() and second.isdecimal() and int(first) + int(second) == number


def make_data(prompts: list[int], numbers: list[int], rng: random.Random) -> Data:
    """One group for each prompt; the sums of wrong answers are drawn from `numbers`."""
    texts, positive = [], []
    for number in prompts:
        labels = [True] * rng.randint(2, GROUP - 2)
        labels += [False] * (GROUP - len(labels))
        rng.shuffle(labels)
        others = [other for other in numbers if other != number]
        for label in labels:
            answer = right_answer(number if label else rng.choice(others), rng)
            assert is_right(number, answer) == label
            texts.append(f"{number:03d}={answer}")
        positive += labels
    ids = encode(texts)
    targets = ids[:, 1:].clone()
    targets[:, :3] = -100
    return Data(ids[:, :-1], targets, torch.tensor(positive))


def encode(texts: list[str]) -> Tensor:  # (S, L)
    return torch.tensor([[ALPHABET.index(c) for c in text] for text in texts])


# ------------------------------------------------------------------------------------------------------------ the model


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(ALPHABET),
        max_position_embeddings=16,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def forward_of(model: torch.nn.Module) -> Any:
    """What group_backward calls: a micro-batch -> (token_logps (t,), cu_seqlens (s+1,))."""

    def forward(micro_batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        input_ids, targets = micro_batch
        live = targets != -100
        lengths = live.sum(1)
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return model_logps(model, input_ids, targets)[live], cu_seqlens

    return forward


def micro_batches(data: Data, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(data.input_ids.split(size), data.targets.split(size)))


@torch.no_grad()
def sums_of(model: torch.nn.Module, data: Data) -> Tensor:  # (S,)
    """Log-probabilities of the answers, no graph."""
    forward = forward_of(model)
    return torch.cat([seq_logps(*forward(batch)) for batch in micro_batches(data, 512)])


def groups_of(positive: Tensor) -> PreferenceGroups:
    return PreferenceGroups(torch.arange(0, len(positive) + 1, GROUP), positive)


def evaluate(model: torch.nn.Module, data: Data, ref_logps: Tensor) -> dict[str, float]:
    """Reward accuracy and margin over all pairs of a right and a wrong answer to the same prompt."""
    rewards = OBJECTIVE.beta * (sums_of(model, data) - ref_logps) / (data.targets != -100).sum(1)
    right, wrong = groups_of(data.positive).pair_indices(every=True)
    gaps = rewards[right] - rewards[wrong]
    return {
        "accuracy": float((gaps > 0).double().mean() + 0.5 * (gaps == 0).double().mean()),
        "margin": float(gaps.mean()),
    }


@torch.no_grad()
def answers_of(model: LlamaForCausalLM, numbers: list[int]) -> list[str]:
    """Greedy decoding, five characters."""
    ids = encode([f"{number:03d}=" for number in numbers])
    for _ in range(5):
        best = model(ids, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, best[:, None]], 1)
    return ["".join(ALPHABET[i] for i in row[4:]) for row in ids.tolist()]


# --------------------------------------------------------------------------------------------------------- the training


@dataclass
class Report:
    """What report.json holds. Filled as the run goes, so that an interrupted one keeps what it has."""

    environment: dict[str, Any]
    options: dict[str, Any]
    curve: list[dict[str, float]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    final: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False


class Timer:
    """`with Timer(report, "training"):` adds to report.seconds, also when it is left by Ctrl-C."""

    def __init__(self, report: Report, name: str) -> None:
        self.report, self.name = report, name

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = self.report.seconds
        seconds[self.name] = seconds.get(self.name, 0.0) + time.perf_counter() - self.start


COLUMNS = f"{'step':>6}{'loss':>9}{'held-out accuracy':>20}{'margin':>9}{'tokens/s':>11}"


def row(at: dict[str, float]) -> str:
    return (
        f"{at['step']:6.0f}{at['loss']:9.3f}{at['accuracy']:20.3f}{at['margin']:9.2f}{at['tokens_per_second']:11,.0f}"
    )


def show(line: str, end: str = "\n") -> None:
    """A line that stays (end="\n") or, on a terminal alone, one that the next replaces."""
    if sys.stdout.isatty():
        print(f"\r\033[K{line}", end=end, flush=True)
    elif end:
        print(line, flush=True)


def train(model: LlamaForCausalLM, data: Data, held_out: Data, steps: int, report: Report) -> Tensor:
    """Trains the model in place. Gives the reference log-probabilities of the held-out answers, (S,)."""
    with Timer(report, "reference"):
        ref_logps, held_out_ref_logps = sums_of(model, data), sums_of(model, held_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = min(20, steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (0.525 + 0.475 * math.cos(math.pi * step / steps))
    )
    forward, every = forward_of(model), max(1, steps // 12)
    before = evaluate(model, held_out, held_out_ref_logps)
    order = iter(torch.randperm(len(data)).split(GROUPS_PER_STEP))
    losses: list[float] = []
    tokens, start = 0, time.perf_counter()
    for step in range(1, steps + 1):
        with Timer(report, "training"):
            chosen = next(order, None)
            if chosen is None:
                order = iter(torch.randperm(len(data)).split(GROUPS_PER_STEP))
                chosen = next(order)
            batch, rows = data.take(chosen)
            batches, groups = micro_batches(batch, MICRO_BATCH), groups_of(batch.positive)
            losses.append(float(group_backward(batches, forward, groups, OBJECTIVE, ref_logps[rows]).loss))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        tokens += batch.input_ids.numel()
        if step == 1:
            speed = tokens / report.seconds["training"]
            report.curve.append({"step": 0, "loss": losses[0], **before, "tokens_per_second": speed})
            show(row(report.curve[-1]))
        if step % every == 0 or step == steps:
            with Timer(report, "evaluation"):
                measured = evaluate(model, held_out, held_out_ref_logps)
            speed = tokens / report.seconds["training"]
            loss = sum(losses) / len(losses)
            report.curve.append({"step": step, "loss": loss, **measured, "tokens_per_second": speed})
            show(row(report.curve[-1]))
            losses = []
        elapsed = time.perf_counter() - start
        show(f"  step {step} of {steps}, {elapsed:.0f} s, about {elapsed / step * (steps - step):.0f} s to go", end="")
    return held_out_ref_logps


# ---------------------------------------------------------------------------------------------------------- the results

def draw(report: Report, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    blue, vermilion, grey = "#0072B2", "#D55E00", "#777777"  # told apart with any colour vision
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    plt.rcParams.update({"grid.color": "#E5E5E5", "axes.axisbelow": True, "axes.titlelocation": "left"})
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), constrained_layout=True)
    titles = {"loss": "Loss: mpo + NLL", "accuracy": "Held-out reward accuracy", "margin": "Held-out reward margin"}
    steps = [at["step"] for at in report.curve]
    for axis, (name, title) in zip(axes.flat, titles.items()):
        axis.plot(steps, [at[name] for at in report.curve], color=blue, linewidth=2, marker="o", markersize=4)
        axis.set_title(title)
        axis.set_xlabel("step")
    axes[0, 1].set_ylim(0.45, 1.02)
    for level, what in ((0.5, "chance"), (0.95, "0.95")):
        axes[0, 1].axhline(level, color=grey, linewidth=1, linestyle="--")
        axes[0, 1].annotate(what, (1, level), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                            ha="right", color=grey, fontsize=9)  # fmt: skip
    memory = axes[1, 1]
    for backward, color, marker in (("coupled", vermilion, "s"), ("two_pass", blue, "o")):
        points = [(at["group"], at["peak_bytes"] / 2**20) for at in report.memory if at["backward"] == backward]
        if points:
            memory.plot(*zip(*points), color=color, linewidth=2, marker=marker, markersize=5)
            label = "two passes" if backward == "two_pass" else backward
            memory.annotate(label, points[-1], (-4, 8), textcoords="offset points", ha="right", color=color)
    memory.set_xticks(sorted({at["group"] for at in report.memory}))
    memory.set_ylim(bottom=0)
    memory.set_title("Peak memory of one step (MiB)")
    memory.set_xlabel("G, answers to the prompt")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def finish(model: LlamaForCausalLM, held_out: Data, numbers: list[int], ref_logps: Tensor, report: Report) -> None:
    """The last figures, and a few answers of the model itself."""
    # Answers of each held-out group under the prompt of another: what the answers alone give away.
    prompts = held_out.input_ids.view(len(held_out), GROUP, -1).roll(1, 0)[:, :, :4].reshape(-1, 4)
    swapped_ids = torch.cat([prompts, held_out.input_ids[:, 4:]], 1)
    swapped = Data(swapped_ids, held_out.targets, held_out.positive)
    answers = answers_of(model, numbers)
    right = [is_right(number, answer) for number, answer in zip(numbers, answers)]
    last = report.curve[-1]
    report.final |= {
        "accuracy": last["accuracy"],
        "accuracy_under_other_prompts": evaluate(model, swapped, ref_logps)["accuracy"],
        "own_answers_right": sum(right) / len(right),
    }
    shown = "  ".join(f"{n}={a} {'right' if ok else 'wrong'}" for n, a, ok in list(zip(numbers, answers, right))[:3])
    show(f"\nheld-out reward accuracy {report.curve[0]['accuracy']:.3f} -> {last['accuracy']:.3f};"
         f" under another prompt {report.final['accuracy_under_other_prompts']:.3f} (chance is 0.5)")  # fmt: skip
    show(f"the model's own answers to held-out prompts: {sum(right)} of {len(right)} right, such as {shown}")


def describe(arguments: argparse.Namespace, model: LlamaForCausalLM, data: Data) -> Report:
    hidden = torch.zeros(1, model.config.hidden_size)
    impl = explain(hidden, model.lm_head.weight, torch.zeros(1, dtype=torch.long)).impl
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "groupdpo_kernels": groupdpo_kernels.__version__,
        "impl": impl,
        "machine": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    options = {
        "seed": arguments.seed,
        "steps": arguments.steps,
        "objective": asdict(OBJECTIVE),
        "group": GROUP,
        "groups_per_step": GROUPS_PER_STEP,
        "micro_batch": MICRO_BATCH,
        "learning_rate": LEARNING_RATE,
        "training_groups": len(data),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return Report(environment, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A small Llama learns arithmetic from groups of right and wrong answers."
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the data and the split")
    parser.add_argument("--steps", type=int, default=None, help="optimiser steps (500)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of report.json and curves.png")
    parser.add_argument("--quick", action="store_true", help="few steps and small groups, to see that it runs")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps must be at least 1; got {arguments.steps}")
    arguments.must_learn = arguments.steps is None and not arguments.quick
    arguments.steps = arguments.steps or (12 if arguments.quick else 500)
    return arguments


def main() -> int:
    arguments = parse()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    numbers = rng.sample(NUMBERS, len(NUMBERS))
    held_out_numbers, training_numbers = numbers[:24], numbers[24:]
    training_groups = GROUPS_PER_STEP * min(arguments.steps, 250)
    data = make_data([rng.choice(training_numbers) for _ in range(training_groups)], training_numbers, rng)
    held_out = make_data(held_out_numbers * 6, held_out_numbers, rng)
    model = make_model()
    report = describe(arguments, model, data)
    environment, options = report.environment, report.options
    show(f"{options['parameters']:,} parameters, {len(data):,} groups of {GROUP} answers, {len(held_out)} held out;"
         f" torch {environment['torch']}, {environment['threads']} threads, log-probabilities by {environment['impl']!r}")  # fmt: skip
    show(COLUMNS)
    try:
        with Timer(report, "total"):
            ref_logps = train(model, data, held_out, arguments.steps, report)
            finish(model, held_out, held_out_numbers, ref_logps, report)
            measure_memory([2, 4] if arguments.quick else [2, 4, 8, 16], report)
    except KeyboardInterrupt:
        report.interrupted = True
        show("interrupted; what there is so far is kept")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    draw(report, arguments.out / "curves.png")
    show(
        f"\n{report.seconds.get('total', 0):.0f} s; wrote {arguments.out / 'report.json'} and {arguments.out / 'curves.png'}"
    )
    if report.interrupted:
        return 130
    learned = report.final["accuracy"] > 0.95
    if arguments.must_learn and not learned:
        print("the held-out reward accuracy has not passed 0.95", file=sys.stderr)
    return 1 if arguments.must_learn and not learned else 0


if __name__ == "__main__":
    sys.exit(main())
