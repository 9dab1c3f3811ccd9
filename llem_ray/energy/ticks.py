"""When an energy counter moved: brackets from polling, sharpened by the counter's own regularity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from llem_ray.core.power import Calibration, Float64, Trace
from llem_ray.core.units import MJ_PER_J, NS_PER_S

PERIOD_SLACK: Final = 1.05
"""A value read now was published at most this many periods ago."""

SLOW_RATIO: Final = 1.2
"""A counter whose period is over this many poll periods has ticks that can be told apart."""

NEIGHBOURS: Final = 12
"""Ticks on either side of an edge that its line is drawn through."""

MIN_SD_S: Final = 0.2e-3 / np.sqrt(3.0)
"""No tick is known better than a half-width of 0.2 ms."""

_SLOPES: Final = 25
_UNIT: Final = np.linspace(-1.0, 1.0, _SLOPES)


@dataclass(frozen=True, slots=True)
class Ticks:
    """The n ticks of a counter: from tick j in (lo_s[j], hi_s[j]] on, it shows c_j[j]. Times are s from ``origin_ns``."""

    origin_ns: int
    lo_s: Float64
    hi_s: Float64
    c_j: Float64
    period_s: float | None
    """Period of the ticks; None when it is not known."""
    poll_s: float
    """Usual time between polls."""
    regular: bool
    """The ticks are slower than the polls, so that a line through their brackets says more than each bracket."""

    def __len__(self) -> int:
        return len(self.c_j)

    @property
    def interval_s(self) -> float:
        """Usual time between neighbouring entries: the period, or the poll period when every poll shows a new value."""
        return max(self.period_s or 0.0, self.poll_s)


@dataclass(frozen=True, slots=True)
class TickLine:
    """Estimated times of consecutive ticks, and how well they are known (one sigma, common to all of them)."""

    first: int
    """Index of the first in ``Ticks``."""
    tau_s: Float64
    sd_s: float


def find_ticks(trace: Trace, calibration: Calibration, *, sample_period_s: float, origin_ns: int) -> Ticks:
    """Ticks of the energy counter, from the polls that read it.

    A new value at poll i was published in (max(t[i-1], t[i] - 1.05 T), t[i]], t[i-1] being the last poll that read the
    counter at all; both ends are widened by the half-duration of their reads. The value of the first poll counts as a tick
    when the period T is known. The counter must not decrease within ``trace``.
    """
    valid = np.isfinite(trace.energy_mj)
    t_s = (trace.t_ns[valid] - origin_ns) / NS_PER_S
    hw_s = trace.hw_ns[valid] / NS_PER_S
    c_j = trace.energy_mj[valid] / MJ_PER_J
    period_s = calibration.tick_period_s
    changed = np.flatnonzero(c_j[1:] > c_j[:-1]) + 1
    before_s = t_s[changed - 1] - hw_s[changed - 1]
    if period_s is not None and len(t_s):
        changed, before_s = np.concatenate(([0], changed)), np.concatenate(([-np.inf], before_s))
    hi_s = t_s[changed] + hw_s[changed]
    lo_s = before_s
    if period_s is not None:
        lo_s = np.maximum(before_s, t_s[changed] - hw_s[changed] - PERIOD_SLACK * period_s)
    elif len(changed) > 2:
        period_s = float(np.median(np.diff(hi_s)))
    return Ticks(
        origin_ns=origin_ns,
        lo_s=lo_s,
        hi_s=hi_s,
        c_j=c_j[changed],
        period_s=period_s,
        poll_s=sample_period_s,
        regular=period_s is not None and period_s >= SLOW_RATIO * sample_period_s,
    )


def tick_line(ticks: Ticks, x0_s: float) -> TickLine:
    """Times of the ticks around ``x0_s``, each within its bracket.

    Regular ticks lie on a line tau = a + b n that passes through every bracket. All lines that do are equally likely, so the
    estimate is the centre of that polygon in (a, b), and its standard deviation comes with it: unlike the residuals of a least
    squares line it stays honest when polls are locked to ticks. Where no line passes (ticks are irregular) the brackets are
    widened by what is missing.
    """
    centre = int(np.searchsorted(ticks.hi_s, x0_s))
    first, last = max(0, centre - NEIGHBOURS), min(len(ticks), centre + NEIGHBOURS)
    lo_s, hi_s = ticks.lo_s[first:last], ticks.hi_s[first:last]
    middle_s, width_s = (lo_s + hi_s) / 2, hi_s - lo_s
    if not ticks.regular or ticks.period_s is None:
        near = slice(max(0, centre - first - 2), centre - first + 2)
        sd_s = float(width_s[near].max(initial=0.0)) / np.sqrt(12.0)
        return TickLine(first, middle_s, max(sd_s, MIN_SD_S))
    sharp = width_s <= 0.9 * ticks.period_s
    if np.count_nonzero(sharp) < 4:
        return TickLine(first, middle_s, max(float(width_s.mean()) / np.sqrt(12.0), MIN_SD_S))
    number, b_s = _number(middle_s, sharp, ticks.period_s, x0_s)
    tau_s, sd_s = _polygon(lo_s, hi_s, number, sharp, b_s)
    return TickLine(first, np.clip(tau_s, lo_s, hi_s), max(sd_s, MIN_SD_S))


def _number(middle_s: Float64, sharp: np.ndarray, period_s: float, x0_s: float) -> tuple[Float64, float]:
    """Number of each tick, 0 near ``x0_s``, and a first guess of the period.

    The circular mean of the brackets' phases anchors the numbers: no single wide bracket can shift them all.
    """
    relative_s = middle_s - x0_s
    phase = np.angle(np.exp(2j * np.pi * relative_s[sharp] / period_s).sum()) / (2 * np.pi)
    number = np.round(relative_s / period_s - phase)
    n, m = number[sharp] - number[sharp].mean(), relative_s[sharp]
    spread = float(n @ n)
    b_s = float(n @ m) / spread if spread > 0 else period_s
    if abs(b_s / period_s - 1.0) > 0.05:
        return number, period_s
    a_s = float(m.mean()) - b_s * float(number[sharp].mean())
    return np.round((relative_s - a_s) / b_s), b_s


def _polygon(lo_s: Float64, hi_s: Float64, number: Float64, sharp: np.ndarray, b_s: float) -> tuple[Float64, float]:
    """Centre of the polygon of lines through all sharp brackets, as tick times, and the sd of the line at number 0."""
    n, lo, hi = number[sharp], lo_s[sharp], hi_s[sharp]
    reach = max(float(n.max() - n.min()), 1.0)
    half_b_s = 2.0 * float((hi - lo).max()) / reach
    slack_s = 0.0
    for _ in range(3):
        slopes_s = b_s + half_b_s * _UNIT
        shifts_s = slopes_s[:, None] * n
        upper_s, lower_s = (hi - shifts_s).min(axis=1), (lo - shifts_s).max(axis=1)
        room_s = upper_s - lower_s
        best = int(room_s.argmax())
        slack_s = max(0.0, -float(room_s[best])) * 0.6
        weight = np.maximum(room_s + 2 * slack_s, 0.0)
        weight[best] = max(weight[best], 1e-9)
        inside = np.flatnonzero(weight)
        step_s = half_b_s / (_SLOPES // 2)
        b_s = float(slopes_s[inside[0]] + slopes_s[inside[-1]]) / 2
        if len(inside) > _SLOPES // 2:
            break
        half_b_s = max((float(slopes_s[inside[-1]] - slopes_s[inside[0]]) / 2 + step_s), 1e-9)
    weight = weight / weight.sum()
    centre_s = (upper_s + lower_s) / 2
    a_mean_s, b_mean_s = float(weight @ centre_s), float(weight @ slopes_s)
    room_s = np.maximum(room_s + 2 * slack_s, 0.0)
    variance = float(weight @ (room_s**2 / 12 + (centre_s - a_mean_s) ** 2)) + slack_s**2 / 3
    return a_mean_s + b_mean_s * number, float(np.sqrt(variance))
