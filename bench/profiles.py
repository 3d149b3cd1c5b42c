"""How peaked the rows of each profile are at a shape, beside the rows that were recorded from models.

    python bench/profiles.py                                  512 x 1024, each at the vocabulary of its model
    python bench/profiles.py --shape 1024 1024 32000 --dtype float32

Prints one table: means over rows of what `describe_rows` says, quantiles of the entropy, the median number of
candidates, how many distinct ids they are over all rows and what part of them the 256 commonest are, and seconds.
It never judges: tests/test_profiles.py does. Cost: draw_profile's, and two products a profile.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# At the end of the path: the directory kernels/ must not come before a package of that name.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench.recorded_rows import (
    GRAD_TOL,
    PROFILES,
    RECORDED,
    Rows,
    draw_profile,
    load_rows,
    row_statistics,
    shared_candidates,
    summarise,
)

COLUMNS = (
    "entropy",
    "10 %",
    "50 %",
    "90 %",
    "candidates",
    "median",
    "distinct",
    "in 256",
    "dropped",
    "p_target",
    "sparse rows",
    "seconds",
)


def line(name: str, V: int, rows: Rows, statistics: Tensor | None, shared: Any, seconds: float | None) -> str:
    cells = [name, str(V), f"{rows.entropy:.2f}"]
    median = ""
    if statistics is None:
        cells += ["", "", ""]
    else:
        quantiles = statistics[:, 0].quantile(torch.tensor([0.1, 0.5, 0.9], device=statistics.device))
        cells += [f"{x:.2f}" for x in quantiles.tolist()]
        median = f"{statistics[:, 1].median().item():.0f}"
    cells += [
        f"{rows.candidates:.1f}",
        median,
        *([f"{shared[0]:.0f}", f"{100 * shared[1]:.0f} %"] if shared else ["", ""]),
    ]
    cells += [f"{rows.dropped_mass:.4f}", f"{1 - rows.not_target:.3f}"]
    cells += [f"{100 * rows.sparse_rows:.1f} %", "" if seconds is None else f"{seconds:.1f}"]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", type=int, nargs=3, metavar=("T", "D", "V"), help="default: 512 1024 and the vocabulary of the model")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--profiles", nargs="+", default=PROFILES, choices=PROFILES)
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    options = parser.parse_args()
    print(f"{options.dtype}; candidates: p >= 2^-12 and the target\n")
    print(f"| rows | V | {' | '.join(COLUMNS)} |\n|---|---{'|---' * len(COLUMNS)}|")
    for name in options.profiles:
        recorded = load_rows(RECORDED.get(name, RECORDED["trained"]))
        T, D, V = options.shape or (512, 1024, recorded.V)
        if name in RECORDED:
            rows = summarise(recorded.statistics)
            print(
                line(f"the model of {name}, all rows", recorded.V, Rows(*recorded.held_out.tolist()), None, None, None)
            )
            shared: Any = recorded.sharing.tolist()
            print(line("its recorded rows", recorded.V, rows, recorded.statistics, shared, None))
        start = time.perf_counter()
        inputs = draw_profile(name, T, D, V, getattr(torch, options.dtype), options.seed, options.device)
        seconds = time.perf_counter() - start
        statistics = row_statistics(*inputs, GRAD_TOL)
        found = shared_candidates(*inputs[:2])
        print(line(f"{name}, {T} x {D}", V, summarise(statistics), statistics, found, seconds), flush=True)
    for path in RECORDED.values():
        print(f"\n{path.name}: {load_rows(path).made_by}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
