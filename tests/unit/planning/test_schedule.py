"""Which gangs start when."""

from __future__ import annotations

import pytest
from clusters import EXCLUSIVES, check_schedule, gang, room, sweeps
from hypothesis import given
from hypothesis import strategies as st

from llem_ray.core.errors import PlacementError
from llem_ray.core.measure_spec import Exclusive
from llem_ray.planning import GangRequest, NodeRoom, Running, Schedule, Seat, Start, next_starts, simulate

Cluster = tuple[NodeRoom, ...]


def keys(starts: tuple[tuple[GangRequest, tuple[Seat, ...]], ...]) -> list[str]:
    return [request.key for request, _ in starts]


def rooms_now(nodes: Cluster, running: list[Start]) -> list[NodeRoom]:
    """What a caller sees who counts for itself."""
    here = {one.node: [seat.gpus for start in running for seat in start.seats if seat.node == one.node] for one in nodes}
    return [
        room(
            one.node,
            one.gpus,
            one.gpus - sum(here[one.node]),
            len(here[one.node]),
            gpu_type=one.gpu_type,
            cpu_gangs=here[one.node].count(0),
        )
        for one in nodes
    ]


def replay(
    requests: list[GangRequest], nodes: Cluster, exclusive: Exclusive, true_s: dict[str, float], ends_known: bool = True
) -> Schedule:
    """``simulate`` as a caller of ``next_starts`` would do it."""
    pending, running, starts, now_s = list(requests), list[Start](), list[Start](), 0.0
    expected_s = {request.key: request.duration_s for request in requests}
    while pending or running:
        known = [Running(key=one.key, seats=one.seats, end_s=one.start_s + expected_s[one.key]) for one in running]
        begun = next_starts(pending, rooms_now(nodes, running), exclusive, known if ends_known else (), now_s)
        assert begun or running, "nothing runs and nothing starts"
        for request, seats in begun:
            pending.remove(request)
            running.append(Start(request.key, now_s, now_s + true_s[request.key], seats))
            starts.append(running[-1])
        now_s = min(one.end_s for one in running)
        running = [one for one in running if one.end_s > now_s]
    return Schedule(makespan_s=now_s, starts=tuple(starts))


@given(sweep=sweeps(), exclusive=st.sampled_from(EXCLUSIVES), data=st.data())
def test_a_simulation_is_what_next_starts_gives(
    sweep: tuple[Cluster, list[GangRequest]], exclusive: Exclusive, data: st.DataObject
) -> None:
    nodes, requests = sweep
    true_s = {request.key: float(data.draw(st.integers(1, 30))) for request in requests}
    schedule = simulate(requests, nodes, exclusive, true_s)
    check_schedule(schedule, requests, nodes, exclusive)
    assert schedule == replay(requests, nodes, exclusive, true_s)


@given(sweep=sweeps(), exclusive=st.sampled_from(EXCLUSIVES))
def test_a_sweep_ends_where_no_ends_are_known(sweep: tuple[Cluster, list[GangRequest]], exclusive: Exclusive) -> None:
    nodes, requests = sweep
    durations_s = {request.key: request.duration_s for request in requests}
    check_schedule(replay(requests, nodes, exclusive, durations_s, ends_known=False), requests, nodes, exclusive)


@given(sweep=sweeps(), exclusive=st.sampled_from(EXCLUSIVES))
def test_those_that_go_ahead_do_not_delay_the_first_that_waits(
    sweep: tuple[Cluster, list[GangRequest]], exclusive: Exclusive
) -> None:
    nodes, requests = sweep
    schedule = {start.key: start.start_s for start in simulate(requests, nodes, exclusive).starts}
    for number, request in enumerate(requests):
        if schedule[request.key] > 0:
            alone = {start.key: start.start_s for start in simulate(requests[: number + 1], nodes, exclusive).starts}
            assert schedule[request.key] <= alone[request.key]
            break


@pytest.mark.parametrize("exclusive", ["none", "node"])
@pytest.mark.parametrize("ends_known", [True, False])
@pytest.mark.parametrize("large", [gang(8, key="large"), gang(16, 2, key="large"), gang(24, 3, key="large")])
@pytest.mark.parametrize("overrun", [1.0, 3.0])
def test_a_large_gang_does_not_starve_behind_small_ones(
    exclusive: Exclusive, ends_known: bool, large: GangRequest, overrun: float
) -> None:
    nodes = tuple(room(f"n{number}", 8) for number in range(4))
    early = [gang(1, key=f"early{number}", duration_s=3.0 + number % 5) for number in range(40)]
    late = [gang(1, key=f"late{number}", duration_s=2.0 + number % 7) for number in range(400)]
    requests = [*early, large, *late]
    true_s = {request.key: request.duration_s * overrun for request in requests}
    schedule = replay(requests, nodes, exclusive, true_s, ends_known)
    before = [start.key for start in schedule.starts[: [start.key for start in schedule.starts].index("large")]]
    assert sum(key.startswith("late") for key in before) < 100
    check_schedule(schedule, requests, nodes, exclusive)


def test_one_goes_ahead_only_if_it_ends_before_or_is_not_in_the_way() -> None:
    nodes = [room("a", 8, 4, 1)]
    running = [Running(key="r", seats=(Seat(node="a", gpus=4),), end_s=110.0)]
    large, short, long = gang(6, key="large"), gang(4, key="short", duration_s=10.0), gang(3, key="long", duration_s=10.5)
    beside = [gang(1, key=f"beside{number}", duration_s=99.0) for number in range(3)]
    assert keys(next_starts([large, short], nodes, "none", running, 100.0)) == ["short"]
    assert keys(next_starts([large, long], nodes, "none", running, 100.0)) == []
    assert keys(next_starts([large, *beside], nodes, "none", running, 100.0)) == ["beside0", "beside1"]
    assert keys(next_starts([large, short], nodes, "none", now_s=100.0)) == []


def test_a_shorter_gang_of_a_shape_goes_ahead_of_its_like() -> None:
    nodes = [room("a", 8, 4, 1)]
    running = [Running(key="r", seats=(Seat(node="a", gpus=4),), end_s=10.0)]
    pending = [gang(8, key="large"), gang(4, key="long", duration_s=20.0), gang(4, key="short", duration_s=10.0)]
    assert keys(next_starts(pending, nodes, "none", running)) == ["short"]


def test_an_overdue_gang_keeps_its_nodes_closed() -> None:
    nodes = [room("a", 8, 4, 1)]
    running = [Running(key="r", seats=(Seat(node="a", gpus=4),), end_s=90.0)]
    assert keys(next_starts([gang(8, key="large"), gang(1, key="small")], nodes, "none", running, 100.0)) == []


def test_other_nodes_stay_open_while_one_is_kept() -> None:
    nodes = [room("a", 8, 6, 1), room("b", 8, 3, 2)]
    assert keys(next_starts([gang(8, key="large"), *(gang(1, key=f"{n}") for n in range(5))], nodes, "none")) == ["0", "1", "2"]


@pytest.mark.parametrize("blocked", [gang(8, key="foreign"), gang(16, 1, key="never")])
def test_what_no_end_of_ours_helps_keeps_nobody_waiting(blocked: GangRequest) -> None:
    nodes = [room("a", 8, 7)]
    assert keys(next_starts([blocked, gang(1, key="small")], nodes, "none")) == ["small"]
    assert keys(next_starts([blocked, gang(1, key="small")], nodes, "node")) == ["small"]
    assert keys(next_starts([blocked, gang(1, key="small")], nodes, "cluster")) == ["small"]


def test_nothing_starts_twice_and_seats_do_not_overlap() -> None:
    pending = [gang(4, key=f"{number}") for number in range(5)]
    begun = next_starts(pending, [room("a", 8), room("b", 8)], "none")
    assert keys(begun) == ["0", "1", "2", "3"]
    assert [seat.node for _, seats in begun for seat in seats] == ["a", "a", "b", "b"]
    assert keys(next_starts(pending, [room("a", 8), room("b", 8)], "node")) == ["0", "1"]
    assert keys(next_starts(pending, [room("a", 8), room("b", 8)], "cluster")) == ["0"]


def test_a_gang_on_a_node_that_is_gone_is_passed_over() -> None:
    running = [Running(key="r", seats=(Seat(node="gone", gpus=8), Seat(node="a", gpus=8)), end_s=5.0)]
    assert keys(next_starts([gang(8, key="large")], [room("a", 8, 0, 1)], "none", running)) == []


def test_a_waiting_gang_on_the_cpu_gets_its_turn() -> None:
    nodes = (room("a", 2),)
    requests = [gang(0, key="first", duration_s=5.0), gang(0, key="second"), *(gang(1, key=f"{n}") for n in range(6))]
    for exclusive in ("none", "node"):
        schedule = simulate(requests, nodes, exclusive)
        check_schedule(schedule, requests, nodes, exclusive)
        assert {start.key: start.start_s for start in schedule.starts}["second"] == 5.0


def test_a_simulation_begins_with_empty_nodes() -> None:
    assert simulate([gang(4)], [room("a", 4, 0, 3)], "node").makespan_s == 1.0
    assert simulate([], [room("a", 4)], "node") == Schedule(makespan_s=0.0, starts=())


def test_what_can_never_run_is_refused() -> None:
    with pytest.raises(PlacementError, match="load group g needs 8 GPUs on one node; the largest node has 4"):
        simulate([gang(8, 1)], [room("a", 4)], "node")
