"""Trainers: GroupDPOTrainer, which needs transformers alone; DPOTrainer and StepwiseDPO on pairs, and
OnlineGroupDPOTrainer on what the policy generates, which need TRL.

group_dpo.py     GroupDPOTrainer;  config.py: GroupDPOConfig;  rows.py: its data
dpo.py           DPOTrainer: TRL's, with every pairwise objective
online_group_dpo.py  OnlineGroupDPOTrainer, on TRL's GRPOTrainer;  online_config.py: OnlineGroupDPOConfig;
                 online_groups.py: completions and rewards become groups
stepwise_dpo.py  StepwiseDPO: sDPO over these two
steps.py         what a step on groups is, for the trainers of groups
checkpoints.py   checkpoints that are whole, and last_checkpoint
reference.py     the model that a policy is compared with, and what would change it
metrics.py       what is logged
fit_check.py     what fits in memory: checked before training, and after a step that did not fit
misplaced.py     names of options that belong elsewhere

A trainer, and with it transformers or TRL, is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints import last_checkpoint
    from .config import GroupDPOConfig
    from .dpo import DPOTrainer
    from .group_dpo import GroupDPOTrainer
    from .online_config import OnlineGroupDPOConfig
    from .online_group_dpo import OnlineGroupDPOTrainer
    from .stepwise_dpo import StepwiseDPO

__all__ = [
    "DPOTrainer",
    "GroupDPOConfig",
    "GroupDPOTrainer",
    "OnlineGroupDPOConfig",
    "OnlineGroupDPOTrainer",
    "StepwiseDPO",
    "last_checkpoint",
]

_MODULES = {
    "DPOTrainer": "dpo",
    "GroupDPOConfig": "config",
    "GroupDPOTrainer": "group_dpo",
    "OnlineGroupDPOConfig": "online_config",
    "OnlineGroupDPOTrainer": "online_group_dpo",
    "StepwiseDPO": "stepwise_dpo",
    "last_checkpoint": "checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
