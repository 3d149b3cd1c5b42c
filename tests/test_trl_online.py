"""`OnlineGroupDPOTrainer`: TRL generates, rewards make groups, and each step is that of a plain loop on them."""

from __future__ import annotations

import copy
import math
import socket
import warnings
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from processes import run_ranks
from tiny_models import BASE, make
from tiny_online import ONLINE, Gradients, Rewards, far, groups_of, loaded, plain_gradient, run_as_rank
from tiny_trl import PROMPTS, llama, lora, steps, trainable
from trl.trainer.utils import RepeatSampler

from groupdpo_kernels import AdaBalance, Objective
from groupdpo_kernels.data import top_k
from groupdpo_kernels.trainers import OnlineGroupDPOConfig, OnlineGroupDPOTrainer
from groupdpo_kernels.trainers.misplaced import GRPO_OPTIONS
from groupdpo_kernels.trainers.online_group_dpo import _OrderOfEpoch
from groupdpo_kernels.trainers.online_groups import slices, weights

MPO = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)
DATA = Dataset.from_dict({"prompt": PROMPTS})


@pytest.fixture
def make_trainer(tmp_path: Path, bpe: Any) -> Any:
    def make_one(options: dict[str, Any] | None = None, **named: Any) -> Any:
        config = OnlineGroupDPOConfig(**{**ONLINE, "output_dir": str(tmp_path / "run"), **(options or {})})
        named = {"model": llama(), "reward_funcs": Rewards(), "train_dataset": DATA, "processing_class": bpe, **named}
        return OnlineGroupDPOTrainer(args=config, **named)

    return make_one


class Recording(OnlineGroupDPOTrainer):
    """Notes the prompt and the completions of each step's groups, as token ids."""

    def _by_parts(self, model: Any, step: Any, *more: Any) -> Any:
        noted = []
        for mb in step.micro_batches:
            targets = mb.targets.reshape(-1)[mb.live_index]
            noted += [x.tolist() for x in targets.tensor_split(mb.cu_seqlens[1:-1].long())]
        found = [[], *([] for _ in range(step.groups.num_groups - 1))]
        for g, ids in zip(step.groups.ids.tolist(), noted):
            found[g].append(ids)
        self.__dict__.setdefault("steps", []).append(found)
        return super()._by_parts(model, step, *more)


# ---------------------------------------------------------------------------------------------------- the plain loop


@pytest.mark.parametrize(
    "objective, options",
    [
        (MPO, {}),
        (MPO, {"strategy": "coupled", "share_prompt": False}),
        (Objective("sigmoid", beta=0.5, balance=AdaBalance()), {"rule": top_k(1, 1), "micro_batch_sequences": 1}),
        (Objective("plackett_luce", beta=0.5), {"rule": "ranks", "micro_batch_tokens": 40}),
        (Objective("simpo", beta=2.0, gamma=0.3), {"rule": top_k(1, 1), "gradient_checkpointing": True}),
    ],
    ids=["mpo", "coupled", "adadpo", "plackett_luce", "simpo"],
)
def test_a_step_is_that_of_a_plain_loop(
    make_trainer: Any, bpe: Any, objective: Objective, options: dict[str, Any]
) -> None:
    """Both steps: the reference is the model as it was given, while the policy moves."""
    rewards, gradients = Rewards(), Gradients()
    trainer = make_trainer(options, reward_funcs=rewards, callbacks=[gradients], objective=objective)
    trainer.train()
    assert len(gradients.seen) == len(rewards.calls) == 2
    reference = llama() if objective.needs_reference else None
    assert (trainer.ref_model is None) == (reference is None)
    for found, state, noted in zip(gradients.seen, gradients.states, rewards.calls):
        groups = groups_of(noted, 4, options.get("rule", "best_vs_rest"))
        assert groups
        expected = plain_gradient(loaded(state), groups, bpe, objective, reference)
        assert far(found, expected) < 1e-6
    logged = steps(trainer)
    names = {
        "loss",
        "reward",
        "rewards/first_token/mean",
        "rewards/margins",
        "completions/mean_length",
        "positive_mass",
    }
    names |= {"balance_weight"} if objective.balance else set()
    assert all(names <= row.keys() and ("pass_drift" in row) != (trainer.strategy == "coupled") for row in logged)


def test_micro_batches_and_shared_prompts_change_nothing(make_trainer: Any) -> None:
    """Nor does rounding: 1e-6 of the weights' change, over two steps."""
    start, ends = trainable(make_trainer()), []
    for options in ({"micro_batch_sequences": None}, {"micro_batch_sequences": 1, "share_prompt": False}):
        trainer = make_trainer(options)
        assert trainer.share_prompt == (trainer.args.share_prompt == "auto")
        trainer.train()
        ends.append(trainable(trainer))
    assert (ends[0] - ends[1]).norm() < 1e-5 * (ends[0] - start).norm()


# ---------------------------------------------------------------------------------------------- generations and slices


def test_groups_stay_whole(make_trainer: Any, bpe: Any, tmp_path: Path) -> None:
    """Two slices of a generation, each used twice, two to an optimizer step; groups are shuffled, not completions."""
    options = {"steps_per_generation": 2, "num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    rewards, gradients = Rewards(), Gradients()
    config = OnlineGroupDPOConfig(output_dir=str(tmp_path / "run"), **ONLINE | options)
    trainer = Recording(llama(), rewards, config, train_dataset=DATA, processing_class=bpe, callbacks=[gradients])
    trainer.train()
    assert [len(call) for call in rewards.calls] == [16, 16] and len(trainer.steps) == 8
    orders = []
    for k, noted in enumerate(rewards.calls):
        groups = [completions for _, completions, _ in groups_of(noted, 4)]
        first, again = trainer.steps[4 * k : 4 * k + 2], trainer.steps[4 * k + 2 : 4 * k + 4]
        assert first == again and [len(step) for step in first] == [len(groups) // 2, len(groups) - len(groups) // 2]
        orders.append([groups.index(group) for step in first for group in step])
        assert sorted(orders[-1]) == [*range(len(groups))]
    assert any(order != sorted(order) for order in orders)
    # An optimizer step is the mean over the four groups of its two slices.
    expected = plain_gradient(loaded(gradients.states[1]), groups_of(rewards.calls[0], 4), bpe, MPO, llama())
    assert far(gradients.seen[1], expected) < 1e-6


@pytest.mark.parametrize("strategy", ["two_pass", "coupled"])
def test_groups_without_two_sides_are_dropped(make_trainer: Any, bpe: Any, strategy: str) -> None:
    """Three of four: one slice has a group, the other none; the gradient is that of the one group."""
    rewards, gradients = Rewards(*PROMPTS[1:]), Gradients()
    options = {"gradient_accumulation_steps": 2, "max_steps": 1, "strategy": strategy}
    trainer = make_trainer(options, reward_funcs=rewards, callbacks=[gradients])
    trainer.train()
    groups = groups_of(rewards.calls[0], 4)
    assert len(groups) == 1
    assert far(gradients.seen[0], plain_gradient(llama(), groups, bpe, MPO, llama())) < 1e-6
    (row,) = steps(trainer)
    assert row["groups/dropped"] == 0.75 and row["groups/positives"] + row["groups/negatives"] == 4
    assert row["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_weights_of_slices() -> None:
    """With every group's own loss in place of the mean, the slices of a step together give each group one share."""
    counts = [3, 2, 0, 3]
    for accumulation, together in ((4, 4), (8, 4), (2, 2), (1, 1), (3, 1)):
        found = weights(counts, accumulation)
        for start in range(0, 4, together):
            kept = counts[start : start + together]
            for i, count in enumerate(kept):
                share = found[start + i] / max(1, count) / together
                assert share == pytest.approx(1 / sum(kept) if count else 0)
    groups: Any = list(range(7))
    torch.manual_seed(0)
    parts = slices(groups, 3)
    assert [len(part) for part in parts] == [2, 2, 3] and sorted(chain(*parts)) == groups != [*chain(*parts)]


def test_a_step_without_groups_changes_nothing(make_trainer: Any) -> None:
    for strategy in ("two_pass", "coupled"):
        rewards = Rewards(*PROMPTS)
        with pytest.warns(UserWarning, match="no group of the first generation .* 'best_vs_rest', .* 8 rewards .* 1$"):
            trainer = make_trainer({"strategy": strategy}, reward_funcs=rewards)
            start = trainable(trainer)
            trainer.train()
        assert torch.equal(trainable(trainer), start) and len(rewards.calls) == 2
        for row in steps(trainer):
            assert row["loss"] == row["grad_norm"] == 0 and row["groups/dropped"] == 1 and row["reward"] == 1
            assert "rewards/margins" not in row and "groups/positives" not in row


def test_what_is_not_scored_or_is_cut_off_is_left_out(make_trainer: Any, bpe: Any) -> None:
    """None from each function, and completions that reach the limit where mask_truncated_completions asks for it."""
    rewards, gradients = Rewards(), Gradients()

    def unsure(prompts: list[str], completion_ids: list[list[int]], **named: Any) -> list[float | None]:
        found = rewards(prompts, completion_ids)
        return [None if i % 4 == 1 else value for i, value in enumerate(found)]

    class NoneAtAll:
        async def __call__(self, completions: list[str], **named: Any) -> list[None]:
            return [None] * len(completions)

    model = llama()
    ends = range(2, 20)
    model.generation_config.eos_token_id = [*ends]
    options = {"mask_truncated_completions": True, "max_steps": 2, "reward_weights": [2.0, 5.0]}
    options |= {
        "learning_rate": 0.0,
        "max_completion_length": 24,
        "num_generations": 8,
        "per_device_train_batch_size": 16,
    }
    named = {"model": model, "reward_funcs": [partial(unsure), NoneAtAll()], "callbacks": [gradients]}
    make_trainer(options, **named).train()
    ended = 0
    for found, noted in zip(gradients.seen, rewards.calls):
        kept = [row for i, row in enumerate(noted) if i % 4 != 1 and row[1][-1] in ends]
        ended += len(kept)
        groups = []
        for prompt in dict.fromkeys(p for p, _, _ in kept):
            rows = [row for row in kept if row[0] == prompt]
            groups += groups_of(rows, len(rows))
        if groups:
            assert far(found, plain_gradient(llama(), groups, bpe, MPO, llama())) < 1e-6
    assert 4 < ended < 20


# ------------------------------------------------------------------------------------------------------- the reference


def test_an_adapter_is_its_own_reference(make_trainer: Any, bpe: Any) -> None:
    """A new one: the model without it. One that is there: a copy of it. Or a model that is given."""
    torch.manual_seed(3)
    there = peft.get_peft_model(llama(), lora(init_lora_weights=False))
    cases = {"new": {"peft_config": lora()}, "there": {"model": copy.deepcopy(there)}}
    cases["given"] = {"model": copy.deepcopy(there), "ref_model": llama()}
    for name, named in cases.items():
        rewards, gradients = Rewards(), Gradients()
        trainer = make_trainer(
            {"max_steps": 2, "learning_rate": 1.0}, reward_funcs=rewards, callbacks=[gradients], **named
        )
        reference = copy.deepcopy(there) if name == "there" else llama()
        assert (trainer.ref_model is None) == (name != "given")
        trainer.train()
        policy = copy.deepcopy(there) if name != "new" else peft.get_peft_model(llama(), lora())
        for found, state, noted in zip(gradients.seen, gradients.states, rewards.calls, strict=True):
            policy.load_state_dict({key: x for key, x in state.items() if ".ref." not in key})
            assert far(found, plain_gradient(policy, groups_of(noted, 4), bpe, MPO, reference)) < 2e-6, name


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_the_reference_follows_the_policy(make_trainer: Any, with_lora: bool) -> None:
    """After every step: rewards are 0 at each. After every other: at the first and the third."""
    for every, fresh in ((1, [1, 2, 3]), (2, [1, 3])):
        more = {"peft_config": lora(init_lora_weights=False)} if with_lora else {}
        trainer = make_trainer({"max_steps": 3, "ref_sync_steps": every, "learning_rate": 0.5}, **more)
        trainer.train()
        assert [row["step"] for row in steps(trainer) if abs(row["rewards/chosen"]) < 1e-5] == fresh


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_a_run_goes_on_where_it_was(make_trainer: Any, with_lora: bool) -> None:
    """From step 3, in the second epoch, where the reference is the policy after step 2."""
    ends = []
    for resume in (None, True):
        more = {"peft_config": lora()} if with_lora else {}
        options = {"max_steps": 5, "ref_sync_steps": 2, "save_strategy": "steps", "save_steps": 3, "rule": top_k(1)}
        options |= {"learning_rate": 0.2}
        trainer = make_trainer(options, **more)
        assert trainer.args.to_dict()["rule"] == "top_k.<locals>.rule"
        trainer.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-3") if resume else None)
        assert callable(trainer.args.rule)
        ends.append((trainable(trainer), steps(trainer)[-1]))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=0)
    assert (
        ends[0][1] == ends[1][1]
        and ends[0][1]["step"] == 5
        and ends[0][1]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    )


def test_a_later_epoch_has_its_own_order_when_a_run_goes_on() -> None:
    """TRL's sampler draws an order whenever it is read, so that a resumed run would begin with the first epoch's."""

    def sampler() -> Any:
        return RepeatSampler(range(9), 2, shuffle=True, seed=5)

    theirs, ours = sampler(), _OrderOfEpoch(sampler())
    epochs = [[*theirs] for _ in range(3)]
    for epoch in (0, 1, 2, 2, 1):
        ours.set_epoch(epoch)
        assert [*ours] == epochs[epoch] and len(ours) == len(theirs)
    assert epochs[0] != epochs[1] != epochs[2]


# ----------------------------------------------------------------------------------------- ranks, backends, evaluation


def test_two_ranks_step_as_one_process(bpe: Any, tmp_path: Path) -> None:
    """DistributedDataParallel; groups are cut between the ranks, in generation too where a batch is less than a group.

    One process takes the same completions, in a plain loop, and ends at the same weights.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert not (failure := run_ranks(run_as_rank, port, str(tmp_path))), failure
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    evaluated, others = (rank["evaluated"] for rank in both)
    assert 0 < evaluated["eval_loss"] == others["eval_loss"] and evaluated["eval_groups/dropped"] == 0
    assert both[0]["failed"].startswith("IndexError") and "the first rank it raised IndexError" in both[1]["failed"]
    for strategy, size, kept in (("two_pass", 6, [2, 1]), ("coupled", 8, [2, 2])):
        (kind, calls, seen, states, rows), (_, others, also, _, others_rows) = (rank[strategy] for rank in both)
        assert kind == "DistributedDataParallel" and all(map(torch.equal, seen, also))
        assert [[len(call) for call in rank] for rank in (calls, others)] == [[size, size]] * 2
        single = loaded(states[0])
        trains = dict(single.named_parameters())
        for k, found in enumerate(seen):
            groups = groups_of(calls[k] + others[k], 4)
            assert len(groups) == kept[k] and rows[k]["groups/dropped"] == pytest.approx(1 - kept[k] / (size / 2))
            expected = plain_gradient(single, groups, bpe, MPO, llama())
            assert far(found, expected) < 1e-6
            with torch.no_grad():
                for x, d_x in zip(trains.values(), expected.split([x.numel() for x in trains.values()])):
                    x -= ONLINE["learning_rate"] * d_x.view_as(x).float()
        of_loss = ("loss", "rewards/margins", "pass_drift")
        assert all(row.get(name) == other.get(name) for row, other in zip(rows, others_rows) for name in of_loss)
        way = sum((x - states[0][name]).square().sum() for name, x in trains.items())
        off = sum((x - states[2][name]).square().sum() for name, x in trains.items())
        assert off < (5e-6) ** 2 * way


def test_continuous_batching_generates_too(make_trainer: Any, bpe: Any) -> None:
    rewards, gradients = Rewards(), Gradients()
    options = {"use_transformers_continuous_batching": True, "max_steps": 1}
    options["transformers_continuous_batching_config"] = {"num_blocks": 64, "max_batch_tokens": 64}
    make_trainer(options, reward_funcs=rewards, callbacks=[gradients]).train()
    expected = plain_gradient(llama(), groups_of(rewards.calls[0], 4), bpe, MPO, llama())
    assert far(gradients.seen[0], expected) < 1e-6


def test_a_reward_model_and_the_log_of_completions(make_trainer: Any, bpe: Any) -> None:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**BASE | {"num_labels": 1, "name_or_path": "tiny-judge"})
    judge = transformers.LlamaForSequenceClassification(config).eval()
    options = {"log_completions": True, "max_steps": 1}
    trainer = make_trainer(options, reward_funcs=[judge, Rewards()], reward_processing_classes=[bpe, None])
    trainer.train()
    (row,) = steps(trainer)
    assert {"rewards/tiny-judge/mean", "rewards/first_token/mean"} <= row.keys() and row["groups/dropped"] == 0
    assert list((Path(trainer.args.output_dir) / "completions").glob("*.parquet"))


def test_evaluation(make_trainer: Any) -> None:
    options = {"per_device_eval_batch_size": 6, "num_generations_eval": 3, "max_steps": 1, "learning_rate": 0.0}
    trainer = make_trainer(options, eval_dataset=DATA, reward_funcs=Rewards(PROMPTS[0]))
    found = trainer.evaluate()
    assert found["eval_groups/dropped"] >= 0.25 and found["eval_groups/positives"] >= 1
    assert found["eval_loss"] > 0 and found["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert {"eval_reward", "eval_positive_mass"} <= found.keys() and found == {**found}
    trainer.train()
    again = trainer.evaluate()
    assert again["eval_loss"] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nothing = make_trainer(options, eval_dataset=DATA, reward_funcs=Rewards(*PROMPTS)).evaluate()
    assert math.isnan(nothing["eval_loss"]) and nothing["eval_groups/dropped"] == 1


# --------------------------------------------------------------------------------------------------- what it refuses


def returning(value: Any) -> Any:
    def rewards(completions: list[str], **named: Any) -> Any:
        return value(len(completions)) if callable(value) else value

    return rewards


@pytest.mark.parametrize(
    "function, kind, says",
    [
        (returning([1.0]), ValueError, "reward function 'rewards' must return 8 rewards, one a completion; got 1"),
        (returning(1.0), TypeError, "reward function 'rewards' must return a list of 8 numbers; got a float"),
        (returning(lambda n: ["good"] * n), TypeError, "a number or None for each of 8 completions; got 'good'"),
        (returning(lambda n: [math.nan] * n), ValueError, "finite numbers, or None .* got nan for number 0"),
        (returning(lambda n: [0.0] * (n - 1) + [-math.inf]), ValueError, "got -inf for number 7"),
        (returning(lambda n: [1e39] * n), ValueError, "'rewards' must return finite numbers; got an infinite one"),
        (returning(lambda n: [None] * n), ValueError, "reward_funcs must score .* None for all 8 from rewards"),
    ],
)
def test_rewards_that_are_none(make_trainer: Any, function: Any, kind: type[Exception], says: str) -> None:
    async def later(**named: Any) -> Any:
        return function(**named)

    later.__name__ = "rewards"
    for each in (function, later) if kind is TypeError else (function,):
        with pytest.raises(kind, match=says):
            make_trainer(reward_funcs=each).train()


def test_a_reward_model_that_gives_nan(make_trainer: Any, bpe: Any) -> None:
    judge = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**BASE | {"num_labels": 1})).eval()
    judge.config._name_or_path = "judge"
    with torch.no_grad():
        judge.score.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="'judge' must return finite numbers; got NaN from the model"):
        make_trainer(reward_funcs=judge, reward_processing_classes=[bpe]).train()


@pytest.mark.parametrize(
    "options, says",
    [
        ({"rule": "best"}, "rule must be one of best_vs_rest, .*got 'best'"),
        ({"strategy": "one_pass"}, "strategy must be one of two_pass, coupled; got 'one_pass'"),
        ({"micro_batch_tokens": "auto"}, "micro_batch_tokens must be an int or None; got 'auto'"),
        ({"micro_batch_tokens": 8}, "micro_batch_tokens must be at least 9, max_completion_length and a prompt; got 8"),
        ({"micro_batch_sequences": 0}, "micro_batch_sequences must be at least 1; got 0"),
        ({"share_prompt": 2}, "share_prompt must be 'auto', True or False; got 2"),
        ({"ref_sync_steps": 0}, "ref_sync_steps must be at least 1; got 0"),
        ({"num_generations": 1}, "num_generations must be at least 2, .*; got 1"),
        ({"num_generations_eval": 1}, "num_generations_eval must be at least 2, .*; got 1"),
        ({"per_device_train_batch_size": 6}, r"generation_batch_size \(6\) must be divisible by num_generations \(4\)"),
        ({"loss_type": "grpo"}, "loss_type of GRPOConfig must stay 'dapo', because Objective.* says .*; got 'grpo'"),
        ({"beta": 0.1}, r"beta of GRPOConfig must stay 0.0, because Objective\(beta=...\) says it; got 0.1"),
        ({"scale_rewards": "batch"}, "scale_rewards of GRPOConfig must stay 'group', .*; got 'batch'"),
        ({"scale_rewards": False}, "scale_rewards of GRPOConfig must stay 'group', .*; got False"),
        ({"epsilon_high": 0.28}, "epsilon_high of GRPOConfig must stay None, .* nothing to clip; got 0.28"),
        ({"sync_ref_model": True}, "sync_ref_model of GRPOConfig must stay False, .*ref_sync_steps says .*; got True"),
        ({"torch_compile": True}, "torch_compile must be False"),
        ({"fsdp": "full_shard"}, "OnlineGroupDPOTrainer must run on one device .* got FSDP"),
    ],
)
def test_options_that_are_refused(make_trainer: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_trainer(options)


def test_every_option_of_grpo_is_known_or_used() -> None:
    """GRPO_OPTIONS names options of the installed version; its own defaults pass, in either way of writing them."""
    fields = OnlineGroupDPOConfig.__dataclass_fields__
    assert not GRPO_OPTIONS.keys() - fields.keys()
    OnlineGroupDPOConfig("out", use_cpu=True, bf16=False, scale_rewards=True)


def test_names_that_are_misplaced(make_trainer: Any) -> None:
    with pytest.raises(
        TypeError, match=r"label_smoothing must be given to Objective.*Objective\(label_smoothing=0.1\)"
    ):
        OnlineGroupDPOConfig("out", label_smoothing=0.1)
    with pytest.raises(TypeError, match="has no option 'micro_batch_sequence': did you mean micro_batch_sequences"):
        OnlineGroupDPOConfig("out", micro_batch_sequence=1)
    with pytest.raises(TypeError, match="tokenizer must be given to OnlineGroupDPOTrainer as processing_class="):
        make_trainer(tokenizer=1)


SIMPO = Objective("simpo", beta=2.0)


@pytest.mark.parametrize(
    "named, says",
    [
        ({"args": 3}, "args must be an OnlineGroupDPOConfig; got int"),
        ({"model": 3}, "model must be a model, or its name; got 3"),
        ({"objective": "mpo"}, "objective must be an Objective; got 'mpo'"),
        ({"ref_model": "a/name"}, "ref_model must be a model or None; got a str"),
        (
            {"ref_model": llama(), "objective": SIMPO},
            "ref_model must be None, for 'simpo' has no reference; got a Llama",
        ),
        ({"tools": [print]}, "tools must be None: completions call no tools here; got"),
        (
            {"train_dataset": Dataset.from_dict({"prompt": ["a"], "image": [1]})},
            "no column 'image': groups are of text",
        ),
        ({"eval_dataset": DATA}, "multiple of num_generations_eval = 4, so that groups are whole; got 6 times 1"),
        (
            {"peft_config": peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")},
            "peft_config must be of",
        ),
    ],
)
def test_arguments_that_are_refused(tmp_path: Path, bpe: Any, named: dict[str, Any], says: str) -> None:
    config = OnlineGroupDPOConfig(output_dir=str(tmp_path), **ONLINE | {"per_device_eval_batch_size": 6})
    named = {"model": llama(), "args": config, "train_dataset": DATA, "processing_class": bpe, **named}
    with pytest.raises((ValueError, TypeError), match=says):
        OnlineGroupDPOTrainer(reward_funcs=Rewards(), **named)


def test_references_that_are_refused(make_trainer: Any) -> None:
    model = llama()
    with pytest.raises(ValueError, match="ref_model must be another object than model"):
        make_trainer(model=model, ref_model=model)
    with pytest.raises(ValueError, match="ref_sync_steps must be None, for 'simpo' has no reference; got 2"):
        make_trainer({"ref_sync_steps": 2}, objective=SIMPO)
    with pytest.raises(ValueError, match=r"ref_model must have the parameters of model .* got other model.layers.1"):
        make_trainer({"ref_sync_steps": 2}, ref_model=make("llama", num_hidden_layers=1))
    left = peft.get_peft_model(llama(), lora())
    left.add_adapter("ref", lora())
    with pytest.raises(ValueError, match="ref_model must be given for a model with an adapter named 'ref'"):
        make_trainer(model=left)
    with pytest.raises(ValueError, match=r"ref_model must be given, .*weights outside the adapter train"):
        make_trainer(model=make("phi"), peft_config=lora(bias="all"))


def test_rules_that_do_not_fit(make_trainer: Any) -> None:
    with pytest.raises(ValueError, match=r"rule must keep two completions .*'sigmoid', as data.top_k\(1, 1\).* got 4"):
        make_trainer(objective=Objective("sigmoid")).train()
    with pytest.raises(ValueError, match=r"rule must return different indices of 4 scores, .* got \[0, 4\]"):
        make_trainer({"rule": lambda scores: [(0, True), (4, False)]}).train()


def test_a_completion_longer_than_a_micro_batch(make_trainer: Any) -> None:
    with pytest.raises(ValueError, match=r"micro_batch_tokens must be at least 1\d, for a prompt .*; got 9"):
        make_trainer({"micro_batch_tokens": 9}).train()


def test_a_batch_that_splits_groups(make_trainer: Any) -> None:
    trainer = make_trainer({"per_device_eval_batch_size": 6})
    with pytest.raises(ValueError, match=r"batches of all ranks must together hold whole groups of 4 .* got 6 rows"):
        trainer.evaluate(DATA)


def test_another_trl(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "__version__", "1.15.3")
    with pytest.raises(
        RuntimeError, match=r"OnlineGroupDPOTrainer knows TRL 1.16 and later, before 2.0; installed is 1"
    ):
        make_trainer()
