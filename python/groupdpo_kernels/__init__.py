"""Per-token log-probabilities and group-wise preference losses without the logits.

The public names are here. They need torch alone, which is imported with the first of them that is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lm_head.api import Explanation as Explanation
    from .lm_head.api import explain as explain
    from .lm_head.api import linear_logp_stats as linear_logp_stats
    from .lm_head.api import linear_logps as linear_logps
    from .lm_head.autograd import LinearLogps as LinearLogps
    from .models.api import SharedPromptForward as SharedPromptForward
    from .models.api import attach as attach
    from .models.api import model_logps as model_logps
    from .preference.fused import PreferenceWeights as PreferenceWeights
    from .preference.group_backward import SharedPrompt as SharedPrompt
    from .preference.group_backward import forward_parts as forward_parts
    from .preference.group_backward import group_backward as group_backward
    from .preference.groups import PreferenceGroups as PreferenceGroups
    from .preference.objective import AdaBalance as AdaBalance
    from .preference.objective import Objective as Objective
    from .preference.objective import PreferenceLoss as PreferenceLoss
    from .preference.objective import preference_loss as preference_loss
    from .preference.segments import seq_logps as seq_logps
    from .reference import LogpStats as LogpStats

__version__ = "0.1.0"

_HOMES = {
    "lm_head.api": ("Explanation", "explain", "linear_logp_stats", "linear_logps"),
    "lm_head.autograd": ("LinearLogps",),
    "models.api": ("SharedPromptForward", "attach", "model_logps"),
    "preference.fused": ("PreferenceWeights",),
    "preference.group_backward": ("SharedPrompt", "forward_parts", "group_backward"),
    "preference.groups": ("PreferenceGroups",),
    "preference.objective": ("AdaBalance", "Objective", "PreferenceLoss", "preference_loss"),
    "preference.segments": ("seq_logps",),
    "reference": ("LogpStats",),
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
