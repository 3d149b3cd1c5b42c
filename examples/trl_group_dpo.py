"""GroupDPO in a trainer: ragged groups of right and wrong answers, two passes, MPO and the likelihood of right ones.

    python examples/trl_group_dpo.py

Trains a tiny Llama for a few seconds on a CPU and prints the reward accuracy on held-out prompts: of the pairs of a
right and a wrong answer, the share in which the right one has the higher reward. Chance is one half.
"""

from __future__ import annotations

import tempfile

from trl_task import SETTINGS, make_groups, make_model, make_tokenizer  # type: ignore[import-not-found]

from groupdpo_kernels import Objective
from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer

OBJECTIVE = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)


def main(steps: int = 60) -> dict[str, float]:
    training, held_out = make_groups()
    with tempfile.TemporaryDirectory() as folder:
        config = GroupDPOConfig(
            folder,
            max_steps=steps,
            strategy="two_pass",  # the memory of one micro-batch, however large a group is
            micro_batch_sequences=16,
            precompute_ref_log_probs=True,  # the reference scores the data once; no second model is held
            **SETTINGS,
        )
        trainer = GroupDPOTrainer(
            make_model(),
            args=config,
            train_dataset=training,
            eval_dataset=held_out,
            processing_class=make_tokenizer(),
            objective=OBJECTIVE,
        )
        print(trainer.report["train"])
        trainer.train()
        found: dict[str, float] = trainer.evaluate()
    print(f"held-out reward accuracy: {found['eval_rewards/accuracies']:.3f}")
    print(f"share of the right answers in a group's rewards: {found['eval_positive_mass']:.3f}")
    return found


if __name__ == "__main__":
    main()
