"""GroupSteps is what the trainers of groups share: a step on a PreferenceBatch, its reference and its metrics.

    two_pass, one_pass   `by_parts`: `group_backward`, which fills .grad a micro-batch at a time
    coupled              `whole`: the loss with the graph of the whole step, for Trainer's own backward; evaluation too

It is a mixin of a transformers.Trainer, which has the model, the optimizer and the accelerator. It never reads data and
never chooses a strategy. The cost is that of `group_backward`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.batches import PreferenceBatch
from ..distributed import DDP, kind_of
from ..models.adapters import has_adapter, is_peft_model, save_adapter
from ..preference.group_backward import forward_parts, group_backward
from ..preference.objective import Objective, PreferenceLoss, preference_loss
from .forward import StepForward, response_logps
from .metrics import preference_metrics, record
from .reference import as_reference

GROUP_OBJECTIVE = Objective("mpo", beta=2.0, average=True, nll_weight=1.0)


class GroupSteps:
    """The steps of a trainer. It must set objective, strategy, aux_coef, ref_model and _metrics."""

    model: Any
    ref_model: Any
    args: Any
    accelerator: Any
    optimizer: Any
    processing_class: Any
    current_gradient_accumulation_steps: int
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    objective: Objective
    strategy: str
    aux_coef: float  # weight of a router's auxiliary loss; 0 leaves it out
    _metrics: dict[str, dict[str, list[float]]]

    def _scores(self, step: PreferenceBatch) -> Tensor:  # (S,) float32
        """Log-probabilities of the responses under the reference."""
        return self._scores_of(step.parts, self.accelerator.unwrap_model(self.model))

    @torch.no_grad()
    def _scores_of(self, parts: list[Any], model: Any) -> Tensor:  # (S,) float32
        """Log-probabilities of the responses of a step's parts under the reference: ref_model, or `model` without its
        adapter."""
        with as_reference(model, self.ref_model) as reference:
            return response_logps(reference, parts, self.accelerator.autocast)

    def _forward(self, model: Any, step: PreferenceBatch, bare: Any = None) -> StepForward:
        tokens: float = step.computed_tokens
        if step.groups.spans and self.aux_coef:  # engines average over ranks, which have unequally many positions
            of_all = torch.tensor(float(tokens), device=self.accelerator.device)
            torch.distributed.all_reduce(of_all)
            tokens = float(of_all) / torch.distributed.get_world_size()
        autocast = self.accelerator.autocast
        return StepForward(model, autocast, bare=bare, aux_coef=self.aux_coef, tokens=max(1, tokens))

    def _to_training(self, model: Any) -> None:
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers have it
            self.optimizer.train()

    def _by_parts(
        self,
        model: Any,
        step: PreferenceBatch,
        ref_logps: Tensor | None,  # (S,)
        weight: float = 1.0,
    ) -> tuple[PreferenceLoss, StepForward]:
        """Fills .grad with that of the loss times `weight`, divided by the accumulation steps."""
        engine = model if self.is_deepspeed_enabled else None
        if engine is not None:
            engine.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
        forward = self._forward(model, step, bare=engine or self.accelerator.unwrap_model(model))
        # two_pass gets None, because a backward that is told its leaves finds none inside a reentrant checkpoint.
        leaves = None if self.strategy == "two_pass" else [p for p in model.parameters() if p.requires_grad]
        result = group_backward(
            step.parts,
            forward,
            step.groups,
            self.objective,
            ref_logps,
            strategy=self.strategy,
            scale=self._scale() * weight,
            parameters=leaves,
            model=model,
        )
        if engine is not None and self.accelerator.sync_gradients:
            engine.step()  # accelerate calls it in its own backward
        return result, forward

    def _scale(self) -> float | Tensor:
        """The factor on the gradient: 1 / accumulation steps, times the scale of fp16's gradient scaler."""
        share, scaler = 1 / self.current_gradient_accumulation_steps, self.accelerator.scaler
        return share if scaler is None else scaler.scale(torch.tensor(share, device=self.accelerator.device))

    def _whole(
        self,
        model: Any,
        step: PreferenceBatch,
        ref_logps: Tensor | None,  # (S,)
    ) -> tuple[PreferenceLoss, list[Tensor]]:
        """The loss with the graph of the whole step, and the parts of the auxiliary loss."""
        # One backward follows all forwards. Under DistributedDataParallel a forward outside no_sync takes part in a
        # collective, and ranks differ in their number of forwards, so that only the last one does.
        no_sync = model.no_sync if kind_of(model) == DDP else None
        token_logps, cu_seqlens, auxiliary = forward_parts(step.parts, self._forward(model, step), no_sync=no_sync)
        return preference_loss(token_logps, cu_seqlens, step.groups, self.objective, ref_logps), auxiliary

    def _measured(
        self,
        step: PreferenceBatch,
        result: PreferenceLoss,
        auxiliary: list[Tensor],
        more: dict[str, Tensor],
        weight: float | None = None,
    ) -> Tensor:  # ()
        """The loss with its auxiliary part, after the metrics are recorded for the log. weight: as in `record`."""
        mode, loss = "train" if self.model.training else "eval", result.loss
        lengths = step.groups.gathered(torch.cat([mb.cu_seqlens.diff() for mb in step.micro_batches]))
        values = {**preference_metrics(result, step.groups.whole, self.objective, lengths), **more}
        if auxiliary:
            total = torch.stack(auxiliary).sum()
            loss, values["aux_loss"] = loss + total.to(loss), total / self.aux_coef
        record(self._metrics[mode], values, self.accelerator.gather, weight)
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves what `from_pretrained` loads. Under FSDP2 too these are whole weights, whichever kind of state dict the
        checkpoints hold: transformers would write none with SHARDED_STATE_DICT. All ranks must call it."""
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        if self.is_fsdp_enabled and not _internal_call and self._checkpoints_are_sharded:
            self._save(output_dir, self.accelerator.get_state_dict(self.model))

    @property
    def _checkpoints_are_sharded(self) -> bool:
        return "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Saves as transformers does, but writes an adapter inside a transformers model here, for any PEFT version."""
        model = self.accelerator.unwrap_model(self.model)
        if is_peft_model(model) or not has_adapter(model):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        if not self.args.should_save:
            return
        folder = str(self.args.output_dir if output_dir is None else output_dir)
        save_adapter(model, folder, state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, Path(folder) / "training_args.bin")
