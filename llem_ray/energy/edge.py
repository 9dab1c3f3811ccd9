"""The value of an energy counter at one instant between two of its ticks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from llem_ray.core.power import Float64, Trace
from llem_ray.core.units import MJ_PER_J, NS_PER_S
from llem_ray.energy.steps import energy_inside, guarded
from llem_ray.energy.ticks import TickLine, Ticks, tick_line
from llem_ray.energy.validity import IMPLAUSIBLE_FACTOR

FLOOR_J2: Final = 1e-6
"""Variance of one millijoule, so that no weight is infinite."""

MIN_SLOPE_W: Final = 1.0
MIN_SLOPE_REL: Final = 0.02

LEFT_TRUST: Final = 0.7
RIGHT_TRUST: Final = 3.0
"""Power follows the work late, so the tick after an edge is the one that holds a tail: its change counts for more."""

TIMING_SD_S: Final = 0.5e-3
"""Timing errors beyond this do not move the weights: they are common to both edges of a window and mostly cancel."""

CONFLICT_SHARE: Final = 0.05
"""Where the two sides contradict each other, at least this share of the contradiction squared is variance."""

CONFLICT_SIGMAS: Final = 2.0
CONFLICT_REL: Final = 0.01
"""Sigmas of the ticks' times, and of this share of a tick's energy, that are no contradiction yet."""

GUARD_SHARE: Final = 0.1
"""The same where a guard says that the load steps at the edge and the other side contradicts it: a pause looks like a guard."""

STEPS_SHARE: Final = 0.02
"""Least variance of a load of steps that was fitted to a contradiction, as a share of the contradiction squared."""

GAP_PERIODS: Final = 1.5
WIDE_PERIODS: Final = 0.6


@dataclass(frozen=True, slots=True)
class Edge:
    """The counter at one instant. ``u_j`` is one sigma of sampling, without lag and clock offset."""

    t_ns: int
    c_j: float
    u_j: float
    powers_w: tuple[float, float]
    """Power before and after it, W; the same where only one side is known."""
    lower_j: float
    """Hard bound on the counter, by the power limit."""
    upper_j: float
    gap: bool
    """Ticks are missing here."""


def shift_power_w(begin_w: tuple[float, float], end_w: tuple[float, float]) -> float:
    """By how much the energy of a window errs with a shift of the window against the load, W.

    |dP_begin| + |dP_end| where the load steps at the edges. Where it does not, a shift still takes away power at one edge and
    adds that of the other.

    Args:
        begin_w: Power before and after the begin.
        end_w: Power before and after the end.
    """
    steps_w = abs(begin_w[1] - begin_w[0]) + abs(end_w[1] - end_w[0])
    return max(steps_w, max(begin_w) - min(end_w), max(end_w) - min(begin_w))


def counter_at(
    ticks: Ticks,
    t_ns: int,
    *,
    power_max_w: float | None,
    quantum_j: float,
    lag_s: float = 0.0,
    delta_s: float = 0.0,
) -> Edge | None:
    """The counter at ``t_ns``, by extrapolation from the ticks before and after it.

    Each side assumes that the power of its neighbouring tick holds up to the edge, which is exact where the load steps at the
    edge; the two are weighted by how much the power changed one tick further out and by how well the ticks' times are known.
    Where they contradict each other and no guard shows that the load does step at the edge, a load that moves in steps at any
    time is fitted to the ticks instead. The value never leaves the hard bound.

    Args:
        ticks: Ticks around the edge.
        t_ns: The instant.
        power_max_w: Power that the device cannot exceed, or None.
        quantum_j: Step of the counter.
        lag_s: Publication lag, widens the bound.
        delta_s: Half-width of the clock offset, widens the bound.

    Returns:
        None when there are fewer than two ticks, or when the edge lies over 1.5 tick intervals outside of them.
    """
    x0_s = (t_ns - ticks.origin_ns) / NS_PER_S
    if len(ticks) < 2:
        return None
    line = tick_line(ticks, x0_s)
    c_j = ticks.c_j[line.first : line.first + len(line.tau_s)]
    k = int(np.searchsorted(line.tau_s, x0_s, "right")) - 1
    interval_s = ticks.interval_s
    outside_s = max(line.tau_s[0] - x0_s, x0_s - line.tau_s[-1])
    if outside_s > GAP_PERIODS * interval_s or len(c_j) < 2:
        return None
    limit_w = np.inf if power_max_w is None else power_max_w
    value_j, u_j, powers_w, gap = _combine(line, c_j, k, x0_s, interval_s, limit_w, lag_s + delta_s)
    lower_j, upper_j = counter_bound(
        ticks, x0_s, power_max_w=power_max_w, quantum_j=quantum_j, lag_s=lag_s, delta_s=delta_s, around=line.first + k
    )
    if lower_j <= upper_j:
        value_j = min(max(value_j, lower_j), upper_j)
    return Edge(t_ns, value_j, u_j, powers_w, lower_j, upper_j, gap)


def counter_near(trace: Trace, t_ns: int) -> Edge | None:
    """The counter at ``t_ns``, on a straight line between the new values around it: cheap, and off by a share of a tick.

    For boundaries inside one phase, where the error cancels in the sum. There is no hard bound.

    Returns:
        None where the counter did not change both before and after ``t_ns``, or goes down.
    """
    valid = np.isfinite(trace.energy_mj)
    polls_ns, energy_mj = trace.t_ns[valid], trace.energy_mj[valid]
    change_mj = np.diff(energy_mj)
    changed = np.flatnonzero(change_mj) + 1
    after = int(np.searchsorted(polls_ns[changed], t_ns, "right"))
    if after == 0 or after == len(changed) or (change_mj < 0).any():
        return None
    pair = changed[after - 1 : after + 1]
    seen_s = ((polls_ns[pair] - t_ns) + (polls_ns[pair - 1] - t_ns)) / 2 / NS_PER_S
    before_j, after_j = (energy_mj[pair] / MJ_PER_J).tolist()
    c_j = float(np.interp(0.0, seen_s, (before_j, after_j)))
    power_w = (after_j - before_j) / (seen_s[1] - seen_s[0])
    return Edge(t_ns, c_j, (after_j - before_j) / 12**0.5, (power_w, power_w), -np.inf, np.inf, gap=False)


@dataclass(frozen=True, slots=True)
class _Side:
    """What the ticks on one side say of the counter at the edge."""

    value_j: float
    variance_j2: float
    """Of the extrapolation; timing not included."""
    power_w: float


def _combine(
    line: TickLine, c_j: Float64, k: int, x0_s: float, interval_s: float, limit_w: float, shift_s: float
) -> tuple[float, float, tuple[float, float], bool]:
    """Counter, u, power before and after, and gap mark at ``x0_s``, between ticks k and k + 1 (one of them may not exist).

    ``shift_s`` is by how much the counter's lag and the clock's offset may move the edge.
    """
    near = slice(max(0, k - 4), k + 6)
    tau_s, c, k = line.tau_s[near], c_j[near], k - max(0, k - 4)
    dt_s = np.maximum(np.diff(tau_s), 1e-6)
    rate_w = np.diff(c) / dt_s
    x_s = x0_s - float(tau_s[k]) if k >= 0 else np.inf
    y_s = float(tau_s[k + 1]) - x0_s if k + 1 < len(c) else np.inf
    hole_s = x_s + y_s
    rate_rel = line.jitter_sd_s * float(np.sqrt(2.0)) / interval_s
    left, right = _left_side(rate_w, c, k, x_s, rate_rel), _right_side(rate_w, c, k, y_s, rate_rel)
    if left is None or right is None:
        side = left or right
        assert side is not None  # there are two ticks or more
        value_j, u_j = side.value_j, float(np.hypot(side.variance_j2**0.5, side.power_w * line.sd_s))
        powers_w = side.power_w, side.power_w
    else:
        powers_w = left.power_w, right.power_w
        step_w = abs(right.power_w - left.power_w)
        value_j, u_j = _weigh(left, right, line.sd_s)
        expected_j = float(np.hypot(line.sd_s * step_w, CONFLICT_REL * (c[k + 1] - c[k])))
        conflict_j = abs(left.value_j - right.value_j)
        if conflict_j > CONFLICT_SIGMAS * expected_j:
            slack_s = 2 * line.sd_s + shift_s
            if guarded(rate_w, k, x_s=x_s, y_s=y_s, slack_s=slack_s, ceiling_w=limit_w / IMPLAUSIBLE_FACTOR):
                u_j = max(u_j, GUARD_SHARE**0.5 * conflict_j)
            elif inside := energy_inside(rate_w, dt_s, k, x_s, noise_rel=rate_rel, limit_w=limit_w):
                value_j = float(c[k]) + inside.energy_j
                variance_j2 = max(inside.variance_j2, STEPS_SHARE * conflict_j**2)
                u_j = float(np.sqrt(variance_j2 + (line.sd_s * inside.power_w) ** 2))
    wide_s = line.sd_s * float(np.sqrt(3.0))
    gap = hole_s > GAP_PERIODS * interval_s or wide_s > WIDE_PERIODS * interval_s
    if gap:
        between_s = x_s * y_s / interval_s if np.isfinite(hole_s) else 0.0
        reach_s = max(min(x_s, y_s), min(between_s, max(x_s, y_s)), wide_s)
        u_j = max(u_j, float(np.ptp(rate_w)) * reach_s / float(np.sqrt(3.0)))
    return value_j, u_j, powers_w, bool(gap)


def _left_side(rate_w: Float64, c_j: Float64, k: int, x_s: float, rate_rel: float) -> _Side | None:
    """C_k + P_L x. ``rate_w[i]`` is the power between ticks i and i + 1."""
    if k < 0:
        return None
    across_w = float(rate_w[k]) if k < len(rate_w) else float(rate_w[-1])
    power_w = float(rate_w[k - 1]) if k >= 1 else across_w
    outer_w = float(rate_w[k - 2]) if k >= 2 else 0.5 * across_w
    return _Side(float(c_j[k]) + power_w * x_s, _variance_j2(power_w, outer_w, x_s, LEFT_TRUST, rate_rel), power_w)


def _right_side(rate_w: Float64, c_j: Float64, k: int, y_s: float, rate_rel: float) -> _Side | None:
    """C_{k+1} - P_R y."""
    if k + 1 >= len(c_j):
        return None
    across_w = float(rate_w[max(k, 0)])
    power_w = float(rate_w[k + 1]) if k + 1 < len(rate_w) else across_w
    outer_w = float(rate_w[k + 2]) if k + 2 < len(rate_w) else 0.5 * across_w
    return _Side(float(c_j[k + 1]) - power_w * y_s, _variance_j2(power_w, outer_w, y_s, RIGHT_TRUST, rate_rel), power_w)


def _variance_j2(power_w: float, outer_w: float, reach_s: float, trust: float, rate_rel: float) -> float:
    slope_w = max(trust * abs(power_w - outer_w), MIN_SLOPE_REL * power_w, MIN_SLOPE_W)
    return (slope_w**2 + (rate_rel * power_w) ** 2) * reach_s**2 + FLOOR_J2


def _weigh(left: _Side, right: _Side, sd_s: float) -> tuple[float, float]:
    """Weighted mean of both sides and its u.

    The timing error of the ticks is common to both sides: it enters once, through the weighted power. Where the sides
    contradict each other by more than they claim to know, the truth lies somewhere between them.
    """
    step_w = right.power_w - left.power_w
    weighing_s = min(sd_s, TIMING_SD_S)
    total = left.variance_j2 + right.variance_j2 + (weighing_s * step_w) ** 2
    weight = (right.variance_j2 + weighing_s**2 * step_w * right.power_w) / total
    weight = min(max(weight, 0.0), 1.0)
    conflict_j = left.value_j - right.value_j
    expected_j2 = left.variance_j2 + right.variance_j2 + (sd_s * step_w) ** 2
    excess_j2 = max(0.0, conflict_j**2 - expected_j2)
    variance_j2 = (
        weight**2 * left.variance_j2
        + (1 - weight) ** 2 * right.variance_j2
        + (sd_s * (right.power_w - weight * step_w)) ** 2
        + excess_j2 * max(weight * (1 - weight), CONFLICT_SHARE)
    )
    return weight * left.value_j + (1 - weight) * right.value_j, float(np.sqrt(variance_j2))


def counter_bound(
    ticks: Ticks,
    x0_s: float,
    *,
    power_max_w: float | None,
    quantum_j: float,
    lag_s: float,
    delta_s: float,
    around: int | None = None,
) -> tuple[float, float]:
    """Bounds on the counter at ``x0_s`` that hold for any load between 0 and ``power_max_w``.

    From the raw brackets (lo, hi] of the ticks near index ``around``: C >= max(c - P_max max(0, hi - x0)) and
    C <= min(c + quantum + P_max max(0, x0 - lo)). Without ``power_max_w`` only the values seen before and after bound it.
    """
    near = slice(None) if around is None else slice(max(0, around - 8), around + 10)
    lo_s, hi_s, c_j = ticks.lo_s[near] - lag_s, ticks.hi_s[near], ticks.c_j[near]
    early_s = np.maximum(0.0, hi_s - (x0_s - delta_s))
    late_s = np.maximum(0.0, (x0_s + delta_s) - lo_s)
    if power_max_w is None:
        lower, upper = np.where(early_s > 0, -np.inf, c_j), np.where(late_s > 0, np.inf, c_j + quantum_j)
    else:
        lower, upper = c_j - power_max_w * early_s, c_j + quantum_j + power_max_w * late_s
    return float(lower.max(initial=-np.inf)), float(upper.min(initial=np.inf))
