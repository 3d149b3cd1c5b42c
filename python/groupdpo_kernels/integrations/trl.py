"""`patch_trl()` makes TRL's SFT, DPO, KTO, GRPO and RLOO trainers score tokens with `linear_logp_stats`.

All of them call one function, `trl.trainer.utils._ChunkedLogProbFunction`, looked up at each call; `patch_trl()` puts
`TokenStatistics` in its place and `unpatch_trl()` puts TRL's own back. The name is private: a TRL outside SUPPORTED, or
a function whose arguments are not those in PARAMETERS, raises a RuntimeError and nothing is replaced.

The numbers are TRL's, except that logits are float32 where TRL rounds them to the 16 bits of the model; the entropy has
its gradient too, which GRPO's bonus for it needs. What TRL can do and this cannot is an error, never another number:
DeepSpeed ZeRO-3, a temperature that is not positive, a target outside the vocabulary. Under autocast the gradient of a
float32 weight is rounded to the autocast dtype, as that of F.linear is; TRL's is not.

The cost is that of `linear_logp_stats` with a workspace of the size of TRL's tile, 256 MiB; under autocast also a copy
of the weight in the autocast dtype until the backward. docs/math.md has the formulas.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..installed import REQUIRED, check, installed_trl, wanted
from ..lm_head.api import linear_logp_stats
from ._patching import Patch, Patched, Swap

SUPPORTED = (1, 15), (2, 0)  # from, up to but without; 1.14 has another signature
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # in the order TRL returns them
PARAMETERS: dict[str, Any] = {
    **dict.fromkeys(("hidden", "weight", "bias", "targets", "temperature", "chunk_size"), REQUIRED),
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "outputs": OUTPUTS,
}

# TRL leaves ignored rows out, or scores them as token 0 and masks them itself, so here no id means "ignored".
_NO_ID = -(2**63)


class TokenStatistics:
    """Takes the place of TRL's autograd Function: `apply` has the same arguments and results."""

    @staticmethod
    def apply(
        hidden: Tensor,  # (T, D)
        weight: Tensor,  # (V, D) any floating dtype
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (T,) int64
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), each (T,) float32, is_top1 bool; None where not
        in `outputs`. log_probs and entropy are differentiable, the others have no gradient.
        """
        _refuse_zero3(hidden, weight, bias)
        device_type = hidden.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
        stats = linear_logp_stats(
            hidden.to(dtype),
            weight.to(dtype),
            targets,
            None if bias is None else bias.to(dtype),
            logit_scale=logit_scale,
            softcap=final_logit_softcapping,
            temperature=temperature,
            ignore_index=_NO_ID,
            workspace_bytes=4096 * 2 * chunk_size,  # the size of TRL's tile: 4096 rows of 16 bits
            outputs=[name for name in OUTPUTS if name in outputs],
        )
        entropy = None if stats.entropy is None else stats.entropy.float()
        rest = (stats.log_sum_sq_probs, stats.mean_logits)
        squares, mean = (None if x is None else x.detach().float() for x in rest)
        return stats.token_logps.float(), entropy, squares, mean, stats.is_top1


def patch_trl() -> Patched:
    """Makes TRL's trainers, also existing ones, run on this package until `unpatch_trl()`, or until the end of a
    `with patch_trl():` block. Calling it again changes nothing.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: this version of TRL is not one that this module knows.
    """
    return _patch.apply()


def unpatch_trl() -> None:
    """Restores TRL's own function, however often `patch_trl()` was called; without a patch nothing happens."""
    _patch.remove()


# ----------------------------------------------------------------------------------------------------------- TRL's side


def _function_of_trl() -> Swap:
    trl = installed_trl("patch_trl()", SUPPORTED)
    utils = importlib.import_module("trl.trainer.utils")
    function: Any = getattr(utils, "_ChunkedLogProbFunction", None)
    if not hasattr(function, "forward"):
        raise RuntimeError(
            f"{wanted('patch_trl()', 'TRL', SUPPORTED)}; in the installed {trl.__version__}"
            f" trl.trainer.utils._ChunkedLogProbFunction is {function!r}, not an autograd Function"
            " (TRL 1.15 has none without Triton)"
        )
    check("patch_trl()", "TRL", trl.__version__, SUPPORTED, (function.forward, PARAMETERS))
    return Swap([(function, TokenStatistics)])


_patch = Patch("trl", _function_of_trl)


def _refuse_zero3(*tensors: Tensor | None) -> None:
    """RuntimeError for ZeRO-3, which empties gathered parameters after the forward: TRL's backward restores them."""
    present = [x for x in tensors if x is not None]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in present)
    if needs_grad and any(hasattr(x, "ds_id") for x in present):
        raise RuntimeError(
            "patch_trl() cannot train an LM head that DeepSpeed ZeRO-3 has sharded: use ZeRO-2 or FSDP2, or call"
            " groupdpo_kernels.integrations.trl.unpatch_trl()"
        )
