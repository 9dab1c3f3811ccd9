"""How long each user thinks before the next turn: numbers drawn from a distribution, the same on every machine."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from statistics import NormalDist

from llem_ray.core.workload_spec import TimeSpec


def draw_times_s(spec: float | TimeSpec, count: int, seed: str) -> list[float]:
    """``count`` waits, s; more of them begin with the same ones.

    Each takes one number of ``random.Random(seed)`` and is the inverse of the cumulative function at it, between the bounds. Mean
    and spread are those before it is cut off.
    """
    if isinstance(spec, (int, float)):
        return [float(spec)] * count
    draws = random.Random(seed)  # noqa: S311 - not a secret
    wait_of = _quantile(spec)
    return [wait_of(draws.random()) for _ in range(count)]


def _quantile(spec: TimeSpec) -> Callable[[float], float]:
    """The wait for a number from [0, 1)."""
    least, most = spec.min or 0.0, math.inf if spec.max is None else spec.max
    if spec.distribution == "empirical":
        assert spec.values is not None
        values, sums = spec.values, list(accumulate(spec.weights or (1.0,) * len(spec.values)))
        return lambda draw: values[bisect_right(sums, draw * sums[-1], hi=len(sums) - 1)]
    if spec.distribution == "uniform":
        return lambda draw: least + draw * (most - least)
    mean = spec.mean
    assert mean is not None
    if spec.distribution == "exponential":
        shares = [-math.expm1(-bound / mean) for bound in (least, most)]
        return _between(shares, least, most, lambda share: -mean * math.log1p(-share))
    if spec.distribution == "fixed" or not spec.std:
        return lambda _draw: mean
    if spec.distribution == "normal":
        dist = NormalDist(mean, spec.std)
        return _between([dist.cdf(least), dist.cdf(most)], least, most, dist.inv_cdf)
    variance = math.log1p((spec.std / mean) ** 2)
    log = NormalDist(math.log(mean) - variance / 2, math.sqrt(variance))
    shares = [log.cdf(math.log(bound)) if bound else 0.0 for bound in (least, most)]
    return _between(shares, least, most, lambda share: math.exp(log.inv_cdf(share)))


def _between(shares: list[float], least: float, most: float, inverse: Callable[[float], float]) -> Callable[[float], float]:
    low, high = shares

    def wait_of(draw: float) -> float:
        share = min(max(low + (high - low) * draw, math.ulp(0.0)), 1 - 2.0**-53)
        return min(max(inverse(share), least), most)

    return wait_of
