"""Nodes that come, go and cannot be measured; samplers that die; GPUs that are not free again."""

from __future__ import annotations

from typing import Any

import pytest
from fake_samplers import FakeCluster, gpu

from llem_ray.core.energy import Baseline
from llem_ray.core.errors import EngineDied, NodeLost, PlacementError, PowerError, Unreachable
from llem_ray.core.units import NS_PER_S
from llem_ray.execution import fleet as fleets
from llem_ray.execution.calls import Leased
from llem_ray.execution.fleet import Fleet
from llem_ray.execution.meter import Meter
from llem_ray.execution.records import GangRecord, HostDevice
from llem_ray.planning.packing import Seat
from llem_ray.testing.clock import VirtualClock

MIB = 2**20


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def cluster(clock: VirtualClock) -> FakeCluster:
    return FakeCluster(clock)


def started(cluster: FakeCluster, told: list[str] | None = None) -> tuple[Fleet, Meter]:
    meter, executor = cluster.meter(), cluster
    fleet = Fleet(_any(executor), meter, cluster.clock, (told if told is not None else []).append)
    meter.open(fleet.start())
    return fleet, meter


def _any(value: Any) -> Any:
    return value


def later(cluster: FakeCluster, meter: Meter, seconds: float) -> None:
    """Let time pass, with a look at the samplers every second."""
    for _ in range(round(seconds)):
        cluster.clock.advance_ns(NS_PER_S)
        meter.pump()


def free(fleet: Fleet) -> dict[str, tuple[int, int]]:
    return {room.node: (room.free_gpus, room.gpus) for room in fleet.rooms()}


def test_a_sampler_that_just_died_still_has_its_name_and_is_asked_for_again(cluster: FakeCluster) -> None:
    dead = cluster.sampler("host", "G0", error=EngineDied("it has just died"))
    cluster.add("n1", dead, cluster.sampler("host", "G0"), gpus=1)
    fleet, meter = started(cluster)
    assert meter.is_in_service("host")
    assert cluster.opened == ["n1", "n1"]
    assert free(fleet) == {"n1": (1, 1)}


def test_a_node_whose_sampler_cannot_start_is_not_used(cluster: FakeCluster) -> None:
    cluster.add("n1", cluster.sampler("h1", "G0"), gpus=1)
    cluster.add("n2", cluster.sampler("h2", error=PowerError("no NVML")), gpus=1)
    cluster.add("n3", *[cluster.sampler("h3", error=EngineDied("no llem_ray")) for _ in range(4)], gpus=1)
    fleet, meter = started(cluster)
    assert set(free(fleet)) == {"n1"}
    assert meter.problems == {"n2": "no NVML", "n3": "no llem_ray"}
    later(cluster, meter, 20)
    assert cluster.opened.count("n2") == 1


def test_without_any_sampler_the_first_reason_is_the_error(cluster: FakeCluster) -> None:
    cluster.add("n1", cluster.sampler("h1", error=PowerError("no NVML")))
    with pytest.raises(PowerError, match="no NVML"):
        started(cluster)


def test_a_sampler_that_cannot_be_reached_is_asked_again_and_only_then_replaced(cluster: FakeCluster) -> None:
    first = cluster.sampler("h1", "G0")
    cluster.add("n1", first, cluster.sampler("h1", "G0"), gpus=1)
    _, meter = started(cluster)
    first.error = Unreachable("the link is cut")
    later(cluster, meter, 10)
    assert meter.is_silent("h1")
    assert cluster.opened == ["n1"]
    first.error = None
    later(cluster, meter, 2)
    assert not meter.is_silent("h1")
    first.error = Unreachable("the link is cut")
    later(cluster, meter, 40)
    assert cluster.opened == ["n1", "n1"]
    assert meter.infos[0].epoch == 2
    assert first.closed == [True]


@pytest.mark.parametrize("error", [EngineDied("killed"), PowerError("its disk is full")])
def test_a_sampler_that_dies_is_started_anew_with_the_next_epoch(cluster: FakeCluster, error: Exception) -> None:
    first = cluster.sampler("h1", "G0")
    cluster.add("n1", first, cluster.sampler("h1", "G0"), gpus=1)
    fleet, meter = started(cluster)
    first.error = error
    later(cluster, meter, 1)
    assert free(fleet) == {}, "a gang placed now could not be measured"
    assert meter.host_of("n1") == "h1"
    later(cluster, meter, 8)
    assert [info.epoch for info in meter.infos] == [2]
    assert free(fleet) == {"n1": (1, 1)}


def test_a_node_that_goes_while_its_sampler_starts_is_forgotten(cluster: FakeCluster) -> None:
    cluster.add("n1", cluster.sampler("h1", "G0"), gpus=1)
    fleet, meter = started(cluster)
    slow = cluster.sampler("h2", "G1", silent=True)
    cluster.add("n2", slow, gpus=1)
    cluster.clock.advance_ns(3 * NS_PER_S)
    fleet.look()
    later(cluster, meter, 2)
    del cluster.members["n2"]
    cluster.clock.advance_ns(3 * NS_PER_S)
    fleet.look()
    slow.silent = False
    later(cluster, meter, 10)
    assert [info.node for info in meter.infos] == ["h1"]
    assert slow.closed == [True]
    assert cluster.opened == ["n1", "n2"]


def test_a_node_that_goes_before_its_host_is_known_is_lost_too(cluster: FakeCluster) -> None:
    cluster.add("n1", cluster.sampler("h1", "G0"), gpus=1)
    fleet, meter = started(cluster)
    seats = (Seat(node="n1", gpus=1),)
    fleet.raise_if_lost(seats)
    meter.drop("n1", "its sampler is being started anew")
    del cluster.members["n1"]
    cluster.clock.advance_ns(3 * NS_PER_S)
    fleet.look()
    with pytest.raises(NodeLost):
        fleet.raise_if_lost(seats)


def test_one_gpu_on_two_hosts_is_refused(cluster: FakeCluster) -> None:
    cluster.add("n1", cluster.sampler("h1", "G0"), gpus=1)
    cluster.add("n2", cluster.sampler("h2", "G0"), gpus=1)
    with pytest.raises(PlacementError, match=r"GPU G0 is reported by h. and by h.") as caught:
        started(cluster)
    assert "LLEM_RAY_HOST_ID" in str(caught.value)


def test_two_nodes_of_one_host_have_one_sampler_for_each_gpu(cluster: FakeCluster) -> None:
    """Of two that see the same GPUs one samples; when its node goes the other takes over."""
    first, second, third = cluster.sampler("h", "G0", "G1"), cluster.sampler("h", "G0", "G1"), cluster.sampler("h", "G0", "G1")
    cluster.add("n1", first, gpus=1)
    fleet, meter = started(cluster)
    cluster.add("n2", second, third, gpus=1)
    cluster.clock.advance_ns(3 * NS_PER_S)
    fleet.look()
    later(cluster, meter, 3)
    assert second.skipped == ("G0", "G1")
    assert second.closed
    assert [device.uuid for device in meter.devices("h")] == ["G0", "G1"]
    assert free(fleet) == {"n1": (1, 1), "n2": (1, 1)}
    fleet.take("lane", [Seat(node="n1", gpus=1)])
    assert {room.node: room.gangs for room in fleet.rooms()} == {"n1": 1, "n2": 1}
    del cluster.members["n1"]
    cluster.clock.advance_ns(3 * NS_PER_S)
    fleet.look()
    later(cluster, meter, 8)
    assert third.skipped == ()
    assert meter.is_in_service("h")
    assert [device.uuid for device in meter.devices("h")] == ["G0", "G1"]


def test_two_nodes_of_one_host_that_are_there_from_the_begin(cluster: FakeCluster) -> None:
    first, second = cluster.sampler("h", "G0", "G1"), cluster.sampler("h", "G0", "G1", "G2")
    cluster.add("n1", first, gpus=1)
    cluster.add("n2", second, gpus=2)
    fleet, meter = started(cluster)
    assert sorted(first.skipped + second.skipped) == ["G0", "G1"]
    assert sorted(device.uuid for device in meter.devices("h")) == ["G0", "G1", "G2"]
    assert len({info.epoch for info in meter.infos}) == 2
    assert free(fleet) == {"n1": (1, 1), "n2": (2, 2)}


def test_a_restarted_host_is_told_from_one_that_answered_slowly(cluster: FakeCluster) -> None:
    cluster.add("n1", cluster.sampler("h1", "G0", offset_s=7200.0), gpus=1)
    fleet, meter = started(cluster)
    for node_id, offset_s, generation in (("n2", 7200.2, 0), ("n3", 12.0, 1)):
        del cluster.members[f"n{int(node_id[1]) - 1}"]
        cluster.add(node_id, cluster.sampler("h1", "G0", offset_s=offset_s), gpus=1)
        cluster.clock.advance_ns(3 * NS_PER_S)
        fleet.look()
        later(cluster, meter, 4)
        assert meter.generation("h1") == generation
    now_ns = cluster.clock.monotonic_ns()
    assert meter.clocks.to_host("h1", now_ns) == pytest.approx(now_ns + 12 * NS_PER_S, abs=NS_PER_S)


def test_gpus_that_ray_counts_and_nobody_can_measure_are_not_used(cluster: FakeCluster) -> None:
    told: list[str] = []
    cluster.add("n1", cluster.sampler("h1", "G0"), gpus=2)
    fleet, _ = started(cluster, told)
    assert free(fleet) == free(fleet) == {"n1": (1, 1)}
    assert told == ["node n1 (10.0.0.1) has 2 GPUs for Ray, of which 1 can be measured: only these are used"]


def test_gpus_that_others_hold_are_there_but_not_free(cluster: FakeCluster) -> None:
    """A sweep that needs them waits: it is not refused as impossible."""
    cluster.add("n1", cluster.sampler("h1", "G0", "G1"), gpus=2, elsewhere=2)
    fleet, _ = started(cluster)
    assert free(fleet) == {"n1": (0, 2)}


def gang_on(host: str, *uuids: str) -> GangRecord:
    devices = tuple(HostDevice(host=host, device=gpu(uuid)) for uuid in uuids)
    worker = Leased(node=host, hostname=host, pid=7, gpu_ids=uuids, gpu_uuids=uuids, node_id="n1")
    return GangRecord(name="gang-1", group=_any(None), workers=(worker,), devices=devices, context=(), reason=None)


def bare(cluster: FakeCluster, gang: GangRecord, memory_bytes: int, peak_w: float) -> None:
    now_ns = cluster.clock.monotonic_ns()
    for item in gang.devices:
        gang.bare_memory_bytes[item.key] = memory_bytes
        gang.bare[item.key] = Baseline(
            device_uuid=item.device.uuid, kind="bare", power_w=peak_w, u_w=1.0, begin_ns=0, end_ns=now_ns, peak_w=peak_w
        )


@pytest.mark.parametrize(
    ("memory_bytes", "power_w", "living", "reason"),
    [
        (500 * MIB, 100.0, (), None),
        (1500 * MIB, 100.0, (), "1000 MiB more memory in use than before its load"),
        (500 * MIB, 180.0, (), "180 W, more than the 120 W of its idle baseline"),
        (500 * MIB, 100.0, (7,), "processes 7 of the gang before are still there"),
    ],
)
def test_a_gpu_that_is_not_free_again_is_quarantined_and_named(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch, memory_bytes: int, power_w: float, living: tuple[int, ...], reason: str
) -> None:
    monkeypatch.setattr(fleets, "SETTLE_S", 1.0)
    told: list[str] = []
    sampler = cluster.sampler("h1", "G0", "G1", living=living)
    cluster.add("n1", sampler, gpus=2)
    fleet, meter = started(cluster, told)
    gang = gang_on("h1", "G0")
    bare(cluster, gang, 500 * MIB, 100.0)
    now_s = cluster.clock.monotonic_ns() / NS_PER_S
    sampler.sample(1, [now_s + 0.5 * step for step in range(8)], memory_bytes, power_w)
    later(cluster, meter, 2)
    fleet.settle(gang)
    if reason is None:
        assert not fleet.quarantined
        assert free(fleet) == {"n1": (2, 2)}
        return
    assert fleet.quarantined == {("h1", "G0"): reason}
    assert told == [f"GPU G0 on h1 is not used any more: {reason}"]
    assert cluster.held == [("n1", "G0")]
    assert free(fleet) == {"n1": (1, 1)}
    assert fleet.unfit(gang.workers) == [("h1", "G0")]
