"""Adapters as they come: a PeftModel, an adapter's folder loaded by transformers; those with virtual tokens refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tiny_cli import PREFERENCES, invoke, lines, save_model, write_rows
from tiny_models import GPT2, VOCAB, make
from tiny_tokenizers import CHATML, byte_level_bpe
from tiny_trl import COMMON, GROUPS, PAIRS, llama, lora, run
from torch import nn

from groupdpo_kernels import Objective, model_logps
from groupdpo_kernels.data.batches import tokenizer_of
from groupdpo_kernels.models.adapters import _set as switch_to
from groupdpo_kernels.models.adapters import active_adapters, has_adapter, without_adapter
from groupdpo_kernels.trainers import DPOTrainer, GroupDPOConfig, GroupDPOTrainer, StepwiseDPO

IDS = torch.tensor([[5, 9, 30, 77, 12]])
OPTIONS: dict[str, Any] = {**COMMON, "max_steps": 2, "gradient_checkpointing": False}
DPO = Objective("mpo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter's folder, on the attention and the LM head, that moves the logits; its base model beside it."""
    place = tmp_path_factory.mktemp("adapter")
    save_model(place / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    torch.manual_seed(1)
    model = peft.get_peft_model(base, lora("lm_head"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(place / "adapter")
    byte_level_bpe(bos=True).save_pretrained(place / "adapter")
    return place


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "adapter")


def logps(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model_logps(model, IDS, IDS.roll(-1), strict=True)


@pytest.mark.filterwarnings("ignore")
def test_adapter_folder_scores_and_is_its_own_reference(folder: Path, tmp_path: Path) -> None:
    model, base = loaded(folder), transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    assert has_adapter(model) and active_adapters(model) == ["default"] and not has_adapter(base)
    exact = model(input_ids=IDS).logits.log_softmax(-1).gather(-1, IDS.roll(-1)[..., None])[..., 0]
    torch.testing.assert_close(logps(model), exact, atol=1e-5, rtol=1e-5)
    grads = [p.requires_grad for p in model.parameters()]
    with without_adapter(model):
        torch.testing.assert_close(logps(model), logps(base))
    assert grads == [p.requires_grad for p in model.parameters()]
    start = logps(model)
    args = GroupDPOConfig(str(tmp_path), **OPTIONS)
    trainer = GroupDPOTrainer(model, args=args, train_dataset=GROUPS, processing_class=byte_level_bpe(), objective=DPO)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains and all("lora_" in name and ".default." in name for name in trains)
    assert active_adapters(model) == ["default"]
    torch.testing.assert_close(logps(model), start)
    trainer, before, after = run(trainer)
    assert not torch.equal(before, after)
    first, *_ = trainer.state.log_history
    assert abs(first["rewards/margins"]) < 1e-5  # equal to its reference
    trainer.save_model(str(tmp_path / "saved"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logps(again), logps(model.eval()))


@pytest.mark.filterwarnings("ignore")
def test_adapter_folder_in_the_other_trainers(folder: Path, tmp_path: Path) -> None:
    from trl import DPOConfig

    model = loaded(folder)
    args = DPOConfig(str(tmp_path / "dpo"), **{**OPTIONS, "max_steps": 1})
    trainer = DPOTrainer(model, args=args, train_dataset=PAIRS, processing_class=byte_level_bpe())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    model = loaded(folder)
    start = logps(model)
    stages = StepwiseDPO(
        model,
        GroupDPOConfig(str(tmp_path / "sdpo"), **{**OPTIONS, "max_steps": 1}),
        [GROUPS.select([0, 1]), GROUPS.select([2, 3])],
        byte_level_bpe(),
        objective=DPO,
    )
    assert stages.train() is model and not torch.equal(logps(model.eval()), start)
    assert list(model.peft_config) == ["default"]


def over_a_loaded_one(how: str) -> Any:
    """A model with an adapter that has been trained, and what trains now."""
    torch.manual_seed(0)
    trained, fresh = lora(init_lora_weights=False), lora(r=8)
    if how == "in an embedding":
        return peft.get_peft_model(llama(), lora("embed_tokens", init_lora_weights=False))
    if how == "inside transformers":
        model = llama()
        model.peft_config, model._hf_peft_config_loaded = {"sft": trained, "dpo": fresh}, True  # type: ignore[assignment]
        for name, config in model.peft_config.items():  # type: ignore[union-attr, operator]
            peft.inject_adapter_in_model(config, model, name)
        switch_to(model, ["sft", "dpo"])
    else:
        model = peft.get_peft_model(llama(), trained, adapter_name="sft" if how == "of another name" else "default")
        if how == "merged":
            return model.merge_and_unload()  # type: ignore[operator]
        if how != "of another name":
            model.add_adapter("dpo", fresh)  # type: ignore[operator]
            model.set_adapter("dpo")  # type: ignore[operator]
        if how == "stacked":
            model.base_model.set_adapter(["default", "dpo"])  # type: ignore[operator, union-attr]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".dpo." in name or (how == "of another name" and ".sft." in name))
    return model


@pytest.mark.parametrize("precompute", [False, True], ids=["", "precomputed"])
@pytest.mark.parametrize("kind", ["groups", "pairs"])
@pytest.mark.parametrize(
    "how", ["in place of it", "stacked", "inside transformers", "merged", "of another name", "in an embedding"]
)
@pytest.mark.filterwarnings("ignore")
def test_a_new_adapter_over_a_loaded_one_starts_at_ln_2(how: str, kind: str, precompute: bool, tmp_path: Path) -> None:
    """The reference is the model as it is given, whichever adapters are active and whatever their names; what trained
    before stands still, and both stay active."""
    from trl import DPOConfig

    model = over_a_loaded_one(how)
    more = {"peft_config": lora()} if how == "merged" else {}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    active = active_adapters(model) if has_adapter(model) else ["default"]
    options = {**OPTIONS, "precompute_ref_log_probs": precompute}
    rows = {"train_dataset": PAIRS, "eval_dataset": PAIRS, "processing_class": byte_level_bpe(), **more}
    if kind == "groups":
        args = GroupDPOConfig(str(tmp_path / "run"), **options)
        trainer = GroupDPOTrainer(model, args=args, objective=Objective(), **rows)
    else:
        trainer = DPOTrainer(model, args=DPOConfig(str(tmp_path / "run"), **options), **rows)
    first = trainer.evaluate()["eval_loss"]
    trainer, start, end = run(trainer)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert first == pytest.approx(math.log(2), abs=1e-6) == losses[0] and not torch.equal(start, end)
    assert trainer.evaluate()["eval_loss"] < math.log(2) - 1e-4  # the same reference still
    assert active_adapters(trainer.model) == active
    if how != "merged":
        assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before)


@pytest.mark.filterwarnings("ignore")
def test_several_active_adapters_are_saved_each_by_its_name(tmp_path: Path) -> None:
    model = over_a_loaded_one("inside transformers")
    args = GroupDPOConfig(str(tmp_path / "run"), **OPTIONS)
    trainer = GroupDPOTrainer(
        model, args=args, train_dataset=PAIRS, processing_class=byte_level_bpe(), objective=Objective()
    )
    run(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    again = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "saved" / "sft"), adapter_name="sft")
    again.load_adapter(str(tmp_path / "saved" / "dpo"), "dpo")
    again.base_model.set_adapter(["sft", "dpo"])  # type: ignore[operator, union-attr]
    torch.testing.assert_close(logps(again.eval()), logps(model.eval()))


@pytest.mark.filterwarnings("ignore")
def test_without_a_reference_pairs_want_an_adapter_of_trls_name(tmp_path: Path) -> None:
    from trl import DPOConfig

    args = DPOConfig(str(tmp_path), **OPTIONS)
    with pytest.raises(ValueError, match=r"model must have an adapter named 'default', .*; got sft; GroupDPOTrainer"):
        DPOTrainer(
            over_a_loaded_one("of another name"), args=args, train_dataset=PAIRS, processing_class=byte_level_bpe(),
            objective=Objective("simpo"),
        )  # fmt: skip


VIRTUAL = [
    peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
]


@pytest.mark.parametrize("config", VIRTUAL, ids=lambda config: config.peft_type.value)
@pytest.mark.filterwarnings("ignore")
def test_virtual_tokens_are_refused_when_a_trainer_is_built(config: Any, tmp_path: Path) -> None:
    from trl import DPOConfig

    why = f"must .*an adapter without virtual tokens .*; got {config.peft_type.value}"
    args, rest = GroupDPOConfig(str(tmp_path), **OPTIONS), {"processing_class": byte_level_bpe()}
    with pytest.raises(ValueError, match=f"peft_config {why}"):
        GroupDPOTrainer(llama(), args=args, train_dataset=GROUPS, peft_config=config, **rest)
    with pytest.raises(ValueError, match=f"peft_config {why}"):
        StepwiseDPO(llama(), args, [GROUPS], byte_level_bpe(), peft_config=config)
    pairs = DPOConfig(str(tmp_path), **OPTIONS)
    with pytest.raises(ValueError, match=f"peft_config {why}"):
        DPOTrainer(llama(), args=pairs, train_dataset=PAIRS, peft_config=config, **rest)
    base = llama().eval()
    expected = logps(base)
    model = peft.get_peft_model(base, config).eval()
    with pytest.raises(ValueError, match=f"model {why}"):
        GroupDPOTrainer(model, args=args, train_dataset=GROUPS, **rest)
    with pytest.raises(ValueError, match=f"model {why}"):
        DPOTrainer(model, args=pairs, train_dataset=PAIRS, **rest)
    with pytest.raises(ValueError, match=f"model {why}"):
        logps(model)
    with model.disable_adapter():
        torch.testing.assert_close(logps(model), expected)


OTHERS = [
    peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    lora(use_dora=True),
    lora(modules_to_save=["lm_head"]),
]


@pytest.mark.parametrize("config", OTHERS, ids=["ia3", "dora", "modules_to_save"])
@pytest.mark.filterwarnings("ignore")
def test_other_adapters_train(config: Any, tmp_path: Path) -> None:
    args = GroupDPOConfig(str(tmp_path), **OPTIONS)
    trainer = GroupDPOTrainer(
        llama(), args=args, train_dataset=GROUPS, processing_class=byte_level_bpe(), peft_config=config, objective=DPO
    )
    trainer, before, after = run(trainer)
    assert not torch.equal(before, after) and abs(trainer.state.log_history[0]["rewards/margins"]) < 1e-5


TRAINED = [*OTHERS, lora(trainable_token_indices=[5, 9, 30, 42]), lora(modules_to_save=["norm"])]


@pytest.mark.parametrize("kind", ["groups", "pairs precomputed"])
@pytest.mark.parametrize("config", TRAINED, ids=["ia3", "dora", "modules_to_save", "tokens", "norm"])
@pytest.mark.filterwarnings("ignore")
def test_other_adapters_that_were_trained_are_their_own_reference(config: Any, kind: str, tmp_path: Path) -> None:
    from trl import DPOConfig

    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    rows = {"train_dataset": PAIRS, "processing_class": byte_level_bpe(), "objective": Objective()}
    if kind == "groups":
        trainer: Any = GroupDPOTrainer(model, args=GroupDPOConfig(str(tmp_path), **OPTIONS), **rows)
    else:
        args = DPOConfig(str(tmp_path), **OPTIONS, precompute_ref_log_probs=True)
        trainer = DPOTrainer(model, args=args, **rows)
    trainer, before, after = run(trainer)
    assert not torch.equal(before, after)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


class Processor(transformers.ProcessorMixin):  # type: ignore[misc]
    """What AutoProcessor gives for a model of text and images, with the template that its tokenizer lacks."""

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["tokenizer"]


def test_processor_stands_for_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.chat_template = None
    processor = Processor(tokenizer, CHATML)
    assert tokenizer_of(tokenizer) is tokenizer and tokenizer_of(None) is None
    assert tokenizer_of(processor).chat_template == CHATML and tokenizer.chat_template is None
    turns = GROUPS.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    losses = []
    for each in (processor, byte_level_bpe()):
        args = GroupDPOConfig(str(tmp_path), **OPTIONS)
        trainer = GroupDPOTrainer(llama(), args=args, train_dataset=turns, processing_class=each)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1]
    parts = StepwiseDPO(llama(), args, [turns], processor, objective=DPO).parts
    assert len(parts[0]) == len(turns)


@pytest.mark.filterwarnings("ignore")
def test_packed_trainer_pads_where_the_model_would_mix_sequences(tmp_path: Path) -> None:
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0)
    args = GroupDPOConfig(str(tmp_path), **OPTIONS, layout="packed", micro_batch_sequences=None)
    kinds = {}
    for name, model in (("bloom", transformers.BloomForCausalLM(config)), ("llama", llama())):
        with pytest.warns() if name == "bloom" else pytest.MonkeyPatch.context() as seen:
            trainer = GroupDPOTrainer(model, args=args, train_dataset=GROUPS, processing_class=byte_level_bpe())
        kinds[name] = trainer.data_collator.layout
        said = [str(w.message) for w in seen] if name == "bloom" else []
        assert name == "llama" or sum("layout 'packed' becomes 'padded': in Bloom" in each for each in said) == 1
    assert kinds == {"bloom": "padded", "llama": "packed"}


def test_command_line_trains_and_scores_an_adapter(folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", PREFERENCES)
    flags = ["--lora-rank", 4, "--max-steps", 1, "--lr", 0.01, "--loss", "mpo", "--device", "cpu"]
    done = invoke("train", "--model", folder / "base", "--data", rows, "--out", tmp_path / "run", *flags)
    assert done.exit_code == 0, done.output
    done = invoke("logps", tmp_path / "run" / "model", rows, tmp_path / "scores.jsonl", "--device", "cpu")
    assert done.exit_code == 0, done.output
    found = lines(tmp_path / "scores.jsonl")
    assert len(found) == 11 and all(line["logp"] < 0 for line in found)
    more = ["--max-steps", 1, "--loss", "mpo", "--device", "cpu"]
    done = invoke("train", "--model", folder / "adapter", "--data", rows, "--out", tmp_path / "more", *more)
    assert done.exit_code == 0, done.output


def test_command_line_names_rows_past_the_positions(tmp_path: Path) -> None:
    tokenizer = byte_level_bpe(bos=True)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2 | {"n_positions": 24}))
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    long = {"prompt": "Tea?", "chosen": " Green." * 40, "rejected": " No."}
    rows = write_rows(tmp_path / "rows.jsonl", [PREFERENCES[3], long])
    done = invoke("logps", tmp_path / "gpt2", rows, tmp_path / "out.jsonl", "--device", "cpu")
    assert done.exit_code == 0, done.output
    found = lines(tmp_path / "out.jsonl")
    assert [line["logp"] is None for line in found] == [False, False, True, False]
    assert found[2]["skipped"].startswith("too long: a response of ") and "at most 24 together" in found[2]["skipped"]
    flags = ["--max-steps", 1, "--device", "cpu"]
    done = invoke("train", "--model", tmp_path / "gpt2", "--data", rows, "--out", tmp_path / "run", *flags)
    assert done.exit_code == 0 and "too long" in done.output, done.output


def test_token_groups_past_the_model_are_named(tmp_path: Path) -> None:
    from groupdpo_kernels.data import TokenGroup

    def group(last: int, n: int) -> TokenGroup:
        ids = torch.arange(3, 3 + n, dtype=torch.int32)
        return TokenGroup(
            ids, [torch.tensor([4], dtype=torch.int32), torch.tensor([last], dtype=torch.int32)], [True, False], 7
        )

    args = GroupDPOConfig(str(tmp_path), **OPTIONS)
    with pytest.raises(ValueError, match=rf"token ids in \[0, {VOCAB}\); row 7 has {VOCAB}"):
        GroupDPOTrainer(make("gpt2"), args=args, train_dataset=[group(VOCAB, 5)])
    with pytest.raises(ValueError, match="at most 64 tokens, the model's positions; row 7 has 71 tokens"):
        GroupDPOTrainer(make("gpt2"), args=args, train_dataset=[group(5, 70)])
