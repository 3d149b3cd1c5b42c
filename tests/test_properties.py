"""What holds for any input: the specification over drawn shapes, masks, options and dtypes; and the symmetries of a
softmax over a linear head. Examples are derived from the test itself, so a run is the same run every time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from groupdpo_kernels import linear_logp_stats, linear_logps, reference, seq_logps
from groupdpo_kernels.reference import HeadOptions, LogpStats
from groupdpo_kernels.testing import Case, Inputs, check_budget, make_inputs, run, triton_on_cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERYTHING = ("lse", "entropy", "mean_logits", "log_sum_sq_probs", "is_top1")


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, longest: int = 7, widest: int = 600) -> Case:
    leading = draw(st.lists(st.integers(1, longest), min_size=1, max_size=3))
    T = torch.Size(leading).numel()
    return Case(
        "drawn",
        T,
        draw(st.integers(1, 70)),
        draw(st.integers(1, widest)),
        "",
        draw(st.sampled_from(dtypes)),
        draw(st.booleans()),
        draw(st.sampled_from([0, 0, 1, 5, 16])),
        draw(st.sampled_from([1.0, 1.0, 0.1, 2.5, -1.0])),
        draw(st.sampled_from([None, None, 2.0, 30.0])),
        draw(st.sampled_from([1.0, 1.0, 0.5, 3.0])),
        draw(st.sampled_from(["none", "some", "first", "last", "most", "all"])),
        draw(st.sampled_from([0.1, 1.0, 4.0])),
        draw(st.sampled_from([0.0, 20.0, -20.0])),
        tuple(leading),
        draw(st.booleans()),
        draw(st.sampled_from([2**12, 2**16, 2**28])),
    )


def stats_of(inputs: Inputs, options: HeadOptions, impl: str) -> LogpStats:
    arguments = (inputs.hidden, inputs.weight, inputs.targets, inputs.bias)
    return linear_logp_stats(
        *arguments, low_rank=inputs.low_rank, outputs=EVERYTHING, impl=impl, **dataclasses.asdict(options)
    )


def within_budget(case: Case, impl: str, seed: int) -> None:
    inputs = make_inputs(case, seed=seed)

    def function(h: Tensor, w: Tensor, y: Tensor, b: Any, low_rank: Any, o: HeadOptions) -> LogpStats:
        # is_top1 is left out: in 16 bits, or under a cap, random logits may tie.
        return stats_of(Inputs(h, w, y, b, low_rank, inputs.d_token_logps, inputs.d_lse), o, impl)._replace(
            is_top1=None
        )

    # Twice eager's error is a rule for tensors; the one number of a tiny one may be luckier than that in eager.
    check_budget(run(function, inputs, case.options), inputs, case.options, factor=8.0)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@given(case=cases(), seed=st.integers(0, 99))
def test_any_case(impl: str, case: Case, seed: int) -> None:
    within_budget(case, impl, seed)


@settings(max_examples=10, phases=[Phase.generate])
@given(case=cases(longest=3, widest=150), seed=st.integers(0, 99), tma=st.booleans(), V=st.sampled_from([64, 128]))
def test_any_case_interpreted(case: Case, seed: int, tma: bool, V: int) -> None:
    with triton_on_cpu(BLOCK_T=16, BLOCK_V=V, BLOCK_D=32, tma=tma):
        within_budget(dataclasses.replace(case, workspace_bytes=2**28), "triton", seed)


# -------------------------------------------------------------------------------------------------- symmetries


def inputs_of(case: Case, seed: int) -> Inputs:
    return make_inputs(dataclasses.replace(case, leading=(), strided=False), seed=seed)


def gradients(logps: Tensor, inputs: Inputs, upstream: Tensor) -> dict[str, Tensor]:
    return dict(zip(inputs.leaves, torch.autograd.grad((logps * upstream).sum(), list(inputs.leaves.values()))))


exact = cases(dtypes=(torch.float64,))


@pytest.mark.parametrize("impl", ["reference"])
@given(case=exact, seed=st.integers(0, 99), shift=st.floats(-30, 30))
def test_a_constant_in_every_logit_changes_no_probability(impl: str, case: Case, seed: int, shift: float) -> None:
    """Added through the bias, without a cap: lse moves by as much as every logit, the rest stays."""
    inputs = inputs_of(dataclasses.replace(case, bias=True, softcap=None), seed)
    options = dataclasses.replace(case.options, softcap=None)
    assert inputs.bias is not None
    moved = dataclasses.replace(inputs, bias=(inputs.bias.detach() + shift).requires_grad_())
    before, after = stats_of(inputs, options, impl), stats_of(moved, options, impl)
    live = inputs.targets != -100
    by = live.double() * (shift * options.logit_scale / options.temperature)
    for name in ("token_logps", "entropy", "log_sum_sq_probs"):
        assert_close(getattr(after, name), getattr(before, name), rtol=1e-9, atol=1e-9)
    for name in ("lse", "mean_logits"):
        assert_close(getattr(after, name), getattr(before, name) + by, rtol=1e-9, atol=1e-9)


@given(case=exact, seed=st.integers(0, 99))
def test_permuting_tokens_permutes_rows(case: Case, seed: int) -> None:
    inputs = inputs_of(case, seed)
    order = torch.randperm(case.T, generator=torch.Generator().manual_seed(seed))
    pair = None if inputs.low_rank is None else (inputs.low_rank[0][order], inputs.low_rank[1])
    options = dataclasses.asdict(case.options)
    whole = linear_logps(inputs.hidden, inputs.weight, inputs.targets, inputs.bias, low_rank=inputs.low_rank, **options)
    shuffled = linear_logps(
        inputs.hidden[order], inputs.weight, inputs.targets[order], inputs.bias, low_rank=pair, **options
    )
    assert_close(shuffled, whole[order])
    a = gradients(whole, inputs, inputs.d_token_logps)
    b = gradients(shuffled, inputs, inputs.d_token_logps[order])
    for name in a:
        assert_close(a[name], b[name])


@given(case=exact, seed=st.integers(0, 99))
def test_permuting_the_vocabulary_changes_nothing(case: Case, seed: int) -> None:
    """Rows of the head and targets together: no id is special, the first and the last included."""
    inputs = inputs_of(case, seed)
    order = torch.randperm(case.V, generator=torch.Generator().manual_seed(seed))
    where = torch.empty_like(order).scatter_(0, order, torch.arange(case.V))
    targets = torch.where(inputs.targets == -100, -100, where[inputs.targets.clamp(min=0)])
    moved = dataclasses.replace(
        inputs,
        weight=inputs.weight[order],
        bias=None if inputs.bias is None else inputs.bias[order],
        low_rank=None if inputs.low_rank is None else (inputs.low_rank[0], inputs.low_rank[1][order]),
        targets=targets,
    )
    a, b = stats_of(inputs, case.options, "reference"), stats_of(moved, case.options, "reference")
    for name in LogpStats._fields[:-1]:
        assert_close(getattr(b, name), getattr(a, name), rtol=1e-9, atol=1e-9)
    d_a = gradients(a.token_logps, inputs, inputs.d_token_logps)
    d_b = gradients(b.token_logps, inputs, inputs.d_token_logps)
    for name in d_a:
        assert_close(d_a[name], d_b[name])


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@given(case=cases(), seed=st.integers(0, 99), at=st.floats(0, 1))
def test_rows_do_not_know_each_other(impl: str, case: Case, seed: int, at: float) -> None:
    """Split anywhere, the two halves give the rows of the whole; the gradients of the head add up."""
    inputs = inputs_of(dataclasses.replace(case, R=0, dtype=torch.float32), seed)
    options = dataclasses.asdict(case.options)
    cut = int(at * case.T)
    whole = linear_logps(inputs.hidden, inputs.weight, inputs.targets, inputs.bias, impl=impl, **options)
    halves = [
        linear_logps(inputs.hidden[s], inputs.weight, inputs.targets[s], inputs.bias, impl=impl, **options)
        for s in (slice(0, cut), slice(cut, None))
    ]
    assert_close(torch.cat(halves), whole, rtol=1e-5, atol=1e-4)
    upstream = inputs.d_token_logps.float()
    a, b = gradients(whole, inputs, upstream), gradients(torch.cat(halves), inputs, upstream)
    for name in a:
        assert_close(a[name], b[name], rtol=1e-4, atol=1e-4)


@given(case=exact, seed=st.integers(0, 99), factor=st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_scale_and_temperature_undo_each_other(case: Case, seed: int, factor: float) -> None:
    """Exactly, for a power of two; and a scale may as well sit in the head."""
    inputs = inputs_of(dataclasses.replace(case, softcap=None), seed)
    options = dataclasses.replace(case.options, softcap=None)
    both = dataclasses.replace(
        options, logit_scale=options.logit_scale * factor, temperature=options.temperature * factor
    )
    a, b = stats_of(inputs, options, "reference"), stats_of(inputs, both, "reference")
    assert torch.equal(a.token_logps, b.token_logps)
    d_a, d_b = (gradients(x.token_logps, inputs, inputs.d_token_logps) for x in (a, b))
    assert all(torch.equal(d_a[name], d_b[name]) for name in d_a)


@given(case=exact, seed=st.integers(0, 99))
def test_a_distant_cap_is_none(case: Case, seed: int) -> None:
    """softcap -> infinity; and a cap bounds the logits, so every log-probability."""
    inputs = inputs_of(case, seed)
    free, far, near = (dataclasses.replace(case.options, softcap=cap) for cap in (None, 1e7, 2.0))
    assert_close(
        stats_of(inputs, far, "reference").token_logps,
        stats_of(inputs, free, "reference").token_logps,
        rtol=1e-6,
        atol=1e-6,
    )
    least = -4.0 / case.temperature - torch.tensor(float(case.V)).log()
    assert (stats_of(inputs, near, "reference").token_logps >= least - 1e-6).all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@given(case=cases(), seed=st.integers(0, 99))
def test_what_every_distribution_satisfies(impl: str, case: Case, seed: int) -> None:
    """Log-probabilities at most 0, entropy in [0, log V], log sum p^2 between -entropy and 0 by Jensen, and so on."""
    inputs = make_inputs(case, seed=seed)
    stats = stats_of(inputs, case.options, impl)
    live = inputs.targets != -100
    log_v = torch.tensor(float(case.V)).log()
    slack = 1e-5 * (1 + stats.lse.detach().abs())  # type: ignore[union-attr]
    logps, entropy, squares = stats.token_logps.detach(), stats.entropy.detach(), stats.log_sum_sq_probs.detach()  # type: ignore[union-attr]
    assert (logps <= slack).all() and (entropy >= -slack).all() and (entropy <= log_v + slack).all()
    assert (
        (squares <= slack).all()
        and (squares >= -entropy - slack).all()
        and (squares[live] >= -log_v - slack[live]).all()
    )
    assert (stats.mean_logits + log_v <= stats.lse + slack)[live].all()  # type: ignore[operator]
    assert (logps[stats.is_top1] >= -log_v - slack[stats.is_top1]).all()  # type: ignore[index]
    for value in stats:
        assert value is not None and not value[~live].any()


@given(case=exact, seed=st.integers(0, 99))
def test_each_row_of_d_logits_sums_to_zero(case: Case, seed: int) -> None:
    """So d_bias sums to zero, whatever the upstream gradient: the mass taken from one id goes to the others."""
    inputs = inputs_of(dataclasses.replace(case, bias=True, softcap=None), seed)
    stats = stats_of(inputs, dataclasses.replace(case.options, softcap=None), "reference")
    d_bias = gradients(stats.token_logps, inputs, inputs.d_token_logps)["bias"]
    assert_close(d_bias.sum(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-9)


@given(
    lengths=st.lists(st.integers(0, 9), min_size=0, max_size=12),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@example(lengths=[], dtype=torch.float32, seed=0)
@example(lengths=[0, 0], dtype=torch.float32, seed=0)
def test_seq_logps_over_any_lengths(lengths: list[int], dtype: torch.dtype, seed: int) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    values = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
    sums = seq_logps(values, cu_seqlens)
    assert_close(sums, reference.seq_logps(values.double(), cu_seqlens).to(dtype))
    upstream = torch.randn(len(lengths)).to(dtype)
    (g,) = torch.autograd.grad(sums, values, upstream)
    assert torch.equal(g, upstream.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)))
