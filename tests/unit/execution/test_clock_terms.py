"""Gangs on many nodes: the part of the uncertainty that clocks add to a sum, against simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llem_ray.core.energy import EnergyReading, EnergyTotal, Window
from llem_ray.core.measure_spec import GateSpec
from llem_ray.core.power import Device
from llem_ray.core.units import NS_PER_S
from llem_ray.energy.estimator import read_window
from llem_ray.energy.total import sum_readings
from llem_ray.execution.clock_windows import moved_window
from llem_ray.execution.clocks import ClockTable, Exchange
from llem_ray.testing.loads import IDLE_W, MidstreamLoad, PrefillDecodeLoad, RestlessLoad
from llem_ray.testing.sensor import SensorModel, simulate_trace

GPUS = 2
STEP_W = 620.0
DRAWS = 4000


def gpu(uuid: str) -> Device:
    return Device(
        uuid=uuid,
        name="Simulated",
        source="nvml",
        scope="gpu",
        method="measured_counter",
        counter_quantum_mj=1.0,
        power_limit_mw=700e3,
        sensor_rel=0.05,
    )


def claimed(own_s: list[float], marked_s: float, *, sampling_j: float, lag_s: float) -> EnergyTotal:
    """Readings of ``GPUS`` devices on each node; the first node marked the window, the others' clocks have ``own_s``."""
    readings = []
    for node, each_s in enumerate([0.0, *own_s]):
        common_s = marked_s if node else 0.0
        shift_s2 = each_s**2 + common_s**2 + lag_s**2
        for index in range(GPUS):
            readings.append(
                EnergyReading(
                    node=f"n{node}",
                    device_uuid=f"GPU-{node}-{index}",
                    name="Simulated",
                    source="nvml",
                    scope="gpu",
                    method="measured_counter",
                    energy_j=500.0,
                    u_j=float(np.sqrt(sampling_j**2 + STEP_W**2 * shift_s2 / 3)),
                    bound_j=None,
                    cross_check_j=None,
                    cross_check_ratio=None,
                    sensor_rel=0.05,
                    shift_w=STEP_W,
                    delta_s=each_s + common_s,
                    common_delta_s=common_s,
                    lag_s=lag_s,
                    coverage=1.0,
                    mean_power_w=500.0,
                )
            )
    total = sum_readings(readings, {(one.node, one.device_uuid) for one in readings})
    assert total.u_j is not None
    return total


def spread_j(own_s: list[float], marked_s: float, *, sampling_j: float, lag_s: float, alike: float) -> np.ndarray:
    """Errors of the sum when clocks err evenly within their bounds; ``alike`` of their variance is one error for all."""
    rng = np.random.default_rng(7)
    deltas_s = np.array([marked_s, *own_s])
    common, apart = rng.uniform(-1, 1, (DRAWS, 1)), rng.uniform(-1, 1, (DRAWS, len(deltas_s)))
    errors_s = (np.sqrt(alike) * common + np.sqrt(1 - alike) * apart) * deltas_s
    shifts_s = errors_s - errors_s[:, :1]  # that of the marking node itself is none
    by_clock_j = GPUS * STEP_W * shifts_s.sum(axis=1)
    by_lag_j = len(deltas_s) * GPUS * STEP_W * rng.uniform(-lag_s, lag_s, DRAWS)
    return by_clock_j + by_lag_j + rng.normal(0, sampling_j, (DRAWS, len(deltas_s) * GPUS)).sum(axis=1)


@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("marked_ms", [0.0, 0.4, 5.0], ids=lambda ms: f"marked on a clock known to {ms} ms")
@pytest.mark.parametrize("nodes", [3, 16])
@pytest.mark.parametrize("lag_ms", [0.0, 1.0])
def test_the_u_claimed_is_the_spread_seen(nodes: int, marked_ms: float, lag_ms: float, alike: float) -> None:
    """Never too narrow whatever the clocks' errors have in common, and as wide as the worse of nothing and all of it."""
    own_s = [0.4e-3 + 0.02e-3 * node for node in range(nodes - 1)]
    case = {"sampling_j": 0.05, "lag_s": lag_ms / 1e3}
    u_j = claimed(own_s, marked_ms / 1e3, **case).u_j
    seen_j = spread_j(own_s, marked_ms / 1e3, **case, alike=alike)
    assert u_j >= 0.96 * seen_j.std()
    assert np.mean(np.abs(seen_j) <= 2 * u_j) >= 0.95
    if alike == float(marked_ms == 0.0):
        assert u_j == pytest.approx(seen_j.std(), rel=0.04)


def exchange(at_ns: int, there_ns: int, back_ns: int, offset_ns: int) -> Exchange:
    """A question to a host whose clock is ``offset_ns`` ahead."""
    received_ns = at_ns + there_ns + offset_ns
    return Exchange(sent_ns=at_ns, received_ns=received_ns, replied_ns=received_ns, answered_ns=at_ns + there_ns + back_ns)


def clock_table(offsets_ns: dict[str, int], rng: np.random.Generator, *, alike: bool) -> ClockTable:
    """Ten seconds of exchanges that take 10 ms; the way there takes longer on every host, or on some of them."""
    table = ClockTable("n0")
    for host, offset_ns in offsets_ns.items():
        share = 0.7 if alike else rng.uniform(0.2, 0.8)
        for second in range(6, 16):
            ways_ns = 10e6 * np.array([share, 1 - share]) + rng.exponential(1e6, 2)
            table.add(host, exchange(second * NS_PER_S, int(ways_ns[0]), int(ways_ns[1]), offset_ns))
    return table


def read_gang(nodes: int, marked_on: int, seed: int, *, alike: bool, loads: type) -> tuple[EnergyTotal, float]:
    """The total of a gang whose nodes have clocks hours apart, and the truth."""
    rng = np.random.default_rng(seed)
    offsets_ns = {f"n{node}": int(rng.integers(1, 10**14)) if node else 0 for node in range(nodes)}
    table = clock_table(offsets_ns, rng, alike=alike)
    marking = f"n{marked_on}"
    begin_s = 10.0 + float(rng.uniform())
    begin_ns, end_ns = (round(at_s * 1e9) + offsets_ns[marking] for at_s in (begin_s, begin_s + 1.0))
    marked = Window(node=marking, begin_ns=begin_ns, end_ns=end_ns)
    model = SensorModel()
    load = loads(begin_s, begin_s + 1.0, seed=seed)  # all ranks of a gang run the same steps
    readings = []
    for node, offset_ns in offsets_ns.items():
        window = moved_window(marked, node, table)
        assert window is not None
        device = gpu(f"GPU-{node}")
        there = simulate_trace(load, begin_s - 2.0, begin_s + 3.0, seed=int(rng.integers(2**31)), device_uuid=device.uuid)
        reading = read_window(
            device=device,
            calibration=model.calibration(device.uuid),
            trace=replace(there, t_ns=there.t_ns + offset_ns),
            window=window,
            sample_period_s=model.poll_s,
            gates=GateSpec(),
            idle_power_w=IDLE_W,
        )
        readings.append(reading)
    total = sum_readings(readings, {(one.node, one.device_uuid) for one in readings})
    return total, nodes * load.energy_j(begin_s, begin_s + 1.0)


@pytest.mark.parametrize(
    ("nodes", "marked_on", "alike", "loads", "windows"),
    [
        (3, 2, False, MidstreamLoad, 24),
        (16, 0, True, PrefillDecodeLoad, 12),
        (16, 5, False, RestlessLoad, 12),
    ],
)
def test_truth_is_within_twice_the_u_of_whole_gangs(nodes, marked_on, alike, loads, windows) -> None:
    """By exchanges, moved windows, samples and the estimator, as a run does it."""
    read = [read_gang(nodes, marked_on, seed, alike=alike, loads=loads) for seed in range(windows)]
    errors = np.array([(total.energy_j - true_j) / total.u_j for total, true_j in read])
    assert np.mean(np.abs(errors) <= 2) >= 0.95
