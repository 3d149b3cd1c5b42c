"""What the trainers log: ties at the reference, and several sets of evaluation rows apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from tiny_trl import COMMON, GROUPS, PAIRS, llama, lora, run, steps

from groupdpo_kernels import Objective
from groupdpo_kernels.trainers import DPOTrainer, GroupDPOConfig, GroupDPOTrainer

NUMBERS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "num_tokens")


@pytest.fixture
def make_trainer(tmp_path: Path, bpe: Any) -> Any:
    """ "groups" or "pairs", options of its config, arguments of the trainer -> the trainer."""

    def make_one(kind: str, options: dict[str, Any] | None = None, **named: Any) -> Any:
        settings = {**COMMON, "output_dir": str(tmp_path / "run"), **(options or {})}
        named = {"model": llama(), "processing_class": bpe, **named}
        if kind == "groups":
            return GroupDPOTrainer(args=GroupDPOConfig(**settings), **{"train_dataset": GROUPS, **named})
        return DPOTrainer(args=trl.DPOConfig(**settings), **{"train_dataset": PAIRS, **named})

    return make_one


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["groups", "pairs"])
def test_a_policy_that_is_its_reference_scores_ties(make_trainer: Any, kind: str, bf16: bool, with_lora: bool) -> None:
    """The accuracy of the first step is 0.0, as TRL's; a later one is a share of pairs that have come apart."""
    more = {"peft_config": lora()} if with_lora else {}
    trainer, *_ = run(make_trainer(kind, {"bf16": bf16}, **more))
    first, *_, last = steps(trainer)
    assert first["rewards/accuracies"] == 0.0 and abs(first["rewards/margins"]) < 1e-5
    assert last["rewards/accuracies"] > 0 and abs(last["rewards/margins"]) > 1e-3


@pytest.mark.parametrize("strategy", ["two_pass", "one_pass", "coupled"])
@pytest.mark.parametrize("objective", [Objective("all_pairs"), Objective("mpo", beta=50.0, average=True)])
def test_ties_by_every_strategy_and_scale(make_trainer: Any, strategy: str, objective: Objective) -> None:
    for precompute in (False, True):
        options = {"strategy": strategy, "max_steps": 1, "precompute_ref_log_probs": precompute}
        trainer, *_ = run(make_trainer("groups", {**options, "micro_batch_sequences": 1}, objective=objective))
        assert steps(trainer)[0]["rewards/accuracies"] == 0.0


def test_a_small_difference_is_no_tie(make_trainer: Any) -> None:
    """Few steps at a learning rate of 1e-4 move log-probabilities by more than a rounding."""
    trainer, *_ = run(make_trainer("groups", {"learning_rate": 1e-4, "max_steps": 4}))
    assert max(row["rewards/accuracies"] for row in steps(trainer)) > 0.4


@pytest.mark.parametrize("kind", ["groups", "pairs"])
def test_sets_of_evaluation_rows_are_logged_apart(make_trainer: Any, kind: str) -> None:
    """Each set has the numbers that it has alone, under its own name and under no other."""
    rows = GROUPS if kind == "groups" else PAIRS
    sets = {"a": rows.select([0, 1]), "b": rows.select([2, 3])}
    trainer, *_ = run(make_trainer(kind, {"eval_strategy": "steps", "eval_steps": 2}, eval_dataset=sets))
    metrics = trainer.evaluate()
    logged = [row for row in trainer.state.log_history if any(name.startswith("eval_") for name in row)]
    assert not any(name.startswith(("eval_rewards/", "eval_logps/", "eval_num")) for row in logged for name in row)
    for name, part in sets.items():
        alone = trainer.evaluate(part)
        assert {f"eval_{name}_{number}" for number in NUMBERS} <= metrics.keys()
        for number in ("loss", *NUMBERS):
            assert metrics[f"eval_{name}_{number}"] == pytest.approx(alone[f"eval_{number}"], rel=1e-6), number
        assert sum(f"eval_{name}_rewards/margins" in row for row in logged) == 3  # twice in training
    assert metrics["eval_a_rewards/margins"] != metrics["eval_b_rewards/margins"]
    train = [row for row in trainer.state.log_history if "loss" in row]
    assert len(train) == 4 and not any(name.startswith("eval") for row in train for name in row)
    given = trainer.evaluate(sets, metric_key_prefix="test")
    assert "test_a_rewards/margins" in given and not any("eval" in name for name in given)
