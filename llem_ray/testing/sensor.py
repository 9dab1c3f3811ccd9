"""A simulated power meter: a load seen through ticks, averaging, quantisation and polling, as one Trace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llem_ray.core.power import Calibration, Float64, Trace
from llem_ray.testing.loads import Load


@dataclass(frozen=True, kw_only=True, slots=True)
class SensorModel:
    """How a meter sees the load. Defaults: an A100/H100 as published, polled at 20 Hz."""

    tick_s: float = 0.1
    """Period of the energy counter."""
    quantum_mj: float = 1.0
    base_mj: float = 8.0e9
    """What the counter showed at time 0."""
    lag_s: float = 0.0
    """A tick is visible this much later."""
    tick_jitter_s: float = 0.0
    """Half-width of each tick's own irregularity."""
    power_tick_s: float | None = 0.1
    """Period of the power readings; None: the meter has a counter only."""
    instant_window_s: float = 0.025
    """Instant power is the mean over this long before its tick."""
    average_window_s: float = 1.0
    poll_s: float = 0.05
    poll_jitter_s: float = 0.01
    """Each poll is late by up to this much."""
    call_s: float = 100e-6
    """Time of one read; its stamp is the middle."""
    drop: float = 0.0
    """Share of polls lost at random."""

    def calibration(self, device_uuid: str) -> Calibration:
        """What an ideal calibration says of this meter."""
        return Calibration(
            device_uuid=device_uuid,
            tick_period_s=self.tick_s,
            has_instant=self.power_tick_s is not None,
            has_average=self.power_tick_s is not None,
            lag_s=self.lag_s,
            call_s=self.call_s,
        )


def simulate_trace(
    load: Load, begin_s: float, end_s: float, *, seed: int, model: SensorModel | None = None, device_uuid: str = "GPU-sim"
) -> Trace:
    """Poll ``load`` from ``begin_s`` to ``end_s``. Phases of ticks and polls are drawn from ``seed``; times are ns from 0."""
    model = model or SensorModel()
    rng = np.random.default_rng(seed)
    counter_phase_s, power_phase_s = rng.uniform(0.0, model.tick_s), rng.uniform(0.0, model.power_tick_s or 1.0)
    first_s = begin_s + rng.uniform(0.0, model.poll_s)
    t_s = np.arange(first_s, end_s, model.poll_s)
    t_s = t_s + rng.uniform(0.0, model.poll_jitter_s, len(t_s)) if model.poll_jitter_s else t_s
    t_s = t_s[rng.random(len(t_s)) >= model.drop]
    read_s = t_s + rng.uniform(-0.5, 0.5, len(t_s)) * model.call_s
    counter_mj = _counter_mj(load, read_s - model.lag_s, counter_phase_s, model, seed)
    power_mw, power_avg_mw = np.full(len(t_s), np.nan), np.full(len(t_s), np.nan)
    if model.power_tick_s is not None:
        tau_s = _last_tick_s(read_s, power_phase_s, model.power_tick_s)
        power_mw = np.round(_mean_w(load, tau_s, model.instant_window_s) * 1e3)
        power_avg_mw = np.round(_mean_w(load, tau_s, model.average_window_s) * 1e3)
    return Trace(
        device_uuid=device_uuid,
        t_ns=np.round(t_s * 1e9).astype(np.int64),
        hw_ns=np.full(len(t_s), round(model.call_s / 2 * 1e9), dtype=np.int64),
        power_mw=power_mw,
        power_avg_mw=power_avg_mw,
        energy_mj=counter_mj,
    )


def _counter_mj(load: Load, t_s: Float64, phase_s: float, model: SensorModel, seed: int) -> Float64:
    tau_s = _last_tick_s(t_s, phase_s, model.tick_s)
    if model.tick_jitter_s:
        number = np.round((tau_s - phase_s) / model.tick_s).astype(np.int64)
        offsets_s = np.random.default_rng(seed + 1).uniform(-1.0, 1.0, int(np.ptp(number)) + 3) * model.tick_jitter_s
        at = number - number.min() + 1
        candidates_s = np.stack([tau_s + shift * model.tick_s + offsets_s[at + shift] for shift in (-1, 0, 1)])
        tau_s = np.where(candidates_s <= t_s, candidates_s, -np.inf).max(axis=0)
    energy_mj = model.base_mj + load.cumulative_j(tau_s) * 1e3
    return np.floor(energy_mj / model.quantum_mj) * model.quantum_mj


def _last_tick_s(t_s: Float64, phase_s: float, period_s: float) -> Float64:
    return phase_s + np.floor((t_s - phase_s) / period_s) * period_s


def _mean_w(load: Load, t_s: Float64, window_s: float) -> Float64:
    return (load.cumulative_j(t_s) - load.cumulative_j(t_s - window_s)) / window_s
