"""DPO and AdaDPO with TRL's trainer, side by side: what becomes of the likelihood of the chosen answers.

    python examples/adadpo.py

In the probabilities of the answers DPO's gradient is larger on the rejected side. AdaDPO weights the chosen side so
that the two are equal (up to a ceiling of 2). Both learn to rank; with AdaDPO the chosen answers gain more.
"""

from __future__ import annotations

import tempfile

from datasets import Dataset  # type: ignore[import-untyped]
from trl import DPOConfig
from trl_task import SETTINGS, as_pairs, make_groups, make_model, make_tokenizer  # type: ignore[import-not-found]

from groupdpo_kernels import AdaBalance, Objective
from groupdpo_kernels.trainers import DPOTrainer

OBJECTIVES = {"DPO": Objective("sigmoid", beta=0.3), "AdaDPO": Objective("sigmoid", beta=0.3, balance=AdaBalance())}


def main(steps: int = 80) -> dict[str, dict[str, float]]:
    """By method, what TRL logs of the held-out pairs; and `change`, of the chosen answers' log-probability."""
    training, held_out = (Dataset.from_dict(as_pairs(groups)) for groups in make_groups())
    found = {}
    for name, objective in OBJECTIVES.items():
        with tempfile.TemporaryDirectory() as folder:
            trainer = DPOTrainer(
                make_model(),
                args=DPOConfig(folder, max_steps=steps, **SETTINGS),
                train_dataset=training,
                eval_dataset=held_out,
                processing_class=make_tokenizer(),
                objective=objective,
            )
            start = trainer.evaluate()
            trainer.train()
            found[name] = trainer.evaluate()
        found[name]["change"] = found[name]["eval_logps/chosen"] - start["eval_logps/chosen"]
    for name, logged in found.items():
        accuracy, change = logged["eval_rewards/accuracies"], logged["change"]
        print(f"{name:7} held-out reward accuracy {accuracy:.3f}, log p of the chosen answers {change:+.2f}")
    return found


if __name__ == "__main__":
    main()
