"""How well a share of rows is known, such as an accuracy: its interval."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

Z = NormalDist().inv_cdf(0.975)
"""The quantile of the normal distribution for an interval of 95%: 1.96."""


class Interval(NamedTuple):
    """From `low` to `high`, both between 0 and 1."""

    low: float
    high: float


def wilson(share: float, n: float) -> Interval:
    """The 95% interval of a probability p, of which `share` was seen in `n` independent rows (Wilson 1927).

    All p that the share does not contradict: `|share - p| ≤ z √(p (1 - p) / n)`, solved for p. The ends are
    inside [0, 1] even if the share is 0 or 1, and for a single row. Raises ValueError unless
    `0 ≤ share ≤ 1` and `n > 0`.
    """
    if not (0 <= share <= 1 and n > 0):
        raise ValueError(
            f"expected a share between 0 and 1 of at least one row, got {share} of {n}"
        )
    center = share + Z**2 / (2 * n)
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    low, high = ((center + side * half) / (1 + Z**2 / n) for side in (-1, 1))
    return Interval(max(low, 0.0), min(high, 1.0))
