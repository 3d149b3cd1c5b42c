"""Trainers: GroupDPOTrainer, which needs transformers alone; DPOTrainer and StepwiseDPO on pairs, which need TRL.

group_dpo.py     GroupDPOTrainer;  config.py: GroupDPOConfig;  rows.py: its data
dpo.py           DPOTrainer: TRL's, with every pairwise objective
stepwise_dpo.py  StepwiseDPO: sDPO over these two
reference.py     the model that a policy is compared with, and what would change it
metrics.py       what is logged
fit_check.py     what fits in memory: checked before training, and after a step that did not fit
misplaced.py     names of options that belong elsewhere

A trainer, and with it transformers or TRL, is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import GroupDPOConfig
    from .dpo import DPOTrainer
    from .group_dpo import GroupDPOTrainer
    from .stepwise_dpo import StepwiseDPO

__all__ = ["DPOTrainer", "GroupDPOConfig", "GroupDPOTrainer", "StepwiseDPO"]

_MODULES = {
    "DPOTrainer": "dpo",
    "GroupDPOConfig": "config",
    "GroupDPOTrainer": "group_dpo",
    "StepwiseDPO": "stepwise_dpo",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
