"""The kernels on a real GPU: the same CASES, and what only a device shows. `make device` runs these."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_frozen_head import LOGPS_ALONE, freeze, result_of
from test_sparse_triton import BACKWARD, NAMES, upstream_of
from weighted_rows import Problem, check, make_problem

from groupdpo_kernels import linear_logp_stats, linear_logps
from groupdpo_kernels.lm_head import extension, host, ops, sparse
from groupdpo_kernels.reference import HeadOptions
from groupdpo_kernels.testing import CASES, Case, check_budget, make_inputs, run

pytestmark = pytest.mark.gpu
STATS = ("lse", "entropy", "mean_logits", "log_sum_sq_probs", "is_top1")


def stats_of(impl):
    def function(hidden, weight, targets, bias, low_rank, options):
        return linear_logp_stats(
            hidden, weight, targets, bias, low_rank=low_rank, outputs=STATS, impl=impl,
            logit_scale=options.logit_scale, softcap=options.softcap, temperature=options.temperature,
            workspace_bytes=options.workspace_bytes,
        )  # fmt: skip

    return function


@pytest.mark.parametrize("impl", ("triton", "reference"))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases(case, impl, poisoned_memory):
    inputs = make_inputs(case, "cuda")
    check_budget(run(stats_of(impl), inputs, case.options), inputs, case.options)


@pytest.mark.parametrize("case", LOGPS_ALONE, ids=lambda case: case.name)
def test_cases_frozen_head(case, poisoned_memory):
    case = replace(case, workspace_bytes=max(case.workspace_bytes, 2**16))
    inputs = make_inputs(case, "cuda")
    whole = replace(inputs, d_lse=torch.zeros_like(inputs.d_lse))
    check_budget(result_of(freeze(inputs), case, "triton", interpreted=False), whole, case.options)


@pytest.mark.parametrize(("T", "D", "V"), ((70_000, 64, 1000), (20_000, 64, 128_256)), ids=("rows", "T V > 2^31"))
def test_large_offsets(T, D, V):
    inputs = make_inputs(Case("large", T, D, V, "64-bit offsets", dtype=torch.bfloat16), "cuda")
    stats = linear_logp_stats(inputs.hidden, inputs.weight, inputs.targets, impl="triton", outputs=("lse",))
    (stats.token_logps * inputs.d_token_logps.float()).sum().backward()
    rows = torch.cat([torch.arange(50), torch.arange(T - 50, T)]).cuda()
    z = inputs.hidden.detach()[rows].double() @ inputs.weight.detach().double().T
    live = inputs.targets[rows] != -100
    found = stats.lse.detach()[rows][live].double()
    torch.testing.assert_close(found, torch.logsumexp(z, -1)[live], atol=1e-4, rtol=1e-5)
    g = torch.where(inputs.targets[rows] == -100, 0, inputs.d_token_logps[rows])
    d_logits = -g[:, None] * torch.softmax(z, -1)
    d_logits[torch.arange(100), inputs.targets[rows].clamp(min=0)] += g
    d_hidden = d_logits @ inputs.weight.detach().double()
    found = inputs.hidden.grad[rows].double()
    assert (found - d_hidden).norm() <= 2**-7 * d_hidden.norm()


def big():
    case = Case("big", 8192, 4096, 128256, "the shape of most published figures", dtype=torch.bfloat16)
    return make_inputs(case, "cuda")


@pytest.mark.parametrize("frozen", (False, True), ids=("trained", "frozen head"))
def test_memory_is_bounded_and_nothing_is_read_back(frozen):
    inputs = big()
    weight = inputs.weight.detach().requires_grad_(not frozen)
    linear_logps(inputs.hidden[:128], weight, inputs.targets[:128], impl="triton").sum().backward()  # compiles
    inputs.hidden.grad = weight.grad = None
    gradients = inputs.hidden.nbytes + (0 if frozen else weight.nbytes)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        logps = linear_logps(inputs.hidden, weight, inputs.targets, impl="triton")
        (logps * inputs.d_token_logps.float()).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    extra = torch.cuda.max_memory_allocated() - before - gradients
    T, D = inputs.hidden.shape
    assert extra <= 2**28 + 4 * T * D + 2**25  # the last: the library's own workspace and a few vectors


def test_the_same_bits_every_time():
    inputs = make_inputs(Case("repeat", 3000, 512, 20011, "ragged", dtype=torch.bfloat16, bias=True), "cuda")
    options = Case("repeat", 1, 1, 1, "").options
    once, again = (run(stats_of("triton"), inputs, options) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_a_wrong_id_is_nan_and_stays_in_its_row():
    hidden = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1000, 64, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, 1000, (300,), device="cuda")
    targets[7], targets[8] = 1000, -1
    logps = linear_logps(hidden, weight, targets, impl="triton")
    logps.sum().backward()
    wrong = torch.zeros(300, dtype=torch.bool, device="cuda")
    wrong[7:9] = True
    assert torch.equal(logps.isnan(), wrong) and torch.equal(hidden.grad.isnan().any(1), wrong)


def test_cuda_graph():
    hidden = torch.randn(256, 128, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1000, 128, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, 1000, (256,), device="cuda")
    eager = linear_logps(hidden, weight, targets, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear_logps(hidden, weight, targets, impl="triton")
    graph.replay()
    assert torch.equal(captured, eager)


def test_autocast_and_compile():
    hidden = torch.randn(200, 128, device="cuda", requires_grad=True)
    weight = torch.randn(1000, 128, device="cuda", requires_grad=True)
    targets = torch.randint(0, 1000, (200,), device="cuda")

    def loss(hidden, weight):
        with torch.autocast("cuda", torch.bfloat16):
            return linear_logps(hidden, weight, targets).sum()

    eager = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(hidden, weight), (hidden, weight))
    assert all(g.dtype == torch.float32 for g in eager)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled))


# --------------------------------------------------------------------------------- the device code of the C++ extension


@pytest.fixture
def device_code():
    """A build without it is one that asked for none; one that has it must run."""
    reasons = extension.cuda_extension_why_not(torch.device("cuda"))
    if any("without device code" in reason or "not built" in reason for reason in reasons):
        pytest.skip("; ".join(reasons))
    assert not reasons


def add_rows(problem: Problem) -> torch.Tensor:
    on_device = Problem(*(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in problem))
    for x, y in zip(on_device, problem):
        x.copy_(y)
    extension.add_weighted_rows_cuda(*on_device)
    return on_device.out.cpu()


@pytest.mark.usefixtures("device_code")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(("n", "padding"), ((1, 0), (37, 0), (264, 0), (264, 3), (520, 8), (4096, 0)))
def test_weighted_rows(dtype, n, padding):
    problem = make_problem(dtype, n, padding=padding)
    found = add_rows(problem)
    check(found, problem)
    assert torch.equal(add_rows(problem).view(torch.uint8), found.view(torch.uint8))


@pytest.mark.usefixtures("device_code")
def test_weighted_rows_of_a_vocabulary():
    """Most rows own nothing, neighbours own thousands; more elements than 2^31; on another stream, and captured."""
    m, n, K, T = 600_000, 4096, 300_000, 2048
    keys = (torch.rand(K, device="cuda") ** 6 * m).long().sort().values
    owned = sparse.bounds(keys, m)
    index, coefficients = torch.randint(T, (K,), device="cuda"), torch.randn(K, device="cuda")
    source = torch.randn(T, n, device="cuda", dtype=torch.bfloat16)
    out = torch.zeros(m, n, device="cuda", dtype=torch.bfloat16)
    assert out.numel() > 2**31
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # a launch on the wrong stream would be over before what comes next
        source.mul_(2)
        extension.add_weighted_rows_cuda(out, source, owned[:-1], owned[1:], index, coefficients)
    stream.synchronize()
    rows = torch.cat([owned.diff().topk(50).indices, keys[-50:]]).unique()
    assert not out[owned.diff() == 0].any()
    columns = slice(n - 64, n)
    for row in rows.tolist():
        j = slice(int(owned[row]), int(owned[row + 1]))
        right = (source[index[j], columns].double() * coefficients[j, None].double()).sum(0)
        scale = float(right.abs().max())
        torch.testing.assert_close(out[row, columns].double(), right, rtol=2**-8, atol=1e-5 * scale + 1e-4)

    part, few = out[:1000].clone(), owned[:1001]
    start, graph = part.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        extension.add_weighted_rows_cuda(part, source, few[:-1], few[1:], index, coefficients)
    graph.replay()
    by_torch = start.clone()
    sparse.add_weighted_rows(by_torch, source, few, index, coefficients, HeadOptions())
    torch.testing.assert_close(part, by_torch, rtol=2**-7, atol=1e-2)


@pytest.mark.usefixtures("device_code")
def test_weighted_rows_refuses_what_it_cannot_do():
    p = Problem(*(x.cuda() for x in make_problem(torch.float32, 8)))
    for wrong in (
        p._replace(out=p.out.T.contiguous().T),
        p._replace(source=p.source.double()),
        p._replace(ends=p.ends[:-1]),
        p._replace(index=p.index.int()),
        p._replace(coefficients=p.coefficients.cpu()),
    ):
        with pytest.raises(RuntimeError):
            extension.add_weighted_rows_cuda(*wrong)


BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("name", sorted({*NAMES, *BACKWARD} - {"tiny_workspace", "tiny_workspace_bf16"}))
def test_sparse(name, poisoned_memory):
    """Candidates and gradients of the specification on the same device."""
    case, grad_tol = BY_NAME[name], 0.2
    inputs = make_inputs(case, "cuda")
    head, upstream = inputs.head, upstream_of(inputs)
    token_logps, found = ops.sparse_forward(head, inputs.targets, case.options, grad_tol, "triton")
    expected, wanted = host.sparse_forward(head, inputs.targets, case.options, grad_tol, "reference")
    torch.testing.assert_close((token_logps, *found[:4]), (expected, *wanted[:4]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.weights.sum(-1), wanted.weights.sum(-1), rtol=1e-3, atol=1e-4)
    arguments = (head, inputs.targets, found, *upstream, case.options, grad_tol, inputs.needs)
    wanted = host.sparse_backward(*arguments, "reference")
    for x, y in zip(ops.sparse_backward(*arguments, "triton"), wanted):
        assert (x is None) == (y is None)
        if x is not None and x.numel():
            eps = 2**-6 if x.dtype != torch.float32 else 1e-3
            assert (x.double() - y.double()).norm() <= eps * y.double().norm()


def test_sparse_reads_nothing_back_and_repeats():
    inputs = big()
    with torch.no_grad():  # a trained model's rows: most are sure of an id
        rows = inputs.weight[inputs.targets.clamp(min=0)].float()
        sure = 14 * rows / rows.square().sum(-1, keepdim=True)
        inputs.hidden.copy_(torch.where((torch.arange(8192, device="cuda") % 10 > 0)[:, None], sure, inputs.hidden))
    leaves = (inputs.hidden, inputs.weight)

    def gradients():
        logps = linear_logps(*leaves, inputs.targets, grad_tol=0.02, impl="triton")
        return logps, *torch.autograd.grad((logps * inputs.d_token_logps.float()).sum(), leaves)

    once = gradients()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = gradients()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, once, again))
    results = sum(x.nbytes for x in again)
    extra = torch.cuda.max_memory_allocated() - before - results
    assert extra <= 2**28 + 4 * inputs.hidden.numel() + 2**26
    exact = linear_logps(*leaves, inputs.targets, impl="triton")
    exact = torch.autograd.grad((exact * inputs.d_token_logps.float()).sum(), leaves)
    for x, y in zip(again[1:], exact):
        assert (x.float() - y.float()).norm() <= 0.1 * y.float().norm()
