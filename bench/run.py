"""The benchmark: time and memory of `linear_logps` beside its alternatives and beside the limit, the bare matrix
products of the same shape and dtype.

    python bench/run.py                                          the defaults of this machine's device
    python bench/run.py --shapes memory --modes trained --rounds 0
    python bench/run.py --profile trained --grad-tol 0.0078125   rows as peaked as a small model's
    python bench/run.py --device cuda --results bench/results    also writes bench/results/<gpu>/<date>.json

A group of rows (a shape, a dtype, a mode) is measured in interleaved rounds: each round times the limit and every
implementation once, from a new starting point, so that all see the same machine. A ratio is the median over rounds of
the ratio within a round. No figure without a passed gate (bench/measure.py). Memory: bench/memory.py.
The JSON is rewritten after every round: a killed run keeps what it measured. Nothing is downloaded; a peer that is not
installed is a row that says so. Cost: --seconds of timing a group, what the gates and memory take, --budget in all.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

# At the end of the path: the directory kernels/ must not come before a package of that name.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import memory
from bench.measure import MODES, RANDOM, Differentiated, Gate, Inputs, Products, Seconds, Step, clock, draw, spread
from bench.peers import OURS, PEERS, SAMPLED, Unavailable, grad_tol_of, maker
from bench.recorded_rows import PROFILES, describe_rows
from bench.report import Report, Row, dtype_name, header, output_path, tables, title
from groupdpo_kernels.lm_head import ops
from groupdpo_kernels.lm_head.sparse import exact_rows
from groupdpo_kernels.reference import head_of
from groupdpo_kernels.testing import Case

LIMIT = "matrix products"

# In the order of importance: a run that is cut short has the first ones.
SHAPES: tuple[Case, ...] = (
    Case("llama3_8b", 8192, 4096, 128256, "the shape of most published figures"),
    Case("gemma2_2b", 8192, 2304, 256000, "the widest vocabulary, soft-capped", softcap=30.0),
    Case("qwen2_7b", 4096, 3584, 152064, "one DPO pair of 2048 tokens a side"),
    Case("qwen3_8b", 2048, 4096, 151936, "few tokens: the vocabulary must fill the GPU"),
    Case("llama3_8b_long", 32768, 4096, 128256, "a packed group; T V > 2^31"),
    Case("small", 1024, 1024, 32000, "a CPU takes seconds"),
    Case("llama3_1b", 512, 2048, 128256, "few tokens on a CPU"),
    Case("memory", 8192, 256, 128256, "logits of 4 GiB in float32, at a hidden size that a CPU can afford"),
    Case("tiny", 64, 64, 1000, "a check that the benchmark itself runs"),
)
DEFAULTS = {
    "cuda": (["llama3_8b", "gemma2_2b", "qwen2_7b", "qwen3_8b", "llama3_8b_long"], ["bfloat16"], ["triton"]),
    "cpu": (["small"], ["float32"], ["cpu", "reference"]),
}
START = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {text}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------- a group of rows


@dataclass
class Entry:
    """One row while it is measured."""

    step: Step
    row: Row
    times: list[Seconds] = field(default_factory=list)

    def settle(self, limits: list[Seconds]) -> None:
        """The figures of the rounds so far, into the row."""
        pairs = list(zip(self.times, limits))
        self.row |= {
            "status": "ok",
            "rounds": len(pairs),
            "forward_ms": spread([1e3 * t.forward for t, _ in pairs]),
            "backward_ms": spread([1e3 * (t.both - t.forward) for t, _ in pairs]),
            "both_ms": spread([1e3 * t.both for t, _ in pairs]),
            "ratio": spread([t.both / limit.both for t, limit in pairs]),
        }


def measure_group(
    case: Case, inputs: Inputs, gate: Gate, mode: str, options: argparse.Namespace, report: Report
) -> None:
    shape = {"shape": case.name, "T": case.T, "D": case.D, "V": case.V, "softcap": case.softcap}
    shape["profile"] = options.profile

    def new_row(name: str) -> Row:
        keys = {"dtype": dtype_name(case), "mode": mode, "implementation": name, "products": MODES[mode]}
        report.rows.append(shape | keys | {"status": "running"})
        return report.rows[-1]

    say(f"{title(case, options.profile)}, {mode}")
    entries = [Entry(Products(inputs, mode), new_row(LIMIT))] if options.rounds != 0 else []
    for name in options.implementations:
        row = new_row(name)
        try:
            step = Differentiated(maker(name)(case, options.device), inputs, mode)
            if admit(step, row, gate, case, options):
                entries.append(Entry(step, row))
        except Unavailable as reason:
            row |= {"status": "unavailable", "why": str(reason)}
        except Exception as failure:  # a peer may fail in any way; the other rows go on
            first_line = str(failure).strip().partition("\n")[0]
            row |= {"status": "failed", "why": f"{type(failure).__name__}: {first_line}"}
        say(f"  {name}: {row['status']} {row.get('why', '')}")
        report.write()
        release(options.device)
    measure_rounds(entries, options, report)


def admit(step: Step, row: Row, gate: Gate, case: Case, options: argparse.Namespace) -> bool:
    """The first call decides whether it is right; then its memory."""
    out = step.forward()
    grad_tol, sampled = grad_tol_of(row["implementation"]), row["implementation"].endswith(SAMPLED)
    errors, red = gate.check(out, step.backward(out), grad_tol, sampled)
    del out
    if grad_tol > 0:
        row |= sparsity(gate.inputs, case, grad_tol, sampled)
    row["error"] = {name: float(f"{found:.3g}") for name, (found, _) in errors.items()}
    row["error_budget"] = {name: float(f"{budget:.3g}") for name, (_, budget) in errors.items()}
    row |= {"status": "red", "why": "; ".join(red)} if red else {"status": "gated"}
    if options.memory and not red:
        on_cpu = options.device.type == "cpu"
        named = case, row["implementation"], row["mode"], options.profile
        row |= memory.on_cpu(*named) if on_cpu else memory.on_cuda(step)
    return not red


def sparsity(inputs: Inputs, case: Case, grad_tol: float, sampled: bool) -> dict[str, float]:
    """What a tolerance means for these rows: the share that needs the exact path, candidates a row, and what the rows
    look like. A figure with a tolerance says nothing without them."""
    head = head_of(inputs.hidden.detach(), inputs.weight.detach())
    seed = torch.tensor(0) if sampled else None
    _, found = ops.sparse_forward(head, inputs.targets, case.options, grad_tol, "auto", seed)
    upstream, live = inputs.d_token_logps.to(found.non_target_probs), inputs.targets != case.options.ignore_index
    exact = exact_rows(found.non_target_probs, found.dropped, upstream, torch.zeros_like(upstream), live, grad_tol)
    rows = describe_rows(head.hidden, head.weight, inputs.targets, grad_tol)
    return {
        "exact_rows": 0.0 if sampled else float(exact[live].float().mean()),
        "candidates": float((found.weights > 0).sum(-1)[live].float().mean()),
        "entropy": rows.entropy,
        "not_target": rows.not_target,
        "dropped": float(found.dropped[live].mean()),
    }


def measure_rounds(entries: list[Entry], options: argparse.Namespace, report: Report) -> None:
    """entries[0] is the limit."""
    if options.rounds == 0:
        return
    started = time.monotonic()
    for entry in entries:  # a warm-up, which also says how many rounds the time allows
        clock(entry.step, options.device)
    cost = time.monotonic() - started
    rounds = options.rounds or max(3, min(30, int(options.seconds / max(cost, 1e-4))))
    for i in range(rounds):
        first = i % len(entries)
        for entry in entries[first:] + entries[:first]:
            entry.times.append(clock(entry.step, options.device))
        for entry in entries:
            entry.settle(entries[0].times)
        report.write()
    say(f"  {rounds} rounds of {cost:.2f} s")


def release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()  # raises after an illegal access, and should: nothing measured later would be true
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------- the run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory beside the alternatives and the limit.")
    add = parser.add_argument
    add("--device", type=torch.device, help="default: cuda where there is one")
    add(
        "--shapes",
        nargs="+",
        choices=[case.name for case in SHAPES],
        help="; ".join(f"{c.name}: {c.reason}" for c in SHAPES),
    )
    add("--dtype", nargs="+", choices=["bfloat16", "float16", "float32"])
    add("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    add("--profile", choices=[RANDOM, *PROFILES], default=RANDOM, help="of rows; default: %(default)s")
    add("--impl", nargs="*", choices=OURS, help="ours; default: triton on a GPU, cpu and reference on a CPU")
    add("--peers", nargs="*", choices=list(PEERS), default=list(PEERS), help="default: all")
    add("--grad-tol", type=float, nargs="*", default=[], help="a further row of each of ours with this tolerance")
    add("--grad-tail", nargs="+", choices=["exact", "sample"], default=["exact"], help="of those rows")
    add("--rounds", type=int, help="default: as many as --seconds allows, 3 to 30; 0: gates and memory alone")
    add("--seconds", type=float, default=8.0, help="of timing a group of rows; default: %(default)s")
    add("--budget", type=float, default=330.0, help="seconds in all, on a GPU: later groups are left out, and named")
    add("--memory", action=argparse.BooleanOptionalAction, default=True)
    add("--quick", action="store_true", help="the shape tiny, 3 rounds, no peer but eager, no memory")
    add("--json", type=Path, help="write the results here")
    add("--results", type=Path, help="write the results to RESULTS/<gpu>/<date>.json")
    options = parser.parse_args()
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.device.type not in DEFAULTS or (options.device.type == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device must be cpu, or cuda where PyTorch finds a GPU; got {options.device}")
    shapes, dtypes, impls = DEFAULTS[options.device.type]
    if options.quick:
        shapes, options.peers, options.rounds, options.memory = ["tiny"], ["eager"], options.rounds or 3, False
    chosen = [case for case in SHAPES if case.name in (options.shapes or shapes)]
    options.cases = [replace(case, dtype=getattr(torch, d)) for case in chosen for d in options.dtype or dtypes]
    impls = impls if options.impl is None else options.impl
    tails = [SAMPLED if tail == "sample" else "" for tail in options.grad_tail]
    tolerances = [f" grad_tol={x:g}{tail}" for x in options.grad_tol for tail in tails]
    ours = [f"ours/{impl}{tol}" for impl in impls for tol in ("", *tolerances)]
    options.implementations = [*ours, *options.peers]
    return options


def main() -> int:
    options = parse()
    path = output_path(options.json, options.results, options.device)
    report = Report(header(options.device), path)
    for case in options.cases:
        inputs = gate = None
        for mode in options.modes:
            if options.device.type == "cuda" and time.monotonic() - START > options.budget:
                name = title(case, options.profile)
                report.skipped.append(f"{name}, {mode}: not measured, the {options.budget:g} s were spent")
                continue
            if inputs is None or gate is None:
                say(f"{title(case, options.profile)}: inputs and float64")
                inputs = draw(case, options.device, profile=options.profile)
                gate = Gate(case, inputs)
            measure_group(case, inputs, gate, mode, options, report)
            release(options.device)
    report.complete = True
    report.write()
    print(report.head["device"], *(f"{k} {v or 'missing'}" for k, v in report.head["versions"].items()), sep=", ")
    print(tables(options.cases, options.modes, report.rows), *report.skipped, sep="\n")
    # A peer that cannot run is a fact; one of ours that is wrong or fails is a failure.
    broken = [r for r in report.rows if r["implementation"].startswith("ours/") and r["status"] in ("red", "failed")]
    for r in broken:
        say(f"{r['implementation']} at {r['shape']} {r['dtype']} {r['mode']} is {r['status']}: {r['why']}")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
