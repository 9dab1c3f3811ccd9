"""How sure a latency percentile is, from the requests of one trial.

Requests of a trial are not independent of each other: neighbours share a queue, and all that run together share their steps. An
interval that takes them as independent covers far less than it says. Here a percentile's interval is that of the share of values
below it (R. S. Woodruff, J. Am. Stat. Assoc. 47 (1952)), by Clopper and Pearson's limits at the effective number of values (E. L.
Korn and B. I. Graubard, Survey Methodology 24 (1998)): as many independent ones would know that share as well as these do.
It comes from the sum of the autocovariances over requests in the order they were sent, up to where it is noise (C. J. Geyer's
initial monotone sequence, Statist. Sci. 7 (1992)). A moving-block bootstrap would find the same spread, given its block length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CONFIDENCE: Final = 0.95
DRAWS: Final = 2000
MIN_REQUESTS: Final = 100
MIN_BEYOND: Final = 10
"""Values above the percentile: with fewer the largest one bounds the interval, and it covers far less than it says."""
MIN_BEYOND_ALIKE: Final = 20
"""Of values that tell of each other, how many independent ones: their own number is an estimate then."""
ALIKE: Final = 0.65
"""Values that are worth less than this share of independent ones tell of each other; more is the noise of the estimate."""
PERCENTILES: Final = (50, 90, 95, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Intervals:
    """Intervals of one metric's percentiles."""

    ends: dict[int, tuple[float, float]]
    """Percentile -> lower and upper end of its 95 % interval, of those that have one."""
    effective: dict[int, float]
    """Percentile -> the number of independent values that would be as sure of it; no more than of a lower one, as the tail of a
    trial tells least of how alike its values are."""
    why_not: str | None
    """Why some or all have none; None where all have."""


def requests_needed(percentile: float, beyond: int = MIN_BEYOND) -> int:
    """Requests that an interval of this percentile takes: 100, and ``beyond`` above it, so 200 for p95 and 1000 for p99."""
    share = min(percentile, 100 - percentile) / 100
    return max(MIN_REQUESTS, ceil(round(beyond / share, 9)))


def percentile_intervals(values: Sequence[Sequence[float] | Floats], seed: int) -> Intervals:
    """95 % intervals of the percentiles (numpy's ``linear``) of values pooled over requests.

    Args:
        values: Of each request, in the order they were sent; one without any counts for nothing.
        seed: Of the draws that the limits are read from.
    """
    clusters = [np.asarray(of_one, dtype=np.float64) for of_one in values if len(of_one)]
    if len(clusters) < MIN_REQUESTS:
        return Intervals(ends={}, effective={}, why_not=_too_few(len(clusters)))
    pooled, sizes = np.concatenate(clusters), np.asarray([of_one.size for of_one in clusters])
    ordered, rng = np.sort(pooled), np.random.default_rng(seed)
    ends, effective, lacking = {}, dict[int, float](), []
    least = float(pooled.size)
    for percentile in PERCENTILES:
        least = effective[percentile] = min(least, _effective(pooled, sizes, float(np.percentile(ordered, percentile))))
        alike = least < ALIKE * pooled.size
        if (wanted := requests_needed(percentile, MIN_BEYOND_ALIKE if alike else MIN_BEYOND)) <= (
            least if alike else pooled.size
        ):
            ends[percentile] = _between(ordered, percentile / 100, least, rng)
        else:
            lacking.append(f"p{percentile} takes {wanted}")
    why_not = None
    if lacking:
        what = f"{len(clusters)} requests" if pooled.size == len(clusters) else f"{pooled.size} gaps"
        worth = f" that tell of each other, worth {least:.0f} independent ones" if least < ALIKE * pooled.size else ""
        why_not = f"{what}{worth}, {', '.join(lacking)}"
    return Intervals(ends=ends, effective=effective, why_not=why_not)


def _too_few(requests: int) -> str:
    return f"{requests} requests, {', '.join(f'p{percentile} takes {requests_needed(percentile)}' for percentile in PERCENTILES)}"


def _effective(pooled: Floats, sizes: npt.NDArray[np.int64], at: float) -> float:
    """Independent values that would know as well which share lies at or below ``at``; no more than there are.

    A request's part in the error of the share is its values below less the share of all its values (the linearised ratio).
    Where ``at`` is the largest value no error shows in that; the share of smaller ones tells of it then.
    """
    lower = pooled <= at
    if lower.all():
        lower = pooled < at
    below = np.add.reduceat(lower.astype(np.float64), np.concatenate(([0], np.cumsum(sizes)[:-1])))
    share = below.sum() / pooled.size
    spread = _summed_autocovariance(below - share * sizes) * sizes.size
    return min(float(share * (1.0 - share) * pooled.size**2 / spread), float(pooled.size)) if spread > 0 else float(pooled.size)


def _summed_autocovariance(series: Floats) -> float:
    """Variance of the mean of a series of mean 0, times its length; no less than its own variance.

    Autocovariances are added by pairs of lags while their sum is positive, none counted as larger than the pair before.
    """
    size = series.size
    padded = 1 << (2 * size - 1).bit_length()  # a transform of twice a large prime takes several times as long
    spectrum = np.fft.rfft(series, padded)
    of_lag = np.fft.irfft(spectrum * spectrum.conj(), padded)[:size] / size
    half = size // 2
    pairs = of_lag[0 : 2 * half : 2] + of_lag[1 : 2 * half : 2]
    noise = np.flatnonzero(pairs <= 0)
    kept = np.minimum.accumulate(pairs[: noise[0]] if noise.size else pairs)
    return max(float(2 * kept.sum() - of_lag[0]), float(of_lag[0]))


def _between(ordered: Floats, share: float, effective: float, rng: np.random.Generator) -> tuple[float, float]:
    """The values whose ranks are Clopper and Pearson's limits of the share, quantiles of beta distributions."""
    tail = 50 * (1 - CONFIDENCE)
    below, above = effective * share, effective * (1 - share)
    low = np.percentile(rng.beta(below, above + 1, DRAWS), tail)
    high = np.percentile(rng.beta(below + 1, above, DRAWS), 100 - tail)
    first, last = (min(int(ordered.size * rank), ordered.size - 1) for rank in (low, high))
    return float(ordered[first]), float(ordered[last])
