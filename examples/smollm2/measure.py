"""Time and peak memory of a training step of a real model: TRL's DPOTrainer, plain and patched, and GroupDPOTrainer.

    python examples/smollm2/prepare.py smollm2 && python examples/smollm2/measure.py smollm2
    python examples/smollm2/measure.py --quick      # a tiny random model, no packages, half a minute

All take the same groups: one right answer and a few wrong ones to an addition with worked examples before it, LoRA on
every linear layer, the reference the model without its adapter. TRL has them as pairs, the right answer with each wrong
one. Every row is a fresh process. Memory is what the process holds at the step's peak beyond what it holds before
(Linux). A row that fails says so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

import torch
from additions import QUIET, lora, start  # type: ignore[import-not-found]  # beside this file

from groupdpo_kernels import Objective
from groupdpo_kernels.files import write_json
from groupdpo_kernels.memory.rss import forget_peak, resident

ROWS = ["TRL", "TRL, patched", "GroupDPOTrainer, whole sequences", "GroupDPOTrainer, prompt shared"]
OBJECTIVE = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)


def make_groups(groups: int, size: int, examples: int) -> list[dict[str, Any]]:
    """Each with one right answer. Plain text, for both trainers read that alike."""
    before = "".join(f"{a} + {a // 3} = {a + a // 3}\n" for a in range(10, 10 + examples))
    return [
        {
            "prompt": f"{before}{a} + {a // 2} =",
            "positives": [f" {a + a // 2}"],
            "negatives": [f" {a + a // 2 + i}" for i in range(1, size)],
        }
        for a in range(40, 40 + groups)
    ]


def trainer_of(row: str, options: argparse.Namespace, folder: str) -> Any:
    groups = make_groups(options.groups, options.size, options.examples)
    common: dict[str, Any] = {
        **QUIET,
        "output_dir": folder,
        "max_steps": options.steps,
        "learning_rate": 1e-4,
        "logging_steps": options.steps,
    }
    model, task = start(options.checkpoint)
    named: dict[str, Any] = {"processing_class": task.tokenizer, "peft_config": lora()}
    if row.startswith("GroupDPOTrainer"):
        from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer

        ours = GroupDPOConfig(
            **common,
            per_device_train_batch_size=options.groups,
            strategy="two_pass",
            share_prompt=row.endswith("shared"),
        )
        return GroupDPOTrainer(model, args=ours, train_dataset=groups, objective=OBJECTIVE, **named)
    import trl
    from datasets import Dataset  # type: ignore[import-untyped]

    from groupdpo_kernels.integrations.trl import patch_trl

    pairs = [
        {"prompt": group["prompt"], "chosen": group["positives"][0], "rejected": wrong}
        for group in groups
        for wrong in group["negatives"]
    ]
    if row.endswith("patched"):
        patch_trl()
    config = trl.DPOConfig(**common, per_device_train_batch_size=len(pairs))
    return trl.DPOTrainer(model, args=config, train_dataset=Dataset.from_list(pairs), **named)


def measure_here(row: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the median step, the first left out, and MiB of the last."""
    from transformers import TrainerCallback

    seconds, mib = [], 0.0

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            forget_peak()
            self.before, self.start = resident("VmRSS"), time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            nonlocal mib
            seconds.append(time.process_time() - self.start)
            mib = (resident("VmHWM") - self.before) / 2**20

    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(row, options, folder)
        trainer.add_callback(Watch())
        trainer.train()
    return {"seconds": statistics.median(seconds[1:]), "mib": mib}


def measure(row: str, arguments: list[str]) -> dict[str, float] | str:
    """In a fresh process, whose allocator gives freed blocks back at once; a text says why there are no figures."""
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *arguments, "--row", row]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=os.environ | at_once | threads, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A training step of SmolLM2-135M, four ways")
    parser.add_argument("checkpoint", type=Path, nargs="?", help="the folder that prepare.py has written")
    parser.add_argument("--quick", action="store_true", help="a tiny random model, to see that it runs")
    parser.add_argument("--groups", type=int, default=2, help="of a step; default: %(default)s")
    parser.add_argument("--size", type=int, default=4, help="answers of a group; default: %(default)s")
    parser.add_argument("--examples", type=int, default=12, help="worked before each question; default: %(default)s")
    parser.add_argument("--steps", type=int, default=3, help="the first is not counted; default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick == (options.checkpoint is not None):
        parser.error("give a checkpoint, which prepare.py writes, or --quick")
    if options.steps < 2:
        parser.error(f"--steps must be at least 2; got {options.steps}")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.row is not None:
        print(json.dumps(measure_here(options.row, options)))
        return 0
    print(f"{options.groups} groups of {options.size} answers, {torch.get_num_threads()} threads")
    print(f"{'one step of':34}{'CPU seconds':>12}{'of TRL':>8}{'peak MiB':>10}", flush=True)
    of_trl, failed, kept = math.nan, 0, {}
    for row in ROWS:
        found = kept[row] = measure(row, arguments)
        if options.json is not None:
            settings = {name: getattr(options, name) for name in ("groups", "size", "examples", "steps", "quick")}
            write_json(options.json, settings | {"threads": torch.get_num_threads(), "rows": kept})
        if isinstance(found, str):
            failed += 1
            print(f"{row:34}{found}", flush=True)
            continue
        of_trl = found["seconds"] if row == "TRL" else of_trl
        print(f"{row:34}{found['seconds']:12.2f}{found['seconds'] / of_trl:8.2f}{found['mib']:10.0f}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
