"""Heads and bodies that tensor parallelism splits, against one process: four gloo processes, in a mesh of 2 x 2.

    tp    the ranks of a row share a batch, and each has a piece of the weights
    dp    FSDP2 shards over the columns, which have different batches

Each case runs on the same processes; a test reads what its case reported. All is in float64, unless a case says so.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from collectives import Collectives, units
from processes import check_reports, report_case, run_ranks
from prompt_groups import groups_of, ref_logps
from tiny_models import batch, check_budget, eager_logps, make, score
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from groupdpo_kernels import Objective, SharedPromptForward, attach, group_backward, model_logps
from groupdpo_kernels.data import collate
from groupdpo_kernels.distributed import reshard
from groupdpo_kernels.memory.planner import Hardware, Prediction
from groupdpo_kernels.memory.workload import TrainingStep, Workload, build_model
from groupdpo_kernels.models.layouts import why_not_packed, why_not_shared
from groupdpo_kernels.models.split_head import like, why_not_split

WORLD = 4
_mesh: list[DeviceMesh] = []


def mesh() -> DeviceMesh:
    if not _mesh:
        _mesh.append(init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")))
    return _mesh[0]


def tp() -> DeviceMesh:
    return mesh()["tp"]


# ------------------------------------------------------------------------------------------------------------ comparing


def full(x: Any) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def close(found: Tensor, expected: Tensor, name: str = "") -> None:
    error = (found - expected).norm() / expected.norm().clamp(min=1e-12)
    assert error <= 1e-9, f"{name}: {float(error):.1e} off"


def same(split: nn.Module, single: nn.Module, dp: bool = False) -> None:
    """Values and gradients of a split model are those of one process. With dp the ranks of a column
    have different batches, and FSDP2 takes the mean of their gradients."""
    inputs = batch(B=4 if dp else 2)
    weights = torch.randn(inputs["targets"].shape, generator=torch.Generator().manual_seed(9)).double()
    rank = mesh().get_local_rank("dp")
    rows = slice(2 * rank, 2 * rank + 2) if dp else slice(None)
    mine, scored = {name: x[rows] for name, x in inputs.items()}, attach(split, strict=True)
    for _ in range(2):  # the second step runs on what the first has left
        expected, found = eager_logps(single, **inputs), scored(**mine)
        assert type(found) is Tensor
        close(found.detach(), expected[rows].detach())
        (expected * weights).sum().backward()
        (found * weights[rows]).sum().backward()
    compare_gradients(split, single, 2 if dp else 1)
    with torch.no_grad():  # last, since FSDP2 leaves the root gathered
        close(scored(**mine), expected[rows].detach())


def compare_gradients(split: nn.Module, single: nn.Module, mean_of: int = 1) -> None:
    """On the scale of the largest one: that of a bias on keys is zero but for rounding."""
    pieces, wholes = trained(split), trained(single)
    largest = max(float(p.grad.norm()) for p in wholes.values() if p.grad is not None)
    for name, parameter in wholes.items():
        piece = pieces[name]
        if parameter.grad is None:
            assert piece.grad is None, name
            continue
        assert piece.grad is not None, f"{name} has no gradient"
        if "lm_head" in name and isinstance(piece, DTensor):
            assert piece.grad.placements == piece.placements, f"{name}: {piece.grad.placements}"
        error = (mean_of * full(piece.grad) - parameter.grad).norm()
        assert error <= 1e-9 * max(parameter.grad.norm(), 1e-3 * largest), f"{name}: {float(error):.1e} off"


def parallel(model: nn.Module, plan: dict[str, Any]) -> nn.Module:
    return parallelize_module(copy.deepcopy(model), tp(), plan)


def body(layers: str = "model.layers.*") -> dict[str, Any]:
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    rows = ("self_attn.o_proj", "mlp.down_proj")
    plan: dict[str, Any] = {f"{layers}.{name}": ColwiseParallel() for name in columns}
    return plan | {f"{layers}.{name}": RowwiseParallel() for name in rows}


# ---------------------------------------------------------------------------------------------------------------- heads


def llama(**changes: Any) -> nn.Module:
    return make("llama", num_hidden_layers=1, **changes).double()


def heads_by_columns() -> None:
    """Kinds of output, over an uneven cut of the vocabulary."""
    for layout, local in ((Replicate(), True), (Shard(-1), True), (Shard(-1), False), (Shard(1), True)):
        single = llama()
        head = ColwiseParallel(output_layouts=layout, use_local_output=local)
        same(parallel(single, {**body(), "lm_head": head}), single)


def maps_and_biases() -> None:
    """What a model does to its logits, and a bias, stay."""
    for name in ("phi", "cohere", "gemma2"):
        single = make(name, tie_word_embeddings=False).double()
        same(parallel(single, {"lm_head": ColwiseParallel(output_layouts=Replicate())}), single)


def heads_by_rows() -> None:
    for name in ("llama", "phi"):
        single = make(name).double()
        same(parallel(single, {"lm_head": RowwiseParallel(input_layouts=Replicate())}), single)


def heads_on_every_rank() -> None:
    single = make("phi").double()
    split = copy.deepcopy(single)

    def spread(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return DTensor.from_local(inputs[0], mesh, [Replicate()])

    distribute_module(split.lm_head, tp(), input_fn=spread, output_fn=lambda module, output, mesh: output.to_local())
    same(split, single)


def tied_embeddings() -> None:
    """A table in rows or in columns, which is the head's weight too."""
    for name, style in (
        ("gemma2", RowwiseParallel(input_layouts=Replicate())),
        ("qwen3", ColwiseParallel(output_layouts=Replicate())),
    ):
        single = make(name, tie_word_embeddings=True).double()
        split = parallel(single, {"model.embed_tokens": style, "lm_head": ColwiseParallel()})
        split.lm_head.weight = split.model.embed_tokens.weight
        same(split, single)


def sequence_parallel() -> None:
    """Hidden states are split by position before the head, as they are from the embedding on."""
    layer = "model.layers.*"
    norm = SequenceParallel()
    gather = PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
    )
    mlp = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    by_position = RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
    plan = body() | {
        "model.embed_tokens": RowwiseParallel(
            input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False
        ),
        "model.norm": norm,
        f"{layer}.input_layernorm": norm,
        f"{layer}.post_attention_layernorm": norm,
        f"{layer}.self_attn": gather,
        f"{layer}.mlp": mlp,
        f"{layer}.self_attn.o_proj": by_position,
        f"{layer}.mlp.down_proj": by_position,
    }
    for head in (
        ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(1), use_local_output=False),
    ):
        single = llama()
        same(parallel(single, {**plan, "lm_head": head}), single)


def lower_precision() -> None:
    """Within the budget of a model that is not split."""
    for dtype in (torch.float32, torch.bfloat16):
        single = make("gemma2", num_hidden_layers=1, tie_word_embeddings=False).to(dtype)
        inputs = batch()
        split = parallel(single, {"lm_head": ColwiseParallel()})
        logps, gradients = score(split, model_logps, inputs)
        ours = logps, {name: None if g is None else full(g) for name, g in gradients.items()}
        truth = score(copy.deepcopy(single).double(), eager_logps, inputs)
        check_budget(ours, score(single, eager_logps, inputs), truth, torch.finfo(dtype).eps)


# ------------------------------------------------------------------------------------------------------------- adapters


def with_adapter(model: nn.Module) -> nn.Module:
    import peft

    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["lm_head"], lora_bias=True))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return adapted


def adapters_on_the_head() -> None:
    """The adapter is whole on every rank, or split as the head is."""
    single = with_adapter(make("phi", num_hidden_layers=1).double())
    head = "base_model.model.lm_head"
    plan: dict[str, Any] = {f"{head}.base_layer": ColwiseParallel(output_layouts=Replicate())}
    same(parallel(single, plan), copy.deepcopy(single))
    plan[f"{head}.lora_B.default"] = ColwiseParallel(output_layouts=Replicate(), use_local_output=False)
    same(parallel(single, plan), single)


# --------------------------------------------------------------------------------------------------------- transformers


def sharded_by_transformers() -> None:
    """Its own plan with FSDP2 and tied embeddings; and an adapter on a head whose logits stay split, over 4 ranks."""
    import transformers

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    try:
        for name, sizes in (
            ("qwen3", {"tp_size": 2, "fsdp_size": 2}),
            ("llama", {"tp_size": 4, "tp_plan": {"lm_head": "colwise"}}),
        ):
            single = make(name, num_hidden_layers=1, num_key_value_heads=4).double()
            if dist.get_rank() == 0:
                single.save_pretrained(folder[0])
            dist.barrier()
            config = transformers.distributed.DistributedConfig(**sizes)
            load = transformers.AutoModelForCausalLM.from_pretrained
            split = load(folder[0], distributed_config=config, dtype=torch.float64).train()
            if "tp_plan" in sizes:
                adapters_of_peft(split, single)
            else:
                same(split, single, dp="fsdp_size" in sizes)
            dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(folder[0])  # type: ignore[arg-type]


def adapters_of_peft(split: nn.Module, single: nn.Module) -> None:
    single, split = with_adapter(single), with_adapter(split)
    pieces: dict[str, Any] = trained(split)
    with torch.no_grad():
        for name, parameter in trained(single).items():
            piece = pieces[name]
            split_too = isinstance(piece, DTensor)
            piece.copy_(distribute_tensor(parameter, piece.device_mesh, piece.placements) if split_too else parameter)
    same(split, single)


# ------------------------------------------------------------------------------------------------- steps of preference


def with_fsdp() -> None:
    for alone in (False, True):  # whether the head is a unit of its own
        single = llama()
        split = parallel(single, {**body(), "lm_head": ColwiseParallel(output_layouts=Replicate())})
        for module in (*split.model.layers, *[split.lm_head] * alone):
            fully_shard(module, mesh=mesh()["dp"])
        fully_shard(split, mesh=mesh()["dp"])
        same(split, single, dp=True)
        if alone:
            continue
        shapes = [[(5, [5, 3])], [(2, [3, 6]), (4, [4, 2])]]  # the columns differ in their number of micro-batches
        for model in (single, split):
            reshard(model)
            model.zero_grad(set_to_none=True)
        step = collate(groups_of(*shapes[mesh().get_local_rank("dp")]), max_sequences=2)
        group_backward(step.parts, SharedPromptForward(split, strict=True), step.groups, MPO, ref_logps(step))
        for shape in shapes:
            step = collate(groups_of(*shape))
            group_backward(step.parts, SharedPromptForward(single), step.groups, MPO, ref_logps(step), scale=0.5)
        compare_gradients(split, single)


def shared_prompts() -> None:
    """Keys and values are those of a rank's heads."""
    single = llama()
    split = parallel(single, {**body(), "lm_head": ColwiseParallel()})
    assert not why_not_packed(split) and not why_not_shared(split)
    groups = groups_of((6, [5, 3, 4]), (3, [3, 6]))
    for strategy in ("two_pass", "one_pass"):
        step = collate(groups, max_sequences=2, share_prompt=True)
        for model in (single, split):
            forward = SharedPromptForward(model, strict=True)
            group_backward(step.parts, forward, step.groups, MPO, ref_logps(step), strategy=strategy)
        compare_gradients(split, single)


# --------------------------------------------------------------------------------------------------- what ranks receive

LOADS: dict[str, dict[str, Any]] = {
    "two_pass": {"group": 3, "positives": 1, "prompt": 3},
    "coupled": {"strategy": "coupled", "checkpointing": True},
    "pairs": {"strategy": "pairs"},
    "shared prompt": {"prompt": 4, "share_prompt": True},
    "shared prompt, coupled": {"prompt": 4, "share_prompt": True, "strategy": "coupled", "checkpointing": True},
}


def traffic_as_planned() -> None:
    """To the byte: torch's plan, the same under FSDP2, and that of transformers. A rank's share of the parameters is
    the planned one too."""
    import transformers

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    base = Workload(group=4, tokens=8, layers=2)
    plan = {**body(), "model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    try:
        if dist.get_rank() == 0:
            build_model(base, torch.device("cpu")).save_pretrained(folder[0])
        dist.barrier()
        base = replace(base, model=str(folder[0]))
        split_by = transformers.distributed.DistributedConfig(tp_size=2, fsdp_size=2)
        for (name, changes), engine in itertools.product(LOADS.items(), ("torch", "torch, FSDP2", "transformers")):
            if engine == "transformers" and name != "two_pass":
                continue
            load = replace(base, **changes)
            hardware = Hardware(ranks=1 if engine == "torch" else 2, tensor_parallel=2)
            if engine == "transformers":
                take = transformers.AutoModelForCausalLM.from_pretrained
                split = take(folder[0], distributed_config=split_by, dtype=torch.float32).train()
            else:
                split = parallelize_module(build_model(load, torch.device("cpu")), tp(), plan)
            share = sum(getattr(p, "_local_tensor", p).nbytes for p in split.parameters())
            share *= 2 if engine == "transformers" else 1  # sharded by FSDP2 already
            if engine == "torch, FSDP2":
                units(split, mesh()["dp"])
            step = TrainingStep(load, "cpu", split)
            step.forward_backward(load)  # the first measures the model too
            with Collectives(2) as counted:
                step.forward_backward(load)
            prediction = Prediction(load, hardware)
            planned, sizes = prediction.traffic_at(load.group), prediction._sizes()
            assert {kind: counted.bytes[kind] for kind in planned} == planned, (
                f"{name}, {engine}: {counted.bytes} for {planned}"
            )
            assert share == sizes.whole(2).weights
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder[0])  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ what is not computed


class Doubled(nn.Linear):
    """A head with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def real_logits_where_need_be() -> None:
    """A warning says why; logits that know of their pieces are gathered; a piece is no vocabulary."""
    inputs = batch()
    single = llama()
    split = copy.deepcopy(single)

    def spread(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return DTensor.from_local(inputs[0], mesh, [Replicate()] * 2)

    distribute_module(split.lm_head, mesh(), input_fn=spread)
    falls_back(split, single, inputs, "on a mesh of 2 dimensions")

    narrow = llama(vocab_size=9)
    split = copy.deepcopy(narrow)
    row = init_device_mesh("cpu", (WORLD,))
    parallelize_module(split, row, {"lm_head": ColwiseParallel(use_local_output=False)})  # 3, 3, 3 and no rows
    few = {
        "input_ids": inputs["input_ids"] % 9,
        "targets": inputs["targets"].where(inputs["targets"] < 0, inputs["targets"] % 9),
    }
    falls_back(split, narrow, few, "leaves a rank without rows")

    single.lm_head.__class__ = Doubled
    falls_back(
        parallel(single, {"lm_head": ColwiseParallel(use_local_output=False)}), single, inputs, "no linear layer"
    )
    piece = parallel(single, {"lm_head": ColwiseParallel()})
    with pytest.warns(UserWarning, match="no linear layer"), pytest.raises(ValueError, match=r"got 25[45] of 509"):
        model_logps(piece, **inputs)

    by_hand = make("llama", num_hidden_layers=1, vocab_size=508)
    rows, rank = by_hand.lm_head.weight.detach(), tp().get_local_rank()
    by_hand.lm_head = nn.Linear(32, 254, bias=False)
    by_hand.lm_head.weight.data.copy_(rows[254 * rank :][:254])
    with pytest.raises(ValueError, match="got 254 of 508, the piece of one rank"):
        model_logps(by_hand, **inputs)


def reasons_in_words() -> None:
    """What a head's weight and its hidden states lack, without a model around them."""
    weight, hidden = distribute_tensor(torch.randn(6, 4), tp(), [Shard(0)]), torch.randn(3, 4)
    row = init_device_mesh("cpu", (WORLD,))
    for given, states, why in (
        (weight, hidden, "plain tensors, which may differ"),
        (weight, DTensor.from_local(hidden, row, [Replicate()]), "on another mesh"),
        (weight, DTensor.from_local(hidden[:, :2], tp(), [Replicate()]), "sees 2 columns of 4"),
        (DTensor.from_local(weight.to_local(), tp(), [Partial()]), like(hidden, weight), "has no rows"),
    ):
        assert why in why_not_split(given, states), why_not_split(given, states)
    assert not why_not_split(weight, hidden, takes_plain=True) and not why_not_split(weight, like(hidden, weight))


def falls_back(split: nn.Module, single: nn.Module, inputs: dict[str, Tensor], why: str) -> None:
    with pytest.raises(ValueError, match=f"split over devices.*{why}.*strict=True forbids"):
        model_logps(split, **inputs, strict=True)
    with pytest.warns(UserWarning, match=why):
        found = model_logps(split, **inputs)
    close(found.detach(), eager_logps(single, **inputs).detach())


MPO = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)
# Cases of two ranks, which the rows take in turn, and cases of the whole mesh.
OF_A_ROW: list[Callable[[], None]] = [
    heads_by_columns,
    sequence_parallel,
    shared_prompts,
    maps_and_biases,
    tied_embeddings,
    heads_by_rows,
    adapters_on_the_head,
    heads_on_every_rank,
    lower_precision,
]
OF_ALL: list[Callable[[], None]] = [
    sharded_by_transformers,
    with_fsdp,
    traffic_as_planned,
    real_logits_where_need_be,
    reasons_in_words,
]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    limit = datetime.timedelta(minutes=10)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=limit)
    row = mesh().get_local_rank("dp")
    for case in (*OF_A_ROW[row::2], *OF_ALL):
        report_case(case, case.__name__, rank, folder)
        dist.barrier(tp().get_group() if case in OF_A_ROW else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parallel")
    (path / "failure").write_text(run_ranks(worker, str(path), ranks=WORLD))
    return path


def test_all_ranks_end(folder: Path) -> None:
    assert (folder / "failure").read_text() == ""


@pytest.mark.parametrize("case", [c.__name__ for c in (*OF_A_ROW, *OF_ALL)])
def test_a_split_model_equals_one_process(case: str, folder: Path) -> None:
    row = [c.__name__ for c in OF_A_ROW]
    check_reports(folder, case, [r for r in range(WORLD) if case not in row or row.index(case) % 2 == r // 2])
