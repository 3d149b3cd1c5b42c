"""A step on a group whose prompt runs once, beside the same step on whole sequences: time, tokens, memory.

    python bench/shared_prompt.py                            about twenty minutes on one core; prints the table
    python bench/shared_prompt.py --rows long --rounds 5
    python bench/shared_prompt.py --model DIR                the row of a real model, for example SmolLM2-135M-Instruct
    python bench/shared_prompt.py --results bench/results --picture docs/shared_prompt.png

The model is a Llama of 4 layers of width 256 in float32, with random weights, but for the row `real`, whose model is
read from DIR (or has the shape of SmolLM2-135M and random weights). Both sides take the same micro-batches of rows, and
run in turn in one process on one thread, so that the machine is the same for both. A figure is the median over rounds
of the ratio of processor time, since other work on the machine changes wall time. Before a row is timed, the gradients
of both sides are compared: no figure where they differ by more than 1e-4 of the largest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench.report import Report, header, output_path
from bench.run import say
from bench.trl_steps import tokenizer_of, words
from groupdpo_kernels import Objective, SharedPromptForward, forward_parts, group_backward
from groupdpo_kernels.data import TokenGroup, collate
from groupdpo_kernels.memory.rss import forget_peak, resident

OBJECTIVE = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)
SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
SMALL = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Row:
    """What is measured, and the aim: at most `factor` times the ratio of tokens, or `most`."""

    what: str
    P: int
    n: int
    G: int
    micro_batch: int
    factor: float | None = None
    most: float | None = None

    @property
    def tokens(self) -> float:
        """The tokens of the shared step, by those of whole sequences."""
        return (self.P - 1 + self.G * self.n) / (self.G * (self.P + self.n))

    @property
    def aim(self) -> float:
        return self.most if self.factor is None else self.factor * self.tokens  # type: ignore[return-value]


ROWS = {
    "long": Row("step, two passes", 1024, 128, 16, 4, factor=1.25),
    "real": Row("step, two passes, SmolLM2-135M", 512, 64, 8, 4, factor=1.25),
    "even": Row("step, two passes", 256, 256, 8, 4, factor=1.2),
    "little": Row("step, two passes, little to share", 32, 512, 4, 2, most=1.03),
    "scoring": Row("scoring a reference", 1024, 128, 16, 4, factor=1.15),
    "memory": Row("peak memory, G = 64 by G = 2", 256, 64, 64, 2, most=1.02),
    "trl": Row("group of 16 by TRL on its 15 pairs, V = 32000", 1024, 128, 16, 4, most=0.05),
}


def llama(shape: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=8192, pad_token_id=0)).train()


def group_of(row: Row, vocabulary: int, size: int | None = None) -> TokenGroup:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> torch.Tensor:
        return torch.randint(3, vocabulary, (count,), generator=generator).int()

    size = row.G if size is None else size
    return TokenGroup(draw(row.P), [draw(row.n) for _ in range(size)], [i % 2 == 0 for i in range(size)], 0)


def step_of(model: Any, group: TokenGroup, row: Row, shared: bool) -> Callable[[], None]:
    step, forward = collate([group], max_sequences=row.micro_batch, share_prompt=shared), SharedPromptForward(model)
    ref_logps = torch.zeros(len(group.responses))

    def run() -> None:
        group_backward(step.parts, forward, step.groups, OBJECTIVE, ref_logps)

    return run


def scoring_of(model: Any, group: TokenGroup, row: Row, shared: bool) -> Callable[[], None]:
    step, forward = collate([group], max_sequences=row.micro_batch, share_prompt=shared), SharedPromptForward(model)

    def run() -> None:
        with torch.no_grad():
            forward_parts(step.parts, forward)

    return run


def gap(model: Any, group: TokenGroup, row: Row) -> float:
    """The largest difference between the gradients of both sides, by the largest gradient."""
    found = []
    for shared in (True, False):
        model.zero_grad()
        step_of(model, group, row, shared)()
        found.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    largest = max(float(g.abs().max()) for g in found[1])
    return max(float((a - b).abs().max()) for a, b in zip(*found)) / largest


def in_turn(sides: list[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of processor time of each side, in each round, after one that warms up."""
    seconds: list[list[float]] = [[] for _ in sides]
    for at in range(rounds + 1):
        for side, taken in zip(sides, seconds):
            start = time.process_time()
            side()
            if at:
                taken.append(time.process_time() - start)
    return seconds


def measure_ratio(row: Row, model: Any, rounds: int, scoring: bool = False) -> dict[str, Any]:
    group = group_of(row, model.config.vocab_size)
    if (found := gap(model, group, row)) > 1e-4:
        return {"status": "red", "why": f"gradients differ by {found:.1e} of the largest"}
    make = scoring_of if scoring else step_of
    shared, whole = in_turn([make(model, group, row, each) for each in (True, False)], rounds)
    ratio = statistics.median(a / b for a, b in zip(shared, whole))
    return {"status": "ok", "ratio": ratio, "seconds": statistics.median(shared), "gap": found}


def measure_memory(row: Row, model: Any) -> dict[str, Any]:
    peaks = []
    for size in (2, row.G):
        run = step_of(model, group_of(row, model.config.vocab_size, size), row, True)
        run()  # gradients are there from now on
        forget_peak()
        run()
        peaks.append(resident("VmHWM"))
    return {"status": "ok", "ratio": peaks[1] / peaks[0], "bytes": peaks[1]}


def measure_trl(row: Row) -> dict[str, Any]:
    """One optimizer step of each trainer, reference included; TRL takes its pairs one at a time."""
    import trl
    from datasets import Dataset  # type: ignore[import-untyped]

    from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer

    V = 32000
    answers = [" " + words(row.n - 1, V, seed) for seed in range(row.G)]  # and the end of text
    prompt = words(row.P, V, 99)
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder, "max_steps": 2, "optim": "sgd", "learning_rate": 1e-3, "save_strategy": "no",
            "report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
            "max_length": 2 * (row.P + row.n), "per_device_train_batch_size": 1,
        }  # fmt: skip
        more: dict[str, Any] = {"processing_class": tokenizer_of(V)}
        pairs = Dataset.from_list([{"prompt": prompt, "chosen": answers[0], "rejected": a} for a in answers[1:]])
        theirs = trl.DPOConfig(**common, gradient_accumulation_steps=len(pairs))
        rows = [{"prompt": prompt, "positives": answers[:1], "negatives": answers[1:]}]
        ours = GroupDPOConfig(**common, strategy="two_pass", micro_batch_sequences=row.micro_batch)
        for make in (
            lambda: GroupDPOTrainer(llama(SMALL | {"vocab_size": V}), args=ours, train_dataset=rows, **more),
            lambda: trl.DPOTrainer(
                llama(SMALL | {"vocab_size": V}), llama(SMALL | {"vocab_size": V}), theirs, train_dataset=pairs, **more
            ),
        ):
            trainer = make()
            start = time.process_time()
            trainer.train()
            seconds.append((time.process_time() - start) / common["max_steps"])
    return {"status": "ok", "ratio": seconds[0] / seconds[1], "seconds": seconds[0]}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | P | n | G | tokens | time or memory | aim |", "|---|---|---|---|---|---|---|"]
    for found in rows:
        row = Row(**found["row"])
        tokens = "" if row.factor is None else f"{row.tokens:.3f}"
        figure = f"{found['ratio']:.3f}" if found["status"] == "ok" else found["why"]
        lines.append(f"| {row.what} | {row.P} | {row.n} | {row.G} | {tokens} | {figure} | {row.aim:.3f} |")
    return "\n".join(lines)


def draw_picture(out: Path, P: int = 1024, n: int = 256, G: int = 8) -> None:
    """The tokens of a group, as whole sequences and with its prompt once."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), width_ratios=[1, 1])
    prompt, response, ink = "#0072b2", "#e69f00", "#333333"
    for side, shared in zip(axes, (False, True)):
        for i in range(G):
            if not shared or i == 0:
                side.barh(i, P, height=0.62, color=prompt)
            elif shared:
                side.plot([P, P], [i - 1, i], color=ink, linewidth=0.8)
            side.barh(i, n, left=P, height=0.62, color=response)
        tokens = P + G * n if shared else G * (P + n)
        side.set_title(
            f"{'the prompt once' if shared else 'whole sequences'}: {tokens:,} tokens",
            fontsize=11,
            color=ink,
            loc="left",
        )
        side.set_xlim(0, P + n + 20)
        side.set_ylim(G - 0.4, -0.6)
        side.set_yticks([])
        side.set_xticks([0, P, P + n])
        side.tick_params(colors=ink, labelsize=9, length=3)
        for name in ("top", "left", "right"):
            side.spines[name].set_visible(False)
    axes[0].text(P / 2, 0, "prompt", color="white", ha="center", va="center", fontsize=9)
    axes[1].text(P / 2, 0, "prompt", color="white", ha="center", va="center", fontsize=9)
    for side in axes:
        side.text(P + n / 2, G - 1, "response", color=ink, ha="center", va="center", fontsize=9)
    figure.tight_layout(w_pad=3)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="*", default=[*ROWS], choices=[*ROWS], help="which rows of the table")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each row")
    parser.add_argument("--model", help="folder of the real model; random weights of its shape without it")
    parser.add_argument("--quick", action="store_true", help="prompts and responses an eighth as long")
    parser.add_argument("--json", type=Path, help="the file to write")
    parser.add_argument(
        "--results", type=Path, help="the folder in which to write <processor>/<date>-shared_prompt.json"
    )
    parser.add_argument("--picture", type=Path, help="where to draw the tokens of a group, and nothing else")
    options = parser.parse_args(arguments)
    if options.picture:
        draw_picture(options.picture)
        return
    torch.set_num_threads(1)
    device = torch.device("cpu")
    head = header(device) | {"kind": "shared_prompt", "quick": options.quick, "model": options.model}
    report = Report(head, output_path(options.json, options.results, device, "shared_prompt"))
    for name in options.rows:
        row = ROWS[name]
        if options.quick:
            row = replace(row, P=max(8, row.P // 8), n=max(8, row.n // 8))
        say(f"{name}: {row.what}, P = {row.P}, n = {row.n}, G = {row.G}")
        if name == "memory":
            found = measure_memory(row, llama(SMALL))
        elif name == "trl":
            found = measure_trl(row)
        elif name == "real" and options.model:
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).train()
            found = measure_ratio(row, model, options.rounds)
        else:
            model = llama(SMOLLM2 if name == "real" and not options.quick else SMALL)
            found = measure_ratio(row, model, options.rounds, scoring=name == "scoring")
        report.rows.append({"name": name, "row": asdict(row), "tokens": row.tokens, "aim": row.aim, **found})
        report.write()
        say(str({key: round(value, 4) if isinstance(value, float) else value for key, value in found.items()}))
    report.complete = True
    report.write()
    print(table(report.rows))


if __name__ == "__main__":
    main()
