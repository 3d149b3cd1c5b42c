"""The torch.library ops of an LM head, with their schemas and fake functions. They need torch alone; a kernel is
imported when an op first runs it.

An op carries the name of an implementation as its last argument and resolves "auto" on the real tensors, so a traced
graph holds one opaque op and tracing never looks at devices or versions. None has an autograd formula: only the
Functions in autograd.py need one, and a double backward raises instead of being silently wrong.

What a head lacks goes in as an empty tensor (reference.head_of), and so does a gradient that is not needed come out.
Every lse that goes into or comes out of an op is float64 (reference.log_probs says why).

Values inside CPU tensors are checked (a wrong target id is a ValueError). On a GPU nothing is read back, and a wrong id
gives NaN.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import Candidates, Head, HeadGradients, HeadOptions, LogpStats, Needs, RowGradients, accumulator
from . import extension, host, sparse
from .extension import extension_why_not, warn_of_the_slow_path
from .host import FrozenHead, asked_for
from .implementations import cpu_why_not, resolve

_LIBRARY = torch.library.Library("groupdpo_kernels", "FRAGMENT")

# csrc/binding.cpp registers these C++ ops for the CPU key. Their callers pass live rows and valid ids only.
HEAD = "Tensor hidden, Tensor weight, Tensor bias, Tensor low_rank_hidden, Tensor low_rank_weight, Tensor targets"
ROWS = "Tensor lse, Tensor d_target, Tensor d_softmax, Tensor? d_entropy"
_MAP = "float logit_scale, float? softcap, float temperature"
_NEEDS = ", ".join(f"bool needs_{name}" for name in Needs._fields)
_SIX, _SEVEN = (f"({', '.join(['Tensor'] * n)})" for n in (6, 7))
for _schema in (
    f"linear_logps_forward_cpu({HEAD}, {_MAP}, int workspace_bytes, bool stats, Tensor(a!) logit_cache) -> {_SIX}",
    f"linear_logps_backward_cpu({HEAD}, {ROWS}, {_MAP}, int workspace_bytes, {_NEEDS}, Tensor logit_cache) -> {_SIX}",
    f"frozen_head_cpu({HEAD}, Tensor target_logits, {_MAP}, int workspace_bytes, float grad_tol, float least)"
    f" -> {_SEVEN}",
    f"sparse_forward_cpu({HEAD}, Tensor target_logits, {_MAP}, int workspace_bytes, float least, int most, int? seed)"
    f" -> {_SEVEN}",
    "add_weighted_rows_cpu(Tensor(a!) out, Tensor source, Tensor owned, Tensor index, Tensor coefficients) -> ()",
):
    _LIBRARY.define(_schema)


# -------------------------------------------------------------------------------------------------------------- the ops


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """A context that turns autocast off, so that it does not narrow the float32 arithmetic inside an op."""
    with contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False):
        yield


OPTIONS = "float logit_scale, float? softcap, float temperature, int ignore_index, int workspace_bytes"


def arguments_of(arguments: Sequence[Any], tensors: int = 0) -> tuple[Any, ...]:
    """(Head, targets, HeadOptions, the `tensors` tensors after targets, what follows the options) of an op's
    arguments.
    """
    head, targets, rest = Head(*arguments[:5]), arguments[5], arguments[6:]
    options = HeadOptions(*rest[tensors : tensors + 5])
    return head, targets, options, rest[:tensors], rest[tensors + 5 :]


def _launcher(name: str) -> Callable[..., Any]:
    """The launcher of a file of kernels, which has the file's name."""
    return getattr(importlib.import_module(f"groupdpo_kernels.kernels.{name}"), name)


@torch.library.custom_op(
    "groupdpo_kernels::linear_logps_forward",
    mutates_args=(),
    schema=f"({HEAD}, {OPTIONS}, bool stats, str impl) -> {_SIX}",
)
def _linear_logps_forward(*arguments):
    head, targets, options, _, (stats, impl) = arguments_of(arguments)
    if impl == "auto" and cpu_why_not(head.hidden, head.weight) == extension_why_not() != []:
        warn_of_the_slow_path()  # only the extension is missing for the C++ op
    impl = resolve(impl, head.hidden, head.weight)
    with exact_arithmetic(head.hidden.device):
        if impl == "triton":
            return tuple(_launcher("linear_logps_forward")(head, targets, options, stats))
        return tuple(host.forward(head, targets, options, stats, impl))


@_linear_logps_forward.register_fake
def _(*arguments):
    head, targets, _, _, (stats, _) = arguments_of(arguments)
    return fake_stats(head, targets, stats)


def fake_stats(head: Head, targets: Tensor, stats: bool) -> tuple[Tensor, ...]:
    """The shapes and dtypes of LogpStats, lse in float64."""
    dtype = accumulator(head.hidden.dtype)
    row = _fake_rows(targets, dtype, torch.float64)
    shape = targets.shape if stats else (0,)
    return (*row, *(targets.new_empty(shape, dtype=d) for d in (dtype, dtype, dtype, torch.bool)))


def _fake_rows(targets: Tensor, *dtypes: torch.dtype) -> list[Tensor]:
    return [torch.empty_like(targets, dtype=x, memory_format=torch.contiguous_format) for x in dtypes]


@torch.library.custom_op(
    "groupdpo_kernels::linear_logps_backward",
    mutates_args=(),
    schema=f"({HEAD}, {ROWS}, {OPTIONS}, bool[] needs, str impl) -> {_SIX}",
)
def _linear_logps_backward(*arguments):
    head, targets, options, (lse, *rows), (needs, impl) = arguments_of(arguments, 4)
    tensors = (head, targets, lse, RowGradients(*rows))
    impl = resolve(impl, head.hidden, head.weight)
    with exact_arithmetic(head.hidden.device):
        if impl == "triton":
            gradients = _launcher("linear_logps_backward")(*tensors, options, Needs(*needs))
        else:
            gradients = host.backward(*tensors, options, Needs(*needs), impl)
    return without_none(gradients, head.hidden)


@_linear_logps_backward.register_fake
def _(*arguments):
    head, targets, _, _, (needs, _) = arguments_of(arguments, 4)
    return fake_gradients(head, targets, needs)


def without_none(gradients: HeadGradients, like: Tensor) -> tuple[Tensor, ...]:
    """The results of an op; `asked_for` is the inverse."""
    return tuple(like.new_empty(0) if x is None else x for x in gradients)


def fake_gradients(head: Head, targets: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    new = head.hidden.new_empty
    (mass,) = _fake_rows(targets, accumulator(head.hidden.dtype)) if needs[5] else (new(0),)
    return (*(new(x.shape if needed else (0,)) for x, needed in zip(head, needs)), mass)


@torch.library.custom_op(
    "groupdpo_kernels::sparse_forward",
    mutates_args=(),
    schema=f"({HEAD}, {OPTIONS}, float grad_tol, Tensor? seed, str impl) -> {_SEVEN}",
)
def _sparse_forward(*arguments):
    head, targets, options, _, (grad_tol, seed, impl) = arguments_of(arguments)
    impl = resolve(impl, head.hidden, head.weight)
    with exact_arithmetic(head.hidden.device):
        if impl == "triton":
            most = sparse.capacity(targets.numel(), head.weight.shape[0], options.workspace_bytes)
            least = sparse.least_probability(grad_tol, impl, seed is not None)
            drawn = None if seed is None else int(seed)  # on the CPU: nothing is read back
            token_logps, found = _launcher("sparse_forward")(head, targets, options, least, most, drawn)
        else:
            token_logps, found = host.sparse_forward(head, targets, options, grad_tol, impl, seed)
    return token_logps, *found


@_sparse_forward.register_fake
def _(*arguments):
    head, targets, options, _, (_, seed, _) = arguments_of(arguments)
    dtype = accumulator(head.hidden.dtype)
    by_row = _fake_rows(targets, dtype, torch.float64, dtype, dtype, dtype)
    most = sparse.capacity(targets.numel(), head.weight.shape[0], options.workspace_bytes)
    shape = (*targets.shape, most + sparse.samples(seed))
    return (*by_row, targets.new_empty(shape, dtype=torch.int32), targets.new_empty(shape, dtype=dtype))


@torch.library.custom_op(
    "groupdpo_kernels::sparse_backward",
    mutates_args=(),
    schema=f"({HEAD}, {', '.join(f'Tensor {name}' for name in Candidates._fields)}, Tensor d_token_logps, Tensor d_lse,"
    f" {OPTIONS}, float? grad_tol, bool[] needs, str impl) -> {_SIX}",
)
def _sparse_backward(*arguments):
    head, targets, options, tensors, (grad_tol, needs, impl) = arguments_of(arguments, 8)
    found, (d_token_logps, d_lse) = Candidates(*tensors[:6]), tensors[6:]
    impl = resolve(impl, head.hidden, head.weight)
    with exact_arithmetic(head.hidden.device):
        if impl == "triton":
            exact = sparse.rows_of_the_exact_path(
                found, d_token_logps, d_lse, targets != options.ignore_index, grad_tol
            )
            arguments = (head, targets, exact, found, d_token_logps, d_lse, options, Needs(*needs))
            gradients = _launcher("sparse_backward")(*arguments, extension.cuda_rows(head.hidden.device))
        else:
            tolerance = (options, grad_tol, Needs(*needs), impl)
            gradients = host.sparse_backward(head, targets, found, d_token_logps, d_lse, *tolerance)
    return without_none(gradients, head.hidden)


@_sparse_backward.register_fake
def _(*arguments):
    head, targets, _, _, (_, needs, _) = arguments_of(arguments, 8)
    return fake_gradients(head, targets, needs)


@torch.library.custom_op(
    "groupdpo_kernels::frozen_head",
    mutates_args=(),
    schema=f"({HEAD}, {OPTIONS}, float grad_tol, str impl) -> {_SIX}",
)
def _frozen_head(*arguments):
    head, targets, options, _, (grad_tol, impl) = arguments_of(arguments)
    impl = resolve(impl, head.hidden, head.weight)
    with exact_arithmetic(head.hidden.device):
        if impl == "triton":  # the kernel is exact and leaves nothing out
            exact = _launcher("frozen_head")(head, targets, options)
            token_logps = exact[0]
            bound = (torch.zeros_like(token_logps) if grad_tol > 0 else token_logps.new_empty(0) for _ in range(2))
            return *exact, *bound
        return tuple(host.frozen_head(head, targets, options, grad_tol, impl))


@_frozen_head.register_fake
def _(*arguments):
    head, targets, _, _, (grad_tol, _) = arguments_of(arguments)
    dtype = accumulator(head.hidden.dtype)
    derivatives = (head.hidden.new_empty(x.shape) for x in (head.hidden, head.low_rank_hidden))
    bound = targets.shape if grad_tol > 0 else (0,)
    return (
        *_fake_rows(targets, dtype, torch.float64),
        *derivatives,
        *(targets.new_empty(bound, dtype=dtype) for _ in range(2)),
    )


def not_differentiable(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} is not differentiable: only token_logps, lse and entropy are. Use {name}.detach() in the loss, or"
        " leave it out."
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
    return LogpStats(*op(*head, targets, *options.as_tuple(), stats, impl))


def linear_logps_backward(
    head: Head,
    targets: Tensor,
    lse: Tensor,
    rows: RowGradients,
    options: HeadOptions,
    needs: Needs,
    impl: str,
) -> HeadGradients:
    op: Callable[..., tuple[Tensor, ...]] = torch.ops.groupdpo_kernels.linear_logps_backward
    return asked_for(op(*head, targets, lse, *rows, *options.as_tuple(), list(needs), impl), needs)


def frozen_head(head: Head, targets: Tensor, options: HeadOptions, grad_tol: float, impl: str) -> FrozenHead:
    op: Callable[..., tuple[Tensor, ...]] = torch.ops.groupdpo_kernels.frozen_head
    return FrozenHead(*op(*head, targets, *options.as_tuple(), grad_tol, impl))


def sparse_forward(
    head: Head, targets: Tensor, options: HeadOptions, grad_tol: float, impl: str, seed: Tensor | None = None
) -> tuple[Tensor, Candidates]:
    """token_logps and the candidates, in the leading shape of targets; with a seed, () int64, also a sampled tail."""
    op: Callable[..., tuple[Tensor, ...]] = torch.ops.groupdpo_kernels.sparse_forward
    token_logps, *fields = op(*head, targets, *options.as_tuple(), grad_tol, seed, impl)
    return token_logps, Candidates(*fields)


def sparse_backward(
    head: Head,
    targets: Tensor,
    found: Candidates,
    d_token_logps: Tensor,
    d_lse: Tensor,
    options: HeadOptions,
    grad_tol: float | None,
    needs: Needs,
    impl: str,
) -> HeadGradients:
    """Gradients within grad_tol; None means candidates with a sampled tail."""
    op: Callable[..., tuple[Tensor, ...]] = torch.ops.groupdpo_kernels.sparse_backward
    upstream = (d_token_logps, d_lse)
    return asked_for(op(*head, targets, *found, *upstream, *options.as_tuple(), grad_tol, list(needs), impl), needs)


def refuse_gradient(gradient: Tensor, name: str) -> Tensor:
    return torch.ops.groupdpo_kernels.refuse_gradient(gradient, name)
