"""model_logps under FSDP2 and DistributedDataParallel: two gloo processes with half of the batch each, against one.

A sharded weight is whole only inside the call of its own module, and its gradient is reduced only if it comes by the
outputs of the wrapped modules. Each case runs on the same two processes; a test reads what its case reported.
"""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from collectives import Collectives, units
from processes import check_reports, report_case, run_ranks
from tiny_models import batch, eager_logps, make
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from groupdpo_kernels import attach, model_logps
from groupdpo_kernels.memory.planner import Hardware, Prediction
from groupdpo_kernels.memory.workload import TrainingStep, Workload, build_model

WORLD = 2


def lora(**config: object) -> nn.Module:
    import peft

    options = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "lm_head"], **config)
    model = peft.get_peft_model(make("llama"), options)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(std=0.2)
    return model


class Int8Linear(nn.Linear):
    """A head with a forward of its own: called in chunks."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def custom() -> nn.Module:
    model = make("llama")
    model.lm_head.__class__ = Int8Linear
    return model


def layers_of(model: nn.Module) -> nn.ModuleList:
    return next(m for name, m in model.named_modules() if name.endswith("layers"))


def head_of(model: nn.Module) -> nn.Module:
    return model.get_output_embeddings()


def shard(model: nn.Module, *alone: nn.Module, **options: object) -> nn.Module:
    """FSDP2 on every layer, on the modules of `alone`, and on the rest."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in (*layers_of(model), *alone):
        fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def fsdp_head_alone() -> tuple[nn.Module, nn.Module]:
    model = make("llama")
    single = copy.deepcopy(model)
    return shard(model, model.lm_head), single


def fsdp_head_in_the_root() -> tuple[nn.Module, nn.Module]:
    model = make("gemma2")  # tied, with a soft cap
    single = copy.deepcopy(model)
    return shard(model), single


def fsdp_one_unit_resharded() -> tuple[nn.Module, nn.Module]:
    """Nothing but the root: only its own output tells it that a backward begins."""
    model = make("llama")
    single = copy.deepcopy(model)
    return fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)), reshard_after_forward=True), single


def fsdp_output_in_bfloat16() -> tuple[nn.Module, nn.Module]:
    """accelerate's policy casts what leaves each unit; log-probabilities must keep their digits."""
    model = make("llama")
    single = copy.deepcopy(model)
    policy = MixedPrecisionPolicy(output_dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model.lm_head, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh), single


def fsdp_lora_head_in_pieces() -> tuple[nn.Module, nn.Module]:
    """Base layer and adapter are units of their own: each is whole in its own call only."""
    model = lora()
    single = copy.deepcopy(model)
    head = head_of(model)
    return shard(model, head.base_layer, head.lora_A["default"], head.lora_B["default"]), single


def fsdp_custom_head() -> tuple[nn.Module, nn.Module]:
    model = custom()
    single = copy.deepcopy(model)
    return shard(model, model.lm_head), single


def fsdp_dora_head() -> tuple[nn.Module, nn.Module]:
    model = lora(use_dora=True)
    single = copy.deepcopy(model)
    return shard(model, head_of(model)), single


def ddp() -> tuple[nn.Module, nn.Module]:
    model = make("cohere")
    return DistributedDataParallel(model), copy.deepcopy(model)


def ddp_unused_parameters() -> tuple[nn.Module, nn.Module]:
    model = make("llama")
    model.unused = nn.Parameter(torch.zeros(3))
    return DistributedDataParallel(model, find_unused_parameters=True), copy.deepcopy(model)


def ddp_static_graph() -> tuple[nn.Module, nn.Module]:
    model = make("llama")
    return DistributedDataParallel(model, static_graph=True), copy.deepcopy(model)


CASES: list[Callable[[], tuple[nn.Module, nn.Module]]] = [
    fsdp_head_alone,
    fsdp_head_in_the_root,
    fsdp_one_unit_resharded,
    fsdp_output_in_bfloat16,
    fsdp_lora_head_in_pieces,
    fsdp_custom_head,
    fsdp_dora_head,
    ddp,
    ddp_unused_parameters,
    ddp_static_graph,
]


def step(model: nn.Module, logps: Callable[..., Tensor], inputs: dict[str, Tensor], weights: Tensor) -> Tensor:
    token_logps = logps(model, **inputs)
    (token_logps * weights).sum().backward()
    return token_logps.detach()


def check(build: Callable[[], tuple[nn.Module, nn.Module]], rank: int) -> None:
    wrapped, single = build()
    inputs = batch(B=4, L=17)
    weights = torch.randn(4, 17, generator=torch.Generator().manual_seed(9))
    rows = slice(2 * rank, 2 * rank + 2)
    mine = {k: v[rows] for k, v in inputs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        scored = attach(wrapped, strict=True, workspace_bytes=2**15)
        for _ in range(2):  # the second step runs on what the first has left
            expected = step(single, eager_logps, inputs, weights)
            found = step(wrapped, lambda _, **x: scored(**x), mine, weights[rows])
            torch.testing.assert_close(found, expected[rows], rtol=1e-5, atol=2e-5)
    gradients = {n.removeprefix("module."): p.grad for n, p in wrapped.named_parameters()}
    for name, parameter in single.named_parameters():
        gradient = gradients[name]
        if parameter.grad is None:
            assert gradient is None or not gradient.any(), name
            continue
        assert gradient is not None, f"{name} has no gradient"
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        # Both wrappers average over the ranks.
        torch.testing.assert_close(
            WORLD * whole, parameter.grad, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    if isinstance(wrapped, FSDPModule):
        assert all(hasattr(p, "full_tensor") for p in wrapped.parameters()), "a unit was left unsharded"
    with torch.no_grad():
        torch.testing.assert_close(model_logps(wrapped, **mine), expected[rows], rtol=1e-5, atol=2e-5)


LOADS = {
    "two_pass": {"group": 3, "positives": 1},
    "coupled": {"strategy": "coupled"},
    "pairs": {"strategy": "pairs", "lora_rank": 4},
    "shared prompt": {"prompt": 4, "share_prompt": True, "checkpointing": True},
    "shared prompt, coupled": {"prompt": 4, "share_prompt": True, "strategy": "coupled"},
}


def traffic_as_planned(rank: int) -> None:
    """To the byte."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for name, changes in LOADS.items():
        load = replace(Workload(group=4, tokens=8, layers=2), **changes)
        step = TrainingStep(load, "cpu", units(build_model(load, torch.device("cpu")), mesh))
        step.forward_backward(load)  # the first measures the model too
        with Collectives(WORLD) as counted:
            step.forward_backward(load)
        planned = Prediction(load, Hardware(ranks=WORLD)).traffic_at(load.group)
        assert {kind: counted.bytes[kind] for kind in planned} == planned, f"{name}: {counted.bytes} for {planned}"


def collectives_of_two_passes(rank: int) -> None:
    """As many of each kind as the engine's own forwards, with their logits, and backwards; and two agreements."""
    mesh = init_device_mesh("cpu", (WORLD,))
    load = Workload(group=6, tokens=8, layers=2)
    step = TrainingStep(load, "cpu", units(build_model(load, torch.device("cpu")), mesh))
    step.forward_backward(load)
    with Collectives(WORLD) as ours:
        step.forward_backward(load)
    with Collectives(WORLD) as own:
        parts = step.batch(load).split(load.micro_batch)
        for part in parts:
            with torch.no_grad():
                step.model(input_ids=part, use_cache=False)
        for part in parts:
            step.model(input_ids=part, use_cache=False).logits.sum().backward()
    assert ours.calls == own.calls + Counter(agreements=2)
    # Layers and embedding in each of six forwards and three backwards; norm and head as `traffic.py` says.
    assert ours.calls["weights"] == 9 * 3 + 4 and ours.calls["gradients"] == 3 * 4
    assert ours.bytes == own.bytes + Counter(agreements=ours.bytes["agreements"]) and ours.bytes["agreements"] < 200


def mixed_precision_is_the_model_in_bfloat16(rank: int) -> None:
    """Under MixedPrecisionPolicy a step is that of the model with its weights rounded to bfloat16, norms and what goes
    from layer to layer included. Autocast keeps those in float32, and so ends elsewhere.
    """
    model = make("llama")
    rounded, autocast = copy.deepcopy(model), copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16()
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    rows = slice(2 * rank, 2 * rank + 2)
    mine = {k: v[rows] for k, v in batch(B=4, L=17).items()}
    weights = torch.randn(4, 17, generator=torch.Generator().manual_seed(9))[rows]

    def gradient(model: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            step(model, model_logps, mine, weights)
        whole = []
        for parameter in model.parameters():
            assert parameter.grad is not None
            sharded = hasattr(parameter.grad, "full_tensor")
            whole.append(parameter.grad.full_tensor() if sharded else parameter.grad.float() / WORLD)
            if not sharded:
                dist.all_reduce(whole[-1])
        return torch.cat([x.flatten() for x in whole])

    found, same, other = gradient(model), gradient(rounded), gradient(autocast, torch.bfloat16)
    assert (found - same).norm() <= 1e-5 * same.norm()
    assert (found - other).norm() >= 1e-3 * same.norm()


MORE = (traffic_as_planned, collectives_of_two_passes, mixed_precision_is_the_model_in_bfloat16)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for case in (*CASES, *MORE):
        run = case if case in MORE else functools.partial(check, case)
        report_case(functools.partial(run, rank), case.__name__, rank, folder)
        dist.barrier()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    (path / "failure").write_text(run_ranks(worker, str(path), ranks=WORLD))
    return path


def test_all_ranks_end(folder: Path) -> None:
    assert (folder / "failure").read_text() == ""


@pytest.mark.parametrize("case", [c.__name__ for c in (*CASES, *MORE)])
def test_two_processes_give_the_gradients_of_one(case: str, folder: Path) -> None:
    check_reports(folder, case, range(WORLD))
