"""The LM head: every implementation and every path of lm_head/dispatch.py, over shapes, dtypes, options, and regimes of
values in which other implementations break. Triton's kernels run in its interpreter.

Each result is held to the budget of budget.py: twice eager PyTorch's error against float64. Where a tolerance leaves
gradients out, the bound that docs/math.md states is added.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from poisoned import poisoned
from torch import Tensor

from groupdpo_kernels import linear_logp_stats, linear_logps, reference
from groupdpo_kernels.reference import HeadOptions, LogpStats, accumulator
from groupdpo_kernels.replay import LseTape
from groupdpo_kernels.testing import Case, Inputs, Result, make_inputs, triton_on_cpu

from . import budget
from .frame import Family

TOLERANCES = (2.0**-20, 2.0**-7, 0.05)
DTYPES = {"float32": 4, "bfloat16": 4, "float16": 2}  # how often
STATISTICS = ("lse", "entropy", "mean_logits", "log_sum_sq_probs", "is_top1")
LEAVES = ("hidden", "weight", "bias", "low_rank_hidden", "low_rank_weight")

# What the autograd Function of a path is called; "" where there is no gradient, or another way to see it.
PATHS = {
    "exact": "ExactLinearLogpsBackward",
    "statistics": "ExactLinearLogpsBackward",
    "frozen head": "FrozenLinearLogpsBackward",
    "logit cache": "CachedLinearLogpsBackward",
    "known lse": "ExactLinearLogpsBackward",
    "candidates": "SparseLinearLogpsBackward",
    "candidates, frozen head": "FrozenLinearLogpsBackward",
    "candidates, sampled tail": "SparseLinearLogpsBackward",
    "split vocabulary": "ShardedLinearLogpsBackward",
    "forward alone": "",
}
BY_IMPL = {
    # The specification has no paths: whole rows, and autograd.
    "specification": ("exact", "statistics", "forward alone"),
    "reference": tuple(path for path in PATHS if path != "logit cache"),
    "cpu": tuple(PATHS),
    # What the interpreter adds is the kernels; paths that differ in nothing else are left out.
    "triton": tuple(path for path in PATHS if path not in ("logit cache", "known lse", "split vocabulary")),
}
IMPLS = {"specification": 7, "reference": 40, "cpu": 50, "triton": 3}  # how often, in a hundred
REGIMES = (
    "plain",
    "subnormal inputs",
    "logits of 1e4",
    "offset of 1e4",
    "offset of 1e6",
    "equal logits",
    "all at -1e4",
    "one token",
    "confident",
    "peaked",
    "NaN or inf in a row",
    "-inf in the bias",
)


@dataclass(frozen=True)
class HeadCase:
    number: int
    regime: str
    impl: str
    path: str
    shape: Case
    ignore_index: int
    needs: tuple[str, ...]  # leaves whose gradients are asked for
    outputs: tuple[str, ...]
    layout: str  # of the weight: "contiguous", "transposed", "sliced"
    grad_tol: float
    threads: int
    tiles: tuple[int, bool]  # BLOCK_V and tma of the interpreted kernels

    @property
    def rows(self) -> tuple[str, ...]:
        return (
            f"values: {self.regime}",
            f"path: {self.path}",
            f"dtype: {str(self.shape.dtype).removeprefix('torch.')}",
            f"threads: {self.threads}",
        )

    @property
    def column(self) -> str:
        return self.impl

    @property
    def options(self) -> HeadOptions:
        return replace(self.shape.options, ignore_index=self.ignore_index)


# --------------------------------------------------------------------------------------------------------------- drawn


def draw(number: int) -> HeadCase:
    chance = random.Random(number)

    def weighted(of: dict[str, int]) -> str:
        return chance.choices(list(of), list(of.values()))[0]

    impl, regime = weighted(IMPLS), chance.choice(REGIMES)
    path = chance.choice(BY_IMPL[impl])
    dtype = weighted({"bfloat16": 8, "float32": 1, "float16": 1} if regime == "peaked" else DTYPES)
    if dtype == "float16" and regime == "offset of 1e6":
        dtype = "float32"  # float16 ends at 65504
    if impl in ("specification", "reference") and chance.random() < 0.1:
        dtype = "float64"
    if impl == "triton":
        leading = tuple(chance.randint(1, 4) for _ in range(chance.randint(1, 2)))
        D, V = chance.randint(1, 48), chance.randint(1, 150)
    else:
        leading = tuple(chance.randint(1, 7) for _ in range(chance.randint(1, 3)))
        D, V = chance.randint(1, 80), chance.choice([chance.randint(1, 20), chance.randint(20, 700)])
    if path == "logit cache":  # the path asks for a wide head
        D, V = 2048 + chance.randint(0, 9), chance.randint(1, 120)
    if path.startswith("candidates"):
        V = max(V, 2)
    bias, rank = chance.random() < 0.5, chance.choice([0, 0, 1, 5, 16])
    softcap = chance.choice([None, None, None, 2.0, 30.0])
    hidden_scale, shift, column = chance.choice([0.1, 1.0, 4.0]), chance.choice([0.0, 0.0, 20.0, -20.0]), 0.0
    if regime.startswith("offset"):
        size = float(regime.split()[-1]) * chance.choice([1, -1])
        bias, shift, column = chance.choice([(True, size, 0.0), (bias, shift, size)])
        softcap = chance.choice([None, None, 10 * abs(size), 30.0])
    elif regime == "logits of 1e4":
        hidden_scale = 300.0  # prepared() scales the weight too: both are then numbers of float16
        softcap = chance.choice([None, None, 1e5, 30.0])
    elif regime == "all at -1e4":
        bias, rank, shift, softcap = True, 0, -1e4, None
    elif regime == "equal logits":
        rank = 0
    elif regime == "one token":
        V = 1
    elif regime == "confident":
        bias, rank, softcap, V = False, 0, chance.choice([None, None, 30.0]), max(V, 2)
    elif regime == "peaked":
        hidden_scale = 30.0
    elif regime == "-inf in the bias":
        bias, V = True, max(V, 3)
    elif regime == "NaN or inf in a row" and path.startswith("candidates"):
        softcap = None  # it makes the logits of infinite states finite, and a tolerance leaves out 0 times infinity
    leaves = [name for name in LEAVES if (bias or name != "bias") and (rank or not name.startswith("low_rank"))]
    outputs: tuple[str, ...] = ()
    if path in ("statistics", "forward alone") or (path == "split vocabulary" and chance.random() < 0.5):
        outputs = tuple(chance.sample(STATISTICS, chance.randint(1, 5)))
        if path == "split vocabulary":
            outputs = tuple(name for name in outputs if name != "is_top1")
    elif not path.endswith("frozen head") and chance.random() < 0.5:
        outputs = ("lse",)
    return HeadCase(
        number,
        regime,
        impl,
        path,
        Case(
            "drawn",
            math.prod(leading),
            D,
            V,
            "",
            getattr(torch, dtype),
            bias,
            rank,
            chance.choice([1.0, 1.0, 0.1, 2.5, -1.0]) if column == 0 and regime != "confident" else 1.0,
            softcap,
            chance.choice([1.0, 1.0, 0.5, 3.0]),
            chance.choice(["none", "some", "some", "first", "last", "most", "all"]),
            hidden_scale,
            shift,
            leading,
            chance.random() < 0.4,
            # The paths with a condition on the budget get what they ask for.
            2**28 if path not in ("exact", "statistics", "known lse") else chance.choice([2**12, 2**16, 2**28]),
            column,
            entropy="entropy" in outputs and chance.random() < 0.7,
        ),
        chance.choice([-100, -100, -1, 0, V + 5]),
        _needs(path, leaves, outputs, chance),
        outputs,
        chance.choice(["contiguous", "contiguous", "transposed", "sliced"]),
        chance.choice(TOLERANCES) if path.startswith("candidates") else 0.0,
        chance.choices([1, 2, 5], [8, 1, 1])[0],
        (chance.choice([64, 128]), chance.random() < 0.5),
    )


def _needs(path: str, leaves: list[str], outputs: tuple[str, ...], chance: random.Random) -> tuple[str, ...]:
    """Leaves to differentiate, such that dispatch.py takes the path."""
    if path == "forward alone":
        return ()
    of_tokens = [name for name in leaves if name in ("hidden", "low_rank_hidden")]
    if path.endswith("frozen head"):
        return tuple(of_tokens) if chance.random() < 0.5 else ("hidden",)
    chosen = [name for name in leaves if chance.random() < 0.6]
    of_head = [name for name in leaves if name not in of_tokens]
    if not chosen or (not outputs and not set(chosen) & set(of_head)):  # would be a frozen head
        chosen.append(chance.choice(of_head))
    return tuple(name for name in leaves if name in chosen)


# ------------------------------------------------------------------------------------------------------------ prepared


def prepared(case: HeadCase, seed: int) -> Inputs:
    """The tensors of a case: those of make_inputs, with what its regime changes. With another seed a case alike."""
    inputs, generator = make_inputs(case.shape, seed=seed), torch.Generator().manual_seed(seed)
    hidden, weight, targets = inputs.hidden.detach(), inputs.weight.detach(), inputs.targets.clone()
    bias = None if inputs.bias is None else inputs.bias.detach()
    dtype, V = hidden.dtype, weight.shape[0]

    def some(size: int) -> int:
        return int(torch.randint(size, (), generator=generator))

    if case.regime == "subnormal inputs":
        if dtype == torch.float16:  # subnormal below 6e-5
            hidden = (hidden * 1e-6).to(dtype)
        elif dtype == torch.bfloat16:  # units that multiply bfloat16 may take these for zero
            hidden = (hidden.float() * 1e-39).to(dtype)
        else:  # logits of usual size
            hidden, weight = hidden * 2.0**-130, weight * 2.0**120
    elif case.regime == "logits of 1e4":
        weight = weight * 30
    elif case.regime in ("equal logits", "all at -1e4"):
        weight = weight[:1].expand(V, -1).clone()
        if bias is not None:
            bias = torch.full_like(bias, case.shape.shift)
    elif case.regime == "confident":
        hidden = _confident(case, hidden, weight, targets, generator).to(dtype)
    elif case.regime == "NaN or inf in a row" and hidden.numel():
        row, at = some(targets.numel()), some(hidden.shape[-1])
        flat = hidden.reshape(-1, hidden.shape[-1]).clone()
        flat[row, at] = [math.nan, math.inf, -math.inf][some(3)]
        hidden = flat.view(hidden.shape)
    elif case.regime == "-inf in the bias":
        assert bias is not None
        bias = bias.clone()
        bias[torch.randperm(V, generator=generator)[: max(1, V // 3)]] = -math.inf
    if case.layout == "transposed":
        weight = weight.t().contiguous().t()
    elif case.layout == "sliced":
        weight = torch.nn.functional.pad(weight, (2, 3))[:, 2:-3]
    targets[targets == -100] = case.ignore_index
    zero = torch.zeros_like(inputs.d_lse)

    def leaf(name: str, x: Tensor) -> Tensor:
        return x.detach().requires_grad_(name in case.needs)

    return Inputs(
        leaf("hidden", hidden),
        leaf("weight", weight),
        targets,
        None if bias is None else leaf("bias", bias),
        None
        if inputs.low_rank is None
        else (leaf("low_rank_hidden", inputs.low_rank[0]), leaf("low_rank_weight", inputs.low_rank[1])),
        inputs.d_token_logps,
        inputs.d_lse if "lse" in case.outputs else zero,
        inputs.d_entropy,
    )


def _confident(case: HeadCase, hidden: Tensor, weight: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """hidden plus so much of the target's own row that its probability lies between 0.9 and 1 - 1e-6, by bisection."""
    p = 1 - 10 ** (-1 - 5 * torch.rand(targets.shape, generator=generator, dtype=torch.float64))
    w, base, y = weight.double(), hidden.double() * 0.3, targets.clamp(min=0)
    towards = w[y] / w[y].square().sum(-1, keepdim=True).clamp(min=1e-6)
    z, by = base @ w.T, towards @ w.T
    low, high = torch.zeros_like(p), torch.full_like(p, 300.0)
    for _ in range(20):
        middle = (low + high) / 2
        logits = z + middle[..., None] * by
        if case.shape.softcap is not None:
            logits = case.shape.softcap * torch.tanh(logits / case.shape.softcap)
        p_now = torch.softmax(logits / case.shape.temperature, -1).gather(-1, y[..., None])[..., 0]
        low, high = torch.where(p_now < p, middle, low), torch.where(p_now < p, high, middle)
    return base + high[..., None] * towards


# ------------------------------------------------------------------------------------------------------------ computed


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def alone() -> Iterator[Any]:
    """A process group of this process: the joins over ranks run, with nobody to join."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def function(case: HeadCase, inputs: Inputs, group: Any) -> LogpStats:
    pair, options = inputs.low_rank, case.options
    if case.impl == "specification":
        return reference.linear_logp_stats(inputs.hidden, inputs.weight, inputs.targets, inputs.bias, pair, options)
    arguments = (inputs.hidden, inputs.weight, inputs.targets, inputs.bias)
    keywords = asdict(options) | {"impl": case.impl, "grad_tol": case.grad_tol, "low_rank": pair}
    keywords |= {"grad_tail": "sample"} if case.path.endswith("sampled tail") else {}
    keywords |= {"process_group": group} if group is not None else {}
    if not case.outputs:
        return LogpStats(linear_logps(*arguments, **keywords))
    return linear_logp_stats(*arguments, outputs=case.outputs, **keywords)


def computed(case: HeadCase, inputs: Inputs) -> Result:
    """The outputs and gradients that the case asks for."""
    with contextlib.ExitStack() as within:
        within.enter_context(threads(case.threads))
        within.enter_context(poisoned())
        within.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(case.number)  # of a sampled tail
        if case.impl == "triton":
            width, tma = case.tiles
            within.enter_context(triton_on_cpu(BLOCK_T=16, BLOCK_V=width, BLOCK_D=32, tma=tma))
        group = within.enter_context(alone()) if case.path == "split vocabulary" else None
        if case.path == "known lse":
            tape = LseTape()
            with torch.no_grad(), tape.record():
                function(case, inputs, group)
            within.enter_context(tape.replay())
        stats = function(case, inputs, group)
        wanted = ("token_logps", *case.outputs)
        result = {name: x.detach() for name, x in stats._asdict().items() if name in wanted and x is not None}
        if not case.needs:
            return result
        if case.impl != "specification":
            taken = type(stats.token_logps.grad_fn).__name__
            assert taken == PATHS[case.path], f"the path must be {case.path!r}; got {taken}"
        loss = (stats.token_logps.double() * inputs.d_token_logps).sum()
        if "lse" in case.outputs:
            loss = loss + (stats.lse.double() * inputs.d_lse).sum()  # type: ignore[union-attr]
        if inputs.d_entropy is not None:
            loss = loss + (stats.entropy.double() * inputs.d_entropy).sum()  # type: ignore[union-attr]
        gradients = torch.autograd.grad(loss, [inputs.leaves[name] for name in case.needs])
        return result | {f"d_{name}": g for name, g in zip(case.needs, gradients)}


# -------------------------------------------------------------------------------------------------------------- judged


def judge(case: HeadCase) -> dict[str, float]:
    options, inputs = case.options, prepared(case, case.number)
    actual, found = computed(case, inputs), {}
    inputs = inputs.to(case.shape.dtype)  # with a gradient of every leaf, whatever the case asks for
    stated, by = 0.0, abs(options.logit_scale) / options.temperature
    if case.impl == "triton" and options.softcap and case.shape.dtype.itemsize == 2:
        stated += (
            1e-7 * options.softcap / options.temperature
        )  # of its tanh, for 16-bit inputs (kernels/triton/tile.py)
    if case.regime == "equal logits":
        # Eager's are equal to the last bit, as its GEMM treats all rows of the weight alike. In a tile of another
        # shape, or as the dot product of a target alone, the same sum may be rounded otherwise.
        sums = inputs.hidden.detach().abs().double() @ inputs.weight[0].detach().abs().double()
        stated += 2 * torch.finfo(accumulator(case.shape.dtype)).eps * by * float(sums.max())
    truth = budget.truth_of(inputs, options, stated)
    if case.path == "known lse":
        # The second pass returns a logit that is computed again, and rounded otherwise, less the lse of the first. Its
        # gradients are made of the first pass's log-probabilities.
        finite = torch.where(torch.isfinite(truth.logits), truth.logits, 0)
        truth.floors["token_logps"] += 2 * torch.finfo(accumulator(case.shape.dtype)).eps * float(finite.abs().max())
    if "is_top1" in actual:
        found["is_top1"] = budget.share_of_top1(actual.pop("is_top1"), inputs, options, truth)
    left_out = {}
    if case.grad_tol:
        sampled = case.path.endswith("sampled tail")
        left_out = budget.left_out_by_candidates(inputs, options, truth, case.grad_tol, sampled)

    def alike(seed: int) -> Inputs:
        return prepared(case, -seed).to(case.shape.dtype)

    return found | budget.shares(actual, inputs, options, truth, alike, left_out)


FAMILY = Family(
    name="head",
    title="The LM head: regimes of values, paths, dtypes and threads, by implementation.",
    count=10_000,
    draw=draw,
    judge=judge,
    sources=(
        "tests/campaign/budget.py",
        "tests/campaign/heads.py",
        "python/groupdpo_kernels/*.py",
        "python/groupdpo_kernels/lm_head/*.py",
        "kernels/triton/*.py",
        "csrc/**/*.[ch]*",
    ),
)
