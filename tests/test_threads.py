"""Every C++ op on 1, 2 and 5 threads, three times each: the same bits, and the right ones.

What a thread writes, and the shape of every GEMM, must follow from the inputs alone. Some rows are sure of their target
and some are flat, so a tolerance sends them different ways. The second segment of the head is absent, narrower than the
hidden size, or wider.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groupdpo_kernels import LinearLogps, Objective, PreferenceGroups, linear_logp_stats, linear_logps, preference_loss
from groupdpo_kernels.reference import HeadOptions, LogpStats
from groupdpo_kernels.testing import Case, Inputs, Result, check_budget, exact, make_inputs, run

CSRC = Path(__file__).resolve().parent.parent / "csrc"
THREADS = (1, 2, 5)
TOLERANCE = 2.0**-7
D = 96
# Several units of rows and several tiles; fewer rows than a unit; a single tile, which the library would share out.
SHAPES = {"many": (1300, 1500), "few": (40, 3000), "single": (7, 300)}


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def mixed_rows(shape: str, R: int, dtype: torch.dtype = torch.float32, entropy: bool = False) -> Inputs:
    """Inputs of which every third row, about, is flat and the others are sure of their target."""
    T, V = SHAPES[shape]
    inputs = make_inputs(Case(shape, T, D, V, "", dtype, bias=True, R=R, ignored="some", entropy=entropy))
    g = torch.Generator().manual_seed(1)
    flat = torch.rand(T, 1, generator=g) < 0.3
    toward = 12.0 * inputs.weight.detach().float()[inputs.targets.clamp(min=0)]
    noise = 0.05 * torch.randn(T, D, generator=g)
    return replace(inputs, hidden=torch.where(flat, noise, toward + noise).to(dtype).requires_grad_())


Way = Callable[[Inputs], tuple[Tensor, ...]]


def _tiny_workspace(x: Inputs) -> tuple[Tensor, ...]:
    pair = x.low_rank or (None, None)
    options = HeadOptions(workspace_bytes=2**19)
    return LinearLogps.apply(x.hidden, x.weight, x.targets, x.bias, *pair, options, True, "cpu", None)[:2]


def _stats(x: Inputs) -> tuple[Tensor, ...]:
    got = linear_logp_stats(x.hidden, x.weight, x.targets, x.bias, low_rank=x.low_rank, impl="cpu")
    return tuple(y for y in got if y is not None)


def _sampled(x: Inputs) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    return (linear_logps(*_head(x), low_rank=x.low_rank, grad_tol=TOLERANCE, grad_tail="sample", impl="cpu"),)


def _head(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return x.hidden, x.weight, x.targets, x.bias


EXACT: dict[str, Way] = {
    "statistics": _stats,
    "recomputed": _tiny_workspace,  # forward and backward in many blocks
    "kept": lambda x: (linear_logps(*_head(x), low_rank=x.low_rank, impl="cpu"),),
    "frozen": lambda x: (linear_logps(*_head(_frozen(x)), low_rank=_frozen(x).low_rank, impl="cpu"),),
}
WITHIN_A_TOLERANCE: dict[str, Way] = {
    "sparse": lambda x: (linear_logps(*_head(x), low_rank=x.low_rank, grad_tol=TOLERANCE, impl="cpu"),),
    "frozen, sparse": lambda x: (
        linear_logps(*_head(_frozen(x)), low_rank=_frozen(x).low_rank, grad_tol=TOLERANCE, impl="cpu"),
    ),
    "sampled": _sampled,
}


def _frozen(x: Inputs) -> Inputs:
    """The same hidden states before a head that needs no gradient."""
    pair = None if x.low_rank is None else (x.low_rank[0], x.low_rank[1].detach())
    return replace(x, weight=x.weight.detach(), bias=None if x.bias is None else x.bias.detach(), low_rank=pair)


def results(way: Way, inputs: Inputs) -> Result:
    values = way(inputs)
    live = inputs.leaves
    gradients = torch.autograd.grad((values[0] * inputs.d_token_logps).sum(), list(live.values()), allow_unused=True)
    named = {f"d_{name}": g for name, g in zip(live, gradients) if g is not None}
    return {f"value {i}": x.detach() for i, x in enumerate(values)} | named


def same_bits_on_any_threads(compute: Callable[[], Result]) -> Result:
    first: Result | None = None
    for threads in THREADS:
        torch.set_num_threads(threads)
        for _ in range(3):
            now = compute()
            first = first or now
            for name, x in now.items():
                assert torch.equal(x, first[name]), f"{name} on {threads} threads"
    assert first is not None
    return first


@pytest.mark.parametrize("R", [0, 3, D + 34])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", EXACT)
def test_exact(way: str, shape: str, R: int) -> None:
    inputs = mixed_rows(shape, R)
    found = same_bits_on_any_threads(lambda: results(EXACT[way], inputs))
    gradients = {name: x for name, x in found.items() if name.startswith("d_")}
    plain = replace(inputs, d_lse=torch.zeros_like(inputs.d_lse))
    check_budget({"token_logps": found["value 0"], **gradients}, plain, HeadOptions())


@pytest.mark.parametrize("R", [0, 3, D + 34])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WITHIN_A_TOLERANCE)
def test_within_a_tolerance(way: str, shape: str, R: int) -> None:
    inputs = mixed_rows(shape, R)
    found = same_bits_on_any_threads(lambda: results(WITHIN_A_TOLERANCE[way], inputs))
    plain = replace(inputs, d_lse=torch.zeros_like(inputs.d_lse))
    check_budget({"token_logps": found["value 0"]}, plain, HeadOptions())
    if way == "sampled":
        return
    # The bound is on d_logits; a row of the head is at most as long as the longest.
    truth = exact(plain, HeadOptions())
    live = inputs.targets != -100
    doubt = torch.where(live, -torch.expm1(truth["token_logps"]), 0)
    allowed = TOLERANCE * float((inputs.d_token_logps.abs() * doubt).sum())
    sides = {"d_hidden": inputs.weight, "d_weight": inputs.hidden}
    if inputs.low_rank is not None:
        sides |= {"d_low_rank_hidden": inputs.low_rank[1], "d_low_rank_weight": inputs.low_rank[0]}
    for name, side in sides.items():
        if name in found:
            wrong = float((found[name].double() - truth[name]).norm(dim=-1).sum())
            assert wrong <= 1.01 * allowed * float(side.detach().norm(dim=-1).max()), name


@pytest.mark.parametrize("way", [*EXACT, *WITHIN_A_TOLERANCE])
def test_bfloat16(way: str) -> None:
    inputs = mixed_rows("many", 3, torch.bfloat16)
    found = same_bits_on_any_threads(lambda: results({**EXACT, **WITHIN_A_TOLERANCE}[way], inputs))
    plain = replace(inputs, d_lse=torch.zeros_like(inputs.d_lse))
    kept = {name: x for name, x in found.items() if name.startswith("d_") and way in EXACT}
    check_budget({"token_logps": found["value 0"], **kept}, plain, HeadOptions())


@pytest.mark.parametrize("workspace_bytes", [2**28, 2**19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_of_the_entropy(shape: str, dtype: torch.dtype, workspace_bytes: int) -> None:
    inputs = mixed_rows(shape, 3, dtype, entropy=True)
    options = HeadOptions(workspace_bytes=workspace_bytes)

    def stats(*arguments: Any) -> LogpStats:
        *head, low_rank, _ = arguments
        return linear_logp_stats(*head, low_rank=low_rank, workspace_bytes=workspace_bytes, impl="cpu")

    found = same_bits_on_any_threads(lambda: run(stats, inputs, options))
    check_budget(found, inputs, options)


@pytest.mark.parametrize("loss", ["mpo", "all_pairs", "softmax", "margin"])
def test_preference(loss: str) -> None:
    """Ragged groups: 1500 sequences are more than one thread's share."""
    g = torch.Generator().manual_seed(0)
    sizes = torch.randint(2, 9, (300,), generator=g).tolist()
    groups = PreferenceGroups.from_lists([[i % 3 == 0 for i in range(n)] for n in sizes])
    lengths = torch.randint(1, 30, (sum(sizes),), generator=g)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    logps = (-2 * torch.rand(int(lengths.sum()), generator=g)).requires_grad_()
    reference = logps.detach() + 0.1 * torch.randn(logps.shape, generator=g)
    objective = Objective(loss, beta=0.5, nll_weight=1.0)

    def compute() -> Result:
        got = preference_loss(logps, cu_seqlens, groups, objective, reference)
        named = {name: x.detach() for name, x in got._asdict().items() if isinstance(x, Tensor)}
        return named | {"d_logps": torch.autograd.grad(got.loss, logps)[0]}

    same_bits_on_any_threads(compute)


OWNERSHIP = """
#include <cstdio>
#include "cpu/ownership.h"
template <typename F> bool refused(F f) { try { f(); } catch (const std::logic_error&) { return true; } return false; }
int main() {
  groupdpo_kernels::Ownership rows(10);
  rows.take(0, 4);
  const bool apart = !refused([&] { rows.take(4, 10); });
  rows.give_back(4, 10);
  const bool overlap = refused([&] { rows.take(2, 6); });
  const bool nothing_kept = !refused([&] { rows.take(4, 6); });
  rows.give_back(0, 4);
  const bool again = !refused([&] { rows.take(0, 4); });
  const bool outside = refused([&] { rows.take(8, 11); }) && refused([&] { rows.take(-1, 2); });
  std::printf("%d%d%d%d%d", apart, overlap, nothing_kept, again, outside);
}
"""


def test_scratch_in_use_is_refused(tmp_path: Path) -> None:
    """Two holders of a row, or a row outside, raise; what is given back can be taken again."""
    (tmp_path / "main.cpp").write_text(OWNERSHIP)
    compiler = shutil.which("c++") or "g++"
    program = str(tmp_path / "main")
    subprocess.run([compiler, "-std=c++20", f"-I{CSRC}", str(tmp_path / "main.cpp"), "-o", program], check=True)
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == "11111"
