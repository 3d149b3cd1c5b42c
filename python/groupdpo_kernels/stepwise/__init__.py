"""sDPO: preference training in stages, each with the model of the stage before as its reference.

stages.py  run_stages and what it needs, without a trainer
store.py   results on disk that an interruption cannot damage
"""

from .stages import (
    by_column,
    easy_to_hard,
    equal_parts,
    reference_logps,
    reward_accuracy,
    run_stages,
    sequence_logps,
    take,
)

__all__ = [
    "by_column",
    "easy_to_hard",
    "equal_parts",
    "reference_logps",
    "reward_accuracy",
    "run_stages",
    "sequence_logps",
    "take",
]
