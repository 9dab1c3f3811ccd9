"""From samples and a window to the energy of one device: value, uncertainty, hard bound, cross-check, flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from llem_ray.core.energy import EnergyReading, Flag, Window
from llem_ray.core.measure_spec import GateSpec
from llem_ray.core.power import Calibration, Device, DeviceState, Float64, Method, Trace
from llem_ray.core.units import MJ_PER_J, MW_PER_W, NS_PER_S
from llem_ray.energy import validity
from llem_ray.energy.cross_check import average_energy_j
from llem_ray.energy.edge import Edge, counter_at, shift_power_w
from llem_ray.energy.power_curve import (
    AVERAGE_WINDOW_S,
    INSTANT_WINDOW_S,
    PowerCurve,
    nearest_reading,
    reading_period_s,
    staircase,
)
from llem_ray.energy.readings import clean, coverage, find_freeze, find_jump, monotone_piece
from llem_ray.energy.ticks import NEIGHBOURS, find_ticks
from llem_ray.energy.validity import flag

ESTIMATE_PERIOD_S: Final = 1.0
"""Model estimates are polled once a second."""

DEFAULT_QUANTUM_MJ: Final = 1.0

_UNUSABLE: Final = ("counter_reset", "counter_frozen")


def edge_margin_s(calibration: Calibration, sample_period_s: float, method: Method = "measured_counter") -> float:
    """How much trace the estimator uses before and after an edge, s: with that much, later samples change nothing.

    A counter needs the ticks around the edge, a model's estimate only the reading on either side of it.
    """
    if method == "estimated_model":
        return 2 * sample_period_s
    ticks_s = (NEIGHBOURS + 1) * (calibration.tick_period_s or 0.0)
    return max(ticks_s, AVERAGE_WINDOW_S, (NEIGHBOURS + 1) * sample_period_s) + 2 * sample_period_s


def read_window(
    *,
    device: Device,
    calibration: Calibration,
    trace: Trace,
    window: Window,
    sample_period_s: float,
    gates: GateSpec,
    idle_power_w: float | None = None,
    states: Sequence[DeviceState] = (),
) -> EnergyReading:
    """Energy of one device over one window.

    Takes the energy counter where there is one. Without one, or when it failed inside the window, instant power is integrated
    instead and the method says so; the failure stays as an ``invalid`` flag. Bad samples never raise: what is wrong is in
    ``flags``, and where no energy can be given it is None with a ``reason``.

    Args:
        device: What was read.
        calibration: What its sensor was found to do.
        trace: Its samples from ``edge_margin_s`` before the window to as much after it; fewer cost accuracy at the edges.
        window: On the clock that stamped the samples.
        sample_period_s: Time between polls of this device, s.
        gates: Thresholds of validity.
        idle_power_w: Idle power, W, to tell a frozen counter from an idle device.
        states: Slow-lane readings of the device around the window.
    """
    if reason := _refusal(device, trace, window):
        return _unavailable(device, calibration, window, reason)
    cleaned = clean(trace, window)
    trace = cleaned.trace
    flags = (
        *validity.check_length(window.duration_s),
        *cleaned.flags,
        *validity.check_states(states, window.begin_ns, window.end_ns),
    )
    if device.method == "estimated_model":
        return _read_estimate(device, calibration, trace, window, max(sample_period_s, ESTIMATE_PERIOD_S), flags, gates)
    if np.count_nonzero(np.isfinite(trace.energy_mj)) >= 2:
        by_counter = _read_counter(device, calibration, trace, window, sample_period_s, gates, idle_power_w)
        if by_counter.energy_j is not None:
            return _with(by_counter, flags)
        flags = (*flags, *by_counter.flags)
        reason = by_counter.reason or "the counter gave nothing"
    else:
        reason = "no energy counter was read"
    return _read_power(device, calibration, trace, window, sample_period_s, gates, flags, reason)


def _refusal(device: Device, trace: Trace, window: Window) -> str | None:
    if device.shared:
        return "attribution=shared: the reading is the board's, several tenants share it (MIG)"
    if device.method == "unavailable":
        return device.reason or "the device has no meter"
    if window.end_ns <= window.begin_ns:
        return "the window is empty"
    if len(trace) == 0:
        return "no samples"
    return None


@dataclass(frozen=True, slots=True)
class CounterSpan:
    """A counter's energy between two edges."""

    energy_j: float
    u_j: float
    bound_j: tuple[float, float] | None


def shift_variance_s2(window: Window, lag_s: float) -> float:
    """Three times the variance of a shift of the window against the counter, s^2.

    The lag, the node's clock and the clock of the node that marked the window err independently, evenly within their half-widths.
    """
    common_s = window.common_delta_ns / NS_PER_S
    return lag_s**2 + common_s**2 + (window.delta_ns / NS_PER_S - common_s) ** 2


def span_energy(begin: Edge, end: Edge, *, quantum_j: float, shift_s2: float) -> CounterSpan:
    """E = C(b) - C(a), its u and its hard bound; never negative. ``shift_s2`` is that of ``shift_variance_s2``."""
    lower_j, upper_j = max(0.0, end.lower_j - begin.upper_j), end.upper_j - begin.lower_j
    bounded = np.isfinite(lower_j) and np.isfinite(upper_j) and lower_j <= upper_j
    energy_j = max(0.0, end.c_j - begin.c_j)
    if bounded:
        energy_j = min(max(energy_j, lower_j), upper_j)
    shift_j2 = shift_power_w(begin.powers_w, end.powers_w) ** 2 * shift_s2 / 3
    u_j = float(np.sqrt(begin.u_j**2 + end.u_j**2 + quantum_j**2 / 6 + shift_j2))
    return CounterSpan(energy_j, u_j, (lower_j, upper_j) if bounded else None)


def power_max_w(device: Device) -> float | None:
    """What the device cannot exceed: 1.3 times its enforced limit, W; None where the limit is not known."""
    if device.power_limit_mw is None:
        return None
    return validity.IMPLAUSIBLE_FACTOR * device.power_limit_mw / MW_PER_W


def counter_quantum_j(device: Device) -> float:
    """Step of the counter, J."""
    return (device.counter_quantum_mj or DEFAULT_QUANTUM_MJ) / MJ_PER_J


def _read_counter(
    device: Device,
    calibration: Calibration,
    trace: Trace,
    window: Window,
    sample_period_s: float,
    gates: GateSpec,
    idle_power_w: float | None,
) -> EnergyReading:
    limit_w, quantum_j = power_max_w(device), counter_quantum_j(device)
    delta_s, lag_s = window.delta_ns / NS_PER_S, calibration.lag_s
    piece, flags = monotone_piece(trace, window)
    if flags:
        return _unavailable(device, calibration, window, f"counter_reset: {flags[0].detail}", flags)
    ticks = find_ticks(piece, calibration, sample_period_s=sample_period_s, origin_ns=window.begin_ns)
    flags = find_freeze(
        piece,
        window,
        interval_s=ticks.interval_s if ticks.period_s is not None else None,
        idle_power_w=idle_power_w,
        quantum_j=quantum_j,
    )
    if flags:
        return _unavailable(device, calibration, window, f"counter_frozen: {flags[0].detail}", flags)

    def at(t_ns: int) -> Edge | None:
        return counter_at(ticks, t_ns, power_max_w=limit_w, quantum_j=quantum_j, lag_s=lag_s, delta_s=delta_s)

    begin, end = at(window.begin_ns), at(window.end_ns)
    if begin is None or end is None:
        where = "begin" if begin is None else "end"
        return _unavailable(device, calibration, window, f"no counter ticks near the {where} of the window")
    span = span_energy(begin, end, quantum_j=quantum_j, shift_s2=shift_variance_s2(window, lag_s))
    seen = coverage(trace, trace.energy_mj, window, sample_period_s)
    mean_w = span.energy_j / window.duration_s
    # An estimate may exceed the limit within its error; the hard bound does not.
    least_w = mean_w if span.bound_j is None else span.bound_j[0] / window.duration_s
    jumps = find_jump(ticks, window, power_max_w=limit_w, quantum_j=quantum_j)
    limit_mw = device.power_limit_mw
    flags = (
        *(jumps or validity.check_mean_power(least_w, limit_mw / MW_PER_W if limit_mw is not None else None)),
        *validity.check_coverage(seen, gates),
    )
    if begin.gap or end.gap:
        which = " and ".join(name for name, edge in (("begin", begin), ("end", end)) if edge.gap)
        flags = (*flags, flag("edge_gap", f"ticks are missing at the {which}"))
    seconds = int(window.duration_s + 1e-9)
    ratio, note = _cross_check_ratio(trace, calibration, window.end_ns, seconds, end, at(window.end_ns - seconds * NS_PER_S))
    flags = (*flags, *validity.check_cross_check(ratio, window.duration_s, gates), *note)
    return EnergyReading(
        node=window.node,
        device_uuid=device.uuid,
        name=device.name,
        source=device.source,
        scope=device.scope,
        method="measured_counter",
        energy_j=span.energy_j,
        u_j=span.u_j,
        bound_j=span.bound_j,
        cross_check_j=None if ratio is None else ratio * span.energy_j,
        cross_check_ratio=ratio,
        sensor_rel=device.sensor_rel,
        shift_w=shift_power_w(begin.powers_w, end.powers_w),
        delta_s=delta_s,
        common_delta_s=window.common_delta_ns / NS_PER_S,
        lag_s=lag_s,
        coverage=seen,
        mean_power_w=mean_w,
        flags=flags,
    )


def _cross_check_ratio(
    trace: Trace, calibration: Calibration, end_ns: int, seconds: int, end: Edge, start: Edge | None
) -> tuple[float | None, tuple[Flag, ...]]:
    """Energy by averaged power over energy by the counter, for the last whole seconds of the window."""
    average_j, reason = average_energy_j(trace, calibration, end_ns, seconds)
    if average_j is None or start is None:
        return None, (flag("no_cross_check", reason or "no counter ticks where the comparison begins"),)
    counter_j = end.c_j - start.c_j
    if counter_j <= 0:
        return None, (flag("no_cross_check", "the counter shows no energy to compare with"),)
    return average_j / counter_j, ()


def power_curve(
    device: Device, trace: Trace, *, origin_ns: int, sample_period_s: float, period_s: float | None = None
) -> tuple[PowerCurve, Float64] | None:
    """The best power readings of a trace as a curve, with the column they came from; None when there are none.

    Args:
        device: What was read.
        trace: Its samples.
        origin_ns: Time that the curve counts from.
        sample_period_s: Time between polls, s.
        period_s: How often the meter publishes, s; default: found from the readings.
    """
    instant, average = np.isfinite(trace.power_mw).any(), np.isfinite(trace.power_avg_mw).any()
    if not instant and not average:
        return None
    column = trace.power_mw if instant else trace.power_avg_mw
    if device.method == "estimated_model":
        return nearest_reading(trace.t_ns, column, origin_ns=origin_ns, sample_period_s=sample_period_s), column
    curve = staircase(
        trace.t_ns,
        column,
        origin_ns=origin_ns,
        period_s=period_s or reading_period_s(trace.t_ns, column, sample_period_s),
        window_s=INSTANT_WINDOW_S if instant else AVERAGE_WINDOW_S,
        sample_period_s=sample_period_s,
    )
    return curve, column


def _read_power(
    device: Device,
    calibration: Calibration,
    trace: Trace,
    window: Window,
    sample_period_s: float,
    gates: GateSpec,
    flags: tuple[Flag, ...],
    reason: str,
) -> EnergyReading:
    found = power_curve(device, trace, origin_ns=window.begin_ns, sample_period_s=sample_period_s)
    if found is None:
        return _unavailable(device, calibration, window, f"{reason}, and no power either", flags)
    curve, column = found
    seen = coverage(trace, column, window, sample_period_s)
    if seen == 0:
        return _unavailable(device, calibration, window, f"{reason}, and no power inside the window", flags)
    energy_j = max(0.0, curve.energy_j(window.begin_ns, window.end_ns))
    limit_mw = device.power_limit_mw
    mean_w = energy_j / window.duration_s
    flags = (
        *flags,
        *validity.check_mean_power(mean_w, limit_mw / MW_PER_W if limit_mw is not None else None),
        *validity.check_coverage(seen, gates),
        flag("no_cross_check", reason),
    )
    shift_w = curve.shift_w(window.begin_ns, window.end_ns)
    shift_j = shift_w * float(np.sqrt(shift_variance_s2(window, calibration.lag_s) / 3))
    u_j = float(np.hypot(curve.u_j(window.begin_ns, window.end_ns), shift_j))
    reading = _curve_reading(device, calibration, window, "measured_power_integral", energy_j, u_j, seen, flags)
    return replace(reading, shift_w=shift_w)


def _read_estimate(
    device: Device,
    calibration: Calibration,
    trace: Trace,
    window: Window,
    sample_period_s: float,
    flags: tuple[Flag, ...],
    gates: GateSpec,
) -> EnergyReading:
    found = power_curve(device, trace, origin_ns=window.begin_ns, sample_period_s=sample_period_s)
    if found is None:
        return _unavailable(device, calibration, window, "the model gave no estimate", flags)
    curve, column = found
    seen = coverage(trace, column, window, sample_period_s)
    if seen == 0:
        return _unavailable(device, calibration, window, "the model gave no estimate near the window", flags)
    energy_j = max(0.0, curve.energy_j(window.begin_ns, window.end_ns))
    flags = (*flags, *validity.check_coverage(seen, gates))
    # No u: the scatter of a model's output says nothing of the model's error.
    return _curve_reading(device, calibration, window, "estimated_model", energy_j, None, seen, flags)


def _curve_reading(
    device: Device,
    calibration: Calibration,
    window: Window,
    method: Method,
    energy_j: float | None,
    u_j: float | None,
    seen: float,
    flags: tuple[Flag, ...],
    reason: str | None = None,
) -> EnergyReading:
    return EnergyReading(
        node=window.node,
        device_uuid=device.uuid,
        name=device.name,
        source=device.source,
        scope=device.scope,
        method=method,
        energy_j=energy_j,
        u_j=u_j,
        bound_j=None,
        cross_check_j=None,
        cross_check_ratio=None,
        sensor_rel=device.sensor_rel,
        shift_w=None,
        delta_s=window.delta_ns / NS_PER_S,
        common_delta_s=window.common_delta_ns / NS_PER_S,
        lag_s=calibration.lag_s,
        coverage=seen,
        mean_power_w=None if energy_j is None else energy_j / window.duration_s,
        flags=flags,
        reason=reason,
    )


def _unavailable(
    device: Device, calibration: Calibration, window: Window, reason: str, flags: tuple[Flag, ...] = ()
) -> EnergyReading:
    return _curve_reading(device, calibration, window, "unavailable", None, None, 0.0, flags, reason)


def _with(reading: EnergyReading, flags: tuple[Flag, ...]) -> EnergyReading:
    return replace(reading, flags=(*flags, *reading.flags))
