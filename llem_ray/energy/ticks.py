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

CALIBRATED_REL: Final = 0.003
GUESSED_REL: Final = 0.05
"""One sigma of the period: a calibration of 2 s at 500 Hz, or the median time between changes of a trace."""

SHARP_PERIODS: Final = 0.9
"""Wider brackets say too little of which tick it was."""

JITTER_FACTOR: Final = 2.0
"""Irregularity over the widening that a line through 60 ticks needs; by simulation."""

_JITTER_TICKS: Final = 60
_JITTER_CHUNKS: Final = 3
_SLOPES: Final = 25
_MOST_E: Final = float(np.log(1e12))
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
    period_rel: float = 0.0
    """One sigma of ``period_s``, relative."""
    jitter_s: float = 0.0
    """Half-width of each tick's own irregularity, as far as the brackets show it."""

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
    jitter_sd_s: float
    """What each tick is off by on its own: it makes the power between two ticks uncertain."""


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
    regular = period_s is not None and period_s >= SLOW_RATIO * sample_period_s
    return Ticks(
        origin_ns=origin_ns,
        lo_s=lo_s,
        hi_s=hi_s,
        c_j=c_j[changed],
        period_s=period_s,
        poll_s=sample_period_s,
        regular=regular,
        period_rel=CALIBRATED_REL if calibration.tick_period_s is not None else GUESSED_REL,
        jitter_s=_jitter(lo_s[1:], hi_s[1:], period_s) if regular and period_s is not None else 0.0,
    )


def _jitter(lo_s: Float64, hi_s: Float64, period_s: float) -> float:
    """By how much brackets must be widened until a line passes through 60 of them in a row: the median over the trace.

    A stretch as short as that of ``tick_line`` would often hide the irregularity in the width of its brackets.
    """
    starts = np.linspace(0, max(0, len(lo_s) - _JITTER_TICKS), _JITTER_CHUNKS).astype(int)
    slacks_s = []
    for start in np.unique(starts):
        lo, hi = lo_s[start : start + _JITTER_TICKS], hi_s[start : start + _JITTER_TICKS]
        sharp = hi - lo <= SHARP_PERIODS * period_s
        if np.count_nonzero(sharp) >= 4:
            number, b_s = _number((lo + hi) / 2, sharp, period_s, float(lo[len(lo) // 2]))
            slacks_s.append(_polygon(lo[sharp], hi[sharp], number[sharp], b_s, (period_s, GUESSED_REL)).slack_s)
    return JITTER_FACTOR * float(np.median(slacks_s)) if slacks_s else 0.0


def tick_line(ticks: Ticks, x0_s: float, neighbours: int = NEIGHBOURS) -> TickLine:
    """Times of the ticks around ``x0_s``, each within its bracket.

    Regular ticks lie on a line tau = a + b n that passes through every bracket. All lines that do are equally likely, given what
    is known of the period, so the estimate is the centre of that polygon in (a, b), and its standard deviation comes with it:
    unlike the residuals of a least squares line it stays honest when polls are locked to ticks. Brackets are widened by the
    ticks' own irregularity, and by more where no line passes all the same.
    """
    centre = int(np.searchsorted(ticks.hi_s, x0_s))
    first, last = max(0, centre - neighbours), min(len(ticks), centre + neighbours)
    lo_s, hi_s = ticks.lo_s[first:last], ticks.hi_s[first:last]
    middle_s, width_s = (lo_s + hi_s) / 2, hi_s - lo_s
    if not ticks.regular or ticks.period_s is None:
        near = slice(max(0, centre - first - 2), centre - first + 2)
        sd_s = float(width_s[near].max(initial=0.0)) / np.sqrt(12.0)
        return TickLine(first, middle_s, max(sd_s, MIN_SD_S), 0.0)
    sharp = width_s <= SHARP_PERIODS * ticks.period_s
    if np.count_nonzero(sharp) < 4:
        return TickLine(first, middle_s, max(float(width_s.mean()) / np.sqrt(12.0), MIN_SD_S), 0.0)
    number, b_s = _number(middle_s, sharp, ticks.period_s, x0_s)
    jitter_s = ticks.jitter_s
    line = _polygon(lo_s[sharp] - jitter_s, hi_s[sharp] + jitter_s, number[sharp], b_s, (ticks.period_s, ticks.period_rel))
    own_s = jitter_s + line.slack_s
    tau_s = line.a_s + line.b_s * number
    tau_s = (np.clip(tau_s - own_s, lo_s, hi_s) + np.clip(tau_s + own_s, lo_s, hi_s)) / 2
    jitter_sd_s = own_s / float(np.sqrt(3.0))
    return TickLine(first, tau_s, max(float(np.hypot(line.sd_s, jitter_sd_s)), MIN_SD_S), jitter_sd_s)


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


@dataclass(frozen=True, slots=True)
class _Line:
    """tau = a + b n, the sd of a, and by how much the brackets had to be widened."""

    a_s: float
    b_s: float
    sd_s: float
    slack_s: float


def _polygon(lo: Float64, hi: Float64, n: Float64, b_s: float, period: tuple[float, float]) -> _Line:
    """Centre and spread of the polygon of lines through all brackets, slope by slope; twice zoomed in.

    ``period`` is the period and its relative sigma: slopes count as much as they agree with it.
    """
    half_b_s = 2.0 * float((hi - lo).max()) / max(float(np.ptp(n)), 1.0)
    for _ in range(3):
        slopes_s = b_s + half_b_s * _UNIT
        shifts_s = slopes_s[:, None] * n
        upper_s, lower_s = (hi - shifts_s).min(axis=1), (lo - shifts_s).max(axis=1)
        slack_s = max(0.0, -0.6 * float((upper_s - lower_s).max()))
        room_s = np.maximum(upper_s - lower_s + 2 * slack_s, 0.0)
        inside = np.flatnonzero(room_s)
        if len(inside) == 0 or len(inside) > _SLOPES // 2:
            break
        b_s = float(slopes_s[inside[0]] + slopes_s[inside[-1]]) / 2
        half_b_s = float(slopes_s[inside[-1]] - slopes_s[inside[0]]) / 2 + half_b_s / (_SLOPES // 2)
    distance = ((slopes_s - period[0]) / (period[1] * period[0])) ** 2 / 2
    weight = np.maximum(room_s, 1e-12)
    weight = weight * np.exp((distance[room_s.argmax()] - distance).clip(-_MOST_E, _MOST_E))
    weight = weight / weight.sum()
    centre_s = (upper_s + lower_s) / 2
    a_s = float(weight @ centre_s)
    variance_s2 = float(weight @ (room_s**2 / 12 + (centre_s - a_s) ** 2))
    return _Line(a_s, float(weight @ slopes_s), float(np.sqrt(variance_s2)), slack_s)
