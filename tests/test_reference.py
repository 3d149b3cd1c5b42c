"""The specification against closed forms, torch.distributions, naive eager code and finite differences; and its blocked
form, which impl="reference" runs, against autograd of the specification."""

from __future__ import annotations

import itertools
import math
from dataclasses import astuple, replace
from operator import mul

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from groupdpo_kernels import reference
from groupdpo_kernels.reference import HeadOptions, LogpStats
from groupdpo_kernels.testing import Case, Inputs, make_inputs

OPTIONS = {
    "plain": HeadOptions(),
    "scale": HeadOptions(logit_scale=-0.7),
    "softcap": HeadOptions(softcap=2.0),
    "temperature": HeadOptions(temperature=0.3),
    "everything": HeadOptions(logit_scale=1.3, softcap=2.0, temperature=0.6),
}


def small(T: int = 6, D: int = 5, V: int = 9, R: int = 3, **changes: object) -> Inputs:
    return make_inputs(replace(Case("small", T, D, V, "", torch.float64, bias=True, R=R), **changes))  # type: ignore[arg-type]


def naive_logits(inputs: Inputs, options: HeadOptions) -> Tensor:
    """One Python loop an entry: nothing shared with the code under test."""
    hidden, weight, bias, x, b = (leaf.tolist() for leaf in inputs.leaves.values())
    out = torch.empty(len(hidden), len(weight), dtype=torch.float64)
    for t, v in itertools.product(range(len(hidden)), range(len(weight))):
        z = bias[v] + sum(map(mul, hidden[t], weight[v])) + sum(map(mul, x[t], b[v]))
        z *= options.logit_scale
        if options.softcap is not None:
            z = options.softcap * math.tanh(z / options.softcap)
        out[t, v] = z / options.temperature
    return out


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_against_naive(options: HeadOptions) -> None:
    inputs = small()
    z = naive_logits(inputs, options)
    p = Categorical(logits=z)
    live = inputs.targets != -100
    stats = reference.linear_logp_stats(
        inputs.hidden, inputs.weight, inputs.targets, inputs.bias, inputs.low_rank, options
    )
    expected = LogpStats(
        p.log_prob(inputs.targets.clamp(min=0)),
        z.exp().sum(1).log(),
        p.entropy(),
        z.mean(1),
        p.probs.square().sum(1).log(),
        z.argmax(1) == inputs.targets,
    )
    for field, actual, wanted in zip(LogpStats._fields, stats, expected):
        assert actual is not None and wanted is not None
        torch.testing.assert_close(
            actual, torch.where(live, wanted, 0).to(wanted.dtype), msg=lambda m, f=field: f"{f}: {m}"
        )
    logits = reference.logits(inputs.hidden, inputs.weight, inputs.bias, inputs.low_rank, options)
    torch.testing.assert_close(logits, z)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options: HeadOptions) -> None:
    """Finite differences in every input, of token_logps and of lse."""
    inputs = small(T=4, D=3, V=5, R=2)

    def both(hidden: Tensor, weight: Tensor, bias: Tensor, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        stats = reference.linear_logp_stats(hidden, weight, inputs.targets, bias, (x, b), options)
        assert stats.lse is not None
        return stats.token_logps, stats.lse

    assert torch.autograd.gradcheck(both, list(inputs.leaves.values()))


def test_closed_form_gradient() -> None:
    """d token_logp / d logits is 1[v = y] - p, and of lse it is p: written out with no autograd at all."""
    inputs = small(R=0, ignored="none")
    assert inputs.bias is not None
    p = torch.softmax(naive_logits_without_low_rank(inputs), 1)
    one_hot = torch.nn.functional.one_hot(inputs.targets, p.shape[1])
    d = inputs.d_token_logps[:, None] * (one_hot - p) + inputs.d_lse[:, None] * p
    stats = reference.linear_logp_stats(inputs.hidden, inputs.weight, inputs.targets, inputs.bias)
    assert stats.lse is not None
    loss = (stats.token_logps * inputs.d_token_logps + stats.lse * inputs.d_lse).sum()
    g = torch.autograd.grad(loss, (inputs.hidden, inputs.weight, inputs.bias))
    for actual, expected in zip(g, (d @ inputs.weight, d.T @ inputs.hidden, d.sum(0))):
        torch.testing.assert_close(actual, expected)


def naive_logits_without_low_rank(inputs: Inputs) -> Tensor:
    return inputs.hidden.detach() @ inputs.weight.detach().T + inputs.bias.detach()  # type: ignore[union-attr]


def test_known_numbers() -> None:
    """Rows that a person can check: uniform, one certain token, a vocabulary of one."""
    V = 8
    hidden, weight = torch.zeros(1, 2, dtype=torch.float64), torch.randn(V, 2, dtype=torch.float64)
    uniform = reference.linear_logp_stats(hidden, weight, torch.tensor([0]))
    log_v = torch.tensor([math.log(V)], dtype=torch.float64)
    for field, wanted in {"token_logps": -log_v, "lse": log_v, "entropy": log_v, "mean_logits": 0 * log_v}.items():
        torch.testing.assert_close(getattr(uniform, field), wanted)
    torch.testing.assert_close(uniform.log_sum_sq_probs, -log_v)
    assert uniform.is_top1 is not None and uniform.is_top1.item()

    certain = reference.linear_logp_stats(torch.ones(1, 1), torch.tensor([[1000.0], [0.0], [0.0]]), torch.tensor([0]))
    assert [None if x is None else x.item() for x in certain] == [0, 1000, 0, pytest.approx(1000 / 3), 0, True]
    single = reference.linear_logps(torch.randn(3, 2), torch.randn(1, 2), torch.tensor([0, 0, -100]))
    assert single.tolist() == [0, 0, 0]


def test_all_rows_ignored_and_none() -> None:
    for T in (0, 5):
        inputs = make_inputs(Case("all", T, 4, 7, "", torch.float64, bias=True, ignored="all"))
        stats = reference.linear_logp_stats(inputs.hidden, inputs.weight, inputs.targets, inputs.bias)
        assert all(x is not None and x.shape == (T,) and not x.any() for x in stats)
        leaves = list(inputs.leaves.values())
        assert not any(g.any() for g in torch.autograd.grad(stats.token_logps.sum(), leaves))


def test_minus_infinity_in_the_bias() -> None:
    """-inf takes an id out of the vocabulary: 0 to the entropy, -inf to its own log-probability, NaN to nothing."""
    inputs = small(ignored="none")
    assert inputs.bias is not None
    keep = torch.arange(9) % 2 == 0
    bias = torch.where(keep, inputs.bias.detach(), -torch.inf)
    targets = torch.tensor([0, 2, 4, 6, 8, 1])
    stats = reference.linear_logp_stats(inputs.hidden, inputs.weight, targets, bias)
    dense = reference.linear_logp_stats(inputs.hidden, inputs.weight[keep], targets // 2, inputs.bias[keep])
    for field in ("lse", "entropy", "log_sum_sq_probs"):
        torch.testing.assert_close(getattr(stats, field), getattr(dense, field))
    torch.testing.assert_close(stats.token_logps[:5], dense.token_logps[:5])
    assert stats.token_logps[5] == -torch.inf


def test_not_finite_stays_in_its_row() -> None:
    inputs = small(ignored="none")
    hidden = inputs.hidden.detach().clone()
    hidden[1], hidden[3, 0] = torch.nan, torch.inf
    hidden.requires_grad_()
    others = [0, 2, 4, 5]
    clean = reference.linear_logps(inputs.hidden, inputs.weight, inputs.targets)
    dirty = reference.linear_logps(hidden, inputs.weight, inputs.targets)
    assert torch.equal(clean[others], dirty[others]) and not dirty[[1, 3]].isfinite().any()
    (d_clean,) = torch.autograd.grad(clean.sum(), inputs.hidden)
    (d_dirty,) = torch.autograd.grad(dirty.sum(), hidden)
    assert torch.equal(d_clean[others], d_dirty[others]) and d_dirty[1].isnan().all()


def test_ignored_rows_of_nan_reach_nothing() -> None:
    inputs = small(ignored="first")
    hidden = inputs.hidden.detach().clone()
    hidden[:3] = torch.nan
    hidden.requires_grad_()
    logps = reference.linear_logps(hidden, inputs.weight, inputs.targets, inputs.bias)
    gradients = torch.autograd.grad(logps.sum(), (inputs.weight, inputs.bias), retain_graph=True)
    assert not logps[:3].any() and logps[3:].all() and all(g.isfinite().all() for g in gradients)


def test_seq_logps() -> None:
    values = torch.arange(7, dtype=torch.float64)
    assert reference.seq_logps(values, torch.tensor([0, 3, 3, 7])).tolist() == [3, 0, 18]
    assert reference.seq_logps(values[:0], torch.tensor([0])).shape == (0,)


# ---------------------------------------------------------------------------------------------------- in blocks


def live_arguments(inputs: Inputs) -> tuple[Tensor | None, ...]:
    pair = (None, None) if inputs.low_rank is None else tuple(x.detach() for x in inputs.low_rank)
    bias = None if inputs.bias is None else inputs.bias.detach()
    return (inputs.hidden.detach(), inputs.weight.detach(), bias, *pair, inputs.targets)


BLOCKS = [(16, 16), (7, 40), (17, 31), (100, 9), (1, 45), (30, 1), (30, 90), (1000, 1000)]


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_blocks_of_any_shape(options: HeadOptions, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocked forms are the specification and its autograd in float64, whatever the blocks."""
    monkeypatch.setattr(reference, "block_shape", lambda *_: blocks)
    inputs = small(T=30, D=11, V=90, R=4, ignored="none", hidden_scale=3.0)
    stats = reference.forward_in_blocks(*live_arguments(inputs), options)
    expected = reference.linear_logp_stats(
        inputs.hidden, inputs.weight, inputs.targets, inputs.bias, inputs.low_rank, options
    )
    for field, actual, wanted in zip(LogpStats._fields, stats, expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11, msg=lambda m, f=field: f"{f}: {m}")
    assert stats.lse is not None and expected.lse is not None
    upstream = (inputs.d_token_logps, inputs.d_lse)
    needs = (True,) * 5
    actual = reference.backward_in_blocks(*live_arguments(inputs), stats.lse, *upstream, options, needs)
    loss = (expected.token_logps * upstream[0] + expected.lse * upstream[1]).sum()
    for name, a, b in zip(inputs.leaves, actual, torch.autograd.grad(loss, list(inputs.leaves.values()))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"d_{n}: {m}")


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5)), ids=str)
def test_blocks_compute_what_is_needed(needs: tuple[bool, ...]) -> None:
    inputs = small(T=20, ignored="none")
    arguments = (*live_arguments(inputs), reference.forward_in_blocks(*live_arguments(inputs), HeadOptions()).lse)
    upstream = (inputs.d_token_logps, inputs.d_lse)
    full = reference.backward_in_blocks(*arguments, *upstream, HeadOptions(), (True,) * 5)
    some = reference.backward_in_blocks(*arguments, *upstream, HeadOptions(), needs)
    for needed, a, b in zip(needs, some, full):
        assert (a is not None) == needed and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_blocks_accumulate_in_float32(dtype: torch.dtype) -> None:
    """16-bit inputs are widened first: the same bits as on widened inputs, and one rounding of each gradient."""
    inputs = make_inputs(Case("wide", 40, 24, 200, "", dtype, True, 3, 1.2, 9.0, ignored="none"))
    wide, options = inputs.to(torch.float32), HeadOptions(1.2, 9.0)
    upstream = (inputs.d_token_logps.float(), inputs.d_lse.float())
    results = []
    for x in (live_arguments(inputs), live_arguments(wide)):
        stats = reference.forward_in_blocks(*x, options)
        results.append((stats, reference.backward_in_blocks(*x, stats.lse, *upstream, options, (True,) * 5)))
    (stats, gradients), (wide_stats, wide_gradients) = results
    assert all(map(torch.equal, stats, wide_stats))
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(gradients, wide_gradients))


def test_blocks_know_masks_and_ties() -> None:
    """Rows that begin with whole blocks of -inf, rows of NaN, ties across blocks."""
    options = HeadOptions(workspace_bytes=1)
    inputs = make_inputs(Case("masks", 20, 8, 100, "", torch.float64, bias=True, ignored="none"))
    hidden, weight, bias, x, b, targets = live_arguments(inputs)
    assert hidden is not None and bias is not None and weight is not None and targets is not None
    bias[:48] = -torch.inf
    hidden[4] = torch.nan
    weight[99], bias[[60, 99]] = weight[60].clone(), 50.0
    targets[:2] = torch.tensor([60, 99])
    stats = reference.forward_in_blocks(hidden, weight, bias, x, b, targets, options)
    expected = reference.linear_logp_stats(hidden, weight, targets, bias)
    for field, a, e in zip(LogpStats._fields, stats, expected):
        torch.testing.assert_close(a, e, equal_nan=True, msg=lambda m, f=field: f"{f}: {m}")
    assert stats.is_top1 is not None and stats.is_top1[0] and not stats.is_top1[1]


@pytest.mark.parametrize("budget", [1, 2**12, 2**20, 2**28, 2**40])
def test_block_shape_stays_within_the_budget(budget: int) -> None:
    """Eight blocks of logits, and twice a widened slice of the weight, its gradient and a block of hidden."""
    for T, D, V in itertools.product([1, 37, 8192, 70000], [1, 64, 4096], [1, 300, 151936]):
        rows, columns = reference.block_shape(T, D, V, budget, 4)
        assert rows >= 16 and columns >= 16
        rows, columns = min(rows, T), min(columns, V)
        used = 4 * (8 * rows * columns + 4 * columns * D + 2 * rows * D)
        assert used <= max(budget, 4 * (8 * 256 + 4 * 16 * D + 2 * 16 * D)), (T, D, V)


def test_options_travel_in_the_order_of_the_schema() -> None:
    assert astuple(HeadOptions(2.0, 3.0, 4.0, 5, 6)) == (2.0, 3.0, 4.0, 5, 6)
