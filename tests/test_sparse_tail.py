"""grad_tail="sample": what is drawn follows the row's own tail, the gradients are unbiased, their variance is within
its bound, and the draws replay. Statistics are over fixed seeds: a test that passes once passes always."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from bench.recorded_rows import draw_profile
from groupdpo_kernels import explain, linear_logp_stats, linear_logps
from groupdpo_kernels.lm_head import ops
from groupdpo_kernels.reference import TAIL_SAMPLES, Candidates, HeadOptions, head_of
from groupdpo_kernels.testing import CASES, Case, Inputs, make_inputs, triton_on_cpu

IMPLS = ("reference", "cpu")  # Triton's tests are at the end: interpreted tiles are slow
TOLERANCE = 2.0**-7  # of the least probability of a candidate: 2^-9
V = 600
BY_NAME = {case.name: case for case in CASES}


def running(impl: str) -> contextlib.AbstractContextManager[None]:
    """Within it `impl` runs on the CPU: Triton is interpreted, tile by tile."""
    return triton_on_cpu(32, 128, 64) if impl == "triton" else contextlib.nullcontext()


def rows_of_logits(kind: str, T: int = 24) -> tuple[Tensor, Tensor]:
    """(T, V) logits and targets."""
    g = torch.Generator().manual_seed(sum(map(ord, kind)))
    z, y = torch.randn(T, V, generator=g), torch.randint(V, (T,), generator=g)
    if kind == "flat":
        z *= 1e-3
    elif kind == "ascending":  # every later entry is likelier: what was gathered falls back into the tail
        z = torch.linspace(0, 40, V).repeat(T, 1)
    elif kind == "broad":  # more likely entries than a row may keep
        z = torch.where(torch.arange(V) < 470, 0.0, -9.0).repeat(T, 1)
    elif kind == "confident":
        z *= 2
        z.scatter_(1, y[:, None], (torch.logsumexp(z, 1) + 4)[:, None])
    elif kind == "mixed":
        z *= torch.logspace(-2, 1, T)[:, None]
    elif kind == "holes":
        z = torch.where(torch.rand(z.shape, generator=g) < 0.3, -torch.inf, 2 * z)
        z.scatter_(1, y[:, None], 1.0)
    return z, y


KINDS = ("random", "flat", "ascending", "broad", "confident", "mixed", "holes")


def found_in(z: Tensor, y: Tensor, seed: int, impl: str, options: HeadOptions) -> Candidates:
    head = head_of(z, torch.eye(z.shape[1]))
    if not z.isfinite().all():  # -inf through the bias of the head, which a product with 0 cannot carry
        head = head_of(torch.zeros(len(z), 1), torch.zeros(z.shape[1], 1), z[0].clone())
    with running(impl):
        return ops.sparse_forward(head, y, options, TOLERANCE, impl, torch.tensor(seed))[1]


def probabilities(z: Tensor, y: Tensor, found: Candidates) -> Tensor:
    """(T, V) float64: of each entry of the tail; 0 elsewhere."""
    p = torch.softmax(z.double(), 1).scatter(1, y[:, None], 0.0)
    ids, weights = found.ids[:, :-TAIL_SAMPLES].long(), found.weights[:, :-TAIL_SAMPLES]
    kept = torch.zeros_like(p).scatter_add(1, ids, (weights != 0).double())
    return torch.where(kept > 0, 0, p)


@pytest.mark.parametrize("cap", [None, 6.0])
@pytest.mark.parametrize(
    ("impl", "kind"),
    [*((impl, kind) for impl in IMPLS for kind in KINDS), *(("triton", kind) for kind in ("broad", "mixed", "holes"))],
)
def test_target_candidates_and_draws_are_the_whole_row(impl: str, kind: str, cap: float | None) -> None:
    z, y = rows_of_logits(kind)
    if kind == "holes":
        z, y = z[:1].repeat(len(z), 1), y[:1].repeat(len(y))
    capped = z if cap is None else cap * torch.tanh(z / cap)
    for workspace_bytes in (2**12, 2**28):  # many blocks and 10 candidates a row, then one block
        options = HeadOptions(softcap=cap, workspace_bytes=workspace_bytes)
        found = found_in(z, y, 3, impl, options)
        tail = probabilities(capped, y, found)
        draws, weights = found.ids[:, -TAIL_SAMPLES:].long(), found.weights[:, -TAIL_SAMPLES:]
        some = tail.sum(1) > 1e-6
        assert (tail.gather(1, draws)[some] > 0).all()  # none is a candidate, the target or impossible
        slopes = torch.ones_like(weights) if cap is None else 1 - (capped.gather(1, draws) / cap).square()
        part = (tail.sum(1, keepdim=True) / TAIL_SAMPLES).float()
        torch.testing.assert_close(weights, torch.where(some[:, None], part * slopes, weights), rtol=2e-4, atol=1e-7)
    if kind not in ("broad", "ascending"):  # the other rows have room for their candidates
        assert (tail.max(1).values <= TOLERANCE / 4 * (1 + 1e-5)).all()


@pytest.mark.parametrize(("impl", "cap"), [*((impl, cap) for impl in IMPLS for cap in (None, 4.0)), ("triton", None)])
def test_draws_follow_the_tail(impl: str, cap: float | None) -> None:
    """One row many times, in blocks: frequencies by chi-square, and pairs of draws as independent ones."""
    T, size = {"cpu": (3000, 2500), "reference": (500, 1500), "triton": (300, 300)}[impl]
    g = torch.Generator().manual_seed(5)
    z = torch.randn(1, size, generator=g) * 2
    z[0, :5] = torch.tensor([6.0, 5.0, -torch.inf, 7.0, -30.0])
    y = torch.full((T,), 3)
    head = head_of(torch.zeros(T, 1), torch.zeros(size, 1), z[0])
    options = HeadOptions(softcap=cap, workspace_bytes=2**22)
    with running(impl):
        _, found = ops.sparse_forward(head, y, options, TOLERANCE, impl, torch.tensor(11))
    rows = z if cap is None else cap * torch.tanh(z / cap)
    tail = probabilities(rows, y[:1], Candidates(*(x[:1] for x in found)))[0]
    tail = tail / tail.sum()
    draws = found.ids[:, -TAIL_SAMPLES:].long()
    assert (found.ids[:, :-TAIL_SAMPLES] == found.ids[0, :-TAIL_SAMPLES]).all()
    expected, counts = tail * draws.numel(), torch.bincount(draws.reshape(-1), minlength=size)
    assert counts[expected == 0].sum() == 0
    often = expected >= 5
    observed = torch.cat((counts[often], counts[~often].sum()[None])).double()
    wanted = torch.cat((expected[often], expected[~often].sum()[None]))
    chi = float(((observed - wanted).square() / wanted).sum())
    freedom = len(wanted) - 1
    assert abs(chi - freedom) < 4 * math.sqrt(2 * freedom), (chi, freedom)
    same, pairs = float(tail.square().sum()), T * TAIL_SAMPLES * (TAIL_SAMPLES - 1) / 2
    equal = sum(int((draws[:, i] == draws[:, j]).sum()) for i in range(TAIL_SAMPLES) for j in range(i))
    assert abs(equal - same * pairs) < 5 * math.sqrt(same * pairs)
    after = float((draws[1:] == draws[:-1]).double().mean())  # rows are independent too
    assert abs(after - same) < 5 * math.sqrt(same / (T * TAIL_SAMPLES))


def d_logits(z: Tensor, y: Tensor, g: Tensor, d_lse: Tensor, seed: int | None, impl: str) -> Tensor:
    """With the identity as the head d_hidden is d_logits. Without a seed the exact one, in float64."""
    if seed is None:
        d = (d_lse - g).double()[:, None] * torch.softmax(z.double(), 1)
        return d.scatter_add_(1, y[:, None], g.double()[:, None])
    hidden = z.clone().requires_grad_()
    torch.manual_seed(seed)
    stats = linear_logp_stats(
        hidden, torch.eye(V), y, grad_tol=TOLERANCE, grad_tail="sample", impl=impl, outputs=("lse",)
    )
    torch.autograd.backward((stats.token_logps, stats.lse), (g, d_lse))
    assert hidden.grad is not None
    return hidden.grad.double()


@pytest.mark.parametrize(
    ("impl", "kind"), [*(("cpu", kind) for kind in KINDS[:-1]), ("reference", "broad"), ("reference", "mixed")]
)
def test_unbiased_and_within_the_variance(impl: str, kind: str) -> None:
    """Upstream gradients of any size and both signs, and into lse."""
    z, y = rows_of_logits(kind)
    T, n = len(y), 64 if impl == "cpu" else 32
    g = torch.randn(T, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 2, T)
    d_lse = 0.3 * torch.randn(T, generator=torch.Generator().manual_seed(2))
    truth = d_logits(z, y, g, d_lse, None, impl)
    draws = torch.stack([d_logits(z, y, g, d_lse, seed, impl) for seed in range(n)])
    tail = probabilities(z, y, found_in(z, y, 0, impl, HeadOptions())).sum(1)
    size = (d_lse - g).double().abs()
    rounding = 1e-5 * truth.norm(dim=1)
    errors = draws - truth
    assert (errors.abs().sum(2) <= 2 * size * tail * (1 + 1e-4) + 1e-5 * truth.abs().sum(1)).all()
    # A row's mean squared error is within its bound; that of these n draws within 5 of its spread more.
    bound = (size * tail).square() / TAIL_SAMPLES
    squares = (errors.norm(dim=2) - rounding).clamp(min=0).square()
    spread = squares.std(0) / math.sqrt(n)
    assert (squares.mean(0) <= bound + 5 * spread).all()
    # Were there a bias, the square of the mean would not fall with n.
    variance = errors.var(0).sum(1)
    mean = (errors.mean(0).norm(dim=1) - rounding).clamp(min=0)
    assert (mean.square() * n <= 2.5 * variance + 1e-30).all()
    total = (errors.mean(0) / size[:, None]).square().sum() * n
    scaled = (errors / size[:, None]).var(0).sum()
    assert total <= 1.3 * scaled + 1e-6
    # Along fixed directions, by row.
    for direction in (torch.ones(V), torch.linspace(-1, 1, V), torch.arange(V) % 2.0):
        along = errors @ direction.double()
        allowed = 5 * along.std(0) / math.sqrt(n) + rounding * math.sqrt(V)
        assert (along.mean(0).abs() <= allowed).all()


def through(inputs: Inputs, case: Case, names: list[str], **settings: object) -> dict[str, Tensor]:
    """Gradients of the named leaves; the others need none."""
    leaves = {k: x.detach().requires_grad_(k in names) for k, x in inputs.leaves.items()}
    pair = (leaves["low_rank_hidden"], leaves["low_rank_weight"]) if "low_rank_hidden" in leaves else None
    o = case.options
    logps = linear_logps(
        leaves["hidden"], leaves["weight"], inputs.targets, leaves.get("bias"), low_rank=pair,
        logit_scale=o.logit_scale, softcap=o.softcap, temperature=o.temperature,
        workspace_bytes=o.workspace_bytes, **settings,  # type: ignore[arg-type]
    )  # fmt: skip
    wanted = [leaves[name] for name in names]
    return dict(zip(names, torch.autograd.grad((logps * inputs.d_token_logps.to(logps.dtype)).sum(), wanted)))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(
    "name", ["one_column", "everything_bf16", "batched", "strided_deep", "all_ignored", "empty", "tiny_workspace"]
)
@pytest.mark.parametrize("impl", IMPLS)
def test_cases(impl: str, name: str, frozen: bool, poisoned_memory: None) -> None:
    """Every gradient in the mean, whatever shapes, strides, ignored rows and options."""
    least = 2**15 if impl == "cpu" else 2**19  # the reference takes a hundred steps a block
    case = dataclasses.replace(BY_NAME[name], workspace_bytes=max(BY_NAME[name].workspace_bytes, least))
    inputs = make_inputs(case)
    names = [k for k in inputs.leaves if k.endswith("hidden")] if frozen else list(inputs.leaves)
    exact = through(inputs, case, names, impl=impl)
    n, draws = 12 if inputs.hidden.numel() else 2, []
    for seed in range(n):
        torch.manual_seed(seed)
        draws.append(through(inputs, case, names, grad_tol=0.02, grad_tail="sample", impl=impl))
    eps = torch.finfo(case.dtype).eps
    for key in names:
        truth, stack = exact[key].double(), torch.stack([d[key].double() for d in draws])
        if not truth.numel():
            continue
        rounding = 4 * eps * float(truth.norm())
        assert float((stack.mean(0) - truth).norm()) <= 2 * math.sqrt(float(stack.var(0).sum()) / n) + rounding, key
        ignored = (inputs.targets == -100) if key.endswith("hidden") else torch.zeros(0, dtype=torch.bool)
        assert not ignored.any() or not stack[:, ignored].any()


OPTIONS: dict[str, dict[str, float]] = {
    "scaled": {"logit_scale": 1.7, "temperature": 0.6},
    "softcap": {"softcap": 6.0, "temperature": 0.7},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_options(impl: str, options: dict[str, float], dtype: torch.dtype) -> None:
    """The map's chain and slopes: with few dimensions, where a wrong factor would stand out of the variance."""
    if impl == "cpu" and dtype == torch.float64:
        impl = "auto"  # the reference: no other computes in float64
    case = Case("tail", 40, 6, V, "", dtype, True, 3, hidden_scale=3.0, **options)
    inputs = make_inputs(case)
    names = list(inputs.leaves)
    exact = through(inputs, case, names, impl=impl)
    n, draws = 24, []
    for seed in range(n):
        torch.manual_seed(seed)
        draws.append(through(inputs, case, names, grad_tol=0.02, grad_tail="sample", impl=impl))
    for key in names:
        truth, stack = exact[key].double(), torch.stack([d[key].double() for d in draws])
        noise = math.sqrt(float(stack.var(0).sum()) / n)
        assert noise < 0.1 * float(truth.norm()), key
        rounding = 4 * torch.finfo(dtype).eps * float(truth.norm())
        assert float((stack.mean(0) - truth).norm()) <= 1.6 * noise + rounding, key


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_a_seed_decides(impl: str, frozen: bool, poisoned_memory: None) -> None:
    hidden, weight, targets = draw_profile("trained", 300, 64, 2500, torch.bfloat16)

    def gradients(seed: int, threads: int = 2) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(seed)
            leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
            logps = linear_logps(*leaves, targets, grad_tol=TOLERANCE, grad_tail="sample", impl=impl)
            assert type(logps.grad_fn).__name__ == "SparseLinearLogpsBackward"  # a frozen head's too
            logps.sum().backward()
            return [x.grad for x in leaves if x.grad is not None]
        finally:
            torch.set_num_threads(before)

    first = gradients(7)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(7)))
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(7, threads=1)))
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(7, threads=3)))
    assert not any(torch.equal(a, b) for a, b in zip(first, gradients(8)))


def test_two_calls_draw_apart_and_every_call_draws_once() -> None:
    hidden, weight, targets = draw_profile("trained", 40, 32, 900, torch.float32)
    hidden.requires_grad_()

    def call() -> Tensor:
        return linear_logps(hidden, weight, targets, grad_tol=TOLERANCE, grad_tail="sample")

    torch.manual_seed(0)
    (first,) = torch.autograd.grad(call().sum(), hidden)
    (second,) = torch.autograd.grad(call().sum(), hidden)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with torch.no_grad():
        call(), call()
    assert torch.equal(state, torch.get_rng_state())  # dropout behind it sees the same numbers with a graph and without
    linear_logps(hidden, weight, targets, grad_tol=TOLERANCE)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_are_not_finite_keep_to_themselves(impl: str) -> None:
    z, y = rows_of_logits("mixed")
    z[4, 3], z[9, 3], z[11] = torch.nan, torch.inf, -torch.inf
    hidden, g = z.requires_grad_(), torch.ones(len(y)).index_fill(0, torch.tensor([13]), torch.nan)
    logps = linear_logps(hidden, torch.eye(V), y, grad_tol=TOLERANCE, grad_tail="sample", impl=impl)
    logps.backward(g)
    assert hidden.grad is not None
    finite = torch.isfinite(hidden.grad).all(1)
    bad = [4, 9, 11, 13]
    assert not finite[bad].any() and int(finite.sum()) == len(y) - len(bad)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_a_tail(impl: str) -> None:
    """All others impossible but a few candidates, or all others: nothing is drawn, and the gradient is exact."""
    bias = torch.full((V,), -torch.inf)
    bias[5:9] = torch.tensor([1.0, 2.0, 3.0, -1.0])
    for alone in (False, True):
        if alone:
            bias[6:9] = -torch.inf
        hidden, weight, y = torch.randn(3, 4).requires_grad_(), torch.randn(V, 4), torch.full((3,), 5)
        settings = {"grad_tol": TOLERANCE, "grad_tail": "sample", "impl": impl}
        (found,) = torch.autograd.grad(linear_logps(hidden, weight, y, bias, **settings).sum(), hidden)  # type: ignore[arg-type]
        (truth,) = torch.autograd.grad(linear_logps(hidden, weight, y, bias, impl="reference").sum(), hidden)
        torch.testing.assert_close(found, truth, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_draws_the_same_again(reentrant: bool) -> None:
    hidden, weight, targets = draw_profile("trained", 40, 32, 900, torch.float32)

    def layer(hidden: Tensor, weight: Tensor) -> Tensor:
        logps = linear_logps(hidden, weight, targets, grad_tol=TOLERANCE, grad_tail="sample")
        return torch.nn.functional.dropout(logps, 0.3)

    results = []
    for run in (layer, lambda *x: checkpoint(layer, *x, use_reentrant=reentrant)):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        torch.manual_seed(4)
        torch.autograd.backward(run(*leaves).sum())
        results.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*results))  # type: ignore[arg-type]


def test_a_compiled_graph_is_whole_and_draws_anew() -> None:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_logps(hidden, weight, targets, grad_tol=TOLERANCE, grad_tail="sample").sum()

    hidden, weight, targets = draw_profile("trained", 24, 64, 900, torch.float32)
    compiled: Callable[..., Tensor] = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for step in (loss, compiled):
        torch.manual_seed(2)
        for _ in range(2):
            inputs = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
            step(*inputs, targets).backward()
            results.append([x.grad for x in inputs])
    assert not torch.equal(results[0][0], results[1][0])  # type: ignore[arg-type]
    for eager, again in zip(results[:2], results[2:]):
        assert all(torch.equal(a, b) for a, b in zip(eager, again))  # type: ignore[arg-type]


def test_what_cannot_be() -> None:
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    for function in (linear_logps, linear_logp_stats, explain):
        with pytest.raises(ValueError, match="grad_tail must be 'exact' or 'sample'; got 'some'"):
            function(x, x, y, grad_tol=0.1, grad_tail="some")  # type: ignore[operator]
        with pytest.raises(ValueError, match="grad_tail='sample' needs grad_tol > 0"):
            function(x, x, y, grad_tail="sample")  # type: ignore[operator]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["everything_bf16", "batched", "all_ignored"])
def test_opcheck(name: str, impl: str) -> None:
    inputs = make_inputs(BY_NAME[name])
    head = inputs.head
    options = dataclasses.astuple(BY_NAME[name].options)
    arguments = (*head, inputs.targets, *options, 0.05, torch.tensor(9), impl)
    opcheck(torch.ops.groupdpo_kernels.sparse_forward.default, arguments)
    found = torch.ops.groupdpo_kernels.sparse_forward(*arguments)
    rows = [torch.randn(inputs.targets.shape) for _ in range(2)]
    arguments = (*head, inputs.targets, *found[1:], *rows, *options, None, list(inputs.needs), impl)
    opcheck(torch.ops.groupdpo_kernels.sparse_backward.default, arguments)


@pytest.mark.parametrize("name", ["everything_bf16", "batched", "all_ignored", "empty"])
def test_gradients_of_the_kernels_over_what_was_drawn(name: str, poisoned_memory: None) -> None:
    """Those of the specification, duplicates among the draws included."""
    case = BY_NAME[name]
    inputs = make_inputs(case)
    with running("triton"):
        _, found = ops.sparse_forward(inputs.head, inputs.targets, case.options, 0.02, "triton", torch.tensor(5))
    upstream = (inputs.d_token_logps.float(), inputs.d_lse.float())
    arguments = (inputs.head, inputs.targets, found, *upstream, case.options, None, inputs.needs)
    with running("triton"):
        gradients = ops.sparse_backward(*arguments, "triton")
    expected = ops.sparse_backward(*arguments, "reference")
    eps = 2.0**-6 if case.dtype == torch.bfloat16 else 3e-6
    for x, y in zip(gradients, expected):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert float((x.double() - y.double()).norm()) <= eps * float(y.double().norm())
    live = inputs.targets != case.options.ignore_index
    assert not found.weights[~live].any() and not found.ids[~live].any()


def test_draws_of_the_kernels_depend_on_seed_and_row_alone() -> None:
    """Not on the chunks; other seeds draw others; rows that are not finite draw nothing, those of a wrong id NaN."""
    case = Case("drawn", 40, 16, 500, "", torch.float32, True, 3, softcap=6.0, hidden_scale=3.0, ignored="none")
    inputs = make_inputs(case)
    inputs.targets[4] = case.V
    with torch.no_grad():
        inputs.hidden[7, 2] = torch.nan

    def draws(seed: int, workspace_bytes: int = 2**28) -> Candidates:
        options = HeadOptions(softcap=6.0, workspace_bytes=workspace_bytes)
        with running("triton"):
            return ops.sparse_forward(inputs.head, inputs.targets, options, 0.02, "triton", torch.tensor(seed))[1]

    first, other = draws(2**62 + 1), draws(2**62 + 2)
    for x, y in zip(first, draws(2**62 + 1)):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())
    chunked = draws(2**62 + 1, 16 * case.T * 256)  # as many candidates, a chunk of one tile of rows
    assert torch.equal(first.ids, chunked.ids)
    tails = [x.ids[:, -TAIL_SAMPLES:] for x in (first, other)]
    assert float((tails[0] == tails[1]).float().mean()) < 0.2
    assert not first.weights[7, -TAIL_SAMPLES:].any() and first.weights[4, -TAIL_SAMPLES:].isnan().all()
    assert (first.weights[:4, -TAIL_SAMPLES:] > 0).all()
