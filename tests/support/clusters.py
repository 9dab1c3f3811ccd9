"""Clusters and gangs for tests of packing, and what must hold of any schedule."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from llem_ray.core.measure_spec import Exclusive
from llem_ray.planning import GangRequest, NodeRoom, Schedule, Seat, why_infeasible
from llem_ray.planning.packing import same_gpu_type

EXCLUSIVES: tuple[Exclusive, ...] = ("node", "cluster", "none")


def room(node: str, gpus: int, free_gpus: int | None = None, gangs: int = 0, **more: object) -> NodeRoom:
    """Free, unless it is said otherwise."""
    return NodeRoom(node=node, gpus=gpus, free_gpus=gpus if free_gpus is None else free_gpus, gangs=gangs, **more)  # type: ignore[arg-type]


def gang(gpus: int, nodes: int | None = None, key: str = "g", **more: object) -> GangRequest:
    return GangRequest(key=key, gpus=gpus, nodes=nodes, **more)  # type: ignore[arg-type]


@st.composite
def clusters(draw: st.DrawFn) -> tuple[NodeRoom, ...]:
    """Free nodes of several sizes and types."""
    kinds = st.tuples(st.sampled_from([0, 1, 2, 4, 8]), st.sampled_from([None, "A100", "NVIDIA-H100"]))
    return tuple(
        room(f"n{number}", gpus, gpu_type=kind)
        for number, (gpus, kind) in enumerate(draw(st.lists(kinds, min_size=1, max_size=6)))
    )


@st.composite
def sweeps(draw: st.DrawFn) -> tuple[tuple[NodeRoom, ...], list[GangRequest]]:
    """A cluster, and gangs that it can hold."""
    nodes = draw(clusters())
    shapes = st.tuples(
        st.sampled_from([0, 1, 2, 3, 4, 8, 16]),
        st.sampled_from([None, None, 1, 2, 3]),
        st.sampled_from([None, None, "A100", "H100"]),
        st.integers(1, 20),
        st.frozensets(st.sampled_from([one.node for one in nodes]), max_size=2),
    )
    drawn = draw(st.lists(shapes, max_size=14))
    requests = [
        gang(gpus, count, key=f"g{number}", gpu_type=kind, duration_s=float(duration), avoid=avoid)
        for number, (gpus, count, kind, duration, avoid) in enumerate(drawn)
    ]
    return nodes, [request for request in requests if why_infeasible(request, nodes) is None]


def check_seats(request: GangRequest, seats: Sequence[Seat], nodes: Sequence[NodeRoom]) -> None:
    """They are what was asked for: all GPUs, evenly on distinct nodes, of the right type and of one type."""
    by_name = {one.node: one for one in nodes}
    there = [by_name[seat.node] for seat in seats]
    assert len({seat.node for seat in seats}) == len(seats) > 0
    assert sum(seat.gpus for seat in seats) == request.gpus
    assert len({seat.gpus for seat in seats}) == 1
    if request.nodes is not None:
        assert len(seats) == request.nodes
    if request.gpus:
        assert len({one.gpu_type for one in there}) == 1
    if request.gpu_type is not None:
        assert all(one.gpu_type is not None and same_gpu_type(one.gpu_type, request.gpu_type) for one in there)
    left = [one for one in nodes if one.node not in request.avoid]
    if why_infeasible(gang(request.gpus, len(seats), gpu_type=request.gpu_type), left) is None:
        assert not any(seat.node in request.avoid for seat in seats)


def check_schedule(schedule: Schedule, requests: Sequence[GangRequest], nodes: Sequence[NodeRoom], exclusive: Exclusive) -> None:
    """Every gang runs once, as asked for, and nobody takes what another has at that time."""
    wanted = {request.key: request for request in requests}
    assert sorted(start.key for start in schedule.starts) == sorted(wanted)
    assert schedule.makespan_s == max((start.end_s for start in schedule.starts), default=0.0)
    for start in schedule.starts:
        check_seats(wanted[start.key], start.seats, nodes)
        at_once = [one for one in schedule.starts if one.start_s <= start.start_s < one.end_s]
        taken = [seat for one in at_once for seat in one.seats]
        if exclusive == "cluster":
            assert len(at_once) == 1
        for node in nodes:
            here = [seat.gpus for seat in taken if seat.node == node.node]
            assert sum(here) <= node.gpus
            assert len(here) <= 1 or exclusive == "none"
            assert here.count(0) <= 1
