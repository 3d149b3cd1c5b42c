"""patch_open_instruct() runs open-instruct's DPO (`dpo_tune_cache.py`: dpo, dpo_norm, simpo, wpo) without the logits.

    from groupdpo_kernels.integrations.open_instruct import patch_open_instruct

    patch_open_instruct()  # before the training script asks its configuration for forward_fn

It replaces `concatenated_forward` and `separate_forward` of open_instruct.dpo_utils, from which
`ExperimentConfig.forward_fn` chooses, by functions with the same arguments and results, packed (padding-free) batches
and the auxiliary loss included. The functions for OLMo-core models, which have another interface, stay.

It needs the parameters in PARAMETERS; otherwise it raises a RuntimeError and replaces nothing. It never checks the
version, because open-instruct has never changed its own. The cost is that of `model_logps`.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..installed import REQUIRED, check, distribution_version, imported
from ..models.api import attach
from ..preference.segments import seq_logps
from ._patching import Patch, Patched, Swap

_COMMON = {"model": REQUIRED, "batch": REQUIRED, "average_log_prob": False, "output_router_logits": False}
PARAMETERS: dict[str, dict[str, Any]] = {
    "concatenated_forward": {**_COMMON, "packing": False},
    "separate_forward": _COMMON,
}
Logps = tuple[Tensor, Tensor, Tensor | None]  # chosen (B,), rejected (B,), auxiliary loss ()


def patch_open_instruct() -> Patched:
    """Patches open-instruct until `unpatch_open_instruct()`, or until the end of a `with patch_open_instruct():` block.

    Raises ImportError without open-instruct, and RuntimeError for a version that this module does not know.
    """
    return _patch.apply()


def unpatch_open_instruct() -> None:
    """Puts open-instruct's own functions back."""
    _patch.remove()


def concatenated_forward(
    model: Any,
    batch: dict[str, Any],  # chosen_ and rejected_ input_ids, labels, attention_mask (B, L); packed: (1, T)
    average_log_prob: bool = False,
    output_router_logits: bool = False,
    packing: bool = False,
) -> Logps:
    """Scores chosen and rejected responses in one forward."""
    theirs = importlib.import_module("open_instruct.dpo_utils")
    if packing:
        both, B = theirs.pf_concatenated_inputs(batch)
    else:
        both, B = theirs.concatenated_inputs(batch), len(batch["chosen_input_ids"])
    inputs = {name.replace("concatenated_", ""): value for name, value in both.items()}
    labels = inputs.pop("labels")
    if output_router_logits:
        inputs["output_router_logits"] = True
    cu_seqlens = inputs["cu_seq_lens_k"] if packing else None
    logps, outputs = _score(model, labels, inputs, average_log_prob, cu_seqlens)
    return logps[:B], logps[B:], outputs.aux_loss if output_router_logits else None


def separate_forward(
    model: Any,
    batch: dict[str, Any],  # as in concatenated_forward
    average_log_prob: bool = False,
    output_router_logits: bool = False,
) -> Logps:
    """Scores chosen and rejected responses in two forwards, one after the other."""
    theirs = importlib.import_module("open_instruct.dpo_utils")
    if output_router_logits:  # open-instruct's own function fails here: it concatenates two scalars
        raise ValueError("output_router_logits must be False in separate_forward: use concatenated_forward; got True")
    sides = (theirs.process_batch(batch, prefix) for prefix in ("chosen", "rejected"))
    inputs = [{name: side[name] for name in ("labels", "input_ids", "attention_mask")} for side in sides]
    chosen, rejected = (_score(model, side.pop("labels"), side, average_log_prob, None)[0] for side in inputs)
    return chosen, rejected, None


def _score(
    model: Any,
    labels: Tensor,  # (B, L), or (1, T) packed; -100 is not scored, and begins each sequence
    inputs: dict[str, Any],
    average: bool,
    cu_seqlens: Tensor | None,  # (S + 1,) packed
) -> tuple[Tensor, Any]:  # (B,) or (S,), and the model's other outputs
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    token_logps, outputs = attach(model).with_outputs(inputs.pop("input_ids"), targets, **inputs)
    live = (targets != -100).to(token_logps.dtype)
    if cu_seqlens is None:
        sums, lengths = token_logps.sum(-1), live.sum(-1)
    else:
        ends = cu_seqlens.clone()
        ends[-1] = targets.shape[1]  # the last sequence takes the padding, which is not scored
        sums, lengths = seq_logps(token_logps[0], ends), seq_logps(live[0], ends)
    return sums / lengths if average else sums, outputs


def _find() -> Swap:
    theirs = imported("open_instruct.dpo_utils", "open-instruct", "pip install from github.com/allenai/open-instruct")
    pairs = [(getattr(theirs, ours.__name__), ours) for ours in (concatenated_forward, separate_forward)]
    functions = [(own, PARAMETERS[ours.__name__]) for own, ours in pairs]
    check("integrations.open_instruct", "open-instruct", distribution_version("open-instruct"), None, *functions)
    return Swap(pairs)


_patch = Patch("open_instruct", _find)
