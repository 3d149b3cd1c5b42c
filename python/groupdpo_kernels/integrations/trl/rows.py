"""The data of `GroupDPOTrainer`: its options, rows as tokenised groups, and groups as the batch of a step.

Never: shuffles, or drops anything without a warning that says what and why. Cost: token ids in memory, int32.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from ...backward import STRATEGIES
from ...data import Report, TokenGroup, collate, merge_prompts, read_groups, tokenize_groups
from ...formats import one_of
from ...layouts import why_not_packed, why_not_padded
from ...losses import LOSSES
from ...objectives import Objective
from .misplaced import check_names

logger = logging.getLogger(__name__)


@dataclass
class GroupDPOConfig(TrainingArguments):
    """Options of `GroupDPOTrainer`; batch sizes count groups. Defaults that transformers has otherwise are TRL's.

    Args:
        strategy: "auto", "two_pass", "one_pass" (few trainable parameters, micro-batches of one response) or "coupled".
            "auto" is "coupled", the fastest, where the planner finds that the largest step fits in the memory that is
            free at the start, else "two_pass"; `GroupDPOTrainer.strategy` is what was chosen.
        micro_batch_sequences, micro_batch_tokens: limits of a micro-batch, padding included. None: no limit. For
            "auto" and "two_pass" micro_batch_tokens may be "auto": what the planner fits in that memory.
        layout: "padded", or "packed" for models that keep sequences apart by their position_ids; for others the
            trainer takes "padded", after a warning that says why.
        format, rule: as in `data.read_groups`; merge_prompts: rows of one prompt become one group.
        max_length, too_long, chat, template_options, on_bad: as in `data.tokenize_groups`.
        precompute_ref_log_probs: the reference scores the data once, before training; kept on disk.
        disable_dropout: sets the probability of every nn.Dropout to 0.
        router_aux_loss_coef: weight of the auxiliary loss of a mixture of experts. None: that of the model's config.

    Raises ValueError for another strategy or layout, a limit below 1, and for what a strategy cannot do; TypeError for
    an option that belongs to Objective or to the trainer, or that nobody has.
    """

    learning_rate: float = 1e-6
    logging_steps: float = 10
    gradient_checkpointing: bool = True
    bf16: bool | None = None  # type: ignore[assignment]  # None: unless fp16
    strategy: str = "auto"
    micro_batch_sequences: int | None = 4
    micro_batch_tokens: int | str | None = None
    layout: str = "padded"
    format: str = "auto"
    rule: str = "best_vs_rest"
    merge_prompts: bool = False
    max_length: int | None = 1024
    too_long: str = "drop"
    chat: bool | None = None
    template_options: dict[str, Any] | str | None = None  # text: JSON, as from a command line
    on_bad: str = "drop"
    precompute_ref_log_probs: bool = False
    disable_dropout: bool = True
    router_aux_loss_coef: float | None = None

    def __new__(cls, *positional: Any, **named: Any) -> GroupDPOConfig:
        """An option that is not there is an error that says where it belongs; __init__ would say that it is not."""
        check_names(cls.__name__, named, cls.__dataclass_fields__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        one_of("strategy", self.strategy, ("auto", *STRATEGIES, "coupled"))
        one_of("layout", self.layout, ("padded", "packed"))
        if isinstance(self.micro_batch_tokens, str) and self.micro_batch_tokens.isdecimal():  # from a command line
            self.micro_batch_tokens = int(self.micro_batch_tokens)
        for name in ("micro_batch_sequences", "micro_batch_tokens"):
            value = getattr(self, name)
            if value == "auto" and name == "micro_batch_tokens" and self.strategy in ("auto", "two_pass"):
                continue
            if isinstance(value, str):
                asked = "an int or None, or for auto and two_pass micro_batch_tokens may be 'auto'"
                raise ValueError(f"{name} must be {asked}; got {value!r} with strategy {self.strategy!r}")
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        one_of("train_sampling_strategy", self.train_sampling_strategy, ("random", "sequential"))
        for name, nothing in {"label_smoothing_factor": 0.0, "include_for_metrics": []}.items():
            if (found := getattr(self, name)) != nothing:
                raise ValueError(f"{name} must be {nothing}: it is of losses on labels; got {found!r}")
        if (seen := self.include_num_input_tokens_seen) not in ("no", False):
            raise ValueError(f"include_num_input_tokens_seen must be 'no': num_tokens is logged anyway; got {seen!r}")
        check_not_compiled(self)
        if isinstance(self.template_options, str):
            try:
                self.template_options = dict(json.loads(self.template_options))
            except (TypeError, ValueError):
                asked = "a dict, or JSON of one"
                raise ValueError(f"template_options must be {asked}; got {self.template_options!r}") from None
        if self.torch_empty_cache_steps is not None and self.strategy != "coupled":
            got = self.torch_empty_cache_steps
            raise ValueError(f"torch_empty_cache_steps must be None for strategy {self.strategy!r}; got {got}")
        # Where transformers has a new name for an option, the old one would warn of itself.
        for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            new = old.replace("gradient", "activation")
            if hasattr(self, new) and getattr(self, new) is None:
                setattr(self, new, getattr(self, old))
        super().__post_init__()
        if self.strategy == "one_pass" and self.gradient_checkpointing and self.reentrant:
            raise ValueError(
                "gradient_checkpointing_kwargs must leave use_reentrant False for strategy 'one_pass', which takes the"
                " gradient of each response by itself; got use_reentrant=True"
            )

    @property
    def reentrant(self) -> bool:
        """Whether gradient checkpointing, where it is on, is of the reentrant kind."""
        options = self.gradient_checkpointing_kwargs
        return isinstance(options, dict) and bool(options.get("use_reentrant"))


def check_not_compiled(args: TrainingArguments) -> None:
    """ValueError for an option that would do nothing: the head's forward is replaced for the call."""
    if args.torch_compile:
        raise ValueError(
            "torch_compile must be False: a compiled model would run eagerly here; compile its layers instead"
            " (for layer in model.model.layers: layer.compile()); got True"
        )


class GroupRows(torch.utils.data.Dataset[tuple[TokenGroup, Tensor | None]]):
    """Tokenised groups, with the reference's log-probabilities of their responses where they are known."""

    def __init__(self, groups: Sequence[TokenGroup], ref_logps: Tensor | None = None) -> None:
        self.groups = groups
        sizes = [len(group.responses) for group in groups]
        if ref_logps is not None and ref_logps.shape != (sum(sizes),):
            raise ValueError(f"ref_logps must be (S,) = ({sum(sizes)},); got {tuple(ref_logps.shape)}")
        self.ref_logps = None if ref_logps is None else ref_logps.split(sizes)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> tuple[TokenGroup, Tensor | None]:
        return self.groups[index], None if self.ref_logps is None else self.ref_logps[index]


@dataclass(frozen=True)
class Collator:
    """Groups -> {"rows": (G,), "step": PreferenceBatch, "num_tokens": int} and, where known, "ref_logps": (S,)."""

    layout: str
    max_tokens: int | None
    max_sequences: int | None
    pad_id: int

    def fitting(self, *models: Any) -> Collator:
        """This one, or one whose batches the models, where they are not None, keep apart; a warning says why."""
        present = [model for model in models if model is not None]
        found = self
        if found.layout == "packed" and (why := next(filter(None, map(why_not_packed, present)), "")):
            warnings.warn(f"layout 'packed' becomes 'padded': {why}", stacklevel=3)
            found = replace(found, layout="padded")
        padded = found.layout == "padded" and found.max_sequences != 1
        if padded and (why := next(filter(None, map(why_not_padded, present)), "")):
            warnings.warn(f"a micro-batch is one response, without padding: {why}", stacklevel=3)
            found = replace(found, max_sequences=1)
        return found

    def __call__(self, items: Sequence[tuple[TokenGroup, Tensor | None]]) -> dict[str, Any]:
        groups, known = [group for group, _ in items], [ref for _, ref in items if ref is not None]
        limits: dict[str, Any] = {"max_tokens": self.max_tokens, "max_sequences": self.max_sequences}
        return {
            "rows": torch.tensor([group.row for group in groups]),
            "step": collate(groups, self.layout, **limits, pad_id=self.pad_id),
            "num_tokens": sum(len(g.prompt) * len(g.responses) + sum(map(len, g.responses)) for g in groups),
            **({"ref_logps": torch.cat(known)} if known else {}),
        }


def tokenised(
    rows: Any,
    name: str,
    tokenizer: Any,
    config: GroupDPOConfig,
    objective: Objective,
    reports: MutableMapping[str, Report],
    limits: tuple[int | None, int | None] = (None, None),
) -> Any:  # GroupRows, or a dict of them
    """Rows, or a dict of rows, as groups of token ids, each checked against what a step needs of it.

    Args:
        rows: of a layout of `data.FORMATS`, or TokenGroups; GroupRows stay as they are.
        name: of the data, for errors and its report.
        limits: of the model: positions of a sequence, and token ids; None where there is none. A longer response is
            dropped as one past max_length is; where the rows are TokenGroups both raise.
    """
    if isinstance(rows, GroupRows):
        return rows
    if isinstance(rows, Mapping):
        return {
            key: tokenised(value, key, tokenizer, config, objective, reports, limits) for key, value in rows.items()
        }
    if isinstance(rows, str) or not isinstance(rows, Iterable):
        raise TypeError(f"{name}_dataset must be rows, or a list of TokenGroup; got {rows!r:.60}")
    groups = list(rows)
    report = reports[name] = Report()
    if not all(isinstance(group, TokenGroup) for group in groups):
        if tokenizer is None:
            raise ValueError(f"processing_class must be given, to tokenise {name}_dataset; got None")
        _check_columns(groups, name)
        bad: dict[str, Any] = {"on_bad": config.on_bad, "report": report}
        texts = read_groups(groups, config.format, rule=config.rule, **bad)
        texts = merge_prompts(texts, **bad) if config.merge_prompts else texts
        names = ("max_length", "too_long", "chat", "template_options")
        options = {option: getattr(config, option) for option in names}
        options["max_length"] = min((n for n in (config.max_length, limits[0]) if n is not None), default=None)
        groups = list(tokenize_groups(texts, tokenizer, **options, **bad))
    if report.dropped:
        logger.warning("%s_dataset: %s", name, report)
    if not groups:
        raise ValueError(f"{name}_dataset must hold a group that can be used; got none:\n{report}")
    row = LOSSES[objective.loss] if isinstance(objective.loss, str) else None
    pairs = row is not None and row.pair is not None and not row.every_pair
    for group in groups:
        _check_limits(group, name, limits)
        most = config.micro_batch_tokens
        if isinstance(most, int) and group.longest > most:
            raise ValueError(f"micro_batch_tokens must be at least {group.longest}, for row {group.row}; got {most}")
        if pairs and len(group.responses) != 2:
            got = f"row {group.row} of {name}_dataset has {len(group.responses)} responses"
            larger = "all_pairs, margin, mpo and softmax take larger groups"
            raise ValueError(f"groups must be pairs for loss {objective.loss!r}; {got}; {larger}")
    return GroupRows(groups)


def _check_limits(group: TokenGroup, name: str, limits: tuple[int | None, int | None]) -> None:
    """ValueError for what the model has no position or no embedding of."""
    positions, ids = limits
    if positions is not None and group.longest > positions:
        got = f"row {group.row} has {group.longest} tokens"
        raise ValueError(f"{name}_dataset must have at most {positions} tokens, the model's positions; {got}")
    if ids is None:
        return
    for part in (group.prompt, *group.responses):
        if len(part) and not 0 <= int(part.min()) <= int(part.max()) < ids:
            wrong = int(part.max()) if int(part.max()) >= ids else int(part.min())
            raise ValueError(f"{name}_dataset must have token ids in [0, {ids}); row {group.row} has {wrong}")


def _check_columns(rows: Sequence[Any], name: str) -> None:
    """ValueError for what TRL's trainers read of a row and this one would leave out of its prompt."""
    instead = {"tools": "", "chat_template_kwargs": " (template_options of GroupDPOConfig is for all rows)"}
    instead |= dict.fromkeys(("image", "images"), ", for groups are of text alone")
    for i, row in enumerate(rows):
        for column, why in instead.items():
            if isinstance(row, Mapping) and row.get(column):
                raise ValueError(f"{name}_dataset must have nothing in a column {column!r}{why}; row {i} has")
