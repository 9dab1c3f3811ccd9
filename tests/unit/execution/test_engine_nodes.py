"""Nodes that are for one engine: who checks which engine, and what an autoscaler is asked for."""

from __future__ import annotations

from importlib import import_module

import pytest
from fake_samplers import FakeCluster

from llem_ray.core.measure_spec import MeasureSpec
from llem_ray.core.plan import LoadGroup, Trial
from llem_ray.core.spec import Cell, EngineSpec, Experiment, ModelSpec
from llem_ray.core.workload_spec import WorkloadSpec
from llem_ray.execution.calls import Node
from llem_ray.execution.dispatch import gang_request, placement_problem
from llem_ray.execution.fleet import Fleet
from llem_ray.execution.ray.base import BACKEND_LABEL, as_node, checking_nodes
from llem_ray.execution.ray.cluster import wanted_nodes
from llem_ray.execution.ray.runtime import import_ray
from llem_ray.planning.packing import NodeRoom
from llem_ray.testing.clock import VirtualClock


def group(backend: str, gpus: int, nodes: int | None = None) -> LoadGroup:
    engine = EngineSpec(backend=backend, gpus=gpus or None, nodes=nodes, device="cuda" if gpus else "cpu")
    experiment = Experiment(model=ModelSpec(config="llama-tiny"), engine=engine, workload=WorkloadSpec())
    cell = Cell(cell_id=f"{backend}{gpus}", experiment=experiment, settings={})
    return LoadGroup(load_key=f"{backend}-{gpus}", trials=(Trial(trial_id="t-r0", cell=cell, repeat=0),), gpus=gpus)


def node(name: str, gpus: int, backend: str | None = None) -> Node:
    return Node(node_id=name, hostname=name, address="10.0.0.1", gpus=gpus, backend=backend)


MEASURE = MeasureSpec()
HEAD, VLLM, TORCH, ANY = node("head", 0, "none"), node("v", 8, "vllm"), node("t", 8, "transformers"), node("a", 8)


def checkers(nodes: list[Node], *groups: LoadGroup) -> dict[str, list[str]]:
    return {one.node_id: [each.load_key for each in mine] for one, mine in checking_nodes(nodes, groups)}


def test_the_label_of_a_node_is_its_engine() -> None:
    entry = {"NodeID": "n", "NodeManagerHostname": "h", "NodeManagerAddress": "10.0.0.1", "Resources": {"GPU": 8.0}}
    assert as_node(entry).backend is None
    assert as_node(entry | {"Labels": {BACKEND_LABEL: "vllm"}}).backend == "vllm"
    assert as_node(entry | {"Labels": {BACKEND_LABEL: ""}}).backend is None


def test_each_engine_is_checked_on_a_node_that_takes_it() -> None:
    groups = [group("vllm", 8), group("transformers", 1), group("transformers", 0)]
    assert checkers([HEAD, VLLM, TORCH], *groups) == {"v": ["vllm-8"], "t": ["transformers-1", "transformers-0"]}
    assert checkers([HEAD, VLLM], *groups) == {"v": ["vllm-8"]}
    assert checkers([node("head", 0), ANY], *groups) == {"head": ["transformers-0"], "a": ["vllm-8", "transformers-1"]}


def test_an_autoscaler_is_asked_for_the_largest_gang_of_every_engine() -> None:
    groups = [group("vllm", 2), group("vllm", 8, nodes=2), group("transformers", 1), group("fake", 0)]
    bundles, selectors = wanted_nodes(groups, {"none"})
    assert bundles == [{"GPU": 4}, {"GPU": 4}, {"GPU": 1}, {"CPU": 1}]
    assert selectors is not None
    assert [next(iter(selector)) for selector in selectors] == [BACKEND_LABEL] * 4
    assert wanted_nodes(groups, ()) == ([{"GPU": 4}, {"GPU": 4}], None)


@pytest.mark.parametrize("label", ["none", "vllm", "tensorrt", "transformers", "mine", "fake"])
def test_an_autoscaler_may_start_nodes_of_the_engine_and_unlabelled_ones(label: str) -> None:
    """As Ray itself reads the selector. A head that is for none says nothing of the nodes to come."""
    import_ray()
    matches = import_module("ray._raylet").node_labels_match_selector
    _, selectors = wanted_nodes([group("vllm", 1), group("fake", 0)], {"none", "mine"})
    assert selectors is not None
    assert [matches({}, selector) for selector in selectors] == [True, True]
    assert [matches({BACKEND_LABEL: label}, selector) for selector in selectors] == [label == "vllm", label == "fake"]


def test_a_fleet_tells_the_engines_of_its_nodes() -> None:
    cluster = FakeCluster(VirtualClock())
    cluster.add("n1", cluster.sampler("h1", "G0"), gpus=1)
    cluster.members["n1"] = node("n1", 1, "vllm")
    meter = cluster.meter()
    fleet = Fleet(cluster, meter, cluster.clock, lambda _: None)  # type: ignore[arg-type]
    meter.open(fleet.start())
    assert [room.backend for room in fleet.rooms()] == ["vllm"]


def test_a_sweep_for_an_engine_that_no_node_takes_is_refused() -> None:
    rooms = [NodeRoom(node=one.node_id, gpus=one.gpus, free_gpus=one.gpus, gangs=0, backend=one.backend) for one in (HEAD, VLLM)]
    wanted = group("transformers", 1)
    problem = placement_problem(wanted, gang_request(wanted, wanted.trials, MEASURE), rooms)
    assert "needs a node for engine transformers; the nodes are for none, vllm" in str(problem)
    taken = group("vllm", 8)
    assert placement_problem(taken, gang_request(taken, taken.trials, MEASURE), rooms) is None
