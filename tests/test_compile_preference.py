"""The kernels after the head built for every architecture without a GPU: each loss, each way of balance and reference,
and groups up to the largest. They are launches of a few microseconds, so what counts is that they build, hold
everything in registers, and fit beside anything else."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compile_only import Compiled, Row, as_on, describe
from processes import CONTEXT

EVERY = __name__ == "__main__"
KERNELS = {"segment_sums_kernel", "preference_weights_fwd_kernel", "preference_weights_bwd_kernel"}


@dataclass(frozen=True)
class Launch:
    """One call of the launchers."""

    loss: str
    max_group: int
    balance: bool = False
    reference: str | None = "sequences"  # or "tokens"
    offsets: torch.dtype = torch.int32


def launches(architecture: str) -> list[Launch]:
    """`python tests/test_compile_preference.py` takes every loss."""
    from groupdpo_kernels.kernels.preference_weights import LOSSES, MAX_GROUP, PAIRWISE

    few = [Launch("sigmoid", 2, balance=True), Launch("mpo", MAX_GROUP, balance=True)]
    more = [
        Launch("simpo", 2, reference=None, offsets=torch.int64),
        Launch("all_pairs", 16, balance=True, reference="tokens"),
        Launch("plackett_luce", 16),
    ]
    every = [Launch(loss, 2 if loss in PAIRWISE else 16) for loss in LOSSES]
    return few + more * (architecture == "sm_90") + every * EVERY


def compile_launches(architecture: str) -> list[tuple[Launch, Compiled]]:
    from groupdpo_kernels.kernels.preference_weights import preference_weights_backward, preference_weights_forward

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    found = []
    T, S = 2**20, 4096
    row = Row(architecture, "fp32")
    for launch in launches(architecture):
        references = {None: None, "sequences": meta(S), "tokens": meta(T)}
        offsets = [meta(S + 1, dtype=launch.offsets), meta(S // launch.max_group + 1, dtype=launch.offsets)]
        positive = meta(S, dtype=torch.bool)
        options: tuple[Any, ...] = (0.1, False, launch.reference is not None, 1.0, 0.1, 0.5, 0.01, 0.05)
        balance = (2.0 if launch.balance else 0.0, False, True)
        with as_on(architecture) as compilations:
            *_, coefficients = preference_weights_forward(
                meta(T), references[launch.reference], *offsets, positive, launch.loss, *options, *balance,
                launch.max_group,
            )  # fmt: skip
            preference_weights_backward(meta(), coefficients, offsets[0], T)
        found += [(launch, *compilation) for compilation in compilations]
    described = describe(row, [compilation for _, *compilation in found])
    return [(launch, kernel) for (launch, *_), kernel in zip(found, described)]


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[tuple[Launch, Compiled]]]:
    names = ("sm_90", "sm_100", "sm_80", "gfx942")
    with ProcessPoolExecutor(min(len(names), os.cpu_count() or 1), mp_context=CONTEXT) as pool:
        return dict(zip(names, pool.map(compile_launches, names)))


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100", "sm_80", "gfx942"])
def test_every_loss_builds_in_registers(architecture: str, compiled: dict[str, list[tuple[Launch, Compiled]]]) -> None:
    found = compiled[architecture]
    assert {launch for launch, _ in found} == set(launches(architecture))
    assert {kernel.kernel for _, kernel in found} == KERNELS
    for launch, kernel in found:
        assert kernel.spills <= 4, (launch, kernel)  # all_pairs on sm_90: one number
        assert kernel.shared <= 1024 and not kernel.tma_stores, (launch, kernel)


if EVERY:
    for launch, kernel in compile_launches("sm_90"):
        print(f"{launch!s:120} {kernel.kernel:30} {kernel.registers:4} {kernel.spills:4} {kernel.shared:6}")
