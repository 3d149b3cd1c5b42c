"""A vocabulary split over two real processes gives the values and gradients of the whole one."""

import dataclasses
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from groupdpo_kernels import LogpStats, linear_logp_stats, linear_logps
from groupdpo_kernels.testing import CASES, check_budget, make_inputs, run

OUTPUTS = ("lse", "entropy", "mean_logits", "log_sum_sq_probs")
NAMES = ("everything", "everything_bf16", "negative", "batched", "all_ignored")
NAMES += ("offset_1e4", "offset_1e6", "offset_unlikely", "column_1e6")
SHARDED = [case for case in CASES if case.name in NAMES]


def _worker(rank, world, store, names):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    group = dist.group.WORLD
    for case in CASES:
        if case.name not in names:
            continue
        inputs = make_inputs(case)
        # Uneven shards; the target of the last row lives on the last one.
        cut = case.V // 3
        span = slice(0, cut) if rank == 0 else slice(cut, case.V)

        def sharded(hidden, weight, targets, bias, low_rank, options, span=span):
            pair = None if low_rank is None else (low_rank[0], low_rank[1][span])
            bias = None if bias is None else bias[span]
            head = dataclasses.asdict(options)
            return linear_logp_stats(
                hidden, weight[span], targets, bias, low_rank=pair, outputs=OUTPUTS, process_group=group, **head
            )

        result = run(sharded, inputs, case.options)
        # Gradients in the head's rows are this rank's: their sum is the whole.
        for name in ("d_weight", "d_bias", "d_low_rank_weight"):
            if name in result:
                whole = result[name].float()
                dist.all_reduce(whole)
                result[name] = whole.to(result[name].dtype)
        check_budget(result, inputs, case.options)

    hidden, weight = torch.randn(4, 8), torch.randn(5, 8)
    with pytest.raises(ValueError, match=r"targets must be in \[0, V = 10\).*got 10"):
        linear_logps(hidden, weight, torch.tensor([0, 9, 10, 1]), process_group=group)
    # 3 is an id of every shard and must not be mistaken for the caller's ignore_index, nor the other way round.
    dist.broadcast(hidden, 0)
    logps = linear_logps(hidden, weight, torch.tensor([3, 8, 3, 1]), process_group=group, ignore_index=3)
    assert (logps[[0, 2]] == 0).all() and (logps[[1, 3]] < 0).all()
    with pytest.raises(ValueError, match="is_top1"):
        linear_logp_stats(hidden, weight, torch.zeros(4, dtype=torch.long), outputs=("is_top1",), process_group=group)
    dist.destroy_process_group()


def test_two_shards_equal_one_vocabulary():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (2, os.path.join(folder, "store"), NAMES), nprocs=2)


def test_a_group_of_one_is_the_whole(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        inputs = make_inputs(SHARDED[0])
        stats: LogpStats = linear_logp_stats(
            inputs.hidden, inputs.weight, inputs.targets, process_group=dist.group.WORLD
        )
        whole = linear_logp_stats(inputs.hidden, inputs.weight, inputs.targets)
        torch.testing.assert_close(stats.token_logps, whole.token_logps)
        torch.testing.assert_close(stats.entropy, whole.entropy)
    finally:
        dist.destroy_process_group()
