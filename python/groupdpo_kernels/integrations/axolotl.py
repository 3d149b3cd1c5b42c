"""GroupDPOPlugin runs Axolotl's DPO and IPO (`rl: dpo`, `rl: ipo`) without the logits, as an Axolotl plugin:

    plugins:
      - groupdpo_kernels.integrations.axolotl.GroupDPOPlugin

Axolotl's DPO trainer is TRL's, of the version that Axolotl pins. With TRL 1.15 and later the plugin calls
`integrations.trl.patch_trl()`. With TRL 1.9, which Axolotl 0.19 pins, DPOTrainer builds logits: its `_compute_loss`
and `compute_ref_log_probs` run as TRL wrote them (every loss, ld_alpha, precomputed references, the auxiliary loss), on
a model whose logits are the log-probabilities of the targets. entropy, logits/* and mean_token_accuracy are then not
logged, as there are no logits. `dpo_use_weighting` (WPO) runs as before, on real logits; the logits for a
`compute_metrics` come from a separate forward.

It never changes Axolotl or a trainer. It needs Axolotl and TRL in SUPPORTED, and parameters as in PARAMETERS; otherwise
it raises a RuntimeError before the model is loaded, and replaces nothing. The cost is that of `model_logps`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..installed import REQUIRED, Versions, check, distribution_version, imported
from ..models.one_column import NOT_OF_THE_MODEL, OneColumn, completion_targets
from ._patching import Patch, Patched, Swap
from .trl import patch_trl, unpatch_trl

SUPPORTED: dict[str, Versions] = {"axolotl": ((0, 19), (0, 20)), "trl": ((1, 9), (1, 10))}  # from, up to but without
PARAMETERS: dict[str, dict[str, Any]] = {
    "_compute_loss": dict.fromkeys(("model", "inputs", "return_outputs"), REQUIRED),
    "compute_ref_log_probs": dict.fromkeys(("model", "inputs"), REQUIRED),
}
FROM_LOGITS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")


def patch_axolotl() -> Patched:
    """Patches TRL as the plugin does, until `unpatch_axolotl()`, or until the end of a `with patch_axolotl():` block.

    Raises ImportError without TRL, and RuntimeError for a TRL that neither this module nor integrations.trl knows.
    """
    trl = imported("trl", "TRL", "pip install axolotl")
    return _patch.apply() if trl.__version__.startswith("1.9.") else patch_trl()


def unpatch_axolotl() -> None:
    """Puts TRL's own functions back."""
    unpatch_trl()
    _patch.remove()


def __getattr__(name: str) -> Any:
    if name != "GroupDPOPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _plugin()


@functools.cache
def _plugin() -> type:
    """Makes the plugin's class, when Axolotl asks for it by name."""
    axolotl = imported("axolotl.integrations.base", "Axolotl", "pip install axolotl")
    hook, found = axolotl.BasePlugin.pre_model_load, distribution_version("axolotl")
    check("GroupDPOPlugin", "Axolotl", found, SUPPORTED["axolotl"], (hook, {"cfg": REQUIRED}))

    class GroupDPOPlugin(axolotl.BasePlugin):  # type: ignore[name-defined]
        """Patches TRL when Axolotl begins to load the model, until the process ends."""

        def pre_model_load(self, cfg: Any) -> None:
            rl = getattr(cfg.rl, "value", cfg.rl)
            if rl not in ("dpo", "ipo"):
                raise ValueError(f"rl must be dpo or ipo with GroupDPOPlugin; got {rl!r}")
            patch_axolotl()

    return GroupDPOPlugin


def _find() -> Swap:
    trl = imported("trl", "TRL", "pip install axolotl")
    check("integrations.axolotl", "TRL", trl.__version__, SUPPORTED["trl"])
    theirs = imported("trl.trainer.dpo_trainer", "TRL", "pip install axolotl")
    methods = [(getattr(theirs.DPOTrainer, name), parameters) for name, parameters in PARAMETERS.items()]
    methods.append((theirs.selective_log_softmax, dict.fromkeys(("logits", "index"), REQUIRED)))
    check("integrations.axolotl", "TRL", trl.__version__, SUPPORTED["trl"], *methods)
    loss, references = theirs.DPOTrainer._compute_loss, theirs.DPOTrainer.compute_ref_log_probs
    select = theirs.selective_log_softmax

    @functools.wraps(select)
    def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
        return logits.squeeze(-1).clone() if logits.shape[-1] == 1 else select(logits, index)  # TRL masks in place

    @functools.wraps(references)
    def compute_ref_log_probs(self: Any, model: Any, inputs: dict[str, Any]) -> Any:  # (chosen, rejected), (B,) each
        targets = completion_targets(inputs["input_ids"], inputs["completion_mask"])
        return references(self, OneColumn(model, targets), inputs)

    @functools.wraps(loss)
    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.use_weighting:
            return loss(self, model, inputs, return_outputs)
        precomputed = self.precompute_ref_logps
        if not precomputed:  # TRL would choose the reference model itself
            reference = self.model if self.ref_model is None else self.ref_model
            chosen, rejected = self.compute_ref_log_probs(reference, inputs)
            inputs = {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        targets = completion_targets(inputs["input_ids"], inputs["completion_mask"])
        self.precompute_ref_logps = True
        try:
            value = loss(self, OneColumn(model, targets), inputs, False)
        finally:
            self.precompute_ref_logps = precomputed
        for name in FROM_LOGITS:
            self._metrics["train" if self.model.training else "eval"].pop(name, None)
        if not return_outputs:
            return value
        with torch.no_grad():
            own = {k: v for k, v in inputs.items() if k not in NOT_OF_THE_MODEL}
            return value, model(**own, use_cache=False)

    pairs = [(select, selective_log_softmax), (loss, _compute_loss), (references, compute_ref_log_probs)]
    return Swap(pairs, (theirs.DPOTrainer,))


_patch = Patch("trl", _find)
