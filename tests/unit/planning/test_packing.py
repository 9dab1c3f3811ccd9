"""Where a gang may run, and where it is put."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from clusters import EXCLUSIVES, check_seats, clusters, gang, room, sweeps
from hypothesis import given
from hypothesis import strategies as st

from llem_ray.core.measure_spec import Exclusive
from llem_ray.planning import GangRequest, NodeRoom, Seat, seats_for, why_infeasible
from llem_ray.planning.packing import same_gpu_type

A4 = [room("a", 4, gpu_type="A100"), room("b", 4, gpu_type="A100")]
SORTED = [room("a", 4, backend="vllm"), room("b", 8, backend="transformers"), room("head", 0, backend="none")]
MIXED = [room("a", 8, gpu_type="A100"), room("b", 8, gpu_type="L40S")]


def names(seats: tuple[Seat, ...] | None) -> list[tuple[str, int]] | None:
    return None if seats is None else [(seat.node, seat.gpus) for seat in seats]


@pytest.mark.parametrize(
    ("request_", "nodes", "reason"),
    [
        (gang(1), [], "needs 1 GPU; there are no nodes"),
        (gang(0), [], "needs a node; there are no nodes"),
        (gang(0, 2), [], "needs 2 nodes; there are no nodes"),
        (gang(2), [room("a", 0)], "needs 2 GPUs; no node has any"),
        (gang(8, 1), A4, "needs 8 GPUs on one node; the largest node has 4"),
        (gang(16, 2), A4, "needs 8 GPUs on each of 2 nodes; the largest node has 4"),
        (gang(8, 1, gpu_type="A100"), A4, "needs 8 GPUs on one node; the largest node of type A100 has 4"),
        (gang(1, gpu_type="H100"), MIXED, "needs GPU type H100; there are A100, L40S"),
        (gang(1, gpu_type="H100"), [room("a", 1)], "needs GPU type H100; the nodes name none"),
        (gang(3, 3), A4, "needs 3 nodes, there are 2"),
        (gang(2, 2, gpu_type="L40S"), MIXED, "needs 2 nodes of type L40S, there is 1"),
        (gang(0, 3), A4, "needs 3 nodes, there are 2"),
        (gang(6, 4), A4, "6 GPUs cannot be spread evenly over 4 nodes"),
        (gang(16, 2), MIXED, "needs 2 nodes with 8 GPUs each and one GPU type; there is 1"),
        (gang(12), [*A4, room("c", 2)], "needs 12 GPUs, evenly on nodes of one GPU type; the nodes have 1 x 2, 2 x 4"),
        (gang(1, backend="tensorrt"), SORTED, "needs a node for engine tensorrt; the nodes are for none, transformers, vllm"),
        (gang(8, 1, backend="vllm"), SORTED, "needs 8 GPUs on one node; the largest node for engine vllm has 4"),
        (gang(2, 2, backend="vllm"), SORTED, "needs 2 nodes for engine vllm, there is 1"),
        (gang(1, backend="none"), SORTED, "needs 1 GPU; no node for engine none has any"),
        (gang(5, gpu_type="A100"), A4, "needs 5 GPUs, evenly on nodes of one GPU type; the nodes of type A100 have 2 x 4"),
    ],
)
def test_why_infeasible(request_: GangRequest, nodes: list[NodeRoom], reason: str) -> None:
    assert why_infeasible(request_, nodes) == reason
    assert all(seats_for(request_, nodes, exclusive) is None for exclusive in EXCLUSIVES)


def test_a_node_for_one_engine_takes_its_gangs_and_no_others() -> None:
    assert names(seats_for(gang(4, backend="vllm"), SORTED, "none")) == [("a", 4)]
    assert names(seats_for(gang(4, backend="transformers"), SORTED, "none")) == [("b", 4)]
    assert names(seats_for(gang(0, backend="vllm"), SORTED, "none")) == [("a", 0)]
    assert names(seats_for(gang(4, backend="sglang"), [*SORTED, room("c", 4)], "none")) == [("c", 4)]


def test_a_busy_cluster_is_not_an_infeasible_one() -> None:
    busy = [room("a", 4, free_gpus=0, gangs=1)]
    assert why_infeasible(gang(4), busy) is None
    assert seats_for(gang(4), busy, "none") is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("H100", "H100", True),
        ("h100", "H100", True),
        ("NVIDIA-H100", "H100", True),
        ("H100", "nvidia-h100", True),
        ("A100-80G", "A100", False),
        ("GH100", "H100", False),
        ("A100", "H100", False),
    ],
)
def test_same_gpu_type(one: str, other: str, same: bool) -> None:
    assert same_gpu_type(one, other) is same
    assert (why_infeasible(gang(1, gpu_type=one), [room("a", 1, gpu_type=other)]) is None) is same


def test_shared_nodes_are_filled_up() -> None:
    nodes = [room("a", 8), room("b", 8, 2, 1), room("c", 8, 4, 1), room("d", 8, 1, 1)]
    assert names(seats_for(gang(2), nodes, "none")) == [("b", 2)]
    assert names(seats_for(gang(3), nodes, "none")) == [("c", 3)]
    assert names(seats_for(gang(8), nodes, "none")) == [("a", 8)]


def test_an_exclusive_gang_takes_the_smallest_empty_node() -> None:
    nodes = [room("a", 8), room("b", 4), room("c", 2), room("d", 4, 3, 1)]
    assert names(seats_for(gang(3), nodes, "node")) == [("b", 3)]
    assert names(seats_for(gang(5), nodes, "node")) == [("a", 5)]


def test_gpus_that_others_hold_are_not_taken_on_an_empty_node() -> None:
    assert seats_for(gang(4), [room("a", 4, free_gpus=3)], "node") is None


def test_one_gang_at_a_time_in_the_cluster() -> None:
    assert seats_for(gang(1), [room("a", 8), room("b", 8, 7, 1)], "cluster") is None
    assert names(seats_for(gang(1), [room("a", 8), room("b", 4)], "cluster")) == [("b", 1)]


def test_a_gang_is_spread_evenly_over_nodes_of_one_type() -> None:
    nodes = [room("a", 8, gpu_type="A100"), room("b", 8, gpu_type="H100"), room("c", 8, gpu_type="H100")]
    assert names(seats_for(gang(16), nodes, "node")) == [("b", 8), ("c", 8)]
    assert names(seats_for(gang(16, 2), nodes, "none")) == [("b", 8), ("c", 8)]
    assert names(seats_for(gang(2, 2), nodes, "node")) == [("b", 1), ("c", 1)]


def test_as_few_nodes_as_hold_it_even_if_more_are_free() -> None:
    nodes = [room("a", 8, 4, 1), room("b", 8, 4, 1)]
    assert seats_for(gang(8), nodes, "none") is None
    assert names(seats_for(gang(8, 2), nodes, "none")) == [("a", 4), ("b", 4)]


def test_nodes_it_failed_on_are_a_last_resort() -> None:
    nodes = [room("a", 4), room("b", 8), room("c", 8, 0, 1)]
    avoiding = gang(4, avoid=frozenset({"a"}))
    assert names(seats_for(avoiding, nodes, "node")) == [("b", 4)]
    # "b" is not free, but will be.
    assert seats_for(avoiding, [nodes[0], nodes[2]], "node") is None
    assert names(seats_for(avoiding, nodes[:1], "node")) == [("a", 4)]
    assert names(seats_for(gang(8, avoid=frozenset({"b", "c"})), nodes, "node")) == [("b", 8)]


def test_gangs_on_the_cpu_run_one_by_one_on_a_node() -> None:
    nodes = [room("a", 8, 7, 1, cpu_gangs=0), room("b", 0, 0, 1, cpu_gangs=1)]
    assert names(seats_for(gang(0), nodes, "none")) == [("a", 0)]
    assert seats_for(gang(0), nodes, "node") is None
    assert names(seats_for(gang(0), [room("a", 8), room("b", 0)], "node")) == [("b", 0)]
    assert names(seats_for(gang(0, 2), [room("a", 8), room("b", 0)], "node")) == [("b", 0), ("a", 0)]


def test_a_gang_of_unknown_kind_may_be_on_the_cpu() -> None:
    assert seats_for(gang(0), [room("a", 8, 7, 1)], "none") is None


@given(sweep=sweeps(), exclusive=st.sampled_from(EXCLUSIVES), data=st.data())
def test_seats_are_found_exactly_where_there_are_any(
    sweep: tuple[tuple[NodeRoom, ...], list[GangRequest]], exclusive: Exclusive, data: st.DataObject
) -> None:
    empty, requests = sweep
    free = [data.draw(st.integers(0, one.gpus)) for one in empty]
    gangs = [data.draw(st.integers(0 if left == one.gpus else 1, 2)) for one, left in zip(empty, free, strict=True)]
    nodes = [dataclasses.replace(one, free_gpus=left, gangs=some) for one, left, some in zip(empty, free, gangs, strict=True)]
    for request in requests:
        seats = seats_for(request, nodes, exclusive)
        on_empty = seats_for(request, empty, exclusive)
        assert on_empty is not None
        check_seats(request, on_empty, empty)
        if seats is not None:
            check_seats(request, seats, nodes)
            assert len(seats) == len(on_empty)
            taken = {seat.node: seat.gpus for seat in seats}
            assert all(taken.get(one.node, 0) <= one.free_gpus for one in nodes)
            assert exclusive != "node" or not any(one.gangs for one in nodes if one.node in taken)
            assert exclusive != "cluster" or not any(gangs)
        elif exclusive == "none" and request.gpus and not request.avoid:
            share = on_empty[0].gpus
            roomy = Counter(
                one.gpu_type
                for one in nodes
                if one.free_gpus >= share
                and (request.gpu_type is None or (one.gpu_type and same_gpu_type(one.gpu_type, request.gpu_type)))
            )
            assert max(roomy.values(), default=0) < len(on_empty)


@given(nodes=clusters(), gpus=st.integers(0, 32), count=st.none() | st.integers(1, 7))
def test_what_is_feasible_fits_the_empty_cluster(nodes: tuple[NodeRoom, ...], gpus: int, count: int | None) -> None:
    request = gang(gpus, count)
    for exclusive in EXCLUSIVES:
        assert (seats_for(request, nodes, exclusive) is None) == (why_infeasible(request, nodes) is not None)
