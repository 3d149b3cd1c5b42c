"""Per-token log-probabilities and group-wise preference losses without the logits.

The public names; torch is all that they need, and it is imported with the first of them that is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backward import group_backward as group_backward
    from .functions import LinearLogps as LinearLogps
    from .groups import PreferenceGroups as PreferenceGroups
    from .logps import Explanation as Explanation
    from .logps import explain as explain
    from .logps import linear_logp_stats as linear_logp_stats
    from .logps import linear_logps as linear_logps
    from .models import attach as attach
    from .models import model_logps as model_logps
    from .objectives import AdaBalance as AdaBalance
    from .objectives import Objective as Objective
    from .objectives import PreferenceLoss as PreferenceLoss
    from .objectives import preference_loss as preference_loss
    from .preference_ops import PreferenceWeights as PreferenceWeights
    from .reference import LogpStats as LogpStats
    from .segments import seq_logps as seq_logps

__version__ = "0.1.0"

_HOMES = {
    "backward": ("group_backward",),
    "functions": ("LinearLogps",),
    "groups": ("PreferenceGroups",),
    "logps": ("Explanation", "explain", "linear_logp_stats", "linear_logps"),
    "models": ("attach", "model_logps"),
    "objectives": ("AdaBalance", "Objective", "PreferenceLoss", "preference_loss"),
    "preference_ops": ("PreferenceWeights",),
    "reference": ("LogpStats",),
    "segments": ("seq_logps",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
