"""CASES through the compiled kernels in the emulator: each path of an LM head, and each preference loss.

test_emulated_kernels.py runs some of them, `make emulate` (emulate.py) all. Each run is held to what a GPU is held to:
the error budget of testing.py, or the specification on the same inputs; and nothing that the emulator watches may be
found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from poisoned import poisoned
from ptx_emulator import Emulation, PtxError, emulated
from test_frozen_head import freeze, result_of
from test_gpu import stats_of
from test_preference_weights import BALANCES, LOSSES, TABLE, check_against_float64, gradients_of
from test_sparse_triton import upstream_of

from groupdpo_kernels.lm_head import host, ops
from groupdpo_kernels.testing import CASES, Case, check_budget, make_inputs, run

BY_NAME = {case.name: case for case in CASES}
PATHS = ("trained", "frozen", "sparse")


def paths_of(case: Case) -> tuple[str, ...]:
    """The entropy has a gradient on one of them."""
    return PATHS[:1] if case.entropy else PATHS


PREFERENCES = tuple(
    f"{loss} {i}" for loss in LOSSES for i, balance in enumerate(BALANCES) if not (balance and TABLE[loss].no_balance)
)


def trained(case: Case) -> None:
    """Forward with statistics, and backward."""
    inputs = make_inputs(case)
    check_budget(run(stats_of("triton"), inputs, case.options), inputs, case.options)


def frozen(case: Case) -> None:
    """The forward that has the derivative of a head without gradient."""
    case = replace(case, workspace_bytes=max(case.workspace_bytes, 2**16))
    inputs = make_inputs(case)
    whole = replace(inputs, d_lse=torch.zeros_like(inputs.d_lse))
    check_budget(result_of(freeze(inputs), case, "triton", interpreted=False), whole, case.options)


def sparse(case: Case, grad_tol: float = 0.2) -> None:
    """Values within the budget; candidates, and gradients within a tolerance, of the specification."""
    inputs = make_inputs(case)
    head, upstream = inputs.head, upstream_of(inputs)
    token_logps, found = ops.sparse_forward(head, inputs.targets, case.options, grad_tol, "triton")
    check_budget({"token_logps": token_logps, "lse": found.lse.float()}, inputs, case.options)
    _, wanted = host.sparse_forward(head, inputs.targets, case.options, grad_tol, "reference")
    # Both round each logit to float32, and a probability is off by as much of itself: one at the threshold may be a
    # candidate for one of the two.
    offset = torch.finfo(torch.float32).eps * float(wanted.lse.abs().max()) if case.T else 0.0
    same = (found.ids == wanted.ids).all(-1) | torch.tensor(offset < 1e-5)
    # Of more than fit, the specification keeps the likeliest, and the kernels those of the lowest ids.
    same &= (wanted.weights != 0).sum(-1) < wanted.weights.shape[-1]
    for x, y in zip(found[1:4], wanted[1:4]):
        torch.testing.assert_close(x[same], y[same], rtol=1e-4 + 2 * offset, atol=1e-4)
    mine, its = found.weights.sum(-1)[same], wanted.weights.sum(-1)[same]
    torch.testing.assert_close(mine, its, rtol=1e-3 + 2 * offset, atol=1e-4)
    arguments = (head, inputs.targets, found, *upstream, case.options, grad_tol, inputs.needs)
    wanted_gradients = host.sparse_backward(*arguments, "reference")
    for x, y in zip(ops.sparse_backward(*arguments, "triton"), wanted_gradients):
        assert (x is None) == (y is None)
        if x is not None and y is not None and x.numel():
            eps = (2**-6 if x.dtype != torch.float32 else 1e-3) + 2 * offset
            assert (x.double() - y.double()).norm() <= eps * y.double().norm()


def preference(name: str) -> None:
    """A loss with one way of balance, as test_preference_weights.py has it."""
    loss, _, number = name.partition(" ")
    check_against_float64(loss, BALANCES[int(number)], "triton", gradients_of)


def run_case(
    path: str,
    name: str,
    architecture: str,
    late: bool = True,
    noise: int | None = None,
    order: Callable[[int], Sequence[int]] = range,
) -> Emulation:
    """AssertionError where results are wrong, PtxError where a GPU would fault, hang or race."""
    with poisoned(), emulated(architecture, late, noise, order=order) as emulation:
        if path == "preference":
            preference(name)
        else:
            {"trained": trained, "frozen": frozen, "sparse": sparse}[path](BY_NAME[name])
    if emulation.findings:
        raise PtxError("\n".join(f"{count} times {what}" for what, count in emulation.findings.most_common(20)))
    return emulation
