"""Tests, benchmarks and the command `check` share these: CASES, inputs drawn from them, budgets, Triton on CPU tensors.

The rest of the package never imports this. It needs torch; `triton_on_cpu` needs triton and numpy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import Head, HeadOptions, LogpStats, Needs, head_of


@dataclass(frozen=True)
class Case:
    """One shape and set of options of an LM head, and the reason why it is in CASES."""

    name: str
    T: int
    D: int
    V: int
    reason: str
    dtype: torch.dtype = torch.float32
    bias: bool = False
    R: int = 0  # rank of low_rank, 0 without it
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    ignored: str = "some"  # "none", "some", "first", "last", "all", "most"
    hidden_scale: float = 1.0  # spread of the logits
    shift: float = 0.0  # added to every logit through the bias
    leading: tuple[int, ...] = ()  # leading dimensions of hidden, T rows in all; () means (T,)
    strided: bool = False  # hidden is a slice of a longer sequence: its leading dimensions do not collapse
    workspace_bytes: int = 2**28
    column: float = 0.0  # added to or subtracted from all logits of a row through one huge hidden column
    entropy: bool = False  # the entropy has an upstream gradient too

    @property
    def options(self) -> HeadOptions:
        return HeadOptions(self.logit_scale, self.softcap, self.temperature, -100, self.workspace_bytes)


_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32

CASES: tuple[Case, ...] = (
    Case("plain", 37, 64, 512, "nothing special: the first to debug", ignored="none"),
    Case("one_row", 1, 32, 300, "a single token", ignored="none"),
    Case("one_column", 5, 16, 1, "a vocabulary of one: log-probability 0, gradient 0"),
    Case("ragged_all", 61, 67, 507, "T, D and V divide nothing; D rows are not 16-byte aligned"),
    Case("gpt2_vocab", 9, 24, 50257, "odd vocabulary: phantom columns of the last tile (verl#2656)"),
    Case("qwen_vocab", 5, 16, 151936, "V % 256 != 0", dtype=_BF16),
    Case("ragged_bf16", 130, 136, 1031, "ragged tiles through tensor descriptors", dtype=_BF16),
    Case("unaligned_bf16", 33, 132, 777, "D % 8 != 0: rows that tensor descriptors cannot load (CCE#52)", dtype=_BF16),
    Case("fp16", 70, 64, 520, "half precision", dtype=_FP16),
    Case("bias", 40, 80, 600, "bias added once whatever the number of D blocks (CCE#52)", bias=True),
    Case("bias_bf16", 40, 200, 600, "bias with several D blocks in bf16", dtype=_BF16, bias=True),
    Case("negative", 33, 48, 507, "all logits far below zero: a phantom zero logit would win", bias=True, shift=-60.0),
    Case("confident", 48, 64, 640, "peaked rows: p_y near 0 or 1", hidden_scale=8.0),
    Case("confident_bf16", 48, 64, 640, "peaked rows in bf16", dtype=_BF16, hidden_scale=8.0),
    Case("softcap", 50, 72, 530, "Gemma 2", softcap=30.0, hidden_scale=4.0),
    Case("softcap_tight_bf16", 50, 72, 530, "logits deep in the cap", dtype=_BF16, softcap=3.0, hidden_scale=4.0),
    Case("scale", 34, 40, 300, "Cohere", logit_scale=0.0625, hidden_scale=8.0),
    Case("temperature_bf16", 34, 40, 300, "sampling temperature", dtype=_BF16, temperature=0.7),
    Case("everything", 66, 96, 1025, "all options at once", _FP32, True, 8, 1.3, 12.0, 0.8, hidden_scale=3.0),
    Case("everything_bf16", 66, 96, 1025, "all options at once", _BF16, True, 8, 1.3, 12.0, 0.8, hidden_scale=3.0),
    Case("everything_fp16", 66, 96, 1025, "all options at once", _FP16, True, 5, 1.3, 12.0, 0.8, hidden_scale=3.0),
    Case("low_rank", 30, 64, 400, "LoRA on the head, R not a power of two", R=12),
    Case("low_rank_wide_bf16", 30, 64, 400, "R over one BLOCK_R", dtype=_BF16, R=72),
    Case("first_ignored", 20, 32, 200, "the first row is ignored", ignored="first"),
    Case("last_ignored", 150, 32, 300, "whole token tiles are ignored", ignored="last"),
    Case("most_ignored_bf16", 300, 32, 300, "prompt tokens outnumber the response", dtype=_BF16, ignored="most"),
    Case("all_ignored", 20, 32, 200, "no live row: zeros, not NaN", bias=True, ignored="all"),
    Case("empty", 0, 32, 200, "T = 0", bias=True, ignored="none"),
    Case("batched", 42, 48, 257, "three leading dimensions", leading=(2, 3, 7)),
    Case("strided_bf16", 39, 48, 257, "hidden[:, :-1]: rows do not collapse", _BF16, leading=(3, 13), strided=True),
    Case("strided_deep", 42, 48, 257, "rows do not collapse under three dimensions", leading=(2, 3, 7), strided=True),
    Case("tiny_workspace", 90, 48, 900, "several chunks of rows and of columns", bias=True, R=4, workspace_bytes=2**14),
    Case("tiny_workspace_bf16", 300, 48, 900, "several chunks in bf16", _BF16, True, 4, workspace_bytes=2**16),
    # An lse rounded to float32 would move all probabilities of a row together, so no sum averages it out.
    Case("offset_1e2", 33, 48, 507, "all logits far from zero, through the bias", bias=True, shift=1e2),
    Case("offset_1e4", 33, 48, 507, "logits whose ulp is 1e-3", bias=True, shift=1e4),
    Case("offset_1e6", 33, 48, 507, "logits whose ulp is 6e-2", bias=True, shift=-1e6),
    Case("offset_bf16", 33, 48, 507, "widened before the sum, 1e4 costs nothing", _BF16, bias=True, shift=1e4),
    Case("column_1e2", 33, 48, 507, "one hidden column offsets each row differently", column=1e2),
    Case("column_1e4", 33, 48, 507, "one hidden column, offsets of 1e4", column=1e4, R=4),
    Case("column_1e6", 33, 48, 507, "one hidden column, offsets of 1e6", column=1e6),
    Case("column_bf16", 33, 48, 507, "a massive activation", _BF16, column=1e4),
    Case("offset_options", 33, 48, 507, "an offset through every option", _FP32, True, 4, 1.3, 1e5, 0.8, shift=1e4),
    Case("offset_unlikely", 31, 48, 507, "log-probabilities of -1e3", bias=True, shift=1e4, hidden_scale=300.0),
    Case("offset_impossible", 31, 48, 507, "log-probabilities of -1e4", bias=True, shift=1e6, hidden_scale=3e3),
    Case("entropy", 37, 64, 512, "a bonus for the entropy, as in GRPO", entropy=True),
    Case("entropy_bf16", 130, 136, 1031, "the entropy through tensor descriptors", dtype=_BF16, entropy=True),
    Case("entropy_everything", 66, 96, 1025, "", _FP32, True, 8, 1.3, 12.0, 0.8, hidden_scale=3.0, entropy=True),
    Case("entropy_everything_bf16", 66, 96, 1025, "", _BF16, True, 8, 1.3, 12.0, 0.8, hidden_scale=3.0, entropy=True),
    Case("entropy_confident", 48, 64, 640, "peaked rows: an entropy near 0", hidden_scale=8.0, entropy=True),
    Case("entropy_one_hot", 48, 64, 640, "p = 1 but for rounding", hidden_scale=30.0, entropy=True),
    Case("entropy_flat", 30, 48, 1500, "equal logits but for the third digit", hidden_scale=1e-3, entropy=True),
    Case("entropy_offset", 33, 48, 507, "an offset of 1e4 beside the entropy", bias=True, shift=1e4, entropy=True),
    Case("entropy_column", 33, 48, 507, "one of 1e6 by hidden", column=1e6, entropy=True),
    Case(
        "entropy_batched",
        42,
        48,
        257,
        "three leading dimensions, strided",
        leading=(2, 3, 7),
        strided=True,
        entropy=True,
    ),
    Case("entropy_chunks", 90, 48, 900, "several chunks", bias=True, R=4, workspace_bytes=2**14, entropy=True),
)


@dataclass(frozen=True)
class Inputs:
    """Leaves that require grad, targets, and random upstream gradients that differ from row to row."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (...) int64
    bias: Tensor | None  # (V,)
    low_rank: tuple[Tensor, Tensor] | None  # (..., R), (V, R)
    d_token_logps: Tensor  # (...) float64
    d_lse: Tensor  # (...) float64
    d_entropy: Tensor | None = None  # (...) float64

    @property
    def leaves(self) -> dict[str, Tensor]:
        named: dict[str, Tensor | None] = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        if self.low_rank is not None:
            named |= {"low_rank_hidden": self.low_rank[0], "low_rank_weight": self.low_rank[1]}
        return {name: x for name, x in named.items() if x is not None}

    @property
    def head(self) -> Head:
        """The leaves, detached, as the ops take them."""
        return head_of(**{name: x.detach() for name, x in self.leaves.items()})

    @property
    def needs(self) -> Needs:
        """The gradients of all leaves."""
        return Needs(**dict.fromkeys(self.leaves, True))

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers in another dtype, as fresh leaves."""

        def cast(x: Tensor) -> Tensor:
            return x.detach().to(dtype).requires_grad_()

        pair = None if self.low_rank is None else (cast(self.low_rank[0]), cast(self.low_rank[1]))
        bias = None if self.bias is None else cast(self.bias)
        return replace(self, hidden=cast(self.hidden), weight=cast(self.weight), bias=bias, low_rank=pair)


def make_inputs(case: Case, device: str | torch.device = "cpu", seed: int = 0) -> Inputs:
    """Random inputs of a case. They are drawn on the CPU, so that they are the same on every device."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(case.dtype).to(device)

    leading = case.leading or (case.T,)
    if case.strided:
        hidden = draw(*leading[:-1], leading[-1] + 1, case.D, scale=case.hidden_scale)[..., :-1, :]
    else:
        hidden = draw(*leading, case.D, scale=case.hidden_scale)
    weight = draw(case.V, case.D, scale=case.D**-0.5)
    if case.column:
        sign = torch.arange(case.T, device=device).view(leading) % 2 * 2 - 1
        hidden[..., 0], weight[:, 0] = sign * case.column, 1
    bias = draw(case.V) + case.shift if case.bias else None
    low_rank = (draw(*leading, case.R), draw(case.V, case.R, scale=0.5 * case.R**-0.5)) if case.R else None
    targets = torch.randint(0, case.V, (case.T,), generator=generator)
    row = torch.arange(case.T)
    masks = {
        "none": row < 0,
        "some": torch.rand(case.T, generator=generator) < 0.3,
        "first": row < 3,
        "last": row >= case.T // 4,
        "most": torch.rand(case.T, generator=generator) < 0.9,
        "all": row >= 0,
    }
    targets[masks[case.ignored]] = -100
    # The last target is the last entry of the vocabulary, which lies in the ragged tile.
    if case.T > 1 and targets[-1] != -100:
        targets[-1] = case.V - 1
    upstream = (torch.randn(*leading, generator=generator, dtype=torch.float64).to(device) for _ in range(3))

    def leaf(x: Tensor) -> Tensor:
        return x.detach().requires_grad_()

    return Inputs(
        leaf(hidden),
        leaf(weight),
        targets.view(leading).to(device),
        None if bias is None else leaf(bias),
        None if low_rank is None else (leaf(low_rank[0]), leaf(low_rank[1])),
        next(upstream),
        next(upstream),
        next(upstream) if case.entropy else None,
    )


# ----------------------------------------------------------------------------------------------------- the error budget


Result = dict[str, Tensor]


def run(function: Callable[..., LogpStats], inputs: Inputs, options: HeadOptions) -> Result:
    """All results of `function(hidden, weight, targets, bias, low_rank, options) -> LogpStats`, and its gradients under
    the inputs' upstream gradients."""
    stats = function(inputs.hidden, inputs.weight, inputs.targets, inputs.bias, inputs.low_rank, options)
    result = {name: x.detach() for name, x in stats._asdict().items() if x is not None}
    assert stats.lse is not None
    loss = (stats.token_logps.double() * inputs.d_token_logps + stats.lse.double() * inputs.d_lse).sum()
    if inputs.d_entropy is not None:
        assert stats.entropy is not None
        loss = loss + (stats.entropy.double() * inputs.d_entropy).sum()
    leaves = inputs.leaves
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return result | {f"d_{name}": g for name, g in zip(leaves, gradients)}


def eager(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Any, low_rank: Any, options: HeadOptions) -> LogpStats:
    """The eager PyTorch of a usual trainer, at the inputs' precision: F.linear, then log_softmax in float32."""
    z = torch.nn.functional.linear(hidden, weight, bias)
    if low_rank is not None:
        z = z + low_rank[0] @ low_rank[1].T
    z = options.logit_scale * z
    if options.softcap is not None:
        z = options.softcap * torch.tanh(z / options.softcap)
    z = z / options.temperature
    if z.dtype != torch.float64:
        z = z.float()
    live = targets != options.ignore_index
    logps = torch.log_softmax(z, -1)
    picked = logps.gather(-1, torch.where(live, targets, 0).unsqueeze(-1)).squeeze(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    with torch.no_grad():
        rest = (entropy, z.mean(-1), torch.logsumexp(2 * logps, -1))
    return LogpStats(*(torch.where(live, x, 0) for x in (picked, torch.logsumexp(z, -1), *rest)))


def exact(inputs: Inputs, options: HeadOptions) -> Result:
    """The true results: the specification in float64."""
    return run(reference.linear_logp_stats, inputs.to(torch.float64), options)


def error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute error, in units of the truth's root mean square. NaN where either alone is NaN."""
    if truth.numel() == 0:
        return 0.0 if actual.shape == truth.shape else float("nan")
    scale = truth.double().square().mean().sqrt().clamp(min=1e-30)
    return float((actual.double() - truth).abs().max() / scale)


def _views(actual: Tensor, truth: Tensor) -> dict[str, float]:
    """The error in three views: the largest catches a wrong entry, the overall norm a bias too small for any entry, and
    the worst row a wrong gradient of a token, or of a vocabulary id, that is small beside the others."""
    difference, truth = actual.double() - truth, truth.double()
    views = {"largest": error(actual, truth), "overall": float(difference.norm() / truth.norm().clamp(min=1e-30))}
    if truth.dim() > 1:
        views["worst row"] = float((difference.norm(dim=-1) / truth.norm(dim=-1).clamp(min=1e-30)).max())
    return views


def magnitude(inputs: Inputs, options: HeadOptions) -> float:
    """The largest sum of magnitudes behind one logit. Float32 arithmetic errs by a few eps of it, whatever the sum.
    What all logits of a row have in common is left out: eager's own error has it, and no probability needs it.
    """
    if inputs.targets.numel() == 0:
        return 1.0
    leaves = {name: x.detach().double().clone() for name, x in inputs.leaves.items()}
    if inputs.weight.shape[0] > 1:
        leaves["weight"][:, (leaves["weight"] == leaves["weight"][0]).all(0)] = 0
    if inputs.bias is not None:
        leaves["bias"] -= leaves["bias"][torch.isfinite(leaves["bias"])].mean()
    wide = {name: x.abs() for name, x in leaves.items()}
    total = wide["hidden"].flatten(0, -2) @ wide["weight"].T
    if inputs.low_rank is not None:
        total += wide["low_rank_hidden"].flatten(0, -2) @ wide["low_rank_weight"].T
    if inputs.bias is not None:
        total += wide["bias"]
    total = torch.where(torch.isfinite(total), total, 0)  # what is not finite has no rounding error
    return max(1.0, float(total.max()) * abs(options.logit_scale) / options.temperature)


def check_budget(actual: Result, inputs: Inputs, options: HeadOptions, factor: float = 2.0) -> float:
    """The largest share of its budget that a result takes.

    AssertionError unless each result is within `factor` times eager PyTorch's error against float64, in three views.

    Gradients are compared with eager PyTorch at the precision of the inputs. Values are float32 whatever the inputs,
    and compared with eager on inputs widened to float32, so that logits rounded to 16 bits do not pass. Where eager is
    exact by luck, the budget is `factor` times one rounding of the truth, or 2 eps of float32 of `magnitude`.
    """
    truth = exact(inputs, options)
    peers = run(eager, inputs, options)
    narrow = inputs.hidden.dtype in (torch.bfloat16, torch.float16)
    wide_peers = run(eager, inputs.to(torch.float32), options) if narrow else peers
    accumulator = torch.float64 if inputs.hidden.dtype == torch.float64 else torch.float32
    slack = 2 * torch.finfo(accumulator).eps * magnitude(inputs, options)
    largest = 0.0
    for name, value in actual.items():
        of_inputs = name.startswith("d_")
        dtype = torch.bool if name == "is_top1" else inputs.hidden.dtype if of_inputs else accumulator
        if (value.shape, value.dtype) != (truth[name].shape, dtype):
            raise AssertionError(f"{name} must be {truth[name].shape} {dtype}; got {value.shape} {value.dtype}")
        if name == "is_top1":
            if wrong := int((value != truth[name]).sum()):
                raise AssertionError(f"{name} differs in {wrong} rows")
            continue
        if value.numel() == 0:
            continue
        peer = _views((peers if of_inputs else wide_peers)[name], truth[name])
        rounded = _views(truth[name].to(value.dtype), truth[name])
        size = float(truth[name].square().mean().sqrt().clamp(min=1e-30))
        for view, found in _views(value, truth[name]).items():
            # Rounding gives values an absolute error and gradients a relative one.
            spread = float(truth[name].abs().max()) / size if view == "largest" else 1.0
            budget = factor * max(peer[view], rounded[view], slack * spread if of_inputs else slack / size)
            if not found <= budget:
                raise AssertionError(f"{name}: {view} error {found:.3e} exceeds the budget {budget:.3e}")
            largest = max(largest, found / budget if budget else 0.0)
    return largest


# ------------------------------------------------------------------------------------------------- Triton without a GPU


@contextlib.contextmanager
def triton_on_cpu(
    BLOCK_T: int = 64, BLOCK_V: int = 256, BLOCK_D: int = 64, tma: bool = True, library: bool = False
) -> Iterator[None]:
    """A context in which `impl="triton"` runs on CPU tensors: the same kernels and launchers, interpreted. `library`:
    products are a library's, as with `launch.LIBRARY`.

    bfloat16 is rounded as on a GPU. It needs no TRITON_INTERPRET, which would keep the process from compiling. The cost
    is per operation, so use big blocks.

    Raises ImportError for Triton 3.6 beside a numpy that its interpreter does not know.
    """
    import numpy as np
    import triton
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
    from triton.runtime.jit import JITFunction

    from .kernels import launch

    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        raise ImportError(f"numpy must be below 2.4 for the interpreter of Triton 3.6; got {np.__version__}")

    # Keys are ids: hashing a JITFunction walks its source, which the interpreter's patches to the language confuse.
    cache: dict[int, InterpretedFunction] = {}

    def interpreted(function: Any) -> InterpretedFunction:
        return cache.setdefault(id(function), InterpretedFunction(function.fn))

    def as_passed(value: Any, parameter: Any) -> Any:
        # A GPU gets a Python float as a float32, unless the kernel says another type; the interpreter would keep it.
        if not isinstance(value, float) or parameter.is_constexpr:
            return value
        of = tl.str_to_ty(parameter.annotation_type or "fp32", None)
        scalar = tl.tensor(interpreter.TensorHandle(np.array([value], np.float64), tl.float64), tl.float64)
        return scalar.to(of, _semantic=interpreter.interpreter_semantic)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        parameters = {parameter.name: parameter for parameter in self.params}
        args = tuple(map(as_passed, args, self.params))
        kwargs = {name: as_passed(x, parameters[name]) if name in parameters else x for name, x in kwargs.items()}
        # A launch patches the language as its kernel sees it, and restores it. Each nested call would patch it again,
        # and triton.language.core too, without restoring them: so that module is patched here, once.
        scope = interpreter._patch_lang(tl.max.fn)
        try:
            with np.errstate(all="ignore"):  # numpy warns where a GPU does not
                return interpreted(self)[grid](*args, **kwargs)
        finally:
            scope.restore()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return interpreted(self).rewrite()(*args, **kwargs)

    patches: list[tuple[Any, str, Any]] = [
        (JITFunction, "run", run),
        (JITFunction, "__call__", call),
        (launch, "interpreting", launch.Launch(BLOCK_T, BLOCK_V, BLOCK_D, 4, 1, tma=tma, persistent=tma, GROUP_T=2)),
        (launch, "LIBRARY", library),
        *((InterpreterBuilder, name, patch) for name, patch in _gpu_arithmetic(InterpreterBuilder).items()),
        *_remembered_types(),
    ]
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    try:
        for owner, name, value in patches:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)


def _remembered_types() -> list[tuple[Any, str, Any]]:
    """What takes the place of (owner, name) in Triton, which works out the types of each operation from nothing.

    The types are the same. A kernel is interpreted in two fifths of the time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    numpy_of, of_block, of_tensor = interpreter._get_np_dtype, tl.block_type.__init__, tl.tensor.__init__
    of_overflow = interpreter.TritonSemantic.binary_op_sanitize_overflow_impl
    broadcast = interpreter.TritonSemantic.broadcast_impl_value
    numpy_types: dict[str, Any] = {}
    blocks: dict[tuple[int, ...], tuple[dict[str, Any], str]] = {}
    tensors: dict[tuple[int, ...], dict[str, Any]] = {}

    def _get_np_dtype(of: Any) -> Any:
        name = (of.element_ty if isinstance(of, tl.block_type) else of).name
        if name not in numpy_types:
            numpy_types[name] = numpy_of(of)
        return numpy_types[name]

    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple([s.value if isinstance(s, tl.constexpr) else s for s in shape])
        if key not in blocks:
            of_block(self, element_ty, shape)
            own = {name: value for name, value in vars(self).items() if name not in ("element_ty", "name")}
            blocks[key] = own, str(self.shape)
        own, text = blocks[key]
        vars(self).update(own, element_ty=element_ty, name=f"<{text}, {element_ty}>")

    def tensor_init(self: Any, handle: Any, of: Any) -> None:
        key = tuple(of.shape) if of.is_block() else ()
        if key not in tensors:
            of_tensor(self, handle, of)
            tensors[key] = {name: x for name, x in vars(self).items() if name not in ("handle", "type", "dtype")}
        vars(self).update(tensors[key], handle=handle, type=of, dtype=of.scalar)

    def binary_op_sanitize_overflow_impl(self: Any, *args: Any) -> None:
        if self.builder.options.debug:  # if not, an assertion that nothing makes is computed in int64
            of_overflow(self, *args)

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        of, to = lhs.type, rhs.type
        if of.is_block() and to.is_block() and of.shape is to.shape:  # block_init gives all of a shape the same object
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return [
        (interpreter, "_get_np_dtype", _get_np_dtype),
        (tl.block_type, "__init__", block_init),
        (tl.tensor, "__init__", tensor_init),
        (interpreter.TritonSemantic, "binary_op_sanitize_overflow_impl", binary_op_sanitize_overflow_impl),
        (interpreter.TritonSemantic, "broadcast_impl_value", broadcast_impl_value),
    ]


def _gpu_arithmetic(builder: Any) -> dict[str, Callable[..., Any]]:
    """Interpreter operations with a GPU's results. Triton's own hold bfloat16 as uint16 and compute on the bits; these
    widen to float32, compute, and round to nearest even. A maximum prefers a number to NaN. tests/test_interpreter.py
    tests them."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def narrow(data: Any) -> Any:
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        return TensorHandle(np.where(np.isnan(data), np.uint16(0x7FC0), rounded), tl.bfloat16)

    dot, binary, unary, cast = builder.create_dot, builder.binary_op, builder.unary_op, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widen(a), widen(b), *rest)

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        if getattr(a.dtype, "scalar", None) != tl.bfloat16:
            out = binary(self, a, b, op)
            # Triton 3.9 gives a comparison the type of what it compares, which a broadcast scalar then takes.
            return TensorHandle(out.data, tl.int1) if out.data.dtype == np.bool_ else out
        out = binary(self, widen(a), widen(b), op)
        return out if out.data.dtype == np.bool_ else narrow(out.data)

    def unary_op(self: Any, a: Any, op: Any) -> Any:
        if getattr(a.dtype, "scalar", None) != tl.bfloat16:
            return unary(self, a, op)
        return narrow(unary(self, widen(a), op).data)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        of, to_scalar = source.dtype.scalar, to.scalar
        if of == tl.bfloat16 and to_scalar != tl.bfloat16:
            wide = widen(source)
            return wide if to_scalar == tl.float32 else cast(self, wide, to)
        if to_scalar == tl.bfloat16 and of != tl.bfloat16:
            return narrow(source.data.astype(np.float32))
        return cast(self, source, to)

    def create_maxnumf(self: Any, a: Any, b: Any) -> Any:
        return self.binary_op(a, b, np.fmax)

    def create_minnumf(self: Any, a: Any, b: Any) -> Any:
        return self.binary_op(a, b, np.fmin)

    patches = (create_dot, binary_op, unary_op, cast_impl, create_maxnumf, create_minnumf)
    return {patch.__name__: patch for patch in patches}
