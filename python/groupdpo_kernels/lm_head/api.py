"""The public functions that compute token log-probabilities straight from hidden states and the LM head.

The (T, V) logits never exist. The forward costs 2 T D V FLOP, the backward 2 T D V and as many again for each of
d_hidden and d_weight; memory beyond the gradients is one float32 (T, D) buffer and `workspace_bytes`. Where the head
needs no gradient (LoRA, the usual DPO case) `linear_logps` stores its derivative in hidden if that fits in the budget:
the forward then costs 4 T D V FLOP, the backward none. docs/math.md, section 1, has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import replay
from ..checks import INTEGERS, check_group, check_number, check_tensors
from ..reference import HeadOptions, LogpStats, head_of
from .autograd import CallOptions, RefuseGradient
from .dispatch import PATHS, Call, run
from .extension import cuda_extension_why_not
from .implementations import IMPLS, resolve, why_not

_FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_EXTRA = ("entropy", "mean_logits", "log_sum_sq_probs", "is_top1")


def linear_logps(
    hidden: Tensor,  # (..., D) bf16 | fp16 | fp32 | fp64
    weight: Tensor,  # (V, D) the dtype of hidden
    targets: Tensor,  # (...) integer
    bias: Tensor | None = None,  # (V,) the dtype of hidden
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    grad_tol: float = 0.0,
    workspace_bytes: int = 2**28,
    process_group: Any = None,
    impl: str = "auto",
    low_rank: tuple[Tensor, Tensor] | None = None,  # (..., R), (V, R)
    grad_tail: str = "exact",
) -> Tensor:  # (...) float32, float64 for float64 inputs
    """Log-probability of each target under softmax(cap(logit_scale (hidden @ weight.T + bias)) / temperature).

    It is differentiable in hidden, weight, bias and low_rank, once. Rows with `ignore_index` give 0 and no gradient.

    Args:
        hidden: last hidden states; any leading dimensions, contiguous or not.
        weight: the LM head.
        targets: the token id that each row predicts (already shifted), or `ignore_index`.
        bias: the bias of the LM head.
        logit_scale: multiplies the logits (Cohere; Granite: 1 / logits_scaling).
        softcap: soft-caps the logits, softcap * tanh(logits / softcap) (Gemma 2).
        temperature: divides the logits, after the cap.
        grad_tol: allowed relative L1 error of the gradient in the logits, over the call; 0 is exact. Rows of a trained
            model then have gradients over their likely entries alone; rows for which this would break the bound are
            computed exactly, whatever the data. 2**-7 is about the rounding of bfloat16. Vocabulary-parallel calls are
            always exact.
        workspace_bytes: bound on temporaries, beyond gradients and one float32 (T, D) buffer. On a CPU the logits that
            fit are kept for the backward where that is faster (logit_cache.py).
        process_group: the vocabulary is split over this group in order of rank: weight and bias (and low_rank[1])
            are this rank's rows, targets are global ids, hidden is the same on all ranks. Gradients of hidden (and
            low_rank[0]) are summed over the group.
        impl: "auto" takes the first of "triton", "cpu", "reference" that can run (see `explain`); an
            explicit choice never falls back.
        low_rank: (x, B) adds x @ B.T to hidden @ weight.T: LoRA on the head without a merged copy of the weight,
            with x = scaling * hidden @ A.T.
        grad_tail: how grad_tol > 0 treats unlikely entries. "exact" leaves them out where the bound above allows it,
            else computes them. "sample" replaces those less likely than grad_tol / 4 in every row by eight drawn from
            them: the gradient is unbiased, no row needs the exact path, and a variance takes the place of the bound
            (docs/math.md). Each call takes one number from torch's CPU generator: torch.manual_seed and checkpoints
            replay it. Calls in which grad_tol has no effect stay exact.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what is expected, and its value. On a GPU
            values inside tensors are not read back: a target id outside the vocabulary gives NaN in its row and in
            the gradients.

    DPO (arXiv 2305.18290) needs exactly these values; the online log-sum-exp over blocks follows arXiv 2411.09009.
    """
    check_group("process_group", process_group)
    head_options = checked_options(
        logit_scale, softcap, temperature, ignore_index, grad_tol, grad_tail, workspace_bytes
    )
    options = CallOptions(head_options, impl, float(grad_tol))
    call = _call(hidden, weight, targets, bias, low_rank, options)
    return _run(call._replace(process_group=process_group), grad_tail).token_logps


def linear_logp_stats(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...) integer
    bias: Tensor | None = None,  # (V,)
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    grad_tol: float = 0.0,
    workspace_bytes: int = 2**28,
    process_group: Any = None,
    impl: str = "auto",
    low_rank: tuple[Tensor, Tensor] | None = None,  # (..., R), (V, R)
    grad_tail: str = "exact",
    outputs: Sequence[str] = ("lse", "entropy"),
) -> LogpStats:
    """`linear_logps` with more of each row's distribution, at the same number of GEMMs.

    outputs: any of "lse", "entropy", "mean_logits", "log_sum_sq_probs", "is_top1"; the others are None. token_logps is
    always there. token_logps, lse and entropy are differentiable, in one backward of the same number of GEMMs; a
    gradient into any other field raises a RuntimeError, it is never a silent zero. With a field after "lse" the
    gradient is exact whatever grad_tol is. The other arguments are those of `linear_logps`.
    """
    known = ("lse", *_EXTRA)
    if isinstance(outputs, (str, Tensor)) or not isinstance(outputs, Iterable):
        raise ValueError(f"outputs must be taken from {known}, as a tuple of names; got {outputs!r}")
    for name in outputs:
        if name not in known and name != "token_logps":
            raise ValueError(f"outputs must be taken from {known}; got {name!r}")
    check_group("process_group", process_group)
    if process_group is not None and "is_top1" in outputs:
        raise ValueError(
            "outputs must not hold 'is_top1' with a process_group: a shard does not see the others' largest logits"
        )
    head_options = checked_options(
        logit_scale, softcap, temperature, ignore_index, grad_tol, grad_tail, workspace_bytes
    )
    options = CallOptions(head_options, impl, float(grad_tol), any(name in outputs for name in _EXTRA))
    call = _call(hidden, weight, targets, bias, low_rank, options)
    stats = _run(call._replace(token_logps_alone=not outputs, process_group=process_group), grad_tail)
    fields = stats._asdict()
    for name in known:
        if name not in outputs:
            fields[name] = None
        elif name in _EXTRA[1:-1] and stats.token_logps.requires_grad:  # is_top1 is bool and cannot carry a gradient
            fields[name] = RefuseGradient.apply(fields[name], stats.token_logps, name)
    return LogpStats(**fields)


@dataclass(frozen=True)
class Explanation:
    """The implementation that impl="auto" picks, with the reasons against each other one (none for one that could run
    but comes later); and the path that the call takes (dispatch.py), with the reason against each path before it.
    `detail` says what else decides how that path runs, if anything does.
    """

    impl: str
    why_not: dict[str, list[str]]
    path: str
    path_why_not: dict[str, str]
    detail: str = ""

    def __str__(self) -> str:
        lines = [f"auto picks {self.impl!r}"]
        for name, reasons in self.why_not.items():
            if name != self.impl:
                lines.append(
                    f"  {name}: " + ("; ".join(reasons) if reasons else f"could run; {self.impl!r} comes first")
                )
        lines.append(f"the path is {self.path!r}: {next(x.computes for x in PATHS if x.name == self.path)}")
        lines += [f"  {self.detail}"] * bool(self.detail)
        return "\n".join([*lines, *(f"  {name}: {reason}" for name, reason in self.path_why_not.items())])


def explain(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    grad_tol: float = 0.0,
    workspace_bytes: int = 2**28,
    process_group: Any = None,
    impl: str = "auto",
    low_rank: tuple[Tensor, Tensor] | None = None,  # (..., R), (V, R)
    grad_tail: str = "exact",
) -> Explanation:
    """Which implementation impl="auto" takes for these arguments of `linear_logps`, which path a call with `impl`
    takes, and every reason against the others. It computes nothing, and raises what the call would raise before that.
    It depends, as the call does, on which arguments require grad and on whether gradients are on.
    """
    check_group("process_group", process_group)
    head_options = checked_options(
        logit_scale, softcap, temperature, ignore_index, grad_tol, grad_tail, workspace_bytes
    )
    options = CallOptions(head_options, impl, float(grad_tol))
    call = _call(hidden, weight, targets, bias, low_rank, options)._replace(process_group=process_group)
    reasons = {name: why_not(name, call.head.hidden, call.head.weight) for name in IMPLS}
    first = resolve("auto", call.head.hidden, call.head.weight)
    if grad_tail == "sample":
        call = call._replace(seed=torch.zeros((), dtype=torch.int64))
    if reasons.get(impl):  # an implementation that cannot run has no path
        call = call._replace(options=replace(options, impl="auto"))
    against = {path.name: path.why_not(call) for path in PATHS}
    path = next(name for name, reason in against.items() if not reason)
    before = dict(list(against.items())[: list(against).index(path)])
    return Explanation(first, reasons, path, before, _sums_of(call) if path == "candidates" else "")


def _sums_of(call: Call) -> str:
    """What sums the rows in a backward over candidates."""
    hidden, weight = call.head[:2]
    if resolve(call.options.impl, hidden, weight) != "triton":
        return ""
    against = cuda_extension_why_not(hidden.device)
    if not against:
        return (
            "its sums of rows run in CUDA C++ (add_weighted_rows_cuda) where the columns of a matrix lie side by side"
        )
    return f"its sums of rows run in Triton, not in CUDA C++: {'; '.join(against)}"


# ------------------------------------------------------------------------------------------------------------ arguments


def checked_options(
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    grad_tol: float,
    grad_tail: str,
    workspace_bytes: int,
) -> HeadOptions:
    numbers_given = {"logit_scale": logit_scale, "temperature": temperature, "grad_tol": grad_tol}
    numbers_given |= {"ignore_index": ignore_index, "workspace_bytes": workspace_bytes}
    for name, value in (*numbers_given.items(), *[("softcap", softcap)] * (softcap is not None)):
        check_number(name, value)
    # torch.compile traces comparisons, not math.isfinite, for a float that changes from call to call.
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be finite; got {logit_scale}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, or None; got {softcap}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite; got {temperature}")
    if not 0 <= grad_tol < 1:
        raise ValueError(f"grad_tol must be in [0, 1); got {grad_tol}")
    if not isinstance(grad_tail, str) or grad_tail not in ("exact", "sample"):
        raise ValueError(f"grad_tail must be 'exact' or 'sample'; got {grad_tail!r}")
    if grad_tail == "sample" and grad_tol == 0:
        raise ValueError("grad_tail='sample' needs grad_tol > 0, which says what is drawn; got grad_tol = 0")
    if not 0 < workspace_bytes < math.inf:
        raise ValueError(f"workspace_bytes must be positive; got {workspace_bytes}")
    if not (-(2**63) <= ignore_index < 2**63 and ignore_index == int(ignore_index)):
        raise ValueError(f"ignore_index must be an integer of 64 bits; got {ignore_index}")
    cap = None if softcap is None else float(softcap)
    return HeadOptions(float(logit_scale), cap, float(temperature), int(ignore_index), int(workspace_bytes))


def check_impl(impl: str) -> None:
    if not isinstance(impl, str) or impl not in ("auto", *IMPLS):
        raise ValueError(f"impl must be 'auto' or one of {IMPLS}; got {impl!r}")


def _check_kinds(hidden: Any, weight: Any, targets: Any, bias: Any, low_rank: Any) -> None:
    """TypeError for arguments that are not tensors, and for a low_rank that is not a pair of them."""
    check_tensors(hidden=hidden, weight=weight, targets=targets)
    if bias is not None:
        check_tensors(bias=bias)
    if low_rank is not None:
        if not isinstance(low_rank, tuple | list) or len(low_rank) != 2:
            raise TypeError(f"low_rank must be a pair of tensors, (..., R) and (V, R); got {type(low_rank).__name__}")
        check_tensors(**{"low_rank[0]": low_rank[0], "low_rank[1]": low_rank[1]})


def _autocast(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """Casts floating inputs (not float64) to autocast's dtype, as torch.autocast does for F.linear. The casts are
    differentiable.
    """
    device_type = hidden.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return hidden, weight, bias, low_rank
    dtype = torch.get_autocast_dtype(device_type)

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x

    pair = None if low_rank is None else (cast(low_rank[0]), cast(low_rank[1]))
    return cast(hidden), cast(weight), None if bias is None else cast(bias), pair


def _check(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, low_rank: tuple[Tensor, Tensor] | None
) -> None:
    if hidden.dtype not in _FLOATING:
        raise TypeError(f"hidden must be one of {', '.join(map(str, _FLOATING))}; got {hidden.dtype}")
    if targets.dtype not in INTEGERS:
        raise TypeError(f"targets must be an integer tensor; got {targets.dtype}")
    if hidden.dim() < 1:
        raise ValueError("hidden must be (..., D); got a scalar")
    D = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != D or weight.shape[0] < 1 or D < 1:
        raise ValueError(
            f"weight must be (V, D = {D}), both at least 1, D the last dimension of hidden {tuple(hidden.shape)};"
            f" got {tuple(weight.shape)}"
        )
    V = weight.shape[0]
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets must have the leading shape of hidden, {tuple(hidden.shape[:-1])}; got {tuple(targets.shape)}"
        )
    named = {"weight": weight}
    if bias is not None:
        named["bias"] = bias
        if bias.shape != (V,):
            raise ValueError(f"bias must be (V,) = ({V},); got {tuple(bias.shape)}")
    if low_rank is not None:
        x, b = low_rank
        named |= {"low_rank[0]": x, "low_rank[1]": b}
        if b.dim() != 2 or b.shape[0] != V or b.shape[1] < 1:
            raise ValueError(f"low_rank[1] must be (V = {V}, R) with R at least 1; got {tuple(b.shape)}")
        if x.shape != (*hidden.shape[:-1], b.shape[1]):
            raise ValueError(f"low_rank[0] must be (..., R) = {(*hidden.shape[:-1], b.shape[1])}; got {tuple(x.shape)}")
    for name, x in named.items():
        if x.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have the dtype of hidden, {hidden.dtype} (torch.autocast mixes dtypes); got {x.dtype}"
            )
    for name, x in (*named.items(), ("targets", targets)):
        if x.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}; got {x.device}")


def _call(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
    options: CallOptions,
) -> Call:
    """The call of these arguments, checked and cast."""
    check_impl(options.impl)
    _check_kinds(hidden, weight, targets, bias, low_rank)
    hidden, weight, bias, low_rank = _autocast(hidden, weight, bias, low_rank)
    _check(hidden, weight, targets, bias, low_rank)
    return Call(head_of(hidden, weight, bias, *(low_rank or ())), targets.long(), options)


def _run(call: Call, grad_tail: str) -> LogpStats:
    # The seed is drawn whether or not the call uses it, so that forwards with and without a graph draw alike.
    if grad_tail == "sample":
        call = call._replace(seed=torch.randint(2**63 - 1, (), dtype=torch.int64))
    tape = None if call.process_group is not None else replay.active()
    if tape is not None:
        call = call._replace(options=replace(call.options, known=tape.take(call.targets.shape)))
    stats, lse = run(call)
    if tape is not None:
        tape.note(lse, stats.token_logps)
    return stats
