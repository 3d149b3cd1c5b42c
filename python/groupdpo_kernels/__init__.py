"""Per-token log-probabilities and group-wise preference losses without the logits. The public names; torch is all that importing them needs."""

from .functions import LinearLogps
from .logps import Explanation, explain, linear_logp_stats, linear_logps, seq_logps
from .reference import LogpStats

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "LinearLogps",
    "LogpStats",
    "explain",
    "linear_logp_stats",
    "linear_logps",
    "seq_logps",
]
