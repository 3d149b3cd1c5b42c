"""Which launch shape is best on this GPU: the row of kernels/triton/launch.py beside others, in one run.

    python bench/launches.py --shapes llama3_8b --results bench/results    writes RESULTS/<gpu>/<date>-launches.json
    python bench/launches.py --modes forward --seconds 20

Every shape passes the gate of bench/run.py before it is timed, in the same interleaved rounds beside the bare products.
A shape that does not build or asks for too much shared memory is a row that says so. What wins goes into the table by
hand, with the figures into docs/log.md; registers and spills of a new row: python tests/compile_only.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench.measure import MODES, RANDOM, Differentiated, Gate, Products, Step, draw
from bench.peers import maker
from bench.report import Report, header, output_path, tables, title
from bench.run import LIMIT, SHAPES, Entry, measure_rounds, release, say
from groupdpo_kernels.kernels import launch
from groupdpo_kernels.kernels.launch import Launch

# Beside the row of the table: what changes, one thing or what belongs together, for 16-bit inputs on sm_90.
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"GROUP_T": 8},
    {"GROUP_T": 32},
    {"GROUP_T": 64},
    {"num_stages": 3},
    {"persistent": False},
    {"BLOCK_T": 256, "BLOCK_V": 128},
    {"BLOCK_V": 128, "num_stages": 5},
    # Two blocks a multiprocessor hide each other's epilogue.
    {"BLOCK_V": 128, "num_warps": 4, "num_stages": 3, "persistent": False},
    {"BLOCK_T": 64, "num_warps": 4, "num_stages": 2, "persistent": False},
    {"BLOCK_V": 128, "BLOCK_D": 128, "num_stages": 3},
    {"BLOCK_D": 32, "num_stages": 6},
    {"tma": False, "persistent": False, "BLOCK_V": 128, "num_stages": 3},
)


def name_of(shape: Launch) -> str:
    flags = [word for word in ("tma", "persistent") if getattr(shape, word)]
    size = f"{shape.BLOCK_T}x{shape.BLOCK_V}x{shape.BLOCK_D}"
    return " ".join(
        [size, f"{shape.num_warps} warps", f"{shape.num_stages} stages", f"GROUP_T {shape.GROUP_T}", *flags]
    )


class Launched:
    """A step whose kernels are launched by another row of the table."""

    def __init__(self, step: Step, key: tuple[str, int], shape: Launch) -> None:
        self.step, self.key, self.shape = step, key, shape

    @contextmanager
    def _table(self) -> Iterator[None]:
        with mock.patch.dict(launch.TABLE, {self.key: self.shape}):
            yield

    def forward(self) -> Tensor:
        with self._table():
            return self.step.forward()

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        with self._table():
            return self.step.backward(out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Launch shapes beside each other and beside the bare products.")
    add = parser.add_argument
    add("--shapes", nargs="+", choices=[case.name for case in SHAPES], default=["llama3_8b"])
    add("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    add("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    add("--seconds", type=float, default=10.0, help="of timing a mode; default: %(default)s")
    add("--rounds", type=int, help="default: as many as --seconds allows, 3 to 30")
    add("--json", type=Path, help="write the results here")
    add("--results", type=Path, help="write the results to RESULTS/<gpu>/<date>-launches.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("launch shapes are timed on a GPU, and PyTorch finds none here")
    options.device, options.profile = torch.device("cuda"), RANDOM
    return options


def main() -> int:
    options = parse()
    path = output_path(options.json, options.results, options.device, "-launches")
    report = Report(header(options.device), path)
    dtype = getattr(torch, options.dtype)
    cases = [replace(case, dtype=dtype) for case in SHAPES if case.name in options.shapes]
    key = (launch.architecture(options.device) or "", dtype.itemsize)
    shapes = list(dict.fromkeys(replace(launch.TABLE[key], **change) for change in CHANGES))
    for case in cases:
        inputs = draw(case, options.device)
        gate = Gate(case, inputs)
        for mode in options.modes:
            say(f"{title(case)}, {mode}")
            keys = {"shape": case.name, "T": case.T, "D": case.D, "V": case.V, "profile": RANDOM, "mode": mode}
            keys |= {"dtype": options.dtype, "products": MODES[mode]}
            report.rows.append(keys | {"implementation": LIMIT, "status": "running"})
            entries = [Entry(Products(inputs, mode), report.rows[-1])]
            for shape in shapes:
                row = keys | {"implementation": name_of(shape), "status": "running"}
                report.rows.append(row)
                step = Launched(Differentiated(maker("ours/triton")(case, options.device), inputs, mode), key, shape)
                try:
                    out = step.forward()
                    _, red = gate.check(out, step.backward(out))
                    del out
                    row |= {"status": "red", "why": "; ".join(red)} if red else {"status": "gated"}
                    if not red:
                        entries.append(Entry(step, row))
                except Exception as failure:  # shared memory, registers: what a shape may lack
                    first_line = str(failure).strip().partition("\n")[0]
                    row |= {"status": "failed", "why": f"{type(failure).__name__}: {first_line}"}
                say(f"  {row['implementation']}: {row['status']} {row.get('why', '')}")
                report.write()
            measure_rounds(entries, options, report)
            release(options.device)
    report.complete = True
    report.write()
    print(tables(cases, options.modes, report.rows))
    return int(any(row["status"] == "red" for row in report.rows))


if __name__ == "__main__":
    raise SystemExit(main())
