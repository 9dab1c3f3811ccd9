"""How sure a latency percentile is: its bootstrap interval over the requests of one trial.

B. Efron, "Bootstrap Methods: Another Look at the Jackknife", Ann. Statist. 7 (1979); the percentile method. Resamples are not
drawn: of n requests with replacement, the k-th smallest is the request of rank floor(n U) + 1, with U the k-th smallest of n
uniform numbers, Beta(k, n - k + 1). Drawing that one number instead of n gives the very distribution of the resampled percentile.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, floor
from typing import Final

import numpy as np
import numpy.typing as npt

CONFIDENCE: Final = 0.95
RESAMPLES: Final = 2000
MIN_REQUESTS: Final = 100
MIN_BEYOND: Final = 10
"""Requests above the percentile: with fewer the largest one bounds the interval, and it covers far less than it says."""
PERCENTILES: Final = (50, 90, 95, 99)


def requests_needed(percentile: float) -> int:
    """Requests that an interval of this percentile takes: 100, and 10 beyond it, so 200 for p95 and 1000 for p99."""
    beyond = min(percentile, 100 - percentile) / 100
    return max(MIN_REQUESTS, ceil(round(MIN_BEYOND / beyond, 9)))


def percentile_intervals(values: Iterable[float | None], seed: int) -> dict[int, tuple[float, float]]:
    """95 % bootstrap intervals of the percentiles that have enough requests: percentile -> lower and upper end.

    Percentiles are numpy's ``linear``. Requests are taken to be independent of each other. Simulated with as few as that, they
    cover 92 to 95 %.

    Args:
        values: One per request; None where it has none.
        seed: Of the draws: the same values and seed give the same intervals.
    """
    ordered = np.sort(np.asarray([value for value in values if value is not None], dtype=np.float64))
    rng = np.random.default_rng(seed)
    tail = 50 * (1 - CONFIDENCE)
    found = {}
    for percentile in PERCENTILES:
        if ordered.size < requests_needed(percentile):
            continue
        low, high = np.percentile(_resampled(ordered, percentile / 100, rng), [tail, 100 - tail])
        found[percentile] = (float(low), float(high))
    return found


def why_no_interval(requests: int) -> str | None:
    """Which percentiles of so many requests have no interval; None where all have."""
    lacking = [f"p{percentile} takes {requests_needed(percentile)}" for percentile in PERCENTILES
               if requests < requests_needed(percentile)]  # fmt: skip
    return f"{requests} requests, {', '.join(lacking)}" if lacking else None


def _resampled(ordered: npt.NDArray[np.float64], share: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """The percentile of each of ``RESAMPLES`` samples drawn with replacement."""
    n = ordered.size
    place = (n - 1) * share
    k = floor(place)
    below = rng.beta(k + 1, n - k, RESAMPLES)
    if place == k:
        return ordered[_ranks(below, n)]
    # Of n - k - 1 uniform numbers above it, the smallest.
    above = 1.0 - (1.0 - below) * rng.random(RESAMPLES) ** (1.0 / (n - k - 1))
    low, high = ordered[_ranks(below, n)], ordered[_ranks(above, n)]
    return low + (place - k) * (high - low)


def _ranks(uniform: npt.NDArray[np.float64], n: int) -> npt.NDArray[np.int64]:
    return np.minimum((n * uniform).astype(np.int64), n - 1)
