"""sDPO in a trainer: pairs in two stages, LoRA, each stage's reference the model as the stage before left it.

    python examples/trl_sdpo.py

The data is split as easy to hard: pairs that the untrained model already orders rightly, by its margin, come first. The
loss of every stage begins at ln 2, where policy and reference are one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from datasets import Dataset  # type: ignore[import-untyped]
from peft import LoraConfig
from trl_task import SETTINGS, as_pairs, make_groups, make_model, make_tokenizer  # type: ignore[import-not-found]

from groupdpo_kernels import Objective, PreferenceGroups
from groupdpo_kernels.data import read_groups, tokenize_groups
from groupdpo_kernels.stepwise import easy_to_hard, take
from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer, StepwiseDPO

STAGES = 2


def main(steps: int = 60) -> dict[int, tuple[float, float]]:
    """First and last loss of each stage."""
    training, _ = make_groups()
    rows = list(tokenize_groups(read_groups(Dataset.from_dict(as_pairs(training))), make_tokenizer()))
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "up_proj", "down_proj", "lm_head"])
    with tempfile.TemporaryDirectory() as folder:
        config = GroupDPOConfig(folder, max_steps=steps, logging_first_step=True, **SETTINGS)
        model, objective = make_model(), Objective("sigmoid", beta=0.3)
        scores = GroupDPOTrainer(model, args=config, train_dataset=rows, objective=objective).score(model, rows)
        parts = [take(rows, part) for part in easy_to_hard(scores, PreferenceGroups.pairs(len(rows)), STAGES)]
        run = StepwiseDPO(model, config, parts, objective=objective, peft_config=adapter)
        run.train()  # the same call goes on after the last whole stage, if it was interrupted
        print(f"stages on disk: {sorted(path.name[:7] for path in Path(folder).glob('stage-*.pt'))}")
    found = {stage: (logged[0]["loss"], logged[-2]["loss"]) for stage, logged in run.history.items()}
    for stage, (first, last) in found.items():
        print(f"stage {stage}: loss from {first:.4f} to {last:.4f}")
    return found


if __name__ == "__main__":
    main()
