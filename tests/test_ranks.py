"""group_backward over two gloo processes under DistributedDataParallel, FSDP 1 and 2 and ZeRO, against one process that
has the groups of both: the same weights after three steps, whatever the numbers of micro-batches; or an error on both.

Each case runs on the same two processes; a test reads what its case reported. No case may hang: a collective that waits
for longer than two minutes raises.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import collectives
import groups_over_ranks
import pytest
import torch
import torch.distributed as dist
from processes import check_reports, report_case, run_ranks
from prompt_groups import groups_of, ref_logps
from tiny_models import batch, eager_logps, make
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from groupdpo_kernels import (
    Objective,
    PreferenceGroups,
    SharedPrompt,
    SharedPromptForward,
    forward_parts,
    group_backward,
    model_logps,
    preference_loss,
)
from groupdpo_kernels.data import collate
from groupdpo_kernels.memory.planner import Hardware, Prediction
from groupdpo_kernels.memory.workload import TrainingStep, Workload, build_model
from groupdpo_kernels.stepwise import reference_logps
from groupdpo_kernels.trainers.forward import StepForward
from groupdpo_kernels.trainers.reference import as_reference, check_on_one_device, frozen_copy

WORLD, STEPS, LR = 2, 3, 0.05
OBJECTIVE = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)


# ------------------------------------------------------------------------------------------------ the README's own loop


def forward_of(model: nn.Module) -> Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]:
    def forward(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logps = model_logps(model, batch["input_ids"], batch["targets"], attention_mask=batch["attention_mask"])
        live = batch["targets"] != -100
        return logps[live], nn.functional.pad(live.sum(1).cumsum(0), (1, 0))

    return forward


def data_of(rank: int, count: int, step: int) -> tuple[list[dict[str, Tensor]], PreferenceGroups, Tensor]:
    """Micro-batches of two responses, which are one group, and reference log-probabilities of that group."""
    batches = [batch(B=2, L=9 + 2 * i, seed=100 * step + 10 * rank + i) for i in range(count)]
    groups = PreferenceGroups.from_lists([[i % 3 == 0 for i in range(2 * count)]])
    return batches, groups, torch.linspace(-40, -20, 2 * count)


def single_step(model: nn.Module, counts: tuple[int, int], step: int, reference: Any = None) -> None:
    """Gradients of one process with the groups of both ranks."""
    for rank, count in enumerate(counts):
        batches, groups, ref_logps = data_of(rank, count, step)
        if reference is not None:
            ref_logps = reference(model, batches)
        runs = [forward_of(model)(mb) for mb in batches]
        lengths = torch.cat([cu_seqlens.diff() for _, cu_seqlens in runs])
        offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
        token_logps = torch.cat([logps for logps, _ in runs])
        (preference_loss(token_logps, offsets, groups, OBJECTIVE, ref_logps).loss / WORLD).backward()


def named(model: nn.Module) -> dict[str, Tensor]:
    """Whole parameters by the names of the bare model."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return {n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in model.named_parameters()}
    full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    return {n.removeprefix("module."): p.detach() for n, p in full.items()}


def same_as_one_process(
    rank: int,
    counts: tuple[int, int],
    wrap: Callable[[nn.Module], nn.Module],
    model: nn.Module | None = None,
    reference: Any = None,
    **options: Any,
) -> None:
    single = make("llama", num_hidden_layers=1) if model is None else model
    start = {n: p.detach().clone() for n, p in single.named_parameters()}
    wrapped = wrap(copy.deepcopy(single))
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=LR) for m in (single, wrapped)]
    if options.pop("give_model", False):
        options["model"] = wrapped
    for step in range(STEPS):
        batches, groups, ref_logps = data_of(rank, counts[rank], step)
        if reference is not None:
            ref_logps = reference(wrapped, batches)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            group_backward(batches, forward_of(wrapped), groups, OBJECTIVE, ref_logps, **options)
        single_step(single, counts, step, reference)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    found, way, off = named(wrapped), 0.0, 0.0
    for name, expected in single.named_parameters():
        way += float((expected.detach() - start[name]).square().sum())
        off += float((expected.detach() - found[name]).square().sum())
    assert way > 1e-4, "nothing has trained"
    assert off <= 1e-10 * way, f"{(off / way) ** 0.5:.1e} of the way off"


def units(model: nn.Module) -> nn.Module:
    return collectives.units(model, init_device_mesh("cpu", (WORLD,)))


def fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def ddp_counts_differ(rank: int) -> None:
    same_as_one_process(rank, (2, 3), DistributedDataParallel)


def ddp_model_given(rank: int) -> None:
    same_as_one_process(rank, (3, 1), DistributedDataParallel, give_model=True)


def ddp_one_pass(rank: int) -> None:
    same_as_one_process(rank, (2, 3), DistributedDataParallel, strategy="one_pass")


def ddp_shared_prompt(rank: int) -> None:
    """Of the two groups each rank has, some share their prompt, and numbers of responses differ."""
    shapes = [[(9, [5, 3, 7]), (1, [2, 2])], [(1, [3, 1]), (6, [4, 2, 3, 1, 2])]]
    for strategy, find_unused in itertools.product(("two_pass", "one_pass"), (False, True)):
        single, reductions = make("gpt2").double(), []
        wrapped = DistributedDataParallel(copy.deepcopy(single), find_unused_parameters=find_unused, bucket_cap_mb=100)
        wrapped.register_comm_hook(reductions, lambda seen, bucket: counted_mean(seen, bucket))  # reads annotations
        step = collate(groups_of(*shapes[rank], seed=rank), max_sequences=2, share_prompt=True)
        forward = SharedPromptForward(wrapped)
        group_backward(step.parts, forward, step.groups, OBJECTIVE, ref_logps(step), strategy=strategy)
        assert len(reductions) == 1
        for other in range(WORLD):
            step = collate(groups_of(*shapes[other], seed=other))
            logps, offsets, _ = forward_parts(step.parts, SharedPromptForward(single))
            (preference_loss(logps, offsets, step.groups, OBJECTIVE, ref_logps(step)).loss / WORLD).backward()
        largest = max(float(p.grad.abs().max()) for p in single.parameters())
        for found, expected in zip(wrapped.parameters(), single.parameters()):
            torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-10 * largest)


def ddp_one_prompt_on_one_rank(rank: int) -> None:
    """Rank 0 shares its only prompt, rank 1 has none to share. The wrapper broadcasts buffers, and once its order of
    buckets, at the first forward with a graph, which must be in pass 2 on both; pass 1 goes past it, as in the trainer.
    """
    model = DistributedDataParallel(make("llama", num_hidden_layers=1))
    for seed in range(3):
        forward = StepForward(model, contextlib.nullcontext, bare=model.module)
        step = collate(groups_of((1 + 8 * (rank == 0), [5, 3]), seed=seed), max_sequences=2, share_prompt=True)
        assert isinstance(step.parts[0], SharedPrompt) == (rank == 0)
        group_backward(step.parts, forward, step.groups, OBJECTIVE, ref_logps(step), model=model)
    gradients = [torch.zeros_like(model.module.lm_head.weight.grad) for _ in range(WORLD)]
    dist.all_gather(gradients, model.module.lm_head.weight.grad)
    assert torch.equal(*gradients) and gradients[0].any()


def counted_mean(reductions: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    reductions.append(bucket.index())
    future = dist.all_reduce(bucket.buffer() / WORLD, async_op=True).get_future()
    return future.then(lambda f: f.value()[0])


def fsdp2_counts_differ(rank: int) -> None:
    same_as_one_process(rank, (1, 3), units)


def fsdp1_counts_differ(rank: int) -> None:
    same_as_one_process(rank, (3, 2), fsdp1)


def fsdp_shared_prompts(rank: int) -> None:
    """Ranks differ in their numbers of prompts, in the micro-batches after each, and in what comes first."""
    shapes = [[(1, [2, 2, 1]), (9, [5, 3, 7])], [(6, [4, 2, 3, 1, 2]), (8, [2, 2, 5]), (1, [3, 1])]]
    single = make("llama", num_hidden_layers=1).double()
    start = {n: p.detach().clone() for n, p in single.named_parameters()}
    for other in range(WORLD):
        step = collate(groups_of(*shapes[other], seed=other))
        logps, offsets, _ = forward_parts(step.parts, SharedPromptForward(single))
        (preference_loss(logps, offsets, step.groups, OBJECTIVE, ref_logps(step)).loss / WORLD).backward()
    for wrap, options in itertools.product((units, fsdp1), ({}, {"process_group": dist.group.WORLD})):
        bare = make("llama", num_hidden_layers=1).double()
        wrapped = wrap(bare)
        step = collate(groups_of(*shapes[rank], seed=rank), max_sequences=2, share_prompt=True, prompts_together=False)
        assert sum(isinstance(part, SharedPrompt) for part in step.parts) == 1 + rank
        forward = SharedPromptForward(wrapped)
        group_backward(step.parts, forward, step.groups, OBJECTIVE, ref_logps(step), **options)
        torch.optim.SGD(wrapped.parameters(), lr=1.0).step()
        largest = max(float(p.grad.abs().max()) for p in single.parameters())
        for name, found in named(wrapped).items():
            expected = start[name] - single.get_parameter(name).grad
            # Norms and rotary tables of Llama round to float32 in any model.
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-7 * largest, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------------------------- adapters under FSDP2


def lora_on_the_head() -> nn.Module:
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(make("llama", num_hidden_layers=1), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model


def sums(logps: Callable[..., Tensor], model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([logps(model, **mb).sum(1) for mb in batches])


def reference_by_disable_adapter(rank: int) -> None:
    def reference(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
        with model.disable_adapter():
            return sums(model_logps, model, batches)

    same_as_one_process(rank, (3, 3), units, lora_on_the_head(), reference)


def reference_by_the_models_own_logits(rank: int) -> None:
    """Scored without this package: group_backward itself finds the shards as peft has left them."""

    def reference(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
        with model.disable_adapter():
            return sums(eager_logps, model, batches)

    same_as_one_process(rank, (2, 2), units, lora_on_the_head(), reference)


def reference_of_the_trainers(rank: int) -> None:
    def reference(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
        with as_reference(model) as without:
            return sums(eager_logps, without, batches)

    same_as_one_process(rank, (2, 2), units, lora_on_the_head(), reference)


# ----------------------------------------------------------------------------------------------------- errors, in words


def raises(message: str, wrapped: nn.Module, *arguments: Any, forward: Any = None, **options: Any) -> None:
    """On this rank; and no gradient is written."""
    batches, groups, ref_logps = arguments
    start = time.monotonic()
    with pytest.raises((ValueError, TypeError), match=message):
        group_backward(batches, forward or forward_of(wrapped), groups, OBJECTIVE, ref_logps, **options)
    assert all(p.grad is None for p in wrapped.parameters())
    assert time.monotonic() - start < 60


def one_pass_is_refused_under_fsdp(rank: int) -> None:
    for wrap in (units, fsdp1):
        model = wrap(make("llama", num_hidden_layers=1))
        for options in ({}, {"model": model}):
            raises("strategy must be 'two_pass' under F", model, *data_of(rank, 2, 0), strategy="one_pass", **options)
    sharded = units(make("llama", num_hidden_layers=1))
    raises("parameters must be None", sharded, *data_of(rank, 2, 0), parameters=[*sharded.parameters()])


def an_error_of_one_rank_is_one_of_all(rank: int) -> None:
    ddp = DistributedDataParallel(make("llama", num_hidden_layers=1))
    batches, groups, ref_logps = data_of(rank, 2, 0)
    elsewhere = "it has failed on another rank"

    def failing(mb: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        outputs = forward_of(ddp)(mb)
        if rank == 1 and mb is batches[1]:
            raise ValueError("forward of the second micro-batch")
        return outputs

    raises(elsewhere if rank == 0 else "second micro-batch", ddp, batches, groups, ref_logps, forward=failing)
    wrong = ref_logps if rank == 0 else ref_logps[:3]
    raises(elsewhere if rank == 0 else "ref_logps must be", ddp, batches, groups, wrong)
    strategy = "two_pass" if rank == 0 else "three_pass"
    raises(elsewhere if rank == 0 else "must be one of", ddp, batches, groups, ref_logps, strategy=strategy, model=ddp)
    strategy = "two_pass" if rank == 0 else "one_pass"
    raises("strategy must be the same on every rank", ddp, batches, groups, ref_logps, strategy=strategy)
    few = batches if rank == 0 else []
    raises(f"at least one on every rank; got from 0 to 2, {len(few)} here", ddp, few, groups, ref_logps, model=ddp)
    sharded = units(make("llama", num_hidden_layers=1))
    raises(elsewhere if rank == 0 else "ref_logps must be", sharded, batches, groups, wrong)


def a_bare_model_waits_for_nobody(rank: int) -> None:
    """The other rank may be doing something else."""
    model = make("llama", num_hidden_layers=1)
    if rank == 0:
        batches, groups, ref_logps = data_of(0, 2, 0)
        group_backward(batches, forward_of(model), groups, OBJECTIVE, ref_logps)
        assert model.lm_head.weight.grad.any()
    else:
        # With a process group all of it must come: here it is this rank alone.
        alone = dist.new_group([1], use_local_synchronization=True)
        batches, groups, ref_logps = data_of(1, 3, 0)
        group_backward(batches, forward_of(model), groups, OBJECTIVE, ref_logps, process_group=alone)
        assert model.lm_head.weight.grad.any()


def a_micro_batch_without_live_tokens(rank: int) -> None:
    """Rank 1 has nothing to score: its log-probabilities are zeros whose backward still takes part in the reduction."""
    model = make("llama", num_hidden_layers=1)
    ddp = DistributedDataParallel(copy.deepcopy(model))
    inputs = batch(B=2, L=9)
    (eager_logps(model, **inputs).sum() / WORLD).backward()
    if rank == 1:
        inputs["targets"].fill_(-100)
    found = model_logps(ddp, **inputs)
    assert rank == 0 or not found.any()
    found.sum().backward()
    for parameter, expected in zip(ddp.parameters(), model.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- the reference


def references_are_scored_in_parts(rank: int) -> None:
    """Each row by one rank, all ranks equally often; a lost file is scored again, and an error of one is one of all."""
    model, seen = nn.Linear(1, 1), []
    place = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(place)

    def score(model: nn.Module, rows: list[float]) -> Tensor:
        seen.append(rows)
        return torch.tensor([2.0 * row for row in rows])

    def reference(rows: list[float]) -> Tensor:
        seen.clear()
        for parameter in model.parameters():
            nn.init.ones_(parameter)
        return reference_logps(model, rows, place[0], score=score, chunk_size=2, spread=True)

    rows = [float(i) for i in range(9)]  # five chunks
    assert reference(rows).tolist() == [2 * row for row in rows]
    assert seen == ([rows[0:2], rows[4:6], rows[8:]] if rank == 0 else [rows[2:4], rows[6:8], []])
    assert reference(rows).tolist() == [2 * row for row in rows] and seen == []
    dist.barrier()
    if rank == 0:
        next(Path(place[0]).glob("ref-*/000003.pt")).unlink()
    dist.barrier()
    assert reference(rows).tolist() == [2 * row for row in rows]
    assert seen == ([rows[6:8]] if rank == 0 else [[]])
    message = "row 8 has nan" if rank == 0 else "scoring stops on every rank"
    with pytest.raises((ValueError, RuntimeError), match=message):
        reference([*rows[:8], math.nan])
    dist.barrier()
    if rank == 0:
        shutil.rmtree(place[0])


# --------------------------------------------------------------------------------------------------- tensor parallelism


def split_head(model: nn.Module) -> nn.Module:
    plan = {"lm_head": ColwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (WORLD,)), plan)


def a_sharded_model_is_no_trainers(rank: int) -> None:
    for wrap in (units, split_head, fsdp1, DistributedDataParallel):
        with pytest.raises(ValueError, match=r"^model must be whole on every rank and not wrapped"):
            check_on_one_device("model", wrap(make("llama", num_hidden_layers=1)))
    with pytest.raises(ValueError, match="DTensors"):
        frozen_copy(units(make("llama", num_hidden_layers=1)))
    check_on_one_device("model", make("llama", num_hidden_layers=1))


def a_model_sharded_by_transformers(rank: int) -> None:
    """As its `from_pretrained` shards it: values as before, and no trainer."""
    import transformers
    import trl
    from tiny_tokenizers import byte_level_bpe

    from groupdpo_kernels.trainers import DPOTrainer, GroupDPOConfig, GroupDPOTrainer

    single, inputs = make("llama", num_hidden_layers=1), batch(B=2, L=9)
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    if rank == 0:
        single.save_pretrained(folder[0])
    dist.barrier()
    try:
        for sizes in ({"tp_size": WORLD}, {"fsdp_size": WORLD}):
            config = transformers.distributed.DistributedConfig(**sizes)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder[0], distributed_config=config)
            options = {"output_dir": folder[0], "use_cpu": True, "bf16": False, "report_to": []}
            for trainer, arguments, said in (
                (GroupDPOTrainer, GroupDPOConfig, "model must be whole on every rank"),
                (DPOTrainer, trl.DPOConfig, "DTensors"),
            ):
                with pytest.raises(ValueError, match=said):
                    trainer(model, args=arguments(**options), train_dataset=[], processing_class=byte_level_bpe())
            with torch.no_grad():
                found = model_logps(model, **inputs, strict=True)
            torch.testing.assert_close(found, eager_logps(single, **inputs), rtol=1e-5, atol=2e-5)
    finally:
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder[0])


# ------------------------------------------------------------------------------------------------------------ DeepSpeed


def zero_engine(model: nn.Module, stage: int, **options: Any) -> Any:
    """DeepSpeed's engine around the model, with SGD."""
    import deepspeed
    import deepspeed.comm

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # it would compile an extension; gloo does without
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **options},
        "steps_per_print": 10**9,
        "gradient_clipping": 0.0,  # its default is 1.0
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def zero(rank: int, stage: int, counts: tuple[int, int]) -> None:
    import deepspeed

    single = make("llama", num_hidden_layers=1)
    start = copy.deepcopy(single)
    engine = zero_engine(copy.deepcopy(single), stage, reduce_bucket_size=5000)
    optimizer = torch.optim.SGD(single.parameters(), lr=LR)
    for step in range(STEPS):
        batches, groups, ref_logps = data_of(rank, counts[rank], step)
        group_backward(batches, forward_of(engine), groups, OBJECTIVE, ref_logps)
        engine.step()
        single_step(single, counts, step)
        optimizer.step()
        optimizer.zero_grad()
    way = sum((a - b).square().sum() for a, b in zip(single.parameters(), start.parameters()))
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        off = sum((a - b).square().sum() for a, b in zip(single.parameters(), engine.module.parameters()))
    assert way > 1e-4, "nothing has trained"
    assert off <= 1e-10 * way, f"{float(off / way) ** 0.5:.1e} of the way off"


def zero_1(rank: int) -> None:
    zero(rank, 1, (3, 3))


def zero_2_counts_differ(rank: int) -> None:
    zero(rank, 2, (2, 3))


def zero_3_counts_differ(rank: int) -> None:
    zero(rank, 3, (3, 1))


def zero_groups_over_ranks(rank: int) -> None:
    """A step of SGD on groups that span the ranks; micro-batches differ in number, and once rank 1 has no response."""
    import deepspeed

    for stage, lists in itertools.product((1, 2, 3), (groups_over_ranks.RAGGED, groups_over_ranks.ON_ONE_RANK)):
        rows = groups_over_ranks.Rows(lists, rank)
        sequences = groups_over_ranks.sequences_of(rows.lengths)
        expected, gradients = groups_over_ranks.of_one_process(sequences, rows, OBJECTIVE)
        own = [sequences[i][0] for i in rows.own]
        size = 2 + rank
        batches = [own[i : i + size] for i in range(0, len(own), size)] or [[]]
        start = groups_over_ranks.Scorer().float()
        engine = zero_engine(copy.deepcopy(start), stage, reduce_bucket_size=100)

        def forward(batch: list[Tensor], engine: Any = engine) -> tuple[Tensor, Tensor]:
            """One call of the engine, which takes no other before its backward."""
            some = batch or [torch.zeros(1, dtype=torch.long)]
            logps = engine(torch.cat(some), torch.cat([ids.roll(1) for ids in some]))
            cu_seqlens = groups_over_ranks.offsets(torch.tensor([len(ids) for ids in batch], dtype=torch.long))
            return logps[: cu_seqlens[-1]], cu_seqlens

        found = group_backward(batches, forward, rows.groups, OBJECTIVE, rows.ref[rows.own].float())
        torch.testing.assert_close(found.loss, expected.loss.detach(), rtol=1e-5, atol=1e-6, check_dtype=False)
        engine.step()
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            pairs = zip(start.named_parameters(), engine.module.parameters())
            moved = {name: (a.detach().double() - b.detach().double()) / LR for (name, a), b in pairs}
        groups_over_ranks.same_gradients(moved, gradients, 1e-4)
        engine.destroy()


ZERO_3_LOADS: dict[str, dict[str, Any]] = {
    "two_pass": {"group": 3, "positives": 1},
    "one micro-batch": {"group": 2, "micro_batch": 2},
    "shared prompt": {"group": 2, "prompt": 4, "share_prompt": True},
    "coupled": {"strategy": "coupled"},
    "pairs": {"strategy": "pairs"},
    "adapter": {"group": 2, "lora_rank": 4},
    "deep": {"group": 2, "layers": 9, "checkpointing": True},
}


def zero_3_traffic_as_planned(rank: int) -> None:
    """What it prefetches for a backward that does not come included, as transformers and DeepSpeed set it."""
    shape = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"model_type": "llama", "vocab_size": 512, "num_hidden_layers": 4, **shape}, file)
        file.flush()
        for name, changes in ZERO_3_LOADS.items():
            load = Workload(**{"model": file.name, "group": 4, "tokens": 8, "micro_batch": 1, **changes})
            model = build_model(load, torch.device("cpu"))
            engine = zero_engine(
                model, 3, stage3_prefetch_bucket_size=int(0.9 * 32**2), stage3_param_persistence_threshold=10 * 32
            )
            step = TrainingStep(load, "cpu", model)
            step.model = engine
            for _ in range(3):  # it learns the order of modules from the first steps
                with collectives.Collectives(WORLD) as counted:
                    step.forward_backward(load)
                engine.step()
            planned = Prediction(load, Hardware(ranks=WORLD, engine="zero3")).traffic_at(load.group)
            for kind in ("weights", "gradients"):
                found = counted.bytes[kind]
                assert abs(planned[kind] - found) <= 2e-3 * found, f"{name}, {kind}: {planned[kind]} for {found}"
            engine.destroy()


CASES: list[Callable[[int], None]] = [
    ddp_counts_differ,
    ddp_model_given,
    ddp_one_pass,
    ddp_shared_prompt,
    ddp_one_prompt_on_one_rank,
    fsdp2_counts_differ,
    fsdp1_counts_differ,
    fsdp_shared_prompts,
    reference_by_disable_adapter,
    reference_by_the_models_own_logits,
    reference_of_the_trainers,
    one_pass_is_refused_under_fsdp,
    an_error_of_one_rank_is_one_of_all,
    a_bare_model_waits_for_nobody,
    a_micro_batch_without_live_tokens,
    references_are_scored_in_parts,
    a_sharded_model_is_no_trainers,
    a_model_sharded_by_transformers,
    zero_1,
    zero_2_counts_differ,
    zero_3_counts_differ,
    zero_groups_over_ranks,
    zero_3_traffic_as_planned,
    *groups_over_ranks.CASES,
]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Read by accelerate, transformers and DeepSpeed, which find the process group that is there: no port is opened.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", DS_ACCELERATOR="cpu")
    store, timeout = f"file://{folder}/store", datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timeout)
    for case in CASES:
        report_case(functools.partial(case, rank), case.__name__, rank, folder)
        dist.barrier()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    (path / "failure").write_text(run_ranks(worker, str(path), ranks=WORLD))
    return path


def test_all_ranks_end(folder: Path) -> None:
    assert (folder / "failure").read_text() == ""


@pytest.mark.parametrize("case", [c.__name__ for c in CASES])
def test_two_processes_step_as_one(case: str, folder: Path) -> None:
    check_reports(folder, case, range(WORLD))
