"""Rest until devices are cool: by the temperatures that samplers send, on a virtual clock."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_samplers import FakeCluster, gpu

from llem_ray.core.measure_spec import MeasureSpec
from llem_ray.core.power import DeviceState
from llem_ray.core.units import NS_PER_S
from llem_ray.execution.cooling import rest_until_cool
from llem_ray.execution.meter import Meter
from llem_ray.execution.records import GangRecord, HostDevice
from llem_ray.testing.clock import VirtualClock

MEASURE = MeasureSpec(cooldown_until_c=45.0, cooldown_limit_s=20.0)


class Resting:
    """Waits that let the virtual clock run, and samples come."""

    def __init__(self, clock: VirtualClock, meter: Meter) -> None:
        self._clock, self._meter = clock, meter
        self.slept_s = 0.0

    def sleep(self, duration_s: float) -> bool:
        self.slept_s += duration_s
        self._clock.advance_ns(round(duration_s * NS_PER_S))
        self._meter.pump(hurry=True)
        return True


def rested(cooling_c_per_s: float | None) -> tuple[str | None, float]:
    """A GPU of 60 C that cools so, at 1 Hz; None: it has no temperature. The outcome, and how long the rest was."""
    clock = VirtualClock()
    cluster = FakeCluster(clock)
    sampler = cluster.sampler("h1", "G1")
    cluster.add("n1", sampler, gpus=1)
    meter = cluster.meter()
    meter.open(cluster.nodes())
    sampler.sample(1, [1000.0 + second for second in range(60)])
    (batch,) = sampler.batches
    states = [
        DeviceState(
            device_uuid="G1",
            t_ns=(1000 + second) * NS_PER_S,
            temperature_c=None if cooling_c_per_s is None else 60.0 - cooling_c_per_s * second,
        )
        for second in range(60)
    ]
    sampler.batches[:] = [replace(batch, states=tuple(states))]
    meter.pump(hurry=True)
    record = GangRecord(
        name="g",
        group=None,
        workers=(),
        devices=(HostDevice(host="h1", device=gpu("G1")),),
        context=(),
        reason=None,  # type: ignore[arg-type]
    )
    waits = Resting(clock, meter)
    return rest_until_cool(record, meter, MEASURE, waits, clock), waits.slept_s  # type: ignore[arg-type]


def test_it_waits_until_the_device_is_cool() -> None:
    hot, slept_s = rested(2.0)
    assert hot is None
    assert slept_s == pytest.approx(7.5, abs=1.01)


def test_it_gives_up_at_the_limit_and_names_the_device() -> None:
    hot, slept_s = rested(0.1)
    assert hot is not None
    assert "on h1 at 5" in hot
    assert "after 20 s, asked for 45 C" in hot
    assert slept_s == pytest.approx(20.0, abs=2.0)  # asking the sampler takes its time, too


def test_a_device_without_a_temperature_is_not_waited_for() -> None:
    assert rested(None) == ("no temperature can be read", 0.0)


def test_nothing_is_waited_for_where_nothing_is_asked() -> None:
    assert rest_until_cool(None, None, MeasureSpec(), None, None) is None  # type: ignore[arg-type]
