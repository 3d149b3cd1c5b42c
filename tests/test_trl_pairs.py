"""`DPOTrainer` against TRL's own, step by step, and what it refuses."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from tiny_models import make
from tiny_trl import COMMON, PAIRS, check_same, llama, lora, run, steps, trainable

from groupdpo_kernels import AdaBalance, Objective
from groupdpo_kernels.models.paired_prompts import PairedPrompts
from groupdpo_kernels.preference.losses import LOSSES
from groupdpo_kernels.trainers import DPOTrainer, GroupDPOConfig, StepwiseDPO

METRICS = {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
METRICS |= {"logps/chosen", "logps/rejected", "num_tokens", "loss", "grad_norm", "learning_rate", "epoch"}
PAIRWISE = [name for name, row in LOSSES.items() if row.pair is not None and not row.every_pair]


@pytest.fixture
def config(tmp_path: Path) -> Any:
    return lambda **changes: trl.DPOConfig(output_dir=str(tmp_path / "run"), **COMMON | changes)


@pytest.fixture
def make_trainer(config: Any, bpe: Any) -> Any:
    """trainer class, options of the config, arguments of the trainer -> the trainer."""

    def make_one(kind: Any = DPOTrainer, options: dict[str, Any] | None = None, **named: Any) -> Any:
        named = {"model": llama(), "train_dataset": PAIRS, "processing_class": bpe, **named}
        return kind(args=config(**options or {}), **named)

    return make_one


# ------------------------------------------------------------------------------------------------------ against TRL's


@pytest.mark.parametrize(
    "options, objective",
    [
        ({}, Objective()),
        ({"beta": 0.5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}, Objective(beta=0.5)),
        ({"loss_type": "ipo"}, Objective("ipo")),
        ({"loss_type": "sigmoid_norm", "beta": 2.0}, Objective(beta=2.0, average=True)),
        ({"precompute_ref_log_probs": True, "gradient_checkpointing": False}, Objective()),
    ],
    ids=["sigmoid", "accumulation", "ipo", "averaged", "precomputed"],
)
def test_steps_are_those_of_trl(make_trainer: Any, options: dict[str, Any], objective: Objective) -> None:
    """Losses, metrics and weights; TRL holds the loss in its config, ours in the objective."""
    ours_options = {k: v for k, v in options.items() if k not in ("loss_type", "beta")}
    ours = run(make_trainer(options=ours_options, objective=objective))
    theirs = run(make_trainer(trl.DPOTrainer, options, ref_model=llama()))
    # Where scores are averaged the rewards are too; TRL logs those of sums.
    names = check_same(ours, theirs, but="rewards/" if objective.averages else "-")
    assert names >= {name for name in METRICS if not (objective.averages and name.startswith("rewards/"))}


def test_the_adapter_is_left_out_for_the_reference(make_trainer: Any) -> None:
    ours = run(make_trainer(peft_config=lora()))
    theirs = run(make_trainer(trl.DPOTrainer, peft_config=lora()))
    assert check_same(ours, theirs) >= METRICS


def test_a_peft_model_is_its_own_reference(make_trainer: Any) -> None:
    """The adapter has been trained: the reference is base and adapter as given, in a copy named "ref"."""

    def trained_adapter() -> Any:
        torch.manual_seed(0)
        model = peft.get_peft_model(llama(), lora(init_lora_weights=False))
        return model

    ours = run(make_trainer(model=trained_adapter()))
    theirs = run(make_trainer(trl.DPOTrainer, model=trained_adapter()))
    assert check_same(ours, theirs) >= METRICS
    assert steps(ours[0])[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_an_adapter_on_the_embedding_is_part_of_the_reference(make_trainer: Any) -> None:
    """TRL copies no parameter that lies in a dict by adapter: its reference would have the bare embedding."""
    model = peft.get_peft_model(llama(), lora("embed_tokens", init_lora_weights=False))
    trainer, *_ = run(make_trainer(model=model))
    assert steps(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


# ------------------------------------------------------------------------------------------------------ what TRL lacks


@pytest.mark.parametrize("name", ["rdpo", "simpo", "orpo", "callable"])
def test_every_pairwise_loss_trains(make_trainer: Any, name: str) -> None:
    """Without a reference none is held."""

    def shifted(scores: torch.Tensor, groups: Any) -> torch.Tensor:
        return torch.nn.functional.softplus(scores[1::2] - scores[0::2] + 0.5)

    objective = Objective(shifted if name == "callable" else name, beta=0.5, gamma=0.3, alpha=0.01)
    trainer, start, weights = run(make_trainer(objective=objective, options={"max_steps": 1}))
    assert (trainer.ref_model is None) == (name in ("simpo", "orpo"))
    assert trainer.args.precompute_ref_log_probs is False
    assert torch.isfinite(weights).all() and (weights - start).norm() > 1e-3 * start.norm()
    if name == "callable":  # softplus of 0.5 where all scores are equal
        assert steps(trainer)[0]["loss"] == pytest.approx(math.log1p(math.exp(0.5)), abs=1e-6)


def test_adadpo(make_trainer: Any) -> None:
    """The first step by hand: w = min(exp(b_w - b_l), C) with b the mean log-probabilities of the policy, which is the
    reference there, so the loss is ln 2 and the gradient DPO's with the chosen side times w."""
    balance = AdaBalance(ceiling=1.1)
    trainer, *_ = run(make_trainer(objective=Objective(beta=0.1, balance=balance), options={"max_steps": 1}))
    first = steps(trainer)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert 0 < first["balance_weight"] <= 1.1 + 1e-6 and first["balance_weight"] != 1

    eager = make_trainer(trl.DPOTrainer, {"max_steps": 1}, ref_model=llama())
    inputs = next(iter(eager.get_train_dataloader()))
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)[:, 1:]
    logits = eager.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    token_logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    sums = token_logps.sum(1)
    means = sums / (labels != -100).sum(1)
    w = (means[:2] - means[2:]).exp().clamp(max=1.1).detach()
    assert first["balance_weight"] == pytest.approx(w.mean().item(), rel=1e-5)
    ratio = 0.1 * (sums - sums.detach())
    loss = -torch.nn.functional.logsigmoid(w * ratio[:2] - ratio[2:]).mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in eager.model.parameters() if p.grad is not None]).norm()
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_a_copy_of_the_model_is_its_reference(make_trainer: Any) -> None:
    """TRL would load again what the config names; here weights that have moved are what the reference starts from."""
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    trainer = make_trainer(model=model)
    assert torch.equal(trainer.ref_model.lm_head.weight, model.lm_head.weight)
    assert trainer.ref_model is not model and not any(p.requires_grad for p in trainer.ref_model.parameters())
    run(trainer)
    assert steps(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert not torch.equal(trainer.ref_model.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("given", [False, True], ids=["copied", "given"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_a_copy_of_a_model_that_was_trained_before_stands_still(make_trainer: Any, bf16: bool, given: bool) -> None:
    """The forwards that the first trainer left on the model lead back to it: its copy must not run them."""
    model = llama()
    run(make_trainer(model=model, options={"bf16": bf16}))
    ref_model = copy.deepcopy(model) if given else None
    trainer = make_trainer(model=model, ref_model=ref_model, options={"bf16": bf16})
    assert "forward" in vars(model)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    before = trainer.compute_ref_log_probs(trainer.ref_model, inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*needs its real logits")
        _, start, end = run(trainer)
    assert not torch.equal(start, end)
    assert all(map(torch.equal, before, trainer.compute_ref_log_probs(trainer.ref_model, inputs)))
    losses = [row["loss"] for row in steps(trainer)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < math.log(2) - 1e-3


def test_the_first_loss_is_ln_2_in_bfloat16(make_trainer: Any) -> None:
    trainer, *_ = run(make_trainer(options={"bf16": True, "max_steps": 1}, objective=Objective(beta=5.0)))
    assert steps(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # sums of -30, in float32, times beta


def test_a_mixture_of_experts_adds_its_loss(config: Any, bpe: Any) -> None:
    def trained(kind: Any, **named: Any) -> Any:
        model = make("mixtral", output_router_logits=True, router_aux_loss_coef=0.1)
        return run(kind(model, args=config(max_steps=2), train_dataset=PAIRS, processing_class=bpe, **named))

    ours, theirs = trained(DPOTrainer), trained(trl.DPOTrainer, ref_model=make("mixtral"))
    assert check_same(ours, theirs) >= METRICS | {"aux_loss"}


def test_evaluation_and_resuming(make_trainer: Any, tmp_path: Path) -> None:
    """Evaluation logs TRL's names; a run cut in two by a checkpoint ends with the same bits."""
    options = {
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "optim": "adamw_torch",
    }
    whole, _, weights = run(make_trainer(options=options, eval_dataset=PAIRS))
    evaluations = [row for row in whole.state.log_history if "eval_loss" in row]
    assert len(evaluations) == 2
    assert {f"eval_{name}" for name in METRICS if "/" in name} <= evaluations[0].keys()
    again = make_trainer(options=options, eval_dataset=PAIRS)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(trainable(again), weights)
    for row, wanted in zip(steps(again)[2:], steps(whole)[2:], strict=True):
        assert row | {"num_tokens": 0} == wanted | {"num_tokens": 0}  # TRL counts those of a process


OTHERS = Dataset.from_dict(
    {"prompt": ["Tea?", "Hi."], "chosen": [" No.", " Tea?"], "rejected": [" Green.", " No idea."]}
)


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_evaluation_after_training_reads_the_reference_of_before(make_trainer: Any, with_lora: bool) -> None:
    """The reference's numbers, computed before training, are those of a reference that is held: for the rows of
    evaluation as for those of training, and with an adapter for rows that come later too."""
    more = {"peft_config": lora()} if with_lora else {}
    found, held = (
        run(make_trainer(options={"precompute_ref_log_probs": precompute}, eval_dataset=PAIRS, **more))[0]
        for precompute in (True, False)
    )
    for rows in (None, OTHERS) if with_lora else (None,):
        ours, expected = (trainer.evaluate(rows) for trainer in (found, held))
        assert abs(expected["eval_rewards/margins"]) > 1e-3
        for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/chosen", "eval_logps/chosen"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_rows_that_come_after_training_have_no_reference_that_moved(make_trainer: Any) -> None:
    """Biases of the base model train beside the adapter: without its adapter the model is no longer what it was."""
    named = {"model": make("phi"), "peft_config": lora(bias="all")}
    trainer, *_ = run(make_trainer(options={"precompute_ref_log_probs": True}, eval_dataset=PAIRS, **named))
    trainer.evaluate()
    with pytest.raises(ValueError, match=r"ref_model must be given, or the rows be there before .*bias trains, "):
        trainer.evaluate(OTHERS)


@pytest.mark.parametrize(("mode", "scored"), [("keep_end", 2), ("keep_start", 1)])
def test_three_tokens_of_a_prompt_of_two_and_a_response_of_three(make_trainer: Any, mode: str, scored: int) -> None:
    """What is scored is what has a token before it: the end of the response but for its first, or its first alone. The
    means of IPO are over as many."""
    rows = Dataset.from_dict({"prompt": ["Hi"], "chosen": ["AB"], "rejected": ["CD"]})
    options = {"max_length": 3, "truncation_mode": mode, "per_device_train_batch_size": 1, "max_steps": 1}
    objective, reference = Objective("ipo", beta=0.5, average=True), make("llama", seed=1)
    trainer = make_trainer(options=options, objective=objective, train_dataset=rows, ref_model=reference)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert inputs["input_ids"].shape == (2, 3)

    def means(model: Any) -> torch.Tensor:
        logps = model(input_ids=inputs["input_ids"]).logits.log_softmax(-1)[:, :-1]
        picked = logps.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        return picked[:, -scored:].mean(1)

    with torch.no_grad():
        chosen, rejected = means(llama()) - means(make("llama", seed=1))
    expected = (chosen - rejected - 1 / (2 * objective.beta)) ** 2
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(expected.item(), rel=1e-4)


def test_what_two_answers_begin_with_alike_is_theirs(make_trainer: Any, bpe: Any) -> None:
    rows = Dataset.from_dict({"prompt": ["Tea?"], "chosen": ["<think>a"], "rejected": ["<think>b"]})
    row = make_trainer(train_dataset=rows, options={"per_device_train_batch_size": 1}).train_dataset[0]
    found = [bpe.decode(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    assert found == ["Tea?", "<think>a</s>", "<think>b</s>"]


# ------------------------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    "options, said",
    [
        ({"loss_type": "hinge"}, r"loss_type .* must stay \['sigmoid'\], because Objective\(loss=...\).*\['hinge'\]"),
        ({"beta": 0.3}, r"beta .* must stay 0.1, because Objective\(beta=...\) says it; got 0.3"),
        ({"label_smoothing": 0.1}, r"label_smoothing .* must stay 0.0, .*; got 0.1"),
        ({"discopop_tau": 0.1}, r"discopop_tau .* must stay 0.05, because Objective\(tau=...\) says it; got 0.1"),
        ({"loss_weights": [2.0]}, r"loss_weights .* must stay None, because no objective has it; got \[2.0\]"),
        ({"ld_alpha": 0.5}, "ld_alpha .* must stay None, .* got 0.5"),
        ({"f_divergence_type": "forward_kl"}, "f_divergence_type .* must stay 'reverse_kl', .* got 'forward_kl'"),
        ({"f_alpha_divergence_coef": 0.7}, "f_alpha_divergence_coef .* must stay 0.5, .* got 0.7"),
        ({"torch_compile": True}, "torch_compile must be False: .*; got True"),
        ({"use_weighting": True}, "use_weighting .* must stay False, .* got True"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_options_of_the_loss_belong_to_the_objective(make_trainer: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_trainer(options=options)


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - set(PAIRWISE)))
def test_group_losses_are_refused(make_trainer: Any, name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"objective must be of a pairwise loss \(sigmoid.*GroupDPOTrainer; got '{name}'"
    ):
        make_trainer(objective=Objective(name))
    with pytest.raises(TypeError, match="objective must be an Objective; got 'sigmoid'"):
        make_trainer(objective="sigmoid")


def test_references_that_nobody_reads(make_trainer: Any) -> None:
    objective = Objective("simpo")
    with pytest.raises(
        ValueError, match="ref_model must be None, for 'simpo' has no reference; got a LlamaForCausalLM"
    ):
        make_trainer(objective=objective, ref_model=llama())
    for name in ("precompute_ref_log_probs", "sync_ref_model"):
        with pytest.raises(ValueError, match=rf"{name} .* must be False, for 'simpo' has no reference; got True"):
            make_trainer(objective=objective, options={name: True})


def test_references_that_would_move(make_trainer: Any) -> None:
    with pytest.raises(
        ValueError, match=r"ref_model must be given, .*bias='all', say.*; \S+bias trains, ref_model is None"
    ):
        model = make("phi")  # has biases
        make_trainer(model=model, peft_config=lora(bias="all"))
    model = peft.get_peft_model(llama(), lora())
    run(make_trainer(model=model))
    assert "ref" in model.peft_config
    with pytest.raises(
        ValueError, match=r"ref_model must be given .* 'ref', which an earlier .*delete_adapter\('ref'\)"
    ):
        make_trainer(model=model)
    model.delete_adapter("ref")
    trainer, *_ = run(make_trainer(model=model))
    assert steps(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_without_a_reference_no_adapter_is_copied(make_trainer: Any) -> None:
    model = peft.get_peft_model(llama(), lora())
    make_trainer(model=model, objective=Objective("simpo"))
    assert [*model.peft_config] == ["default"]


def test_columns_and_tokenizers(make_trainer: Any) -> None:
    rows = Dataset.from_dict({"question": ["Tea?"], "chosen": [" Green."]})
    with pytest.raises(
        ValueError, match=r"train dataset must have columns chosen and rejected .*rejected not among question, chosen"
    ):
        make_trainer(train_dataset=rows)
    with pytest.raises(ValueError, match="eval dataset must have columns"):
        make_trainer(eval_dataset=rows)
    import tiny_tokenizers

    bare = tiny_tokenizers.byte_level_bpe()
    bare.pad_token = None
    assert make_trainer(processing_class=bare).data_collator.pad_token_id == bare.eos_token_id  # as TRL does
    bare.pad_token = bare.eos_token = None
    with pytest.raises(
        ValueError, match=r"processing_class must have an eos_token, .* got eos_token=None, pad_token=None"
    ):
        make_trainer(processing_class=bare)


def test_images_in_a_row_are_named(make_trainer: Any, tmp_path: Path, bpe: Any) -> None:
    """A model of text would train on the words around them."""
    rows = PAIRS.add_column("images", [[b"pixels"]] * len(PAIRS))
    with pytest.raises(
        ValueError, match=r"'image' or 'images' keys\), but the provided model does not seem to be a vis"
    ):
        make_trainer(train_dataset=rows)
    args = GroupDPOConfig(str(tmp_path), **COMMON)
    with pytest.raises(ValueError, match="tokenizer must be a processor of images for row 0, which has some; got"):
        StepwiseDPO(llama(), args, [rows], bpe)


def test_a_response_without_a_token(make_trainer: Any) -> None:
    trainer = make_trainer()
    batch = next(iter(trainer.get_train_dataloader()))
    batch["completion_mask"][1] = 0
    with pytest.raises(ValueError, match=r"max_length must leave each response a token; .* got 1024"):
        trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize("version", ["1.15.0", "2.0.0", "unknown"])
def test_unknown_versions_are_refused(make_trainer: Any, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(RuntimeError, match=f"DPOTrainer knows TRL 1.16 and later, before 2.0; installed is {version}"):
        make_trainer()


# ------------------------------------------------------------------------------------------------ prompts that run once

LONG = "Answer in one short sentence, as if to a child who has just learned to read. "


def with_long_prompts(rows: Any) -> Any:
    """The same pairs after prompts of different lengths, so that sharing saves tokens."""
    return rows.map(lambda row, i: {**row, "prompt": LONG * (1 + i % 2) + row["prompt"]}, with_indices=True)


def counted(trainer: Any) -> tuple[Any, int]:
    """A run of the trainer, and the number of positions that its model and reference have embedded."""
    seen: list[int] = []

    def note(module: Any, args: Any) -> None:
        if isinstance(module, torch.nn.Embedding) and args[0].shape[1] > 14:  # a probe has 14 tokens at most
            seen.append(args[0].numel())

    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        return run(trainer), sum(seen)
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "options", [{}, {"precompute_ref_log_probs": True}, {"gradient_checkpointing": False}], ids=str
)
@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_a_prompt_runs_once_for_a_pair(make_trainer: Any, options: dict[str, Any], with_lora: bool) -> None:
    more: dict[str, Any] = {"train_dataset": with_long_prompts(PAIRS)} | ({"peft_config": lora()} if with_lora else {})
    shared, fewer = counted(make_trainer(options=options, **more))
    whole, all_of_them = counted(make_trainer(options=options, share_prompt=False, **more))
    assert check_same(shared, whole) >= METRICS and shared[0].share_prompt and not whole[0].share_prompt
    assert fewer < 0.75 * all_of_them


def test_pairs_that_cannot_share_run_as_they_are(make_trainer: Any, config: Any, bpe: Any) -> None:
    recurrent = transformers.MambaConfig(vocab_size=len(bpe), hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.warns(UserWarning, match="a prompt runs again for each of its responses: MambaForCausalLM"):
        trainer = make_trainer(model=transformers.MambaForCausalLM(recurrent))
    assert not trainer.share_prompt
    with pytest.raises(ValueError, match=r"share_prompt must be 'auto' or False here: MambaForCausalLM.*; got True"):
        make_trainer(model=transformers.MambaForCausalLM(recurrent), share_prompt=True)
    with pytest.raises(ValueError, match="share_prompt must be 'auto', True or False; got 'yes'"):
        make_trainer(share_prompt="yes")
    checkpoints = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="share_prompt must be 'auto' or False here: reentrant checkpoints"):
        make_trainer(options=checkpoints, share_prompt=True)
    assert not make_trainer(options=checkpoints).share_prompt


@pytest.mark.parametrize("change", ["token", "length", "padding", "nothing to save"])
def test_prompts_that_differ_are_not_shared(change: str) -> None:
    ids = torch.randint(3, 90, (2, 24)).repeat(2, 1)
    ids[2:, 16:] = torch.randint(3, 90, (2, 8))
    mask, targets = torch.ones_like(ids), torch.full_like(ids, -100)
    targets[:, 15:-1] = ids[:, 16:]
    assert PairedPrompts.of(ids, targets, mask) is not None
    if change == "token":
        ids[2, 3] += 1
    elif change == "length":
        targets[3, 15] = -100
    elif change == "padding":
        mask[1, 0] = 0
    else:
        targets[:, :15] = ids[:, 1:16]
    assert PairedPrompts.of(ids, targets, mask) is None
