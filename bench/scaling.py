"""Cost and memory of forward + backward against the number of tokens and against the vocabulary: both should grow in
proportion in time, and not at all in memory.

    python bench/scaling.py --out docs/scaling.png     four minutes on two cores; also prints the figures

Every point is the median of interleaved rounds on a trained head; memory is that of bench/memory.py, in a fresh
process. CPU only. Eager PyTorch stands beside it: it holds the logits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import memory
from bench.measure import Differentiated, clock, draw
from bench.peers import maker
from groupdpo_kernels.testing import Case

BASE = Case("scaling", 512, 512, 32000, "a head that a CPU can afford")
TOKENS = (256, 512, 1024, 2048, 4096)
VOCABULARIES = (8000, 16000, 32000, 64000, 128256)
NAMES = ("ours/cpu", "eager")
COLORS = {"ours/cpu": "#0072B2", "eager": "#D55E00"}  # told apart by a colour-blind reader
MARKERS = {"ours/cpu": "o", "eager": "s"}


def measure(case: Case, rounds: int) -> dict[str, tuple[float, float]]:
    """name -> (milliseconds, MiB beyond the gradients)."""
    device = torch.device("cpu")
    inputs = draw(case, device)
    steps = {name: Differentiated(maker(name)(case, device), inputs, "trained") for name in NAMES}
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for i in range(rounds + 1):
        for name, step in steps.items():
            seconds = clock(step, device).both
            if i:  # the first is a warm-up
                times[name].append(1e3 * seconds)
    extra = {name: memory.on_cpu(case, name, "trained")["extra_mib"] for name in NAMES}
    return {name: (statistics.median(times[name]), extra[name]) for name in NAMES}


def draw_picture(sweeps: dict[str, dict[int, dict[str, tuple[float, float]]]], title: str, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), sharex="col", layout="constrained")
    for column, (label, points) in enumerate(sweeps.items()):
        for row, what in enumerate(("forward + backward, ms", "memory beyond gradients, MiB")):
            axis = axes[row][column]
            for name in NAMES:
                values = [points[x][name][row] for x in points]
                axis.plot(list(points), values, marker=MARKERS[name], color=COLORS[name], label=name)
            if row == 0:  # through the last point of ours
                last = max(points)
                line = [points[last][NAMES[0]][0] * x / last for x in points]
                axis.plot(list(points), line, color="#888888", linestyle=":", label="in proportion")
            axis.set(xscale="log", yscale="log", xlabel=label if row else None, ylabel=None if column else what)
            axis.set_xticks(list(points), [f"{x:,}" for x in points])
            axis.minorticks_off()
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.grid(alpha=0.3)
    axes[0][0].legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory against tokens and vocabulary.")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two small points a sweep, one round")
    parser.add_argument("--out", type=Path, help="write the picture here")
    options = parser.parse_args()
    base = replace(BASE, dtype=getattr(torch, options.dtype))
    tokens: tuple[int, ...] = TOKENS
    vocabularies: tuple[int, ...] = VOCABULARIES
    rounds = options.rounds
    if options.quick:
        base, tokens, vocabularies, rounds = replace(base, T=32, D=64, V=500), (32, 64), (500, 1000), 1
    sweeps: dict[str, dict[int, dict[str, tuple[float, float]]]] = {}
    cases = {
        "tokens": (f"tokens T (V = {base.V:,})", {T: replace(base, T=T) for T in tokens}),
        "vocabulary": (f"vocabulary V (T = {base.T:,})", {V: replace(base, V=V) for V in vocabularies}),
    }
    for label, (name_of_axis, of_size) in cases.items():
        sweeps[name_of_axis] = points = {}
        for size, case in of_size.items():
            points[size] = measure(case, rounds)
            figures = "; ".join(f"{name} {ms:.1f} ms, {mib:.0f} MiB" for name, (ms, mib) in points[size].items())
            print(f"{label} {size}: {figures}", flush=True)
    if options.out:
        draw_picture(
            sweeps, f"A trained head, D = {base.D}, {options.dtype}, {torch.get_num_threads()} threads", options.out
        )


if __name__ == "__main__":
    main()
