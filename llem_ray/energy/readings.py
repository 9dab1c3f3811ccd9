"""Which readings of a trace can be trusted: zeros, resets, freezes and jumps of its counter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from llem_ray.core.energy import Flag, Window
from llem_ray.core.power import Float64, Trace
from llem_ray.core.units import MJ_PER_J, MW_PER_W, NS_PER_S
from llem_ray.energy.ticks import Ticks
from llem_ray.energy.validity import flag

FROZEN_PERIODS: Final = 5.0
FROZEN_BLIND_S: Final = 1.0
"""Without any power reading a counter must stand still this long to be called frozen."""

BUSY_REL: Final = 1.1


@dataclass(frozen=True, slots=True)
class CleanTrace:
    """A trace whose zero readings became NaN, and what was found."""

    trace: Trace
    flags: tuple[Flag, ...]


def clean(trace: Trace, window: Window) -> CleanTrace:
    """Turn zeros into missing readings: 0 mW always, 0 mJ wherever the counter had already shown more."""
    no_power = (trace.power_mw == 0) | (trace.power_avg_mw == 0)
    seen_mj = np.maximum.accumulate(np.nan_to_num(trace.energy_mj, nan=0.0)) if len(trace) else trace.energy_mj
    no_energy = (trace.energy_mj == 0) & (seen_mj > 0)
    zeros = no_power | no_energy
    if not zeros.any():
        return CleanTrace(trace, ())
    cleaned = Trace(
        device_uuid=trace.device_uuid,
        t_ns=trace.t_ns,
        hw_ns=trace.hw_ns,
        power_mw=np.where(trace.power_mw == 0, np.nan, trace.power_mw),
        power_avg_mw=np.where(trace.power_avg_mw == 0, np.nan, trace.power_avg_mw),
        energy_mj=np.where(no_energy, np.nan, trace.energy_mj),
    )
    inside = int(np.count_nonzero(zeros & (trace.t_ns >= window.begin_ns) & (trace.t_ns <= window.end_ns)))
    return CleanTrace(cleaned, (flag("zero_reading", f"{inside} samples inside the window"),) if inside else ())


def coverage(trace: Trace, column: Float64, window: Window, sample_period_s: float) -> float:
    """Readings that arrived inside the window over those expected, at most 1.

    A window too short to expect any counts as covered when there are readings within two poll periods of both its ends.
    """
    t_ns = trace.t_ns[np.isfinite(column)]
    first, last = np.searchsorted(t_ns, [window.begin_ns, window.end_ns])
    expected = int(window.duration_s / sample_period_s + 1e-9)
    if expected >= 1:
        return min(1.0, float(last - first) / expected)
    reach_ns = 2 * sample_period_s * NS_PER_S
    before = first > 0 and window.begin_ns - t_ns[first - 1] <= reach_ns
    after = last < len(t_ns) and t_ns[last] - window.end_ns <= reach_ns
    return 1.0 if before and after else 0.0


def monotone_piece(trace: Trace, window: Window) -> tuple[Trace, tuple[Flag, ...]]:
    """The part of the trace around the window in which the counter never goes down, and counter_reset if that cuts the window."""
    valid = np.isfinite(trace.energy_mj)
    t_ns, energy_mj = trace.t_ns[valid], trace.energy_mj[valid]
    down = np.flatnonzero(np.diff(energy_mj) < 0)
    if len(down) == 0:
        return trace, ()
    inside = (t_ns[down + 1] > window.begin_ns) & (t_ns[down] < window.end_ns)
    if inside.any():
        fall_j = float((energy_mj[down] - energy_mj[down + 1])[inside][0]) / MJ_PER_J
        return trace, (flag("counter_reset", f"the counter fell by {fall_j:.3f} J"),)
    after = down[t_ns[down + 1] <= window.begin_ns]
    before = down[t_ns[down] >= window.end_ns]
    first_ns = int(t_ns[after[-1] + 1]) if len(after) else int(trace.t_ns[0])
    last_ns = int(t_ns[before[0]]) if len(before) else int(trace.t_ns[-1])
    return trace.between(first_ns, last_ns), ()


def find_freeze(
    trace: Trace, window: Window, *, interval_s: float | None, idle_power_w: float | None, quantum_j: float
) -> tuple[Flag, ...]:
    """counter_frozen: inside the window no tick for five intervals while the device drew more than idle + 10 %.

    Where idle power is not known, any power counts; where power is not read either, a second without a tick does.
    """
    valid = np.isfinite(trace.energy_mj)
    t_ns, energy_mj = trace.t_ns[valid], trace.energy_mj[valid]
    starts = np.concatenate(([0], np.flatnonzero(np.diff(energy_mj) != 0) + 1))
    ends = np.append(starts[1:] - 1, len(t_ns) - 1)
    begin_ns, end_ns = np.maximum(t_ns[starts], window.begin_ns), np.minimum(t_ns[ends], window.end_ns)
    still_s = (end_ns - begin_ns) / NS_PER_S
    limit_s = FROZEN_PERIODS * interval_s if interval_s is not None else FROZEN_BLIND_S
    power_mw = np.where(np.isfinite(trace.power_mw), trace.power_mw, trace.power_avg_mw)
    for at in np.flatnonzero(still_s >= limit_s):
        rest = (trace.t_ns >= begin_ns[at]) & (trace.t_ns <= end_ns[at]) & np.isfinite(power_mw)
        if rest.any():
            mean_w = float(power_mw[rest].mean()) / MW_PER_W
            busy = mean_w > BUSY_REL * (idle_power_w or 0.0) and mean_w * float(still_s[at]) > 2 * quantum_j
            seen = f"{mean_w:.0f} W were drawn"
        else:
            busy, seen = float(still_s[at]) >= FROZEN_BLIND_S, "no power was read"
        if busy:
            return (flag("counter_frozen", f"no tick for {float(still_s[at]):.2f} s while {seen}"),)
    return ()


def find_jump(ticks: Ticks, window: Window, *, power_max_w: float | None, quantum_j: float) -> tuple[Flag, ...]:
    """Implausible: two neighbouring counter values are further apart than the power limit allows."""
    if power_max_w is None or len(ticks) < 2:
        return ()
    begin_s, end_s = (window.begin_ns - ticks.origin_ns) / NS_PER_S, (window.end_ns - ticks.origin_ns) / NS_PER_S
    longest_s = ticks.hi_s[1:] - ticks.lo_s[:-1]
    excess_j = np.diff(ticks.c_j) - power_max_w * longest_s - quantum_j
    excess_j = excess_j[(ticks.hi_s[1:] > begin_s) & (ticks.lo_s[:-1] < end_s)]
    if not (excess_j > 0).any():
        return ()
    return (flag("implausible", f"the counter jumped {float(excess_j.max()):.1f} J further than the power limit allows"),)
