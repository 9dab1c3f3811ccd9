"""A simulated device with closed-form load, read through the estimator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from llem_ray.core.energy import EnergyReading, Window
from llem_ray.core.measure_spec import GateSpec
from llem_ray.core.power import Device, Trace
from llem_ray.energy.estimator import read_window
from llem_ray.testing.loads import IDLE_W, Load, six_loads
from llem_ray.testing.sensor import SensorModel, simulate_trace

MARGIN_S = 3.0


@dataclass(frozen=True)
class Case:
    """A window on a simulated device: what was read, and the truth."""

    device: Device
    model: SensorModel
    trace: Trace
    window: Window
    load: Load

    @property
    def true_j(self) -> float:
        return self.load.energy_j(self.window.begin_ns / 1e9, self.window.end_ns / 1e9)

    def read(self, trace: Trace | None = None, **changes: object) -> EnergyReading:
        arguments: dict[str, object] = {
            "device": self.device,
            "calibration": self.model.calibration(self.device.uuid),
            "trace": self.trace if trace is None else trace,
            "window": self.window,
            "sample_period_s": self.model.poll_s,
            "gates": GateSpec(),
            "idle_power_w": IDLE_W,
        }
        return read_window(**{**arguments, **changes})  # type: ignore[arg-type]

    def counter_difference_j(self) -> float:
        """What others report: last counter value at or before each edge."""
        before = np.searchsorted(self.trace.t_ns, [self.window.begin_ns, self.window.end_ns], "right") - 1
        return float(np.diff(self.trace.energy_mj[before])[0]) / 1e3


def make_device(**changes: object) -> Device:
    arguments: dict[str, object] = {
        "uuid": "GPU-sim",
        "name": "Simulated",
        "source": "nvml",
        "scope": "gpu",
        "method": "measured_counter",
        "counter_quantum_mj": 1.0,
        "power_limit_mw": 700e3,
        "sensor_rel": 0.05,
    }
    return Device(**{**arguments, **changes})  # type: ignore[arg-type]


def make_case(
    load: str | Load | Callable[[float, float], Load],
    window_s: float,
    *,
    seed: int = 0,
    model: SensorModel | None = None,
    device: Device | None = None,
) -> Case:
    model = model or SensorModel()
    begin_s = 10.0 + float(np.random.default_rng(seed).uniform())
    window = Window(node="n1", begin_ns=round(begin_s * 1e9), end_ns=round((begin_s + window_s) * 1e9))
    begin_s, end_s = window.begin_ns / 1e9, window.end_ns / 1e9
    if isinstance(load, str):
        waveform: Load = six_loads(begin_s, end_s, seed=seed)[load]
    else:
        waveform = load(begin_s, end_s) if callable(load) else load
    device = device or make_device()
    trace = simulate_trace(waveform, begin_s - MARGIN_S, end_s + MARGIN_S, seed=seed, model=model, device_uuid=device.uuid)
    return Case(device, model, trace, window, waveform)


@pytest.fixture(scope="session")
def case() -> Callable[..., Case]:
    return make_case


@pytest.fixture(scope="session")
def device() -> Callable[..., Device]:
    return make_device
