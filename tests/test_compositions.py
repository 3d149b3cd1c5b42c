"""Every public function under what PyTorch does to functions: it works, to the bit, or is refused in words.

docs/project/compositions.md has the table, which is held to WORKS and REFUSED here. What inductor compiles is marked
`compositions`, since each takes seconds.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import batch, make
from torch import Tensor
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh
from torch.library import opcheck
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from groupdpo_kernels import (
    Objective,
    PreferenceGroups,
    PreferenceWeights,
    explain,
    group_backward,
    linear_logp_stats,
    linear_logps,
    model_logps,
    preference_loss,
    seq_logps,
)
from groupdpo_kernels.lm_head import host
from groupdpo_kernels.lm_head.extension import cpu_op
from groupdpo_kernels.preference.fused import LossSpec
from groupdpo_kernels.preference.losses import LOSSES
from groupdpo_kernels.testing import Case, make_inputs, triton_on_cpu

ROOT = Path(__file__).resolve().parent.parent
INPUTS = make_inputs(Case("", 24, 16, 60, "", bias=True, R=3))
WEIGHT, TARGETS = INPUTS.weight.detach(), INPUTS.targets
OFFSETS, GROUPS = torch.tensor([0, 5, 11, 18, 24]), PreferenceGroups.pairs(2)
REFERENCE = torch.zeros(4)
SPEC = LossSpec("mpo", 0.1, False, False, 0.0, 0.0, 0.0, 0.0, 0.05, 0.0, False, False)
BATCH = batch()
Function = Callable[[Tensor], Tensor]
Transform = Callable[[Function, Tensor], Tensor]


# -------------------------------------------------------------------------------------------------------- the functions


@cache
def model() -> Any:
    return make("llama")


def embeddings() -> Tensor:
    return model().get_input_embeddings()(BATCH["input_ids"]).detach()


def trained(hidden: Tensor, **options: Any) -> Tensor:
    """The head gets a gradient too, and it comes back through hidden."""
    return linear_logps(hidden, WEIGHT + 0 * hidden.sum(), TARGETS, **options)


def statistics(hidden: Tensor) -> Tensor:
    found = linear_logp_stats(hidden, WEIGHT + 0 * hidden.sum(), TARGETS)
    assert found.lse is not None and found.entropy is not None
    return found.token_logps + found.lse + found.entropy


def loss(token_logps: Tensor) -> Tensor:
    return preference_loss(token_logps, OFFSETS, GROUPS, Objective("mpo"), REFERENCE).loss


def fused(token_logps: Tensor) -> Tensor:
    return PreferenceWeights.apply(token_logps, None, OFFSETS, GROUPS.cu_groups, GROUPS.positive, SPEC, 2)[0]


def of_model(inputs_embeds: Tensor) -> Tensor:
    return model_logps(
        model(), None, BATCH["targets"], inputs_embeds=inputs_embeds, attention_mask=BATCH["attention_mask"]
    )


def hidden() -> Tensor:
    return INPUTS.hidden.detach()


def logps() -> Tensor:
    return -torch.rand(24, generator=torch.Generator().manual_seed(0))


FUNCTIONS: dict[str, tuple[Function, Callable[[], Tensor]]] = {
    "linear_logps": (trained, hidden),
    "linear_logps, head frozen": (lambda x: linear_logps(x, WEIGHT, TARGETS), hidden),
    "linear_logps, grad_tol": (partial(trained, grad_tol=0.01), hidden),
    "linear_logp_stats": (statistics, hidden),
    "seq_logps": (lambda x: seq_logps(x, OFFSETS), logps),
    "preference_loss": (loss, logps),
    "PreferenceWeights": (fused, logps),
    "model_logps": (of_model, embeddings),
}
by_function = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.fixture(autouse=True)
def interpreted(request: pytest.FixtureRequest) -> Iterator[None]:
    """PreferenceWeights has Triton kernels alone. The others run as they do on a CPU."""
    named = getattr(request.node, "callspec", None)
    with triton_on_cpu() if named and "PreferenceWeights" in named.params.values() else contextlib.nullcontext():
        yield


# ------------------------------------------------------------------------------------------------------ what they stand


def gradient(f: Function, x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    f(x).sum().backward()
    assert x.grad is not None
    return x.grad


def total(f: Function) -> Function:
    return lambda x: f(x).sum()


def rows_of_jacobian(compute: Callable[..., Any]) -> Transform:
    """The sum over the rows is the gradient of the sum."""

    def transform(f: Function, x: Tensor) -> Tensor:
        out = f(x)
        return compute(f, x).reshape(-1, *x.shape).sum(0).reshape(x.shape) if out.dim() else compute(f, x)

    return transform


def within(context: Callable[[], Any]) -> Transform:
    def transform(f: Function, x: Tensor) -> Tensor:
        with context():
            return gradient(f, x)

    return transform


@contextlib.contextmanager
def changed(setting: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    setting(value)
    try:
        yield
    finally:
        setting(before)


class Named(Tensor):
    """A subclass that adds nothing."""


class Wrapped(Tensor):
    """A subclass that holds a tensor and runs every operation on it."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        found = Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)
        found.inner = inner
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Wrapped) else x, (args, kwargs or {}))
        return tree_map(lambda x: Wrapped(x) if isinstance(x, Tensor) else x, func(*args, **kwargs))


def of_wrapped(f: Function, x: Tensor) -> Tensor:
    leaf = Wrapped(x.clone()).requires_grad_()
    (found,) = torch.autograd.grad(f(leaf).sum(), leaf)
    return found.inner


def of_named(f: Function, x: Tensor) -> Tensor:
    assert type(f(x.as_subclass(Named))) is Named
    return gradient(f, x.as_subclass(Named)).as_subclass(Tensor)


def twice_through_one_graph(f: Function, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    out = f(leaf).sum()
    out.backward(retain_graph=True)
    out.backward()
    assert leaf.grad is not None
    return leaf.grad / 2


def compiled(f: Function, x: Tensor, backend: str = "aot_eager") -> Tensor:
    torch._dynamo.reset()
    found = gradient(torch.compile(f, backend=backend, fullgraph=True), x)
    torch._dynamo.reset()
    return found


# What gives the gradient of eager code.
WORKS: dict[str, Transform] = {
    "`torch.func.grad`": lambda f, x: torch.func.grad(total(f))(x),
    "`torch.func.vjp`": lambda f, x: torch.func.vjp(total(f), x)[1](torch.ones(()))[0],
    "`torch.func.jacrev`": rows_of_jacobian(lambda f, x: torch.func.jacrev(f)(x)),
    "`autograd.functional.jacobian`": rows_of_jacobian(torch.autograd.functional.jacobian),
    "checkpoint": lambda f, x: gradient(lambda y: checkpoint(f, y, use_reentrant=False), x),
    "reentrant checkpoint": lambda f, x: gradient(lambda y: checkpoint(f, y, use_reentrant=True), x),
    "`save_on_cpu`": within(torch.autograd.graph.save_on_cpu),
    "saved tensors' hooks": within(
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy(), torch.from_numpy)
    ),
    "anomaly mode": within(torch.autograd.detect_anomaly),
    "default dtype float64": within(lambda: changed(torch.set_default_dtype, torch.float64, torch.float32)),
    "default device meta": within(lambda: changed(torch.set_default_device, "meta", None)),
    "deterministic algorithms": within(lambda: changed(torch.use_deterministic_algorithms, True, False)),
    "`retain_graph`": twice_through_one_graph,
    "a plain subclass": of_named,
    "a wrapper subclass": of_wrapped,
    "`torch.compile`": compiled,
}
# What is refused: (how it is asked for, the words). They are torch's, but for those of vmap.
REFUSED: dict[str, tuple[Callable[[Function, Tensor], Any], str]] = {
    "`torch.vmap`": (lambda f, x: torch.vmap(f)(torch.stack((x, x))), "torch.vmap does not go through"),
    "forward mode (`jvp`, `jacfwd`)": (
        lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
        "You must implement the jvp function",
    ),
    "`torch.func.hessian`": (lambda f, x: torch.func.hessian(total(f))(x), "You must implement the jvp function"),
    "`torch.func.functionalize`": (
        lambda f, x: torch.func.functionalize(f)(x),
        "Functionalize rule for custom_function_call",
    ),
    "a second backward": (lambda f, x: second(f, x), "once_differentiable"),
}
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"  # what a model refuses first
# Where a function is not as the others: the words, or "" where it works.
UNLIKE: dict[tuple[str, str], str] = {
    ("model_logps", "forward mode (`jvp`, `jacfwd`)"): ATTENTION,
    ("model_logps", "`torch.func.hessian`"): ATTENTION,
    ("model_logps", "a second backward"): ATTENTION,
    ("model_logps", "a wrapper subclass"): "",
    ("model_logps", "`torch.compile`"): "Unsupported",
    ("seq_logps", "a second backward"): "",
    ("preference_loss", "a second backward"): "",
}


def second(f: Function, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf).square().sum(), leaf, create_graph=True)
    first.square().sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@by_function
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Anomaly Detection")
def test_what_works_gives_the_gradient_of_eager_code(name: str) -> None:
    """To the bit; of a model, whose own layers round otherwise under some, up to rounding."""
    f, make_input = FUNCTIONS[name]
    x = make_input()
    expected = gradient(f, x)
    assert expected.abs().max() > 0
    for transform, apply in WORKS.items():
        if words := UNLIKE.get((name, transform)):
            with pytest.raises(Exception) as raised:
                apply(f, x)
            assert words in f"{raised.type.__name__}: {raised.value}"
            continue
        found = apply(f, x)
        exact = name != "model_logps" and "jac" not in transform
        torch.testing.assert_close(
            found,
            expected,
            rtol=0 if exact else 1e-4,
            atol=0 if exact else 1e-5,
            msg=lambda m, t=transform: f"{t}: {m}",
        )
        assert found.dtype == expected.dtype


@by_function
def test_what_is_refused_says_so(name: str) -> None:
    f, make_input = FUNCTIONS[name]
    for transform, (apply, usual) in REFUSED.items():
        words = UNLIKE.get((name, transform), usual)
        if not words:
            assert apply(f, make_input()).abs().max() > 0
            continue
        with pytest.raises((RuntimeError, NotImplementedError), match=re.escape(words)):
            apply(f, make_input())


@by_function
def test_values_without_gradients(name: str) -> None:
    f, make_input = FUNCTIONS[name]
    x = make_input()
    expected = f(x.clone().requires_grad_()).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            inside = make_input()
            found = f(inside)
        assert not found.requires_grad and torch.equal(found, f(inside))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # a graph may take another path


@by_function
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """Results stay float32, and gradients have the dtype of their input."""
    f, make_input = FUNCTIONS[name]
    x, expected = make_input(), gradient(f, make_input())
    with torch.autocast("cpu", dtype):
        assert f(x).dtype == torch.float32
        found = gradient(f, x)
    assert found.dtype == x.dtype
    if name != "linear_logps, grad_tol":  # its gradient is within a tolerance of its own
        assert (found - expected).norm() < 0.05 * expected.norm()


# ------------------------------------------------------------------------------------------------------ in float64


def objective_of(name: str) -> Objective:
    return Objective(name, beta=0.4, label_smoothing=0.1 if name == "exo_pair" else 0.0)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck_of_losses(name: str) -> None:
    """First and second derivatives, by differences, without the fused kernel."""
    objective = objective_of(name)
    reference = torch.zeros(4).double() if objective.needs_reference else None

    def loss(token_logps: Tensor) -> Tensor:
        return preference_loss(token_logps, OFFSETS, GROUPS, objective, reference, impl="reference").loss

    leaf = logps().double().requires_grad_()
    assert torch.autograd.gradcheck(loss, leaf)
    assert torch.autograd.gradgradcheck(loss, leaf)


@pytest.mark.parametrize("path", [{}, {"softcap": 5.0, "temperature": 0.7, "logit_scale": 1.3}], ids=["plain", "all"])
def test_gradcheck_of_a_head(path: dict[str, Any]) -> None:
    inputs = make_inputs(Case("", 5, 6, 11, "", bias=True, R=2)).to(torch.float64)

    def values(*leaves: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(inputs.leaves, leaves))
        low_rank = (named["low_rank_hidden"], named["low_rank_weight"])
        head = (named["hidden"], named["weight"], inputs.targets, named["bias"])
        found = linear_logp_stats(*head, low_rank=low_rank, **path)
        assert found.lse is not None and found.entropy is not None
        return found.token_logps, found.lse, found.entropy, linear_logps(*head, low_rank=low_rank, **path)

    assert torch.autograd.gradcheck(values, tuple(inputs.leaves.values()))


# --------------------------------------------------------------------------------------------------- spread over ranks


@pytest.fixture
def spread() -> Iterator[Callable[[Tensor], Tensor]]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield lambda x: distribute_tensor(x.detach(), mesh, [Replicate()])
    dist.destroy_process_group()


def test_tensors_that_are_no_plain_ones_are_refused_by_name(spread: Any) -> None:
    h, t, ids = hidden(), logps(), BATCH["input_ids"]
    weights = partial(PreferenceWeights.apply, spec=SPEC, max_group=2)
    refused: dict[str, list[Callable[[Any], Any]]] = {
        "hidden": [lambda to, f=f: f(to(h), WEIGHT, TARGETS) for f in (linear_logps, linear_logp_stats, explain)],
        "weight": [lambda to: linear_logps(h, to(WEIGHT), TARGETS)],
        "targets": [
            lambda to: linear_logps(h, WEIGHT, to(TARGETS)),
            lambda to: model_logps(model(), ids, to(BATCH["targets"])),
        ],
        "bias": [lambda to: linear_logps(h, WEIGHT, TARGETS, to(torch.zeros(60)))],
        "low_rank[1]": [
            lambda to: linear_logps(h, WEIGHT, TARGETS, low_rank=(torch.zeros(24, 2), to(torch.zeros(60, 2))))
        ],
        "token_logps": [
            lambda to: seq_logps(to(t), OFFSETS),
            lambda to: preference_loss(to(t), OFFSETS, GROUPS, Objective("mpo"), REFERENCE),
            lambda to: weights(to(t), None, OFFSETS, GROUPS.cu_groups, GROUPS.positive),
            lambda to: group_backward([0], lambda _: (to(t), OFFSETS), GROUPS, Objective("mpo"), REFERENCE),
        ],
        "cu_seqlens": [lambda to: seq_logps(t, to(OFFSETS))],
        "ref_logps": [lambda to: preference_loss(t, OFFSETS, GROUPS, Objective("mpo"), to(REFERENCE))],
    }
    for name, calls in refused.items():
        for call in calls:
            words = re.escape(f"{name} must be a tensor of this rank") + ".*; got a DTensor"
            with pytest.raises(TypeError, match=words):
                call(spread)
    for change, got in ((Tensor.to_sparse, "torch.sparse_coo"), (Tensor.to_mkldnn, "torch._mkldnn")):
        with pytest.raises(TypeError, match=f"hidden must be a dense tensor; got one with layout {got}"):
            linear_logps(change(h), WEIGHT, TARGETS)


# -------------------------------------------------------------------------------------------------------------- opcheck


CPU_OPS = {
    f"{name}_cpu"
    for name in ("linear_logps_forward", "linear_logps_backward", "frozen_head", "sparse_forward", "add_weighted_rows")
}
GPU_OPS = {"add_weighted_rows_cuda"}  # it has no other device


def test_the_schemas_of_the_cpp_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they write to and what they return is what their schemas say. They are called within other ops alone, where
    no dispatch mode sees them."""
    calls: list[tuple[str, tuple[Any, ...]]] = []

    def recorded(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append((name, tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)))
            return cpu_op(name)(*args)

        return call

    monkeypatch.setattr(host, "cpu_op", recorded)
    inputs = make_inputs(Case("", 40, 32, 90, "", bias=True, R=3))
    head = (inputs.hidden, inputs.weight, inputs.targets, inputs.bias)
    for options in ({}, {"grad_tol": 2.0**-7}):
        for frozen in (False, True):
            weight, bias = (x.detach() if frozen else x for x in (inputs.weight, inputs.bias))  # type: ignore[union-attr]
            linear_logps(head[0], weight, head[2], bias, impl="cpu", **options).sum().backward()
    assert {name for name, _ in calls} == CPU_OPS
    for name, arguments in calls:
        op = getattr(torch.ops.groupdpo_kernels, name).default
        opcheck(op, arguments, test_utils=("test_schema", "test_autograd_registration"))


def test_every_op_has_an_opcheck() -> None:
    """A new op needs one: what traces and compiles an op goes by what it says of itself."""
    names = {name.removeprefix("groupdpo_kernels::") for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("groupdpo_kernels::")}  # fmt: skip
    asked = r"opcheck\(\s*torch\.ops\.groupdpo_kernels\.(\w+)"
    checked = {name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(asked, path.read_text())}
    assert names and names - checked == CPU_OPS | GPU_OPS


# ------------------------------------------------------------------------------------------------------------- inductor


def check_inductor(f: Function, sizes: list[Tensor]) -> None:
    """One graph for every size, forward and backward, and without gradients; up to rounding."""
    torch._dynamo.reset()
    fast = torch.compile(f, backend="inductor", fullgraph=True)
    for x in sizes:
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(gradient(fast, x), gradient(f, x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(fast(sizes[-1]), f(sizes[-1]), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.compositions
@pytest.mark.parametrize("name", LOSSES)
def test_inductor_losses(name: str) -> None:
    objective = objective_of(name)
    reference = REFERENCE if objective.needs_reference else None

    def loss(token_logps: Tensor) -> Tensor:
        offsets = torch.cat([OFFSETS[:-1], torch.full((1,), token_logps.shape[0])])
        return preference_loss(token_logps, offsets, GROUPS, objective, reference).loss

    check_inductor(loss, [-torch.rand(T) for T in (24, 31)])


@pytest.mark.compositions
@pytest.mark.parametrize(
    "name", ["seq_logps", "linear_logps", "head frozen", "grad_tol", "linear_logp_stats", "PreferenceWeights"]
)
def test_inductor_functions(name: str) -> None:
    weight = WEIGHT.clone()

    def head(hidden: Tensor, **options: Any) -> Tensor:
        targets = torch.arange(hidden.shape[0]) % 60
        train = weight if options.pop("frozen", False) else weight + 0 * hidden.sum()
        if options.pop("stats", False):
            found = linear_logp_stats(hidden.tanh(), train, targets, **options)
            assert found.lse is not None
            return found.token_logps + found.lse
        return linear_logps(hidden.tanh(), train, targets, **options)

    functions: dict[str, Function] = {
        "seq_logps": lambda x: seq_logps(x, torch.cat([OFFSETS[:-1], torch.full((1,), x.shape[0])])).square(),
        "linear_logps": head,
        "head frozen": partial(head, frozen=True),
        "grad_tol": partial(head, grad_tol=0.01),
        "linear_logp_stats": partial(head, stats=True),
        "PreferenceWeights": fused,
    }
    if name == "PreferenceWeights":
        return check_inductor(functions[name], [logps()])
    rows = (24, 31)
    sizes = [-torch.rand(T) if name == "seq_logps" else torch.randn(T, 16) for T in rows]
    check_inductor(functions[name], sizes)


@pytest.mark.compositions
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_caller_of_a_model(backend: str) -> None:
    """The graph breaks at model_logps, whose model runs eagerly; layers compiled by themselves stay so."""
    torch._dynamo.reset()
    fast = torch.compile(lambda x: of_model(x.tanh()) * 2, backend=backend)
    x = embeddings()
    torch.testing.assert_close(gradient(fast, x), gradient(lambda y: of_model(y.tanh()) * 2, x), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------------- the page


def table() -> list[str]:
    columns = list(FUNCTIONS)
    lines = ["| |" + "".join(f" {name.replace('_', chr(92) + '_')} |" for name in columns)]
    lines.append("|---|" + "---|" * len(columns))
    for transform in (*WORKS, *REFUSED):
        cells = []
        for name in columns:
            words = UNLIKE.get((name, transform), "" if transform in WORKS else "no")
            cells.append(" no |" if words else " yes |")
        lines.append(f"| {transform} |" + "".join(cells))
    return lines


def test_the_page_has_what_is_tested() -> None:
    page = (ROOT / "docs/project/compositions.md").read_text()
    assert "\n".join(table()) in page, "\n".join(table())
    for words in {words for _, words in REFUSED.values()} | {ATTENTION}:
        assert words in page, words
