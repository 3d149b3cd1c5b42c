"""The torch.library ops of an LM head, with their schemas and fake functions. They need torch alone; a kernel is
imported when an op first runs it.

`groupdpo_kernels::linear_logps_forward` and `groupdpo_kernels::linear_logps_backward` carry the name of an
implementation as their last argument and resolve "auto" on the real tensors, so a traced graph holds one opaque op and
tracing never looks at devices or versions. Neither has an autograd formula: only the Functions in autograd.py need one,
and a double backward raises instead of being silently wrong.

Every lse that goes into or comes out of an op is float64 (reference.log_probs says why).

Values inside CPU tensors are checked (a wrong target id is a ValueError). On a GPU nothing is read back, and a wrong id
gives NaN.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import astuple

import torch
from torch import Tensor

from ..reference import Head, HeadGradients, HeadOptions, LogpStats
from . import host, sparse
from .extension import extension_why_not, warn_of_the_slow_path
from .implementations import check_tail, cpu_why_not, resolve
from .sparse import Candidates

_LIBRARY = torch.library.Library("groupdpo_kernels", "FRAGMENT")

# csrc/binding.cpp registers these C++ ops for the CPU key. Their callers pass live rows and valid ids only.
HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? low_rank_hidden, Tensor? low_rank_weight, Tensor targets"
_MAP = "float logit_scale, float? softcap, float temperature"
_NEEDS = (
    "bool needs_hidden, bool needs_weight, bool needs_bias, bool needs_low_rank_hidden, bool needs_low_rank_weight,"
    " bool needs_mass"
)
_SIX, _SEVEN = (f"({', '.join(['Tensor'] * n)})" for n in (6, 7))
_LIBRARY.define(
    f"linear_logps_forward_cpu({HEAD}, {_MAP}, int workspace_bytes, bool stats, Tensor(a!)? products=None) -> {_SIX}"
)
_LIBRARY.define(
    f"linear_logps_expectations_cpu({HEAD}, Tensor? target_logits, {_MAP}, int workspace_bytes, float grad_tol,"
    f" float least) -> {_SEVEN}"
)
_LIBRARY.define(
    f"linear_logps_candidates_cpu({HEAD}, Tensor target_logits, {_MAP}, int workspace_bytes, float least, int most,"
    f" int? seed) -> {_SEVEN}"
)
_LIBRARY.define(
    "add_weighted_rows_cpu(Tensor(a!) out, Tensor source, Tensor owned, Tensor index, Tensor coefficients) -> ()"
)
_LIBRARY.define(
    f"linear_logps_backward_cpu({HEAD}, Tensor lse, Tensor d_target, Tensor d_softmax, {_MAP},"
    f" int workspace_bytes, {_NEEDS}, Tensor? products=None) -> {_SIX}"
)


# -------------------------------------------------------------------------------------------------------------- the ops


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """A context that turns autocast off, so that it does not narrow the float32 arithmetic inside an op."""
    with contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False):
        yield


OPTIONS = "float logit_scale, float? softcap, float temperature, int ignore_index, int workspace_bytes"


@torch.library.custom_op(
    "groupdpo_kernels::linear_logps_forward",
    mutates_args=(),
    schema=f"({HEAD}, {OPTIONS}, bool stats, str impl) -> {_SIX}",
)
def _linear_logps_forward(hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, *rest):
    *options, stats, impl = rest
    head = Head(hidden, weight, bias, low_rank_hidden, low_rank_weight)
    if impl == "auto" and cpu_why_not(hidden, weight) == extension_why_not() != []:
        warn_of_the_slow_path()  # only the extension is missing for the C++ op
    impl = resolve(impl, hidden, weight)
    with exact_arithmetic(hidden.device):
        if impl == "triton":
            launcher = importlib.import_module("groupdpo_kernels.kernels.linear_logps_forward")
            return tuple(launcher.linear_logps_forward(*head, targets, *options, stats))
        return tuple(host.forward(head, targets, HeadOptions(*options), stats, impl))


@_linear_logps_forward.register_fake
def _(hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, *rest):
    return fake_stats(hidden, targets, rest[-2])


def fake_stats(hidden: Tensor, targets: Tensor, stats: bool) -> tuple[Tensor, ...]:
    """The shapes and dtypes of LogpStats, lse in float64."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    row = _fake_rows(targets, dtype, torch.float64)
    shape = targets.shape if stats else (0,)
    return (*row, *(targets.new_empty(shape, dtype=d) for d in (dtype, dtype, dtype, torch.bool)))


def _fake_rows(targets: Tensor, *dtypes: torch.dtype) -> list[Tensor]:
    return [torch.empty_like(targets, dtype=x, memory_format=torch.contiguous_format) for x in dtypes]


@torch.library.custom_op(
    "groupdpo_kernels::linear_logps_backward",
    mutates_args=(),
    schema=f"({HEAD}, Tensor lse, Tensor d_target, Tensor d_softmax, {OPTIONS}, bool[] needs, str impl) -> {_SIX}",
)
def _linear_logps_backward(
    hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, lse, d_target, d_softmax, *rest
):
    *options, needs, impl = rest
    head = Head(hidden, weight, bias, low_rank_hidden, low_rank_weight)
    impl = resolve(impl, hidden, weight)
    with exact_arithmetic(hidden.device):
        if impl == "triton":
            launcher = importlib.import_module("groupdpo_kernels.kernels.linear_logps_backward")
            out = launcher.linear_logps_backward(*head, targets, lse, d_target, d_softmax, *options, tuple(needs))
        else:
            out = host.backward(head, targets, lse, d_target, d_softmax, HeadOptions(*options), tuple(needs), impl)
    return tuple(hidden.new_empty(0) if x is None else x for x in out)


@_linear_logps_backward.register_fake
def _(hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, lse, d_target, d_softmax, *rest):
    needs = rest[-2]
    inputs = (hidden, weight, bias, low_rank_hidden, low_rank_weight)
    (mass,) = _fake_rows(targets, d_softmax.dtype) if needs[5] else (hidden.new_empty(0),)
    return (*(hidden.new_empty(x.shape if needed else (0,)) for x, needed in zip(inputs, needs)), mass)


@torch.library.custom_op(
    "groupdpo_kernels::linear_logps_candidates",
    mutates_args=(),
    schema=f"({HEAD}, {OPTIONS}, float grad_tol, Tensor? seed, str impl) -> {_SEVEN}",
)
def _linear_logps_candidates(hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, *rest):
    *options, grad_tol, seed, impl = rest
    head = Head(hidden, weight, bias, low_rank_hidden, low_rank_weight)
    impl = resolve(impl, hidden, weight)
    if seed is not None:
        check_tail(impl)
    with exact_arithmetic(hidden.device):
        if impl == "triton":
            launcher = importlib.import_module("groupdpo_kernels.kernels.sparse_forward")
            most = sparse.capacity(targets.numel(), weight.shape[0], HeadOptions(*options).workspace_bytes)
            least = sparse.least_probability(grad_tol)
            return tuple(launcher.linear_logps_candidates(*head, targets, *options, least, most))
        return tuple(host.candidates(head, targets, HeadOptions(*options), grad_tol, impl, seed))


@_linear_logps_candidates.register_fake
def _(hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, *rest):
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    row = _fake_rows(targets, dtype, torch.float64, dtype, dtype, dtype)
    *options, _, seed, _ = rest
    most = sparse.capacity(targets.numel(), weight.shape[0], HeadOptions(*options).workspace_bytes)
    shape = (*targets.shape, most + sparse.samples(seed))
    return (*row, targets.new_empty(shape, dtype=torch.int32), targets.new_empty(shape, dtype=dtype))


@torch.library.custom_op(
    "groupdpo_kernels::linear_logps_sparse_backward",
    mutates_args=(),
    schema=f"({HEAD}, Tensor lse, Tensor doubts, Tensor slopes, Tensor dropped, Tensor ids, Tensor weights,"
    f" Tensor d_token_logps, Tensor d_lse, {OPTIONS}, float grad_tol, bool sampled, bool[] needs, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _linear_logps_sparse_backward(hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, *rest):
    found, (d_token_logps, d_lse, *options, grad_tol, sampled, needs, impl) = Candidates(rest[0], *rest[:6]), rest[6:]
    head = Head(hidden, weight, bias, low_rank_hidden, low_rank_weight)
    impl = resolve(impl, hidden, weight)
    upstream = (d_token_logps, d_lse)
    with exact_arithmetic(hidden.device):
        if impl == "triton":
            launcher = importlib.import_module("groupdpo_kernels.kernels.sparse_backward")
            live = targets != HeadOptions(*options).ignore_index
            exact = sparse.exact_rows(found.doubts, found.dropped, *upstream, live, grad_tol)
            kept = (found.lse, found.doubts, found.slopes, found.ids, found.weights)
            out = launcher.linear_logps_sparse_backward(*head, targets, exact, *kept, *upstream, *options, tuple(needs))
        else:
            tol = None if sampled else grad_tol
            out = host.sparse_backward(head, targets, found, *upstream, HeadOptions(*options), tol, needs, impl)
    return tuple(hidden.new_empty(0) if x is None else x for x in out[:5])


@_linear_logps_sparse_backward.register_fake
def _(hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, *rest):
    inputs, needs = (hidden, weight, bias, low_rank_hidden, low_rank_weight), rest[-2]
    return tuple(hidden.new_empty(x.shape if needed else (0,)) for x, needed in zip(inputs, needs))


@torch.library.custom_op(
    "groupdpo_kernels::linear_logps_jacobian",
    mutates_args=(),
    schema=f"({HEAD}, {OPTIONS}, float grad_tol, str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _linear_logps_jacobian(hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, *rest):
    *options, grad_tol, impl = rest
    head = Head(hidden, weight, bias, low_rank_hidden, low_rank_weight)
    impl = resolve(impl, hidden, weight)
    with exact_arithmetic(hidden.device):
        if impl == "triton":  # the kernel is exact and leaves nothing out
            launcher = importlib.import_module("groupdpo_kernels.kernels.frozen_head")
            out = launcher.linear_logps_jacobian(*head, targets, *options)
            bound = [torch.zeros_like(out[0]) if grad_tol > 0 else None for _ in range(2)]
            out = (*out, *bound)
        else:
            out = host.jacobian(head, targets, HeadOptions(*options), grad_tol, impl)
    return tuple((hidden if i < 4 else out[0]).new_empty(0) if x is None else x for i, x in enumerate(out))


@_linear_logps_jacobian.register_fake
def _(hidden, weight, bias, low_rank_hidden, low_rank_weight, targets, *rest):
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    row = _fake_rows(targets, dtype, torch.float64)
    shapes = [(0,) if x is None else x.shape for x in (hidden, low_rank_hidden)]
    bound = targets.shape if rest[-2] > 0 else (0,)
    return (
        *row,
        *(hidden.new_empty(shape) for shape in shapes),
        *(targets.new_empty(bound, dtype=dtype) for _ in "12"),
    )


def not_differentiable(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} is not differentiable: only token_logps and lse are. Use {name}.detach() in the loss, or leave it out."
    )


@torch.library.custom_op("groupdpo_kernels::refuse_gradient", mutates_args=())
def _refuse_gradient(gradient: Tensor, name: str) -> Tensor:
    """Lets a gradient of zeros pass (a compiled graph feeds them to every unused output). Any other raises or, on a
    GPU, where values are not read back, becomes NaN.
    """
    if gradient.device.type == "cpu" and gradient.count_nonzero():
        raise not_differentiable(name)
    return torch.where(gradient == 0, 0.0, torch.nan)


@_refuse_gradient.register_fake
def _(gradient: Tensor, name: str) -> Tensor:
    return torch.empty_like(gradient)


def token_logps_of(head: Head, targets: Tensor, lse: Tensor, options: HeadOptions) -> Tensor:
    """token_logps (...) from a known lse (...) in float64, at 2 T D FLOP."""
    with exact_arithmetic(head.hidden.device), torch.no_grad():
        return host.token_logps_of(head, targets, lse, options)


# autograd.py calls these typed functions, since the ops themselves carry no types.


def linear_logps_forward(head: Head, targets: Tensor, options: HeadOptions, stats: bool, impl: str) -> LogpStats:
    op: Callable[..., tuple[Tensor, ...]] = torch.ops.groupdpo_kernels.linear_logps_forward
    return LogpStats(*op(*head, targets, *astuple(options), stats, impl))


def linear_logps_backward(
    head: Head,
    targets: Tensor,
    lse: Tensor,
    d_target: Tensor,
    d_softmax: Tensor,
    options: HeadOptions,
    needs: tuple[bool, ...],
    impl: str,
) -> HeadGradients:
    op: Callable[..., tuple[Tensor, ...]] = torch.ops.groupdpo_kernels.linear_logps_backward
    out = op(*head, targets, lse, d_target, d_softmax, *astuple(options), list(needs), impl)
    return HeadGradients(*(x if needed else None for x, needed in zip(out, needs)))


def linear_logps_jacobian(
    head: Head, targets: Tensor, options: HeadOptions, grad_tol: float, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """(token_logps, lse, d token_logps / d hidden, d token_logps / d low_rank_hidden, doubts, dropped). The last two
    are as in sparse.Candidates, and (0,) without grad_tol.
    """
    op: Callable[..., tuple[Tensor, ...]] = torch.ops.groupdpo_kernels.linear_logps_jacobian
    token_logps, lse, hidden, low_rank, *bound = op(*head, targets, *astuple(options), grad_tol, impl)
    return token_logps, lse, hidden, None if head.low_rank_hidden is None else low_rank, bound[0], bound[1]


def linear_logps_candidates(
    head: Head, targets: Tensor, options: HeadOptions, grad_tol: float, impl: str, seed: Tensor | None = None
) -> Candidates:
    """The Candidates of sparse.py, in the leading shape of targets; with a seed, () int64, also a sampled tail."""
    op: Callable[..., tuple[Tensor, ...]] = torch.ops.groupdpo_kernels.linear_logps_candidates
    return Candidates(*op(*head, targets, *astuple(options), grad_tol, seed, impl))


def linear_logps_sparse_backward(
    head: Head,
    targets: Tensor,
    found: Candidates,
    d_token_logps: Tensor,
    d_lse: Tensor,
    options: HeadOptions,
    grad_tol: float,
    needs: tuple[bool, ...],
    impl: str,
    sampled: bool = False,
) -> HeadGradients:
    op: Callable[..., tuple[Tensor, ...]] = torch.ops.groupdpo_kernels.linear_logps_sparse_backward
    out = op(*head, targets, *found[1:], d_token_logps, d_lse, *astuple(options), grad_tol, sampled, list(needs), impl)
    return HeadGradients(*(x if needed else None for x, needed in zip(out, needs)))


def refuse_gradient(gradient: Tensor, name: str) -> Tensor:
    return torch.ops.groupdpo_kernels.refuse_gradient(gradient, name)
