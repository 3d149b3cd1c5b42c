"""A small Llama learns arithmetic from groups of right and wrong answers, on a CPU, by this package's own path.

The task. A prompt is a number, `579=`, and a sum that makes it is a right answer: `123+456`. (The given answers add up
without carrying, which a model of this size learns in a minute.) Each prompt comes with a group of 8 answers, 2 to 6 of
them right. A wrong answer is a right answer of another prompt: nothing in an answer gives it away, only the prompt
tells the two apart. Held-out numbers never occur in training, neither as a prompt nor as the sum of a wrong answer;
their own wrong answers are right answers of other held-out numbers.

Training starts from random weights, and these are the reference too: its log-probabilities are computed once, before
the first step. There is no supervised phase, because the NLL term of the objective does its work. So all rewards are 0
at first, ties count half, and the held-out reward accuracy starts at exactly one half.

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
import contextlib
import copy
import itertools
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import group_memory  # type: ignore[import-not-found]  # beside this file
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import groupdpo_kernels
from groupdpo_kernels import Objective, PreferenceGroups, explain, group_backward, model_logps, seq_logps

OBJECTIVE = Objective("mpo", beta=5.0, average=True, nll_weight=1.0)
STEPS = 400
GROUP = 8  # answers to a prompt
GROUPS_PER_STEP = 16
MICRO_BATCH = 64  # answers
LEARNING_RATE = 4e-3
SETTINGS = {
    "objective": asdict(OBJECTIVE),
    "group": GROUP,
    "groups_per_step": GROUPS_PER_STEP,
    "micro_batch": MICRO_BATCH,
    "learning_rate": LEARNING_RATE,
}
ALPHABET = "0123456789+="
NUMBERS = [100 * h + 10 * t + o for h in range(3, 10) for t in range(3, 10) for o in range(3, 10)]
HELD_OUT = 48  # of the numbers

Batch = tuple[Tensor, Tensor]  # input_ids (s, L), targets (s, L)


# ------------------------------------------------------------------------------------------------------------- the task


@dataclass(frozen=True)
class Data:
    """Groups of GROUP rows, all of one length: a number of three digits, "=", and an answer of seven characters."""

    input_ids: Tensor  # (S, L)
    targets: Tensor  # (S, L) the token that each position predicts; -100 in the prompt
    positive: Tensor  # (S,) bool

    def __len__(self) -> int:
        return len(self.input_ids) // GROUP

    @property
    def groups(self) -> PreferenceGroups:
        return PreferenceGroups(torch.arange(0, len(self.positive) + 1, GROUP), self.positive)

    def take(self, groups: Tensor) -> tuple[Data, Tensor]:
        """The groups of these indices, and the indices of their rows."""
        rows = (groups[:, None] * GROUP + torch.arange(GROUP)).flatten()
        return Data(self.input_ids[rows], self.targets[rows], self.positive[rows]), rows


def right_answer(number: int, rng: random.Random) -> str:
    """Two numbers of three digits, zeros in front, that make `number` without carrying."""
    first = int("".join(str(rng.randint(0, int(digit))) for digit in str(number)))
    return f"{first:03d}+{number - first:03d}"


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
            texts.append(f"{number}={answer}")
        positive += labels
    ids = encode(texts)
    targets = ids[:, 1:].clone()
    targets[:, :3] = -100
    return Data(ids[:, :-1], targets, torch.tensor(positive))


def encode(texts: list[str]) -> Tensor:  # (S, L)
    return torch.tensor([[ALPHABET.index(character) for character in text] for text in texts])


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


def forward_of(model: torch.nn.Module) -> Callable[[Batch], Batch]:
    """What group_backward calls: a micro-batch -> (token_logps (t,), cu_seqlens (s+1,))."""

    def forward(micro_batch: Batch) -> tuple[Tensor, Tensor]:
        input_ids, targets = micro_batch
        live = targets != -100
        lengths = live.sum(1)
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return model_logps(model, input_ids, targets)[live], cu_seqlens

    return forward


def micro_batches(data: Data, size: int) -> list[Batch]:
    return list(zip(data.input_ids.split(size), data.targets.split(size)))


@torch.no_grad()
def sums_of(model: torch.nn.Module, data: Data) -> Tensor:  # (S,)
    """Log-probabilities of the answers, no graph."""
    forward = forward_of(model)
    return torch.cat([seq_logps(*forward(batch)) for batch in micro_batches(data, 512)])


def evaluate(model: torch.nn.Module, data: Data, ref_logps: Tensor) -> dict[str, float]:
    """Reward accuracy and margin over all pairs of a right and a wrong answer to the same prompt."""
    rewards = OBJECTIVE.beta * (sums_of(model, data) - ref_logps) / (data.targets != -100).sum(1)
    right, wrong = data.groups.pair_indices(every=True)
    gaps = rewards[right] - rewards[wrong]
    wins = (gaps > 0).double() + 0.5 * (gaps == 0).double()
    return {"accuracy": float(wins.mean()), "margin": float(gaps.mean())}


@torch.no_grad()
def answers_of(model: LlamaForCausalLM, numbers: list[int]) -> list[str]:
    """Greedy decoding, seven characters."""
    ids = encode([f"{number}=" for number in numbers])
    for _ in range(7):
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
    final: dict[str, Any] = field(default_factory=dict)
    memory: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False

    @contextlib.contextmanager
    def timing(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def show(line: str, stays: bool = True) -> None:
    """Prints a line; one that does not stay is replaced by the next, and only appears on a terminal."""
    if sys.stdout.isatty():
        print(f"\r\033[K{line}", end="\n" if stays else "", flush=True)
    elif stays:
        print(line, flush=True)


def train(model: LlamaForCausalLM, data: Data, held_out: Data, steps: int, report: Report) -> None:
    """Trains the model in place, its present state the reference."""
    with report.timing("reference"):
        ref_logps, held_out_ref_logps = sums_of(model, data), sums_of(model, held_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (0.525 + 0.475 * math.cos(math.pi * step / steps))
    )
    forward, every, tokens = forward_of(model), max(1, steps // 12), 0
    losses: list[float] = []
    epochs = (torch.randperm(len(data)).split(GROUPS_PER_STEP) for _ in itertools.count())
    start = time.perf_counter()
    show(f"{'step':>6}{'loss':>9}{'held-out accuracy':>20}{'margin':>9}{'tokens/s':>11}")
    for step, chosen in enumerate(itertools.islice(itertools.chain.from_iterable(epochs), steps + 1)):
        if step % every == 0 or step == steps:
            with report.timing("evaluation"):
                measured = evaluate(model, held_out, held_out_ref_logps)
            loss = sum(losses) / len(losses) if losses else math.nan
            speed = tokens / report.seconds["training"] if losses else math.nan
            at = {"step": step, "loss": loss, **measured, "tokens_per_second": speed}
            report.curve.append({name: value for name, value in at.items() if not math.isnan(value)})
            show(f"{step:6d}{loss:9.3f}{at['accuracy']:20.3f}{at['margin']:9.2f}{speed:11,.0f}".replace("nan", "  -"))
            losses = []
        if step == steps:
            break
        with report.timing("training"):
            batch, rows = data.take(chosen)
            batches = micro_batches(batch, MICRO_BATCH)
            losses.append(float(group_backward(batches, forward, batch.groups, OBJECTIVE, ref_logps[rows]).loss))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        tokens += batch.input_ids.numel()
        elapsed = time.perf_counter() - start
        left = elapsed / (step + 1) * (steps - step - 1)
        show(f"  step {step + 1} of {steps}, loss {losses[-1]:.2f}, {elapsed:.0f} s, {left:.0f} s to go", stays=False)


# ---------------------------------------------------------------------------------------------------------- the results


def conclude(
    model: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    held_out: Data,
    numbers: list[int],
    others: list[int],
    report: Report,
) -> None:
    """What the curves do not say: chance under prompts from elsewhere, and the model's own answers."""
    swapped, _ = held_out.take(torch.arange(len(others)) % len(held_out))
    prompts = encode([f"{other}=" for other in others]).repeat_interleave(GROUP, 0)
    swapped = replace(swapped, input_ids=torch.cat([prompts, swapped.input_ids[:, 4:]], 1))
    control = evaluate(model, swapped, sums_of(reference, swapped))["accuracy"]
    answers = answers_of(model, numbers)
    right = [is_right(number, answer) for number, answer in zip(numbers, answers)]
    first, last = report.curve[0]["accuracy"], report.curve[-1]["accuracy"]
    share = sum(right) / len(right)
    report.final = {"accuracy": last, "accuracy_under_other_prompts": control, "own_answers_right": share}
    show(f"\nheld-out reward accuracy {first:.3f} -> {last:.3f}; under other prompts {control:.3f} (chance is 0.5)")
    some = [f"{n}={a} {'right' if ok else 'wrong'}" for n, a, ok in zip(numbers, answers, right)][:3]
    show(f"own answers to held-out prompts: {sum(right)} of {len(right)} right, such as {', '.join(some)}")


def measure_memory(points: list[group_memory.Point], report: Report) -> None:
    show(f"\npeak memory of one step beyond model and gradients, MiB; {points[0].tokens} tokens an answer")
    show(f"{'G':>6}{'coupled':>12}{'two passes':>12}")
    with report.timing("memory"):
        for point, peak in group_memory.measure(points):
            report.memory.append({**asdict(point), "peak_bytes": peak})
            if point.backward == "two_pass":
                coupled, two_pass = (at["peak_bytes"] / 2**20 for at in report.memory[-2:])
                show(f"{point.group:6d}{coupled:12.1f}{two_pass:12.1f}")


def draw(report: Report, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    blue, vermilion, grey = "#0072B2", "#D55E00", "#666666"  # told apart with any colour vision
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    plt.rcParams.update({"grid.color": "#E5E5E5", "axes.axisbelow": True, "axes.titlelocation": "left"})
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), constrained_layout=True)
    titles = {"loss": "Loss (mpo + NLL)", "accuracy": "Held-out reward accuracy", "margin": "Held-out reward margin"}
    for axis, (name, title) in zip(axes.flat, titles.items()):
        curve = [(at["step"], at[name]) for at in report.curve if name in at] or [(0, math.nan)]
        axis.plot(*zip(*curve), color=blue, linewidth=2, marker="o", markersize=4)
        axis.set(title=title, xlabel="step", xlim=(0, None))
    axes[0, 1].set_ylim(0.45, 1.02)
    for level, what in ((0.5, "chance"), (0.95, "0.95")):
        axes[0, 1].axhline(level, color=grey, linewidth=1, linestyle="--")
        place = axes[0, 1].get_yaxis_transform()
        axes[0, 1].text(0.99, level - 0.01, what, transform=place, ha="right", va="top", color=grey, fontsize=9)
    memory = axes[1, 1]
    for backward, color, marker in (("coupled", vermilion, "s"), ("two_pass", blue, "o")):
        points = [(at["group"], at["peak_bytes"] / 2**20) for at in report.memory if at["backward"] == backward]
        if points:
            memory.plot(*zip(*points), color=color, linewidth=2, marker=marker, markersize=5)
            memory.annotate(
                backward.replace("_", " "), points[-1], (-6, 8), textcoords="offset points", ha="right", color=color
            )
    memory.set(title="Peak memory of one step (MiB)", xlabel="G, answers to the prompt", ylim=(0, None))
    memory.set_xticks(sorted({at["group"] for at in report.memory}))
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
    parser = argparse.ArgumentParser(description="A small Llama learns arithmetic from groups of answers")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the data and the split")
    parser.add_argument("--steps", type=int, default=None, help=f"of the optimiser ({STEPS})")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of report.json and curves.png")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it runs")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps must be at least 1; got {arguments.steps}")
    return arguments


def main() -> int:
    arguments = parse()
    steps = arguments.steps or (6 if arguments.quick else STEPS)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # the matrices are so small that a second thread mostly waits, above all on a busy machine
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    numbers = rng.sample(NUMBERS, len(NUMBERS))
    held_out_numbers, training_numbers = numbers[:HELD_OUT], numbers[HELD_OUT:]
    prompts = rng.choices(training_numbers, k=GROUPS_PER_STEP * min(steps, 250))
    data = make_data(prompts, training_numbers, rng)
    held_out = make_data(held_out_numbers * (1 if arguments.quick else 2), held_out_numbers, rng)
    model = make_model()
    reference = copy.deepcopy(model)
    options = {"seed": arguments.seed, "steps": steps, "training_groups": len(data), "held_out_groups": len(held_out)}
    report = Report(environment(model), options | SETTINGS)
    count, impl = sum(p.numel() for p in model.parameters()), report.environment["impl"]
    show(f"{count:,} parameters; {len(data):,} groups of {GROUP} answers, {len(held_out)} held out; impl={impl!r}\n")
    points = group_memory.points_of([2, 4] if arguments.quick else [2, 4, 8, 16])
    try:
        with report.timing("total"):
            train(model, data, held_out, steps, report)
            elsewhere = rng.choices(training_numbers, k=6 * len(held_out))
            conclude(model, reference, held_out, held_out_numbers, elsewhere, report)
            measure_memory([replace(p, layers=1) for p in points] if arguments.quick else points, report)
    except KeyboardInterrupt:
        report.interrupted = True
        show("interrupted; what there is so far is kept")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    draw(report, arguments.out / "curves.png")
    show(f"\n{report.seconds['total']:.0f} s; report.json and curves.png are in {arguments.out}")
    if report.interrupted:
        return 130
    if arguments.quick or arguments.steps or report.final["accuracy"] > 0.95:
        return 0
    print("the held-out reward accuracy has not passed 0.95", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
