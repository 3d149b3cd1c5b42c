"""The specification against closed forms, torch.distributions, naive eager code and finite differences."""

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


def test_options_travel_in_the_order_of_the_schema() -> None:
    options = HeadOptions(2.0, 3.0, 4.0, 5, 6)
    assert options.as_tuple() == astuple(options) == (2.0, 3.0, 4.0, 5, 6)
