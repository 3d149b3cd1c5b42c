"""GroupDPOTrainer trains on several positives and negatives to a prompt, at the memory of one micro-batch.

    trainer = GroupDPOTrainer(model, args=GroupDPOConfig("out"), train_dataset=rows, processing_class=tokenizer,
                              objective=GROUP_OBJECTIVE)

Rows of every layout that `data` reads become groups. A step takes `per_device_train_batch_size` groups, cuts their
responses into micro-batches and gives them to `group_backward` (strategy "two_pass" or "one_pass") or, with "coupled",
keeps the graph of the whole step; "auto" takes "coupled" where the planner finds that this graph fits, else "two_pass".
All give the same gradient. Options and metrics have the names of TRL's DPOConfig and DPOTrainer where those have them.

The base is transformers.Trainer, so that this works without TRL. Little of TRL's DPOTrainer would be left: it tokenises
pairs, patches the forward of the model and refuses adapters on its head.

The trainer never downloads, and never holds a second model beside an adapter or precomputed references. A prompt may
have images, if processing_class is a processor of them. It runs on
one device, under DistributedDataParallel, FSDP2 and DeepSpeed (engines.py). "two_pass" costs one more forward without
the head (preference/group_backward.py); the token ids and images of the data are in memory, and precomputed references
take 4 bytes a response on disk, in output_dir/ref_logps. The source is GroupDPO (arXiv 2604.15602); see also
docs/math.md.
"""

from __future__ import annotations

import inspect
import logging
import traceback
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import Trainer, set_seed

from ..checks import check_kind, check_tensors, shown
from ..data.batches import TokenGroup, check_processing_class, tokenizer_of
from ..data.formats import Report
from ..data.images import pixels_made_by, processor_of
from ..distributed import shards
from ..memory.worker import out_of_memory
from ..models.adapters import has_adapter, let_adapter_train
from ..models.decoder_layers import checkpoint_layers, compile_layers
from ..models.limits import position_limit, token_limit
from ..preference.objective import Objective, PreferenceLoss
from ..stepwise.stages import reference_logps
from ..stepwise.store import tensor_digests
from .checkpoints import WholeCheckpoints
from .config import GroupDPOConfig, is_reentrant
from .engines import (
    check_engine,
    engine_asked,
    in_step,
    measure_together,
    prepared_reference,
    whole_or_sharded,
)
from .fit_check import advice, check_group_fits, memory_of, micro_batch_tokens_of, strategy_that_fits
from .metrics import means_of
from .misplaced import check_names, check_order
from .reference import (
    check_adapter,
    check_adapter_alone_trains,
    check_on_one_device,
    reference_of,
    take_off_forwards_of,
)
from .rows import Collator, GroupRows, tokenised
from .steps import GROUP_OBJECTIVE, GroupSteps

logger = logging.getLogger(__name__)

_NO_REFERENCE = "ref_model must be given to evaluate: ref_logps are those of train_dataset; got ref_logps"


class GroupDPOTrainer(WholeCheckpoints, GroupSteps, Trainer):
    """A transformers.Trainer on groups of responses, by default with Objective("mpo", beta=2.0, average=True,
    nll_weight=1.0). The module's docstring describes a step.

    Args:
        model: a causal LM; one with an adapter (a PeftModel, or an adapter's folder as AutoModelForCausalLM loads it)
            is its own reference, adapter included. An adapter that was loaded for inference trains. With several
            active adapters, a new one over a loaded one, the reference is a frozen copy of the whole model.
        ref_model: the reference. None takes the model as it is given, or `ref_logps`, or none for an objective without.
        train_dataset, eval_dataset: rows of a layout of `data.FORMATS` (a `datasets.Dataset`, a list of dicts), or
            a list of TokenGroup; eval_dataset may be a dict of these.
        processing_class: the tokenizer, or a processor that has one; not needed with TokenGroups that have no images.
            Without a pad token the eos token pads.
        objective: any `Objective`; a pairwise loss needs pairs as groups.
        ref_logps: (S,) floating, of all responses of train_dataset, which then must be TokenGroups. No other reference
            is held, so evaluation is refused.
        peft_config: describes the new adapter, which may be on the LM head too.
        callbacks, optimizers: as in transformers.

    Attributes: `report`, what was read and dropped, by dataset; `strategy`, the one that runs; `share_prompt`, whether
    a group's prompt runs once.

    It logs TRL's `rewards/*`, `logps/*`, `num_tokens` and `aux_loss`, and besides `computed_tokens` (the positions that
    one forward of each step computes: fewer than num_tokens where prompts are shared, more by padding),
    `positive_mass`, `balance_weight` (AdaDPO) and `pass_drift` (two_pass: the largest difference of a response's log-
    probability between the passes).
    A group's `weight` weighs it in the mean over all groups of an optimizer step, those of every rank and accumulation
    step (`Objective.divide_by`); metrics do not weigh. In evaluation each batch has its own mean.
    The auxiliary loss is the mean over micro-batches, weighted by their tokens, and counts as much as its groups do; a
    shared prompt counts once.

    Raises ValueError or TypeError, naming argument, expectation and value, for: a reference that is not read or that
    would change in training, rows of unknown columns or without a usable group, a response longer than
    micro_batch_tokens, with "coupled" a group whose graph alone takes more memory than there is, a pairwise loss on
    larger groups, version 1 of FSDP, options that an engine cannot do, several GPUs in one process, a model that is
    split over ranks or wrapped already.
    """

    model: Any
    objective: Objective
    config: GroupDPOConfig
    report: defaultdict[str, Report]
    data_collator: Collator
    loss_is_scaled_for_ga = False  # compute_loss is a mean over groups: Trainer divides by the accumulation steps

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: GroupDPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        objective: Objective = GROUP_OBJECTIVE,
        ref_logps: Tensor | None = None,
        peft_config: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        **unknown: Any,
    ) -> None:
        check_names("GroupDPOTrainer", unknown, [*inspect.signature(GroupDPOTrainer).parameters])
        check_order("GroupDPOTrainer", ref_model)
        if ref_model is not None and not isinstance(ref_model, nn.Module):
            raise TypeError(f"ref_model must be a model or None; got a {type(ref_model).__name__}")
        args = GroupDPOConfig() if args is None else args
        _check_arguments(model, ref_model, args, objective, ref_logps, peft_config)
        check_processing_class(processing_class)
        if isinstance(train_dataset, dict):
            raise TypeError(f"train_dataset must be rows, or a list of TokenGroup; got {shown(train_dataset)}")
        if ref_logps is not None and eval_dataset is not None:
            raise ValueError(_NO_REFERENCE)
        self.objective, self.report = objective, defaultdict(Report)
        self.tokenizer, self.config = tokenizer_of(processing_class), args
        self._processing_class = processing_class
        self._limits = position_limit(model), token_limit(model)
        set_seed(args.seed)  # the adapter draws its weights next
        if peft_config is not None:
            from peft import PeftConfig, get_peft_model

            check_kind("peft_config", peft_config, PeftConfig, "a configuration of peft, such as LoraConfig")
            model = get_peft_model(model, peft_config)
        let_adapter_train(model)
        if has_adapter(model) and args.gradient_checkpointing and is_reentrant(args):
            model.enable_input_require_grads()  # a checkpoint runs again only if an input requires grad
        self.aux_coef = aux_coef_of(model, args)
        self._given = ref_logps is not None
        if ref_model is None and objective.needs_reference and not self._given:
            ref_model = reference_of(model, peft_config is not None, args.precompute_ref_log_probs)
        elif ref_model is not None:
            take_off_forwards_of(model, ref_model)
        for each in (model, ref_model) if args.disable_dropout else ():
            for module in each.modules() if each is not None else ():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        pad_id, processor = pad_id_of(model, self.tokenizer), processor_of(processing_class)
        collator = Collator(args.layout, None, args.micro_batch_sequences, pad_id, processor=processor)
        train = self._tokenised(train_dataset, "train")
        pictured = any(group.pictures is not None for group in train.groups)
        collator = collator.sharing(args, bool(self.aux_coef), model, ref_model)
        collator = collator.sharing_images(args, train.groups, model, ref_model)
        self.share_prompt = collator.share_prompt
        most: Any = args.micro_batch_tokens
        self.strategy = args.strategy
        if pictured and most == "auto":
            raise ValueError(
                "micro_batch_tokens must be a number or None for rows with images, which the planner does not know; got"
                " 'auto'"
            )
        if (engine_asked(args) or pictured) and self.strategy == "auto":
            self.strategy = "two_pass"  # the planner sizes a whole model, of text
        elif most == "auto" or args.strategy in ("auto", "coupled"):
            if args.gradient_checkpointing:
                checkpoint_layers(model, args.gradient_checkpointing_kwargs)
            memory, autocast = memory_of(model, args.device), bool(args.bf16 or args.fp16)
            if args.strategy == "auto":
                self.strategy = self._choice(model, ref_model, train.groups, autocast, memory)
            if args.strategy == "coupled" and not pictured:
                check_group_fits(model, train.groups, args.device, autocast, memory, share_prompt=self.share_prompt)
            if most == "auto":
                most = None  # the whole graph fits
                if self.strategy == "two_pass":
                    most = micro_batch_tokens_of(
                        model, ref_model, train.groups, args.device, autocast, memory, share_prompt=self.share_prompt
                    )
        super().__init__(
            model=model,
            args=args,
            data_collator=replace(collator, max_tokens=most),
            train_dataset=train if ref_logps is None else GroupRows(train.groups, ref_logps),
            eval_dataset=None if eval_dataset is None else self._tokenised(eval_dataset, "eval"),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_engine(self)
        # accelerate would compile the whole model. What it goes by belongs to the process, and to the trainer that was
        # first in it: this one has its own.
        state = self.accelerator.state
        state.__dict__ = {**vars(state), "dynamo_plugin": TorchDynamoPlugin(backend="no")}
        if args.torch_compile:
            for each in filter(None, (model, ref_model)):
                compile_layers(each, args.torch_compile_backend, args.torch_compile_mode)
        self.data_collator = self.data_collator.fitting(model, ref_model)
        self._weighted = objective.divide_by == "weights" and any(group.weight != 1 for group in train.groups)
        self.ref_model = ref_model
        if args.precompute_ref_log_probs and engine_asked(args):
            self._digests = tensor_digests(model if ref_model is None else ref_model)  # before they are sharded
        if ref_model is not None:
            self.ref_model = prepared_reference(self, ref_model)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._total_train_tokens = self._total_computed_tokens = 0
        if args.precompute_ref_log_probs:
            self.train_dataset = self._scored(self.train_dataset)
            self.eval_dataset = self._scored(self.eval_dataset)

    def _choice(self, model: Any, ref_model: Any, groups: Sequence[TokenGroup], autocast: bool, memory: int) -> str:
        """The strategy that "auto" takes. It is the same on all ranks, each of which sees its own device's memory."""
        args = self.config
        size, device = args.per_device_train_batch_size, args.device
        chosen, why = strategy_that_fits(
            model, ref_model, groups, size, device, autocast, memory, share_prompt=self.share_prompt
        )
        if args.world_size > 1:
            fits = torch.tensor(int(chosen == "coupled"), device=device)
            torch.distributed.all_reduce(fits, torch.distributed.ReduceOp.MIN)
            if not fits and chosen == "coupled":
                chosen, why = "two_pass", "on another rank the whole graph of a step does not fit"
        logger.info("strategy %r: %s", chosen, why)
        return chosen

    # --------------------------------------------------------------------------------------------------------- the data

    def _tokenised(self, rows: Any, name: str) -> Any:
        return tokenised(rows, name, self._processing_class, self.config, self.objective, self.report, self._limits)

    def _scored(self, rows: Any) -> Any:
        """The rows with the reference's log-probabilities, read from disk as far as they are there."""
        if isinstance(rows, dict):
            return {key: self._scored(value) for key, value in rows.items()}
        if rows is None or rows.ref_logps is not None or not self.objective.needs_reference:
            return rows
        model = self.accelerator.unwrap_model(self.model if self.ref_model is None else self.ref_model)
        if self.ref_model is None and self.state.global_step > 0:
            if not has_adapter(model):
                raise ValueError(
                    "ref_model must be given to evaluate rows that were not there before training, with"
                    " precompute_ref_log_probs=True: the model has moved since; got None"
                )
            check_adapter_alone_trains(model, trained=True)
        options = {"layout": self.data_collator.layout, "precision": self.accelerator.mixed_precision}
        options |= pixels_made_by(self.data_collator.processor)
        folder = Path(str(self.args.output_dir)) / "ref_logps"
        with whole_or_sharded(self, model) as model:
            more: dict[str, Any] = {"options": options, "spread": True}
            if engine_asked(self.args):
                more["fingerprint"] = lambda _: self._digests
            values = reference_logps(
                model, rows.groups, folder, score=self.score, count=lambda group: len(group.responses), **more
            )
        return GroupRows(rows.groups, values)

    def score(self, model: Any, groups: Sequence[TokenGroup]) -> Tensor:  # (S,) float32
        """Log-probabilities of the responses under the reference. The signature is that of `stepwise`'s `score`."""
        items = [(group, None) for group in groups]
        parts = self.data_collator(items)["step"].to(self.args.device).parts if items else []
        if model is not None and shards(model):
            parts = in_step(parts, self.args.device)
        return self._scores_of(parts, model) if parts else torch.empty(0)

    def evaluate(self, eval_dataset: Any = None, *more: Any, **named: Any) -> dict[str, float]:
        """Evaluates as transformers.Trainer does; `eval_dataset` may be rows, as in __init__."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._tokenised(eval_dataset, "eval")
            if self.config.precompute_ref_log_probs:
                eval_dataset = self._scored(eval_dataset)
        return super().evaluate(eval_dataset, *more, **named)

    # -------------------------------------------------------------------------------------------------------- the steps

    def _reference(self, inputs: dict[str, Any]) -> Tensor | None:  # (S,)
        if not self.objective.needs_reference or "ref_logps" in inputs:
            return inputs.get("ref_logps")
        if self._given:
            raise ValueError(_NO_REFERENCE)
        return self._scores(inputs["step"])

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Fills .grad; returns the loss, both divided by the accumulation steps as Trainer does."""
        try:
            return self._training_step(model, inputs, num_items_in_batch)
        except Exception as error:
            if self.args.world_size > 1:
                where = self.args.process_index, inputs["rows"].tolist(), type(error).__name__, error
                logger.error("rank %d stops in the step of rows %s: %s: %s", *where)
            if not isinstance(error, (RuntimeError, MemoryError)) or not out_of_memory(error):
                raise
            ran_out = error
        traceback.clear_frames(ran_out.__traceback__)  # frees what the step held, before its memory is counted
        bare, device = self.accelerator.unwrap_model(model), self.args.device
        autocast = bool(self.args.bf16 or self.args.fp16)
        why = advice(
            bare, inputs["step"], self.strategy, autocast, device, self.optimizer, share_prompt=self.share_prompt
        )
        raise type(ran_out)(f"{ran_out}\n{why}") from ran_out

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Moves the step to the device; where an engine shards the model, ranks get equally many parts."""
        inputs = super()._prepare_inputs(inputs)
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and not inputs.get("agreed"):
            measure_together(self, self.model_wrapped, self.ref_model)
            step = inputs["step"]
            inputs = {**inputs, "step": replace(step, parts=in_step(step.parts, self.args.device)), "agreed": True}
        return inputs

    def _training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Tensor:
        if self.strategy == "coupled":
            return super().training_step(model, inputs, num_items_in_batch)
        self._to_training(model)
        inputs = self._prepare_inputs(inputs)
        share = inputs.get("share", 1.0)
        result, forward = self._by_parts(model, inputs["step"], self._reference(inputs), share)
        more = {"pass_drift": forward.drift()} if self.strategy == "two_pass" else {}
        return self._logged(inputs, result, forward.auxiliary, more) / self.current_gradient_accumulation_steps

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:  # () differentiable
        """The loss of a step with its whole graph, for evaluation and for strategy "coupled"."""
        result, auxiliary = self._whole(model, inputs["step"], self._reference(inputs))
        return self._logged(inputs, result, auxiliary, {})

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The batches of an optimizer step, each with its "share" where groups have weights: what its mean counts, so
        that the average over batches and ranks is the mean over all groups of the step, divided by all their weights.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._weighted:
            own = torch.tensor([sum(batch["weight"] for batch in batches), len(batches)], dtype=torch.float64)
            total, count = self.accelerator.reduce(own.float().to(self.args.device)).tolist()
            batches = [{**batch, "share": batch["weight"] * count / total} for batch in batches]
        return batches, items

    def _logged(
        self, inputs: dict[str, Any], result: PreferenceLoss, parts: list[Tensor], more: dict[str, Tensor]
    ) -> Tensor:  # ()
        """The loss with its auxiliary part, after its metrics are recorded for the log."""
        mode, step = "train" if self.model.training else "eval", inputs["step"]
        loss = self._measured(step, result, parts, more)
        if mode == "train":
            tokens = torch.tensor(inputs["num_tokens"], device=self.accelerator.device)
            self._total_train_tokens += int(self.accelerator.gather(tokens).sum())
            self._total_computed_tokens += int(
                self.accelerator.gather(torch.full_like(tokens, step.computed_tokens)).sum()
            )
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        self._metrics[mode]["computed_tokens"] = [self._total_computed_tokens]
        return loss * inputs.get("share", 1.0)

    def evaluation_loop(self, *arguments: Any, **named: Any) -> Any:
        """Adds the metrics under this data's own prefix: `eval_a_rewards/margins` for eval_dataset {"a": rows}."""
        output = super().evaluation_loop(*arguments, **named)
        prefix = named.get("metric_key_prefix", "eval")
        means = {f"{prefix}_{name}": value for name, value in means_of(self._metrics["eval"]).items()}
        output = output._replace(metrics={**(output.metrics or {}), **means})
        return output

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def log(self, logs: dict[str, float], *more: Any, **named: Any) -> None:
        if self.model.training:  # an evaluation has added its own numbers in `evaluation_loop`
            logs.update(means_of(self._metrics["train"]))
        super().log(logs, *more, **named)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """FLOP of a step: 2 a parameter and position in each forward, and 4 in the backward."""
        passes = 8 if self.strategy == "two_pass" else 6
        return passes * inputs["step"].computed_tokens * int(self.model.num_parameters(exclude_embeddings=True))


def pad_id_of(model: Any, tokenizer: Any) -> int:
    """The token id of the padding, which is masked and never scored."""
    if tokenizer is None:
        return model.config.get_text_config().pad_token_id or 0
    tokenizer = tokenizer_of(tokenizer)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None and eos is None:
        raise ValueError("processing_class must have a pad_token, or an eos_token, which pads then; got None for both")
    return eos if pad is None else pad


def aux_coef_of(model: Any, args: GroupDPOConfig) -> float:
    text_config, coef = model.config.get_text_config(), args.router_aux_loss_coef
    if not hasattr(text_config, "output_router_logits"):
        if coef:
            name = type(model).__name__
            raise ValueError(f"router_aux_loss_coef must be None or 0 for {name}, which has no router; got {coef}")
        return 0.0
    return getattr(text_config, "router_aux_loss_coef", 0.0) if coef is None else coef


def _check_arguments(
    model: Any, ref_model: Any, args: GroupDPOConfig, objective: Objective, ref_logps: Any, peft_config: Any
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a model (AutoModelForCausalLM.from_pretrained loads one); got {model!r:.60}")
    for name, each in {"model": model, "ref_model": ref_model}.items():
        if isinstance(each, nn.Module):
            check_on_one_device(name, each)
    if not isinstance(args, GroupDPOConfig):
        raise TypeError(f"args must be a GroupDPOConfig; got {type(args).__name__}")
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective; got {objective!r}")
    if ref_model is model:
        raise ValueError("ref_model must be another object than model, or None for a copy of it; got model")
    if ref_logps is not None:
        check_tensors(ref_logps=ref_logps)
    check_adapter(model, peft_config)
    if args.merge_prompts and objective.loss == "plackett_luce":
        raise ValueError("merge_prompts must be False for 'plackett_luce': merged rows have no ranking; got True")
    given = {"ref_model": ref_model, "ref_logps": ref_logps}
    for name, value in given.items():
        if value is not None and not objective.needs_reference:
            got = type(value).__name__
            raise ValueError(f"{name} must be None, for {objective.loss!r} has no reference; got a {got}")
    if ref_logps is not None and (ref_model is not None or args.precompute_ref_log_probs):
        raise ValueError("ref_logps must be the only reference, without ref_model and precompute_ref_log_probs")
    if args.precompute_ref_log_probs and not objective.needs_reference:
        raise ValueError(f"precompute_ref_log_probs must be False, for {objective.loss!r} has no reference; got True")
