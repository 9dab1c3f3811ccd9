"""When a window's samples are complete, and what the meter keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from llem_ray.core.power import Calibration, Device, Method, SampleBatch, SamplerInfo
from llem_ray.core.units import NS_PER_S
from llem_ray.execution.calls import Fetched, Node, SamplerSettings
from llem_ray.execution.meter import Meter
from llem_ray.testing.clock import VirtualClock

COUNTER, ESTIMATE = "GPU-1", "codecarbon:cpu"
TICK_S = 0.1


class Now:
    """A call that is answered at once."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def result(self, timeout_s: float) -> Any:
        return self._answer


class Recorded:
    """A sampler that hands out the batches it was given."""

    def __init__(self, info: SamplerInfo) -> None:
        self._info = info
        self.batches: list[SampleBatch] = []

    def host(self) -> Now:
        return Now(self._info.node)

    def describe(self, skip: Sequence[str] = (), min_epoch: int = 1) -> Now:
        return Now(self._info)

    def fetch(self, after_seq: int, epoch: int) -> Now:
        wanted = tuple(batch for batch in self.batches if batch.seq > after_seq)
        return Now(Fetched(batches=wanted, received_ns=0, replied_ns=0))

    def probe(self) -> Now:
        return Now((0, 0))

    def close(self, *, force: bool = False) -> None:
        pass


class OneSampler:
    def __init__(self, sampler: Recorded) -> None:
        self._sampler = sampler

    def open_sampler(self, node: Node, settings: SamplerSettings) -> Recorded:
        return self._sampler

    def wait(self, calls: Sequence[Any], timeout_s: float) -> Sequence[Any]:
        return calls


def device(uuid: str, method: Method) -> Device:
    return Device(uuid=uuid, name=uuid, source="test", scope="gpu", method=method, sensor_rel=0.0)


def opened(*devices: Device) -> tuple[Meter, Recorded]:
    ticks_s = {COUNTER: TICK_S, ESTIMATE: None}
    calibrations = {
        one.uuid: Calibration(
            device_uuid=one.uuid, tick_period_s=ticks_s[one.uuid], has_instant=True, has_average=False, lag_s=0.0, call_s=0.0
        )
        for one in devices
    }
    info = SamplerInfo(
        node="n",
        hostname="n",
        pid=1,
        epoch=1,
        sample_hz=20.0,
        devices=devices,
        calibrations=calibrations,
        unavailable={},
        host={},
        periods_s={COUNTER: 0.05, ESTIMATE: 1.0},
    )
    sampler = Recorded(info)
    settings = SamplerSettings(run="run", sources="auto", sample_hz=20.0)
    executor: Any = OneSampler(sampler)
    meter = Meter(executor, settings, VirtualClock(), "n", lambda info: None)
    meter.open([Node(node_id="node", hostname="n", address="127.0.0.1", gpus=0)])
    return meter, sampler


def batch(seq: int, uuids: tuple[str, ...], index: int, times_s: Sequence[float]) -> SampleBatch:
    n = len(times_s)
    return SampleBatch(
        node="n",
        epoch=1,
        seq=seq,
        devices=uuids,
        device=np.full(n, index, np.int32),
        t_ns=np.array([round(t * NS_PER_S) for t in times_s], np.int64),
        hw_ns=np.zeros(n, np.int64),
        power_mw=np.full(n, 1e4),
        power_avg_mw=np.full(n, np.nan),
        energy_mj=np.full(n, np.nan),
    )


@pytest.mark.parametrize("late_s", [0.0, 0.4])
def test_an_estimate_is_final_with_one_reading_at_or_after_the_edge(late_s: float) -> None:
    meter, sampler = opened(device(ESTIMATE, "estimated_model"))
    sampler.batches.append(batch(1, (ESTIMATE,), 0, [8.0, 9.0]))
    meter.pump(hurry=True)
    assert not meter.is_sampled_until(10 * NS_PER_S)
    sampler.batches.append(batch(2, (ESTIMATE,), 0, [10.0 + late_s]))
    meter.pump(hurry=True)
    assert meter.is_sampled_until(10 * NS_PER_S)


def test_a_counter_is_final_once_the_ticks_its_estimator_uses_are_in() -> None:
    one = device(COUNTER, "measured_counter")
    meter, sampler = opened(one)
    margin_s = meter.margin_s("n", one)
    assert margin_s >= 12 * TICK_S
    sampler.batches.append(batch(1, (COUNTER,), 0, [10.0 + margin_s - 0.01]))
    meter.pump(hurry=True)
    assert not meter.is_sampled_until(10 * NS_PER_S)
    sampler.batches.append(batch(2, (COUNTER,), 0, [10.0 + margin_s]))
    meter.pump(hurry=True)
    assert meter.is_sampled_until(10 * NS_PER_S)


def test_the_slowest_device_decides_and_one_without_a_meter_does_not() -> None:
    uuids = (COUNTER, ESTIMATE)
    meter, sampler = opened(device(COUNTER, "unavailable"), device(ESTIMATE, "estimated_model"))
    sampler.batches.append(batch(1, uuids, 1, [10.0]))
    meter.pump(hurry=True)
    assert meter.is_sampled_until(10 * NS_PER_S)
    both, sampler = opened(device(COUNTER, "measured_counter"), device(ESTIMATE, "estimated_model"))
    sampler.batches.append(batch(1, uuids, 1, [20.0]))
    both.pump(hurry=True)
    assert not both.is_sampled_until(10 * NS_PER_S)


def test_what_was_fetched_is_not_fetched_again_and_can_be_forgotten() -> None:
    meter, sampler = opened(device(ESTIMATE, "estimated_model"))
    sampler.batches.append(batch(1, (ESTIMATE,), 0, [1.0, 2.0, 3.0]))
    assert [one.seq for one in meter.pump(hurry=True)] == [1]
    assert meter.pump(hurry=True) == []
    meter.trim("n", 2 * NS_PER_S)
    assert list(meter.trace("n", ESTIMATE, 0, 10 * NS_PER_S).t_ns) == [2 * NS_PER_S, 3 * NS_PER_S]


def test_how_many_samples_come_in_a_second() -> None:
    meter, _ = opened(device(COUNTER, "measured_counter"), device(ESTIMATE, "estimated_model"))
    assert meter.samples_per_s == pytest.approx(20.0 + 1.0)
    without_meter, _ = opened(device(COUNTER, "unavailable"))
    assert without_meter.samples_per_s == 0.0
