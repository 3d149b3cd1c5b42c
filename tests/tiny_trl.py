"""Pairs and groups as rows, and runs of real trainers on tiny models that two of them can be compared by."""

from __future__ import annotations

import copy
import os
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from tiny_models import make
from torch import Tensor, nn

# Lengths differ within and between rows, and there are two batches of two.
PROMPTS = ["Tea?", "How long does tea steep?", "Be brief.", "Hi."]
CHOSEN = [" Green.", " Three minutes.", " Hello.", " Hello. Tea?"]
REJECTED = [" Coffee.", " An hour. No idea.", " No.", " No idea."]
PAIRS = Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED})
GROUPS = Dataset.from_dict(
    {
        "prompt": PROMPTS,
        "positives": [[" Green.", " Hi. Green tea."], [" Three minutes."], [" Hello."], [" Hello. Tea?", " Tea?"]],
        "negatives": [[" Coffee."], [" An hour. No idea.", " No.", " Tea."], [" No.", " Be brief."], [" No idea."]],
    }
)
COMMON: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "optim": "sgd",  # a gradient's rounding stays a rounding; Adam would divide small ones by their own size
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}
_LLAMA = make("llama")


def llama() -> nn.Module:
    """The same weights each time."""
    return copy.deepcopy(_LLAMA)


def lora(*more: str, **changes: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", *more], **changes})


def trainable(trainer: Any) -> Tensor:
    return torch.cat([x.detach().flatten() for x in trainer.model.parameters() if x.requires_grad])


def run(trainer: Any) -> tuple[Any, Tensor, Tensor]:
    """The trainer after its run; the trainable weights before and after."""
    start = trainable(trainer)
    trainer.train()
    return trainer, start, trainable(trainer)


def steps(trainer: Any) -> list[dict[str, float]]:
    """What was logged of each step, less the timings."""
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [{k: v for k, v in row.items() if "time" not in k and "per_second" not in k} for row in rows]


def check_same(ours: Any, theirs: Any, *, weights: float = 1e-5, logs: float = 1e-5, but: str = "-") -> set[str]:
    """The runs of two trainers: the same weights, relative to how far they moved, and the same numbers in every step
    where both log them, but for names that begin with `but` and for computed_tokens, which padding and shared prompts
    change. Returns the names of what was compared."""
    (a, start, found), (b, also, expected) = ours, theirs
    moved = (expected - start).norm()
    assert torch.equal(start, also) and moved > 1e-3 * start.norm()
    assert (found - expected).norm() < weights * moved, f"{(found - expected).norm() / moved:.1e}"
    names: set[str] = set()
    steps_of_a, steps_of_b = steps(a), steps(b)
    assert len(steps_of_a) == len(steps_of_b) > 1
    for row, wanted in zip(steps_of_a, steps_of_b):
        names = {name for name in row.keys() & wanted.keys() if not name.startswith((but, "computed_tokens"))}
        if row["rewards/margins"] == pytest.approx(0, abs=1e-6):  # all ties, which a rounding decides
            assert row is steps_of_a[0]
            row["rewards/accuracies"] = wanted["rewards/accuracies"]
        torch.testing.assert_close(
            {k: row[k] for k in sorted(names)}, {k: wanted[k] for k in sorted(names)}, rtol=logs, atol=logs
        )
    return names


def run_as_rank(rank: int, port: int, folder: str, weights_of_rows: list[float] | None = None) -> None:
    """Two ranks of one group each, of different numbers of micro-batches; saves what each ends with. The second rank
    has no memory for "auto" to keep a whole graph in."""
    rows = GROUPS if weights_of_rows is None else GROUPS.add_column("weight", weights_of_rows)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", **address)
    torch.set_num_threads(1)
    from tiny_tokenizers import byte_level_bpe

    from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer, group_dpo

    found = {}
    for strategy in ("two_pass", "one_pass", "coupled", "auto"):
        if rank == 1 and strategy == "auto":
            group_dpo.memory_of = lambda *_: 1000
        options = {"per_device_train_batch_size": 1, "micro_batch_sequences": 2, "strategy": strategy}
        config = GroupDPOConfig(output_dir=f"{folder}/{strategy}-{rank}", **COMMON | options)
        trainer = GroupDPOTrainer(llama(), args=config, train_dataset=rows, processing_class=byte_level_bpe())
        _, _, weights = run(trainer)
        assert trainer.strategy == ("two_pass" if strategy == "auto" else strategy)
        found[strategy] = type(trainer.model_wrapped).__name__, weights, steps(trainer)
    torch.save(found, f"{folder}/{rank}.pt")
