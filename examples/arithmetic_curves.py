"""The picture of group_arithmetic.py: methods side by side, told apart by colour, marker and a label at the line.

smollm2/online_arithmetic.py draws one of its panels for arms of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Okabe and Ito's colours, told apart with any colour vision.
STYLES: dict[str, dict[str, Any]] = {
    "MPO + NLL": {"color": "#0072B2", "marker": "o", "zorder": 4},
    "DPO": {"color": "#D55E00", "marker": "s"},
    "AdaDPO": {"color": "#009E73", "marker": "^"},
    "sDPO": {"color": "#B5609A", "marker": "D"},
    "coupled": {"color": "#D55E00", "marker": "s"},
    "two passes": {"color": "#0072B2", "marker": "o"},
    "online GroupDPO": {"color": "#0072B2", "marker": "o", "zorder": 4},
    "online DPO": {"color": "#D55E00", "marker": "s"},
    "offline GroupDPO": {"color": "#009E73", "marker": "^"},
}
GREY = "#666666"
Curve = tuple[list[float], list[float]]


def draw(
    runs: list[Any],  # of arithmetic_training.Run
    memory: list[dict[str, Any]],
    steps: int,  # of a run
    path: Path,
) -> None:
    figure = new_figure(12, 7.6)
    grid = figure.add_gridspec(2, 6, height_ratios=(1.25, 1))
    accuracy, logp = figure.add_subplot(grid[0, :4]), figure.add_subplot(grid[0, 4:])
    margin, loss, peak = (figure.add_subplot(grid[1, i : i + 2]) for i in (0, 2, 4))

    panel(
        accuracy,
        "Held-out reward accuracy, from one shared start",
        {run.name: curve(run, "accuracy") for run in runs},
        ylim=(0.47, 1.02),
    )
    note_level(accuracy, 0.5, "chance")
    note_level(accuracy, 0.95, "0.95")
    panel(logp, "Log p of right answers, a token", {run.name: curve(run, "right_logp") for run in runs})
    panel(margin, "Held-out reward margin", {run.name: curve(run, "margin") for run in runs})
    panel(loss, "Loss, MPO + NLL", {run.name: curve(run, "loss") for run in runs[:1]}, labels=False)
    for run in runs:
        for stage in range(1, run.stages):
            note_stage(accuracy, run, steps * stage // run.stages, stage)
    names = {"coupled": "coupled", "two_pass": "two passes"}
    peaks = {
        name: ([at["group"] for at in points], [at["peak_bytes"] / 2**20 for at in points])
        for backward, name in names.items()
        if (points := [at for at in memory if at["backward"] == backward])
    }
    top = 1.05 * max([1.0, *(y for _, ys in peaks.values() for y in ys)])
    panel(peak, "Peak memory of one step (MiB)", peaks, ylim=(0, top), xlabel="G, answers to the prompt")
    peak.set_xticks(sorted({at["group"] for at in memory}))
    figure.savefig(path, dpi=110)


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    matplotlib.rcParams.update({"axes.grid": True, "grid.color": "#E8E8E8", "axes.axisbelow": True})
    matplotlib.rcParams.update({"axes.titlelocation": "left"})
    return Figure(figsize=(width, height), layout="constrained")


def curve(run: Any, name: str) -> Curve:
    points = [at for at in run.curve if name in at]
    return [at["step"] for at in points], [at[name] for at in points]


def panel(
    axis: Any,
    title: str,
    curves: dict[str, Curve],
    ylim: tuple[float, float] | None = None,
    xlabel: str = "step",
    labels: bool = True,
) -> None:
    curves = {name: points for name, points in curves.items() if points[0]}
    for name, (x, y) in curves.items():
        axis.plot(x, y, linewidth=2, markersize=5, clip_on=False, **STYLES[name])
    last = max((x[-1] for x, _ in curves.values()), default=0)
    axis.set(title=title, xlabel=xlabel, xlim=(0, last or 1), ylim=ylim)
    if labels:
        label_ends(axis, {name: (x[-1], y[-1]) for name, (x, y) in curves.items()})


def note_level(axis: Any, level: float, what: str) -> None:
    axis.axhline(level, color=GREY, linewidth=1, linestyle="--")
    below = {"xytext": (0, -2), "textcoords": "offset points", "ha": "right", "va": "top", "fontsize": 9}
    axis.annotate(what, (0.99, level), xycoords=axis.get_yaxis_transform(), color=GREY, **below)


def note_stage(axis: Any, run: Any, step: int, stage: int) -> None:
    """Where a method takes what it has as its new reference."""
    color = STYLES[run.name]["color"]
    axis.axvline(step, color=color, linewidth=1, linestyle=":")
    text = f"{run.name}: stage {stage + 1} begins"
    axis.annotate(text, (step, 0.6), (5, 0), textcoords="offset points", color=color, fontsize=9)


def label_ends(axis: Any, ends: dict[str, tuple[float, float]]) -> None:
    """Names beside the last points, in their order, moved apart where they would touch."""
    bottom, top = axis.get_ylim()
    if not ends:
        return
    by_height = sorted(ends.items(), key=lambda end: end[1][1])
    heights = [(y - bottom) / (top - bottom) for _, (_, y) in by_height]
    gap = 1.25 * 11 / (axis.get_position().height * axis.figure.get_figheight() * 72)  # a line of text
    places = list(heights)
    for _ in range(100):
        for i in range(1, len(places)):
            overlap = gap - (places[i] - places[i - 1])
            if overlap > 0:
                places[i - 1 : i + 1] = [places[i - 1] - overlap / 2, places[i] + overlap / 2]
    places = [place - max(0.0, places[-1] - 1) for place in places]  # not into the title
    for (name, (x, y)), place in zip(by_height, places):
        color = STYLES[name]["color"]
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 4}
        axis.annotate(
            name, (x, y), (1.04, place), textcoords="axes fraction", va="center", color=color, arrowprops=line
        )
