"""Budgets of the compile-only gate, per Triton version: registers, spilled bytes a thread, shared bytes.

budgets/VERSION.json is written by `python tests/compile_only.py --budgets` under that version: registers with a margin
of 8 (the limit is 255 on NVIDIA), spills rounded up to 64. What spills: float32, sm_100, and on sm_90
linear_logps_bwd_kernel and frozen_head_fwd_kernel with everything on; from Triton 3.8 on linear_logps_fwd_kernel too,
and under 3.9 frozen_head_fwd_kernel always. Of the kernels of `sparse` rows linear_logps_bwd_kernel spills, and on
gfx942 draw_kernel with everything on; there also the backward of `entropy` rows. Kernels that are not named must fit
192 registers, 4 KiB of shared memory, and spill nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

# Bytes of shared memory that a block may ask for.
SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
SHARED_LIMIT |= {"gfx90a": 65536, "gfx950": 163840, "gfx1100": 65536, "gfx1201": 65536}

Budgets = dict[str, dict[str, tuple[int, int, int]]]  # row -> kernel -> its budget
FOLDER = Path(__file__).resolve().parent / "budgets"
BUDGETS: dict[str, Budgets] = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def write(version: str, budgets: Budgets) -> Path:
    """A line for each kernel."""
    rows = []
    for row, kernels in budgets.items():
        lines = [f"    {json.dumps(name)}: {json.dumps(budget)}" for name, budget in kernels.items()]
        rows.append(f"  {json.dumps(row)}: {{\n" + ",\n".join(lines) + "\n  }")
    path = FOLDER / f"{version}.json"
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    return path
