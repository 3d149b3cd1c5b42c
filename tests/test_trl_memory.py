"""`GroupDPOTrainer` and memory: the micro-batch that the planner chooses, and what a step without memory says."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make
from tiny_trl import COMMON, GROUPS, check_same, llama, run

from groupdpo_kernels.data import TokenGroup, collate
from groupdpo_kernels.memory.planner import largest_micro_batch, skeleton, step_peak, trace
from groupdpo_kernels.memory.workload import Workload
from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer, fit_check, group_dpo, steps


@pytest.fixture
def make_trainer(tmp_path: Path, bpe: Any) -> Any:
    def make_one(**options: Any) -> Any:
        config = {**COMMON, "output_dir": str(tmp_path / "run"), "micro_batch_sequences": None, "max_steps": 1}
        args = GroupDPOConfig(**config | {"strategy": "two_pass", "gradient_checkpointing": False} | options)
        return GroupDPOTrainer(llama(), args=args, train_dataset=GROUPS, processing_class=bpe)

    return make_one


def longest(trainer: Any) -> int:
    return max(len(g.prompt) + max(map(len, g.responses)) for g in trainer.train_dataset.groups)


def test_auto_takes_the_largest_micro_batch_that_fits(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    _, one = largest_micro_batch(model, 17, 2**40, device="cpu")
    monkeypatch.setattr(group_dpo, "memory_of", lambda model, device: one + 2**20)
    trainer = make_trainer(micro_batch_tokens="auto", share_prompt=False)
    tokens, L = trainer.data_collator.max_tokens, longest(trainer)
    assert tokens % L == 0 and tokens // L == largest_micro_batch(model, L, one + 2**20, device="cpu")[0] >= 1
    run(trainer)


def test_auto_reads_the_memory_of_the_machine(make_trainer: Any) -> None:
    trainer = make_trainer(micro_batch_tokens="auto")
    assert trainer.data_collator.max_tokens > 1000 * longest(trainer)


def test_auto_says_what_does_not_fit(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_dpo, "memory_of", lambda model, device: 1000)
    with pytest.raises(ValueError, match=r"micro_batch_tokens='auto' finds no micro-batch: one sequence of \d+ tokens"):
        make_trainer(micro_batch_tokens="auto")


@pytest.mark.parametrize("strategy", ["two_pass", "coupled"])
def test_a_step_without_memory_says_what_fits(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    trainer = make_trainer(strategy=strategy)

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(steps, "group_backward", fails)
    monkeypatch.setattr(GroupDPOTrainer, "compute_loss", fails)
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\.") as caught:
        trainer.train()
    text = str(caught.value)
    assert f"with strategy '{strategy}' ran out of memory; the largest of its 1 micro-batches is" in text
    assert "Two passes fit" in text and "micro_batch_tokens=" in text
    assert ("strategy='two_pass'" in text) == (strategy == "coupled")


def test_a_group_that_cannot_fit_is_refused_before_training(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of the largest group alone, at the mean length of its responses: just enough passes, less does not."""
    make_whole = functools.partial(make_trainer, share_prompt=False)
    rows = make_whole(strategy="coupled").train_dataset.groups
    largest = max(rows, key=lambda group: len(group.responses) * len(group.prompt) + sum(map(len, group.responses)))
    step = fit_check._Step.of([largest], False)
    assert step == (4, len(largest.prompt) + -(-sum(map(len, largest.responses)) // 4), 0, 1)
    need = step_peak(llama(), step.responses, step.tokens, 2**40, device="cpu", optimizer="sgd")
    most = math.ceil(fit_check.SHARE * need)
    monkeypatch.setattr(group_dpo, "memory_of", lambda model, device: most)
    make_whole(strategy="coupled")
    monkeypatch.setattr(group_dpo, "memory_of", lambda model, device: most - 1)
    make_whole(strategy="two_pass")
    said = rf"row {largest.row} of train_dataset has 4 responses of some {step.tokens} tokens, .*'two_pass'.*'coupled'"
    with pytest.raises(ValueError, match=said):
        make_whole(strategy="coupled")


def test_auto_is_coupled_where_the_graph_of_the_largest_step_fits(
    make_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest step has the two largest groups: just enough memory, and one byte less. The weights are the same."""
    make_whole = functools.partial(make_trainer, share_prompt=False)
    chosen = make_whole(strategy="auto", max_steps=2)
    assert chosen.strategy == "coupled"
    two = sorted(chosen.train_dataset.groups, key=fit_check._tokens_of)[-2:]
    responses, tokens = sum(len(g.responses) for g in two), sum(map(fit_check._tokens_of, two))
    step = fit_check._Step.of(two, False)
    assert step == (responses, -(-tokens // responses), 0, 1)
    peak = step_peak(llama(), step.responses, step.tokens, 2**40, device="cpu")
    assert peak < 256 * tokens * 2 * 32 + 16 * chosen.model.num_parameters()  # what it asked no planner for
    expected = run(chosen)
    for more, strategy in ((1, "coupled"), (0, "two_pass")):
        monkeypatch.setattr(group_dpo, "memory_of", lambda model, device, n=peak + more: n)
        trainer = make_whole(strategy="auto", max_steps=2, micro_batch_tokens="auto" if more else None)
        assert trainer.strategy == strategy
        check_same(run(trainer), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_auto_of_models_that_the_bound_does_not_know(attention: str) -> None:
    """Eager attention keeps scores, experts keep copies: the planner is asked, and says what it finds."""
    args = llama(), None, [TokenGroup([1] * 9, [[2] * 90, [3] * 91], [True, False], 0)], 1
    model = args[0]
    model.set_attn_implementation(attention)
    _, why = fit_check.strategy_that_fits(*args, torch.device("cpu"), False, 2**40)
    assert ("less than" in why) == (attention == "sdpa")
    del model.model.layers
    strategy, why = fit_check.strategy_that_fits(*args, torch.device("cpu"), False, 1000)
    assert strategy == "two_pass" and "is not known: model must have a decoder with layers" in why


def group_of(prompt: int, *responses: int) -> TokenGroup:
    ids = torch.arange(max(prompt, *responses), dtype=torch.int32)
    return TokenGroup(ids[:prompt], [ids[:n] for n in responses], [i == 0 for i in range(len(responses))], 0)


SHARING = [group_of(60, *[10] * 8), group_of(20, 30, 40, 20), group_of(50, *[4] * 20), group_of(1, 5, 6)]
CPU = torch.device("cpu")


def test_a_step_that_shares_prompts_is_sized_by_what_runs() -> None:
    """Each prompt once, and each response with the keys and values of its own."""
    step = fit_check._Step.of(SHARING[:2], True)
    assert step == (11, 50 + 16, 50, 2)  # means over responses: of 540 tokens of prompts and of 170 of their own
    assert str(step) == "11 responses of some 16 tokens after 2 shared prompts of some 50"
    assert fit_check._Step.of(SHARING[3:], True) == fit_check._Step.of(SHARING[3:], False)  # a prompt of one token
    model = make("llama", max_position_embeddings=512)
    shared, bound = fit_check._peak_of(model, step, False, CPU, 1, "adamw")
    whole, _ = fit_check._peak_of(model, step._replace(prompt=0, prompts=1), False, CPU, 1, "adamw")
    assert not bound and shared < 0.7 * whole
    for more, strategy in ((1, "coupled"), (0, "two_pass")):
        memory = shared + more
        found, why = fit_check.strategy_that_fits(model, None, SHARING[:2], 2, CPU, False, memory, share_prompt=True)
        assert found == strategy and str(step) in why
    with pytest.raises(ValueError, match=r"has 20 responses of some 4 tokens after a shared prompt of 50, whose graph"):
        fit_check.check_group_fits(model, SHARING, CPU, False, 10**5, share_prompt=True)


def test_auto_counts_the_prompt_that_a_micro_batch_shares() -> None:
    """Micro-batches that hold many copies of a prompt fit too, and no longer one does."""
    model, memory = make("llama", max_position_embeddings=512), 10 * 2**17
    most = fit_check.micro_batch_tokens_of(model, None, SHARING, CPU, False, memory, share_prompt=True)
    (part,) = collate(SHARING[2:3], max_tokens=most, share_prompt=True).parts
    rows, n = part.micro_batches[0].input_ids.shape
    assert most == 49 + rows * n and 1 < rows < 20

    def peak(size: int) -> int:
        load = Workload(tokens=50 + n, prompt=50, share_prompt=True, micro_batch=size, group=2 * size)
        return max(part.total for part in trace(load, skeleton(model), "cpu").values())

    assert peak(rows) <= memory < peak(rows + 1)


def test_advice_for_shared_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", max_position_embeddings=512)
    alone = collate(SHARING[:1], max_sequences=5, share_prompt=True)
    monkeypatch.setattr(fit_check, "memory_of", lambda *_: 1000)
    none = fit_check.advice(model, alone, "two_pass", False, CPU, None, share_prompt=True)
    assert "the largest of its 2 micro-batches is 5 x 10 tokens after a prompt of 60. Two passes with one" in none
    monkeypatch.setattr(fit_check, "memory_of", lambda *_: 2**30)
    together = collate([SHARING[0], SHARING[2]], share_prompt=True)
    said = fit_check.advice(model, together, "coupled", False, CPU, None, share_prompt=True)
    assert "micro-batches is 28 x 10 tokens after 2 prompts of up to 60. Two passes fit" in said
    size, tokens = (int(x) for x in re.findall(r"fit (\d+) x 10 tokens after .*micro_batch_tokens=(\d+)", said)[0])
    assert tokens == 59 + 10 * size


def test_advice_never_hides_the_error(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the optimizer's state is memory that the next step has, too."""
    trainer = make_trainer(optim="adamw_torch", max_steps=2)
    run(trainer)
    with monkeypatch.context() as patch:
        patch.setattr(fit_check.Path, "read_text", lambda self: "MemAvailable: 1000 kB")
        known = [fit_check.memory_of(trainer.model, trainer.args.device, o) for o in (trainer.optimizer, None)]
    parameters = [p.nbytes for p in trainer.model.parameters()]
    counts = 4 * len(parameters)  # AdamW's numbers of steps
    assert known[0] - known[1] == 2 * sum(parameters) + counts

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(steps, "group_backward", fails)
    monkeypatch.setattr(fit_check, "memory_of", lambda *_: 1 // 0)
    said = r"^CUDA out of memory\.\nWhat would fit is not known: integer division or modulo by zero$"
    with pytest.raises(torch.OutOfMemoryError, match=said):
        make_trainer().train()


def test_auto_with_options_of_checkpointing(make_trainer: Any) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}}
    run(make_trainer(micro_batch_tokens="auto", **options))


def test_other_errors_pass(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(steps, "group_backward", fails)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        make_trainer().train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch_tokens": "large"}, "micro_batch_tokens must be an int or None, .* got 'large'"),
        ({"micro_batch_sequences": "auto"}, "micro_batch_sequences must be an int or None, .* got 'auto'"),
        ({"micro_batch_tokens": "auto", "strategy": "coupled"}, "got 'auto' with strategy 'coupled'"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupDPOConfig(**COMMON | {"output_dir": str(tmp_path)} | options)
