"""The Axolotl plugin: on TRL 1.9, which Axolotl pins, as recorded and, where Axolotl can be imported, on itself; and on
the TRL that is installed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recorded_trainers
import tiny_trl
import torch
from recorded_trainers import namespace, trainer
from test_integrations import rows, run
from tiny_models import VOCAB, make

from groupdpo_kernels.integrations import axolotl
from groupdpo_kernels.integrations.trl import TokenStatistics

NAME = "groupdpo_kernels.integrations.axolotl.GroupDPOPlugin"
REAL = importlib.util.find_spec("axolotl") is not None


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    axolotl._plugin.cache_clear()
    yield
    axolotl.unpatch_axolotl()
    axolotl._plugin.cache_clear()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Axolotl 0.19.0, as if installed."""
    for name, module in recorded_trainers.axolotl().items():
        monkeypatch.setitem(sys.modules, name, module)
    installed = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "0.19.0" if n == "axolotl" else installed(n))


def load(name: str = NAME) -> Any:
    """As Axolotl does."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)()


# ---------------------------------------------------------------------------------------------------- TRL 1.9, recorded


@pytest.fixture
def trl_1_9(recorded: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """trl.trainer.dpo_trainer of TRL 1.9.0, as if installed."""
    modules = recorded_trainers.trl_1_9(lambda model: contextlib.nullcontext())
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["trl.trainer.dpo_trainer"]


def of_trl(theirs: Any, **changes: Any) -> Any:
    model = make("llama")
    attributes = {"model": model, "ref_model": make("llama", seed=1), "precompute_ref_logps": False, "beta": 0.5}
    attributes |= {"use_weighting": False, "_metrics": {"train": {}, "eval": {}}}
    return trainer(theirs.DPOTrainer, **attributes | changes)


def pairs() -> dict[str, Any]:
    ids, mask, labels = rows([11, 7, 6, 13], [4, 3, 4, 3], 13)
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": (labels != -100).long()}


@pytest.mark.parametrize("precomputed", [False, True], ids=["reference", "precomputed"])
def test_the_loss_of_trl_1_9(trl_1_9: Any, precomputed: bool) -> None:
    own = of_trl(trl_1_9, precompute_ref_logps=precomputed)
    inputs = pairs()
    if precomputed:
        chosen, rejected = own.compute_ref_log_probs(own.ref_model, inputs)
        inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def call() -> dict[str, Any]:
        own._metrics["train"].clear()
        chosen, _ = own.compute_ref_log_probs(own.ref_model, inputs)
        return {"loss": own._compute_loss(own.model, inputs, False), "reference": chosen}

    expected, gradients, widths = run(own.model, call)
    assert widths == {VOCAB} and own._metrics["train"].keys() > set(axolotl.FROM_LOGITS)
    rewards = own._metrics["train"]["rewards/chosen"]
    load().pre_model_load(namespace(rl="dpo"))
    found, ours, widths = run(own.model, call)
    assert widths == {1} and own.precompute_ref_logps is precomputed
    assert own._metrics["train"] == {"rewards/chosen": pytest.approx(rewards, rel=1e-5)}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(ours, gradients):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7
    loss, outputs = own._compute_loss(own.model, inputs, True)  # for a compute_metrics: real logits
    torch.testing.assert_close(loss, expected["loss"], rtol=1e-5, atol=1e-5)
    assert outputs.logits.shape == (4, 13, VOCAB) and not outputs.logits.requires_grad


def test_weighting_runs_on_real_logits(trl_1_9: Any) -> None:
    own, inputs = of_trl(trl_1_9, use_weighting=True), pairs()
    expected = own._compute_loss(own.model, inputs, False)
    with axolotl.patch_axolotl():
        found = own._compute_loss(own.model, inputs, False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert own._metrics["train"].keys() > set(axolotl.FROM_LOGITS)


# ------------------------------------------------------------------------------------------------- versions and options


def test_versions(trl_1_9: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vars(sys.modules["trl"])["__version__"] = "1.10.1"
    with pytest.raises(RuntimeError, match=r"knows TRL 1\.15 and later, before 2\.0; installed is 1\.10\.1"):
        axolotl.patch_axolotl()
    vars(sys.modules["trl"])["__version__"] = "1.9.3"
    monkeypatch.setattr(trl_1_9.DPOTrainer, "_compute_loss", lambda self, inputs: None)
    with pytest.raises(RuntimeError, match=r"knows TRL 1\.9 and later, before 1\.10, whose .* it takes \(inputs\)"):
        axolotl.patch_axolotl()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.17.0")
    with pytest.raises(RuntimeError, match=r"knows Axolotl 0\.19 and later, before 0\.20; installed is 0\.17\.0"):
        load()


def test_other_stages_are_refused(recorded: None) -> None:
    with pytest.raises(ValueError, match="rl must be dpo or ipo with GroupDPOPlugin; got 'grpo'"):
        load().pre_model_load(namespace(rl="grpo"))
    with pytest.raises(ValueError, match="rl must be dpo or ipo with GroupDPOPlugin; got None"):
        load().pre_model_load(namespace(rl=None))
    with pytest.raises(AttributeError, match="no attribute 'OtherPlugin'"):
        load(NAME.replace("GroupDPO", "Other"))


if not REAL:  # else the TRL that is installed is Axolotl's

    def test_the_installed_trl(recorded: None) -> None:
        """1.15 and later: what integrations.trl does."""
        utils = importlib.import_module("trl.trainer.utils")
        own = utils._ChunkedLogProbFunction
        plugin = load()
        assert isinstance(plugin, sys.modules["axolotl.integrations.base"].BasePlugin)  # type: ignore[attr-defined]
        plugin.pre_model_load(namespace(rl=namespace(value="ipo")))  # an enum of Axolotl's
        assert utils._ChunkedLogProbFunction is TokenStatistics
        axolotl.unpatch_axolotl()
        assert utils._ChunkedLogProbFunction is own


# ------------------------------------------------------------------------------------------------------------- Axolotl


LOSSES = {
    "sigmoid": {},
    "ipo and ld_alpha": {"loss_type": ["ipo"], "ld_alpha": 0.5},
    "precomputed": {"precompute_ref_log_probs": True},
}


if REAL:

    @pytest.mark.parametrize("name", [*LOSSES, "lora"])
    def test_axolotl_itself(name: str, tmp_path: Path, bpe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its trainer on its TRL, with and without the plugin that its manager loads: the same weights and logs."""
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        trainers = importlib.import_module("axolotl.core.trainers.dpo")
        manager = importlib.import_module("axolotl.integrations.base").PluginManager.get_instance()
        make("llama").save_pretrained(tmp_path / "model")  # type: ignore[operator]
        checkpoint = type(tiny_trl.llama()).from_pretrained  # type: ignore[attr-defined]

        def trained() -> Any:
            config = trainers.DPOStrategy.get_training_args_class()
            args = config(output_dir=str(tmp_path / "run"), **tiny_trl.COMMON | LOSSES.get(name, {}))
            named = (
                {"peft_config": tiny_trl.lora()} if name == "lora" else {"ref_model": checkpoint(tmp_path / "model")}
            )
            model = checkpoint(tmp_path / "model")
            torch.manual_seed(0)  # of the adapter
            cls = trainers.DPOStrategy.get_trainer_class()
            return tiny_trl.run(cls(model, args=args, train_dataset=tiny_trl.PAIRS, processing_class=bpe, **named))

        stock = trained()
        manager.register(NAME)
        manager.pre_model_load(namespace(rl="dpo"))
        ours = trained()
        compared = tiny_trl.check_same(ours, stock, weights=1e-4, logs=1e-4)
        assert {"loss", "grad_norm", "rewards/chosen", "logps/rejected"} <= compared
        assert not compared & {*axolotl.FROM_LOGITS}
