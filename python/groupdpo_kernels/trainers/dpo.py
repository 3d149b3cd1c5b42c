"""TRL's DPOTrainer on the objectives and kernels of this package: every pairwise loss, AdaDPO, any causal LM.

    trainer = DPOTrainer(model, args=DPOConfig(...), train_dataset=pairs, processing_class=tokenizer,
                         objective=Objective("sigmoid", beta=0.1, balance=AdaBalance()))

Data, collator, loop, PEFT, checkpoints and names of metrics are TRL's. The loss is `preference_loss` on `model_logps`,
which also scores the reference, so that both round alike and the first loss of DPO is ln 2 in bfloat16 too. entropy,
logits/* and mean_token_accuracy are not logged, because the head gives log-probabilities alone.

The reference is the model as it is given. TRL instead loads again the checkpoint that the model once came from; here a
model given as an object is copied, so weights that have moved since (the stages of sDPO) are what it starts from. With
`peft_config` it is the model without its adapter; for a PeftModel it is TRL's copy of the adapter, named "ref". An
objective without a reference (simpo, cpo, orpo) holds none; TRL then refuses images.

The options of DPOConfig that describe the loss must keep their defaults, because `Objective` has them; they are listed
in `misplaced.LOSS_OPTIONS`. TRL refuses adapters on the LM head; `GroupDPOTrainer` takes them.

The module never changes TRL or one of its classes. It needs TRL 1.16 or later, before 2 (its private `_compute_loss` is
overridden; the version is checked). The cost is TRL's, without its (B, L) statistics. docs/math.md has the formulas.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import tokenizer_of
from ..distributed import DDP, kind_of, maxima
from ..installed import installed_trl
from ..models.adapters import active_adapters, adapter_configs, delete_adapter, is_peft_model, let_adapter_train
from ..models.api import attach
from ..models.layouts import why_not_left_padded, why_not_shared
from ..models.one_column import NOT_OF_THE_MODEL, completion_targets
from ..models.paired_prompts import PairedPrompts
from ..models.shared_prompt import REENTRANT
from ..preference.groups import PreferenceGroups
from ..preference.losses import LOSSES
from ..preference.objective import Objective, preference_loss
from .checkpoints import WholeCheckpoints
from .config import check_not_compiled
from .metrics import means_of, preference_metrics, record
from .misplaced import LOSS_OPTIONS, check_names, check_order
from .reference import (
    add_reference_adapter,
    check_adapter,
    check_adapter_alone_trains,
    check_no_earlier_reference,
    copy_to_reference_adapter,
    frozen_copy,
    take_off_forwards_of,
)

SUPPORTED = (1, 16), (2, 0)  # the first version supported, and the first one no longer supported

trl = installed_trl("DPOTrainer", SUPPORTED)


class DPOTrainer(WholeCheckpoints, trl.DPOTrainer):  # type: ignore[name-defined]
    """`trl.DPOTrainer` with an argument `objective`, by default DPO's own, Objective("sigmoid", beta=0.1). All other
    arguments are TRL's, by keyword from the fourth on.

    Args:
        objective: any `Objective` of a pairwise loss, or of a callable (scores (2B,), groups) -> (B,), whose scores
            hold the chosen and the rejected response of each pair side by side.
        share_prompt: whether the prompt of a pair runs once for both, as in GroupDPOConfig. A batch whose pairs have
            prompts that differ, or with images, runs unshared, on all ranks where FSDP or DeepSpeed shards the model;
            with a router's auxiliary loss "auto" does not share, and True raises ValueError.

    Raises ValueError or TypeError, naming argument, expectation and value: for a group-wise loss; an option of
    LOSS_OPTIONS that differs from TRL's default and from the objective; `ref_model`, `precompute_ref_log_probs` or
    `sync_ref_model` with an objective that has no reference; `ref_model=None` where the reference could not stay what
    it was: a PeftModel that has an adapter "ref" from an earlier training, an adapter that trains weights of the base
    model too, a model that ZeRO-3 has sharded; a PeftModel without an adapter "default" where the objective has no
    reference; a dataset without its columns; a tokenizer without an eos token. A TRL outside SUPPORTED is a
    RuntimeError.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        *,
        objective: Objective = Objective(),  # noqa: B008  frozen
        share_prompt: bool | str = "auto",
        **named: Any,
    ) -> None:
        installed_trl("DPOTrainer", SUPPORTED)
        known = [*inspect.signature(trl.DPOTrainer).parameters, "objective", "share_prompt"]
        check_names("DPOTrainer", named, known)
        check_order("DPOTrainer", ref_model)
        args = trl.DPOConfig() if args is None else args
        if not isinstance(args, trl.DPOConfig):
            raise TypeError(f"args must be a trl.DPOConfig; got {type(args).__name__}")
        _check_objective(objective)
        _check_options(args, objective, ref_model)
        _check_tokenizer(named.get("processing_class"))
        self.objective = objective
        given = isinstance(model, nn.Module)
        check_adapter(model, named.get("peft_config"))
        let_adapter_train(model)
        is_peft = is_peft_model(model) or named.get("peft_config") is not None
        if ref_model is None and objective.needs_reference:
            check_no_earlier_reference(model)
            # One active adapter tells policy and reference apart, but TRL copies only an adapter named "default".
            apart = len(active_adapters(model)) == 1 and "default" in adapter_configs(model)
            apart = apart or named.get("peft_config") is not None
            if given and (not apart if is_peft else not args.precompute_ref_log_probs):
                ref_model = frozen_copy(model)
        elif given and ref_model is not None:
            take_off_forwards_of(model, ref_model)
        precompute = args.precompute_ref_log_probs
        if ref_model is None and is_peft_model(model) and "default" not in adapter_configs(model):
            raise ValueError(
                "model must have an adapter named 'default', which TRL's DPOTrainer looks for, where the objective has"
                f" no reference; got {', '.join(adapter_configs(model))}; GroupDPOTrainer takes any name"
            )
        if share_prompt not in ("auto", True, False):
            raise ValueError(f"share_prompt must be 'auto', True or False; got {share_prompt!r}")
        self._own_ref_adapter, self._share_prompt = False, share_prompt
        # TRL builds no reference model where it expects log-probabilities with the data.
        args.precompute_ref_log_probs = precompute or not objective.needs_reference
        try:
            super().__init__(model, ref_model, args, **named)
        finally:
            args.precompute_ref_log_probs = precompute
        _ = self.share_prompt  # where it is refused, the error comes before training
        self.precompute_ref_logps = precompute
        self.beta = objective.beta
        if is_peft and self.ref_model is None:
            if not objective.needs_reference and "ref" in self.model.peft_config:
                self.model.delete_adapter("ref")
            elif objective.needs_reference and not precompute:
                check_adapter_alone_trains(self.model)
                self._make_own_ref_adapter()

    @functools.cached_property
    def share_prompt(self) -> bool:
        """Whether the prompt of a pair runs once: what was asked for, or for "auto" whether the models can. It is first
        read where TRL scores the reference, within __init__ or after.

        A reason against it is an error where it was asked for, and else a warning where a model is the reason.
        """
        asked = self._share_prompt
        router = "it does not go with a router's auxiliary loss, which would count a prompt once"
        why = router if self.aux_loss_enabled else ""
        options = self.args.gradient_checkpointing_kwargs
        if self.args.gradient_checkpointing and isinstance(options, dict) and options.get("use_reentrant"):
            why = why or REENTRANT
        of_model = ""
        for model in (self.model, self.ref_model) if asked and not why else ():
            if model is not None and not of_model:
                of_model = why_not_shared(model) or why_not_left_padded(model)
        if asked is True and (why or of_model):
            raise ValueError(f"share_prompt must be 'auto' or False here: {why or of_model}; got True")
        if of_model:
            warnings.warn(f"a prompt runs again for each of its responses: {of_model}", stacklevel=2)
        return bool(asked) and not why and not of_model

    def _logps(self, model: Any, input_ids: Tensor, targets: Tensor, inputs: dict[str, Any]) -> Tensor | None:
        """(2B, L) log-probabilities of pairs whose prompts run once; None where they do not."""
        if not self.share_prompt:
            return None
        paired = None
        if not inputs.keys() - {"attention_mask", "use_cache", "return_dict"}:
            paired = PairedPrompts.of(input_ids, targets, inputs.get("attention_mask"))
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and maxima([paired is None])[0]:
            return None  # a forward is a collective call there, and another rank makes one alone
        no_sync = model.no_sync if kind_of(model) == DDP and torch.is_grad_enabled() else None
        return None if paired is None else paired.logps(model, no_sync=no_sync)

    def _make_own_ref_adapter(self) -> None:
        """Makes "ref" a full copy of the active adapter, once: afterwards the active one moves. TRL instead copies the
        adapter "default", whichever is active, and leaves out its weights in embeddings.
        """
        if self._own_ref_adapter or self.ref_model is not None or "ref" not in adapter_configs(self.model):
            return
        self._own_ref_adapter = True
        if active_adapters(self.model) == ["default"]:
            copy_to_reference_adapter(self.model)
        else:
            delete_adapter(self.model, "ref")
            add_reference_adapter(self.model)
        if self.precompute_ref_logps:  # TRL names its files by this
            self._precompute_model_hash = trl.trainer.utils.hash_module(self.model)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        found = [*next(iter(dataset))]
        missing = [name for name in ("chosen", "rejected") if name not in found]
        if missing:
            raise ValueError(
                f"{dataset_name} dataset must have columns chosen and rejected (and prompt, unless both are whole"
                f" conversations); {', '.join(missing)} not among {', '.join(found)}"
            )
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """TRL's method, only for an objective with a reference. ValueError for rows given after training, when the
        reference no longer exists."""
        if not self.objective.needs_reference:
            return dataset
        if self.ref_model is None and self.state.global_step > 0 and is_peft_model(self.model):  # TRL raises otherwise
            check_adapter_alone_trains(self.model, trained=True)
        self._make_own_ref_adapter()
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(chosen, rejected), (B,) float32 each: TRL's own method, with tokens scored by `model_logps`."""

        def score(input_ids: Tensor, labels: Tensor, fused_lm_head: bool, **more: Any) -> SimpleNamespace:
            targets = completion_targets(input_ids, (labels != -100).long())
            token_logps = self._logps(model, input_ids, targets, more)
            if token_logps is None:
                token_logps = attach(model)(input_ids, targets, **more)
            return SimpleNamespace(log_probs=token_logps[:, :-1])

        return super().compute_ref_log_probs(score, inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        targets = completion_targets(inputs["input_ids"], inputs["completion_mask"])
        forward = {k: v for k, v in inputs.items() if k not in NOT_OF_THE_MODEL}
        options: dict[str, Any] = {"output_router_logits": True} if self.aux_loss_enabled else {}
        input_ids = forward.pop("input_ids")
        token_logps, outputs = self._logps(model, input_ids, targets, forward), None
        if token_logps is None:
            token_logps, outputs = attach(model).with_outputs(input_ids, targets, **forward, **options)
        # TRL's batch holds all chosen, then all rejected; a group holds a chosen one and its rejected one in turn.
        B = len(targets) // 2
        order = torch.arange(2 * B, device=targets.device).view(2, B).T.flatten()
        live = (targets != -100)[order]
        lengths = live.sum(1)
        if not bool(lengths.all()):
            raise ValueError(
                f"max_length must leave each response a token; a prompt takes all of it; got {self.args.max_length}"
            )
        groups = PreferenceGroups.pairs(B).to(targets.device)
        cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0))
        result = preference_loss(token_logps[order][live], cu_seqlens, groups, self.objective, self._reference(inputs))
        loss, values = result.loss, preference_metrics(result, groups, self.objective, lengths)
        del values["positive_mass"]  # for a pair it repeats the margin
        if self.aux_loss_enabled and outputs is not None:
            loss, values["aux_loss"] = loss + self.router_aux_loss_coef * outputs.aux_loss, outputs.aux_loss
        mode = "train" if self.model.training else "eval"
        record(self._metrics[mode], values, self.accelerator.gather)
        if mode == "train":
            tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += tokens // self._tp_size
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        if not return_outputs:
            return loss
        with torch.no_grad():  # as in TRL, for the user's compute_metrics
            return loss, model(input_ids=input_ids, use_cache=False, **forward)

    def evaluation_loop(self, *arguments: Any, **named: Any) -> Any:
        """Adds the metrics under this data's own prefix: `eval_a_rewards/margins` for eval_dataset {"a": rows}."""
        output = super().evaluation_loop(*arguments, **named)
        prefix = named.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in means_of(self._metrics["eval"]).items()})
        return output

    def _reference(self, inputs: dict[str, Any]) -> Tensor | None:  # (2B,), chosen and rejected of each pair in turn
        if not self.objective.needs_reference:
            return None
        if self.precompute_ref_logps:
            sides = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            sides = self.compute_ref_log_probs(self.model if self.ref_model is None else self.ref_model, inputs)
        return torch.stack(sides, 1).flatten()


def _check_objective(objective: Objective) -> None:
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective; got {objective!r}")
    if isinstance(objective.loss, str) and (LOSSES[objective.loss].pair is None or LOSSES[objective.loss].every_pair):
        pairwise = [name for name, row in LOSSES.items() if row.pair is not None and not row.every_pair]
        raise ValueError(
            f"objective must be of a pairwise loss ({', '.join(pairwise)}), or go to GroupDPOTrainer;"
            f" got {objective.loss!r}"
        )


def _check_tokenizer(processing_class: Any) -> None:
    """ValueError without an eos token: TRL ends each completion with it, and pads with it without a pad token."""
    tokenizer = tokenizer_of(processing_class)
    if tokenizer is not None and tokenizer.eos_token is None:
        raise ValueError(
            "processing_class must have an eos_token, which ends a completion and, without a pad_token, pads;"
            f" got eos_token=None, pad_token={tokenizer.pad_token!r}"
        )


def _check_options(args: Any, objective: Objective, ref_model: Any) -> None:
    """ValueError for options that would be ignored: the objective decides the loss and the need for a reference."""
    for field in dataclasses.fields(args):
        if field.name not in LOSS_OPTIONS:
            continue
        value, ours = getattr(args, field.name), LOSS_OPTIONS[field.name]
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if value == default or (ours is not None and value in (getattr(objective, ours), [getattr(objective, ours)])):
            continue
        why = "no objective has it" if ours is None else f"Objective({ours}=...) says it"
        raise ValueError(f"{field.name} of DPOConfig must stay {default!r}, because {why}; got {value!r}")
    check_not_compiled(args)
    if objective.needs_reference:
        return
    what = f"for {objective.loss!r} has no reference"
    if ref_model is not None:
        raise ValueError(f"ref_model must be None, {what}; got a {type(ref_model).__name__}")
    for name in ("precompute_ref_log_probs", "sync_ref_model"):
        if getattr(args, name):
            raise ValueError(f"{name} of DPOConfig must be False, {what}; got True")
