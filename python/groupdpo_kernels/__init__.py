"""Per-token log-probabilities and group-wise preference losses without the logits.

The public names; torch is all that importing them needs.
"""

from .backward import group_backward
from .functions import LinearLogps, PreferenceWeights
from .groups import PreferenceGroups
from .logps import Explanation, explain, linear_logp_stats, linear_logps, seq_logps
from .models import attach, model_logps
from .objectives import AdaBalance, Objective, PreferenceLoss, preference_loss
from .reference import LogpStats

__version__ = "0.1.0"

__all__ = [
    "AdaBalance",
    "Explanation",
    "LinearLogps",
    "LogpStats",
    "Objective",
    "PreferenceGroups",
    "PreferenceLoss",
    "PreferenceWeights",
    "attach",
    "explain",
    "group_backward",
    "linear_logp_stats",
    "linear_logps",
    "model_logps",
    "preference_loss",
    "seq_logps",
]
