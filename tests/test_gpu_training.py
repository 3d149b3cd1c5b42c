"""Losses and training steps on a real GPU: what is computed, and what it takes. `make device-memory` runs these."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from test_preference_weights import BALANCES, TABLE, draw, evaluate
from tiny_models import make

from groupdpo_kernels import Objective, model_logps
from groupdpo_kernels.kernels.preference_weights import LOSSES
from groupdpo_kernels.memory.planner import Hardware, Prediction
from groupdpo_kernels.memory.sweep import Worker
from groupdpo_kernels.memory.workload import Workload

pytestmark = pytest.mark.gpu
STEP = Workload(model="llama-3.2-1b", layers=4, tokens=512, micro_batch=2, dtype="bfloat16", group=8)


@pytest.mark.parametrize("balance", BALANCES, ids=("plain", "policy", "reference"))
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_against_float64(loss: str, balance: Any, poisoned_memory: None) -> None:
    if TABLE[loss].no_balance and balance is not None:
        return
    objective = Objective(loss, beta=0.7, nll_weight=0.5, label_smoothing=0.1, gamma=0.3, balance=balance)
    groups, cu_seqlens, logps, reference = draw(loss, 0, 3.0, per_token=False)
    logps, reference, groups, cu_seqlens = logps.cuda(), reference.cuda(), groups.to("cuda"), cu_seqlens.cuda()
    arguments = (cu_seqlens, groups, objective)
    found, eager = (evaluate(logps, *arguments, reference, impl) for impl in ("triton", "reference"))
    truth = evaluate(logps.double(), *arguments, reference.double(), "reference")
    for name, value in found.items():
        rounding = torch.finfo(torch.float32).eps * truth[name].abs().max()
        assert (value - truth[name]).abs().max() <= max(2 * (eager[name] - truth[name]).abs().max(), rounding), name


def test_a_loss_reads_nothing_back_and_repeats() -> None:
    groups, cu_seqlens, logps, reference = draw("mpo", 1, 3.0, per_token=False)
    arguments = (cu_seqlens.cuda(), groups.to("cuda"), Objective("mpo"), reference.cuda())
    logps = logps.cuda()
    once = evaluate(logps, *arguments, "triton")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = evaluate(logps, *arguments, "triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_a_model_by_its_own_logits(family: str) -> None:
    model = make(family).cuda()
    ids = torch.randint(0, 90, (3, 40), device="cuda")
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    logps = model_logps(model, ids, targets)
    logits = model(input_ids=ids).logits.double()
    wanted = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logps[:, :-1].double(), wanted[:, :-1], rtol=1e-4, atol=1e-4)
    assert not logps[:, -1].any()


@pytest.fixture(scope="module")
def worker() -> Any:
    found = Worker()
    yield found
    found.stop()


def measured(worker: Worker, workload: Workload) -> dict[str, Any]:
    request = {"kind": "memory", "workloads": [asdict(workload)], "device": "cuda", "limit": None}
    (row,) = worker.ask(request)
    assert row["status"] == "ok", row
    return row


def test_two_passes_take_the_same_memory_whatever_the_group(worker: Worker) -> None:
    small, large = (measured(worker, replace(STEP, group=G, micro_batch=1)) for G in (2, 64))
    assert large["peak_bytes"] <= 1.02 * small["peak_bytes"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("strategy", ["coupled_logits", "coupled", "two_pass"])
def test_prediction_is_within_five_per_cent_of_the_allocator(
    worker: Worker, strategy: str, checkpointing: bool
) -> None:
    workload = replace(STEP, strategy=strategy, checkpointing=checkpointing)
    row = measured(worker, workload)
    predicted = Prediction(workload, Hardware(device="cuda")).at(workload.group)
    assert abs(predicted.total / row["peak_bytes"] - 1) < 0.05, (predicted.total, row)
