"""What users of other implementations have reported, at the op: small gradients of rows that are sure, inputs that are
read elsewhere too, logits of extreme size, Python floats, tied weights, and each subset of gradients on each path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compile_only import TILE_KERNELS, Row, as_on, launch_all
from torch import Tensor

from groupdpo_kernels import Objective, PreferenceGroups, linear_logp_stats, linear_logps, preference_loss, seq_logps
from groupdpo_kernels.reference import HeadOptions
from groupdpo_kernels.testing import Case, Inputs, check_budget, eager, error, exact, make_inputs, run, triton_on_cpu

IMPLS = ("reference", "cpu", "triton")
by_impl = pytest.mark.parametrize("impl", IMPLS)


@contextlib.contextmanager
def able(impl: str) -> Iterator[None]:
    """Within it the implementation runs on CPU tensors."""
    with triton_on_cpu() if impl == "triton" else contextlib.nullcontext():
        yield


def stats_by(impl: str, *arguments: Any) -> Any:
    """linear_logp_stats in the shape that testing.run wants."""
    h, w, y, b, low_rank, o = arguments
    options = {name: getattr(o, name) for name in ("logit_scale", "softcap", "temperature", "workspace_bytes")}
    return linear_logp_stats(h, w, y, b, low_rank=low_rank, outputs=("lse",), impl=impl, **options)


def within_budget(inputs: Inputs, case: Case, impl: str) -> None:
    with able(impl):
        result = run(functools.partial(stats_by, impl), inputs, case.options)
    check_budget(result, inputs, case.options)


def draw(*shape: int, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


# ---------------------------------------------------------------------------------------------- a target that is sure


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
@by_impl
def test_the_gradient_at_a_target_of_high_probability(impl: str, p: float, frozen: bool) -> None:
    """In bfloat16, where 0.999 rounds to 1, the gradient 1 - p at the target must not be formed from a rounded p. The
    head is the identity, so d_hidden is the gradient of the logits.
    """
    T = V = 64
    logits = draw(T, V)
    targets = torch.arange(T)
    others = logits.masked_fill(torch.eye(T, dtype=torch.bool), -torch.inf)
    logits[targets, targets] = others.logsumexp(1) + torch.tensor(p / (1 - p)).log()
    hidden, head = logits.bfloat16(), torch.eye(V).bfloat16()
    g = draw(T, seed=1).abs() + 0.1

    def gradients(logps_of: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        h, w = hidden.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(not frozen)
        logps = logps_of(h, w)
        assert abs(float(logps.detach().exp().median()) - p) < 0.1 * (1 - p)
        found = torch.autograd.grad((logps * g).sum(), (h,) if frozen else (h, w))
        return tuple(x.double() for x in found)

    def by_logits(h: Tensor, w: Tensor) -> Tensor:
        z = h @ w.T
        return (z if z.dtype == torch.float64 else z.float()).log_softmax(-1).diagonal()

    with able(impl):
        ours = gradients(lambda h, w: linear_logps(h, w, targets, impl=impl), torch.bfloat16)
    peers, truths = gradients(by_logits, torch.bfloat16), gradients(by_logits, torch.float64)
    for mine, peer, truth in zip(ours, peers, truths):
        at_target = (slice(None),) if mine.shape != (T, V) else (targets, targets)
        mine, peer, truth = mine[at_target], peer[at_target], truth[at_target]

        def relative(x: Tensor, truth: Tensor = truth) -> Tensor:
            return ((x - truth) / truth).abs().max()

        assert relative(mine) <= 2 * max(relative(peer), relative(truth.bfloat16().double()))


# ------------------------------------------------------------------------------------- inputs that others read as well

PATHS: dict[str, dict[str, Any]] = {
    "exact": {},
    "everything": {"softcap": 5.0, "logit_scale": 1.3, "temperature": 0.8},
    "frozen": {},
    "sparse": {"grad_tol": 1e-3},
    "wide": {},  # the C++ op keeps products of the forward from D = 1024 on
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("path", PATHS)
@by_impl
def test_inputs_keep_their_values(impl: str, path: str, dtype: torch.dtype) -> None:
    """Nothing is written into hidden, which is the output of a tanh (whose backward reads it) and of which an auxiliary
    loss is taken too, nor into the head, the targets or the gradient that comes in."""
    T, D, V = 12, 1024 if path == "wide" else 24, 40
    x, w, b = draw(T, D, dtype=dtype), draw(V, D, scale=D**-0.5, seed=1, dtype=dtype), draw(V, seed=2, dtype=dtype)
    targets = torch.arange(T) % V
    targets[::4] = -100
    g = draw(T, seed=3)
    plain = {name: value for name, value in PATHS[path].items() if name != "grad_tol"}

    def gradients(logps_of: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [each.to(dtype).requires_grad_(i == 0 or path != "frozen") for i, each in enumerate((x, w, b))]
        hidden = torch.tanh(leaves[0])
        others = [*leaves, hidden, targets, g]
        before = [each.detach().clone() for each in others]
        auxiliary = hidden.square().sum()  # its backward reads hidden
        logps = logps_of(hidden, leaves[1], leaves[2])
        assert all(map(torch.equal, others, before))
        upstream = g.clone().to(logps.dtype)
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad((logps, auxiliary), trained, (upstream, torch.ones_like(auxiliary)))
        assert all(map(torch.equal, others, before)) and torch.equal(upstream, g.to(logps.dtype))
        return list(found)

    def by_logits(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return eager(h, w, targets, b, None, HeadOptions(**plain)).token_logps

    with able(impl):
        ours = gradients(
            lambda *head: linear_logps(head[0], head[1], targets, head[2], impl=impl, **PATHS[path]), dtype
        )
    truths, peers = gradients(by_logits, torch.float64), gradients(by_logits, dtype)
    allowed = PATHS[path].get("grad_tol", 0.0)
    for mine, peer, truth in zip(ours, peers, truths):
        rounding = error(truth.to(dtype), truth)
        assert error(mine, truth) <= 2 * max(error(peer, truth), rounding, 1e-6) + 10 * allowed


# -------------------------------------------------------------------------------------------- logits of extreme size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@by_impl
def test_all_logits_far_below_zero(impl: str, dtype: torch.dtype) -> None:
    """Where all logits are -1e4 each token has probability 1 / V, and no zero of a tile's padding outweighs them. The
    product may make them so, or the bias.
    """
    V = 300
    hidden, weight = torch.full((5, 16), -100.0, dtype=dtype), torch.full((V, 16), 6.25, dtype=dtype)
    targets = torch.tensor([0, 255, 256, 298, 299])
    with able(impl):
        by_product = linear_logps(hidden, weight, targets, impl=impl)
        bias = torch.full((V,), -1e4, dtype=dtype)
        by_bias = linear_logps(torch.zeros_like(hidden), weight, targets, bias, impl=impl)
    expected = -torch.tensor(float(V)).log().expand(5)
    torch.testing.assert_close(by_product, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(by_bias, expected, rtol=1e-6, atol=0)
    case = Case("far below", 20, 32, V, "", dtype, bias=True, shift=-1e4)
    within_budget(make_inputs(case), case, impl)


@by_impl
def test_hidden_states_of_scale_thirty_in_bfloat16(impl: str) -> None:
    """Some targets are sure, others have log-probabilities under -100; a row's gradient is of few entries."""
    case = Case("thirty", 40, 64, 300, "", torch.bfloat16, hidden_scale=30.0)
    inputs = make_inputs(case)
    assert float(exact(inputs, case.options)["token_logps"].min()) < -100
    within_budget(inputs, case, impl)


# ------------------------------------------------------------------------------------------------- Python floats

FLOATS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 2, "softcap": 30, "logit_scale": 1},  # ints, of which Triton makes constants where they are 1
    {"temperature": 0.7, "softcap": 7.3, "logit_scale": 0.1},
]


@pytest.mark.parametrize("options", FLOATS, ids=lambda options: " ".join(options))
def test_python_floats_reach_the_kernels(options: dict[str, Any]) -> None:
    """Inductor's kernels take a Python float as float64, and a compiled graph may make a constant of it: neither may
    change what the kernels compute.
    """
    torch._dynamo.reset()
    case = Case("floats", 12, 16, 50, "", bias=True, **options)
    inputs = make_inputs(case)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logps = linear_logps(torch.tanh(hidden), weight, inputs.targets, bias, impl="triton", **options)
        return (logps * inputs.d_token_logps.float()).sum()

    leaves = list(inputs.leaves.values())
    results = []
    with able("triton"):
        for function in (loss, torch.compile(loss, backend="inductor", fullgraph=True)):
            value = function(*leaves)
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    within_budget(inputs, case, "triton")


@pytest.mark.parametrize("loss", ["simpo", "mpo", "discopop"])
def test_python_floats_reach_the_kernels_of_a_loss(loss: str) -> None:
    """The options of an objective, ints among them, reach the kernels in a compiled graph as they do outside one."""
    torch._dynamo.reset()
    logps, offsets = draw(12).abs().neg().requires_grad_(), torch.tensor([0, 2, 5, 6, 12])
    groups, reference = PreferenceGroups.from_lists([[True, False], [True, False]]), torch.linspace(-6, -3, 4)
    objective = Objective(loss, beta=2, gamma=0.3, tau=0.7, nll_weight=1)  # type: ignore[arg-type]

    def value(logps: Tensor, impl: str) -> Tensor:
        return preference_loss(logps, offsets, groups, objective, reference, impl=impl).loss

    compiled = torch.compile(value, backend="inductor", fullgraph=True)
    with able("triton"):
        results = [
            (x.detach(), *torch.autograd.grad(x, logps)) for x in (value(logps, "triton"), compiled(logps, "triton"))
        ]
    expected = value(logps.double(), "reference")
    for found, gradient in results:
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            gradient, *torch.autograd.grad(expected, logps, retain_graph=True), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("sparse", [False, True], ids=["exact", "sparse"])
def test_python_floats_are_float32_arguments(sparse: bool) -> None:
    """As constants they would compile anew for each value; float64 is slow on most GPUs."""
    with as_on("sm_90", build=False) as compilations:
        for everything in (False, True):
            launch_all(Row("sm_90", "bf16", everything, sparse=sparse), T=48, D=128, V=4099)
    keys = compilations  # of what is not built, the key
    assert keys and not any("('fp64'," in key for _, key in keys)
    tiles = {"linear_logps_bwd_kernel", "visit_kernel"} if sparse else set(TILE_KERNELS)
    assert tiles <= {name for name, _ in keys}
    assert all(key.count("('fp32', None)") >= 2 for name, key in keys if name in tiles)  # scale and cap, 1.0 included


# --------------------------------------------------------------------------------------- tied weights; subsets of grads


@by_impl
def test_an_embedding_that_is_the_head_too(impl: str) -> None:
    """Its gradient is the sum of both uses; and hidden may be a view of the head's own memory."""
    V, D, T = 40, 24, 12
    ids, targets, g = torch.arange(T) * 3 % V, torch.arange(T) * 7 % V, draw(T, seed=3)

    def gradient(logps_of: Any, dtype: torch.dtype, view: bool) -> Tensor:
        table = draw(V, D).to(dtype).requires_grad_()
        hidden = table[:T] if view else torch.tanh(table[ids])
        (found,) = torch.autograd.grad((logps_of(hidden, table) * g).sum(), table)
        return found

    def by_logits(h: Tensor, w: Tensor) -> Tensor:
        return (h @ w.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    for view in (False, True):
        with able(impl):
            ours = gradient(lambda h, w: linear_logps(h, w, targets, impl=impl), torch.float32, view)
        truth, peer = gradient(by_logits, torch.float64, view), gradient(by_logits, torch.float32, view)
        assert error(ours, truth) <= 2 * max(error(peer, truth), 2**-24)


SUBSETS = [needs for needs in itertools.product([False, True], repeat=3) if any(needs) and not all(needs)]


@pytest.mark.parametrize("path", ["exact", "sparse", "wide"])
@by_impl
def test_each_subset_of_gradients_is_that_of_all(impl: str, path: str) -> None:
    """Whichever of hidden, weight and bias need a gradient, each gets the one that it gets beside the others: where
    products are kept, where the head is frozen (the forward then holds the derivative), and under a tolerance. The
    frozen head's rounding is its own; elsewhere the bits are the same.
    """
    case = Case("subset", 10, 1024 if path == "wide" else 24, 300, "", bias=True, hidden_scale=3.0)
    options: dict[str, Any] = {"grad_tol": 1e-6} if path == "sparse" else {}
    inputs = make_inputs(case)
    inputs = dataclasses.replace(inputs, d_lse=torch.zeros_like(inputs.d_lse))
    leaves = {name: x.detach() for name, x in inputs.leaves.items()}

    def gradients(*needs: bool) -> dict[str, Tensor]:
        given = {name: x.clone().requires_grad_(n) for (name, x), n in zip(leaves.items(), needs)}
        logps = linear_logps(given["hidden"], given["weight"], inputs.targets, given["bias"], impl=impl, **options)
        trained = {name: x for name, x in given.items() if x.requires_grad}
        found = torch.autograd.grad((logps * inputs.d_token_logps.float()).sum(), list(trained.values()))
        return dict(zip(trained, found))

    with able(impl):
        whole = gradients(True, True, True)
        for needs in SUBSETS[1::2] if impl == "triton" else SUBSETS:  # an interpreted tile is slow
            frozen = needs == (True, False, False)
            for name, found in gradients(*needs).items():
                if frozen:
                    check_budget({f"d_{name}": found}, inputs, case.options)
                else:
                    assert torch.equal(found, whole[name]), (name, needs)


@pytest.mark.parametrize("path", ["exact", "frozen", "sparse", "wide"])
@by_impl
def test_a_graph_that_is_kept_gives_the_same_gradients_again(impl: str, path: str) -> None:
    """The caller may write over those of the first time: none of them is what the graph has saved."""
    case = Case("again", 12, 1024 if path == "wide" else 24, 300, "", bias=True, hidden_scale=4.0)
    inputs = make_inputs(case)
    weight = inputs.weight.detach() if path == "frozen" else inputs.weight
    bias = None if path == "frozen" else inputs.bias
    trained = [x for x in (inputs.hidden, weight, bias) if x is not None and x.requires_grad]
    with able(impl):
        logps = linear_logps(inputs.hidden, weight, inputs.targets, bias, impl=impl, **PATHS[path])
        found = []
        for _ in range(2):
            gradients = torch.autograd.grad(logps, trained, inputs.d_token_logps.float(), retain_graph=True)
            found.append([x.clone() for x in gradients])
            for x in gradients:
                x.fill_(torch.nan)
    assert all(map(torch.equal, *found))


@by_impl
def test_a_tolerance_above_zero_without_a_head_to_train(impl: str) -> None:
    """Frozen and trained heads agree within the tolerance, here on the gradient of sums over sequences."""
    case = Case("sums", 12, 24, 300, "", hidden_scale=6.0, ignored="none")
    inputs, offsets = make_inputs(case), torch.tensor([0, 5, 12])
    found = []
    with able(impl):
        for trained in (False, True):
            hidden = inputs.hidden.detach().requires_grad_()
            weight = inputs.weight.detach().requires_grad_(trained)
            logps = linear_logps(hidden, weight, inputs.targets, impl=impl, grad_tol=1e-4)
            found.append(torch.autograd.grad((seq_logps(logps, offsets) * torch.tensor([1.0, -2.0])).sum(), hidden)[0])
    assert error(found[0], found[1].double()) < 1e-3
