"""Whether power stays the same while a gang warms up: mean powers of stretches that follow each other, and how much they vary."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Final

import numpy as np
import numpy.typing as npt

from llem_ray.core.power import Calibration, Float64, Trace
from llem_ray.core.units import NS_PER_S, ns_from_s
from llem_ray.energy.stationarity import bin_power_w
from llem_ray.energy.ticks import find_ticks, tick_line

PIECE_S: Final = 0.5
"""A stretch is at least so long: five ticks of a counter. An edge within a tick then adds about 1 % of variation."""
SETTLED_TICKS: Final = 2
"""An edge counts once the counter has ticked so often after it."""


def variation(values: Sequence[float]) -> float | None:
    """Coefficient of variation: standard deviation (ddof 0) over mean; None for a mean of 0."""
    mean = fmean(values)
    return pstdev(values) / mean if mean > 0 else None


def cut_pieces(edges_ns: Sequence[int], pieces: int, least_s: float) -> npt.NDArray[np.int64] | None:
    """The last ``pieces`` stretches between some of the edges, each the shortest that lasts ``least_s``.

    Args:
        edges_ns: Ends of batches, ascending.
        pieces: How many stretches.
        least_s: Least length of each, s.

    Returns:
        Their pieces + 1 edges, ascending; None where the batches together are too short.
    """
    cut = [edges_ns[-1]] if edges_ns else []
    for edge_ns in reversed(edges_ns[:-1]):
        if cut[-1] - edge_ns >= ns_from_s(least_s):
            cut.append(edge_ns)
        if len(cut) > pieces:
            return np.array(cut[::-1], np.int64)
    return None


def settle_s(calibration: Calibration, sample_period_s: float) -> float:
    """How long after an edge a device must have been sampled for its power up to there to be known, s."""
    return SETTLED_TICKS * ((calibration.tick_period_s or 0.0) + sample_period_s)


def piece_power_w(
    calibration: Calibration, trace: Trace, edges_ns: npt.NDArray[np.int64], sample_period_s: float
) -> Float64 | None:
    """Mean power of a device in each stretch, W: by its energy counter where it has one, else the mean of its power readings.

    The counter at an edge lies on a straight line between the ticks around it. Where the load changes between these, that is off
    by a share of one tick's energy: good enough to compare stretches; a window's energy takes ``read_window``.

    Args:
        calibration: What the device's sensor was found to do.
        trace: Its samples, from some ticks before the first edge to ``settle_s`` after the last.
        edges_ns: Edges of the stretches on the device's clock, ns.
        sample_period_s: Time between its polls, s.

    Returns:
        One value for each stretch; None where one has no reading, or the counter ran backwards.
    """
    known_mj = trace.energy_mj[np.isfinite(trace.energy_mj)]
    if len(known_mj) < 2:
        return bin_power_w(trace, edges_ns)
    if bool(np.any(np.diff(known_mj) < 0)):
        return None
    ticks = find_ticks(trace, calibration, sample_period_s=sample_period_s, origin_ns=int(edges_ns[0]))
    if len(ticks) < 2:
        return None
    at_j = []
    for x0_s in ((edges_ns - edges_ns[0]) / NS_PER_S).tolist():
        line = tick_line(ticks, x0_s)
        if not line.tau_s[0] <= x0_s <= line.tau_s[-1]:
            return None
        at_j.append(np.interp(x0_s, line.tau_s, ticks.c_j[line.first : line.first + len(line.tau_s)]))
    powers_w: Float64 = np.diff(at_j) / (np.diff(edges_ns) / NS_PER_S)
    return powers_w
