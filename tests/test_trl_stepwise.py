"""`StepwiseDPO`: in every stage the reference is the model as the stage before left it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import trl
from tiny_trl import COMMON, GROUPS, PAIRS, llama, lora
from torch import nn

from groupdpo_kernels import Objective
from groupdpo_kernels.models.head_call import HeadCall
from groupdpo_kernels.trainers import DPOTrainer, GroupDPOConfig, GroupDPOTrainer, StepwiseDPO

LN2 = pytest.approx(math.log(2), abs=1e-6)
ALL_PAIRS = Objective("all_pairs", beta=0.5)
SETTINGS = COMMON | {"max_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-3}


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def parts(rows: Any) -> list[Any]:
    return [rows.select([0, 1]), rows.select([2, 3]), rows]


def first_losses(run: StepwiseDPO) -> dict[int, float]:
    return {stage: logged[0]["loss"] for stage, logged in run.history.items()}


class Recorder(transformers.TrainerCallback):
    """Weights at the end of every stage; and an exception in the one asked for."""

    def __init__(self, fail_in: int = 0) -> None:
        self.ends: list[torch.Tensor] = []
        self.begun, self.fail_in = 0, fail_in

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.begun == self.fail_in and state.global_step == 2:
            raise KeyboardInterrupt

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun += 1

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.ends.append(weights(model))


@pytest.fixture
def stages(tmp_path: Path, bpe: Any) -> Any:
    """kind of config, model, arguments -> StepwiseDPO that has not trained yet."""

    def make_one(kind: str = "groups", model: Any = None, options: dict[str, Any] | None = None, **named: Any) -> Any:
        settings = {**SETTINGS, "output_dir": str(tmp_path / "sdpo"), **(options or {})}
        if kind == "groups":
            args, rows, objective = GroupDPOConfig(micro_batch_sequences=3, **settings), GROUPS, ALL_PAIRS
        else:
            args, rows, objective = trl.DPOConfig(**settings), PAIRS, Objective(beta=0.5)
        named = {"parts": parts(rows), "processing_class": bpe, "objective": objective, **named}
        return StepwiseDPO(llama() if model is None else model, args, **named)

    return make_one


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["groups", "pairs"])
def test_every_stage_starts_at_ln_2(stages: Any, kind: str, with_lora: bool) -> None:
    more = {"peft_config": lora("lm_head") if kind == "groups" else lora()} if with_lora else {}
    recorder = Recorder()
    run = stages(kind, callbacks=[recorder], **more)
    names, start = set(run.model.state_dict()), weights(run.model)
    run.train()
    assert first_losses(run) == {1: LN2, 2: LN2, 3: LN2}
    last = {stage: logged[-2]["loss"] for stage, logged in run.history.items()}
    assert all(loss < math.log(2) - 1e-3 for loss in last.values())  # it learns, so ln 2 is no standing still
    for before, after in zip([start, *recorder.ends], recorder.ends):
        assert not torch.equal(before, after)
    assert set(run.model.state_dict()) == names
    assert not with_lora or [*run.model.peft_config] == ["default"]
    assert not any("forward" in module.__dict__ for module in run.model.modules())


def test_stages_are_trainers_one_after_the_other(stages: Any, tmp_path: Path, bpe: Any) -> None:
    """By hand: a trainer for each part, with a copy of the model as its reference."""
    steady = {
        "optim": "sgd",
        "learning_rate": 0.05,
    }  # AdamW would divide the roundings of small gradients by their size
    run = stages(options=steady)
    run.train()
    model = llama()
    for k, part in enumerate(parts(GROUPS)):
        config = GroupDPOConfig(output_dir=str(tmp_path / str(k)), micro_batch_sequences=3, **SETTINGS | steady)
        GroupDPOTrainer(model, copy.deepcopy(model), config, part, processing_class=bpe, objective=ALL_PAIRS).train()
    moved = (weights(model) - weights(llama())).norm()
    assert moved > 0.1 and (weights(run.model) - weights(model)).norm() < 1e-5 * moved


def test_trl_alone_keeps_the_first_reference(tmp_path: Path, bpe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What StepwiseDPO is for: TRL's second trainer on the same model loads the first checkpoint again, or stops at the
    adapter that the first one copied."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    llama().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    config = trl.DPOConfig(output_dir=str(tmp_path / "run"), **SETTINGS)
    firsts = {}
    for kind in (trl.DPOTrainer, DPOTrainer):
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model")
        for _ in range(2):
            trainer = kind(model, args=config, train_dataset=PAIRS, processing_class=bpe)
            trainer.train()
        firsts[kind] = trainer.state.log_history[0]["loss"]
    assert firsts[DPOTrainer] == LN2 and abs(firsts[trl.DPOTrainer] - math.log(2)) > 1e-3

    adapted = peft.get_peft_model(llama(), lora())
    trl.DPOTrainer(adapted, args=config, train_dataset=PAIRS, processing_class=bpe).train()
    with pytest.raises(ValueError, match=r"Adapter with name 'ref' already exists"):
        trl.DPOTrainer(adapted, args=config, train_dataset=PAIRS, processing_class=bpe)


@pytest.mark.parametrize("kind", ["groups", "pairs"])
def test_an_interrupted_run_ends_with_the_same_weights(stages: Any, kind: str, tmp_path: Path) -> None:
    whole = stages(kind, options={"output_dir": str(tmp_path / "whole")}).train()
    with pytest.raises(KeyboardInterrupt):
        stages(kind, callbacks=[Recorder(fail_in=2)]).train()
    again = stages(kind)
    again.train()
    assert [*again.history] == [2, 3] and first_losses(again) == {2: LN2, 3: LN2}
    assert torch.equal(weights(again.model), weights(whole))
    done = stages(kind, options={"logging_steps": 2})
    done.train()
    assert not done.history and torch.equal(weights(done.model), weights(whole))
    other = stages(kind, options={"learning_rate": 2e-3})
    other.train()
    assert [*other.history] == [1, 2, 3] and not torch.equal(weights(other.model), weights(whole))


def test_bfloat16(stages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast is on when a part is scored, too, and no wrapper of it stays on the model."""
    run = stages(options={"bf16": True}, peft_config=lora())
    on: list[bool] = []
    score = HeadCall._score

    def noted(call: HeadCall, *hidden: torch.Tensor) -> torch.Tensor:
        on.append(torch.is_autocast_enabled("cpu"))
        return score(call, *hidden)

    monkeypatch.setattr(HeadCall, "_score", noted)
    run.train()
    assert on and all(on)
    # A part is scored in another batch than it trains in, and bfloat16 GEMMs may round by their shape.
    assert first_losses(run) == dict.fromkeys((1, 2, 3), pytest.approx(math.log(2), abs=2e-3))
    assert not any("forward" in module.__dict__ for module in run.model.modules())


def test_what_is_wrong(stages: Any, bpe: Any, tmp_path: Path) -> None:
    adapted = peft.get_peft_model(llama(), lora())
    with pytest.raises(ValueError, match="peft_config must be None for a model that has an adapter; got both"):
        stages(model=adapted, peft_config=lora())
    adapted.add_adapter("ref", lora())
    with pytest.raises(ValueError, match=r"an adapter named 'ref', .*delete_adapter\('ref'\)"):
        stages(model=adapted)
    with pytest.raises(ValueError, match=r"objective must have a reference, .*; got Objective\(loss='simpo'"):
        stages("pairs", objective=Objective("simpo"))
    with pytest.raises(ValueError, match=r"sync_ref_model must be False: .*; got True"):
        stages("pairs", options={"sync_ref_model": True})
    with pytest.raises(ValueError, match="parts must be at least one; got none"):
        stages(parts=[]).train()
    with pytest.raises(ValueError, match="stage 2_dataset must hold a group that can be used; got none"):
        stages(parts=[GROUPS, []])
    with pytest.raises(TypeError, match=r"args must be a GroupDPOConfig or a trl.DPOConfig; got TrainingArguments"):
        StepwiseDPO(llama(), transformers.TrainingArguments(str(tmp_path), use_cpu=True), [PAIRS], bpe)
