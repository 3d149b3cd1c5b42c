"""StepwiseDPO is sDPO (arXiv 2403.19270) with the trainers of this package: the data comes in parts, and the reference
of each stage is the model as the stage before left it.

    parts = [take(rows, part) for part in by_column(rows, "stage")]            # see groupdpo_kernels.stepwise
    StepwiseDPO(model, GroupDPOConfig("out"), parts, tokenizer).train()        # or a trl.DPOConfig, for pairs

TRL's DPOTrainer alone takes another reference in stage 2: without `ref_model` it loads the checkpoint that the model
first came from, and with an adapter it stops at the copy "ref" that stage 1 left. Here a GroupDPOConfig scores each
part once, under the weights that its stage starts from, in `stepwise.run_stages`; a DPOConfig lets `DPOTrainer` copy
the model (or its adapter, which is deleted after the stage). So the first loss of every stage is DPO's loss at equal
scores, ln 2.

`run_stages` keeps the stages on disk under args.output_dir: the same call, with the model as it first was, continues
after the last complete stage, and ends with the same weights. The checkpoints of a stage are in
output_dir/trainer-<stage>; training does not resume from them.

Under DistributedDataParallel and FSDP2 ranks score each part in turns. Under FSDP2 a stage shards a copy of the model,
whose weights come back after it; the whole model is on each rank's CPU meanwhile.

It never leaves an adapter "ref" or a patched forward on the model. With a GroupDPOConfig it costs a forward of the data
and no second model; with a DPOConfig it costs TRL's reference (precompute_ref_log_probs=True saves the second model).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from ..data.batches import TokenGroup
from ..data.formats import Report
from ..data.images import pixels_made_by, processor_of
from ..models.adapters import adapter_configs, delete_adapter, let_adapter_train
from ..models.limits import position_limit, token_limit
from ..preference.objective import Objective
from ..stepwise.stages import run_stages
from .config import GroupDPOConfig
from .engines import DEEPSPEED, engine_asked, take_weights
from .forward import response_logps
from .group_dpo import GroupDPOTrainer, aux_coef_of, pad_id_of
from .reference import check_adapter, check_no_earlier_reference
from .rows import Collator, tokenised

# These options change no weight, so that a run may resume with other values of them.
_ASIDE = ("output_dir", "run_name", "report_to", "disable_tqdm", "logging_", "log_", "save_", "hub_", "push_to_hub")


class StepwiseDPO:
    """Stages of `GroupDPOTrainer` or `DPOTrainer`, one for each part of the data, by default with DPO's objective,
    Objective("sigmoid", beta=0.1), on pairs.

    Args:
        model: the reference of stage 1; trained in place, its adapter if it has one.
        args: a GroupDPOConfig, or a trl.DPOConfig, of each stage; it chooses the trainer.
        parts: a list of datasets: the rows of each stage, in order, as the trainer takes them.
        processing_class: the tokenizer; not needed for TokenGroups.
        objective: one that has a reference; groups larger than pairs need one for groups, such as
            Objective("all_pairs").
        peft_config: describes the adapter, which is made once, before stage 1.
        callbacks: the callbacks of every stage.

    Attributes: `model`, with its adapter; `history`, the trainer's log of each stage that this call trained; `report`,
    what was read and dropped in each stage (GroupDPOConfig).

    Raises ValueError or TypeError, naming argument, expectation and value: no or empty parts, an objective without a
    reference, sync_ref_model, an adapter "ref" on the model, DeepSpeed, other args; and what trainer and `run_stages`
    raise.
    """

    def __init__(
        self,
        model: Any,
        args: Any,
        parts: Sequence[Any],
        processing_class: Any = None,
        *,
        objective: Objective = Objective(),  # noqa: B008  frozen
        peft_config: Any = None,
        callbacks: Any = None,
    ) -> None:
        self.args, self.processing_class, self.callbacks = args, processing_class, callbacks
        self.grouped = isinstance(args, GroupDPOConfig)
        if not self.grouped and "DPOConfig" not in (
            kind.__name__ for kind in type(args).__mro__
        ):  # without TRL, args cannot be a trl.DPOConfig
            raise TypeError(f"args must be a GroupDPOConfig or a trl.DPOConfig; got {type(args).__name__}")
        if not isinstance(objective, Objective):
            raise TypeError(f"objective must be an Objective; got {objective!r}")
        self.objective, self.engine = objective, engine_asked(args)
        if self.engine == DEEPSPEED:
            raise ValueError(
                "StepwiseDPO must run on one device, under DistributedDataParallel or under FSDP2: accelerate takes one"
                " trainer a process with DeepSpeed, and each stage has its own; got DeepSpeed"
            )
        parts = _datasets(parts)
        if not self.objective.needs_reference:
            raise ValueError(f"objective must have a reference, which is what the stages move; got {self.objective}")
        if getattr(args, "sync_ref_model", False):
            raise ValueError("sync_ref_model must be False: the reference of a stage stands still; got True")
        check_no_earlier_reference(model)
        check_adapter(model, peft_config)
        if peft_config is not None:
            from peft import get_peft_model

            set_seed(args.seed)
            model = get_peft_model(model, peft_config)
        let_adapter_train(model)
        self._limits = position_limit(model), token_limit(model)
        self.model: Any = model
        self.history: dict[int, list[dict[str, float]]] = {}
        self.report: dict[str, Report] = {}
        self.parts = [self._part(part, k) for k, part in enumerate(parts, 1)]

    def train(self) -> Any:
        """Trains all stages that are not on disk yet; returns the model."""
        self.model.to(self.args.device)
        given = {k: v for k, v in self.args.to_dict().items() if not k.startswith(_ASIDE) and _plain(v)}
        objective = dataclasses.asdict(self.objective)
        if callable(self.objective.loss):
            objective["loss"] = getattr(self.objective.loss, "__qualname__", type(self.objective.loss).__qualname__)
        run_stages(
            self.model,
            self.parts,
            self._train,
            Path(str(self.args.output_dir)),
            score=self._score if self.grouped else _no_scores,
            count=(lambda group: len(group.responses)) if self.grouped else None,
            options={"args": given, "objective": objective, **pixels_made_by(processor_of(self.processing_class))},
            seed=None,  # the trainers seed themselves
            spread=True,
        )
        return self.model

    def _part(self, part: Any, stage: int) -> Any:
        if not self.grouped:
            return part
        name = f"stage {stage}"
        self.report[name] = Report()
        rows = tokenised(part, name, self.processing_class, self.args, self.objective, self.report, self._limits)
        return rows.groups

    def _score(self, model: nn.Module, groups: Sequence[TokenGroup]) -> Tensor:  # (S,) float32
        """Scores in the trainer's micro-batches and under its autocast, so that the first step finds equal scores."""
        if not groups:
            return torch.empty(0)
        tokens: Any = self.args.micro_batch_tokens
        if tokens == "auto":  # the limit is of a step with gradients: a forward of one sequence fits
            tokens = max(len(group.prompt) + max(map(len, group.responses)) for group in groups)
        args = self.args
        pad_id, processor = pad_id_of(model, self.processing_class), processor_of(self.processing_class)
        collator = Collator(args.layout, tokens, args.micro_batch_sequences, pad_id, processor=processor)
        collator = collator.fitting(model).sharing(args, bool(aux_coef_of(model, args)), model)
        step = collator([(group, None) for group in groups])["step"].to(args.device)
        autocast = partial(torch.autocast, args.device.type, torch.bfloat16, enabled=bool(args.bf16))
        return response_logps(model, step.parts, autocast)

    def _train(self, model: Any, part: Any, ref_logps: Tensor, stage: int) -> None:
        args = copy.copy(self.args)
        args.output_dir = str(Path(str(args.output_dir)) / f"trainer-{stage}")
        named = {"processing_class": self.processing_class, "objective": self.objective, "callbacks": self.callbacks}
        trained = copy.deepcopy(model.to("cpu")) if self.engine else model
        with _left_as_it_was(model):
            if self.grouped:
                args.precompute_ref_log_probs = False  # ref_logps has them already
                trainer: Any = GroupDPOTrainer(trained, None, args, part, ref_logps=ref_logps, **named)
            else:
                from .dpo import DPOTrainer

                trainer = DPOTrainer(trained, None, args, train_dataset=part, **named)
            trainer.train()
        if self.engine:
            take_weights(model, trainer)
            model.to(args.device)
        self.history[stage] = trainer.state.log_history


def _datasets(parts: Any) -> list[Any]:
    """TypeError where `parts` is one dataset, since each of its rows or columns would become a stage."""
    one = isinstance(parts, (str, Mapping)) or hasattr(parts, "column_names")
    if one or not isinstance(parts, Iterable):
        got = f"a {type(parts).__name__}"
    else:
        parts = list(parts)
        row = next((part for part in parts if isinstance(part, (str, Mapping, TokenGroup))), None)
        if row is None:
            return parts
        got = f"a list that holds a {type(row).__name__}"
    raise TypeError(
        "parts must be a list of datasets, one for each stage: [first, second], or"
        f" [take(rows, part) for part in equal_parts(len(rows), 2)] of groupdpo_kernels.stepwise; got {got}"
    )


@contextlib.contextmanager
def _left_as_it_was(model: Any) -> Iterator[None]:
    """A context that removes what trainers leave on a model: patched forwards (autocast, TRL's head), which would pile
    up, and the adapter "ref", which the next stage would take for its own reference."""
    before = {module: module.__dict__.get("forward") for module in model.modules()}
    try:
        yield
    finally:
        if "ref" in adapter_configs(model):
            delete_adapter(model, "ref")
        for module in model.modules():
            if module.__dict__.get("forward") is not before.get(module):
                del module.__dict__["forward"]
                if before.get(module) is not None:
                    module.__dict__["forward"] = before[module]


def _no_scores(model: nn.Module, rows: Any) -> Tensor:  # (n,), also for no rows
    """Zeros for the pairs of a DPOConfig: TRL tokenises inside its trainer, which holds the reference itself."""
    return torch.zeros(len(rows))


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, bool, int, float, list, dict))
