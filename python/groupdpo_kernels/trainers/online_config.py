"""OnlineGroupDPOConfig: the options of `OnlineGroupDPOTrainer`, those of TRL's GRPOConfig among them, checked.

It never accepts an option that would do nothing: what describes GRPO's loss must keep its default, because the
objective says the loss. It needs TRL, in a version that dpo.py supports.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ..checks import check_count, one_of
from ..data.rules import RULES, Rule
from ..installed import installed_trl
from .config import check_not_compiled, check_step_options, take_new_names
from .dpo import SUPPORTED
from .engines import engine_asked
from .misplaced import GRPO_OPTIONS, check_names

trl = installed_trl("OnlineGroupDPOTrainer", SUPPORTED)


@dataclass
class OnlineGroupDPOConfig(trl.GRPOConfig):  # type: ignore[name-defined]
    """Options of `OnlineGroupDPOTrainer`: those of `trl.GRPOConfig` about generation, rewards and logs, and these.
    Batch sizes count completions, as in TRL, and may be smaller than num_generations on each of several ranks; memory
    does not depend on them.

    Args:
        rule: how the rewards of a prompt's completions become preferred and rejected: a name in `data.RULES`, or a
            rule such as `data.top_k(2)`.
        strategy: how a step runs: two_pass, at the memory of one micro-batch, or coupled, which keeps the graph of the
            whole step and runs each forward once.
        micro_batch_sequences: the most completions of a micro-batch. None sets no limit.
        micro_batch_tokens: the most tokens of a micro-batch, padding included. None sets no limit.
        share_prompt: whether the prompt of a group runs once for all its completions; as in GroupDPOConfig.
        ref_sync_steps: the reference becomes the policy after every so many optimizer steps. None: it stays as it is.

    Raises ValueError for an unknown rule, strategy or value, for a generation of all ranks that is no multiple of
    num_generations (TRL's error), and for an option of GRPOConfig that would do nothing here (the message says why);
    TypeError for one that belongs to Objective or to the trainer, or that does not exist.
    """

    rule: str = "best_vs_rest"  # or a Rule; parsers of command lines take a text alone
    strategy: str = "two_pass"
    micro_batch_sequences: int | None = 4
    micro_batch_tokens: int | None = None
    share_prompt: Literal["auto", True, False] = "auto"
    ref_sync_steps: int | None = None

    def __new__(cls, *positional: Any, **named: Any) -> OnlineGroupDPOConfig:
        """TypeError for an unknown option, which says where it belongs; __init__ would only say that it is unknown."""
        check_names(cls.__name__, named, cls.__dataclass_fields__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not callable(self.rule):
            one_of("rule", self.rule, RULES)
        check_step_options(self, ("two_pass", "coupled"))
        if self.ref_sync_steps is not None:
            check_count("ref_sync_steps", self.ref_sync_steps)
        for name in ("num_generations", "num_generations_eval"):
            G = getattr(self, name)
            if G is not None and G < 2:
                raise ValueError(f"{name} must be at least 2, for a group has a preferred and a rejected one; got {G}")
        most, C = self.micro_batch_tokens, self.max_completion_length
        if most is not None and C is not None and most <= C:
            raise ValueError(
                f"micro_batch_tokens must be at least {C + 1}, max_completion_length and a prompt; got {most}"
            )
        for field in dataclasses.fields(self):
            _check_default(field, getattr(self, field.name))
        check_not_compiled(self)
        take_new_names(self)
        super().__post_init__()
        if (engine := engine_asked(self)) is not None:
            raise ValueError(
                f"OnlineGroupDPOTrainer must run on one device or under DistributedDataParallel; got {engine}"
            )

    def to_dict(self) -> dict[str, Any]:
        """As in transformers; a rule that is a function becomes its name."""
        return {**super().to_dict(), "rule": name_of_rule(self.rule)}


def rule_of(args: OnlineGroupDPOConfig) -> Rule:
    """The rule itself, where the options may hold its name."""
    chosen: Any = args.rule
    return chosen if callable(chosen) else RULES[chosen]()


def name_of_rule(rule: str | Callable[..., Any]) -> str:
    return rule if isinstance(rule, str) else getattr(rule, "__qualname__", repr(rule))


def _check_default(field: dataclasses.Field[Any], value: Any) -> None:
    """ValueError for an option of GRPO_OPTIONS that differs from TRL's default."""
    if field.name not in GRPO_OPTIONS:
        return
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    same = {True: "group", False: "none"} if field.name == "scale_rewards" else {}
    if same.get(value, value) != default:
        why = GRPO_OPTIONS[field.name]
        raise ValueError(f"{field.name} of GRPOConfig must stay {default!r}, because {why}; got {value!r}")
