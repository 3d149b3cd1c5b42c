"""sDPO: stages on real models and optimisers, splits, errors."""

from __future__ import annotations

import logging
import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import batch, make
from tiny_training import PARTS, B, L, Training, lora, stages
from torch import Tensor, nn

from groupdpo_kernels import PreferenceGroups, model_logps
from groupdpo_kernels.stepwise import (
    by_column,
    easy_to_hard,
    equal_parts,
    reference_logps,
    reward_accuracy,
    run_stages,
    sequence_logps,
    store,
    take,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same number of threads in every process, so that sums are the same bit for bit; and little load."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("build", [lambda: make("llama"), lora], ids=["full", "lora"])
def test_the_first_loss_of_each_stage_is_ln_2(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, train = build(), Training()
    start = {name: x.clone() for name, x in model.state_dict().items()}
    parts = [PARTS[0], PARTS[1], PARTS[0]]
    run_stages(model, parts, train, tmp_path)
    for stage in (1, 2, 3):
        first, *rest = train.losses[stage]
        assert abs(first - math.log(2)) < 1e-6
        assert all(abs(loss - math.log(2)) > 1e-4 for loss in rest)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all(torch.equal(x, start[name]) == (name in frozen) for name, x in model.named_parameters())
    saved = store.read(next(tmp_path.glob("stage-3-*.pt")))["tensors"]
    assert saved.keys() == model.state_dict().keys() - frozen, "a checkpoint holds what was trained"


def test_the_reference_is_the_model_at_the_end_of_the_stage_before(tmp_path: Path) -> None:
    seen: dict[int, Tensor] = {}
    expected: dict[int, Tensor] = {}
    train = Training()

    def watched(model: nn.Module, part: Any, ref_logps: Tensor, stage: int) -> None:
        seen[stage] = ref_logps
        with torch.no_grad():
            expected[stage] = torch.cat([model_logps(model, **rows).sum(1) for rows in part])
        train(model, part, ref_logps, stage)

    model = lora()
    stages(model, tmp_path, watched)
    for stage in (1, 2):
        torch.testing.assert_close(seen[stage], expected[stage], rtol=1e-6, atol=1e-6)
    with torch.no_grad(), model.disable_adapter():  # the trap: what stage 2 must not be measured against
        base = torch.cat([model_logps(model, **rows).sum(1) for rows in PARTS[1]])
    assert (seen[2] - base).abs().max() > 1e-3


def test_scoring_is_without_dropout_and_leaves_no_trace(tmp_path: Path) -> None:
    model = make("gpt2", embd_pdrop=0.3, attn_pdrop=0.3, resid_pdrop=0.3)
    model.transformer.h[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    found = reference_logps(model, PARTS[0], tmp_path)
    assert modes == [m.training for m in model.modules()] and torch.equal(state, torch.get_rng_state())
    assert not found.requires_grad and all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        expected = torch.cat([model_logps(model.eval(), **rows).sum(1) for rows in PARTS[0]])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_packed_batches(tmp_path: Path) -> None:
    """Rows laid end to end, cut by cu_seqlens; what the model does not take is left out."""
    model, rows = make("llama"), batch(2, L, pad=0)
    cu_seqlens = torch.tensor([0, 5, L, 2 * L])
    packed = rows | {"cu_seqlens": cu_seqlens, "groups": PreferenceGroups.from_lists([[True, False, False]])}
    found = reference_logps(model, [packed, rows], tmp_path)
    with torch.no_grad():
        tokens = model_logps(model, **rows)
    expected = [tokens[0, :5].sum(), tokens[0, 5:].sum(), tokens[1].sum(), *tokens.sum(1)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_pairs_of_scores_a_row(tmp_path: Path) -> None:
    model = make("llama")
    pairs = reference_logps(model, PARTS[0], tmp_path, score=lambda m, rows: sequence_logps(m, rows).view(-1, B))
    assert torch.equal(pairs.flatten(), reference_logps(model, PARTS[0], tmp_path))


def test_progress_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "groupdpo_kernels.stepwise.stages"):
        stages(make("llama"), tmp_path)
    assert "stage 1: 3 of 3 chunks to score" in caplog.text and "stage 2 of 2: done" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "groupdpo_kernels.stepwise.stages"):
        stages(make("llama"), tmp_path)
    assert "stage 2 of 2: done before" in caplog.text and "training" not in caplog.text


def test_every_generator_is_seeded_for_each_stage(tmp_path: Path) -> None:
    def drawn(directory: Path, seed: int) -> list[Any]:
        draws: list[Any] = []

        def train(model: nn.Module, *_: Any) -> None:
            draws.append((random.random(), numpy.random.rand(), torch.rand(()).item()))
            with torch.no_grad():
                model.lm_head.weight[0] += 1

        random.seed(os.urandom(4))
        stages(make("llama"), directory, train, seed=seed)
        return draws

    first, again, other = (drawn(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 5)))
    assert first == again and first[0] != first[1] and not set(first) & set(other)


# ------------------------------------------------------------------------------------------------------------- splits


def test_equal_parts() -> None:
    assert equal_parts(7, 3) == [[0, 1], [2, 3], [4, 5, 6]]
    assert equal_parts(3, 1) == [[0, 1, 2]] and equal_parts(3, 3) == [[0], [1], [2]]
    for num_parts in (0, -1, 4):
        with pytest.raises(ValueError, match=f"from 1 to the number of rows, 3; got {num_parts}"):
            equal_parts(3, num_parts)


def test_by_column() -> None:
    rows = [{"text": c, "stage": stage} for c, stage in zip("abcde", (2, 1, 10, 1, 2))]
    for data in (rows, datasets.Dataset.from_list(rows)):
        indices = by_column(data)
        assert indices == [[1, 3], [0, 4], [2]]
        parts = [take(data, part) for part in indices]
        assert [[row["text"] for row in part] for part in parts] == [["b", "d"], ["a", "e"], ["c"]]
        assert all(type(part) is type(data) for part in parts)
        assert by_column(data, "stage", order=[10, 1, 2]) == [[2], [1, 3], [0, 4]]
        with pytest.raises(
            ValueError, match=r"column 'phase' must be in every row; row 0 has only \['text', 'stage'\]"
        ):
            by_column(data, "phase")
        with pytest.raises(ValueError, match="row 2 has 10"):
            by_column(data, order=[1, 2])
        with pytest.raises(ValueError, match="no row has 3"):
            by_column(data, order=[1, 2, 10, 3])
    with pytest.raises(TypeError, match=r"must have an order, or give `order`; got \[1, 'x'\]"):
        by_column([{"stage": 1}, {"stage": "x"}])
    with pytest.raises(ValueError, match="indices must be from 0 to 4; got -1"):
        take(rows, [-1])


def test_easy_to_hard_on_pairs_is_the_order_of_margins() -> None:
    scores = torch.tensor([-3.0, -1, -1, -3, -2, -2, -5, -1, -1, -3])
    groups = PreferenceGroups.pairs(5)  # margins -2, 2, 0, -4, 2
    assert easy_to_hard(scores, groups, 1) == [[1, 4, 2, 0, 3]]
    assert easy_to_hard(scores, groups, 2) == [[1, 4], [2, 0, 3]]
    assert easy_to_hard(scores, groups, [[0, 3], [1, 2], [4]]) == [[4], [1, 2], [0, 3]], "sources, by mean accuracy"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6), st.integers(0, 2**31))
def test_reward_accuracy_of_groups(sizes: list[tuple[int, int]], seed: int) -> None:
    generator = random.Random(seed)
    lists, values = [], []
    for P, N in sizes:
        lists.append(generator.sample([True] * P + [False] * N, P + N))
        values.append([generator.choice([-2.0, -1.0, -0.5]) for _ in range(P + N)])  # with ties
    accuracy, margin = reward_accuracy(torch.tensor([x for u in values for x in u]), PreferenceGroups.from_lists(lists))
    for g, (positive, u) in enumerate(zip(lists, values)):
        pairs = [(a, b) for a, p in zip(u, positive) for b, q in zip(u, positive) if p and not q]
        assert accuracy[g] == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))
        assert margin[g] == pytest.approx(sum(a - b for a, b in pairs) / len(pairs))


def test_easy_to_hard_by_the_reference(tmp_path: Path) -> None:
    """From the model to the stages: score all rows once, then train on the easiest first."""
    model, rows = make("llama"), [batch(2, L, seed=s) for s in range(6)]
    scores = reference_logps(model, rows, tmp_path)
    order = [i for part in easy_to_hard(scores, PreferenceGroups.pairs(6), 3) for i in part]
    margins = scores[0::2] - scores[1::2]
    assert order == margins.argsort(descending=True).tolist()


# -------------------------------------------------------------------------------------------------------------- errors


def test_parts_must_be_there(tmp_path: Path) -> None:
    model = make("llama")
    with pytest.raises(ValueError, match="at least one; got none"):
        run_stages(model, [], Training(), tmp_path)
    with pytest.raises(ValueError, match="part 2 of 2 is"):
        run_stages(model, [PARTS[0], []], Training(), tmp_path)
    with pytest.raises(ValueError, match="chunk_size must be at least 1; got 0"):
        run_stages(model, PARTS, Training(), tmp_path, chunk_size=0)
    with pytest.raises(ValueError, match="save and load must be given together"):
        run_stages(model, PARTS, Training(), tmp_path, save=torch.save)
    with pytest.raises(ValueError, match=r"input_ids and targets, or give `score`; got \['prompt'\]"):
        run_stages(model, [[{"prompt": "x"}]], Training(), tmp_path)
    assert not list(tmp_path.rglob("*.pt"))


def test_scores_must_fit(tmp_path: Path) -> None:
    model, rows = make("llama"), list(range(5))

    def check(error: type[Exception], match: str, score: Callable[[nn.Module, Any], Any], **changes: Any) -> None:
        with pytest.raises(error, match=match):
            run_stages(model, [rows, rows], Training(), tmp_path, score=score, **{"chunk_size": 2} | changes)

    def with_bad_row(value: float) -> Callable[[nn.Module, Any], Tensor]:
        return lambda model, rows: torch.tensor([value if row == 3 else -1.0 for row in rows])

    check(ValueError, r"2 values for stage 1, rows 0:2; got \(3,\)", lambda m, rows: torch.zeros(3))
    check(ValueError, r"2 values for stage 1, rows 0:2; got \(\)", lambda m, rows: torch.tensor(1.0))
    check(ValueError, r"6 values for stage 1, rows 0:2; got \(2,\)", with_bad_row(0), count=lambda row: 3)
    check(TypeError, "stage 1: got list", lambda m, rows: [0.0] * len(rows))
    check(TypeError, "stage 1: got torch.int64", lambda m, rows: torch.zeros(len(rows)).long())
    check(ValueError, "stage 1, row 3 has nan", with_bad_row(math.nan))
    check(ValueError, "stage 1, row 3 has -inf", with_bad_row(-math.inf))
    two = lambda m, rows: with_bad_row(math.inf)(m, rows).repeat_interleave(2)  # noqa: E731
    check(ValueError, "stage 1, row 3 has inf", two, count=lambda row: 2)
    with pytest.raises(ValueError, match=r"scores\[1\] is nan"):
        reward_accuracy(torch.tensor([0.0, math.nan]), PreferenceGroups.pairs(1))
    with pytest.raises(ValueError, match=r"\(S,\) = \(2,\); got \(3,\) torch.float32"):
        reward_accuracy(torch.zeros(3), PreferenceGroups.pairs(1))


def test_train_must_train_the_model_given(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="stage 1 left the weights as they were"):
        run_stages(make("llama"), PARTS[:1], lambda *_: None, tmp_path / "nothing")

    def adds_adapters(model: nn.Module, *_: Any) -> None:
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)

    with pytest.raises(ValueError, match=r"must not add or remove tensors \(adapters: before\); stage 1 did"):
        run_stages(make("llama"), PARTS[:1], adds_adapters, tmp_path / "adapters")


def test_weights_must_be_at_hand(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = make("llama")
    with pytest.raises(ValueError, match=r"embed_tokens.weight is on meta .* give `fingerprint`"):
        reference_logps(model, PARTS[0], tmp_path)
