"""Groups and what is derived from them; group_backward's edges: bad calls, drift, random state, data parallelism."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_ranks
from torch import Tensor, nn

from groupdpo_kernels import Objective, PreferenceGroups, group_backward, preference_loss

MPO = Objective("mpo", beta=3.0, average=True, nll_weight=1.0)


# ----------------------------------------------------------------------------------------------------- PreferenceGroups


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.lists(st.booleans(), min_size=2, max_size=6).filter(lambda x: any(x) and not all(x)), min_size=1, max_size=6
    )
)
def test_what_groups_derive(lists: list[list[bool]]) -> None:
    groups = PreferenceGroups.from_lists(lists)
    ids = [g for g, group in enumerate(lists) for _ in group]
    positive = [x for group in lists for x in group]
    assert groups.ids.tolist() == ids and groups.positive.tolist() == positive and groups.valid
    assert (groups.num_groups, groups.num_sequences) == (len(lists), len(ids))
    S = range(len(ids))
    pairs = [(i, j) for i in S for j in S if ids[i] == ids[j] and positive[i] and not positive[j]]
    assert list(zip(*(x.tolist() for x in groups.pair_indices(every=True)))) == pairs
    assert groups.num_pairs == len(pairs)
    offsets = groups.pair_offsets().tolist()
    assert [offsets[b] - offsets[a] for a, b in itertools.pairwise(range(len(lists) + 1))] == [
        sum(ids[i] == g for i, _ in pairs) for g in range(len(lists))
    ]
    assert bool(groups.positives_first()) == all(group == sorted(group, reverse=True) for group in lists)
    if all(len(group) == 2 for group in lists):
        assert list(zip(*(x.tolist() for x in groups.pair_indices(every=False)))) == pairs


def test_pairs() -> None:
    groups = PreferenceGroups.pairs(2, device="cpu")
    assert groups.cu_groups.tolist() == [0, 2, 4] and groups.positive.tolist() == [True, False, True, False]
    assert groups.to("meta").ids.device.type == "meta"


@pytest.mark.parametrize(
    ("cu_groups", "positive", "message"),
    [
        ([0, 2, 5], [1, 0, 1, 1, 1], r"group 1 \(sequences 2:5\) has no negative"),
        ([0, 2, 4], [0, 0, 1, 0], r"group 0 \(sequences 0:2\) has no positive"),
        ([0, 2, 2], [0, 1], r"group 1 \(sequences 2:2\) has no positive"),
        ([0, 4, 2, 5], [1, 0, 1, 0, 1], "cu_groups must not decrease; group 1 starts at 4 and ends at 2"),
        ([0, 4], [1, 0, 1], "cu_groups must start at 0 and end at S = 3; got 0 and 4"),
        ([0], [], r"cu_groups must be .* at least one group; got \(1,\)"),
    ],
)
def test_bad_groups(cu_groups: list, positive: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceGroups(torch.tensor(cu_groups), torch.tensor(positive, dtype=torch.bool))


def test_bad_group_types() -> None:
    with pytest.raises(ValueError, match=r"positive must be bool and \(S,\); got \(2,\) torch.int64"):
        PreferenceGroups(torch.tensor([0, 2]), torch.tensor([1, 0]))
    with pytest.raises(TypeError, match="cu_groups must be an integer tensor; got torch"):
        PreferenceGroups(torch.tensor([0.0, 2.0]), torch.tensor([True, False]))
    with pytest.raises(TypeError, match="positive must be a tensor; got list"):
        PreferenceGroups(torch.tensor([0, 2]), [True, False])
    with pytest.raises(ValueError, match="n must be at least 1; got 0"):
        PreferenceGroups.pairs(0)


# ------------------------------------------------------------------------------------------------- what cannot be exact


def toy() -> tuple[nn.Parameter, list[Tensor], PreferenceGroups, Callable]:
    """One parameter a token, micro-batches of indices; quick."""
    table = nn.Parameter(-torch.rand(20, dtype=torch.float64))
    batches = [torch.arange(0, 8), torch.arange(8, 20)]

    def forward(tokens: Tensor) -> tuple[Tensor, Tensor]:
        return table[tokens], torch.arange(0, len(tokens) + 1, 4)

    return table, batches, PreferenceGroups.from_lists([[True, False, False, False, True]]), forward


def test_hidden_randomness_is_reported_once_with_its_size() -> None:
    _, batches, groups, forward = toy()
    generator = torch.Generator().manual_seed(0)

    def noisy(tokens: Tensor) -> tuple[Tensor, Tensor]:
        token_logps, cu_seqlens = forward(tokens)
        return token_logps + 0.1 * torch.randn(len(tokens), generator=generator, dtype=torch.float64), cu_seqlens

    with pytest.warns(UserWarning, match=r"pass 2 does not repeat pass 1: .* differs by [1-9]e-01") as caught:
        group_backward(batches, noisy, groups, MPO, torch.zeros(5))
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():  # by one_pass there is nothing to repeat
        warnings.simplefilter("error")
        group_backward(batches, noisy, groups, MPO, torch.zeros(5), strategy="one_pass")


def test_changed_parameters_are_reported() -> None:
    table, batches, groups, forward = toy()
    calls = itertools.count()

    def stepping(tokens: Tensor) -> tuple[Tensor, Tensor]:
        if next(calls) == 2:
            with torch.no_grad():
                table.mul_(1.1)
        return forward(tokens)

    with pytest.warns(UserWarning, match="pass 2 does not repeat pass 1"):
        group_backward(batches, stepping, groups, MPO, torch.zeros(5))


@pytest.mark.parametrize("strategy", ["two_pass", "one_pass"])
def test_a_loss_that_is_not_finite_is_not_hidden(strategy: str) -> None:
    table, batches, groups, forward = toy()
    with torch.no_grad():
        table[5] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = group_backward(batches, forward, groups, MPO, torch.zeros(5), strategy=strategy)
    assert result.loss.isnan() and table.grad.isnan().all()


def test_the_random_state_survives_an_error() -> None:
    _, batches, groups, forward = toy()
    calls = itertools.count()

    def failing(tokens: Tensor) -> tuple[Tensor, Tensor]:
        torch.rand(3)
        if next(calls) == 3:
            raise KeyError("out of memory, say")
        return forward(tokens)

    torch.manual_seed(0)
    with pytest.raises(KeyError):
        group_backward(batches, failing, groups, MPO, torch.zeros(5))
    found = torch.rand(1)
    torch.manual_seed(0)
    torch.rand(3), torch.rand(3)
    assert found == torch.rand(1)


def bad_call(change: dict[str, Any]) -> None:
    _, batches, groups, forward = toy()
    arguments = {
        "micro_batches": batches,
        "forward": forward,
        "groups": groups,
        "objective": MPO,
        "ref_logps": torch.zeros(5),
    }
    group_backward(**{**arguments, **change})


class Shrinking:
    """Gives one micro-batch less each time."""

    def __init__(self, step: int) -> None:
        self.n, self.step, self.batches = 2, step, [torch.arange(0, 8), torch.arange(8, 20), torch.arange(0, 4)]

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.batches[: self.n]
        self.n += self.step


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batches": iter([torch.arange(20)])}, "micro_batches must be .* iterated twice; got a list_iterator"),
        ({"micro_batches": (x for x in [torch.arange(20)])}, "iterated twice; got a generator"),
        ({"micro_batches": [torch.arange(12)]}, "micro_batches must hold the 5 sequences of groups; these 1 hold 3"),
        ({"micro_batches": []}, "micro_batches must hold the 5 sequences of groups; these 0 hold 0"),
        ({"micro_batches": Shrinking(-1)}, "the same micro-batches when iterated again; there were 2, and then 1"),
        ({"micro_batches": Shrinking(1)}, "the same micro-batches when iterated again; there were 2, and then more"),
        ({"strategy": "three_pass"}, "strategy must be one of two_pass, one_pass; got 'three_pass'"),
        ({"scale": torch.ones(2)}, r"scale must be a number or a tensor of one; got shape \(2,\)"),
        ({"forward": lambda x: torch.ones(4)}, r"forward\(micro_batches\[0\]\) must be .*; got Tensor"),
        ({"forward": lambda x: (1, 2, 3, 4)}, "or those and an auxiliary loss; got 4 items"),
        ({"forward": lambda x: (torch.ones(4, 2), x)}, r"token_logps must be .*; got \(4, 2\)"),
        ({"forward": lambda x: (torch.ones(4), torch.tensor([0, 5]))}, "cu_seqlens must .* end at .* 4; got 0 and 5"),
        ({"forward": lambda x: (torch.ones(4), torch.tensor([0, 4]), torch.ones(2))}, "must be a scalar; got shape"),
        ({"forward": lambda x: (-torch.ones(len(x)), torch.arange(0, len(x) + 1, 4))}, "must .*require grad"),
        ({"parameters": [torch.ones(2)]}, "parameters must be leaves, at least one of which requires grad"),
        ({"ref_logps": torch.zeros(6)}, r"ref_logps must be .*got \(6,\)"),
        ({"strategy": "one_pass", "gradient_bytes": 5 * 20 * 8 - 1}, "5 gradients of 160 bytes, more than .* = 799"),
    ],
)  # fmt: skip
def test_bad_calls(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        bad_call(change)


def test_one_pass_refuses_hooks_that_would_run_twice() -> None:
    table, batches, groups, forward = toy()
    table.register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(ValueError, match="register_hook"):
        group_backward(batches, forward, groups, MPO, torch.zeros(5), strategy="one_pass")


def test_groups_are_preference_groups() -> None:
    _, batches, _, forward = toy()
    with pytest.raises(TypeError, match="groups must be PreferenceGroups; got list"):
        group_backward(batches, forward, [[True, False]], MPO, torch.zeros(5))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="groups must be PreferenceGroups; got NoneType"):
        preference_loss(torch.zeros(2), torch.arange(3), None, MPO, torch.zeros(2))  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- data parallel


def data_parallel_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for strategy in ("two_pass", "one_pass"):
        network = make_network()
        ddp = nn.parallel.DistributedDataParallel(network, bucket_cap_mb=100)
        reductions = []

        def reduce(
            state: object, bucket: torch.distributed.GradBucket, reductions: list = reductions
        ) -> torch.futures.Future[torch.Tensor]:
            reductions.append(bucket.index())
            future = torch.distributed.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
            return future.then(lambda f: f.value()[0])

        ddp.register_comm_hook(None, reduce)
        batches = data_of(rank)  # other data on each rank, and another number of micro-batches
        group_backward(batches, forward_of(ddp), FIVE, MPO, torch.zeros(5), strategy=strategy, no_sync=ddp.no_sync)
        torch.save((len(reductions), [p.grad for p in network.parameters()]), f"{folder}/{strategy}.{rank}")


FIVE = PreferenceGroups.from_lists([[True, False, False, False, True]])


def make_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1), nn.LogSigmoid()).double()


def data_of(rank: int) -> list[Tensor]:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    return list(x.split([8, 12] if rank else [4, 8, 8]))


def forward_of(network: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda x: (network(x)[:, 0], torch.arange(0, len(x) + 1, 4))


def test_data_parallel_synchronises_once(tmp_path: Any) -> None:
    assert not (failure := run_ranks(data_parallel_rank, str(tmp_path))), failure
    network = make_network()
    for rank in range(2):
        token_logps, cu_seqlens = forward_of(network)(torch.cat(data_of(rank)))
        (0.5 * preference_loss(token_logps, cu_seqlens, FIVE, MPO, torch.zeros(5)).loss).backward()
    for strategy, rank in itertools.product(("two_pass", "one_pass"), range(2)):
        reductions, gradients = torch.load(tmp_path / f"{strategy}.{rank}")
        assert reductions == 1
        for gradient, p in zip(gradients, network.parameters()):
            torch.testing.assert_close(gradient, p.grad, rtol=1e-10, atol=1e-13)
