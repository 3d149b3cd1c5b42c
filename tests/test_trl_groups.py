"""`GroupDPOTrainer`: TRL's DPO on groups of two, one gradient by three strategies, and what it refuses."""

from __future__ import annotations

import math
import socket
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl
from processes import run_ranks
from tiny_models import make
from tiny_trl import COMMON, GROUPS, PAIRS, check_same, llama, lora, run, run_as_rank, steps, trainable
from transformers import HfArgumentParser

from groupdpo_kernels import AdaBalance, Objective
from groupdpo_kernels.data import read_groups, tokenize_groups
from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer

LN2 = pytest.approx(math.log(2), abs=1e-6)
MPO = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)
METRICS = {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
METRICS |= {"logps/chosen", "logps/rejected", "num_tokens", "positive_mass"}


@pytest.fixture
def make_trainer(tmp_path: Path, bpe: Any) -> Any:
    """Options of the config, arguments of the trainer -> the trainer, on ragged groups in micro-batches of three, by
    two passes."""

    def make_one(options: dict[str, Any] | None = None, **named: Any) -> Any:
        config = {**COMMON, "output_dir": str(tmp_path / "run"), "strategy": "two_pass", "micro_batch_sequences": 3}
        config |= options or {}
        named = {"model": llama(), "train_dataset": GROUPS, "processing_class": bpe, **named}
        return GroupDPOTrainer(args=GroupDPOConfig(**config), **named)

    return make_one


# ------------------------------------------------------------------------------------------------ against TRL, on pairs


@pytest.mark.parametrize(
    "options, with_lora",
    [
        ({}, False),
        ({"strategy": "coupled", "layout": "packed", "micro_batch_sequences": None}, False),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "max_steps": 2}, False),
        ({"strategy": "one_pass", "micro_batch_sequences": 1}, True),
    ],
    ids=["two_pass", "coupled", "accumulation", "one_pass"],
)
def test_groups_of_two_are_trls_dpo(
    make_trainer: Any, tmp_path: Path, bpe: Any, options: dict[str, Any], with_lora: bool
) -> None:
    """Step by step: losses, gradient norms, metrics, and the weights in the end."""
    more = {"peft_config": lora()} if with_lora else {}
    ours = run(make_trainer(options, train_dataset=PAIRS, objective=Objective("sigmoid", beta=0.3), **more))
    shared = {k: v for k, v in options.items() if k not in ("strategy", "layout", "micro_batch_sequences")}
    config = trl.DPOConfig(output_dir=str(tmp_path / "trl"), beta=0.3, **COMMON | shared)
    more = {"peft_config": lora()} if with_lora else {"ref_model": llama()}
    theirs = run(trl.DPOTrainer(llama(), args=config, train_dataset=PAIRS, processing_class=bpe, **more))
    assert check_same(ours, theirs) >= METRICS - {"positive_mass"} | {"loss", "grad_norm"}
    assert steps(ours[0])[0]["loss"] == LN2


# ------------------------------------------------------------------------------------------------------- ragged groups


@pytest.mark.parametrize("objective", [MPO, Objective("all_pairs", balance=AdaBalance())], ids=lambda x: x.loss)
def test_strategies_and_layouts_give_one_gradient(make_trainer: Any, objective: Objective) -> None:
    """Full fine-tuning by two passes, in micro-batches of any size and layout, against the whole graph."""
    expected = run(make_trainer({"strategy": "coupled", "micro_batch_sequences": None}, objective=objective))
    for options in (
        {"strategy": "two_pass"},
        {"strategy": "two_pass", "micro_batch_sequences": None, "micro_batch_tokens": 40, "layout": "packed"},
        {"strategy": "one_pass", "micro_batch_sequences": 1},
        {"strategy": "coupled", "micro_batch_sequences": 2},
    ):
        found = run(make_trainer(options, objective=objective))
        names = check_same(found, expected)
        assert names >= METRICS | ({"balance_weight"} if objective.balance else set())
        logged = steps(found[0])
        assert ("pass_drift" in logged[0]) == (options["strategy"] == "two_pass")
        assert all(row.get("pass_drift", 0) < 1e-4 and 0 < row["positive_mass"] < 1 for row in logged)


@pytest.mark.parametrize("strategy", ["two_pass", "one_pass", "coupled"])
def test_a_gradient_scaler(make_trainer: Any, strategy: str) -> None:
    """What fp16 brings, here beside float32, for accelerate has fp16 on GPUs alone: every strategy multiplies by the
    scale, the optimizer divides, and a step that overflows is left out and halves the scale."""

    def trainer(init_scale: float | None) -> Any:
        # Without a clip: accelerate unscales before it only under fp16.
        options = {"strategy": strategy, "micro_batch_sequences": 1, "max_grad_norm": 0.0}
        found = make_trainer({**options, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1})
        if init_scale is not None:
            found.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        return found

    expected, found = run(trainer(None)), run(trainer(2.0**16))
    assert found[0].accelerator.scaler.get_scale() == 2.0**16  # in use, and no overflow
    (_, start, wanted), (*_, weights) = expected, found
    assert (wanted - start).norm() > 0 and (weights - wanted).norm() < 1e-5 * (wanted - start).norm()
    overflowed, start, weights = run(trainer(2.0**127))
    assert torch.equal(weights, start) and overflowed.accelerator.scaler.get_scale() == 2.0**123


def test_fp16_in_the_config() -> None:
    """Without bf16, which is the default otherwise."""
    config = GroupDPOConfig("out", fp16=True, use_cpu=True)
    assert (config.fp16, config.bf16, GroupDPOConfig("out", use_cpu=True).bf16) == (True, False, True)


def test_accumulating_two_batches_is_one_of_twice_the_size(make_trainer: Any) -> None:
    """A loss is a mean over groups, so two batches of one group weigh as one of two."""
    expected = run(make_trainer({"max_steps": 2}))
    for strategy in ("two_pass", "coupled"):
        halves = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "strategy": strategy}
        assert check_same(run(make_trainer({"max_steps": 2, **halves})), expected) >= METRICS | {"loss", "grad_norm"}


def test_two_ranks_are_one_of_twice_the_batch(make_trainer: Any, tmp_path: Path) -> None:
    """DistributedDataParallel, ranks with different numbers of micro-batches: the losses and weights of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert not (failure := run_ranks(run_as_rank, port, str(tmp_path))), failure
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    trainer, start, expected = run(make_trainer({"micro_batch_sequences": 2}))
    for strategy in ("two_pass", "one_pass", "coupled", "auto"):
        (kind, weights, logged), (_, others, _) = (rank[strategy] for rank in ranks)
        assert kind == "DistributedDataParallel" and torch.equal(weights, others)
        assert (weights - expected).norm() < 1e-5 * (expected - start).norm()
        for row, wanted in zip(logged, steps(trainer), strict=True):
            assert {k: row[k] for k in ("loss", *METRICS)} == pytest.approx(
                {k: wanted[k] for k in ("loss", *METRICS)}, rel=1e-5, abs=1e-5
            )


def test_lora_on_the_head_and_checkpointing(make_trainer: Any) -> None:
    """TRL refuses an adapter on the head. All strategies, with and without gradient checkpointing."""
    settings = [
        {"strategy": "coupled", "gradient_checkpointing": False},
        {"strategy": "two_pass", "gradient_checkpointing": True},
        {"strategy": "one_pass", "gradient_checkpointing": True, "micro_batch_sequences": 1},
        {"strategy": "two_pass", "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ]
    runs = [run(make_trainer(options, peft_config=lora("lm_head"))) for options in settings]
    head = runs[0][0].model.get_output_embeddings().lora_B.default.weight
    assert head.abs().max() > 0  # B begins at 0: it trains
    for found in runs[1:]:
        check_same(found, runs[0])
    assert {"default"} == runs[0][0].model.peft_config.keys()


def test_a_peft_model_is_its_own_reference(make_trainer: Any) -> None:
    """Its adapter is part of it, and the copy of it does not train; precomputed, the numbers are the same."""
    losses = []
    for precompute in (False, True):
        torch.manual_seed(0)
        model = peft.get_peft_model(llama(), lora("embed_tokens", init_lora_weights=False))
        options = {"precompute_ref_log_probs": precompute}
        trainer, start, weights = run(make_trainer(options, model=model, objective=Objective("all_pairs", beta=0.5)))
        assert steps(trainer)[0]["loss"] == LN2 and not torch.equal(start, weights)
        assert model.active_adapter == "default"
        assert not any(p.requires_grad for name, p in model.named_parameters() if ".ref." in name)
        losses.append([row["loss"] for row in steps(trainer)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_reference_of_a_second_trainer_stands_still(make_trainer: Any, bpe: Any) -> None:
    """Autocast left a forward on the model in the first run; what the second copies must not run it."""
    tokens, model = list(tokenize_groups(read_groups(GROUPS), bpe)), llama()
    run(make_trainer({"bf16": True}, model=model))
    trainer = make_trainer({"bf16": True}, model=model, train_dataset=tokens)
    assert "forward" in vars(model)
    before = trainer.score(None, tokens)
    _, start, end = run(trainer)
    assert not torch.equal(start, end) and torch.equal(before, trainer.score(None, tokens))


def test_dropout_is_replayed(make_trainer: Any) -> None:
    """With dropout left on, pass 2 sees the masks of pass 1, and the reference none."""
    settings = {"disable_dropout": False, "max_steps": 2}
    config = lora(lora_dropout=0.5, init_lora_weights=False)
    trainer, *_ = run(make_trainer(settings, peft_config=config))
    assert all(row["pass_drift"] < 1e-4 for row in steps(trainer))
    trainer, *_ = run(make_trainer({**settings, "disable_dropout": True}, peft_config=config))
    modules = [m for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert modules and not any(m.p for m in modules)


def test_bfloat16(make_trainer: Any) -> None:
    """Autocast, the default: the first loss is exact, for policy and reference round alike; the run stays close."""
    objective = Objective("all_pairs", beta=0.5)
    trainer, start, weights = run(make_trainer({"bf16": True}, objective=objective))
    assert steps(trainer)[0]["loss"] == LN2
    _, _, exact = run(make_trainer(objective=objective))
    assert 0 < (weights - exact).norm() < 0.05 * (exact - start).norm()


# ----------------------------------------------------------------------------------------- reference and auxiliary loss


def test_precomputed_references(make_trainer: Any, tmp_path: Path) -> None:
    """The same run without a second model; the numbers are on disk, and found there by the next."""
    options = {"precompute_ref_log_probs": True}
    found, expected = run(make_trainer(options, eval_dataset=GROUPS)), run(make_trainer(eval_dataset=GROUPS))
    check_same(found, expected)
    assert found[0].ref_model is None and expected[0].ref_model is not None
    assert found[0].evaluate()["eval_loss"] == pytest.approx(expected[0].evaluate()["eval_loss"], rel=1e-5)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "ref_logps").rglob("*.pt")}
    make_trainer(options, eval_dataset=GROUPS)
    assert files and files == {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "ref_logps").rglob("*.pt")}
    with pytest.raises(ValueError, match=r"ref_model must be given to evaluate rows that were not there .* got None"):
        found[0].evaluate(PAIRS)
    assert "eval_rewards/margins" in expected[0].evaluate(PAIRS)


@pytest.mark.parametrize("loaded", [False, True], ids=["fresh", "loaded"])
def test_rows_that_come_after_training_have_the_reference_of_before(make_trainer: Any, loaded: bool) -> None:
    """With an adapter the reference is still there, so no second model is wanted to evaluate other rows."""

    def trained(precompute: bool) -> Any:
        torch.manual_seed(0)
        more = {"model": peft.get_peft_model(llama(), lora(init_lora_weights=False))} if loaded else {}
        named = more or {"peft_config": lora()}
        return run(make_trainer({"precompute_ref_log_probs": precompute}, eval_dataset=GROUPS, **named))[0]

    found, held = trained(True), trained(False)
    for rows in (None, PAIRS):
        ours, expected = (trainer.evaluate(rows) for trainer in (found, held))
        assert abs(expected["eval_rewards/margins"]) > 1e-4
        for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/chosen", "eval_logps/chosen"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_given_references(make_trainer: Any, bpe: Any) -> None:
    tokens = list(tokenize_groups(read_groups(GROUPS), bpe, max_length=1024))
    scores = make_trainer(train_dataset=tokens).score(None, tokens)
    found = run(make_trainer(train_dataset=tokens, ref_logps=scores, processing_class=None))
    check_same(found, run(make_trainer()))
    assert found[0].ref_model is None
    with pytest.raises(ValueError, match="ref_model must be given to evaluate: ref_logps are those of train_dataset"):
        found[0].evaluate(tokens)
    with pytest.raises(ValueError, match="ref_model must be given to evaluate"):  # before it trains
        make_trainer(train_dataset=tokens, ref_logps=scores, eval_dataset=tokens)
    with pytest.raises(ValueError, match=r"ref_logps must be \(S,\) = \(13,\); got \(3,\)"):
        make_trainer(train_dataset=tokens, ref_logps=torch.zeros(3))


def test_a_mixture_of_experts(make_trainer: Any) -> None:
    """Its auxiliary loss is added, as a mean over micro-batches; in one micro-batch it is the model's own."""
    objective = Objective("all_pairs", beta=0.5)

    def trained(**options: Any) -> Any:
        model = make("mixtral", router_aux_loss_coef=0.1)
        return run(make_trainer({"max_steps": 2, **options}, model=model, objective=objective))

    whole = trained(strategy="coupled", micro_batch_sequences=None)
    check_same(trained(micro_batch_sequences=None), whole)
    check_same(trained(), trained(strategy="coupled"))
    first = steps(whole[0])[0]
    assert first["aux_loss"] > 1 and first["loss"] == pytest.approx(math.log(2) + 0.1 * first["aux_loss"], abs=1e-5)
    without = trained(router_aux_loss_coef=0.0)
    assert "aux_loss" not in steps(without[0])[0] and steps(without[0])[0]["loss"] == LN2


# --------------------------------------------------------------------------------------------- evaluation and resuming


def test_evaluation(make_trainer: Any) -> None:
    """Several sets of rows of different layouts; the loss is the mean over groups, an uneven last batch included."""
    scored = [
        {"prompt": "Tea?", "all_generated_responses": [" Hi.", " No.", " Tea."], "all_rm_scores": [1.0, 0.0, 2.0]}
    ]
    named = {"groups": GROUPS, "scored": scored}
    options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3}
    trainer, *_ = run(make_trainer(options, eval_dataset=named, objective=MPO))
    logged = [row for row in trainer.state.log_history if "eval_groups_loss" in row]
    assert len(logged) == 2 and {f"eval_{name}" for name in METRICS - {"num_tokens"}} <= {
        name.replace("groups_", "") for name in logged[0]
    }
    final = trainer.evaluate(GROUPS)
    by_row = [trainer.evaluate(GROUPS.select([i]))["eval_loss"] for i in range(len(GROUPS))]
    assert final["eval_loss"] == pytest.approx(sum(by_row) / len(by_row), rel=1e-5)
    assert trainer.model.training is False and "pass_drift" not in str(final)
    assert trainer.report["scored"].kept == {"read": (1, 3), "tokenized": (1, 3)}


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_resuming_gives_the_same_bits(make_trainer: Any, tmp_path: Path, with_lora: bool) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    more: dict[str, Any] = {"peft_config": lora("lm_head")} if with_lora else {}
    whole, start, weights = run(make_trainer(options, **more))
    again = make_trainer(options, **more)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(trainable(again), weights) and not torch.equal(start, weights)
    for row, wanted in zip(steps(again)[2:], steps(whole)[2:], strict=True):
        counts = {"num_tokens": 0, "computed_tokens": 0}  # of a process, as in TRL
        assert row | counts == wanted | counts


# ------------------------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    "options, said",
    [
        ({"strategy": "three_pass"}, "strategy must be one of auto, two_pass, one_pass, coupled; got 'three_pass'"),
        ({"layout": "dense"}, "layout must be one of padded, packed; got 'dense'"),
        ({"micro_batch_sequences": 0}, "micro_batch_sequences must be at least 1; got 0"),
        (
            {"strategy": "one_pass", "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "use_reentrant False for strategy 'one_pass', .*; got use_reentrant=True",
        ),
        ({"torch_empty_cache_steps": 3}, "torch_empty_cache_steps must be None for strategy 'two_pass'; got 3"),
        ({"micro_batch_tokens": 9}, r"micro_batch_tokens must be at least \d+, for row 1; got 9"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0.0: .*; got 0.1"),
        ({"include_for_metrics": ["inputs"]}, r"include_for_metrics must be \[\]: .*; got \['inputs'\]"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy must be one of random, sequential"),
        ({"torch_compile": True, "share_prompt": True}, "share_prompt must be 'auto' or False here: torch_compile .*"),
        ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen must be 'no': .*; got 'all'"),
        ({"template_options": "thinking"}, "template_options must be a dict, or JSON of one; got 'thinking'"),
        ({"rule": "best"}, "rule must be one of best_vs_rest.*; got 'best'"),
        ({"format": "parquet"}, "format must be one of auto.*; got 'parquet'"),
        ({"max_length": 1}, "max_length must be at least 2; got 1"),
        ({"max_length": 2}, "train_dataset must hold a group that can be used; got none"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef must be None or 0 for LlamaForCausalLM.*; got 0.1"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_options(make_trainer: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_trainer(options)


def test_options_from_a_command_line(tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False", "--strategy", "one_pass"]
    flags += ["--micro_batch_tokens", "64", "--template_options", '{"enable_thinking": false}']
    (config,) = HfArgumentParser(GroupDPOConfig).parse_args_into_dataclasses(flags)  # type: ignore[arg-type]
    assert config.template_options == {"enable_thinking": False} and config.strategy == "one_pass"
    assert config.micro_batch_tokens == 64


def test_arguments(make_trainer: Any, bpe: Any) -> None:
    model, adapted = llama(), peft.get_peft_model(llama(), lora())
    simpo = Objective("mpo", reference_free=True)
    adapted.add_adapter("ref", lora())
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "model must be a model .*; got 'llama'", {"model": "llama"}),
        (TypeError, "objective must be an Objective; got 'mpo'", {"objective": "mpo"}),
        (TypeError, "train_dataset must be rows, .*; got None", {"train_dataset": None}),
        (ValueError, "ref_model must be another object than model", {"model": model, "ref_model": model}),
        (ValueError, "peft_config must be None for a model that has", {"model": adapted, "peft_config": lora()}),
        (ValueError, r"an adapter named 'ref', .*delete_adapter\('ref'\)", {"model": adapted}),
        (ValueError, "bias='all', say.*bias trains", {"model": make("phi"), "peft_config": lora(bias="all")}),
        (ValueError, "ref_model must be None, for 'mpo' has no .*", {"objective": simpo, "ref_model": llama()}),
        (ValueError, "groups must be pairs for loss 'sigmoid'; row 0 of train_d.* 3", {"objective": Objective()}),
        (ValueError, "processing_class must be given, to tokenise train_dataset", {"processing_class": None}),
        (
            ValueError,
            "row 0: the columns must be .*; got answer, prompt",
            {"train_dataset": [{"prompt": "a", "answer": "b"}]},
        ),
    ]
    for kind, said, named in wrong:
        with pytest.raises(kind, match=said):
            make_trainer(**named)
    for column, said in {
        "chat_template_kwargs": "train_dataset must have nothing in a column 'chat_template_kwargs'.*; row 1 has",
        "images": "tokenizer must be a processor of images for row 1, which has some",
    }.items():
        row = {"prompt": "Tea?", "chosen": " Green.", "rejected": " No."}
        with pytest.raises(ValueError, match=said):
            make_trainer(train_dataset=[{**row, column: None}, {**row, column: ["x"]}])
    ranked = {"merge_prompts": True}
    with pytest.raises(ValueError, match="merge_prompts must be False for 'plackett_luce'"):
        make_trainer(ranked, objective=Objective("plackett_luce"))
    with pytest.raises(ValueError, match="precompute_ref_log_probs must be False, for 'mpo' has no reference"):
        make_trainer({"precompute_ref_log_probs": True}, objective=simpo)


def test_what_is_dropped_is_said(make_trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"prompt": "Tea?", "positives": [" Hi.", " "], "negatives": [" No."]},
        {"prompt": "Hi.", "positives": [" Hi."]},
    ]
    trainer = make_trainer(train_dataset=[*rows[:1], {**rows[1], "negatives": []}])
    assert len(trainer.train_dataset) == 1
    assert "dropped 1 response: empty (first: row 0" in caplog.text and "no negative (first: row 1" in caplog.text
    trainer.evaluate(rows[:1])
    caplog.clear()
    trainer.evaluate(GROUPS)  # a report of its own
    assert not trainer.report["eval"].dropped and "dropped" not in caplog.text


def test_tokenizers_without_a_pad_token(make_trainer: Any, bpe: Any) -> None:
    """What stands in the padding is never read: eos does as well; with neither it is an error."""
    import tiny_tokenizers

    bare = tiny_tokenizers.byte_level_bpe()
    bare.pad_token = None
    check_same(run(make_trainer(processing_class=bare)), run(make_trainer()))
    bare.eos_token = None
    with pytest.raises(
        ValueError, match=r"processing_class must have a pad_token, or an eos_token.*; got None for both"
    ):
        make_trainer(processing_class=bare)
