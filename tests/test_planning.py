"""Predictions against steps that run: the same bytes on fake tensors as on real ones, the same from few layers and
small groups as from all of them, and within 5 % of what the process takes."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import make

from groupdpo_kernels.lm_head.workspace import head_workspace
from groupdpo_kernels.memory.planner import (
    Hardware,
    Prediction,
    largest_micro_batch,
    plan,
    plan_table,
    skeleton,
    trace,
    track,
    tracker_of,
    traffic_text,
)
from groupdpo_kernels.memory.sweep import Worker
from groupdpo_kernels.memory.tracker import Peak, follow_layers
from groupdpo_kernels.memory.traffic import Order, fetched_in_vain
from groupdpo_kernels.memory.workload import MODELS, TrainingStep, Workload, build_model, config_of
from groupdpo_kernels.models.decoder_layers import layers_of

META = torch.device("meta")
SMALL = Workload(tokens=32, group=4, layers=3)
SETTINGS: dict[str, dict[str, Any]] = {
    "coupled_logits": {"strategy": "coupled_logits"},
    "coupled": {"strategy": "coupled"},
    "two_pass": {"strategy": "two_pass"},
    "pairs": {"strategy": "pairs"},
    "one_pass": {"strategy": "one_pass", "lora_rank": 4},
    "checkpointing": {"strategy": "two_pass", "checkpointing": True},
    "autocast": {"strategy": "two_pass", "autocast": True, "optimizer": "adamw_foreach"},
    "prompt": {"strategy": "coupled", "prompt": 20},
    "shared": {"strategy": "two_pass", "prompt": 20, "share_prompt": True, "checkpointing": True},
    "shared_one_pass": {"strategy": "one_pass", "prompt": 20, "share_prompt": True, "lora_rank": 4},
    "shared_prompts": {"strategy": "coupled", "prompt": 20, "share_prompt": True, "prompts": 2},
}


class Remembered(Prediction):
    """A prediction that traces nothing that another one in this file has traced: of the same steps it has the same."""

    known: ClassVar[dict[Any, dict[str, Peak]]] = {}

    def _trace(self, workload: Workload, layers: Sequence[int]) -> dict[str, Peak]:
        sharded = self.hardware.ranks > 1 and workload.share_prompt
        key = (workload, tuple(layers), self.hardware.device, sharded, self.hardware.tensor_parallel)
        if key not in self.known:
            self.known[key] = super()._trace(workload, layers)
        return self.known[key]


@functools.cache
def whole_step(workload: Workload) -> dict[str, Peak]:
    """The trace of all of its layers and responses."""
    return trace(workload, build_model(workload, META), "cpu")


def _largest(peaks: dict[str, Peak]) -> dict[str, int]:
    """Of each part; those of the head's operations, whose numbers differ where values are read, together."""
    found: dict[str, int] = {}
    for name, peak in peaks.items():
        part = name.partition(",")[0]
        found[part] = max(found.get(part, 0), peak.total)
    return found


@pytest.mark.parametrize(
    "name", ["coupled_logits", "pairs", "one_pass", "checkpointing", "autocast", "prompt", "shared_prompts"]
)
def test_fake_step_takes_the_bytes_of_a_real_one(name: str) -> None:
    workload = replace(SMALL, **SETTINGS[name])
    step = TrainingStep(workload)
    step.run()
    vocabulary = int(config_of(workload).vocab_size)
    tracker = tracker_of(workload, vocabulary, "cpu", fake=False)
    follow_layers(layers_of(step.model), tracker)
    with tracker:
        real = track(step, tracker)
    fake = trace(workload, build_model(workload, META), "cpu")
    assert _largest(fake) == _largest(real)
    most = max(fake.values(), key=lambda peak: peak.total)
    assert most.by_category() == max(real.values(), key=lambda peak: peak.total).by_category()
    assert all(size > 0 for size in most.parts.values())
    assert all(sum(peak.parts.values()) == peak.total for peak in (*fake.values(), *real.values()))


@pytest.mark.parametrize("name", ["coupled", "two_pass", "one_pass", "pairs"])
def test_extrapolation_is_exact(name: str) -> None:
    workload = replace(SMALL, layers=5, micro_batch=1, positives=2, **SETTINGS[name])
    group = 5  # more than the two sizes that stand for all
    found = Remembered(workload, Hardware(device="cpu")).at(group)
    whole = whole_step(replace(workload, group=group))
    most = max(whole.values(), key=lambda peak: peak.total)
    # Pairs: the ids of the group, 8 bytes a token, are not extrapolated.
    assert abs(found.total - most.total) <= (8 * 32 * 2 if name == "pairs" else 0)
    if name != "pairs":
        assert found.by_category() == most.by_category()


@pytest.mark.parametrize("model", ["gemma3", "olmo3"])
def test_extrapolation_is_exact_with_layers_of_two_kinds(model: str, tmp_path: Path) -> None:
    """Sliding and full attention in one pattern, from a config.json."""
    values = {
        "model_type": model,
        "vocab_size": 600,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 8,
    }
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    values |= {"sliding_window": 16}
    values |= {"model_type": "gemma3_text"} if model == "gemma3" else {}
    (tmp_path / "config.json").write_text(json.dumps(values))
    workload = Workload(model=str(tmp_path), tokens=32, strategy="coupled", group=8)
    found = Prediction(workload, Hardware(device="cpu")).at(8)
    whole = trace(workload, build_model(workload, META), "cpu")
    assert found.total == max(peak.total for peak in whole.values())


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.stop()


def test_layers_of_a_shared_prompt_stand_for_all() -> None:
    """Its backward begins within the last layer."""
    workload = replace(SMALL, layers=6, group=2, micro_batch=1, **SETTINGS["shared"])
    found = Remembered(workload, Hardware(device="cpu")).at(2)
    whole = trace(workload, build_model(workload, META), "cpu")
    most = max(whole.values(), key=lambda peak: peak.total)
    assert found.total == most.total and found.by_category() == most.by_category()


def test_groups_of_a_shared_prompt_stand_for_all() -> None:
    """The last micro-batch, whose backward runs with the prompt's, is as small as in the whole group."""
    workload = replace(SMALL, tokens=256, layers=1, positives=1, prompt=8, share_prompt=True)
    whole = trace(replace(workload, group=11), build_model(workload, META), "cpu")
    found = Remembered(workload, Hardware(device="cpu")).at(11)
    assert found.total == max(peak.total for peak in whole.values())


def test_peak_is_flat_with_a_shared_prompt() -> None:
    workload = replace(SMALL, tokens=256, layers=1, micro_batch=1, prompt=192, share_prompt=True)
    prediction = Remembered(workload, Hardware(device="cpu"))
    assert prediction.at(64).total <= 1.02 * prediction.at(2).total


@pytest.mark.parametrize("name", ["shared_prompts", "shared_one_pass"])
def test_groups_stand_for_all_where_graphs_of_prompts_stay(name: str) -> None:
    """The rows of the coupled step grow beyond a block of logits, which then grows no more."""
    workload = replace(SMALL, layers=1, tokens=276, **SETTINGS[name])
    found = Remembered(workload, Hardware(device="cpu")).at(6)
    whole = trace(replace(workload, group=6), build_model(workload, META), "cpu")
    most = max(whole.values(), key=lambda peak: peak.total)
    assert found.total == most.total and found.by_category() == most.by_category()


@pytest.mark.parametrize("name", ["two_pass", "one_pass", "coupled", "checkpointing"])
def test_a_shared_prompt_trains_what_whole_sequences_train(name: str) -> None:
    gradients = []
    for share in (False, True):
        settings = SETTINGS[name] | {"prompt": 20, "share_prompt": share, "optimizer": "sgd"}
        step = TrainingStep(replace(SMALL, layers=2, micro_batch=3, **settings))
        step.forward_backward(step.workload)
        gradients.append([p.grad for p in step.trainable])
    for shared, whole in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def test_tokens_that_a_forward_computes() -> None:
    shared = replace(SMALL, group=8, prompt=20, share_prompt=True)
    assert shared.computed_tokens == 19 + 8 * 12 and replace(shared, share_prompt=False).computed_tokens == 8 * 32
    assert replace(shared, strategy="coupled", prompts=3).computed_tokens == 3 * 19 + 8 * 12
    assert replace(SMALL, group=8, strategy="pairs", prompt=20).computed_tokens == 16 * 2 * 32
    assert shared.setting == "full fine-tuning, prompt of 20 shared"
    assert replace(shared, share_prompt=False, positives=3).setting == "full fine-tuning, 3 positive, prompt of 20"


def test_many_tokens_in_a_batch() -> None:
    """Their ids are read, whatever their number."""
    workload = Workload(tokens=40000, group=2, layers=1, strategy="coupled", optimizer="sgd")
    peaks = trace(workload, build_model(workload, META), "cuda")
    assert max(peak.total for peak in peaks.values()) > 2 * 40000 * 256 * 4


@pytest.mark.parametrize("name", ["coupled_logits", "two_pass", "shared"])
def test_prediction_is_within_five_per_cent_of_the_process(name: str, worker: Worker) -> None:
    """The resident high-water mark of a fresh process, which the worker forks for each request: of a step that is large
    beside what a process takes besides."""
    workload = replace(Workload(tokens=512, group=4, micro_batch=4), **SETTINGS[name])
    if workload.prompt:
        workload = replace(workload, tokens=640, prompt=512, micro_batch=2, checkpointing=False)
    (row,) = worker.ask({"kind": "memory", "workloads": [asdict(workload)], "device": "cpu", "limit": None})
    assert row["status"] == "ok", row
    predicted = Prediction(workload, Hardware(device="cpu")).at(workload.group)
    assert predicted.total == row["tracked_bytes"]
    assert abs(predicted.total / row["peak_bytes"] - 1) < 0.05, row


def test_sizes_of_known_models() -> None:
    billions = {
        "llama-3-8b": 8.03,
        "llama-3-70b": 70.55,
        "llama-3.2-1b": 1.236,
        "qwen3-8b": 8.19,
        "qwen3-32b": 32.76,
        "gemma-3-4b": 3.88,
    }
    billions |= {"olmo-3-7b": 7.30, "olmo-3-32b": 32.23}
    for name, expected in billions.items():
        model = build_model(Workload(model=name), META)
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(expected, rel=0.003), name
    assert set(billions) == set(MODELS) - {"tiny"}


def test_plan_of_a_large_model() -> None:
    """Coupled grows with the group and runs out; two passes stay: the shape of GroupDPO's figure. Layers of one kind,
    so that each size takes two traces."""
    base = Workload(model="llama-3.2-1b", dtype="bfloat16", tokens=2048, micro_batch=1, checkpointing=True)
    rows = plan(base, [2, 16, 64], Hardware(40 * 10**9), ["coupled_logits", "two_pass"])
    logits, two_pass = rows
    assert two_pass["largest_group"] >= 1024 and 2 <= logits["largest_group"] < 16
    assert two_pass["peaks"][64] <= 1.02 * two_pass["peaks"][2]
    slopes = [(logits["peaks"][b] - logits["peaks"][a]) / (b - a) for a, b in ((2, 16), (16, 64))]
    assert slopes[0] == pytest.approx(slopes[1], rel=0.05) and logits["limit"]["category"] == "logits"
    for row in rows:
        assert all(row["peaks"][g] == sum(row["breakdown"][g].values()) for g in (2, 16, 64))
    assert "| two_pass |" in plan_table(rows)


def test_largest_group_fits_and_the_next_does_not() -> None:
    workload = replace(SMALL, strategy="coupled", layers=5, micro_batch=1)
    hardware = Hardware(24 * 10**7, headroom=0.0, device="cpu")
    prediction = Remembered(workload, hardware)
    largest = prediction.largest_group()
    assert 2 <= largest < 4096
    assert prediction.at(largest).total <= hardware.memory < prediction.at(largest + 2).total
    assert Remembered(workload, replace(hardware, memory=10**6)).largest_group() == 0


def test_ranks_split_what_they_hold_and_a_reference_adds() -> None:
    workload = replace(SMALL, layers=5)
    one, four = (Remembered(workload, Hardware(ranks=n)).parts_at(4)["optimizer"] for n in (1, 4))
    for category in ("parameters", "gradients", "optimizer"):
        assert four.by_category()[category] == pytest.approx(one.by_category()[category] / 4, rel=1e-3)
    both = Remembered(workload, Hardware(reference=True)).parts_at(4)["optimizer"].by_category()["parameters"]
    assert both == pytest.approx(2 * one.by_category()["parameters"], rel=1e-3)
    sent = {n: Remembered(workload, Hardware(ranks=n)).traffic_at(4)["gradients"] for n in (1, 2, 4)}
    assert sent[1] == 0 < sent[2] and sent[4] == pytest.approx(1.5 * sent[2])
    row = {"strategy": "two_pass", "traffic": {2: {}, 4: {"weights": 3 * 2**30, "gradients": 2**30, "activations": 0}}}
    said = "Each GPU receives in a step of G = 4: two_pass 4.0 GiB (3.0 of weights, 1.0 of gradients)"
    assert traffic_text([row]) == said


def test_what_engines_hold() -> None:
    """A rank of tensor parallelism has its share of the weights; DeepSpeed has float32 states; and a prompt that runs
    again after its rows, as engines need it, has no graph while these run."""
    shared = replace(SMALL, layers=2, tokens=64, prompt=32, share_prompt=True, micro_batch=1)
    alone, four = (Remembered(shared, Hardware(device="cpu", ranks=n)).parts_at(4)["backward layer -1"] for n in (1, 4))
    assert four.by_category()["activations"] < alone.by_category()["activations"]
    workload = replace(SMALL, layers=2, dtype="bfloat16")
    whole, split = (Remembered(workload, Hardware(tensor_parallel=n)).parts_at(4)["optimizer"] for n in (1, 2))
    held, share = (peak.by_category()["parameters"] for peak in (whole, split))
    assert 0.5 < share / held < 0.501  # norms are whole
    fsdp, zero = (
        Remembered(workload, Hardware(ranks=4, engine=e)).parts_at(4)["optimizer"] for e in ("fsdp2", "zero3")
    )
    assert zero.by_category()["optimizer"] > 3 * fsdp.by_category()["optimizer"]


def test_what_zero_3_fetches_in_vain() -> None:
    """Three parameters of ten elements, a module without any after each; then the backward, which does not come."""
    order = Order([["a"], [], ["b"], [], ["c"], []], [["c"], ["b"], ["a"]], dict.fromkeys("abc", 10))
    assert fetched_in_vain(order, 10, 1000) == {"a"}  # b and c are whole when their turn comes
    assert fetched_in_vain(order, 10, 20) == {"a", "b"}  # no room to be far ahead
    assert fetched_in_vain(order, 0, 1000) == set()


def test_micro_batch_fits_and_one_more_does_not() -> None:
    model = make("llama", max_position_embeddings=256)
    before = [p.data_ptr() for p in model.parameters()]
    memory = 6 * 2**20
    size, one = largest_micro_batch(model, 64, memory, device="cpu")
    assert size >= 1 and one <= memory and before == [p.data_ptr() for p in model.parameters()]

    def peak(b: int) -> int:
        workload = Workload(tokens=64, micro_batch=b, group=2 * b)
        return max(part.total for part in trace(workload, skeleton(model), "cpu").values())

    assert peak(size) <= memory < peak(size + 1)
    assert largest_micro_batch(model, 64, 2**10, device="cpu")[0] == 0


def test_head_workspace_stays_in_its_budget() -> None:
    for op in ("linear_logps_forward", "linear_logps_backward", "frozen_head"):
        wide = 0 if op == "linear_logps_forward" else 4 * 4096 * 512
        for device in ("cpu", "cuda"):
            found = head_workspace(op, 4096, 512, 128256, 2, 2**24, device, True)
            assert found.block <= found.most <= 2**24 and found.wide == wide
    assert not any(head_workspace("segment_sums", 4096, 512, 128256, 2, 2**24, "cpu", True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "three_pass"}, "strategy must be one of"),
        ({"group": 3}, "group must be even"),
        ({"group": 0}, "group must be at least 1"),
        ({"tokens": 1}, "tokens must be at least 2"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"strategy": "one_pass"}, "lora_rank must be positive for one_pass"),
        ({"model": ""}, "model must be a name or a path"),
        ({"micro_batch": 1.5}, "micro_batch must be an int"),
        ({"prompt": -1}, "prompt must be at least 0; got -1"),
        ({"prompt": 256}, "prompt must be less than tokens, which has a response too; got 256 of 256"),
        ({"share_prompt": True}, "prompt must be at least 2 with share_prompt, .*; got 0"),
        ({"prompt": 1, "share_prompt": True}, "prompt must be at least 2 with share_prompt, .*; got 1"),
        (
            {"strategy": "pairs", "prompt": 9, "share_prompt": True},
            "strategy must be one of coupled, two_pass, one_pass with share_prompt; got 'pairs'",
        ),
        ({"prompt": 9, "share_prompt": True, "prompts": 2}, "prompts must be 1, or .*; got 2 with 'two_pass'"),
        ({"prompts": 0}, "prompts must be at least 1; got 0"),
    ],
)
def test_wrong_workloads(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Workload(**change)


def test_wrong_hardware_and_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="memory must be an int of at least 1; got 0"):
        Hardware(0)
    with pytest.raises(ValueError, match="headroom"):
        Hardware(headroom=1.5)
    with pytest.raises(ValueError, match="device must be cuda or cpu"):
        Hardware(device="tpu")
    with pytest.raises(ValueError, match="model must be one of tiny"):
        plan(Workload(model=str(tmp_path / "none")), [2], Hardware())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="model must be one of tiny"):
        plan(Workload(model=str(tmp_path)), [2], Hardware())
    with pytest.raises(ValueError, match="must not be empty"):
        plan(Workload(), [], Hardware())
    with pytest.raises(ValueError, match="engine must be one of fsdp2, zero3; got 'ddp'"):
        Hardware(engine="ddp")
    with pytest.raises(ValueError, match="strategies must not hold 'one_pass' where a model is split"):
        plan(Workload(lora_rank=4), [2], Hardware(ranks=2), ["one_pass"])
    with pytest.raises(ValueError, match="strategies must not hold 'coupled_logits' where a model is split"):
        plan(Workload(), [2], Hardware(tensor_parallel=2), ["coupled_logits"])
    with pytest.raises(ValueError, match="tensor_parallel must divide the model's num_key_value_heads, 2; got 4"):
        plan(Workload(), [2], Hardware(tensor_parallel=4))
    with pytest.raises(ValueError, match=r"lora_rank must be 0 with tensor_parallel: .*; got 4"):
        plan(Workload(lora_rank=4), [2], Hardware(tensor_parallel=2))


@pytest.mark.parametrize("strategy", ["coupled", "two_pass", "pairs"])
@pytest.mark.parametrize(("positives", "group"), [(1, 3), (2, 5)])
def test_groups_with_any_number_of_positives(strategy: str, positives: int, group: int) -> None:
    """Odd groups, and few layers and small groups for all: the same bytes as the whole step has."""
    workload = replace(SMALL, layers=5, micro_batch=1, strategy=strategy, group=group, positives=positives)
    found = Remembered(workload, Hardware(device="cpu")).at(group)
    most = max(peak.total for peak in whole_step(workload).values())
    assert abs(found.total - most) <= (8 * 32 * group if strategy == "pairs" else 0)  # the ids of a group
    assert workload.num_pairs == positives * (group - positives)


def test_a_step_has_its_positives() -> None:
    step = TrainingStep(replace(SMALL, group=3, positives=1, layers=1, strategy="pairs"))
    step.run()
    groups, _ = step.group_of(3, 1)
    assert groups.positive.tolist() == [True, False, False]
    row = plan(replace(SMALL, group=3, positives=1, layers=1), [3, 4, 7], Hardware(10**11, device="cpu"), ["coupled"])[
        0
    ]
    assert row["peaks"][3] < row["peaks"][4] < row["peaks"][7]
    hardware = Hardware(row["peaks"][7], headroom=0.0, device="cpu")
    one_positive = replace(SMALL, group=3, positives=1, layers=1, strategy="coupled")
    assert Remembered(one_positive, hardware).largest_group() == 7  # odd: the next does not fit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 3}, "group must be even, for half of it is positive unless positives is given; got 3"),
        ({"group": 4, "positives": 4}, "positives must be less than group, .*; got 4 of 4"),
        ({"group": 4, "positives": 0}, "positives must be at least 1; got 0"),
        ({"group": 4, "positives": "1"}, "positives must be an int; got '1'"),
    ],
)
def test_wrong_positives(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Workload(**change)
