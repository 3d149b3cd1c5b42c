"""A training step of TRL's DPOTrainer beside ours: its time, and its peak memory beyond what rests between steps.

    python bench/trl_steps.py                                     fifteen minutes on two cores; prints the tables
    python bench/trl_steps.py --vocabularies 32000 --dtype bfloat16 --rounds 1 --rows pairs

The model is a Llama of one layer and width 1024 from config, its head tied, under SGD: small but for the head. Rows:

- pairs: eight of them; TRL as it is, and after `accelerate()`;
- LoRA: the same with an adapter on the attention, so that the head is frozen;
- groups: two of a positive and seven negatives; TRL on the fourteen pairs that they flatten to, as it is and
  accelerated, and `GroupDPOTrainer`, with the graph of the whole step and in two passes.

Every row is a fresh process (bench/memory.py says how its memory is read), in rounds over all rows, so that the machine
is the same for all; a figure is the median of all steps but the first two of each process. CPU: Linux. With TRL alone,
no network.
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
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench.memory import ROOT, MiB
from groupdpo_kernels.resident import forget_peak, resident

ROWS = {
    "pairs": ["trl", "trl, accelerated"],
    "LoRA": ["trl", "trl, accelerated"],
    "groups": ["trl", "trl, accelerated", "GroupDPOTrainer, coupled", "GroupDPOTrainer, two_pass"],
}
PROMPT, RESPONSE, WIDTH = 32, 95, 1024  # tokens, less the end of sequence
GROUPS, SIZE, PAIRS = 2, 8, 8


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


def model_of(V: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1, num_attention_heads=8,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def trainer_of(row: str, name: str, V: int, dtype: str, steps: int, folder: str) -> Any:
    import peft
    import trl
    from datasets import Dataset  # type: ignore[import-untyped]

    from groupdpo_kernels.integrations.trl import GroupDPOConfig, GroupDPOTrainer, accelerate

    common: dict[str, Any] = {
        "output_dir": folder, "max_steps": steps, "optim": "sgd", "learning_rate": 1e-3, "logging_steps": steps,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": dtype == "bfloat16",
        "gradient_checkpointing": False, "max_length": 256,
    }  # fmt: skip
    more: dict[str, Any] = {"processing_class": tokenizer_of(V)}
    groups = [
        {
            "prompt": words(PROMPT, V, 1000 * i),
            "positives": [" " + words(RESPONSE, V, 1000 * i + 1)],
            "negatives": [" " + words(RESPONSE, V, 1000 * i + j) for j in range(2, SIZE + 1)],
        }
        for i in range(max(GROUPS, PAIRS))
    ]
    if row == "LoRA":
        more["peft_config"] = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    if name.startswith("GroupDPOTrainer"):
        strategy = name.partition(", ")[2]
        ours = GroupDPOConfig(**common, strategy=strategy, per_device_train_batch_size=GROUPS)
        return GroupDPOTrainer(model_of(V), args=ours, train_dataset=groups[:GROUPS], **more)
    flat = [(g["prompt"], g["positives"][0], n) for g in groups[:GROUPS] for n in g["negatives"]]
    pairs = flat if row == "groups" else [(g["prompt"], g["positives"][0], g["negatives"][0]) for g in groups[:PAIRS]]
    data = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in pairs])
    if name.endswith("accelerated"):
        accelerate()
    config = trl.DPOConfig(**common, per_device_train_batch_size=len(pairs))
    if row != "LoRA":
        more["ref_model"] = model_of(V)
    return trl.DPOTrainer(model_of(V), args=config, train_dataset=data, **more)


def measure_here(row: str, name: str, V: int, dtype: str, steps: int) -> dict[str, Any]:
    """In a process of its own: seconds of each step, MiB of the last."""
    from transformers import TrainerCallback

    seen: dict[str, Any] = {"seconds": []}

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.before = resident("VmRSS")
            forget_peak()
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seen["seconds"].append(time.perf_counter() - self.start)
            seen["mib"] = (resident("VmHWM") - self.before) / MiB

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(row, name, V, dtype, steps, folder)
        trainer.add_callback(Watch())
        trainer.train()
    seen["loss"] = trainer.state.log_history[-1]["train_loss"]
    return seen


def measure(*request: Any) -> dict[str, Any]:
    import torch

    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "bench.trl_steps", "--here", json.dumps(request)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{request} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[str], V: int, dtype: str, found: dict[Any, list[dict[str, Any]]]) -> str:
    lines = ["", f"**V = {V}, {dtype}**", "", "| step of | trainer | ms | of TRL's | MiB |", "|---|---|---|---|---|"]
    for row in rows:
        first = 0.0
        for name in ROWS[row]:
            runs = found.get((row, name, V, dtype), [])
            if not runs:
                continue
            ms = 1e3 * statistics.median(s for run in runs for s in run["seconds"][2:])
            first = first or ms
            mib = statistics.median(run["mib"] for run in runs)
            lines.append(f"| {row} | {name} | {ms:.0f} | {ms / first:.2f} | {mib:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="A step of TRL's DPOTrainer beside ours.")
    add = parser.add_argument
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    add("--vocabularies", nargs="+", type=int, default=[32000, 128256])
    add("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    add("--steps", type=int, default=5, help="of each process, the first two not counted; default: %(default)s")
    add("--rounds", type=int, default=2, help="processes of each row; default: %(default)s")
    add("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 3:
        parser.error(f"--steps must be at least 3; got {options.steps}")
    if options.here:
        print(json.dumps(measure_here(*json.loads(options.here))))
        return
    from bench.run import say

    found: dict[Any, list[dict[str, Any]]] = {}
    for V in options.vocabularies:
        for dtype in options.dtype:
            names = [(row, name) for row in options.rows for name in ROWS[row]]
            for i in range(options.rounds):
                for row, name in names[:: (-1) ** i]:
                    seen = measure(row, name, V, dtype, options.steps)
                    found.setdefault((row, name, V, dtype), []).append(seen)
                    times = ", ".join(f"{1e3 * s:.0f}" for s in seen["seconds"])
                    say(f"{V} {dtype} {row}: {name}: {times} ms, {seen['mib']:.0f} MiB, loss {seen['loss']:.4f}")
            print(table(options.rows, V, dtype, found), flush=True)


if __name__ == "__main__":
    main()
