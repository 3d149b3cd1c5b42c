"""A training step of TRL's DPOTrainer beside ours: its time, and its peak memory beyond what rests between steps.

    python bench/trl_steps.py                                     on two cores an hour; prints the tables
    python bench/trl_steps.py --vocabularies 32000 --dtype bfloat16 --rounds 1 --rows pairs
    python bench/trl_steps.py --device cuda --results bench/results  also writes bench/results/<gpu>/<date>-steps.json

On a CPU the model is a Llama of one layer and width 1024 from config, its head tied: small but for the head. On a GPU
it is one of the shapes of groupdpo_kernels.memory.workload, of 1.2 billion parameters. Random weights, SGD. Rows:

- pairs: eight of them; TRL as it is, and after `patch_trl()`;
- LoRA: the same with an adapter on the attention, so that the head is frozen;
- groups: of one positive; TRL on the pairs that they flatten to, as it is and accelerated, and `GroupDPOTrainer`, with
  the graph of the whole step and in two passes;
- layers: `GroupDPOTrainer` in two passes, with its layers compiled and without; a prompt runs once for each response.

Every row is a fresh process, in rounds over all rows, so that the machine is the same for all; a figure is the median
of all steps but the first two of each process. Memory on a CPU: Linux, as bench/memory.py has it; on a GPU the peak of
PyTorch's allocator. A row that fails (out of memory, say) is a row that says so. No network.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench.memory import ROOT, MiB
from bench.report import Report, header, output_path
from bench.run import say
from groupdpo_kernels.memory.rss import forget_peak, resident
from groupdpo_kernels.memory.workload import MODELS, Workload, build_model

ROWS = {
    "pairs": ["trl", "trl, accelerated"],
    "LoRA": ["trl", "trl, accelerated"],
    "groups": ["trl", "trl, accelerated", "GroupDPOTrainer, coupled", "GroupDPOTrainer, two_pass"],
    "layers": ["GroupDPOTrainer, two_pass, prompts apart", "GroupDPOTrainer, two_pass, compiled"],
}
HEAD = "head"  # the model that is small but for it
WIDTH = 1024


@dataclass(frozen=True)
class Setting:
    """What all rows of a table share."""

    device: str
    model: str
    V: int
    dtype: str
    tokens: int  # of a response with its prompt
    groups: int  # of a step
    size: int  # responses of a group
    pairs: int
    steps: int

    @property
    def title(self) -> str:
        model = "" if self.model == HEAD else f"{self.model}, "
        return f"{model}V = {self.V}, {self.dtype}, {self.tokens} tokens, {self.groups} x {self.size}"


DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"model": HEAD, "tokens": 128, "groups": 2, "size": 8, "dtype": ["float32", "bfloat16"]},
    "cuda": {"model": "llama-3.2-1b", "tokens": 1024, "groups": 1, "size": 16, "dtype": ["bfloat16"]},
}


def words(count: int, V: int, seed: int) -> str:
    import random

    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(V - 4)}" for _ in range(count))


def tokenizer_of(V: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {name: i for i, name in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(V - 3))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def model_of(setting: Setting) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    if setting.model != HEAD:
        return build_model(Workload(setting.model, dtype=setting.dtype), torch.device(setting.device))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=setting.V, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
        num_attention_heads=8, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def trainer_of(row: str, name: str, setting: Setting, folder: str) -> Any:
    import peft

    from groupdpo_kernels.integrations.trl import patch_trl
    from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer

    V, prompt = setting.V, setting.tokens // 4
    response = setting.tokens - prompt - 1  # and the end of sequence
    common: dict[str, Any] = {
        "output_dir": folder, "max_steps": setting.steps, "optim": "sgd", "learning_rate": 1e-3,
        "logging_steps": setting.steps, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "use_cpu": setting.device == "cpu", "bf16": setting.dtype == "bfloat16", "gradient_checkpointing": False,
        "max_length": 2 * setting.tokens,
    }  # fmt: skip
    more: dict[str, Any] = {"processing_class": tokenizer_of(V)}
    groups = [
        {
            "prompt": words(prompt, V, 1000 * i),
            "positives": [" " + words(response, V, 1000 * i + 1)],
            "negatives": [" " + words(response, V, 1000 * i + j) for j in range(2, setting.size + 1)],
        }
        for i in range(max(setting.groups, setting.pairs))
    ]
    if row == "LoRA":
        more["peft_config"] = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    if name.startswith("GroupDPOTrainer"):
        _, strategy, *rest = name.split(", ")
        options: dict[str, Any] = {
            "strategy": strategy,
            "torch_compile": "compiled" in rest,
            "share_prompt": False if rest else "auto",
        }
        ours = GroupDPOConfig(**common, **options, per_device_train_batch_size=setting.groups)
        return GroupDPOTrainer(model_of(setting), args=ours, train_dataset=groups[: setting.groups], **more)
    import trl
    from datasets import Dataset  # type: ignore[import-untyped]

    flat = [(g["prompt"], g["positives"][0], n) for g in groups[: setting.groups] for n in g["negatives"]]
    pairs = [(g["prompt"], g["positives"][0], g["negatives"][0]) for g in groups[: setting.pairs]]
    pairs = flat if row == "groups" else pairs
    data = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in pairs])
    if name.endswith("accelerated"):
        patch_trl()
    config = trl.DPOConfig(**common, per_device_train_batch_size=len(pairs))
    if row != "LoRA":
        more["ref_model"] = model_of(setting)
    return trl.DPOTrainer(model_of(setting), args=config, train_dataset=data, **more)


def measure_here(row: str, name: str, setting: Setting) -> dict[str, Any]:
    """In a process of its own: seconds of each step, MiB of the last."""
    from transformers import TrainerCallback

    seen: dict[str, Any] = {"seconds": []}
    gpu = setting.device == "cuda"

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            else:
                forget_peak()
            self.before = torch.cuda.memory_allocated() if gpu else resident("VmRSS")
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            seen["seconds"].append(time.perf_counter() - self.start)
            peak = torch.cuda.max_memory_allocated() if gpu else resident("VmHWM")
            seen["mib"] = (peak - self.before) / MiB

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(row, name, setting, folder)
        trainer.add_callback(Watch())
        trainer.train()
    seen["loss"] = trainer.state.log_history[-1]["train_loss"]
    return seen


def measure(row: str, name: str, setting: Setting) -> dict[str, Any]:
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "bench.trl_steps", "--here", json.dumps([row, name, asdict(setting)])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return {"status": "failed", "why": f"ended with {done.returncode}: {last}"}
    return {"status": "ok", **json.loads(done.stdout.splitlines()[-1])}


def table(rows: list[str], setting: Setting, found: list[dict[str, Any]]) -> str:
    lines = ["", f"**{setting.title}**", "", "| step of | trainer | ms | of the first | MiB |", "|---|---|---|---|---|"]
    for row in rows:
        first = None
        for name in ROWS[row]:
            runs = [run for run in found if (run["row"], run["implementation"]) == (row, name)]
            good = [run for run in runs if run["status"] == "ok"]
            if not good:
                lines += [f"| {row} | {name} | {run['why']} | | |" for run in runs[:1]]
                continue
            ms = 1e3 * statistics.median(s for run in good for s in run["seconds"][2:])
            first = ms if name == ROWS[row][0] else first
            ratio = f"{ms / first:.2f}" if first else ""
            mib = statistics.median(run["mib"] for run in good)
            lines.append(f"| {row} | {name} | {ms:.0f} | {ratio} | {mib:.0f} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A step of TRL's DPOTrainer beside ours.")
    add = parser.add_argument
    add("--device", choices=list(DEFAULTS), help="default: cuda where there is one")
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    add("--model", choices=[HEAD, *MODELS], help=f"default: {HEAD} on a CPU, llama-3.2-1b on a GPU")
    add("--vocabularies", nargs="+", type=int, default=[32000, 128256], help=f"of the model {HEAD}")
    add("--dtype", nargs="+", choices=["float32", "bfloat16"])
    add("--tokens", type=int, help="of a response with its prompt; default: 128 on a CPU, 1024 on a GPU")
    add("--groups", type=int, help="of a step; default: 2 on a CPU, 1 on a GPU")
    add("--size", type=int, help="responses of a group; default: 8 on a CPU, 16 on a GPU")
    add("--pairs", type=int, default=8, help="of a step; default: %(default)s")
    add("--steps", type=int, default=5, help="of each process, the first two not counted; default: %(default)s")
    add("--rounds", type=int, default=2, help="processes of each row; default: %(default)s")
    add("--json", type=Path, help="write the results here")
    add("--results", type=Path, help="write the results to RESULTS/<device>/<date>-steps.json")
    add("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 3:
        parser.error(f"--steps must be at least 3; got {options.steps}")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.model != HEAD:
        options.vocabularies = [MODELS[options.model]["vocab_size"]]
    return options


def main() -> int:
    options = parse()
    if options.here:
        row, name, fields = json.loads(options.here)
        print(json.dumps(measure_here(row, name, Setting(**fields))))
        return 0
    device = torch.device(options.device)
    path = output_path(options.json, options.results, device, "-steps")
    report = Report(header(device), path)
    shared = {name: getattr(options, name) for name in ("model", "tokens", "groups", "size", "pairs", "steps")}
    for V in options.vocabularies:
        for dtype in options.dtype:
            setting = Setting(device=options.device, V=V, dtype=dtype, **shared)
            names = [(row, name) for row in options.rows for name in ROWS[row]]
            found: list[dict[str, Any]] = []
            for i in range(options.rounds):
                for row, name in names[:: (-1) ** i]:
                    found.append({"row": row, "implementation": name, **measure(row, name, setting)})
                    report.rows.append(asdict(setting) | found[-1])
                    report.write()
                    say(f"{setting.title}: {row}, {name}: {in_words(found[-1])}")
            print(table(options.rows, setting, found), flush=True)
    report.complete = True
    report.write()
    return int(any(row["status"] != "ok" for row in report.rows))


def in_words(run: dict[str, Any]) -> str:
    if run["status"] != "ok":
        return run["why"]
    times = ", ".join(f"{1e3 * s:.0f}" for s in run["seconds"])
    return f"{times} ms, {run['mib']:.0f} MiB, loss {run['loss']:.4f}"


if __name__ == "__main__":
    raise SystemExit(main())
