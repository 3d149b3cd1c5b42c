"""Writes the figures of a profile or of the benchmark as one self-contained HTML file and as PNG pictures.

    groupdpo-kernels report profile/measured.jsonl --out profile
    groupdpo-kernels report bench/results/cpu/2026-11-21.json --out docs

Pictures have a light and a dark theme; the page shows those of the reader's system, with the tables, the machine, the
versions and the command. The module never measures. It needs matplotlib.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..files import replacing
from .plots import THEMES, draw_breakdown, draw_curves, draw_roofline
from .sweep import read_figures, table
from .workload import STRATEGIES, workload_of

MiB = 2**20
Row = dict[str, Any]
Drawing = Callable[[Path, str], Path]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       background: #ffffff; color: #222222; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-variant-numeric: tabular-nums; }
td, th { border: 1px solid #cccccc; padding: 0.2rem 0.6rem; text-align: left; }
img { max-width: 100%; } code { overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) {
  body { background: #14171a; color: #dddddd; } td, th { border-color: #444a50; } }
"""


def write_report(figures: Path | str, out: Path | str) -> Path:
    """Reads a file of `profile` or bench/run.py, draws into the folder `out`, and returns the path of the HTML file."""
    source, folder = Path(figures), Path(out)
    if not source.is_file():
        raise ValueError(f"figures must be a file of profile or of bench/run.py; got {source}")
    folder.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".json":
        header, drawings, text = _of_bench(source)
        title, page = "Achieved against the limit", folder / "roofline.html"
    else:
        header, rows = read_figures(source)
        drawings, text = _drawings_of(rows), table(rows)
        title, page = "A training step against the size of its group", folder / "report.html"
    parts = [f"<h1>{title}</h1>", _machine(header)]
    for name, (caption, draw) in drawings.items():
        paths = {
            theme: draw(folder / (f"{name}.png" if theme == "light" else f"{name}-dark.png"), theme) for theme in THEMES
        }
        parts += [f"<h2>{html.escape(caption)}</h2>", _picture(paths, caption)]
    parts += ["<h2>All figures</h2>", _tables(text)]
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    with replacing(page) as file:
        whole = f"<!doctype html>\n<html lang=en><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>\n"
        file.write(whole.encode())
    return page


# ------------------------------------------------------------------------------------------------------------ a profile


def curves(rows: Sequence[Row], kind: str) -> dict[str, dict[str, dict[int, float | None]]]:
    """setting -> strategy -> group -> MiB or milliseconds; None where memory ran out. Failures are left out."""
    found: dict[str, dict[str, dict[int, float | None]]] = {}
    for row in rows:
        if row["kind"] != kind or row["status"] == "failed":
            continue
        load, value = workload_of(row["workload"]), None
        if row["status"] == "ok":
            value = row["peak_bytes"] / MiB if kind == "memory" else 1e3 * row["seconds"]["median"]
        found.setdefault(load.setting, {}).setdefault(load.strategy, {})[load.group] = value
    order = {
        setting: {s: dict(sorted(lines[s].items())) for s in STRATEGIES if s in lines}
        for setting, lines in found.items()
    }
    return {
        setting: lines
        for setting, lines in order.items()
        if any(v is not None for p in lines.values() for v in p.values())
    }


def bars(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Breakdowns in MiB of each setting's smallest and largest group, one for each strategy."""
    found: dict[str, dict[str, float]] = {}
    known = [row for row in rows if row["kind"] == "memory" and row["status"] == "ok"]
    for setting in dict.fromkeys(workload_of(row["workload"]).setting for row in known):
        mine = [row for row in known if workload_of(row["workload"]).setting == setting]
        for strategy in STRATEGIES:
            some = sorted(
                (row for row in mine if row["workload"]["strategy"] == strategy), key=lambda r: r["workload"]["group"]
            )
            for row in (some[0], some[-1]) if len(some) > 1 else some:
                name = f"{setting}, {strategy}, G = {row['workload']['group']}"
                found[name] = {category: size / MiB for category, size in row["breakdown"].items()}
    return found


def _drawings_of(rows: Sequence[Row]) -> dict[str, tuple[str, Drawing]]:
    drawings: dict[str, tuple[str, Drawing]] = {}
    memory, time, parts = curves(rows, "memory"), curves(rows, "time"), bars(rows)
    if memory:
        drawings["memory"] = (
            "Peak memory against the size of the group",
            lambda path, theme: draw_curves(memory, "peak memory of a step, MiB", path, theme),
        )
    if time:
        drawings["time"] = (
            "Time of a step against the size of the group",
            lambda path, theme: draw_curves(time, "time of a step, ms", path, theme),
        )
    if parts:
        drawings["breakdown"] = (
            "What the memory is, at the peak",
            lambda path, theme: draw_breakdown(parts, "MiB at the peak", path, theme),
        )
    return drawings


# -------------------------------------------------------------------------------------------------------- the benchmark


def _of_bench(source: Path) -> tuple[dict[str, Any], dict[str, tuple[str, Drawing]], str]:
    content = json.loads(source.read_text())
    if "rows" not in content or "versions" not in content:
        raise ValueError(f"figures must be what bench/run.py writes; {source} has {sorted(content)}")
    lines = ["| shape | dtype | mode | implementation | ms | ratio to bare GEMMs |", "|---|---|---|---|---|---|"]
    for row in content["rows"]:
        ok = row.get("status") == "ok" and "both_ms" in row
        cells = [f"{row['both_ms']['median']:.4g}", f"{row['ratio']['median']:.2f}"] if ok else [row["status"], ""]
        lines.append(
            "| " + " | ".join([*(str(row[k]) for k in ("shape", "dtype", "mode", "implementation")), *cells]) + " |"
        )
    caption = "GFLOP/s achieved, and those of the bare GEMMs as the limit"
    return content, {"roofline": (caption, lambda path, theme: draw_roofline(content, path, theme))}, "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- the page


def _machine(header: dict[str, Any]) -> str:
    known = ", ".join(f"{name} {version}" for name, version in header["versions"].items() if version)
    lines = {
        "machine": header["device"],
        "versions": known,
        "command": header.get("command", ""),
        "date": header["date"],
    }
    return (
        "<p>" + "<br>".join(f"{name}: <code>{html.escape(str(text))}</code>" for name, text in lines.items()) + "</p>"
    )


def _picture(paths: dict[str, Path], caption: str) -> str:
    data = {
        theme: "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode() for theme, path in paths.items()
    }
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{data["dark"]}">'
    return f'<picture>{dark}<img alt="{html.escape(caption)}" src="{data["light"]}"></picture>'


def _tables(text: str) -> str:
    """Turns Markdown tables, and bold lines above them, into HTML."""
    out, inside = [], False
    for line in text.splitlines():
        if not line.startswith("|"):
            out += ["</table>"] if inside else []
            inside = False
            out += [f"<h3>{html.escape(line.strip('* '))}</h3>"] if line.strip() else []
        elif not re.fullmatch(r"[|\-]+", line):
            cells = [html.escape(cell.strip()) for cell in line.strip().strip("|").split("|")]
            tag = "td" if inside else "th"
            out += [] if inside else ["<table>"]
            out.append("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>")
            inside = True
    return "\n".join([*out, *(["</table>"] if inside else [])])
