"""OnlineGroupDPOTrainer: the policy generates its own groups, rewards make their sides, and any Objective is the loss.

    trainer = OnlineGroupDPOTrainer(model, reward_funcs=reward, train_dataset=prompts, processing_class=tokenizer,
                                    args=OnlineGroupDPOConfig("out", num_generations=8))

The base is TRL's GRPOTrainer: generation (transformers, vLLM, continuous batching), reward functions and models, the
sampling of prompts and the logs of completions are TRL's. Instead of advantages, a rule of `data` makes preferred and
rejected completions of the rewards of each prompt. A group without two sides is dropped and counted. A step takes its
groups to `group_backward`, in micro-batches and with the prompt run once, as GroupDPOTrainer does (steps.py), so that
memory depends neither on num_generations nor on the batch size.

The groups of one generation, of all ranks together, are shuffled whole and cut into steps_per_generation slices. The
responses of a slice are dealt to the ranks in equal shares, so a group may span ranks (`PreferenceGroups`), also where
num_generations is more than the batch of a rank. The loss of an optimizer step is the mean over its groups, in
whichever slice they are; a slice without a group runs a forward of weight zero. The reference scores completions in the
step that uses them. It is the model as it is given, or the policy after every `ref_sync_steps` optimizer steps.

It overrides private methods of TRL's GRPOTrainer, so it needs a version that dpo.py supports (checked). It never calls
tools, takes images, or runs under FSDP and DeepSpeed. The cost of a step is that of GroupDPOTrainer; several ranks also
exchange the tokens of completions once a generation, and a few numbers of each in every step. The source is GroupDPO
(arXiv 2604.15602); docs/math.md has the formulas.
"""

from __future__ import annotations

import functools
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import TrainerCallback

from ..data.batches import PreferenceBatch, TokenGroup, empty_part, tokenizer_of
from ..installed import installed_trl
from ..models.adapters import let_adapter_train
from ..preference.groups import PreferenceGroups
from ..preference.objective import Objective
from .checkpoints import WholeCheckpoints
from .dpo import SUPPORTED
from .engines import prepared_reference
from .group_dpo import pad_id_of
from .metrics import means_of
from .misplaced import check_names
from .online_config import OnlineGroupDPOConfig, name_of_rule, rule_of
from .online_groups import (
    check_pairs,
    check_whole,
    checked_reward,
    picked_groups,
    share,
    slices,
    token_group,
    weights,
)
from .reference import (
    check_adapter,
    check_on_one_device,
    copy_to_reference_adapter,
    reference_of,
    take_off_forwards_of,
)
from .rows import Collator
from .steps import GROUP_OBJECTIVE, GroupSteps

trl = installed_trl("OnlineGroupDPOTrainer", SUPPORTED)

_REFERENCE_FILE = "reference.pt"  # in a checkpoint, where the reference has moved


class OnlineGroupDPOTrainer(WholeCheckpoints, GroupSteps, trl.GRPOTrainer):  # type: ignore[name-defined]
    """`trl.GRPOTrainer` with another loss, by default Objective("mpo", beta=2.0, average=True, nll_weight=1.0). All
    arguments but these are TRL's.

    Args:
        args: an OnlineGroupDPOConfig.
        objective: any `Objective`; a pairwise loss needs a rule that keeps two completions of a prompt.
        ref_model: the reference. None takes the model as it is given (a frozen copy, or the model without its new
            adapter), or none for an objective without.

    It logs what GRPOTrainer logs of rewards and completions (`reward`, `rewards/NAME/mean`, `completions/...`) and what
    GroupDPOTrainer logs of the loss (`rewards/chosen`, `rewards/margins`, `pass_drift` and so on), and besides
    `groups/dropped` (the share of groups without two sides), `groups/positives` and `groups/negatives` (mean numbers of
    completions in the groups that are left). A number is a mean over groups, and over steps that have some.

    Raises ValueError or TypeError, naming argument, expectation and value: for a reward function that returns the wrong
    number of rewards, NaN or infinite ones, or that scores nothing of the first generation; tools, environments and
    images; a reference that is not read, or that would change in training; with ref_sync_steps a ref_model of another
    shape; eval batches that together are no multiple of num_generations_eval; a pairwise loss where the rule keeps
    other than two completions. It warns where no group of the first generation has two sides.
    """

    reward_funcs: list[Any]
    _step: int
    _current_train_step_time: float
    _buffered_inputs: list[dict[str, Any]] | None
    _all_rewards: Tensor  # (R * N,) of all ranks, of the last generation; NaN without a score
    loss_is_scaled_for_ga = False  # compute_loss is a mean over groups: Trainer divides by the accumulation steps

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: OnlineGroupDPOConfig | None = None,
        *,
        objective: Objective = GROUP_OBJECTIVE,
        ref_model: nn.Module | None = None,
        **named: Any,
    ) -> None:
        installed_trl("OnlineGroupDPOTrainer", SUPPORTED)
        known = [*inspect.signature(trl.GRPOTrainer).parameters, "objective", "ref_model"]
        check_names("OnlineGroupDPOTrainer", named, known)
        args = OnlineGroupDPOConfig() if args is None else args
        _check_arguments(model, args, objective, ref_model, named)
        self.objective, self.strategy, self.rule = objective, args.strategy, rule_of(args)
        if isinstance(model, nn.Module):
            let_adapter_train(model)
        super().__init__(model, reward_funcs, args, **named)
        self.reward_funcs = [
            function if isinstance(function, nn.Module) else checked_reward(function, name, _is_async(function))
            for function, name in zip(self.reward_funcs, self.reward_func_names)
        ]
        # TRL would score completions once more, for a ratio that no objective has.
        self.vllm_importance_sampling_correction = False
        self.aux_coef = self.router_aux_loss_coef if self.aux_loss_enabled else 0.0
        if ref_model is None and objective.needs_reference:
            # An adapter that the reference will follow needs a second one; a new one that it will not, needs none.
            fresh = named.get("peft_config") is not None and args.ref_sync_steps is None
            ref_model = reference_of(self.model, fresh, precompute=False)
        elif ref_model is not None:
            take_off_forwards_of(self.model, ref_model)
        if args.ref_sync_steps is not None:
            _check_sync(self.model, ref_model, objective)
            self.add_callback(_SyncReference(self))
        pad_id = pad_id_of(self.model, self.processing_class)
        collator = Collator("padded", args.micro_batch_tokens, args.micro_batch_sequences, pad_id)
        collator = collator.sharing(args, bool(self.aux_coef), self.model, ref_model)
        self.share_prompt = collator.share_prompt
        self._collate = collator.fitting(self.model, ref_model)
        self.ref_model = None if ref_model is None else prepared_reference(self, ref_model)
        self._seen_any = False  # whether a generation has been scored

    # --------------------------------------------------------------------------------------------- completions to steps

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return _OrderOfEpoch(super()._get_train_sampler(dataset))

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """The slice of this step, after a new generation where one is due: as TRL, but groups stay in one slice."""
        if not self.model.training:
            return self._steps_of(generation_batch, 1)[0]
        n = self.args.steps_per_generation
        if self._step % (n * self.num_iterations) == 0 or self._buffered_inputs is None:
            self._buffered_inputs = self._steps_of(generation_batch, n)
        return self._buffered_inputs[self._step % n]

    def _steps_of(self, prompts: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
        """Completions of the prompts, as n steps: {"step": PreferenceBatch, "groups": int, "weight": float}."""
        if image := {"image", "images"} & {*prompts[0]}:
            raise ValueError(f"the dataset must have no column {image.pop()!r}: groups are of text alone; got one")
        mode = "train" if self.model.training else "eval"
        G = self.num_generations if mode == "train" else self.num_generations_eval
        check_whole(gather_object([row.get("prompt") for row in prompts]), G)
        scored = self._generate_and_score_completions(prompts)
        if scored.get("tool_mask") is not None:
            raise ValueError("rollout_func must return no env_mask: every token of a completion is scored; got one")
        asked, drawn = self._tokens(scored, "prompt"), self._tokens(scored, "completion")
        picked = self._from_first_rank(
            lambda: slices([*picked_groups(drawn, self._all_rewards.cpu(), G, self.rule)], n)
        )
        parts = [[token_group(picks, asked, drawn, G) for picks in part] for part in picked]
        groups = [*chain(*parts)]
        check_pairs(groups, self.objective)
        longest = max((group.longest for group in groups), default=0)
        if (most := self.args.micro_batch_tokens) is not None and longest > most:
            raise ValueError(
                f"micro_batch_tokens must be at least {longest}, for a prompt and its completion; got {most}"
            )
        self._count(groups, len(drawn) // G, mode)
        shares = weights([*map(len, parts)], self.args.gradient_accumulation_steps if mode == "train" else 1)
        # Two responses of one token, for a step of weight zero.
        spare = TokenGroup(asked[0], [asked[0][-1:]] * 2, [True, False], 0)
        return [
            {"step": self._batch(part, spare).to(self.args.device), "groups": len(part), "weight": weight}
            for part, weight in zip(parts, shares)
        ]

    def _tokens(self, scored: dict[str, Any], part: str) -> list[Tensor]:
        """The tokens of the prompts or completions of all ranks; none where TRL masks a completion."""
        ids = torch.where(scored[f"{part}_mask"].bool(), scored[f"{part}_ids"], -1).int()
        ids = self.accelerator.pad_across_processes(ids, dim=1, pad_index=-1)
        return [row[row >= 0] for row in self.accelerator.gather(ids).cpu()]

    def _from_first_rank(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on the first rank, on every rank: a rule may be random, and so is the order of groups."""
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found[0] = make()
            except Exception as error:
                broadcast_object_list([None, repr(error)])
                raise
        broadcast_object_list(found)
        if found[1] is not None:
            raise ValueError(f"rule must not fail; on the first rank it raised {found[1]}")
        return found[0]

    def _batch(self, groups: list[TokenGroup], spare: TokenGroup) -> PreferenceBatch:
        """This rank's share of the responses of these groups, in equal shares; the spare group where there are none."""
        R = self.accelerator.num_processes
        if R == 1 or not groups:
            batch: PreferenceBatch = self._collate([(group, None) for group in groups or [spare]])["step"]
            return batch
        own = share(groups, self.accelerator.process_index, R)
        sides = [group.positive for group in own]
        of = PreferenceGroups.from_lists(sides, process_group=torch.distributed.group.WORLD)
        if some := [(group, None) for group in own if group.responses]:
            batch = self._collate(some, of)["step"]
            return batch
        none = torch.zeros(0, dtype=torch.long)
        return PreferenceBatch([empty_part(none.device)], of, none)

    def _count(self, groups: list[TokenGroup], drawn: int, mode: str) -> None:
        """Records the metrics of the groups of a generation, on all ranks, of which `drawn` were generated."""
        into = self._metrics[mode]
        into["groups/dropped"].append(1 - len(groups) / drawn)
        if groups:
            sides = [side for group in groups for side in group.positive]
            into["groups/positives"].append(sum(sides) / len(groups))
            into["groups/negatives"].append((len(sides) - sum(sides)) / len(groups))
        elif not self._seen_any:
            values = self._all_rewards[~self._all_rewards.isnan()].unique()
            some = ", ".join(f"{value:g}" for value in values[:5].tolist()) + ", ..." * (len(values) > 5)
            warnings.warn(
                f"no group of the first generation has two sides by rule {name_of_rule(self.args.rule)!r}, so its"
                f" steps change nothing; {int((~self._all_rewards.isnan()).sum())} rewards were seen, of the values"
                f" {some}",
                stacklevel=2,
            )
        self._seen_any = True

    def _calculate_rewards(self, inputs: Any, *more: Any, **named: Any) -> Tensor:  # (R * N, functions)
        """TRL's, of all ranks; it notes each completion's weighted sum, NaN where no function scores it."""
        rewards: Tensor = super()._calculate_rewards(inputs, *more, **named)
        for column, name in zip(rewards.T, self.reward_func_names):
            if column.isinf().any():
                raise ValueError(f"reward function {name!r} must return finite numbers; got an infinite one")
        for function, column, name in zip(self.reward_funcs, rewards.T, self.reward_func_names):
            if isinstance(function, nn.Module) and column.isnan().any():
                raise ValueError(f"reward function {name!r} must return finite numbers; got NaN from the model")
        unscored = rewards.isnan().all(1)
        if unscored.all() and not self._seen_any:
            names = ", ".join(self.reward_func_names)
            raise ValueError(
                f"reward_funcs must score a completion of the first generation; got None for all {len(rewards)} from"
                f" {names}"
            )
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        self._all_rewards = total.masked_fill(unscored, math.nan)
        return rewards

    def _get_per_token_logps_and_entropies(self, *arguments: Any, **named: Any) -> tuple[None, None, None]:
        """Nothing: TRL asks for these at generation, for a ratio to an older policy, which no objective has."""
        return None, None, None

    # -------------------------------------------------------------------------------------------------------- the steps

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Fills .grad; returns the loss, both divided by the accumulation steps as Trainer does."""
        before = time.perf_counter()
        if self.strategy == "coupled":
            loss = super(trl.GRPOTrainer, self).training_step(model, inputs, num_items_in_batch)
        else:
            self._to_training(model)
            inputs = self._prepare_inputs(inputs)
            result, forward = self._by_parts(model, inputs["step"], self._reference(inputs), inputs["weight"])
            loss = self._logged(inputs, result, forward.auxiliary, {"pass_drift": forward.drift()})
            loss = loss / self.current_gradient_accumulation_steps
        self._step += 1  # what follows is TRL's bookkeeping
        self._current_train_step_time += time.perf_counter() - before
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._metrics["train"]["step_time"].append(self._current_train_step_time)
            self._current_train_step_time = 0.0
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:  # () differentiable
        """The loss of a step with its whole graph, for evaluation and for strategy "coupled"."""
        if return_outputs:
            raise ValueError("return_outputs must be False: completions have no labels; got True")
        result, auxiliary = self._whole(model, inputs["step"], self._reference(inputs))
        return self._logged(inputs, result, auxiliary, {})

    def _reference(self, inputs: dict[str, Any]) -> Tensor | None:  # (S,)
        return self._scores(inputs["step"]) if self.objective.needs_reference else None

    def _logged(self, inputs: dict[str, Any], result: Any, auxiliary: list[Tensor], more: dict[str, Tensor]) -> Tensor:
        """The loss times the step's weight, after its metrics are recorded for the log."""
        if not self.model.training:
            more = {**more, "loss": result.loss}
        loss = self._measured(inputs["step"], result, auxiliary, more, weight=inputs["groups"])
        return loss * inputs["weight"]

    def evaluation_loop(self, *arguments: Any, **named: Any) -> Any:
        """Adds the metrics under this data's own prefix; the loss is the mean over batches that have groups."""
        output = super().evaluation_loop(*arguments, **named)
        prefix = named.get("metric_key_prefix", "eval")
        seen = self._metrics["eval"]
        finite = {name: [v for v in values if not math.isnan(v)] for name, values in seen.items()}
        seen.clear()
        means = means_of({name: values for name, values in finite.items() if values})
        means.setdefault("loss", math.nan)
        return output._replace(metrics={**output.metrics, **{f"{prefix}_{name}": v for name, v in means.items()}})

    # --------------------------------------------------------------------------------------- the reference, checkpoints

    def sync_reference(self) -> None:
        """Makes the policy as it is now the reference."""
        model = self.accelerator.unwrap_model(self.model)
        if self.ref_model is None:
            copy_to_reference_adapter(model)
        else:
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(model.state_dict())

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        rule, self.args.rule = self.args.rule, name_of_rule(self.args.rule)  # a rule may be a closure
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.rule = rule

    def _save_beside(self, folder: Path) -> None:
        """Saves the reference where it moves and is a model of its own."""
        if self.args.ref_sync_steps is not None and self.ref_model is not None and self.args.should_save:
            torch.save(self.accelerator.unwrap_model(self.ref_model).state_dict(), folder / _REFERENCE_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = Path(resume_from_checkpoint) / _REFERENCE_FILE
        if self.args.ref_sync_steps is not None and self.ref_model is not None:
            if not saved.exists():
                raise ValueError(
                    "resume_from_checkpoint must be of a run with ref_sync_steps, as this one is, whose reference has"
                    f" moved; {saved} is not there"
                )
            weights_of = torch.load(saved, map_location=self.args.device, weights_only=True)
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(weights_of)


class _OrderOfEpoch(torch.utils.data.Sampler[int]):
    """TRL's sampler, in the order that an epoch has in a run from the start: a resumed one would begin with the first
    epoch's."""

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.epoch = sampler, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(self.epoch):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)
        return iter(self.sampler)


class _SyncReference(TrainerCallback):
    """Makes the policy the reference after every `ref_sync_steps` optimizer steps."""

    def __init__(self, trainer: OnlineGroupDPOTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        if state.global_step % args.ref_sync_steps == 0:
            self.trainer.sync_reference()


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))


def _check_arguments(model: Any, args: Any, objective: Any, ref_model: Any, named: dict[str, Any]) -> None:
    if not isinstance(model, (str, nn.Module)):
        raise TypeError(f"model must be a model, or its name; got {model!r:.60}")
    if not isinstance(args, OnlineGroupDPOConfig):
        raise TypeError(f"args must be an OnlineGroupDPOConfig; got {type(args).__name__}")
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be an Objective; got {objective!r}")
    if ref_model is not None and not isinstance(ref_model, nn.Module):
        raise TypeError(f"ref_model must be a model or None; got a {type(ref_model).__name__}")
    if ref_model is model:
        raise ValueError("ref_model must be another object than model, or None for a copy of it; got model")
    if ref_model is not None and not objective.needs_reference:
        got = type(ref_model).__name__
        raise ValueError(f"ref_model must be None, for {objective.loss!r} has no reference; got a {got}")
    if (every := args.ref_sync_steps) is not None and not objective.needs_reference:
        raise ValueError(f"ref_sync_steps must be None, for {objective.loss!r} has no reference; got {every}")
    for name in ("tools", "environment_factory"):
        if named.get(name):
            raise ValueError(f"{name} must be None: completions call no tools here; got {named[name]!r:.60}")
    for name in ("train_dataset", "eval_dataset"):
        columns = getattr(named.get(name), "column_names", None)
        if isinstance(columns, list) and (image := {"image", "images"} & {*columns}):
            raise ValueError(f"{name} must have no column {image.pop()!r}: groups are of text alone; got one")
    B, R, G = args.per_device_eval_batch_size, args.world_size, args.num_generations_eval or args.num_generations
    if named.get("eval_dataset") is not None and B * R % G:
        raise ValueError(
            f"per_device_eval_batch_size times the number of ranks must be a multiple of num_generations_eval = {G}, so"
            f" that groups are whole; got {B} times {R}"
        )
    tokenizer = tokenizer_of(named.get("processing_class"))
    if tokenizer is not None and tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError("processing_class must have a pad_token, or an eos_token, which pads then; got None for both")
    for name, each in {"model": model, "ref_model": ref_model}.items():
        if isinstance(each, nn.Module):
            check_on_one_device(name, each)
    if isinstance(model, nn.Module):
        check_adapter(model, named.get("peft_config"))


def _check_sync(model: Any, ref_model: Any, objective: Objective) -> None:
    """ValueError for a reference that cannot become the policy: one with other parameters."""
    if ref_model is None:
        return
    ours, theirs = ({name: x.shape for name, x in each.state_dict().items()} for each in (model, ref_model))
    if ours != theirs:
        other = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise ValueError(
            "ref_model must have the parameters of model where ref_sync_steps copies them; got other"
            f" {', '.join(other[:3])}"
        )
