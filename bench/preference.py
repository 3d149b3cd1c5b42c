"""The benchmark of the preference weights: `preference_loss` forward and backward, from token log-probabilities to
their gradient, beside the same in plain PyTorch under autograd (eager, impl="reference"), which is all that a CPU has.

    python bench/preference.py                              the defaults of this machine's device
    python bench/preference.py --groups 8 64 --compile      also the plain PyTorch through torch.compile: minutes

A case is a loss, a number of groups and their size; responses have 64 to 512 tokens, or fewer where all together would
be more than 2 million. Interleaved rounds as in bench/run.py; a ratio is theirs to ours, the median over rounds of the
ratio within a round. No figure without a passed gate: losses, rewards and gradient against float64, within twice the
error of eager. Groups are made before: their making is a matter of the data.

Memory: the peak of PyTorch's allocator beyond the inputs and the gradient. Launches: on a GPU everything the device
was told to run, by PyTorch's profiler; on a CPU the operators that PyTorch dispatches, of which a custom one is one.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# At the end of the path: the directory kernels/ must not come before a package of that name.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import memory
from bench.measure import Step
from bench.report import Report, Row, header, output_path
from bench.run import Entry, measure_rounds, release, say
from groupdpo_kernels import AdaBalance, Objective, PreferenceGroups, PreferenceLoss, preference_loss
from groupdpo_kernels.testing import error

OBJECTIVES = {
    "sigmoid": Objective("sigmoid", beta=0.1),
    "AdaDPO": Objective("sigmoid", beta=0.1, balance=AdaBalance()),
    "mpo": Objective("mpo", beta=5.0, average=True, nll_weight=1.0),
}
SIZES = {"sigmoid": [2], "AdaDPO": [2], "mpo": [2, 8, 16]}  # responses of a group
GROUPS = [1, 8, 64, 1024, 10000]
MOST_TOKENS = 2_000_000
D_LOSS = 0.7  # upstream gradient: 1 would not tell whether it is used


@dataclass(frozen=True)
class Inputs:
    token_logps: Tensor  # (T,) float32
    ref_logps: Tensor  # (S,) float32
    cu_seqlens: Tensor  # (S+1,) int32
    groups: PreferenceGroups


def draw(G: int, size: int, device: torch.device, seed: int = 0) -> Inputs:
    """Ragged responses, positives anywhere; the reference is a little off the policy."""
    generator = torch.Generator().manual_seed(seed)
    S = G * size
    lengths = torch.randint(64, 513, (S,), generator=generator)
    if int(lengths.sum()) > MOST_TOKENS:
        lengths = (lengths * (MOST_TOKENS / int(lengths.sum()))).long().clamp(min=1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    token_logps = -torch.empty(int(cu_seqlens[-1])).exponential_(generator=generator)
    ref_logps = torch.segment_reduce(token_logps, "sum", lengths=lengths)
    ref_logps += torch.randn(S, generator=generator) * lengths.sqrt()
    positives = torch.randint(1, size, (G, 1), generator=generator)
    rank = torch.rand(G, size, generator=generator).argsort(1).argsort(1)
    groups = PreferenceGroups(torch.arange(0, S + 1, size), (rank < positives).flatten())
    return Inputs(token_logps.to(device), ref_logps.to(device), cu_seqlens.to(device), groups.to(device))


class Weights:
    """The loss and d_token_logps by one implementation; a Step of bench/measure.py."""

    def __init__(self, inputs: Inputs, objective: Objective, impl: str, dtype: torch.dtype = torch.float32) -> None:
        self.token_logps = inputs.token_logps.to(dtype).requires_grad_()
        self.rest = (inputs.cu_seqlens, inputs.groups, objective, inputs.ref_logps.to(dtype))
        self.d_loss = torch.tensor(D_LOSS, dtype=dtype, device=self.token_logps.device)
        self.function = torch.compile(preference_loss) if impl == "torch.compile" else preference_loss
        self.impl = "reference" if impl in ("eager", "torch.compile") else impl

    def result(self) -> PreferenceLoss:
        return self.function(self.token_logps, *self.rest, impl=self.impl)

    def forward(self) -> Tensor:
        return self.result().loss

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.token_logps, self.d_loss)

    def values(self) -> dict[str, Tensor]:
        """What the gate compares."""
        result = self.result()
        (d_token_logps,) = self.backward(result.loss)
        return {"losses": result.group_losses, "rewards": result.rewards, "d_token_logps": d_token_logps}


class Gate:
    """Float64 results of a case, and the error that each may have: twice that of eager."""

    def __init__(self, inputs: Inputs, objective: Objective) -> None:
        self.truth = Weights(inputs, objective, "reference", torch.float64).values()
        eager = Weights(inputs, objective, "eager").values()
        floor = 8 * torch.finfo(torch.float32).eps  # for results on which eager is exact
        self.budget = {name: max(2 * error(eager[name], x), floor) for name, x in self.truth.items()}

    def check(self, values: dict[str, Tensor]) -> tuple[dict[str, float], list[str]]:
        """(errors, complaints)."""
        errors = {name: error(values[name], x) for name, x in self.truth.items()}
        red = [(name, e, self.budget[name]) for name, e in errors.items() if not e <= self.budget[name]]
        return errors, [f"{name} off by {e:.1e}, budget {budget:.1e}" for name, e, budget in red]


# ------------------------------------------------------------------------------------------------- memory and launches


class Dispatched(TorchDispatchMode):
    """Counts operators, those of autograd's backward among them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def launches(step: Step, device: torch.device) -> int:
    if device.type == "cpu":
        with Dispatched() as dispatched:
            step.backward(step.forward())
        return dispatched.count
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step.backward(step.forward())
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())


def extra_mib(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        return memory.on_cuda(step)["extra_mib"]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        gradients = step.backward(step.forward())
    return round((memory.allocator_peak(profiled) - sum(x.nbytes for x in gradients)) / memory.MiB, 3)


# ------------------------------------------------------------------------------------------------------------ the run


def measure_case(loss: str, G: int, size: int, options: argparse.Namespace, report: Report) -> None:
    inputs, objective = draw(G, size, options.device), OBJECTIVES[loss]
    case: Row = {"loss": loss, "groups": G, "size": size, "tokens": inputs.token_logps.shape[0]}
    say(f"{loss}, {G} groups of {size}, {case['tokens']} tokens")
    gate = Gate(inputs, objective)
    entries = []
    for name in options.implementations:
        row = case | {"implementation": name, "status": "gated"}
        report.rows.append(row)
        step = Weights(inputs, objective, name.removeprefix("ours/"))
        row["error"], wrong = gate.check(step.values())
        row["error_budget"] = gate.budget
        if wrong:
            row |= {"status": "red", "why": "; ".join(wrong)}
            say(f"  {name}: red: {row['why']}")
            continue
        if name != "torch.compile" or options.device.type == "cuda":  # its code runs out of the dispatcher's sight
            row["launches"] = launches(step, options.device)
        row["extra_mib"] = extra_mib(step, options.device)
        entries.append(Entry(step, row))
    if entries and entries[0].row["implementation"] == options.implementations[0]:
        measure_rounds(entries, options, report)  # entries[0] is what the others are divided by
    release(options.device)


def table(report: Report) -> str:
    """One row a case; each peer's time over ours, then launches and memory in the order of the columns."""
    names = list(dict.fromkeys(row["implementation"] for row in report.rows))
    heads = [f"{names[0]}, ms", *(f"{name}, ms (/ ours)" for name in names[1:])]
    counted = "launches" if names[0] == "ours/triton" else "operators"
    lines = [f"| loss | groups | size | tokens | {' | '.join(heads)} | {counted} | extra MiB |"]
    lines.append("|---" * (len(names) + 6) + "|")
    cases: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in report.rows:
        cases.setdefault((row["loss"], row["groups"], row["size"]), {})[row["implementation"]] = row
    for (loss, G, size), rows in cases.items():
        times = []
        for row in rows.values():
            ms = f"{row['both_ms']['median']:.3g}" if row["status"] == "ok" else row["status"]
            times.append(
                ms if row is rows[names[0]] or row["status"] != "ok" else f"{ms} ({row['ratio']['median']:.2f})"
            )
        counts = ", ".join(str(row.get("launches", "-")) for row in rows.values())
        extra = ", ".join(f"{row['extra_mib']:.2f}" if "extra_mib" in row else "-" for row in rows.values())
        tokens = f"{rows[names[0]]['tokens']:,}"
        lines.append(f"| {loss} | {G:,} | {size} | {tokens} | {' | '.join(times)} | {counts} | {extra} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time, memory and launches of the preference weights beside eager.")
    add = parser.add_argument
    add("--device", type=torch.device, help="default: cuda where there is one")
    add("--losses", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    add("--groups", nargs="+", type=int, default=GROUPS, help="default: %(default)s")
    add("--compile", action="store_true", help="also eager through torch.compile")
    add("--rounds", type=int, default=31, help="default: %(default)s")
    add("--quick", action="store_true", help="8 groups, 3 rounds")
    add("--json", type=Path, help="write the results here")
    add("--results", type=Path, help="write the results to RESULTS/<device>/<date>-preference.json")
    options = parser.parse_args()
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.device.type not in ("cpu", "cuda") or (options.device.type == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device must be cpu, or cuda where PyTorch finds a GPU; got {options.device}")
    if min(options.groups) < 1 or options.rounds < 1:
        parser.error(f"--groups and --rounds must be at least 1; got {options.groups}, {options.rounds}")
    if options.quick:
        options.groups, options.rounds = [8], 3
    fused = ["ours/triton"] if options.device.type == "cuda" else []
    options.implementations = [*fused, "eager", *(["torch.compile"] if options.compile else [])]
    return options


def main() -> int:
    options = parse()
    path = output_path(options.json, options.results, options.device, "-preference")
    memory_by = f"peak of PyTorch's {'CUDA' if options.device.type == 'cuda' else 'CPU'} allocator"
    report = Report(header(options.device) | {"memory_by": memory_by}, path)
    for loss in options.losses:
        for size in SIZES[loss]:
            for G in options.groups:
                measure_case(loss, G, size, options, report)
    report.complete = True
    report.write()
    print(report.head["device"], f"torch {torch.__version__}", sep=", ")
    print(table(report))
    return int(any(row["status"] != "ok" for row in report.rows if row["implementation"] in ("ours/triton", "eager")))


if __name__ == "__main__":
    raise SystemExit(main())
