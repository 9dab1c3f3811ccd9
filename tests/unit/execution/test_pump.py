"""Fetching from many samplers: who is asked when, how much is taken at a time, and that nothing is left at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from llem_ray.core.errors import LlemRayError
from llem_ray.core.power import Device, SampleBatch, SamplerInfo
from llem_ray.core.units import NS_PER_S
from llem_ray.execution.calls import Fetched, Node, SamplerSettings
from llem_ray.execution.meter import ASKED_AT_ONCE, MAX_PERIOD_S, Meter
from llem_ray.testing.clock import VirtualClock


class Answer:
    """A call that is answered once its sampler answers."""

    def __init__(self, sampler: Many, answer: Any) -> None:
        self.sampler, self._answer = sampler, answer

    def result(self, timeout_s: float) -> Any:
        return self._answer


class Many:
    """A sampler that has a batch of ``rows`` samples for whoever asks."""

    def __init__(self, name: str, gpu: str, rows: int) -> None:
        self.name, self._gpu, self.rows = name, gpu, rows
        self.asked = 0
        self.answers = True

    def host(self) -> Answer:
        return Answer(self, self.name)

    def describe(self, skip: Sequence[str] = (), min_epoch: int = 1) -> Answer:
        device = Device(uuid=self._gpu, name="gpu", source="test", scope="gpu", method="unavailable")
        info = SamplerInfo(
            node=self.name,
            hostname=self.name,
            pid=1,
            epoch=min_epoch,
            sample_hz=20.0,
            devices=(device,),
            calibrations={},
            unavailable={},
            host={},
        )
        return Answer(self, info)

    def fetch(self, after_seq: int, epoch: int) -> Answer:
        self.asked += 1
        column = np.arange(self.rows, dtype=np.float64)
        batch = SampleBatch(
            node=self.name,
            epoch=epoch,
            seq=after_seq + 1,
            devices=(self._gpu,),
            device=np.zeros(self.rows, np.int32),
            t_ns=np.arange(self.rows) + self.asked * 10**9,
            hw_ns=np.zeros(self.rows, np.int64),
            power_mw=column,
            power_avg_mw=column,
            energy_mj=column,
        )
        return Answer(self, Fetched(batches=(batch,), received_ns=0, replied_ns=0))

    def probe(self) -> Answer:
        return Answer(self, (0, 0))

    def close(self, *, force: bool = False) -> None:
        pass


class Cluster:
    def __init__(self, samplers: Sequence[Many], clock: VirtualClock) -> None:
        self.samplers, self._clock = {sampler.name: sampler for sampler in samplers}, clock
        self.most = 0

    def open_sampler(self, node: Node, settings: SamplerSettings) -> Many:
        return self.samplers[node.node_id]

    def wait(self, calls: Sequence[Answer], timeout_s: float) -> list[Answer]:
        self.most = max(self.most, len(calls))
        if not all(call.sampler.answers for call in calls):
            self._clock.sleep_until_ns(self._clock.monotonic_ns() + round(timeout_s * NS_PER_S))
        return [call for call in calls if call.sampler.answers]


def opened(count: int, rows: int = 2, gpus: Sequence[str] | None = None) -> tuple[Meter, Cluster, VirtualClock]:
    clock = VirtualClock()
    names = [f"n{number:04d}" for number in range(count)]
    cluster = Cluster([Many(name, (gpus or names)[number], rows) for number, name in enumerate(names)], clock)
    executor: Any = cluster
    meter = Meter(executor, SamplerSettings(run="run", sources="auto", sample_hz=20.0), clock, "driver", lambda info: None)
    meter.open([Node(node_id=name, hostname=name, address="127.0.0.1", gpus=1) for name in names])
    cluster.most = 0
    return meter, cluster, clock


def pumped(meter: Meter, clock: VirtualClock, seconds: int) -> list[int]:
    """Batches fetched in each of some seconds."""
    counts = []
    for _ in range(seconds):
        counts.append(len(meter.pump()))
        clock.sleep_until_ns(clock.monotonic_ns() + NS_PER_S)
    return counts


def test_a_large_cluster_is_asked_evenly_over_the_period_and_few_at_a_time() -> None:
    meter, cluster, clock = opened(1000)
    first, *later = pumped(meter, clock, 1 + 4 * round(MAX_PERIOD_S))
    assert first == 1000
    assert set(later) == {200}
    assert {sampler.asked for sampler in cluster.samplers.values()} == {5}
    assert cluster.most <= ASKED_AT_ONCE


def test_a_small_cluster_is_asked_every_second() -> None:
    meter, _, clock = opened(3)
    assert pumped(meter, clock, 4) == [3, 3, 3, 3]


def test_hurry_asks_all_and_does_not_put_off_who_is_due() -> None:
    meter, _, clock = opened(100)
    pumped(meter, clock, 3)
    for _ in range(30):
        assert len(meter.pump(hurry=True)) == 100
    assert pumped(meter, clock, 3) == [0, 50, 50]


def test_much_at_once_is_taken_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llem_ray.execution.meter.ENOUGH_ROWS", 1000)
    meter, cluster, _ = opened(300, rows=10)
    portions = []
    while not portions or meter.is_behind:
        portions.append(sum(map(len, meter.pump())))
    assert max(portions) < 1000 + ASKED_AT_ONCE * 10
    assert sum(portions) == 3000
    assert {sampler.asked for sampler in cluster.samplers.values()} == {1}


def test_those_that_do_not_answer_hold_up_no_others() -> None:
    meter, cluster, clock = opened(200)
    silent = list(cluster.samplers.values())[:100]
    for sampler in silent:
        sampler.answers = False
    assert sum(pumped(meter, clock, 3)) >= 100
    assert all(sampler.asked >= 1 for sampler in cluster.samplers.values())
    for sampler in silent:
        sampler.answers = True
    assert len({batch.node for batch in meter.pump(hurry=True)}) == 200


def test_the_last_samples_are_asked_for_after_the_end_began(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llem_ray.execution.meter.ENOUGH_ROWS", 100)
    meter, cluster, clock = opened(150, rows=10)
    late = cluster.samplers["n0007"]
    late.answers = False
    while meter.pump() and meter.is_behind:
        pass
    late.answers = True
    begin_ns = clock.monotonic_ns()
    before = {name: sampler.asked for name, sampler in cluster.samplers.items()}
    fetched = [batch for portion in meter.pump_last() for batch in portion]
    assert {batch.node for batch in fetched} == set(cluster.samplers)
    assert all(sampler.asked == before[name] + 1 for name, sampler in cluster.samplers.items())
    assert clock.monotonic_ns() == begin_ns


def test_the_end_does_not_wait_for_ever() -> None:
    meter, cluster, _ = opened(2)
    cluster.samplers["n0000"].answers = False
    fetched = [batch.node for portion in meter.pump_last() for batch in portion]
    assert fetched == ["n0001"]


def test_a_gpu_that_two_hosts_report_is_refused() -> None:
    with pytest.raises(LlemRayError, match="GPU g is reported by n0000 and by n0001"):
        opened(2, gpus=["g", "g"])


def test_what_is_known_of_a_host_stays_when_its_node_goes() -> None:
    meter, _, _ = opened(2)
    meter.drop("n0001", "gone")
    assert meter.hosts == ("n0000", "n0001")
    assert not meter.is_in_service("n0001")
    assert meter.sampler_of("n0001") is None
    assert [device.uuid for device in meter.devices("n0001")] == ["n0001"]
    assert meter.devices("n0009") == ()
    assert (meter.hostname("n0001"), meter.hostname("n0009")) == ("n0001", "n0009")
