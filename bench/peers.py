"""What the benchmark times: `linear_logps` and its alternatives, each as one function
(hidden, weight, targets) -> token log-probabilities (T,).

A maker takes the case and the device and returns that function, or raises `Unavailable`; the message becomes the row of
the table. Makers change nothing in a peer: they call its public entry point with its own defaults, and with its exact
setting where the default is not exact. Nothing here times anything.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from groupdpo_kernels import explain, linear_logps
from groupdpo_kernels.testing import Case

TokenLogps = Callable[[Tensor, Tensor, Tensor], Tensor]
Maker = Callable[[Case, torch.device], TokenLogps]

OURS = ("triton", "cuda", "cpu", "reference")
SAMPLED = " sampled"  # ends the name of a row with grad_tail="sample"
# Whose versions go into the results.
PACKAGES = ("torch", "triton", "numpy", "trl", "cut-cross-entropy", "liger-kernel")


class Unavailable(Exception):
    """This implementation cannot run this case here."""


def ours(impl: str, grad_tol: float = 0.0, grad_tail: str = "exact") -> Maker:
    """`linear_logps(impl=impl, grad_tol=grad_tol, grad_tail=grad_tail)`."""

    def maker(case: Case, device: torch.device) -> TokenLogps:
        probe = torch.empty(1, 8, dtype=case.dtype, device=device)
        reasons = explain(probe, probe, torch.zeros(1, dtype=torch.long, device=device)).why_not[impl]
        if reasons:
            raise Unavailable("; ".join(reasons))
        settings: dict[str, Any] = {"softcap": case.softcap, "workspace_bytes": case.workspace_bytes, "impl": impl}
        settings |= {"grad_tol": grad_tol, "grad_tail": grad_tail}
        return lambda hidden, weight, targets: linear_logps(hidden, weight, targets, **settings)

    return maker


def grad_tol_of(name: str) -> float:
    """Of the name of an implementation: "ours/cpu grad_tol=0.0078125" has one, all others are exact."""
    return float(name.removesuffix(SAMPLED).partition(" grad_tol=")[2] or 0)


# ----------------------------------------------------------------------------------------------------- eager and torch


def log_softmax_gather(
    logits: Tensor,  # (T, V)
    targets: Tensor,  # (T,)
    softcap: float | None,
) -> Tensor:  # (T,) float32, float64 for float64 logits
    """What trainers write: the cap in the model's dtype, then log_softmax in float32."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.log_softmax(wide, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def eager(case: Case, device: torch.device) -> TokenLogps:
    """F.linear, log_softmax in float32, gather."""
    _room_for_logits(case, device)
    return lambda hidden, weight, targets: log_softmax_gather(F.linear(hidden, weight), targets, case.softcap)


def compiled(case: Case, device: torch.device) -> TokenLogps:
    """torch.compile of the eager function, for fixed shapes."""
    _room_for_logits(case, device)
    torch.compiler.reset()  # one shape at a time: no guard of an earlier one, no limit on recompiles reached

    def function(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return log_softmax_gather(F.linear(hidden, weight), targets, case.softcap)

    return torch.compile(function, dynamic=False)


def torch_chunked(case: Case, device: torch.device) -> TokenLogps:
    """F.linear_cross_entropy of torch >= 2.13, its chunked path with its own choice of policy."""
    if not hasattr(F, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"not in torch {torch.__version__.split('+')[0]}")
    _no_softcap(case)
    settings: dict[str, Any] = {"reduction": "none", "options": torch.nn.LinearCrossEntropyOptions()}
    return lambda hidden, weight, targets: -F.linear_cross_entropy(hidden, weight, targets, **settings)


# ------------------------------------------------------------------------------------------------------ other projects


def trl(case: Case, device: torch.device) -> TokenLogps:
    """What TRL's DPO, KTO and GRPO trainers run since 1.15."""
    module = load_peer("trl.trainer.utils")
    function = getattr(module, "_ChunkedLogProbFunction", None)
    if function is None:
        raise Unavailable("this TRL has no _ChunkedLogProbFunction (1.15 does)")
    settings = (
        1.0,
        module._CHUNKED_LOGPROB_CHUNK_SIZE,
        case.softcap,
        1.0,
        (),
    )  # temperature, tile, cap, scale, no extras
    return lambda hidden, weight, targets: function.apply(hidden, weight, None, targets, *settings)[0]


def _cut_cross_entropy(filter_eps: str | None) -> Maker:
    def maker(case: Case, device: torch.device) -> TokenLogps:
        _needs_gpu(device)
        function = load_peer("cut_cross_entropy").linear_cross_entropy
        settings = {"softcap": case.softcap, "reduction": "none", "filter_eps": filter_eps}
        return lambda hidden, weight, targets: -function(hidden, weight, targets, **settings)

    return maker


def liger_scaled(case: Case, device: torch.device) -> TokenLogps:
    """Liger's per-token scaled cross entropy: CuTe DSL on sm_90, chunked PyTorch elsewhere."""
    _no_softcap(case)
    function = load_peer("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction
    return lambda hidden, weight, targets: -function.apply(hidden, weight, targets)


def liger_linear(case: Case, device: torch.device) -> TokenLogps:
    """Liger's fused linear cross entropy, reduction="none", d_weight accumulated in float32 as it advises."""
    _needs_gpu(device)
    function = load_peer("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    settings = {"softcap": case.softcap, "reduction": "none", "accum_dtype": torch.float32}
    return lambda hidden, weight, targets: -function(hidden, weight, targets, **settings)


PEERS: dict[str, Maker] = {
    "eager": eager,
    "torch.compile": compiled,
    "F.linear_cross_entropy": torch_chunked,
    "trl": trl,
    "cce-exact": _cut_cross_entropy(None),
    "cce-default": _cut_cross_entropy("high"),
    "liger-scaled": liger_scaled,
    "liger-linear": liger_linear,
}


def maker(name: str) -> Maker:
    """The maker of a row: a key of PEERS, "ours/<impl>" or "ours/<impl> grad_tol=<tolerance>", SAMPLED behind it."""
    if not name.startswith("ours/"):
        return PEERS[name]
    tail = "sample" if name.endswith(SAMPLED) else "exact"
    return ours(name.removeprefix("ours/").partition(" ")[0], grad_tol_of(name), tail)


# ------------------------------------------------------------------------------------------------------------- why not


def load_peer(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name.partition(".")[0]:
            raise Unavailable("not installed") from error
        raise Unavailable(f"does not import: {error}") from error
    except Exception as error:  # a peer may fail in any way on a version it does not know
        raise Unavailable(f"does not import: {error}") from error


def _needs_gpu(device: torch.device) -> None:
    if device.type == "cpu":
        raise Unavailable("needs a GPU")


def _no_softcap(case: Case) -> None:
    if case.softcap is not None:
        raise Unavailable("no softcap")


def _room_for_logits(case: Case, device: torch.device) -> None:
    """Logits, log-softmax and its gradient are about 16 bytes an entry. A full GPU says so; a CPU process is killed."""
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return
    available = re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())
    free = int(available[1]) * 1024 if available else 0
    need = 16 * case.T * case.V
    if need > 0.6 * free:
        raise Unavailable(f"needs about {need / 2**30:.0f} GiB, of which {free / 2**30:.0f} are free")
