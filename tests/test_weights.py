"""Weights of groups and of responses, and WPO's: against loops, copies and TRL's formula; and what is refused."""

from __future__ import annotations

import contextlib
import math
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_ranks
from test_preference_weights import draw, draw_groups
from tiny_trl import COMMON, GROUPS, check_same, llama, run, run_as_rank, steps
from torch import Tensor

from groupdpo_kernels import AdaBalance, Objective, PreferenceGroups, group_backward, preference_loss
from groupdpo_kernels.data import Report, TokenGroup, collate, merge_prompts, read_groups, tokenize_groups, top_k
from groupdpo_kernels.preference import fused
from groupdpo_kernels.preference.losses import LOSSES
from groupdpo_kernels.testing import triton_on_cpu
from groupdpo_kernels.trainers import GroupDPOConfig, GroupDPOTrainer

WEIGHED = [name for name, row in LOSSES.items() if row.weighs_responses]
MPO = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)


def objective_of(loss: str, **more: Any) -> Objective:
    return Objective(loss, **{"beta": 0.7, "nll_weight": 0.5, "label_smoothing": 0.1, **more})


def where(impl: str) -> Any:
    return triton_on_cpu() if impl == "triton" else contextlib.nullcontext()


def weighted(groups: PreferenceGroups, **weights: Tensor | None) -> PreferenceGroups:
    return PreferenceGroups(groups.cu_groups, groups.positive, **weights)


def evaluate(logps: Tensor, cu: Tensor, groups: PreferenceGroups, objective: Objective, ref: Tensor, impl: str) -> Any:
    leaf = logps.clone().requires_grad_()
    with where(impl):
        found = preference_loss(leaf, cu, groups, objective, ref, impl=impl)
        (0.75 * found.loss).backward()  # exact, so that what is rounded is ours
    return {**{name: x.detach() for name, x in found._asdict().items()}, "d_token_logps": leaf.grad}


# ------------------------------------------------------------------------------------------------ of a group, or a pair


@pytest.mark.parametrize("policy_weight", [False, True])
@pytest.mark.parametrize("divide_by", ["weights", "count"])
@pytest.mark.parametrize("loss", LOSSES)
def test_weights_of_groups(loss: str, divide_by: Any, policy_weight: bool, poisoned_memory: Any) -> None:
    """Reference in float64 against one group at a time; both implementations within two float32 roundings of it."""
    objective = objective_of(loss, divide_by=divide_by, policy_weight=policy_weight)
    groups, cu, logps, ref = draw(loss, 3, 1.0, per_token=False)
    # These are no powers of two, and one is 0.
    w = torch.tensor([0.3, 0.0, 1.7, 2.9, 1.1, 0.6][: groups.num_groups], dtype=torch.float64)
    found = evaluate(logps.double(), cu, weighted(groups, weights=w), objective, ref.double(), "reference")
    leaf = logps.double().requires_grad_()
    losses = []
    for g in range(groups.num_groups):
        start, end = groups.cu_groups[g : g + 2].tolist()
        alone = PreferenceGroups(torch.tensor([0, end - start]), groups.positive[start:end])
        tokens = slice(int(cu[start]), int(cu[end]))
        plain = Objective(**{**vars(objective), "policy_weight": False})
        value = preference_loss(leaf[tokens], cu[start : end + 1] - cu[start], alone, plain, ref[start:end].double())
        if policy_weight:
            m = value.seq_logps / cu.diff()[start:end]
            side = groups.positive[start:end]
            value = value._replace(loss=torch.exp(m[side].mean() + m[~side].mean()) * value.loss)
        losses.append(value.loss)
    expected = torch.stack(losses)
    torch.testing.assert_close(found["group_losses"], expected.detach(), rtol=1e-12, atol=1e-12)
    mean = (w * expected).sum() / (w.sum() if divide_by == "weights" else len(w))
    torch.testing.assert_close(found["loss"], mean.detach(), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(0.75 * mean, leaf)
    torch.testing.assert_close(found["d_token_logps"], gradient, rtol=1e-12, atol=1e-12)
    for impl in ("reference", "triton"):
        for name, value in evaluate(logps, cu, weighted(groups, weights=w), objective, ref, impl).items():
            budget = torch.finfo(torch.float32).eps * found[name].abs().max()
            assert (value - found[name]).abs().max() <= budget, (impl, name)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_equal_weights_change_nothing_but_by_count(impl: str) -> None:
    groups, cu, logps, ref = draw("mpo", 1, 1.0, per_token=True)
    plain = evaluate(logps, cu, groups, MPO, ref, impl)
    threes = weighted(groups, weights=torch.full((groups.num_groups,), 3))
    for divide_by, factor in {"weights": 1, "count": 3}.items():
        found = evaluate(logps, cu, threes, Objective("mpo", 2.0, True, None, 1.0, divide_by=divide_by), ref, impl)
        for name in ("loss", "d_token_logps"):
            torch.testing.assert_close(found[name], factor * plain[name], rtol=3e-7, atol=0)
        assert torch.equal(found["group_losses"], plain["group_losses"])


def test_the_mean_is_that_of_cross_entropy() -> None:
    """torch divides a weighted mean by the sum of the weights of its targets."""
    logits, targets, w = torch.randn(6, 2).double(), torch.zeros(6, dtype=torch.long), torch.rand(6).double()
    expected = (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * w).sum() / w.sum()
    class_weight = torch.tensor([0.3, 1.0], dtype=torch.float64)
    two = torch.tensor([0, 1, 0, 1, 1, 0])
    groups = weighted(PreferenceGroups.pairs(6), weights=w)
    free = Objective("cpo", beta=1.0)
    # -log sigma of the difference of two logits is the cross-entropy of two classes.
    found = preference_loss(logits.flatten(), torch.arange(13), groups, free)
    torch.testing.assert_close(found.loss, expected)
    chosen_first = logits.gather(1, torch.stack([two, 1 - two], 1)).flatten()
    groups = weighted(PreferenceGroups.pairs(6), weights=class_weight[two])
    found = preference_loss(chosen_first, torch.arange(13), groups, free)
    torch.testing.assert_close(found.loss, torch.nn.functional.cross_entropy(logits, two, class_weight))


# --------------------------------------------------------------------------------------------------------- of responses


@pytest.mark.parametrize("balance", [None, AdaBalance(), AdaBalance(1.3, "reference", normalize=False)])
@pytest.mark.parametrize("loss", WEIGHED)
def test_a_weight_of_a_response_is_as_many_copies(loss: str, balance: AdaBalance | None) -> None:
    """Loss, gradient and AdaDPO's weights, in float64; a weight of 0 leaves the response out, whatever its values."""
    groups, cu, logps, ref = draw(loss, 5, 2.0, per_token=False)
    logps, ref = logps.double(), ref.double()
    generator = torch.Generator().manual_seed(0)
    copies = torch.randint(1, 4, (groups.num_sequences,), generator=generator)
    crowded = (groups.counts()[0] > 1)[groups.ids] & groups.positive
    copies[crowded.nonzero()[0, 0]] = 0
    objective = objective_of(loss, balance=balance, policy_weight=True)
    which = torch.repeat_interleave(torch.arange(groups.num_sequences), copies)
    lengths = cu.diff().long()
    tokens = torch.cat([torch.arange(int(cu[i]), int(cu[i + 1])) for i in which])
    sizes = torch.zeros(groups.num_groups, dtype=torch.long).index_add(0, groups.ids, copies)
    expanded = PreferenceGroups(torch.nn.functional.pad(sizes.cumsum(0), (1, 0)), groups.positive[which])
    leaf = logps.clone().requires_grad_()
    offsets = torch.nn.functional.pad(lengths[which].cumsum(0), (1, 0))
    expected = preference_loss(leaf[tokens], offsets, expanded, objective, ref[which])
    (0.75 * expected.loss).backward()
    of_responses = weighted(groups, response_weights=copies)
    found = evaluate(logps, cu, of_responses, objective, ref, "reference")
    torch.testing.assert_close(found["loss"], expected.loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["group_losses"], expected.group_losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["d_token_logps"], leaf.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["balance_weights"][which], expected.balance_weights, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss", WEIGHED)
def test_a_response_of_weight_0_may_be_anything(loss: str, bad: float) -> None:
    """Nothing of it comes into the loss, the balance or the gradient of the others."""
    sides = [[True, True, False, False], [False, True]]
    logps, ref = -torch.linspace(0.5, 4, 6), -torch.ones(6)
    objective = objective_of(loss, balance=AdaBalance(), policy_weight=True)
    for at in (1, 2):  # a positive, a negative
        weights = [[1.0] * 4, [1.0] * 2]
        weights[0][at] = 0
        groups = PreferenceGroups.from_lists(sides, response_weights=weights)
        expected = evaluate(logps, torch.arange(7), groups, objective, ref, "reference")
        found = evaluate(
            logps.index_fill(0, torch.tensor([at]), bad), torch.arange(7), groups, objective, ref, "reference"
        )
        assert expected["d_token_logps"][at] == 0 and expected["balance_weights"][at] == 1
        for name in ("loss", "group_losses", "balance_weights", "d_token_logps"):
            assert torch.equal(found[name], expected[name]), name
        assert torch.equal(found["seq_logps"][at], torch.tensor(bad)) or math.isnan(bad)


def test_weights_of_responses_run_on_the_reference() -> None:
    groups, cu, logps, ref = draw("mpo", 0, 1.0, per_token=True)
    groups = weighted(groups, response_weights=torch.ones(groups.num_sequences))
    with triton_on_cpu():
        assert fused.resolve("auto", logps.device, logps.dtype, "mpo", 9, True) == "reference"
        assert fused.resolve("auto", logps.device, logps.dtype, "mpo", 9) == "triton"
        with pytest.raises(ValueError, match="cannot run here: groups have response_weights: only the reference"):
            preference_loss(logps, cu, groups, MPO, ref, impl="triton")


# ------------------------------------------------------------------------------------------------------------------ WPO


@pytest.mark.parametrize("aligned", [False, True])
def test_wpo_is_trls(aligned: bool) -> None:
    """TRL's formula on pairs: the loss of each times the product of exp(mean log-probability), then a mean by count.
    TRL takes log sum_v p_v^2 off each log-probability first: then its weight is that of the pair."""
    groups, cu, logps, ref = draw("sigmoid", 2, 1.0, per_token=False)
    logps, ref = logps.double(), ref.double()
    sum_sq = -torch.rand(logps.shape, dtype=torch.float64)
    leaf = logps.clone().requires_grad_()
    ids = torch.repeat_interleave(torch.arange(groups.num_sequences), cu.diff().long())

    def sums(x: Tensor) -> Tensor:
        return torch.zeros(groups.num_sequences, dtype=torch.float64).index_add(0, ids, x)

    with torch.no_grad():
        w = torch.exp(sums(logps - sum_sq if aligned else logps) / cu.diff())
    i, j = groups.pair_indices(every=False)
    ratio = sums(leaf) - ref
    expected = (-torch.nn.functional.logsigmoid(0.1 * (ratio[i] - ratio[j])) * (w[i] * w[j])).mean()
    expected.backward()
    objective = Objective("sigmoid", policy_weight=not aligned, divide_by="count")
    if aligned:
        groups = weighted(groups, weights=w[i] * w[j])
    own = logps.clone().requires_grad_()
    found = preference_loss(own, cu, groups, objective, ref)
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(own.grad, leaf.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_a_gradient_is_nan_where_its_loss_is(loss: str, bad: float, impl: str) -> None:
    """WPO's weight of a response that is impossible is 0, and 0 times its loss may be NaN; other groups are as ever."""
    groups = PreferenceGroups.from_lists([[True, False], [True, False], [True, False]], weights=[1.0, 2.0, 0.5])
    objective = objective_of(loss, policy_weight=True)
    logps, ref = -torch.linspace(0.5, 4, 6), -torch.ones(6)
    with where(impl):
        expected = evaluate(logps, torch.arange(7), groups, objective, ref, impl)
        for at in (2, 3):  # preferred, dispreferred
            changed = logps.index_fill(0, torch.tensor([at]), bad)
            found = evaluate(changed, torch.arange(7), groups, objective, ref, impl)
            gradient = found["d_token_logps"]
            assert not found["group_losses"][1].isnan() or gradient[2:4].isnan().all()
            assert torch.equal(gradient[[0, 1, 4, 5]], expected["d_token_logps"][[0, 1, 4, 5]])


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_weights_in_a_compiled_graph(impl: str) -> None:
    groups, cu, logps, ref = draw("softmax", 1, 2.0, per_token=False)
    objective = Objective("softmax", policy_weight=True)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        made = PreferenceGroups(groups.cu_groups, groups.positive, weights=w)
        return preference_loss(x, cu, made, objective, ref, impl=impl).loss

    leaf, w = logps.clone().requires_grad_(), torch.rand(groups.num_groups)
    with where(impl):
        (plain,) = torch.autograd.grad(loss(leaf, w), leaf)
        (found,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf, w), leaf)
        torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-9)
        nan = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf, -w)  # values are not read there
    assert nan.isnan() and plain.isfinite().all()


# ----------------------------------------------------------------------------------------------------- two passes, data


def test_two_passes_and_one_give_the_gradient_of_one_graph() -> None:
    torch.manual_seed(0)
    table = torch.nn.Parameter(-torch.rand(24, dtype=torch.float64))
    sides = [[True, False, False], [False, True, True]]
    made = {"weights": [0.3, 2.0], "response_weights": [[1, 2, 0.5], [0.1, 3, 1]]}
    groups = PreferenceGroups.from_lists(sides, **made)
    objective = Objective("softmax", beta=0.5, nll_weight=1.0, policy_weight=True, balance=AdaBalance())
    ref, offsets = torch.linspace(-3, -1, 6).double(), torch.arange(0, 25, 4)
    loss = preference_loss(table, offsets, groups, objective, ref).loss
    (expected,) = torch.autograd.grad(0.25 * loss, table)
    batches = [torch.arange(0, 8), torch.arange(8, 24)]
    for strategy in ("two_pass", "one_pass"):
        table.grad = None
        found = group_backward(
            batches, lambda ids: (table[ids], torch.arange(0, len(ids) + 1, 4)), groups, objective, ref,
            strategy=strategy, scale=0.25,
        )  # fmt: skip
        torch.testing.assert_close(found.loss, loss.detach())
        torch.testing.assert_close(table.grad, expected, rtol=1e-12, atol=1e-15)


def test_weights_of_rows(bpe: Any) -> None:
    """Through reading, rules, merging and tokens, to the groups of a batch."""
    report = Report()
    sets = {"prompt": "Tea?", "positives": ["Green.", "Black."], "negatives": ["No.", "Coffee."]}
    scored = {"prompt": "Tea?", "all_generated_responses": ["A", "B", "C"], "scores": [1.0, 3.0, 2.0]}
    rows = [
        {**sets, "weight": 2, "response_weights": [1, 0.5, 3, 0]},
        {**sets, "prompt": "Hi?", "weight": 0},
        {**scored, "prompt": "Be?", "response_weights": ["4", 5, 6]},
        {**sets, "prompt": "So?"},
    ]
    groups = list(read_groups(rows, rule=top_k(1), report=report))
    assert [(g.weight, g.response_weights) for g in groups] == [(2, [1, 0.5, 3]), (1, [5, 6, 4]), (1, None)]
    assert report.dropped == {"group of weight 0": 1, "response of weight 0": 1} and "weight 0" in str(report)
    step = collate(list(tokenize_groups(groups, bpe, report=report)))
    assert step.groups.weights.tolist() == [2, 1, 1]
    assert step.groups.response_weights.tolist() == [1, 0.5, 3, 5, 6, 4, 1, 1, 1, 1]
    assert collate(list(tokenize_groups(groups[-1:], bpe))).groups.weights is None
    # What has weight 0 is not there: a rule picks among the others, of which one may be its copy.
    absent = {**scored, "all_generated_responses": ["B", "A", "B", "C"], "scores": [3.0, 1.0, 3.0, 4.0]}
    (group,) = read_groups([{**absent, "response_weights": [0, 1, 2, 0]}], rule=top_k(1))
    assert (group.responses, group.response_weights) == (["B", "A"], [2, 1])
    (merged,) = merge_prompts(
        read_groups(
            [
                {"prompt": "Tea?", "chosen": "A", "rejected": "B", "weight": 1, "response_weights": [2, 3]},
                {"prompt": "Tea?", "chosen": "A", "rejected": "C", "weight": 4},
            ]
        )
    )
    assert (merged.weight, merged.responses, merged.response_weights) == (2.5, ["A", "B", "C"], [2, 3, 1])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"weight": -1}, "weight must be a finite number of at least 0; got -1"),
        ({"weight": math.nan}, "weight must be a finite number of at least 0; got nan"),
        ({"weight": "much"}, "weight must be a finite number of at least 0; got 'much'"),
        ({"weight": True}, "weight must be a finite number of at least 0; got True"),
        ({"response_weights": [1]}, "response_weights must be a list of 2 numbers, one a response; got 1 of them"),
        ({"response_weights": 2}, "response_weights must be a list of 2 numbers, one a response; got 2"),
        ({"response_weights": [1, None]}, "response_weights must be a finite number of at least 0; got None"),
    ],
)
def test_bad_weights_of_rows(columns: dict[str, Any], message: str) -> None:
    row = {"prompt": "Tea?", "chosen": "Green.", "rejected": "No.", **columns}
    with pytest.raises(ValueError, match=f"row 0: {message}"):
        list(read_groups([row], on_bad="error"))


def test_weights_of_a_table_may_be_a_tuple_or_an_array() -> None:
    for weights in ((1, 2.5), np.array([1, 2.5]), torch.tensor([1, 2.5])):
        (group,) = read_groups([{"prompt": "Tea?", "chosen": "A", "rejected": "B", "response_weights": weights}])
        assert group.response_weights == [1, 2.5]


# ---------------------------------------------------------------------------------------------------------- the trainer

WEIGHTS = [0.5, 3.0, 1.0, 0.1]


def trainer_of(folder: Path, tokenizer: Any, options: dict[str, Any], **named: Any) -> GroupDPOTrainer:
    config = {**COMMON, "output_dir": str(folder), "strategy": "two_pass", "micro_batch_sequences": 3, **options}
    rows = [{**row, "weight": w} for row, w in zip(GROUPS, WEIGHTS)]
    named = {"train_dataset": rows, "objective": MPO, **named}
    return GroupDPOTrainer(llama(), args=GroupDPOConfig(**config), processing_class=tokenizer, **named)


@pytest.mark.parametrize("strategy", ["two_pass", "coupled"])
def test_accumulated_batches_divide_by_all_weights(tmp_path: Path, bpe: Any, strategy: str) -> None:
    """Four batches of a group each are one batch of four, and not the mean of four means, in which weights cancel."""
    whole = {"per_device_train_batch_size": 4, "max_steps": 2, "train_sampling_strategy": "sequential"}
    expected = run(trainer_of(tmp_path, bpe, {**whole, "strategy": "coupled", "micro_batch_sequences": None}))
    parts = {**whole, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "strategy": strategy}
    found = run(trainer_of(tmp_path, bpe, parts))
    (a, start, ours), (b, _, theirs) = found, expected
    assert (ours - theirs).norm() < 1e-5 * (theirs - start).norm()
    for x, y in zip(steps(a), steps(b)):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
    _, _, plain = run(trainer_of(tmp_path, bpe, whole, train_dataset=GROUPS))
    assert (plain - theirs).norm() > 1e-2 * (theirs - start).norm()
    check_same(run(trainer_of(tmp_path, bpe, whole)), expected)


def test_two_ranks_divide_by_the_weights_of_both(tmp_path: Path, bpe: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert not (failure := run_ranks(run_as_rank, port, str(tmp_path), WEIGHTS)), failure
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    trainer, start, expected = run(trainer_of(tmp_path, bpe, {"micro_batch_sequences": 2}))
    for strategy in ("two_pass", "one_pass", "coupled"):
        (_, weights, logged), (_, others, _) = (rank[strategy] for rank in ranks)
        assert torch.equal(weights, others)
        assert (weights - expected).norm() < 1e-5 * (expected - start).norm()
        assert [row["loss"] for row in logged] == pytest.approx([row["loss"] for row in steps(trainer)], rel=1e-5)


def test_what_the_trainer_refuses(tmp_path: Path, bpe: Any) -> None:
    row = {"prompt": "Tea?", "chosen": "Green.", "rejected": "No.", "response_weights": [1, 2]}
    with pytest.raises(ValueError, match=r"no response_weights for loss 'sigmoid', .* row 0 has"):
        trainer_of(tmp_path, bpe, {}, train_dataset=[row], objective=Objective("sigmoid"))
    ids = torch.arange(1, 5)
    for more, message in (
        ((0.0,), "train_dataset must have positive, finite weights; row 7 has 0.0"),
        ((1.0, [1.0, math.nan]), "train_dataset must have positive, finite weights; row 7 has nan"),
        ((1.0, [1.0]), "as many response_weights as responses; row 7 has 1 for 2"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path, bpe, {}, train_dataset=[TokenGroup(ids, [ids, ids[1:]], [True, False], 7, *more)])


# -------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"weights": [1.0, -2.0]}, r"weights must be finite and at least 0; weights\[1\] is -2.0"),
        ({"weights": [math.nan, 1.0]}, r"weights must be finite and at least 0; weights\[0\] is nan"),
        ({"weights": [math.inf, 1.0]}, r"weights must be finite and at least 0; weights\[0\] is inf"),
        ({"weights": [0.0, 0.0]}, "weights must not all be 0; got 2 zeros"),
        ({"weights": [1.0]}, r"weights must be floating or integer and \(G,\) = \(2,\); got \(1,\) torch.float64"),
        ({"response_weights": [[1.0], [1.0]]}, "must have a number a response; got 1 for 2 of group 0"),
        ({"response_weights": [[1, 2, 3], [4]]}, "must have a number a response; got 3 for 2 of group 0"),
        ({"response_weights": [[1, 2, 3, 4]]}, "response_weights must have a list a group, 2; got 1"),
        ({"response_weights": [[1, -1], [1, 1]]}, r"response_weights must be finite and .*\[1\] is -1.0"),
        ({"response_weights": [[1, 1], [1, 0]]}, "must not all be 0 on a side; those of the negatives of group 1 are"),
    ],
)
def test_bad_weights(named: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceGroups.from_lists([[True, False]] * 2, **named)


def test_bad_types_of_weights() -> None:
    cu, positive = torch.tensor([0, 2]), torch.tensor([True, False])
    with pytest.raises(TypeError, match="weights must be a tensor or None; got list"):
        PreferenceGroups(cu, positive, weights=[1.0])
    with pytest.raises(ValueError, match=r"weights must be floating or integer .* got \(1,\) torch.bool"):
        PreferenceGroups(cu, positive, weights=torch.ones(1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"response_weights must be .* \(S,\) = \(2,\); got \(1,\)"):
        PreferenceGroups(cu, positive, response_weights=torch.ones(1))
    with pytest.raises(ValueError, match="response_weights must be on the device of cu_groups, cpu; got meta"):
        PreferenceGroups(cu, positive, response_weights=torch.ones(2, device="meta"))
    with pytest.raises(TypeError, match="policy_weight must be True or False; got 1"):
        Objective(policy_weight=1)
    with pytest.raises(ValueError, match="divide_by must be one of weights, count; got 'sum'"):
        Objective(divide_by="sum")
    assert PreferenceGroups(cu, positive, weights=torch.ones(1)).to("meta").weights.device.type == "meta"


@pytest.mark.parametrize("loss", sorted({*LOSSES} - {*WEIGHED}))
def test_losses_that_weigh_no_responses(loss: str) -> None:
    groups = draw_groups(loss, torch.Generator().manual_seed(0))
    groups = weighted(groups, response_weights=torch.ones(groups.num_sequences))
    S = groups.num_sequences
    with pytest.raises(ValueError, match=f"response_weights must be None for loss '{loss}', which does not weigh"):
        preference_loss(torch.zeros(S), torch.arange(S + 1), groups, objective_of(loss), torch.zeros(S))
