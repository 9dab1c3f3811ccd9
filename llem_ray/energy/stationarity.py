"""Whether power or throughput drifted across a window: a test for a trend, and how large it is.

A window is cut into equal bins. Mann-Kendall's test (Mann 1945, doi:10.2307/1907187; Kendall 1975) asks whether later bins tend
to be higher, or lower, than earlier ones; it looks at ranks alone, so that bursts and outliers weigh little. Because it finds any
trend in a long window, however small, the means of the two halves are compared as well: only a trend that is both significant and
large is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import erfc, sqrt
from typing import Final

import numpy as np
import numpy.typing as npt

from llem_ray.core.energy import Flag
from llem_ray.core.power import Trace
from llem_ray.core.units import MJ_PER_J, NS_PER_S
from llem_ray.energy.validity import flag

BINS: Final = 20
MIN_WINDOW_S: Final = 10.0
"""In a shorter window a bin is no longer long against the ticks of a counter, nor against the steps of an engine."""
SIGNIFICANCE: Final = 0.01

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Trend:
    """Of a series of bins."""

    drift_rel: float
    """Mean of the second half over mean of the first, less 1."""
    p_value: float
    """Of Mann-Kendall's test, two-sided: the chance of such ranks without a trend, where bins do not depend on each other."""


def trend(values: Float64) -> Trend | None:
    """Trend over equal bins in the order of time; None for fewer than 4, or where the first half's mean is not positive.

    p = erfc(|z| / sqrt(2)), z = (S -+ 1) / sqrt(var S), S = sum of sgn(x_j - x_i) over i < j,
    var S = (n (n-1) (2n+5) - sum of t (t-1) (2t+5) over groups of t equal values) / 18.
    """
    n = len(values)
    if n < 4:
        return None
    first, second = float(values[: n // 2].mean()), float(values[n - n // 2 :].mean())
    if not np.isfinite(values).all() or first <= 0:
        return None
    signs = np.sign(values[None, :] - values[:, None])
    s = float(np.triu(signs, 1).sum())
    _, ties = np.unique(values, return_counts=True)
    variance = (n * (n - 1) * (2 * n + 5) - float((ties * (ties - 1) * (2 * ties + 5)).sum())) / 18.0
    z = 0.0 if variance <= 0 else (s - np.sign(s)) / sqrt(variance)
    return Trend(drift_rel=second / first - 1.0, p_value=erfc(abs(z) / sqrt(2.0)))


def edges_ns(begin_ns: int, end_ns: int) -> npt.NDArray[np.int64] | None:
    """Edges of the bins of a window, ns; None for a window that is too short."""
    if end_ns - begin_ns < MIN_WINDOW_S * NS_PER_S:
        return None
    return np.linspace(begin_ns, end_ns, BINS + 1).round().astype(np.int64)


def bin_power_w(trace: Trace, edges: npt.NDArray[np.int64]) -> Float64 | None:
    """Mean power of a device in each bin, W: by its energy counter where it has one, else the mean of its power readings.

    Args:
        trace: Its samples, from before the first edge to after the last where there are any.
        edges: Edges of the bins on the device's clock, ns.

    Returns:
        One value for each bin; None where a bin has no reading, or the counter ran backwards.
    """
    known = np.isfinite(trace.energy_mj)
    t_ns, energy_mj = trace.t_ns[known], trace.energy_mj[known]
    if len(t_ns) > 1 and t_ns[0] <= edges[0] and t_ns[-1] >= edges[-1]:
        if bool(np.any(np.diff(energy_mj) < 0)):
            return None
        at_mj = np.interp((edges - edges[0]).astype(np.float64), (t_ns - edges[0]).astype(np.float64), energy_mj)
        by_counter_w: Float64 = np.diff(at_mj) / MJ_PER_J / (np.diff(edges) / NS_PER_S)
        return by_counter_w
    read = np.isfinite(trace.power_mw)
    counts, _ = np.histogram(trace.t_ns[read], edges)
    if not counts.all():
        return None
    sums, _ = np.histogram(trace.t_ns[read], edges, weights=trace.power_mw[read])
    powers_w: Float64 = sums / counts / 1000.0
    return powers_w


def bin_tokens(times_ns: npt.NDArray[np.int64], edges: npt.NDArray[np.int64]) -> Float64:
    """Tokens delivered in each bin (begin, end]."""
    return np.diff(np.searchsorted(np.sort(times_ns), edges, "right")).astype(np.float64)


def check_drift(what: str, found: Trend | None, max_drift_rel: float) -> tuple[Flag, ...]:
    """not_stationary: the trend is significant, and larger than the gate."""
    if found is None or found.p_value >= SIGNIFICANCE or abs(found.drift_rel) <= max_drift_rel:
        return ()
    detail = f"{what} changed by {found.drift_rel:+.1%} from the first half to the second (p = {found.p_value:.2g})"
    return (flag("not_stationary", f"{detail}, the gate is {max_drift_rel:.0%}"),)
