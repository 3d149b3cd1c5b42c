"""`GroupDPOConfig(torch_compile=True)`: compiled layers train alike, beside all else that a step may have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make
from tiny_trl import COMMON, GROUPS, check_same, lora, run
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from groupdpo_kernels import Objective
from groupdpo_kernels.models.decoder_layers import KINDS
from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer

MPO = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)
CHECKPOINTS = {"gradient_checkpointing": True}
CASES: dict[str, dict[str, Any]] = {
    "two_pass": {"torch_compile_backend": "aot_eager"},
    "bf16": {"torch_compile_backend": "aot_eager", "strategy": "coupled", "bf16": True},
    "adapter, checkpoints": CHECKPOINTS,
    "reentrant checkpoints": CHECKPOINTS | {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "one_pass": {"strategy": "one_pass", "micro_batch_sequences": 1},
    "packed": {"layout": "packed", "micro_batch_sequences": None, "micro_batch_tokens": 40},
}


@pytest.fixture(autouse=True)
def counters() -> Iterator[Any]:
    """Of dynamo, which begins anew."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def trainer_of(folder: Path, bpe: Any, options: dict[str, Any], model: Any = None, **more: Any) -> Any:
    """Layers that dynamo reads and nothing compiles, unless `options` say otherwise."""
    config = COMMON | {"strategy": "two_pass", "micro_batch_sequences": 3, "share_prompt": False, "max_steps": 2}
    config |= {"output_dir": str(folder), "torch_compile": True, "torch_compile_backend": "eager"} | options
    named = {"train_dataset": GROUPS, "processing_class": bpe, "objective": MPO, **more}
    return GroupDPOTrainer(model or make("llama"), args=GroupDPOConfig(**config), **named)


SLICE = ("two_pass", "adapter, checkpoints")
REST = [pytest.param(case, marks=pytest.mark.compositions) for case in CASES if case not in SLICE]


@pytest.mark.parametrize("case", [*SLICE, *REST])
def test_compiled_layers_train_alike(case: str, counters: Any, tmp_path: Path, bpe: Any) -> None:
    """The same steps; nothing of the model around the layers is compiled; policy and reference share what is."""
    options, more = CASES[case], {"peft_config": lora()} if case.startswith("adapter") else {}
    plain = {**options, "torch_compile": False, "torch_compile_backend": None}
    expected = run(trainer_of(tmp_path / "plain", bpe, plain, **more))
    assert not counters["frames"]
    found = run(trainer_of(tmp_path / "compiled", bpe, options, **more))
    near = {"weights": 0.02, "logs": 1e-2} if options.get("bf16") else {}
    check_same(found, expected, **near)
    assert not isinstance(found[0].model_wrapped, torch._dynamo.OptimizedModule)
    assert counters["frames"]["ok"] > 0 and not counters["graph_break"] and not counters["recompile_limit"]


@pytest.mark.parametrize("compiled", [True, False])
def test_another_trainer_compiles_as_it_was_told(compiled: bool, tmp_path: Path, bpe: Any) -> None:
    """What accelerate compiles is a state of the process. Nothing of it is changed, and it decides nothing here."""
    told = {"torch_compile": True, "torch_compile_backend": "eager"}
    config = GroupDPOConfig(**COMMON | {"output_dir": str(tmp_path), "max_steps": 1} | (told if compiled else {}))
    theirs = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], **told)  # the last one made decides
    other = Trainer(make("llama"), args=theirs)
    ours = GroupDPOTrainer(make("llama"), args=config, train_dataset=GROUPS, processing_class=bpe)
    ours.train()
    assert not isinstance(ours.model_wrapped, torch._dynamo.OptimizedModule)
    assert isinstance(other.accelerator.prepare_model(other.model), torch._dynamo.OptimizedModule)


def test_a_deep_model_compiles_no_more_than_a_shallow_one(counters: Any, tmp_path: Path, bpe: Any) -> None:
    graphs = []
    for depth in (3, 9):
        torch._dynamo.reset()
        counters.clear()
        model = make("llama", num_hidden_layers=depth)
        run(trainer_of(tmp_path, bpe, {}, model))
        graphs.append(counters["stats"]["unique_graphs"])
        for layer in model.model.layers:
            assert layer._compiled_call_impl is not None
    assert graphs[0] == graphs[1] < KINDS


def test_what_is_saved_loads_and_goes_on(tmp_path: Path, bpe: Any) -> None:
    """A layer that is compiled in place keeps its name."""
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(tmp_path, bpe, options)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    again = trainer_of(tmp_path, bpe, options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, saved[name]) and torch.equal(value, again.model.state_dict()[name])
