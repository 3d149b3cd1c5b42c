"""Cases of tests/test_ranks.py: groups whose responses, or responses whose tokens, lie on two ranks, against one
process that has everything. All of it is float64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from prompt_groups import groups_of
from tiny_models import make
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel

from groupdpo_kernels import (
    AdaBalance,
    Objective,
    PreferenceGroups,
    PreferenceLoss,
    SharedPromptForward,
    forward_parts,
    group_backward,
    preference_loss,
    seq_logps,
)
from groupdpo_kernels.data import collate
from groupdpo_kernels.trainers.online_groups import share

WORLD = 2
MPO = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)
RAGGED = [[[True, False], [False], [], [False, True]], [[False], [True, False, True], [True, False], []]]
RANKED = [[[True, True], [True]], [[False, False], [False]]]
PAIRS = [[[True], [], [True, False]], [[False], [False, True], []]]
ON_ONE_RANK = [[[True, False], [False, True, True]], [[], []]]


def offsets(lengths: Tensor) -> Tensor:
    return pad(lengths.cumsum(0), (1, 0))


class Rows:
    """Sequences of random log-probabilities, all of them and those of this rank, and their groups."""

    def __init__(self, lists: list[list[list[bool]]], rank: int) -> None:
        self.rank = rank
        self.groups = PreferenceGroups.from_lists(lists[rank], process_group=dist.group.WORLD)
        self.whole = PreferenceGroups.from_lists([[*a, *b] for a, b in zip(*lists)])
        for name in ("cu_groups", "positive"):
            assert torch.equal(getattr(self.groups.whole, name), getattr(self.whole, name))
        S, generator = self.whole.num_sequences, torch.Generator().manual_seed(1)
        self.lengths = torch.randint(1, 6, (S,), generator=generator)
        self.tokens = torch.randn(int(self.lengths.sum()), generator=generator, dtype=torch.float64) - 2
        self.ref = 4 * torch.randn(S, generator=generator, dtype=torch.float64) - 8
        self.own = self.groups.own

    def own_tokens(self, tokens: Tensor) -> Tensor:
        parts = tokens.split(self.lengths.tolist())
        return torch.cat([tokens[:0], *(parts[i] for i in self.own)])


def check(found: PreferenceLoss, expected: PreferenceLoss) -> None:
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def spread(scores: Tensor, groups: PreferenceGroups) -> Tensor:
    """A loss of the caller's own, of scores and groups."""
    sums = seq_logps(scores * torch.where(groups.positive, -1.0, 1.0), groups.cu_groups)
    return nn.functional.softplus(sums)


def one_loss_on_all_ranks(rank: int) -> None:
    """Values on every rank, and R times the gradient of a rank's own tokens; also for a rank that has no response."""
    cases: list[tuple[Any, Objective]] = [
        (RAGGED, MPO),
        (RAGGED, Objective("all_pairs", beta=0.5, balance=AdaBalance())),
        (RAGGED, Objective("softmax", balance=AdaBalance(space="reference"), nll_weight=0.5)),
        (RAGGED, Objective(spread, beta=0.3)),
        (ON_ONE_RANK, MPO),
        (RANKED, Objective("plackett_luce", beta=0.5)),
        (PAIRS, Objective("sigmoid", beta=0.5, balance=AdaBalance())),
        (PAIRS, Objective("orpo", beta=0.5)),
    ]
    for lists, objective in cases:
        rows = Rows(lists, rank)
        ref = rows.ref if objective.needs_reference else None
        tokens = rows.tokens.clone().requires_grad_()
        expected = preference_loss(tokens, offsets(rows.lengths), rows.whole, objective, ref)
        gradient = rows.own_tokens(torch.autograd.grad(expected.loss, tokens)[0])
        own = rows.own_tokens(rows.tokens).requires_grad_()
        mine = offsets(rows.lengths[rows.own])
        found = preference_loss(own, mine, rows.groups, objective, None if ref is None else ref[rows.own])
        check(found, expected)
        d_own = torch.autograd.grad(found.loss, own)[0]
        torch.testing.assert_close(d_own, WORLD * gradient, rtol=1e-12, atol=1e-12)
        assert torch.equal(rows.groups.gathered(rows.lengths[rows.own]), rows.lengths)


def weights_on_all_ranks(rank: int) -> None:
    """Weights of groups, the same on both ranks, and of the responses that each has: one process has all of them."""
    for lists, objective in ((RAGGED, MPO), (RAGGED, Objective("all_pairs", balance=AdaBalance(), policy_weight=True))):
        rows = Rows(lists, rank)
        of_groups = torch.tensor([0.3, 2.0, 1.1, 0.7])
        of_responses = torch.rand(rows.whole.num_sequences, generator=torch.Generator().manual_seed(2)) + 0.1
        sides = rows.whole.cu_groups, rows.whole.positive
        whole = PreferenceGroups(*sides, weights=of_groups, response_weights=of_responses)
        groups = PreferenceGroups(
            rows.groups.cu_groups, rows.groups.positive, weights=of_groups,
            response_weights=of_responses[rows.own], process_group=dist.group.WORLD,
        )  # fmt: skip
        assert torch.equal(groups.whole.weights, whole.weights)
        assert torch.equal(groups.whole.response_weights, whole.response_weights)
        tokens = rows.tokens.clone().requires_grad_()
        expected = preference_loss(tokens, offsets(rows.lengths), whole, objective, rows.ref)
        gradient = rows.own_tokens(torch.autograd.grad(expected.loss, tokens)[0])
        own = rows.own_tokens(rows.tokens).requires_grad_()
        found = preference_loss(own, offsets(rows.lengths[rows.own]), groups, objective, rows.ref[rows.own])
        check(found, expected)
        d_own = torch.autograd.grad(found.loss, own)[0]
        torch.testing.assert_close(d_own, WORLD * gradient, rtol=1e-12, atol=1e-12)
    sides = torch.tensor([0, 1]), torch.tensor([rank == 0])
    world: dict[str, Any] = {"process_group": dist.group.WORLD}
    with pytest.raises(ValueError, match=r"weights must be the same on every rank .* got 1.0 and 2.0 for group 0"):
        PreferenceGroups(*sides, weights=torch.tensor([1.0 + rank]), **world)
    with pytest.raises(ValueError, match="weights and response_weights must be given on every rank, or on none"):
        PreferenceGroups(*sides, weights=torch.ones(1) if rank else None, **world)
    with pytest.raises(ValueError, match="weights must be finite and at least 0" if rank else "another|has failed"):
        PreferenceGroups(*sides, weights=torch.tensor([-1.0 if rank else 1.0]), **world)
    with pytest.raises(ValueError, match="response_weights must not all be 0 on a side"):
        PreferenceGroups(*sides, response_weights=torch.tensor([float(rank)]), **world)
    with pytest.raises(ValueError, match="and weights must be the same on every rank of context_parallel_group"):
        one = torch.tensor([0, 2]), torch.tensor([True, False])
        PreferenceGroups(*one, weights=torch.tensor([1.0 + rank]), context_parallel_group=dist.group.WORLD)


# ------------------------------------------------------------------------------------------------------ group_backward


class Scorer(nn.Module):
    """Token ids (t,) -> log-probabilities (t,), each after the id in `before` (t,), by default of one sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(20, 6), nn.Linear(6, 20)
        self.double()

    def forward(self, ids: Tensor, before: Tensor | None = None) -> Tensor:
        logits = self.head(self.embedding(ids.roll(1) if before is None else before))
        return logits.log_softmax(-1).gather(-1, ids[:, None]).sum(1)


Sequences = list[tuple[Tensor, Tensor]]  # ids of a response, and which of its tokens are scored


def forward_of(model: nn.Module) -> Callable[[Sequences], tuple[Tensor, Tensor]]:
    def forward(sequences: Sequences) -> tuple[Tensor, Tensor]:
        logps = [model(ids)[live] for ids, live in sequences] or [model(torch.zeros(1, dtype=torch.long))[:0]]
        lengths = torch.tensor([int(live.sum()) for _, live in sequences], dtype=torch.long)
        return torch.cat(logps), offsets(lengths)

    return forward


def sequences_of(lengths: Tensor) -> Sequences:
    generator = torch.Generator().manual_seed(2)
    return [(torch.randint(20, (n,), generator=generator), torch.ones(n, dtype=torch.bool)) for n in lengths.tolist()]


def on_cpu(model: nn.Module) -> nn.Module:
    """FSDP2."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))


def averaged(model: nn.Module) -> dict[str, Tensor]:
    """The mean over ranks of the gradients, taken away from the model."""
    found = {}
    for name, p in model.named_parameters():
        gradient: Any = torch.zeros_like(p) if p.grad is None else p.grad
        if isinstance(model, FSDPModule):
            gradient = gradient.full_tensor()
        elif not isinstance(model, DistributedDataParallel):
            dist.all_reduce(gradient)
            gradient /= WORLD
        found[name.removeprefix("module.")] = gradient
    model.zero_grad(set_to_none=True)
    return found


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-12) -> None:
    largest = max(float(x.abs().max()) for x in expected.values())
    assert largest > 1e-3 and found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=rtol * largest)


def of_one_process(
    sequences: Sequences, rows: Any, objective: Objective, scale: float = 1.0
) -> tuple[PreferenceLoss, dict[str, Tensor]]:
    model = Scorer()
    expected = preference_loss(*forward_of(model)(sequences), rows.whole, objective, rows.ref)
    (scale * expected.loss).backward()
    return expected, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def one_step_on_all_ranks(rank: int) -> None:
    """Gradients averaged over ranks, by a wrapper or without one; micro-batches differ in number, and in one case the
    second rank has no response at all."""
    for lists, objective in ((RAGGED, MPO), (ON_ONE_RANK, MPO), (RANKED, Objective("plackett_luce", beta=1.0))):
        rows = Rows(lists, rank)
        sequences = sequences_of(rows.lengths)
        expected, gradients = of_one_process(sequences, rows, objective, 0.5)
        own = [sequences[i] for i in rows.own]
        size = 2 + rank
        batches = [own[i : i + size] for i in range(0, len(own), size)] or [[]]
        for strategy, wrap in (
            ("two_pass", None),
            ("one_pass", None),
            ("two_pass", DistributedDataParallel),
            ("one_pass", DistributedDataParallel),
            ("two_pass", on_cpu),
        ):
            model: Any = Scorer() if wrap is None else wrap(Scorer())
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                found = group_backward(
                    batches,
                    forward_of(model),
                    rows.groups,
                    objective,
                    rows.ref[rows.own],
                    strategy=strategy,
                    scale=0.5,
                )
            check(found, PreferenceLoss(*(x.detach() for x in expected)))
            same_gradients(averaged(model), gradients)


def one_prompt_on_all_ranks(rank: int) -> None:
    """Each rank runs the prompts of its own responses once."""
    groups = groups_of((9, [5, 3, 7, 2, 4]), (1, [2, 2]), (12, [1, 3]))
    whole = collate(groups)
    single = make("gpt2", num_hidden_layers=1).double()
    S = whole.groups.num_sequences
    ref = -20 * torch.rand(S, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    logps, cu_seqlens, _ = forward_parts(whole.parts, SharedPromptForward(single))
    expected = preference_loss(logps, cu_seqlens, whole.groups, MPO, ref)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in single.named_parameters() if p.grad is not None}
    single.zero_grad()
    parts = share(groups, rank, WORLD)
    of = PreferenceGroups.from_lists([part.positive for part in parts], process_group=dist.group.WORLD)
    some = [part for part in parts if part.responses]
    step = collate(some, max_sequences=2, share_prompt=True, of=of)
    with pytest.raises(ValueError, match="sort must be False where `of` says"):
        collate(some, sort=True, of=of)
    with pytest.raises(ValueError, match=r"of must have the sides of these sequences, \[.*\]; got"):
        collate([*some, some[0]], of=of)
    for strategy in ("two_pass", "one_pass"):
        model = DistributedDataParallel(copy.deepcopy(single))
        found = group_backward(
            step.parts, SharedPromptForward(model), of, MPO, ref[of.own], strategy=strategy, model=model
        )
        torch.testing.assert_close(found.loss, expected.loss.detach(), rtol=1e-10, atol=0)
        same_gradients(averaged(model), gradients, 1e-9)


# ------------------------------------------------------------------------------------- tokens of a response over ranks


def tokens_on_all_ranks(rank: int) -> None:
    """Rank 0 has the first tokens of each response, and all of some; group_backward with each rank's half scored."""
    world = dist.group.WORLD
    rows = Rows(RAGGED, rank)
    groups = PreferenceGroups.from_lists([[*a, *b] for a, b in zip(*RAGGED)], context_parallel_group=world)
    sequences = sequences_of(rows.lengths)
    cuts = torch.where(torch.arange(len(sequences)) % 3 == 0, rows.lengths, rows.lengths // 2)
    own = [
        (ids, torch.arange(len(ids)) < cut if rank == 0 else torch.arange(len(ids)) >= cut)
        for (ids, _), cut in zip(sequences, cuts.tolist())
    ]
    live = torch.cat([part for _, part in own])
    mine = offsets(torch.tensor([int(part.sum()) for _, part in own]))
    assert rank == 0 or (mine.diff() == 0).any()
    sums = seq_logps(rows.tokens, offsets(rows.lengths))
    tokens = rows.tokens[live].requires_grad_()
    found = seq_logps(tokens, mine, process_group=world)
    torch.testing.assert_close(found, sums, rtol=1e-13, atol=1e-13)
    weights = torch.arange(1.0, len(sums) + 1, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * found).sum(), tokens)
    assert torch.equal(gradient, WORLD * weights.repeat_interleave(mine.diff()))
    assert seq_logps(tokens.float(), mine.int(), process_group=world).dtype == torch.float32

    alone = [dist.new_group([r]) for r in range(WORLD)][rank]
    both = PreferenceGroups.from_lists(RAGGED[rank], process_group=world, context_parallel_group=alone)
    for objective in (
        MPO,
        Objective("all_pairs", beta=0.5, balance=AdaBalance()),
        Objective("softmax", balance=AdaBalance(space="reference"), nll_weight=0.5),
    ):
        whole = rows.tokens.clone().requires_grad_()
        expected = preference_loss(whole, offsets(rows.lengths), rows.whole, objective, rows.ref)
        (gradient,) = torch.autograd.grad(expected.loss, whole)
        result = preference_loss(tokens, mine, groups, objective, rows.ref)
        check(result, expected)
        d_tokens = torch.autograd.grad(result.loss, tokens)[0]
        torch.testing.assert_close(d_tokens, WORLD * gradient[live], rtol=1e-12, atol=1e-12)
        # Responses over all ranks, and tokens of each over a group of its own, of one rank here.
        ours = offsets(rows.lengths[rows.own])
        check(preference_loss(rows.own_tokens(whole), ours, both, objective, rows.ref[rows.own]), expected)

        expected, gradients = of_one_process(sequences, rows, objective)
        for strategy in ("two_pass", "one_pass"):
            model = Scorer()
            batches = [own[:2], own[2:3], own[3:]]
            step = group_backward(batches, forward_of(model), groups, objective, rows.ref, strategy=strategy)
            check(step, PreferenceLoss(*(x.detach() for x in expected)))
            same_gradients(averaged(model), gradients)


# ----------------------------------------------------------------------------------------------------- errors, in words


def wrong_on_one_rank(rank: int) -> None:
    """An error, here on rank 1, is one on all ranks, and the next call works."""
    world, first = dist.group.WORLD, rank == 0

    def raises(message: str, elsewhere: str = "has failed; its error says why") -> Any:
        return pytest.raises((ValueError, TypeError, RuntimeError), match=elsewhere if first else message)

    def everywhere(message: str) -> Any:
        return raises(message, message)

    sides = torch.tensor([True, False])
    cu = torch.tensor([0, 2])
    spanning: dict[str, Any] = {"process_group": world}
    with raises("positive must be bool"):
        PreferenceGroups(cu, sides if first else sides.int(), **spanning)
    with raises("cu_groups must start at 0 and end at S = 2"):
        PreferenceGroups(cu if first else cu + 1, sides, **spanning)
    with everywhere("cu_groups must have as many groups on every rank; got 1, 2"):
        PreferenceGroups(cu if first else torch.tensor([0, 1, 2]), sides, **spanning)
    with everywhere(r"must have a positive and a negative; group 1 \(sequences 3:5\) has no negative"):
        PreferenceGroups.from_lists([[True, False], [True]] if first else [[True], [True]], **spanning)
    with everywhere("cu_groups and positive must be the same on every rank of context_parallel_group"):
        PreferenceGroups(cu, sides if first else ~sides, context_parallel_group=world)
    with pytest.raises(TypeError, match=r"process_group must be a torch.distributed .* or None; got int"):
        PreferenceGroups(cu, sides, process_group=3)
    other = [dist.new_group([r]) for r in range(WORLD)][1 - rank]
    with pytest.raises(ValueError, match="context_parallel_group must be a process group that this rank belongs to"):
        PreferenceGroups(cu, sides, context_parallel_group=other)

    logps, starts, ref = torch.full((4,), -1.0), torch.tensor([0, 2, 4]), torch.zeros(2)
    groups = PreferenceGroups(cu, sides, **spanning)
    split = PreferenceGroups(cu, sides, context_parallel_group=world)
    with raises(r"values must be \(S,\) = \(2,\)"):
        groups.gathered(ref if first else logps)
    for of, wrong in ((groups, torch.zeros(3)), (split, torch.zeros(3)), (groups, torch.full((2,), torch.nan))):
        with raises("ref_logps must be"):
            preference_loss(logps, starts, of, MPO, ref if first else wrong)
    with raises(r"ref_logps must be \(S,\) = \(2,\), sums over whole sequences"):
        preference_loss(logps, starts, split, MPO, ref if first else logps)
    with everywhere("ref_logps must be the same on every rank .* those of sequence 1 differ"):
        preference_loss(logps, starts, split, MPO, ref + torch.tensor([0.0, rank]))
    with everywhere("objective, and whether ref_logps is given, must be the same on every rank"):
        preference_loss(logps, starts, groups, Objective("mpo", beta=1.0 + rank), ref)
    with everywhere("cu_seqlens must give each sequence a token on some rank; sequence 0 has none"):
        preference_loss(logps, torch.tensor([0, 0, 4]), split, MPO, ref)
    with raises("cu_seqlens must give each sequence a token"):
        preference_loss(logps, starts if first else torch.tensor([0, 0, 4]), groups, MPO, ref)
    with raises("impl must be 'auto' or 'reference' for groups that span ranks; got 'triton'"):
        preference_loss(logps, starts, groups, MPO, ref, impl="auto" if first else "triton")
    with everywhere("groups must be pairs for loss 'sigmoid', .* got 4 sequences in 1 groups"):
        preference_loss(logps, starts, groups, Objective("sigmoid"), ref)
    with everywhere("positives must come first"):
        preference_loss(logps, starts, groups, Objective("plackett_luce"), ref)
    with raises("cu_seqlens must start at 0 and end at"):
        seq_logps(logps, starts if first else starts + 1, process_group=world)
    with everywhere("cu_seqlens must have as many sequences on every rank of process_group; got 2, 1"):
        seq_logps(logps, starts if first else torch.tensor([0, 4]), process_group=world)

    sequences = sequences_of(torch.tensor([3, 4]))
    model = Scorer()
    calls: list[int] = []

    def failing(at: int, change: float | None = None) -> Callable[[Sequences], tuple[Tensor, Tensor]]:
        calls.clear()

        def forward(part: Sequences) -> tuple[Tensor, Tensor]:
            calls.append(0)
            values, cu_seqlens = forward_of(model)(part)
            if first or len(calls) != at:
                return values, cu_seqlens
            if change is None:
                raise RuntimeError("out of memory")
            return values + change, cu_seqlens

        return forward

    batches = [sequences[:1], sequences[1:]]
    for strategy, at in (("two_pass", 2), ("one_pass", 1)):
        with raises("out of memory", "before any gradient is written, because it has failed on another"):
            group_backward(batches, failing(at), groups, MPO, ref, strategy=strategy)
        assert all(p.grad is None for p in model.parameters())
    with raises("micro_batches must hold the 2 sequences of groups", "it has failed on another rank"):
        group_backward(batches if first else batches[:1], failing(0), groups, MPO, ref)
    with raises("ref_logps must be"):
        group_backward(batches, failing(0), groups, MPO, ref if first else ref[:1])
    with raises("scale must be a number", "it has failed on another rank"):
        group_backward(batches, failing(0), groups, MPO, ref, scale=1.0 if first else torch.ones(2))
    with raises("out of memory", "pass 2 of group_backward has failed on another rank"):
        group_backward(batches, failing(3), groups, MPO, ref)
    with pytest.warns(UserWarning, match="pass 2 does not repeat pass 1: a log-probability differs by 4e"):
        group_backward(batches, failing(4, 1.0), groups, MPO, ref)
    like = Objective("mpo", beta=1 if first else 1.0)
    assert torch.isfinite(preference_loss(logps, starts, groups, like, ref).loss)

    # A wrapper that only forward knows: of these ranks, and of this rank alone.
    own = [dist.new_group([r]) for r in range(WORLD)][rank]
    for ranks_of_wrapper in (world, own):
        wrapper = DistributedDataParallel(Scorer(), process_group=ranks_of_wrapper)

        def before_it_is_called(part: Sequences, called: nn.Module = wrapper) -> tuple[Tensor, Tensor]:
            if not first:
                raise RuntimeError("out of memory")
            return forward_of(called)(part)

        for _ in range(2):  # the ranks are still in step
            with raises("out of memory", "before any gradient is written, because it has failed on another"):
                group_backward(batches, before_it_is_called, groups, MPO, ref)
        assert group_backward(batches, forward_of(wrapper), groups, MPO, ref).loss > 0


CASES: list[Callable[[int], None]] = [
    one_loss_on_all_ranks,
    weights_on_all_ranks,
    one_step_on_all_ranks,
    one_prompt_on_all_ranks,
    tokens_on_all_ranks,
    wrong_on_one_rank,
]
