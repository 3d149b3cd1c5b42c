"""Draws the picture of a run: loss, reward accuracy and margin against steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import replacing

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"  # Okabe and Ito's, distinct for colour-blind readers
PANELS = {"loss": "Loss", "rewards/accuracies": "Reward accuracy", "rewards/margins": "Reward margin"}


def draw(history: list[dict[str, float]], path: Path, title: str) -> None:
    """Draws `history` as transformers logs it: rows with `step` and metrics, those of evaluation as eval_*."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    look: Any = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    look |= {"grid.color": "#E8E8E8", "axes.axisbelow": True, "axes.titlelocation": "left"}
    with plt.rc_context(look):
        figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), constrained_layout=True)
        for axis, (name, heading) in zip(axes, PANELS.items()):
            steps, values = _curve(history, name)
            smooth = moving_mean(values, max(1, len(values) // 20))
            thin = len(values) >= 40  # single steps are then noise around their mean
            axis.plot(steps, values, color=BLUE, linewidth=1 if thin else 2, alpha=0.3 if thin else 1, label="a step")
            if thin:
                axis.plot(steps, smooth, color=BLUE, linewidth=2, label=f"mean of {len(values) // 20}")
            held_out = _curve(history, f"eval_{name}")
            if held_out[0]:
                axis.plot(
                    *held_out, color=ORANGE, marker="o", linewidth=2, markersize=5, label="held out", clip_on=False
                )
            axis.set(title=heading, xlabel="step", xlim=(0, max([*steps, *held_out[0], 1])))
            if name == "rewards/accuracies":
                axis.set_ylim(-0.03, 1.03)
                axis.axhline(0.5, color=GREY, linewidth=1, linestyle="--")
                place = {"transform": axis.get_yaxis_transform(), "ha": "right", "va": "top", "fontsize": 9}
                axis.text(0.99, 0.49, "chance", color=GREY, **place)
        if thin or held_out[0]:
            axes[0].legend(frameon=False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=GREY)
        with replacing(path) as file:
            figure.savefig(file, dpi=110, format="png")
        plt.close(figure)


def _curve(history: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    rows = [row for row in history if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def moving_mean(values: list[float], width: int) -> list[float]:
    """At each place, the mean of the last `width` values, or of as many as there are."""
    ends = range(1, len(values) + 1)
    return [sum(values[max(0, end - width) : end]) / min(width, end) for end in ends]
