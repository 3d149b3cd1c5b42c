"""Logits far from zero, and logits that are not finite, on every path: exact, two passes, kept products, a frozen head,
few candidates, a sampled tail, a split vocabulary. Each implementation; the Triton kernels run interpreted.

An offset that all logits of a row share changes no probability, so the error stays within twice eager PyTorch's, whose
log_softmax subtracts the maximum first. Which rows are NaN is what torch.log_softmax and its autograd say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from groupdpo_kernels import LogpStats, linear_logp_stats, linear_logps
from groupdpo_kernels.lm_head.autograd import CachedLinearLogps, CallOptions
from groupdpo_kernels.reference import HeadOptions, head_of
from groupdpo_kernels.replay import LseTape
from groupdpo_kernels.testing import Case, Inputs, Result, check_budget, make_inputs, run, triton_on_cpu

Head = tuple[Tensor, Tensor, Tensor, Tensor | None, Any]  # hidden, weight, targets, bias, low_rank
Path = Callable[..., LogpStats]

IMPLS = ("reference", "cpu", "triton")
# Small enough that what a tolerance leaves out is lost in the rounding of every logit.
TOLERANCE = 2.0**-20


@contextlib.contextmanager
def able(impl: str) -> Iterator[None]:
    with triton_on_cpu(64, 256, 64) if impl == "triton" else contextlib.nullcontext():
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A group of this process: the joins over ranks run, with nobody to join."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def keywords(o: HeadOptions) -> dict[str, Any]:
    return {name: getattr(o, name) for name in ("logit_scale", "softcap", "temperature", "workspace_bytes")}


def full(impl: str, group: Any = None, **options: Any) -> Path:
    def path(h: Tensor, w: Tensor, y: Tensor, b: Tensor | None, low_rank: Any, o: HeadOptions) -> LogpStats:
        options_ = keywords(o) | options | {"impl": impl, "low_rank": low_rank, "process_group": group}
        return linear_logp_stats(h, w, y, b, outputs=("lse",), **options_)

    return path


def two_pass(impl: str) -> Path:
    """The gradients of a forward that was given the lse."""

    def path(*arguments: Any) -> LogpStats:
        tape = LseTape()
        with torch.no_grad(), tape.record():
            full(impl)(*arguments)
        with tape.replay():
            return full(impl)(*arguments)

    return path


def kept(h: Tensor, w: Tensor, y: Tensor, b: Tensor | None, low_rank: Any, o: HeadOptions) -> LogpStats:
    options = CallOptions(o, columns=w.shape[0])
    return LogpStats(*CachedLinearLogps.apply(*head_of(h, w, b, *(low_rank or ())), y, options)[:2])


def path_of(name: str, impl: str, group: Any) -> Path:
    return {
        "exact": full(impl),
        "two_pass": two_pass(impl),
        "kept": kept,
        "candidates": full(impl, grad_tol=TOLERANCE),
        "sampled": full(impl, grad_tol=TOLERANCE, grad_tail="sample"),
        "sharded": full(impl, group),
    }[name]


NAMES = ("exact", "two_pass", "candidates", "sampled", "sharded", "frozen", "frozen_candidates")
# An interpreted tile is slow, and joining ranks and replaying a tape are not the kernels' business.
PATHS = [
    *((name, impl) for impl in ("reference", "cpu") for name in NAMES),
    ("kept", "cpu"),
    *((name, "triton") for name in ("exact", "candidates", "frozen")),
]


def by_path(pairs: list[tuple[str, ...]], *names: str) -> Any:
    return pytest.mark.parametrize((*names, "name", "impl"), pairs, ids=["-".join(pair) for pair in pairs])


def frozen(inputs: Inputs, options: HeadOptions, impl: str, grad_tol: float) -> Result:
    """A head that needs no gradient: token_logps, d_hidden and d_low_rank_hidden."""
    leaves = {"hidden": inputs.hidden.detach().requires_grad_()}
    low_rank = None
    if inputs.low_rank is not None:
        leaves["low_rank_hidden"] = inputs.low_rank[0].detach().requires_grad_()
        low_rank = (leaves["low_rank_hidden"], inputs.low_rank[1].detach())
    bias = None if inputs.bias is None else inputs.bias.detach()
    head = (leaves["hidden"], inputs.weight.detach(), inputs.targets, bias)
    logps = linear_logps(*head, low_rank=low_rank, grad_tol=grad_tol, impl=impl, **keywords(options))
    gradients = torch.autograd.grad((logps.double() * inputs.d_token_logps).sum(), list(leaves.values()))
    return {"token_logps": logps.detach()} | {f"d_{x}": g for x, g in zip(leaves, gradients)}


def result_of(name: str, impl: str, inputs: Inputs, options: HeadOptions, group: Any) -> Result:
    with able(impl):
        if name.startswith("frozen"):
            return frozen(inputs, options, impl, TOLERANCE if name == "frozen_candidates" else 0.0)
        return run(path_of(name, impl, group), inputs, options)


# ------------------------------------------------------------------------------------------------- far from zero

# A vocabulary that fits in a row's candidates: the tolerance then leaves next to nothing out.
BASE = Case("", 33, 48, 200, "", bias=True)
FAR = {
    "1e2": replace(BASE, shift=1e2),
    "1e4": replace(BASE, shift=-1e4),
    "1e6": replace(BASE, shift=1e6),
    "column_1e4": replace(BASE, column=1e4, R=4),
    "column_1e6": replace(BASE, column=1e6),
    "softcap": replace(BASE, shift=1e4, softcap=1e5),
    "scaled": replace(BASE, shift=1e4, logit_scale=0.5, temperature=2.0),
    "bf16": replace(BASE, column=1e4, dtype=torch.bfloat16),
    "unlikely": replace(BASE, shift=1e4, hidden_scale=30.0),
    "impossible": replace(BASE, T=31, shift=1e6, hidden_scale=3e3),
}


# The kernels meet every offset in CASES; a tolerance leaves out whole rows of d_weight where no token is likely.
FAR_PATHS: list[tuple[str, ...]] = [
    (far, name, impl)
    for far in FAR
    for name, impl in PATHS
    if (impl != "triton" or far in ("1e6", "column_1e4"))
    and (far != "unlikely" or name not in ("candidates", "sampled"))
]


@by_path(FAR_PATHS, "far")
def test_a_common_offset_costs_no_digit(far: str, name: str, impl: str, alone: Any) -> None:
    case = FAR[far]
    inputs = make_inputs(case)
    if name.startswith("frozen"):
        inputs = replace(inputs, d_lse=torch.zeros_like(inputs.d_lse))
    check_budget(result_of(name, impl, inputs, case.options, alone), inputs, case.options)


# ------------------------------------------------------------------------------------------------- not finite

T, D, V, ROW = 6, 8, 40, 3


def not_finite(what: str) -> Inputs:
    """Row ROW, or a column of the vocabulary, whose logits are not finite; all targets are ids 0 to 5."""
    inputs = make_inputs(Case("", T, D, V, "", bias=True, ignored="none"))
    hidden, weight, bias = inputs.hidden.detach(), inputs.weight.detach(), inputs.bias.detach()  # type: ignore[union-attr]
    targets = torch.arange(T)
    hidden[:, 0] = 0
    weight[:, 0] = -1
    if what == "nan in hidden":
        hidden[ROW, 1] = torch.nan
    elif what == "-inf":
        bias[V - 1] = bias[V // 2] = -torch.inf
    elif what == "-inf at the target":
        bias[ROW] = -torch.inf
    elif what == "+inf in the bias":
        bias[V - 1] = torch.inf
    else:
        hidden[ROW, 0] = torch.inf  # -inf times the column, but:
        weight[{"+inf": [V - 1], "+inf at the target": [ROW], "several": [1, V - 1], "all": []}[what], 0] = 1
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    return replace(inputs, hidden=leaves[0], weight=leaves[1], bias=leaves[2], targets=targets)


def log_softmax(h: Tensor, w: Tensor, y: Tensor, b: Tensor, low_rank: Any, o: HeadOptions) -> LogpStats:
    z = torch.nn.functional.linear(h, w, b)
    return LogpStats(-torch.nn.functional.cross_entropy(z, y, reduction="none"), torch.logsumexp(z, -1))


WHATS = (
    "+inf",
    "+inf at the target",
    "several",
    "+inf in the bias",
    "-inf",
    "-inf at the target",
    "all",
    "nan in hidden",
)


@by_path([(what, *path) for what in WHATS for path in PATHS], "what")
def test_not_finite_as_in_torch(what: str, name: str, impl: str, alone: Any) -> None:
    """NaN in every row that holds +inf, NaN or nothing but -inf, whatever its target; the other rows as they are."""
    inputs, options = not_finite(what), HeadOptions()
    inputs = replace(inputs, d_lse=torch.zeros_like(inputs.d_lse))
    truth = run(log_softmax, inputs.to(torch.float64), options)
    spoilt = truth["token_logps"].isnan()
    rows = {"-inf": [], "-inf at the target": [], "+inf in the bias": list(range(T))}.get(what, [ROW])
    assert spoilt.nonzero()[:, 0].tolist() == rows
    for field, value in result_of(name, impl, inputs, options, alone).items():
        wanted = truth[field].to(value.dtype)
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m: f"{field}: {m}")  # noqa: B023


@pytest.mark.parametrize("impl", IMPLS)
def test_statistics_of_an_infinite_row(impl: str) -> None:
    """entropy and log_sum_sq_probs are NaN with the probabilities; mean_logits is infinite."""
    inputs = not_finite("+inf")
    with able(impl), torch.no_grad():
        stats = linear_logp_stats(
            inputs.hidden, inputs.weight, inputs.targets, inputs.bias, impl=impl,
            outputs=("lse", "entropy", "mean_logits", "log_sum_sq_probs"),
        )  # fmt: skip
    for field in ("token_logps", "entropy", "log_sum_sq_probs"):
        assert getattr(stats, field).isnan().nonzero().tolist() == [[ROW]], field
    assert stats.lse is not None and stats.lse[ROW] == torch.inf
