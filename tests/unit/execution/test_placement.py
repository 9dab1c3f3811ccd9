"""From what the scheduler granted to devices, by UUID."""

from __future__ import annotations

import pytest

from llem_ray.core.errors import PlacementError
from llem_ray.core.power import Device, Method, Scope
from llem_ray.execution.calls import Leased
from llem_ray.execution.placement import gang_devices
from llem_ray.execution.ray.base import require_cpus
from llem_ray.planning.packing import Seat


def device(uuid: str, index: int = 0, scope: Scope = "gpu", method: Method = "measured_counter") -> Device:
    return Device(uuid=uuid, name=uuid, source="s", scope=scope, method=method, index=index)


GPUS = tuple(device(f"GPU-{i}", i) for i in range(4))
CPU, DRAM = device("rapl:0", scope="cpu_package"), device("rapl:0:dram", scope="dram")
ESTIMATE = device("codecarbon:cpu", scope="cpu_package", method="estimated_model")


def leased(*gpu_ids: str) -> Leased:
    return Leased(node="n", hostname="host", pid=1, gpu_ids=gpu_ids)


@pytest.mark.parametrize("ids", [("2", "1"), ("GPU-2", "GPU-1")])
def test_gpus_by_index_or_uuid(ids: tuple[str, ...]) -> None:
    held, context, reason = gang_devices([leased(*ids)], 2, (*GPUS, CPU))
    assert [gpu.uuid for gpu in held] == ["GPU-2", "GPU-1"]
    assert [other.uuid for other in context] == ["GPU-0", "GPU-3", "rapl:0"]
    assert reason is None


def test_a_cpu_gang_answers_for_what_measures_its_host() -> None:
    held, context, reason = gang_devices([leased()], 0, (*GPUS, CPU, DRAM, ESTIMATE))
    assert held == (CPU, DRAM)
    assert context == (*GPUS, ESTIMATE)
    assert reason is None


def test_a_socket_that_cannot_be_read_is_the_gang_s_all_the_same() -> None:
    """Its energy is missing then, and the total says so: half of a host is not its energy."""
    silent = device("rapl:1", scope="cpu_package", method="unavailable")
    held, _, reason = gang_devices([leased()], 0, (CPU, silent, DRAM, ESTIMATE))
    assert held == (CPU, silent, DRAM)
    assert reason is None


def test_memory_that_no_counter_counts_is_outside_the_boundary() -> None:
    masked = device("rapl:0:dram", scope="dram", method="unavailable")
    assert gang_devices([leased()], 0, (CPU, masked))[0] == (CPU,)


def test_memory_alone_is_not_the_energy_of_a_gang_on_the_cpu() -> None:
    silent = device("rapl:0", scope="cpu_package", method="unavailable")
    held, context, reason = gang_devices([leased()], 0, (silent, DRAM, ESTIMATE))
    assert held == ()
    assert context == (silent, DRAM, ESTIMATE)
    assert reason is not None


def test_an_estimate_is_never_the_gang_s() -> None:
    held, context, reason = gang_devices([leased()], 0, (ESTIMATE,))
    assert held == ()
    assert context == (ESTIMATE,)
    assert reason is not None
    assert "host" in reason


@pytest.mark.parametrize("ids", [("7",), ("GPU-9",), ("0", "0"), ()])
def test_gpus_that_cannot_be_measured_or_are_held_twice_are_refused(ids: tuple[str, ...]) -> None:
    with pytest.raises(PlacementError, match="host"):
        gang_devices([leased(*ids)], max(len(ids), 1), GPUS)


def test_a_node_without_a_cpu_for_each_of_the_engine_s_own_actors_is_refused() -> None:
    known = [{"NodeID": "a", "Resources": {"CPU": 2.0, "GPU": 2.0}}, {"NodeID": "b", "Resources": {"GPU": 2.0}}]
    require_cpus([Seat(node="a", gpus=2)], known)
    with pytest.raises(PlacementError, match="node b has 0 CPUs in Ray, the engine's workers there need 2"):
        require_cpus([Seat(node="a", gpus=2), Seat(node="b", gpus=2)], known)
