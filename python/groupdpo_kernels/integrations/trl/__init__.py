"""TRL. Importing this imports neither TRL nor transformers: the trainers do when they are first asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .accelerate import Acceleration, accelerate, restore

if TYPE_CHECKING:
    from .config import GroupDPOConfig
    from .groups import GroupDPOTrainer
    from .pairs import DPOTrainer
    from .stepwise import StepwiseDPO

__all__ = ["Acceleration", "DPOTrainer", "GroupDPOConfig", "GroupDPOTrainer", "StepwiseDPO", "accelerate", "restore"]

_MODULES = {"DPOTrainer": "pairs", "GroupDPOConfig": "config", "GroupDPOTrainer": "groups", "StepwiseDPO": "stepwise"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
