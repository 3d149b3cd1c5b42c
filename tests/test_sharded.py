"""A vocabulary split over two real processes gives the values and gradients of the whole one."""

import dataclasses
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks

from groupdpo_kernels import LogpStats, linear_logp_stats, linear_logps
from groupdpo_kernels.testing import CASES, check_budget, make_inputs, run

OUTPUTS = ("lse", "entropy", "mean_logits", "log_sum_sq_probs")
NAMES = ("everything", "everything_bf16", "negative", "batched", "all_ignored")
NAMES += ("entropy_everything", "entropy_everything_bf16", "entropy_one_hot", "entropy_column")
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
        # What is no shard's own has the same bits on every rank, so that replicated layers stay replicas.
        for name in sorted(result.keys() - {"d_weight", "d_bias", "d_low_rank_weight"}):
            ours = [torch.empty_like(result[name]) for _ in range(world)]
            dist.all_gather(ours, result[name].contiguous())
            assert all(torch.equal(x, ours[0]) for x in ours), (case.name, name)
    _targets_of_one_rank(rank, group)

    hidden, weight = torch.randn(4, 8), torch.randn(5, 8)
    with pytest.raises(ValueError, match=r"targets must be in \[0, V = 10\).*got 10"):
        linear_logps(hidden, weight, torch.tensor([0, 9, 10, 1]), process_group=group)
    # 3 is an id of every shard and must not be mistaken for the caller's ignore_index, nor the other way round.
    dist.broadcast(hidden, 0)
    logps = linear_logps(hidden, weight, torch.tensor([3, 8, 3, 1]), process_group=group, ignore_index=3)
    assert (logps[[0, 2]] == 0).all() and (logps[[1, 3]] < 0).all()
    with pytest.raises(ValueError, match="is_top1"):
        linear_logp_stats(hidden, weight, torch.zeros(4, dtype=torch.long), outputs=("is_top1",), process_group=group)


def _targets_of_one_rank(rank, group):
    """The targets all lie in the shard of one rank, or none is there at all. Both ranks reach the end of forward and
    backward, and what they have together is to the last digits what one process has alone."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 16, generator=generator), torch.randn(40, 16, generator=generator) / 4
    upstream = torch.linspace(-1, 1, 6)
    span = slice(0, 20) if rank == 0 else slice(20, 40)
    for targets in (torch.arange(6), torch.arange(34, 40), torch.full((6,), -100)):
        found = []
        for rows, process_group in ((slice(None), None), (span, group)):
            h, w = hidden.clone().requires_grad_(), weight[rows].clone().requires_grad_()
            logps = linear_logps(h, w, targets, process_group=process_group)
            (logps * upstream).sum().backward()
            found.append((logps.detach(), h.grad, w.grad))
        (logps, d_hidden, d_weight), (shared, d_shared, d_span) = found
        torch.testing.assert_close(shared, logps, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(d_shared, d_hidden, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(d_span, d_weight[span], rtol=1e-5, atol=1e-6)


def test_two_shards_equal_one_vocabulary():
    with tempfile.TemporaryDirectory() as folder:
        assert not (failure := run_ranks(_worker, 2, os.path.join(folder, "store"), NAMES)), failure


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
