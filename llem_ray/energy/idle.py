"""Idle baselines, and the energy above them: signed, never clamped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from llem_ray.core.energy import Baseline, EnergyReading, Window
from llem_ray.core.measure_spec import GateSpec
from llem_ray.core.power import Calibration, Device, Float64, Trace
from llem_ray.core.units import MW_PER_W, NS_PER_S
from llem_ray.energy.estimator import power_curve, read_window
from llem_ray.energy.readings import clean
from llem_ray.energy.ticks import find_ticks

MIN_COUNTER_S: Final = 1.0
"""A shorter stretch takes the mean of power readings: the counter's edges would weigh too much."""


@dataclass(frozen=True, slots=True)
class NetEnergy:
    """Energy above idle. None with a ``reason``."""

    energy_j: float | None
    u_j: float | None
    reason: str | None = None
    idle_u_j: float | None = None
    """What of ``u_j`` comes from the idle power."""


def idle_baseline(
    *,
    device: Device,
    calibration: Calibration,
    trace: Trace,
    window: Window,
    sample_period_s: float,
    kind: Literal["bare", "resident"],
) -> Baseline:
    """Mean power of a device over an idle stretch.

    By the energy counter where the stretch is 1 s or longer, else by power readings. Its uncertainty is the larger of
    sd / sqrt(n_eff), n_eff counting autocorrelated readings for less, half the drift from end to end, and that of the energy.
    """
    reading = read_window(
        device=device,
        calibration=calibration,
        trace=trace,
        window=window,
        sample_period_s=sample_period_s,
        gates=GateSpec(),
    )
    if (reason := _unusable(reading)) is not None:
        return _baseline(device, kind, window, None, None, reason)
    series_w = _series_w(device, calibration, trace, window, sample_period_s)
    mean_w = reading.mean_power_w
    if reading.method == "measured_counter" and window.duration_s < MIN_COUNTER_S and len(series_w) > 0:
        mean_w = float(series_w.mean())
    u_energy_w = (reading.u_j or 0.0) / window.duration_s
    u_w = u_energy_w if len(series_w) < 3 else max(u_energy_w, _scatter_w(series_w), abs(_drift_w(series_w)) / 2)
    peak_w = float(series_w.max()) if len(series_w) else None
    return replace(_baseline(device, kind, window, mean_w, u_w, None), peak_w=peak_w)


def _unusable(reading: EnergyReading) -> str | None:
    if reading.energy_j is None:
        return reading.reason or "no energy"
    invalid = [f"{item.code}: {item.detail}" for item in reading.flags if item.severity == "invalid"]
    return "; ".join(invalid) or None


def _baseline(
    device: Device,
    kind: Literal["bare", "resident"],
    window: Window,
    power_w: float | None,
    u_w: float | None,
    reason: str | None,
) -> Baseline:
    return Baseline(
        device_uuid=device.uuid,
        kind=kind,
        power_w=power_w,
        u_w=u_w,
        begin_ns=window.begin_ns,
        end_ns=window.end_ns,
        reason=reason,
    )


def _series_w(device: Device, calibration: Calibration, trace: Trace, window: Window, sample_period_s: float) -> Float64:
    """Powers inside the window, for their scatter and drift: instant readings, else those between counter ticks."""
    inside = clean(trace, window).trace.between(window.begin_ns, window.end_ns)
    found = power_curve(device, inside, origin_ns=window.begin_ns, sample_period_s=sample_period_s)
    if found is not None:
        column = found[1]
        return column[np.isfinite(column)] / MW_PER_W
    ticks = find_ticks(inside, calibration, sample_period_s=sample_period_s, origin_ns=window.begin_ns)
    if len(ticks) < 2:
        return np.empty(0)
    step = max(1, round(0.5 / ticks.interval_s))
    return np.diff(ticks.c_j[::step]) / np.diff(ticks.hi_s[::step])


def effective_count(series: Float64) -> float:
    """How many independent readings an autocorrelated series is worth: n / (1 + 2 sum rho_k), at least 1.

    The sum runs over Geyer's initial positive sequence: pairs of autocorrelations until a pair's sum is negative.
    """
    n = len(series)
    centred = series - series.mean()
    variance = float(centred @ centred)
    if n < 4 or variance <= 0:
        return float(max(n, 1))
    size = 1 << (2 * n - 1).bit_length()
    spectrum = np.fft.rfft(centred, size)
    rho = np.fft.irfft(spectrum * np.conj(spectrum), size)[:n] / variance
    pairs = rho[0 : n - n % 2 : 2] + rho[1 : n - n % 2 + 1 : 2]
    stop = np.flatnonzero(pairs <= 0)
    total = float(pairs[: stop[0] if len(stop) else len(pairs)].sum())
    return float(min(max(n / max(2 * total - 1, 1.0), 1.0), n))


def _scatter_w(series_w: Float64) -> float:
    return float(series_w.std(ddof=1) / np.sqrt(effective_count(series_w)))


def _drift_w(series_w: Float64) -> float:
    """Change from one end to the other: twice the difference of the halves' means."""
    half = len(series_w) // 2
    return 2.0 * float(series_w[-half:].mean() - series_w[:half].mean())


def net_energy(reading: EnergyReading, baseline: Baseline | None, window: Window) -> NetEnergy:
    """E - P_idle W, signed, with u_net^2 = u_E^2 + (W u_P)^2.

    Raises:
        ValueError: The baseline is another device's.
    """
    if baseline is None:
        return NetEnergy(None, None, "no idle baseline was taken")
    if baseline.device_uuid != reading.device_uuid:
        raise ValueError(f"the baseline of {baseline.device_uuid} does not belong to {reading.device_uuid}")
    if reading.energy_j is None:
        return NetEnergy(None, None, reading.reason)
    if baseline.power_w is None:
        return NetEnergy(None, None, f"no idle baseline: {baseline.reason}")
    width_s = (window.end_ns - window.begin_ns) / NS_PER_S
    net_j = reading.energy_j - baseline.power_w * width_s
    if reading.u_j is None or baseline.u_w is None:
        return NetEnergy(net_j, None)
    idle_u_j = width_s * baseline.u_w
    return NetEnergy(net_j, float(np.hypot(reading.u_j, idle_u_j)), idle_u_j=idle_u_j)


def sum_net(parts: Sequence[NetEnergy], energy_u_j: float | None) -> NetEnergy:
    """Sum over devices; None with the first reason when a part is missing.

    Baselines of different devices are independent; their energies are not, since a node's clock and the counters' lag are common.

    Args:
        parts: Of each device.
        energy_u_j: One sigma of the sum of their energies.
    """
    missing = next((part for part in parts if part.energy_j is None), None)
    if not parts or missing is not None:
        return NetEnergy(None, None, missing.reason if missing else "no device")
    net_j = sum(part.energy_j for part in parts if part.energy_j is not None)
    known_j = [part.idle_u_j for part in parts if part.idle_u_j is not None]
    if energy_u_j is None or len(known_j) < len(parts):
        return NetEnergy(float(net_j), None)
    idle_u_j = float(np.hypot.reduce(known_j))
    return NetEnergy(float(net_j), float(np.hypot(energy_u_j, idle_u_j)), idle_u_j=idle_u_j)
