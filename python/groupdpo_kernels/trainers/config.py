"""GroupDPOConfig: the options of `GroupDPOTrainer`, checked.

It never accepts an option that would do nothing. It needs transformers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from transformers import TrainingArguments

from ..checks import check_count, check_flags, check_number, one_of, shown
from ..preference.group_backward import STRATEGIES
from .engines import check_engine_options
from .misplaced import check_names


@dataclass
class GroupDPOConfig(TrainingArguments):
    """Options of `GroupDPOTrainer`; batch sizes count groups. Where transformers and TRL differ, defaults are TRL's;
    bf16 is on unless fp16 is. `GroupDPOTrainer.strategy` holds the strategy that "auto" chose.

    Args:
        learning_rate: the peak learning rate.
        logging_steps: number of steps between two rows of the log.
        gradient_checkpointing: whether the layers' activations are computed again in the backward.
        bf16: whether the forward computes in bfloat16.
        strategy: how a step runs: auto, two_pass, one_pass (few trainable parameters, micro-batches of one response) or
            coupled. auto is coupled, the fastest, where the planner finds that the largest step fits in the memory that
            is free at the start, else two_pass.
        micro_batch_sequences: the most responses of a micro-batch. None sets no limit.
        micro_batch_tokens: the most tokens of a micro-batch, padding included; no limit by default. With the strategies
            auto and two_pass it may be auto: as many as the planner fits in the memory that is free.
        layout: layout of a micro-batch: padded, or packed for models that keep sequences apart by their position_ids;
            for others the trainer takes padded, after a warning that says why.
        share_prompt: whether the prompt of a group runs once for all its responses: the same gradient from fewer
            tokens. auto does so where the model can, but for one_pass, which would keep a gradient of the prompt's keys
            and values for each response, for an auxiliary loss, which counts such a prompt once, and for torch_compile.
            True is refused with torch_compile and where the model cannot. Responses are then padded, whatever the
            layout; dropout draws once for a prompt.
        torch_compile: whether each layer of the decoder is compiled, in place; the model around them is not.
        format: format of the rows, a name in `data.FORMATS`, or auto, which tells it by their columns.
        rule: how ratings become preferred and rejected, a name in `data.RULES`.
        merge_prompts: whether rows of one prompt become one group.
        max_length: the most tokens of a prompt with its response. None sets no limit.
        too_long: what to do with longer ones: drop, error, or truncate_prompt, which cuts the left of the prompt.
        chat: whether to take text prompts as a user's turn, or else conversations of one turn as plain text; by default
            each stays as it is.
        template_options: arguments of the chat template, as a dict or JSON of one.
        assistant_only: whether a response of several turns is scored in those of the assistant alone, not in those of
            tools and users.
        on_bad: what to do with a row that cannot be used: drop (it is counted), or error.
        precompute_ref_log_probs: whether the reference scores the data once, before training, and keeps this on disk.
        disable_dropout: whether to set the probability of every nn.Dropout to 0.
        router_aux_loss_coef: weight of the auxiliary loss of a mixture of experts; the model config's by default.

    Raises ValueError for another strategy or layout, a limit below 1, and for what a strategy cannot do; TypeError for
    an option that belongs to Objective or to the trainer, or that does not exist.
    """

    learning_rate: float = 1e-6
    logging_steps: float = 10
    gradient_checkpointing: bool = True
    bf16: bool | None = None  # type: ignore[assignment]  # None means True unless fp16
    strategy: str = "auto"
    micro_batch_sequences: int | None = 4
    micro_batch_tokens: int | str | None = None
    layout: str = "padded"
    share_prompt: Literal["auto", True, False] = "auto"
    format: str = "auto"
    rule: str = "best_vs_rest"
    merge_prompts: bool = False
    max_length: int | None = 1024
    too_long: str = "drop"
    chat: bool | None = None
    template_options: dict[str, Any] | str | None = None  # text is JSON, as from a command line
    assistant_only: bool = True
    on_bad: str = "drop"
    precompute_ref_log_probs: bool = False
    disable_dropout: bool = True
    router_aux_loss_coef: float | None = None

    def __new__(cls, *positional: Any, **named: Any) -> GroupDPOConfig:
        """TypeError for an unknown option, which says where it belongs; __init__ would only say that it is unknown."""
        check_names(cls.__name__, named, cls.__dataclass_fields__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        self._check_kinds()
        check_step_options(self, ("auto", *STRATEGIES, "coupled"), sized=("auto", "two_pass"))
        one_of("layout", self.layout, ("padded", "packed"))
        one_of("train_sampling_strategy", self.train_sampling_strategy, ("random", "sequential"))
        for name, nothing in {"label_smoothing_factor": 0.0, "include_for_metrics": []}.items():
            if (found := getattr(self, name)) != nothing:
                raise ValueError(f"{name} must be {nothing}: it belongs to losses on labels; got {found!r}")
        if (seen := self.include_num_input_tokens_seen) not in ("no", False):
            raise ValueError(f"include_num_input_tokens_seen must be 'no': num_tokens is logged anyway; got {seen!r}")
        if isinstance(self.template_options, str):
            try:
                self.template_options = dict(json.loads(self.template_options))
            except (TypeError, ValueError):
                asked = "a dict, or JSON of one"
                raise ValueError(f"template_options must be {asked}; got {self.template_options!r}") from None
        if self.torch_empty_cache_steps is not None and self.strategy != "coupled":
            got = self.torch_empty_cache_steps
            raise ValueError(f"torch_empty_cache_steps must be None for strategy {self.strategy!r}; got {got}")
        take_new_names(self)
        super().__post_init__()
        check_engine_options(self)
        if self.strategy == "one_pass" and self.gradient_checkpointing and is_reentrant(self):
            raise ValueError(
                "gradient_checkpointing_kwargs must leave use_reentrant False for strategy 'one_pass', which takes the"
                " gradient of each response by itself; got use_reentrant=True"
            )

    def _check_kinds(self) -> None:
        names = ("bf16", "gradient_checkpointing", "merge_prompts", "assistant_only", "precompute_ref_log_probs")
        check_flags(**{name: getattr(self, name) for name in (*names, "disable_dropout")})
        if self.chat is not None:
            check_flags(chat=self.chat)
        if self.max_length is not None:
            check_count("max_length", self.max_length, 2)
        for name in ("learning_rate", "logging_steps", "router_aux_loss_coef"):
            value = getattr(self, name)
            if value is not None or name != "router_aux_loss_coef":
                check_number(name, value)
                if not math.isfinite(value):
                    raise ValueError(f"{name} must be finite; got {value}")
        if not isinstance(self.template_options, (dict, str, type(None))):
            raise TypeError(f"template_options must be a dict, or JSON of one; got {shown(self.template_options)}")


def check_step_options(args: Any, strategies: Collection[str], sized: Collection[str] = ()) -> None:
    """ValueError for a strategy that is not one of these, and for the options of micro-batches and shared prompts.

    sized: the strategies with which micro_batch_tokens may be auto.
    """
    one_of("strategy", args.strategy, strategies)
    if not isinstance(args.share_prompt, (str, bool)) or args.share_prompt not in ("auto", True, False):
        raise ValueError(f"share_prompt must be 'auto', True or False; got {shown(args.share_prompt)}")
    if isinstance(args.micro_batch_tokens, str) and args.micro_batch_tokens.isdecimal():  # from a command line
        args.micro_batch_tokens = int(args.micro_batch_tokens)
    for name in ("micro_batch_sequences", "micro_batch_tokens"):
        value = getattr(args, name)
        if isinstance(value, str) and value == "auto" and name == "micro_batch_tokens" and args.strategy in sized:
            continue
        if isinstance(value, str):
            asked = f"an int or None, or for {' and '.join(sized)} micro_batch_tokens may be 'auto'"
            asked = asked if sized else "an int or None"
            raise ValueError(f"{name} must be {asked}; got {value!r} with strategy {args.strategy!r}")
        if value is not None:
            check_count(name, value)


def take_new_names(args: TrainingArguments) -> None:
    """Gives options of gradient checkpointing the new names that transformers has for them; it warns at the old."""
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")
        if hasattr(args, new) and getattr(args, new) is None:
            setattr(args, new, getattr(args, old))


def is_reentrant(args: TrainingArguments) -> bool:
    """Whether gradient checkpointing, where it is on, is of the reentrant kind."""
    options = args.gradient_checkpointing_kwargs
    return isinstance(options, dict) and bool(options.get("use_reentrant"))


def check_not_compiled(args: TrainingArguments) -> None:
    """ValueError for torch_compile where it would do nothing: the head's forward is replaced during each call."""
    if args.torch_compile:
        raise ValueError(
            "torch_compile must be False: a compiled model would run eagerly here; compile its layers instead"
            " (for layer in model.model.layers: layer.compile()), or take GroupDPOTrainer; got True"
        )
