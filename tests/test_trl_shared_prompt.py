"""`GroupDPOTrainer` with prompts that run once: the steps of whole sequences, fewer tokens, and what it refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import make
from tiny_trl import COMMON, GROUPS, check_same, llama, lora, run, steps

from groupdpo_kernels import AdaBalance, Objective
from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer, StepwiseDPO

MPO = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)
CHECKPOINTS = {"gradient_checkpointing": True}


@pytest.fixture
def make_trainer(tmp_path: Path, bpe: Any) -> Any:
    """Options of the config, arguments of the trainer -> the trainer, on ragged groups, without checkpoints."""

    def make_one(options: dict[str, Any] | None = None, **named: Any) -> Any:
        config = {**COMMON, "output_dir": str(tmp_path / "run"), "strategy": "two_pass", "micro_batch_sequences": 3}
        config |= {"gradient_checkpointing": False} | (options or {})
        named = {"model": llama(), "train_dataset": GROUPS, "processing_class": bpe, "objective": MPO, **named}
        return GroupDPOTrainer(args=GroupDPOConfig(**config), **named)

    return make_one


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two_pass": ({}, {}),
    "one_pass": ({"strategy": "one_pass", "share_prompt": True, "micro_batch_sequences": 1}, {"peft_config": lora()}),
    "coupled": ({"strategy": "coupled", "micro_batch_sequences": None}, {}),
    "tokens": ({"micro_batch_sequences": None, "micro_batch_tokens": 40}, {"objective": Objective("softmax")}),
    "packed": ({"layout": "packed"}, {"objective": Objective("all_pairs", balance=AdaBalance())}),
    "checkpoints": (CHECKPOINTS, {}),
    "checkpoints, coupled, adapter on the head": (
        CHECKPOINTS | {"strategy": "coupled"},
        {"peft_config": lora("lm_head")},
    ),
    "accumulation": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "max_steps": 2}, {}),
    "precomputed": ({"precompute_ref_log_probs": True}, {}),
    "sliding window": ({}, {"model": "gemma2"}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_is_that_of_whole_sequences(make_trainer: Any, name: str) -> None:
    options, named = SETTINGS[name]

    def trained(**changes: Any) -> Any:
        model = make("gemma2", sliding_window=4) if named.get("model") else llama()
        return run(make_trainer(options | changes, **{**named, "model": model}))

    shared, whole = trained(), trained(share_prompt=False)
    assert shared[0].share_prompt and not whole[0].share_prompt
    assert {"loss", "rewards/margins", "num_tokens"} <= check_same(shared, whole)
    counts = [[row["computed_tokens"] for row in steps(each[0])] for each in (shared, whole)]
    assert all(a < b for a, b in zip(*counts)) and counts[1] == sorted(counts[1])
    assert shared[0].state.total_flos < whole[0].state.total_flos


def test_evaluation_and_what_it_computes(make_trainer: Any) -> None:
    losses = [make_trainer({"share_prompt": share}, eval_dataset=GROUPS).evaluate() for share in ("auto", False)]
    assert losses[0]["eval_loss"] == pytest.approx(losses[1]["eval_loss"], rel=1e-5)


def test_a_model_that_cannot_share_says_so_once(make_trainer: Any) -> None:
    config = transformers.MambaConfig(vocab_size=509, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.warns(UserWarning, match="a prompt runs again for each of its responses: MambaForCausalLM") as seen:
        trainer = make_trainer(model=transformers.MambaForCausalLM(config))
    assert not trainer.share_prompt and sum("a prompt runs again" in str(w.message) for w in seen) == 1
    with pytest.raises(ValueError, match=r"share_prompt must be 'auto' or False here: MambaForCausalLM.*; got True"):
        make_trainer({"share_prompt": True}, model=transformers.MambaForCausalLM(config))
    with pytest.raises(
        ValueError, match=r"share_prompt must be 'auto' or False here: reentrant checkpoints.*; got True"
    ):
        make_trainer({"share_prompt": True, **CHECKPOINTS, "gradient_checkpointing_kwargs": {"use_reentrant": True}})
    with pytest.raises(ValueError, match="share_prompt must be 'auto', True or False; got 'always'"):
        make_trainer({"share_prompt": "always"})


def test_where_auto_does_not_share_without_a_word(make_trainer: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "a prompt runs again")
        assert not make_trainer({"strategy": "one_pass", "micro_batch_sequences": 1}, peft_config=lora()).share_prompt
        assert not make_trainer(model=make("mixtral", router_aux_loss_coef=0.1)).share_prompt
        assert make_trainer({"router_aux_loss_coef": 0.0}, model=make("mixtral")).share_prompt


def test_a_router_counts_a_shared_prompt_once(make_trainer: Any) -> None:
    """Its loss is the mean over prompts and rows, weighted by their positions, without padding."""
    model = make("mixtral", router_aux_loss_coef=0.1)
    options = {"share_prompt": True, "per_device_train_batch_size": len(GROUPS), "max_steps": 2}
    trainer = make_trainer(options | {"strategy": "coupled"}, model=model)
    batch = trainer.data_collator([*trainer.train_dataset])["step"]
    assert all(int((mb.targets == -100).sum()) == 0 for mb in batch.micro_batches)
    row = steps(run(trainer)[0])[0]
    by_hand = 0.0
    model = make("mixtral", router_aux_loss_coef=0.1).eval()
    with torch.no_grad():
        for part in batch.parts:
            score = trainer._forward(model, batch)
            score.aux_coef, score.options, score.tokens = 1.0, {"output_router_logits": True}, batch.computed_tokens
            prefix = score.prefix(part.prompt)
            by_hand += sum(float(score.rows(mb, prefix)[2]) for mb in part.micro_batches)
    assert row["aux_loss"] == pytest.approx(by_hand, rel=1e-4)
    two_pass = steps(run(make_trainer(options, model=make("mixtral", router_aux_loss_coef=0.1)))[0])
    assert two_pass[-1]["aux_loss"] == pytest.approx(steps(trainer)[-1]["aux_loss"], rel=1e-4)


def test_stages_share_too(tmp_path: Path, bpe: Any) -> None:
    def trained(share: Any) -> Any:
        args = GroupDPOConfig(
            **COMMON | {"output_dir": str(tmp_path / str(share)), "share_prompt": share, "max_steps": 2}
        )
        stages = StepwiseDPO(llama(), args, [GROUPS, GROUPS], bpe, objective=MPO)
        stages.train()
        return stages

    shared, whole = trained("auto"), trained(False)
    for stage in (1, 2):
        a, b = (run.history[stage][0] for run in (shared, whole))
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["computed_tokens"] < b["computed_tokens"]
