"""The LM head: every implementation and every path of lm_head/dispatch.py, over shapes, dtypes, options, and regimes of
values in which other implementations break. Triton's kernels run in its interpreter.

Each result is held to testing.comparisons: twice eager PyTorch's error against float64, in the worst of ORDERS orders,
since these tensors are small. Where a tolerance leaves gradients out, the bound that docs/math.md states is added.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from poisoned import poisoned
from torch import Tensor

from groupdpo_kernels import linear_logp_stats, linear_logps, reference
from groupdpo_kernels.reference import HeadOptions, LogpStats
from groupdpo_kernels.replay import LseTape
from groupdpo_kernels.testing import (
    Case,
    Inputs,
    Result,
    comparisons,
    exact,
    magnitude,
    make_inputs,
    peers_of,
    triton_on_cpu,
)

from .frame import Family

ORDERS = 3
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
            f"1. {self.regime}",
            f"2. {self.path}",
            f"3. {str(self.shape.dtype).removeprefix('torch.')}",
            f"4. {self.threads} threads",
        )

    @property
    def column(self) -> str:
        return self.impl

    @property
    def options(self) -> HeadOptions:
        return replace(self.shape.options, ignore_index=self.ignore_index)


# ---------------------------------------------------------------------------------------------------------------- drawn


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
        chance.choices([1, 2, 5], [6, 2, 2])[0],
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


# -------------------------------------------------------------------------------------------------------------- prepared


def prepared(case: HeadCase) -> Inputs:
    """The tensors of a case: those of make_inputs, with what its regime changes."""
    inputs, generator = make_inputs(case.shape, seed=case.number), torch.Generator().manual_seed(case.number)
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
    """hidden plus as much of the target's own row as gives it a probability from 0.9 to 1 - 1e-6, found by bisection."""
    p = 1 - 10 ** (-1 - 5 * torch.rand(targets.shape, generator=generator, dtype=torch.float64))
    w, base, y = weight.double(), hidden.double() * 0.3, targets.clamp(min=0)
    towards = w[y] / w[y].square().sum(-1, keepdim=True).clamp(min=1e-6)
    low, high = torch.zeros_like(p), torch.full_like(p, 300.0)
    for _ in range(40):
        middle = (low + high) / 2
        logps = reference.linear_logps(base + middle[..., None] * towards, w, y, None, None, case.shape.options)
        low, high = torch.where(logps.exp() < p, middle, low), torch.where(logps.exp() < p, high, middle)
    return base + high[..., None] * towards


# -------------------------------------------------------------------------------------------------------------- computed


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


# ---------------------------------------------------------------------------------------------------------------- judged


def judge(case: HeadCase) -> dict[str, float]:
    inputs = prepared(case)
    actual, shares = computed(case, inputs), {}
    whole = inputs.to(inputs.hidden.dtype)  # every leaf with its gradient
    if "is_top1" in actual:
        shares["is_top1"] = top1_share(actual.pop("is_top1"), whole, case.options)
    if case.grad_tol:
        gradients = {name: actual.pop(name) for name in list(actual) if name.startswith("d_")}
        shares |= within_tolerance(case, gradients, whole)
    for found in comparisons(actual, whole, case.options, orders=ORDERS):
        shares[found.name] = max(shares.get(found.name, 0.0), found.share)
    return shares


def logits_of(inputs: Inputs, options: HeadOptions) -> Tensor:  # (T, V) float64
    wide = {name: x.detach().double() for name, x in inputs.leaves.items()}
    pair = (wide["low_rank_hidden"], wide["low_rank_weight"]) if inputs.low_rank is not None else None
    z = reference.logits(wide["hidden"], wide["weight"], wide.get("bias"), pair, options)
    return z.reshape(-1, z.shape[-1])


def top1_share(actual: Tensor, inputs: Inputs, options: HeadOptions) -> float:
    """Of what rounding excuses: the gap between the target's logit and the largest other one, where `actual` is wrong
    about its sign. Logits that rounding may exchange have no right answer; a row that is not finite has none at all.
    """
    z, targets = logits_of(inputs, options), inputs.targets.reshape(-1)
    live = targets != options.ignore_index
    at = torch.where(live, targets, 0)[:, None]
    gap = z.gather(1, at)[:, 0] - z.scatter(1, at, -math.inf).max(1).values
    said = actual.reshape(-1)
    if (said & ~live).any():
        return math.inf
    wrong = torch.where(said, -gap, gap).clamp(min=0)
    rounding = 4 * torch.finfo(reference.accumulator(inputs.hidden.dtype)).eps
    allowed = rounding * (magnitude(inputs, options) + z.gather(1, at)[:, 0].abs())
    judged = live & torch.isfinite(z).any(1) & ~z.isnan().any(1) & ~(z == math.inf).any(1) & torch.isfinite(allowed)
    return float((wrong / allowed)[judged].max()) if judged.any() else 0.0


def within_tolerance(case: HeadCase, actual: Result, inputs: Inputs) -> dict[str, float]:
    """The share of each gradient under a tolerance. docs/math.md bounds the sum over its rows of the norm of what is
    left out; eager PyTorch's error in that sum, twice, comes on top, as everywhere.
    """
    options, truth = case.options, exact(inputs, case.options)
    live = inputs.targets.reshape(-1) != options.ignore_index
    z, y = logits_of(inputs, options), torch.where(live, inputs.targets.reshape(-1), 0)[:, None]
    logps = torch.log_softmax(z, -1)
    whole = live & torch.isfinite(logps.gather(1, y)[:, 0])  # other rows take the exact path
    p = logps.exp().scatter(1, y, 0)
    coefficient = (inputs.d_lse - inputs.d_token_logps).reshape(-1).abs()
    if case.path.endswith("sampled tail"):
        likely, where = p.topk(min(256, p.shape[1]), 1)  # of these, what is surely a candidate
        kept = torch.zeros_like(p).scatter(1, where, torch.where(likely > case.grad_tol / 4 * 1.001, likely, 0))
        left_out = 2 * coefficient * (p - kept).sum(1) * (1 + 2.0**-17)
    else:
        left_out = case.grad_tol * coefficient * p.sum(1)
    chain = abs(options.logit_scale) / options.temperature
    allowed = chain * float(torch.where(whole, left_out, 0).sum())
    factors = {"hidden": "weight", "weight": "hidden", "low_rank_hidden": "low_rank_weight"}
    factors |= {"low_rank_weight": "low_rank_hidden"}
    eager = peers_of(inputs, options, ORDERS)
    slack = 2 * torch.finfo(reference.accumulator(inputs.hidden.dtype)).eps * magnitude(inputs, options)
    shares = {}
    for name, value in actual.items():
        leaf, true = name.removeprefix("d_"), truth[name]
        spoilt = ~torch.isfinite(true.to(value.dtype))
        same = torch.equal(value[spoilt].nan_to_num(nan=0.5), true.to(value.dtype)[spoilt].nan_to_num(nan=0.5))
        if value.dtype != inputs.hidden.dtype or value.shape != true.shape or not same:
            shares[name] = math.inf
            continue

        def total(x: Tensor) -> float:
            x = torch.where(spoilt, 0, x.double() - true)  # noqa: B023
            return float((x if leaf == "bias" else x.norm(dim=-1)).abs().sum())  # noqa: B023

        by_eager = [error for error in map(total, (result[name] for result in eager)) if math.isfinite(error)]
        rounding = max(total(true.to(value.dtype)), slack * total(torch.zeros_like(true)), *by_eager, 0.0)
        norm = 1.0
        if leaf in factors:
            norms = inputs.leaves[factors[leaf]].detach().double().norm(dim=-1).reshape(-1)
            norm = float(norms[torch.isfinite(norms)].max()) if norms.numel() else 0.0
        budget, error = allowed * norm + 2 * rounding, total(value)
        shares[name] = 0.0 if error == 0 else error / budget if budget and math.isfinite(error) else math.inf
    return shares


FAMILY = Family(
    name="head",
    title="The LM head: regimes of values, paths, dtypes and threads, by implementation.",
    count=10_000,
    draw=draw,
    judge=judge,
    sources=(
        "tests/campaign/heads.py",
        "python/groupdpo_kernels/*.py",
        "python/groupdpo_kernels/lm_head/*.py",
        "kernels/triton/*.py",
        "csrc/**/*.[ch]*",
    ),
)
