"""Products kept between forward and backward: the same bits as without them, by the stated rule, within the budget,
and gone with the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from groupdpo_kernels import _C, LinearLogps, linear_logp_stats, linear_logps
from groupdpo_kernels.lm_head import autograd, logit_cache
from groupdpo_kernels.lm_head.autograd import CachedLinearLogps, CallOptions
from groupdpo_kernels.reference import RowGradients, head_of
from groupdpo_kernels.testing import Case, Inputs, make_inputs

EVERYTHING = {"bias": True, "R": 3, "logit_scale": 1.3, "softcap": 15.0, "temperature": 0.8}
CASES = (
    Case("plain", 24, 1024, 3000, "every row, all of the vocabulary", ignored="none"),
    Case("everything", 30, 40, 2500, "all options, ignored rows", leading=(5, 6), **EVERYTHING),  # type: ignore[arg-type]
    Case("ragged_blocks", 300, 33, 4097, "the last block of the vocabulary is not kept"),
    Case("bf16", 140, 2048, 2100, "bfloat16 as it is, where the machine can", torch.bfloat16),
    Case("bf16_everything", 40, 72, 2500, "the same with options", torch.bfloat16, **EVERYTHING),  # type: ignore[arg-type]
    Case("fp16", 40, 48, 2500, "widened", torch.float16, ignored="most"),
    Case("all_ignored", 8, 16, 100, "nothing to keep", ignored="all"),
)
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
RESERVE = 2**24  # what the blocks of a float32 head take


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    logit_cache._alive.clear()
    yield
    logit_cache._alive.clear()


def same_bits(case: Case, columns: int, stats: bool) -> None:
    inputs = make_inputs(case)
    low_rank = inputs.low_rank or (None, None)
    positional = (inputs.hidden, inputs.weight, inputs.targets, inputs.bias, *low_rank)
    plain = LinearLogps.apply(*positional, case.options, stats, "cpu", None)
    options = CallOptions(case.options, stats=stats, columns=columns)
    *out, _, cache = CachedLinearLogps.apply(*head_of(**inputs.leaves), inputs.targets, options)
    assert cache.shape == (inputs.targets.numel(), columns)
    assert all(torch.equal(x, y) for x, y in zip(plain, out))
    upstream = (inputs.d_token_logps.float(), inputs.d_lse.float())
    leaves = list(inputs.leaves.values())
    outputs, upstream = (slice(3), (*upstream, upstream[1])) if stats else (slice(2), upstream)
    expected, actual = (torch.autograd.grad(x[outputs], leaves, upstream, retain_graph=True) for x in (plain, out))
    assert all(torch.equal(x, y) for x, y in zip(expected, actual))
    # One output unused, one gradient wanted.
    expected, actual = (torch.autograd.grad(x[0], leaves[:1], upstream[0]) for x in (plain, out))
    assert torch.equal(expected[0], actual[0])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("stats", [False, True])
@by_case
def test_the_same_bits(case: Case, stats: bool) -> None:
    same_bits(case, case.V, stats)
    same_bits(case, min(case.V, 2048), stats)  # not all of it


@by_case
def test_the_same_bits_widened(case: Case) -> None:
    before = _C.use_bf16_products(False)
    try:
        same_bits(case, case.V, False)
    finally:
        _C.use_bf16_products(before)


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_what_is_kept_is_not_computed(case: Case) -> None:
    """The backward reads every number that is kept, in live rows, and takes its word."""
    inputs = make_inputs(case)
    head, rows = inputs.head, RowGradients(*(x.float() for x in (inputs.d_token_logps, inputs.d_lse)))
    stats, cache = logit_cache.forward(head, inputs.targets, case.options, False, 2048)
    live = int((inputs.targets != -100).sum())
    product = inputs.hidden.reshape(-1, case.D) @ inputs.weight.T
    if inputs.low_rank:
        product += inputs.low_rank[0].reshape(-1, case.R) @ inputs.low_rank[1].T
    expected = product[inputs.targets.reshape(-1) != -100, :2048]
    torch.testing.assert_close(cache[:live], expected, rtol=1e-5, atol=1e-4)

    def gradients() -> list[Tensor]:
        found = logit_cache.backward(head, inputs.targets, stats.lse, rows, cache, case.options, inputs.needs)
        return [x for x in found if x is not None]

    before = gradients()
    cache[live:] = torch.nan
    assert all(map(torch.equal, gradients(), before))
    cache[:live] = torch.nan
    kept_whole = case.V // 2
    d_hidden, d_weight, *_ = gradients()
    assert (
        d_hidden.isnan().all(-1).sum() == live
        and d_weight[:kept_whole].isnan().all()
        and not d_weight[kept_whole:].isnan().any()
    )


def test_the_rule() -> None:
    case = Case("rule", 100, 1024, 9000, "", ignored="none")
    inputs = make_inputs(case)
    all_bytes = 4 * case.T * case.V

    def columns(inputs: Inputs = inputs, budget: int = 2**28, impl: str = "auto") -> int:
        options = replace(case.options, workspace_bytes=budget)
        return logit_cache.columns_to_keep(inputs.head, inputs.targets, options, impl)

    assert columns() == columns(impl="cpu") == 9000
    assert columns(impl="reference") == 0
    with logit_cache.nothing_kept():
        assert columns() == 0
    assert columns(budget=RESERVE + all_bytes) == 9000
    assert columns(budget=RESERVE + all_bytes - 1) == 7200  # whole blocks, of five
    assert columns(budget=RESERVE + 4 * case.T * 3599) == 0  # 1800 are less than a quarter
    assert columns(budget=RESERVE + 4 * case.T * 3600) == 3600
    assert columns(budget=1) == 0
    assert columns(make_inputs(replace(case, D=1000))) == 0
    assert columns(make_inputs(replace(case, T=0, leading=()))) == 0
    bf16 = make_inputs(replace(case, dtype=torch.bfloat16))
    assert columns(bf16) == (0 if _C.build_info()["bf16_products"] else 9000)
    assert columns(bf16, 2**24 + 4 * 5 * 1024 * 1024 + all_bytes) in (0, 9000)
    assert columns(make_inputs(replace(case, dtype=torch.float16)), 2**24 + 4 * 5 * 1024 * 1024 + all_bytes) == 9000


class Calls:
    """How many columns each call of linear_logps kept; 0 for a call that kept nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.columns: list[int] = []
        for name in ("ExactLinearLogps", "CachedLinearLogps", "FrozenLinearLogps"):
            real = getattr(autograd, name)
            monkeypatch.setattr(f"groupdpo_kernels.lm_head.dispatch.{name}", self.counted(real))

    def counted(self, real: type[torch.autograd.Function]) -> type:
        outer = self

        class Counted(real):  # type: ignore[valid-type,misc]
            @staticmethod
            def apply(*arguments: Any) -> object:
                outer.columns.append(arguments[6].columns)
                return real.apply(*arguments)

        return Counted


def test_graphs_that_live_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred forwards before their backwards keep no more than one; what a backward frees is for the next."""
    case = Case("shared", 64, 1024, 6000, "", ignored="none")
    inputs, calls = make_inputs(case), Calls(monkeypatch)
    budget = RESERVE + 4 * case.T * (6000 + 4000)

    def call() -> Tensor:
        return linear_logps(inputs.hidden, inputs.weight, inputs.targets, workspace_bytes=budget)

    first, second, third = call(), call(), call()
    assert calls.columns == [6000, 4000, 0]
    first.sum().backward()
    fourth = call()  # `first` is alive, its graph has been used
    assert calls.columns[3:] == [6000]
    del second, fourth
    assert call().requires_grad and calls.columns[4:] == [6000]
    third.sum().backward()


def test_who_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("who", 16, 1024, 300, "", ignored="none")
    inputs, calls = make_inputs(case), Calls(monkeypatch)
    positional = (inputs.hidden, inputs.weight, inputs.targets)
    linear_logp_stats(*positional, outputs=("entropy", "is_top1")).token_logps.sum().backward()
    assert calls.columns == [300]
    with torch.no_grad():
        linear_logps(*positional)
    linear_logps(inputs.hidden, inputs.weight.detach(), inputs.targets)  # a frozen head
    linear_logps(*positional, workspace_bytes=2**20)
    assert calls.columns == [300, 0, 0, 0]
    linear_logps(inputs.hidden.detach(), inputs.weight, inputs.targets)  # a frozen trunk
    assert calls.columns[4:] == [300]


def test_under_transformations() -> None:
    """torch.func and retain_graph work as they do without; a compiled graph keeps nothing."""
    case = Case("transformed", 16, 1024, 300, "", ignored="none")
    inputs = make_inputs(case)
    targets, d = inputs.targets, inputs.d_token_logps.float()

    def loss(hidden: Tensor, weight: Tensor, impl: str = "cpu") -> Tensor:
        return (linear_logps(hidden, weight, targets, impl=impl) * d).sum()

    detached = inputs.hidden.detach(), inputs.weight.detach()
    value = loss(inputs.hidden, inputs.weight)
    first = torch.autograd.grad(value, (inputs.hidden, inputs.weight), retain_graph=True)
    assert logit_cache._in_use() == 4 * case.T * case.V
    again = torch.autograd.grad(value, (inputs.hidden, inputs.weight))
    assert logit_cache._in_use() == 0
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, first, torch.func.grad(loss, argnums=(0, 1))(*detached)))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(inputs.hidden, inputs.weight)
    assert logit_cache._in_use() == 0
    assert all(map(torch.equal, first, torch.autograd.grad(compiled, (inputs.hidden, inputs.weight))))


@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=lambda case: case.name)
def test_opcheck(case: Case) -> None:
    inputs = make_inputs(case)
    head = inputs.head
    rest = (*head, inputs.targets, *astuple(case.options))
    # Rows past the live ones are undefined, and opcheck compares numbers: none are ignored here.
    inputs.targets.clamp_(0)
    for stats in (False, True):
        opcheck(torch.ops.groupdpo_kernels.logit_cache_forward.default, (*rest, stats, 2048))
    stats_, cache = logit_cache.forward(head, inputs.targets, case.options, False, 2048)
    upstream = (inputs.d_token_logps.float(), inputs.d_lse.float())
    for d_entropy in (None, upstream[1]):
        rows = (stats_.lse, *upstream, d_entropy, cache)
        arguments = (*head, inputs.targets, *rows, *astuple(case.options), list(inputs.needs))
        opcheck(torch.ops.groupdpo_kernels.logit_cache_backward.default, arguments)
