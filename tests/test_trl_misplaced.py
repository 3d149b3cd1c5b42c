"""Arguments in the wrong place, under another project's name or misspelt: the error says what was meant."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from tiny_trl import COMMON, GROUPS, PAIRS, llama

from groupdpo_kernels import AdaBalance, Objective
from groupdpo_kernels.data import read_groups, tokenize_groups
from groupdpo_kernels.trainers import DPOTrainer, GroupDPOConfig, GroupDPOTrainer, StepwiseDPO


@pytest.mark.parametrize(
    "option, said",
    [
        (
            {"beta": 0.1},
            r"beta must be given to Objective, .*objective=Objective\(beta=0.1\) to the trainer; got beta=",
        ),
        ({"loss_type": "sigmoid"}, r"loss_type must be given to Objective, .*objective=Objective\('sigmoid'\)"),
        ({"loss_type": ["ipo"]}, r"objective=Objective\('ipo'\)"),
        ({"discopop_tau": 0.1}, r"objective=Objective\(tau=0.1\)"),
        ({"label_smoothing": 0.1}, r"objective=Objective\(label_smoothing=0.1\)"),
        ({"nll_weight": 1.0}, r"objective=Objective\(nll_weight=1.0\)"),
        ({"ld_alpha": 0.5}, "ld_alpha must not be given to GroupDPOConfig: no objective has it; got ld_alpha=0.5"),
        ({"objective": Objective()}, "objective must be given to the trainer, not to GroupDPOConfig"),
        ({"train_dataset": []}, r"train_dataset must be given to the trainer, not to GroupDPOConfig; got .*=a list"),
        ({"stratgy": "coupled"}, "GroupDPOConfig has no option 'stratgy': did you mean strategy"),
        ({"zzz": 1}, "GroupDPOConfig has no option 'zzz'; got zzz=1"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_options_of_the_config(option: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        GroupDPOConfig("out", use_cpu=True, **option)


def test_the_config_is_copied_as_ever() -> None:
    config = GroupDPOConfig("out", use_cpu=True, max_length=7)
    assert copy.deepcopy(config).max_length == copy.copy(config).max_length == 7


@pytest.mark.parametrize(
    "arguments, kind, said",
    [
        ({"loss": "dpo"}, ValueError, "got 'dpo': here it is 'sigmoid'"),
        ({"loss": "DPO"}, ValueError, "got 'DPO': here it is 'sigmoid'"),
        ({"loss": "ada-dpo"}, ValueError, "one of sigmoid, hinge"),
        ({"loss": "AdaDPO"}, ValueError, r"Objective\('sigmoid', balance=AdaBalance\(\)\)"),
        ({"loss": "sigmoyd"}, ValueError, "got 'sigmoyd': did you mean 'sigmoid'"),
        ({"loss": "Plackett-Luce"}, ValueError, "did you mean 'plackett_luce'"),
        ({"loss": ["sigmoid"]}, TypeError, r"loss must be a callable or one of .*; got \['sigmoid'\]"),
        ({"loss": None}, TypeError, r"loss must be a callable or one of .*; got None"),
        ({"beta": "0.1"}, TypeError, r"beta must be a number; got '0.1'"),
        ({"beta": True}, TypeError, "beta must be a number; got True"),
        ({"nll_weight": None}, TypeError, "nll_weight must be a number; got None"),
        ({"gamma": [0.5]}, TypeError, r"gamma must be a number; got \[0.5\]"),
        ({"label_smoothing": "0"}, TypeError, "label_smoothing must be a number; got '0'"),
        ({"average": "yes"}, TypeError, "average must be True, False or None; got 'yes'"),
        ({"average": []}, TypeError, r"average must be True, False or None; got \[\]"),
        ({"balance": True}, TypeError, r"balance must be an AdaBalance or None; got True: write AdaBalance\(\)"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_objectives(arguments: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        Objective(**arguments)
    with pytest.raises(TypeError, match="ceiling must be a number; got '2'"):
        AdaBalance(ceiling="2")  # type: ignore[arg-type]


def test_arguments_of_the_trainers(tmp_path: Path, bpe: Any) -> None:
    ours, theirs = GroupDPOConfig(tmp_path, use_cpu=True), trl.DPOConfig(tmp_path, use_cpu=True, bf16=False)
    with pytest.raises(
        TypeError, match=r"args must be given by name: GroupDPOTrainer\(model, args=config, .*; got a G"
    ):
        GroupDPOTrainer(llama(), ours)
    with pytest.raises(TypeError, match=r"args must be given by name: DPOTrainer\(model, args=config, .*; got a DPO"):
        DPOTrainer(llama(), theirs)
    with pytest.raises(TypeError, match="ref_model must be a model or None; got a Dataset"):
        GroupDPOTrainer(llama(), GROUPS)
    with pytest.raises(TypeError, match="args must be a GroupDPOConfig; got Dataset"):
        GroupDPOTrainer(llama(), None, GROUPS)
    with pytest.raises(TypeError, match=r"args must be a trl.DPOConfig; got GroupDPOConfig"):
        DPOTrainer(llama(), args=ours, train_dataset=PAIRS, processing_class=bpe)
    for trainer, config in ((GroupDPOTrainer, ours), (DPOTrainer, theirs)):
        with pytest.raises(TypeError, match=r"tokenizer must be given to .* as processing_class=; got tokenizer=a "):
            trainer(llama(), args=config, train_dataset=PAIRS, tokenizer=bpe)
        with pytest.raises(TypeError, match=r"beta must be given to Objective, not to .*Objective\(beta=0.1\)"):
            trainer(llama(), args=config, train_dataset=PAIRS, processing_class=bpe, beta=0.1)
        with pytest.raises(TypeError, match=r"has no option 'train_datset': did you mean train_dataset"):
            trainer(llama(), args=config, train_datset=PAIRS, processing_class=bpe)


@pytest.mark.parametrize("kind", ["groups", "pairs"])
def test_parts_are_a_list_of_datasets(kind: str, tmp_path: Path, bpe: Any) -> None:
    make = GroupDPOConfig if kind == "groups" else trl.DPOConfig
    config = make(tmp_path, use_cpu=True, bf16=False)
    tokens = list(tokenize_groups(read_groups(PAIRS), bpe))
    for parts, got in ((PAIRS, "Dataset"), (list(PAIRS), "dict"), (tokens, "TokenGroup"), ({"a": PAIRS}, "dict")):
        with pytest.raises(TypeError, match=rf"parts must be a list of datasets, .*equal_parts.*; got a .*{got}$"):
            StepwiseDPO(llama(), config, parts, bpe)
    with pytest.raises(TypeError, match=r"parts must be a list of datasets, .*; got a int"):
        StepwiseDPO(llama(), config, 2, bpe)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["groups", "pairs"])
def test_sdpo_is_dpo(kind: str, tmp_path: Path, bpe: Any) -> None:
    """Without another objective: the loss is DPO's with beta 0.1, and each stage starts at ln 2."""
    make = GroupDPOConfig if kind == "groups" else trl.DPOConfig
    config = make(str(tmp_path), **COMMON | {"max_steps": 2, "learning_rate": 0.5})
    run = StepwiseDPO(llama(), config, [PAIRS.select([0, 1]), PAIRS.select([2, 3])], bpe)
    assert run.objective == Objective("sigmoid", beta=0.1)
    run.train()
    for logged in run.history.values():
        assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert abs(logged[1]["loss"] - math.log(2)) > 1e-3
        margin = torch.tensor(logged[1]["rewards/margins"])
        assert logged[1]["loss"] >= -torch.nn.functional.logsigmoid(margin) - 1e-6  # convex: Jensen, of pairs alone
    with pytest.raises(ValueError, match=r"groups must be pairs for loss 'sigmoid'; .*all_pairs, margin, mpo"):
        StepwiseDPO(llama(), GroupDPOConfig(str(tmp_path / "b"), **COMMON), [GROUPS], bpe)


def test_each_default_objective_stands_in_the_first_sentence() -> None:
    for trainer, said in (
        (GroupDPOTrainer, 'Objective("mpo", beta=2.0, average=True, nll_weight=1.0)'),
        (DPOTrainer, 'Objective("sigmoid", beta=0.1)'),
        (StepwiseDPO, 'Objective("sigmoid", beta=0.1)'),
    ):
        text = " ".join((trainer.__doc__ or "").split())
        assert said in text.partition(" Args:")[0]
