"""GroupDPO on several processes, under DistributedDataParallel, FSDP2 or DeepSpeed: README.md has the commands.

    torchrun --nproc-per-node 2 examples/distributed/train.py

Without --model a tiny Llama trains on a CPU for seconds. Each process takes groups of its own; prompts are shared, and
every process scores a part of the reference's log-probabilities before training.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from groupdpo_kernels import Objective
from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer

sys.path.append(str(Path(__file__).parent.parent))


def tiny() -> tuple[Any, Any, list[dict[str, Any]], dict[str, Any]]:
    """(model, tokenizer, rows, options) of the task in trl_task.py."""
    from trl_task import SETTINGS, make_groups, make_model, make_tokenizer  # type: ignore[import-not-found]

    options = {**SETTINGS, "per_device_train_batch_size": 4, "max_steps": 60}
    return make_model(), make_tokenizer(), make_groups()[0], options


def loaded(name: str, data: Path) -> tuple[Any, Any, list[dict[str, Any]], dict[str, Any]]:
    """(model, tokenizer, rows, options) of a real run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [json.loads(line) for line in data.read_text().splitlines() if line]
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    return model, AutoTokenizer.from_pretrained(name), rows, options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="name or folder of a causal LM")
    parser.add_argument("--data", type=Path, help="JSONL file of preferences")
    parser.add_argument("--out", default="build/distributed", help="folder of checkpoints and of the trained model")
    given = parser.parse_args()
    if (given.model is None) != (given.data is None):
        parser.error("--model and --data must be given together")
    model, tokenizer, rows, options = tiny() if given.model is None else loaded(given.model, given.data)
    config = GroupDPOConfig(
        output_dir=given.out,
        strategy="two_pass",  # the memory of one micro-batch, however large a group is
        micro_batch_sequences=4,
        precompute_ref_log_probs=True,  # each process scores a part; no second model is held
        **options,
    )
    trainer = GroupDPOTrainer(
        model,
        args=config,
        train_dataset=rows,
        processing_class=tokenizer,
        objective=Objective("mpo", beta=2.0, average=True, nll_weight=1.0),
    )
    trainer.train()
    trainer.save_model(f"{given.out}/model")
    if trainer.is_world_process_zero():
        last = [row for row in trainer.state.log_history if "loss" in row][-1]
        ranks, shared = config.world_size, trainer.share_prompt
        print(f"{ranks} processes, prompts shared: {shared}, reward accuracy {last['rewards/accuracies']:.3f}")


if __name__ == "__main__":
    main()
