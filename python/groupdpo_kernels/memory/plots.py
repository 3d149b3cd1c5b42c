"""Draws measured and predicted steps, and the benchmark, with matplotlib: each picture in a light and a dark theme.

Strategies differ in colour (Okabe and Ito's, made for colour-blind readers), marker and line; a step that ran out of
memory is a cross above the last point of its line. The module never shows a window. It needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import replacing

Row = dict[str, Any]
THEMES = {
    "light": {"paper": "#ffffff", "ink": "#222222", "faint": "#cccccc", "blue": "#0072B2"},
    "dark": {"paper": "#14171a", "ink": "#dddddd", "faint": "#444a50", "blue": "#56B4E9"},
}
_STYLES = {  # strategy -> colour, marker, line, name
    "coupled_logits": ("#D55E00", "s", "-", "coupled, on logits"),
    "coupled": ("#E69F00", "^", "--", "coupled, no logits"),
    "two_pass": ("blue", "o", "-", "two passes"),
    "one_pass": ("#009E73", "D", "-.", "one pass"),
    "pairs": ("#CC79A7", "v", ":", "pairs"),
}
_PARTS = {  # category -> colour, hatch
    "parameters": ("#999999", ""),
    "gradients": ("#E69F00", "//"),
    "optimizer": ("#F0E442", ".."),
    "activations": ("blue", ""),
    "head workspace": ("#009E73", "xx"),
    "logits": ("#D55E00", "\\\\"),
    "not tracked": ("#CC79A7", "--"),
}
_PEERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_PEER_COLORS = ("blue", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#999999", "#F0E442", "#0072B2")


def _figure(theme: str, columns: int, width: float, height: float) -> tuple[Any, Any, dict[str, str]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = THEMES[theme]
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "hatch.color")
    look: Any = dict.fromkeys(names, colors["ink"])
    look |= {"axes.facecolor": colors["paper"], "figure.facecolor": colors["paper"], "font.size": 10}
    look |= {"savefig.facecolor": colors["paper"], "grid.color": colors["faint"], "hatch.linewidth": 0.5}
    with matplotlib.rc_context(look):
        figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.6, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0], colors


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    with replacing(path) as file:
        figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)
    return path


def _sizes(axis: Any, groups: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(groups, [str(g) for g in groups])
    axis.minorticks_off()
    axis.set_xlabel("responses in the group")


def draw_curves(
    settings: dict[str, dict[str, dict[int, float | None]]],
    label: str,
    path: Path,
    theme: str,
    limit: tuple[float, str] | None = None,
) -> Path:
    """One panel for each setting, one line for each strategy: value against group size, None where memory ran out.

    limit: a value, and its name, that are drawn as a horizontal line.
    """
    figure, axes, colors = _figure(theme, len(settings), 1.2 + 3.9 * len(settings), 3.8)
    for axis in axes[1:]:
        axis.sharey(axes[0])
    for axis, (setting, lines) in zip(axes, settings.items()):
        groups = sorted({g for points in lines.values() for g in points})
        for strategy, points in lines.items():
            color, marker, line, name = _STYLES[strategy]
            known = {g: v for g, v in points.items() if v is not None}
            style = {"color": colors.get(color, color), "linestyle": line, "marker": marker, "label": name}
            axis.plot(list(known), list(known.values()), **style, linewidth=1.8, markersize=6)
            missing = [g for g, v in points.items() if v is None]
            if missing:
                at = max(known.values(), default=1.0)
                axis.plot(
                    missing[:1], [at], marker="x", color=colors.get(color, color), markersize=11, markeredgewidth=2.5
                )
                axis.annotate(
                    "out of memory", (missing[0], at), (0, 8), textcoords="offset points", ha="center", fontsize=8
                )
        if limit is not None:
            axis.axhline(limit[0], color=colors["ink"], linewidth=1, linestyle=(0, (1, 2)))
            axis.annotate(limit[1], (groups[0], limit[0]), (0, 3), textcoords="offset points", fontsize=8)
        _sizes(axis, groups)
        axis.set_yscale("log")
        _plain(axis)
        axis.set_title(setting, fontsize=10)
    axes[0].set_ylabel(label)
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= {text: handle for handle, text in zip(*axis.get_legend_handles_labels())}
    figure.legend(
        handles.values(),
        handles,
        loc="outside lower center",
        ncols=len(handles) if len(settings) > 1 else 2,
        frameon=False,
        labelcolor=colors["ink"],
    )
    return _save(figure, path)


def _plain(axis: Any) -> None:
    """Writes numbers on the axis as people do, not as powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def draw_breakdown(bars: dict[str, dict[str, float]], label: str, path: Path, theme: str) -> Path:
    """A stacked bar for each name: category -> value."""
    figure, (axis,), colors = _figure(theme, 1, 8.5, 1.3 + 0.34 * len(bars))
    left = dict.fromkeys(bars, 0.0)
    for category, (color, hatch) in _PARTS.items():
        sizes = [max(0.0, parts.get(category, 0.0)) for parts in bars.values()]
        if not any(sizes):
            continue
        style = {"color": colors.get(color, color), "hatch": hatch, "edgecolor": colors["paper"], "linewidth": 0.6}
        axis.barh(list(bars), sizes, left=list(left.values()), label=category, height=0.72, **style)
        left = {name: left[name] + size for name, size in zip(bars, sizes)}
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(label)
    figure.legend(loc="outside lower center", ncols=7, frameon=False, labelcolor=colors["ink"], fontsize=8)
    return _save(figure, path)


def draw_roofline(content: dict[str, Any], path: Path, theme: str) -> Path:
    """From bench/run.py's JSON, the GFLOP/s of each implementation, counting the arithmetic that its mode needs. Each
    shape and mode has a column, labelled with its FLOP to a byte that must move, and a bar for the limit, the bare
    GEMMs. There is no axis of intensity, because two modes would differ by less than a marker's width."""
    rows = [r for r in content["rows"] if r.get("status") == "ok" and "both_ms" in r]
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    names = [n for n in dict.fromkeys(r["implementation"] for r in rows) if n != "matrix products"]
    columns = list(dict.fromkeys((r["shape"], r["mode"]) for r in rows))
    width = 1.2 + max(3.2, 0.25 * len(columns) * (len(names) + 1)) * max(1, len(dtypes))
    figure, axes, colors = _figure(theme, max(1, len(dtypes)), width, 4.4)
    for axis, dtype in zip(axes, dtypes):
        ticks = dict.fromkeys(range(len(columns)), "")
        for row in (r for r in rows if r["dtype"] == dtype):
            x = columns.index((row["shape"], row["mode"]))
            T, D, V, products = row["T"], row["D"], row["V"], row["products"]
            flop = 2 * T * D * V * products
            # Bytes that must move: hidden and weight are read, and the mode's gradients are written.
            size = 4 if dtype == "float32" else 2
            moved = size * D * (T + V + (T if products >= 2 else 0) + (V if products == 4 else 0))
            ticks[x] = f"{row['shape']}\n{row['mode']}\n{flop / moved:,.0f}"
            y = flop / row["both_ms"]["median"] / 1e6
            if row["implementation"] == "matrix products":
                axis.plot([x - 0.45, x + 0.45], [y, y], color=colors["ink"], linewidth=3, label="matrix products")
                continue
            i = names.index(row["implementation"])
            color = _PEER_COLORS[i % len(_PEER_COLORS)]
            style = {"marker": _PEERS[i % len(_PEERS)], "color": colors.get(color, color), "linestyle": "none"}
            axis.plot([x + 0.8 * ((i + 0.5) / len(names) - 0.5)], [y], **style, markersize=6, label=names[i])
        axis.set(yscale="log", xlabel="shape, mode, FLOP to a byte that must move", title=dtype)
        axis.set_xticks(list(ticks), list(ticks.values()), fontsize=8)
        axis.grid(axis="x", visible=False)
        axis.margins(0.08)
        _plain(axis)
    axes[0].set_ylabel("GFLOP/s of the arithmetic needed")
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= {text: handle for handle, text in zip(*axis.get_legend_handles_labels())}
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, labelcolor=colors["ink"]
    )
    return _save(figure, path)
