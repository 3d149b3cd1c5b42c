"""The first five minutes on a GPU: what it can do at best, whether the kernels are right there, what each of them
takes, and which of two designs is faster.

    python bench/first.py --results bench/results    writes RESULTS/<gpu>/<date>-first.json
    python bench/first.py --rehearse                 the same on a CPU, interpreted, at a tiny shape: no step is broken

A step that fails says so and the next one runs; the JSON is rewritten after each, so a run that is killed keeps what it
has. Nothing here is behind a test: whether results are right is a step, and figures are measured whatever it says.
Steps that start a program of their own (launch shapes, peers, race checker, counters) come last, each with a limit.
The order of a first half hour: docs/project/first-half-hour.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch

# At the end of the path: the directory kernels/ must not come before a package of that name.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench.measure import MODES, Differentiated, Gate, Inputs, Products, clock, draw, spread
from bench.report import ROOT, Report, header, output_path
from bench.run import SHAPES, release, say
from groupdpo_kernels import linear_logps
from groupdpo_kernels.testing import Case, triton_on_cpu

DESIGNS = ("kernels multiply", "library multiplies")
GRAD_TOL = 2**-7
REHEARSAL = Case("rehearsal", 16, 64, 500, "one tile of each kernel")
Figures = dict[str, Any]


@dataclass
class First:
    """What the steps share: where they run, the shape, and its inputs, drawn once."""

    device: torch.device
    case: Case
    rounds: int

    @cached_property
    def inputs(self) -> Inputs:
        return draw(self.case, self.device)

    @cached_property
    def gate(self) -> Gate:
        return Gate(self.case, self.inputs)

    def step(self, mode: str, inputs: Inputs | None = None, **settings: Any) -> Differentiated:
        def function(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return linear_logps(hidden, weight, targets, softcap=self.case.softcap, impl="triton", **settings)

        return Differentiated(function, inputs or self.inputs, mode)

    def seconds(self, function: Callable[[], torch.Tensor]) -> float:
        """The median time of a call."""
        call = Call(function)
        return spread([clock(call, self.device).forward for _ in range(1 + self.rounds)][1:], 9)["median"]


@dataclass(frozen=True)
class Call:
    """A step without a backward, for the clock."""

    forward: Callable[[], torch.Tensor]

    def backward(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ()


# ------------------------------------------------------------------------------------------------------------ the steps


def machine(first: First) -> Figures:
    """What decides launch shapes, and the clocks at which all that follows was measured."""
    if first.device.type != "cuda":
        return {"rehearsal": True}
    found = torch.cuda.get_device_properties(first.device)
    names = ("name", "major", "minor", "multi_processor_count", "total_memory", "shared_memory_per_block_optin")
    query = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,driver_version"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    state = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return {name: getattr(found, name, None) for name in names} | {query: state}


def ceilings(first: First) -> Figures:
    """Bytes a second of a copy, and FLOP a second of the library's products, with 16-bit and with float32 output."""
    T, D = first.inputs.hidden.shape
    columns = min(8192, first.case.V)
    weight = first.inputs.weight[:columns]
    size = 2**30 if first.device.type == "cuda" else 2**22
    source, target = (torch.empty(size, dtype=torch.uint8, device=first.device) for _ in range(2))
    figures = {"copy_GB_per_s": 2e-9 * size / first.seconds(lambda: target.copy_(source))}
    flop = 2 * T * D * columns
    out = first.inputs.hidden.new_empty(T, columns)
    figures["product_TFLOP_per_s"] = (
        1e-12 * flop / first.seconds(lambda: torch.mm(first.inputs.hidden, weight.T, out=out))
    )
    if first.device.type == "cuda":
        wide = out.float()
        figures["product_float32_output_TFLOP_per_s"] = (
            1e-12
            * flop
            / first.seconds(lambda: torch.ops.aten.mm.dtype_out(first.inputs.hidden, weight.T, torch.float32, out=wide))
        )
    return {name: float(f"{x:.4g}") for name, x in figures.items()}


def right(first: First) -> Figures:
    """[error, budget] of each result against float64, by mode and design."""
    found: Figures = {}
    for design in DESIGNS:
        for mode in MODES:
            with _design(design):
                step = first.step(mode)
                out = step.forward()
                errors, red = first.gate.check(out, step.backward(out))
            shown = {name: [float(f"{x:.3g}") for x in pair] for name, pair in errors.items()}
            found[f"{mode}, {design}"] = shown | ({"red": red} if red else {})
    return found


def kernels(first: First) -> Figures:
    """[milliseconds, launches] of each kernel of ours in a forward and backward. The library's products are what is
    left of the whole.
    """
    found: Figures = {}
    runs: list[tuple[str, str, dict[str, Any]]] = [(mode, mode, {}) for mode in MODES]
    for name, mode, settings in [*runs, ("trained, candidates", "trained", {"grad_tol": GRAD_TOL})]:
        inputs = draw(first.case, first.device, profile="confident") if settings else None
        step = first.step(mode, inputs, **settings)
        step.backward(step.forward())
        with _kernel_clock(first.device) as launches:
            whole = clock(step, first.device)
        by_kernel: dict[str, list[float]] = defaultdict(list)
        for kernel, seconds in launches():
            by_kernel[kernel].append(1e3 * seconds)
        shown = {kernel: [float(f"{sum(ms):.4g}"), len(ms)] for kernel, ms in by_kernel.items()}
        found[name] = shown | {"whole": float(f"{1e3 * whole.both:.4g}")}
    return found


def designs(first: First) -> Figures:
    """Milliseconds of each mode in interleaved rounds: the bare products, and both designs."""
    found: Figures = {}
    for mode in MODES:
        times: dict[str, list[float]] = defaultdict(list)
        products, step = Products(first.inputs, mode), first.step(mode)
        for _ in range(1 + first.rounds):
            times["products"].append(clock(products, first.device).both)
            for design in DESIGNS:
                with _design(design):
                    times[design].append(clock(step, first.device).both)
        found[mode] = {name: spread([1e3 * x for x in seconds[1:]]) for name, seconds in times.items()}
        for design in DESIGNS:
            ratios = [a / b for a, b in zip(times[design][1:], times["products"][1:])]
            found[mode][design]["ratio"] = spread(ratios)["median"]
    return found


def sums_of_candidates(first: First) -> Figures:
    """Milliseconds of a step with candidates: sums in CUDA C++ beside those in Triton."""
    from groupdpo_kernels.lm_head import extension

    step = first.step("trained", draw(first.case, first.device, profile="confident"), grad_tol=GRAD_TOL)
    found = {}
    for name in ("as chosen", "Triton"):
        refused = mock.patch.object(extension, "cuda_rows", lambda device: None)
        with refused if name == "Triton" else contextlib.nullcontext():
            found[name] = spread([1e3 * clock(step, first.device).both for _ in range(1 + first.rounds)][1:])
    return found


STEPS = (machine, ceilings, right, kernels, designs, sums_of_candidates)
PYTHON = sys.executable
COUNTERS = ["ncu", "--section", "SpeedOfLight", "--section", "WarpStateStats", "--launch-count", "4"]
COUNTERS += ["--kernel-name", "regex:linear_logps|frozen"]
ONE_ROUND = ["--peers", "--rounds", "1", "--no-memory"]
# (seconds, environment, command): each writes its own results, or says what it found.
PROGRAMS: dict[str, tuple[int, dict[str, str], list[str]]] = {
    "launch shapes": (90, {}, [PYTHON, "bench/launches.py", "--seconds", "4", "--results", "{results}"]),
    "peers": (
        120,
        {},
        [
            PYTHON,
            "bench/run.py",
            "--shapes",
            "llama3_8b",
            "--seconds",
            "3",
            "--budget",
            "110",
            "--results",
            "{results}",
        ],
    ),
    # Triton's checker of races between asynchronous copies, barriers and reads.
    "races": (
        60,
        {"TRITON_INSTRUMENTATION_MODE": "consan", "TRITON_ALWAYS_COMPILE": "1"},
        [PYTHON, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "-k", "test_cases and (plain or ragged_bf16)"],
    ),
    "counters": (
        60,
        {},
        [*COUNTERS, PYTHON, "bench/run.py", "--shapes", "qwen3_8b", "--modes", "trained", "frozen", *ONE_ROUND],
    ),
}


@contextlib.contextmanager
def _design(name: str) -> Iterator[None]:
    from groupdpo_kernels.kernels import launch

    with mock.patch.object(launch, "LIBRARY", name == DESIGNS[1]):
        yield


@contextlib.contextmanager
def _kernel_clock(device: torch.device) -> Iterator[Callable[[], list[tuple[str, float]]]]:
    """Within it each launch of a Triton kernel is timed; what it gives reads (kernel, seconds) afterwards."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run
    found: list[tuple[str, Any]] = []

    def timed(self: Any, *args: Any, **named: Any) -> Any:
        if device.type != "cuda":
            start = time.perf_counter()
            out = run(self, *args, **named)
            found.append((self.fn.__name__, time.perf_counter() - start))
            return out
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        out = run(self, *args, **named)
        events[1].record()
        found.append((self.fn.__name__, events))
        return out

    def read() -> list[tuple[str, float]]:
        if device.type != "cuda":
            return found
        torch.cuda.synchronize()
        return [(name, events[0].elapsed_time(events[1]) / 1e3) for name, events in found]

    with mock.patch.object(JITFunction, "run", timed):
        yield read


# -------------------------------------------------------------------------------------------------------------- the run


def attempt(report: Report, name: str, step: Callable[[], Figures]) -> None:
    """Whatever happens in a step is a row of the report."""
    row: Figures = {"step": name, "status": "running"}
    report.rows.append(row)
    report.write()
    start = time.monotonic()
    try:
        row |= step() | {"status": "ok"}
    except Exception as failure:
        row |= {"status": "failed", "why": f"{type(failure).__name__}: {failure}"[:2000]}
        row["where"] = traceback.format_exc()[-2000:]
    row["seconds"] = round(time.monotonic() - start, 1)
    report.write()
    say(f"{name}: {row['status']} after {row['seconds']} s {row.get('why', '')}")


def program(limit: int, environment: dict[str, str], command: list[str], results: Path) -> Figures:
    """The last lines of a program's output; TimeoutExpired after `limit` seconds."""
    command = [word.format(results=results) for word in command]
    settings: dict[str, Any] = {"env": os.environ | environment, "cwd": ROOT, "timeout": limit, "text": True}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **settings)
    return {"command": " ".join(command), "exit": done.returncode, "output": done.stdout[-6000:]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The first five minutes on a GPU.")
    add = parser.add_argument
    shapes = [case.name for case in SHAPES]
    add("--shape", choices=shapes, default="llama3_8b", help="default: %(default)s")
    add("--rounds", type=int, default=10, help="of each timing; default: %(default)s")
    add("--programs", nargs="*", choices=list(PROGRAMS), default=list(PROGRAMS), help="default: all")
    add("--rehearse", action="store_true", help="on the CPU, interpreted, without the programs")
    add("--results", type=Path, default=ROOT / "bench" / "results", help="default: bench/results")
    add("--json", type=Path, help="write here instead of RESULTS/<gpu>/<date>-first.json")
    options = parser.parse_args()
    if not (options.rehearse or torch.cuda.is_available()):
        parser.error("PyTorch finds no GPU here: pass --rehearse to go through the steps on the CPU")
    return options


def main() -> int:
    options = parse()
    device = torch.device("cpu" if options.rehearse else "cuda")
    case = REHEARSAL if options.rehearse else next(case for case in SHAPES if case.name == options.shape)
    first = First(device, replace(case, dtype=torch.bfloat16), 1 if options.rehearse else options.rounds)
    path = output_path(options.json, None if options.rehearse else options.results, device, "-first")
    report = Report(header(device) | {"shape": case.name}, path)
    with triton_on_cpu(16, 512, 64) if options.rehearse else contextlib.nullcontext():
        for step in STEPS:
            attempt(report, step.__name__.replace("_", " "), functools.partial(step, first))
            with contextlib.suppress(Exception):  # an illegal access ends what follows, and each step will say so
                release(device)
    for title, settings in PROGRAMS.items():
        if title in options.programs and not options.rehearse:
            attempt(report, title, functools.partial(program, *settings, options.results))
    report.complete = True
    report.write()
    failed = [row["step"] for row in report.rows if row["status"] != "ok"]
    red = [name for row in report.rows if row["step"] == "right" for name, x in row.items() if "red" in str(x)]
    say(f"failed: {failed or 'none'}; wrong: {red or 'none'}; {path or 'not written'}")
    return int(bool(failed or red))


if __name__ == "__main__":
    raise SystemExit(main())
