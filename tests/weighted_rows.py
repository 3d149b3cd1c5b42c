"""Problems for add_weighted_rows and what is right: shared by test_csrc_cuda.py and test_gpu.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from groupdpo_kernels.lm_head import sparse
from groupdpo_kernels.reference import HeadOptions

# Entries a row: none, around a batch of 8, around the 512 from which a row takes a block, thousands.
LENGTHS = (0, 1, 7, 0, 8, 9, 0, 0, 30, 257, 511, 512, 513, 0, 3001, 2, 0)


class Problem(NamedTuple):
    out: Tensor  # (m, n); NaN in rows that own nothing: they must not be touched
    source: Tensor  # (k, n)
    begins: Tensor  # (m,)
    ends: Tensor  # (m,)
    index: Tensor  # (K,)
    coefficients: Tensor  # (K,)


def make_problem(
    dtype: torch.dtype, n: int, lengths: tuple[int, ...] = LENGTHS, k: int = 50, padding: int = 0
) -> Problem:
    """One in five coefficients is 0; padding: elements between rows of source. Every second empty row ends before it
    begins."""
    generator = torch.Generator().manual_seed(n)
    ends = torch.tensor(lengths).cumsum(0)
    begins = ends - torch.tensor(lengths)
    empty = (begins == ends).nonzero()[::2, 0]
    begins[empty] += 1
    K = int(ends[-1])
    out = torch.randn(len(lengths), n, generator=generator).to(dtype)
    out[begins >= ends] = torch.nan
    source = torch.randn(k, n + padding, generator=generator).to(dtype)[:, :n]
    coefficients = torch.randn(K, generator=generator) / 8
    coefficients[torch.rand(K, generator=generator) < 0.2] = 0
    return Problem(out, source, begins, ends, torch.randint(k, (K,), generator=generator), coefficients)


def expected(problem: Problem) -> Tensor:
    """By the specification, in float64, rounded once."""
    p = problem
    out = p.out.double()
    owned = torch.cat((p.begins.new_zeros(1), p.ends))
    sparse.add_weighted_rows(out, p.source.double(), owned, p.index, p.coefficients.double(), HeadOptions())
    return torch.where((p.begins < p.ends)[:, None], out, p.out.double()).to(p.out.dtype)


def check(found: Tensor, problem: Problem) -> None:
    """One rounding of a float32 sum; rows that own nothing have the bits they had."""
    dtype = found.dtype
    torch.testing.assert_close(found, expected(problem), rtol=torch.finfo(dtype).eps, atol=2e-5, equal_nan=True)
    untouched = problem.begins >= problem.ends
    assert torch.equal(found[untouched].view(torch.uint8), problem.out[untouched].view(torch.uint8))
