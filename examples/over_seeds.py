"""Means over seeds, and how far to trust them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# The quantile of Student's t for a two-sided interval of 95 %, by the number of seeds.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def interval(values: Sequence[float]) -> float:
    """Half the width of the interval of 95 % of the mean over seeds; NaN for one seed."""
    if len(values) < 2:
        return math.nan
    return STUDENT.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))
