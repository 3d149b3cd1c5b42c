"""Pictures of a shared prompt for the documentation: which tokens a model sees, and what bench/shared_prompt.py found.

    python bench/shared_prompt_pictures.py bench/results/CPU/shared_prompt.json --out docs

writes shared_prompt_tokens.png, which needs no results, and shared_prompt.png. Never measures. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

from groupdpo_kernels.memory.plots import THEMES

RESPONSE = "#E69F00"  # Okabe and Ito's, as in groupdpo_kernels/memory/plots.py
DRAWN = 4  # responses
PROMPT, LENGTH = 10, 4  # tokens drawn of a prompt and of a response


def figure_of(theme: str, width: float, height: float, ratios: tuple[int, ...] = (1,)) -> tuple[Any, Any, Any]:
    """The figure, its axes from above with these ratios of their heights, and the colours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = THEMES[theme]
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    look: Any = dict.fromkeys(names, colors["ink"]) | {"font.size": 10}
    look |= dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), colors["paper"])
    with matplotlib.rc_context(look):
        figure, axes = pyplot.subplots(
            len(ratios), 1, figsize=(width, height), layout="constrained", squeeze=False, height_ratios=ratios
        )
    return figure, axes[:, 0], colors


def save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


# -------------------------------------------------------------------------------------------------------------- tokens


def draw_tokens(path: Path, theme: str = "light") -> Path:
    """The tokens that a model sees for one group: a prompt in each row, and a prompt that runs once."""
    from matplotlib.patches import Patch

    figure, (apart, shared), colors = figure_of(theme, 8.6, 5.2, (DRAWN, DRAWN + 1))
    dashed = {"facecolor": "none", "edgecolor": colors["faint"], "linestyle": (0, (3, 2)), "linewidth": 1.2}

    def cells(axis: Any, row: int, start: int, count: int, color: str) -> None:
        for i in range(start, start + count):
            axis.barh(row, 0.92, left=i + 0.04, height=0.74, color=color, edgecolor="none")

    def text(axis: Any, x: float, y: float, words: str, **style: Any) -> None:
        axis.text(x, y, words, color=colors["ink"], va="center", **style)

    for row in range(DRAWN):
        cells(apart, row, 0, PROMPT, colors["blue"])
        cells(apart, row, PROMPT, LENGTH, RESPONSE)
    apart.set_title("Each response brings its prompt: G (P + n) tokens", loc="left", fontsize=11)
    text(apart, PROMPT + LENGTH + 0.4, (DRAWN - 1) / 2, "P = 1024, n = 128, G = 16:\n18,432 tokens")

    # The first row is the prompt without its last token, which begins the row of each response. The last token of a
    # response is predicted, and read by nobody.
    cells(shared, 0, 0, PROMPT - 1, colors["blue"])
    for row in range(1, DRAWN + 1):
        shared.barh(row, PROMPT - 1.08, left=0.04, height=0.74, **dashed)
        cells(shared, row, PROMPT - 1, 1, colors["blue"])
        cells(shared, row, PROMPT, LENGTH - 1, RESPONSE)
        shared.barh(row, 0.92, left=PROMPT + LENGTH - 0.96, height=0.74, **dashed)
    shared.set_title("The prompt runs once: P + G n tokens", loc="left", fontsize=11)
    middle, paper = (PROMPT - 1) / 2, {"facecolor": colors["paper"], "edgecolor": "none", "pad": 4}
    arrow = {"arrowstyle": "-|>", "color": colors["ink"], "linewidth": 1.2}
    shared.annotate("", (middle, 2.05), (middle, 0.4), arrowprops=arrow)
    text(shared, middle, (DRAWN + 1) / 2, "its keys and values,\nread by every row", ha="center", bbox=paper)
    text(shared, PROMPT + LENGTH + 0.4, (DRAWN + 1) / 2, "3,072 tokens:\n0.17 of them")
    for axis, count in ((apart, DRAWN), (shared, DRAWN + 1)):
        axis.set(xlim=(-0.2, PROMPT + LENGTH + 5.6), ylim=(count - 0.4, -0.6))
        axis.set_axis_off()
    known = {"prompt": {"color": colors["blue"]}, "response": {"color": RESPONSE}, "not computed": dashed}
    handles = [Patch(label=name, **style) for name, style in known.items()]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, labelcolor=colors["ink"])
    return save(figure, path)


# ------------------------------------------------------------------------------------------------------------- measured


def name_of(row: dict[str, Any]) -> str:
    shape = f"P = {row['P']}, n = {row['n']}, G = {row['G']}"
    of_what = {
        "step": f"a step of {row['model']}",
        "scoring": f"scoring, {row['model']}",
        "trl": f"a step, against TRL's on {row['G'] - 1} pairs",
    }
    return f"{of_what[row['kind']]}\n{shape}"


def draw_ratios(content: dict[str, Any], path: Path, theme: str = "light") -> Path:
    """A bar for each row of bench/shared_prompt.py: shared over unshared, with the ratio of tokens and the target."""
    rows = [row for row in content["rows"] if row["status"] == "ok" and row["kind"] != "memory"]
    figure, (axis,), colors = figure_of(theme, 8.6, 1.2 + 0.55 * len(rows))
    for y, row in enumerate(rows):
        ratio = row["ratio"]["median"]
        bar = axis.barh(y, ratio, height=0.5, color=colors["blue"], label="time, shared over unshared")
        tokens = axis.plot(row["tokens"], y, "D", color=RESPONSE, markersize=7, label="tokens, shared over unshared")[0]
        if row["target"] is not None:
            ends = {"ymin": y - 0.36, "ymax": y + 0.36, "color": colors["ink"], "linewidth": 2}
            target = axis.vlines(row["target"], **ends, label="target, at most")
        right = max(ratio, row["tokens"], row["target"] or 0)
        text = f"{ratio:.3f}" + ("" if row["shared"] else " (not shared)")
        style = {"textcoords": "offset points", "va": "center", "fontsize": 9, "color": colors["ink"]}
        axis.annotate(text, (right, y), (9, 0), **style)
    handles = [bar, tokens, *([target] if any(row["target"] is not None for row in rows) else [])]
    axis.set_yticks(range(len(rows)), [name_of(row) for row in rows], fontsize=9)
    axis.set(xlim=(0, 1.4), ylim=(len(rows) - 0.4, -0.6), xlabel="1 is the same group with the prompt in every row")
    axis.axvline(1, color=colors["faint"], linewidth=1, zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, labelcolor=colors["ink"])
    return save(figure, path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Pictures of a shared prompt.")
    add = parser.add_argument
    add("results", type=Path, nargs="?", help="of bench/shared_prompt.py; without it the picture of tokens alone")
    add("--out", type=Path, default=Path("docs"), help="a folder; default: %(default)s")
    add("--theme", choices=list(THEMES), default="light")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    print(draw_tokens(options.out / "shared_prompt_tokens.png", options.theme))
    if options.results is not None:
        print(draw_ratios(json.loads(options.results.read_text()), options.out / "shared_prompt.png", options.theme))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
