"""In which order gangs should start, and the time that no order can beat."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Final

from llem_ray.core.errors import PlacementError
from llem_ray.core.identity import digest
from llem_ray.core.measure_spec import Exclusive
from llem_ray.planning.packing import GangRequest, Need, NodeRoom, Rooms, emptied, why_infeasible
from llem_ray.planning.schedule import Schedule, simulate

EXPONENTS: Final = (0.0, 0.25, 0.5, 1.0, 2.0)
"""Rules sort by GPUs ** exponent x duration: 0 is longest first, 1 largest area first."""
NEAR: Final = 1.2
"""Durations within this factor may change places."""
SHUFFLES: Final = 2
"""Shuffles of near-equal gangs, for each rule."""
PROMOTIONS: Final = 24
"""Times that the gang which ends last is moved to the front, at most."""
SIMULATED: Final = 4_000_000
"""Gangs x nodes to simulate at most, so that the largest sweeps take seconds; where this allows one order, it is taken unseen."""
TINY_S: Final = 1e-9
SAME: Final = 1e-6
"""Makespans that differ by less are equal."""


def order_requests(
    requests: Sequence[GangRequest], nodes: Sequence[NodeRoom], exclusive: Exclusive, seed: int
) -> tuple[GangRequest, ...]:
    """Priority order by which the gangs should be started: of several, the one with the smallest simulated makespan.

    Tried are: sorted by GPUs ** exponent x duration, for some exponents; most GPUs first, then longest; shuffles of near-equal
    ones of these; shuffled wholly. Of orders that take the same time the most mixed counts, so that nothing is sorted without
    need. Then the gang that ends last is moved to the front, as long as that helps. Gangs that a rule holds equal are ordered by
    a hash of seed and key: cells that cost the same do not run in the order of their axis values, and a drift over time is not
    taken for the effect of an axis. Equal arguments give equal orders, whatever the order of ``requests``.

    Gangs that the nodes could never hold come last.
    """
    rooms = Rooms(emptied(nodes), exclusive)
    able = [request for request in requests if rooms.need(request) is not None]
    unable = [request for request in requests if rooms.need(request) is None]
    trials = max(1, SIMULATED // max(1, len(able) * len(nodes)))
    orders = list(islice(_orders(able, seed), trials))
    if len(orders) == 1 or not able:
        return (*orders[0], *_shuffled(unable, f"{seed}"))
    done = [simulate(order, nodes, exclusive) for order in orders]
    shortest_s = min(schedule.makespan_s for schedule in done)
    best = max(number for number, schedule in enumerate(done) if schedule.makespan_s <= shortest_s * (1 + SAME))
    promoted = _promote(orders[best], done[best], nodes, exclusive, trials - len(orders))
    return (*promoted, *_shuffled(unable, f"{seed}"))


def lower_bound_s(requests: Sequence[GangRequest], nodes: Sequence[NodeRoom], exclusive: Exclusive) -> float:
    """A makespan that no schedule can beat.

    The nodes are cut into places of a size, of which each gang that fits nowhere else takes one or more. The bound is the largest
    of: the longest gang; place-seconds over places; and, as whole gangs follow each other on a place, the sum of the ``k + 1``
    shortest of the ``k x places + 1`` longest takings, since some place sees ``k + 1`` of these.

    Raises:
        PlacementError: The nodes could never hold one of them.
    """
    rooms = Rooms(emptied(nodes), exclusive)
    needs = [(request.duration_s, _need(rooms, request)) for request in requests]
    if exclusive == "cluster":
        return math.fsum(duration_s for duration_s, _ in needs)
    bounds_s = [duration_s for duration_s, _ in needs]
    for where in {_nodes_of(need) for _, need in needs}:
        inside = [(duration_s, need) for duration_s, need in needs if _nodes_of(need) <= where]
        gpus = [rooms.nodes[number].gpus for number in where]
        if exclusive == "none":
            for size in {1, *(need.share for _, need in inside)} - {0}:
                taken = [(one_s, need.count * (need.share // size)) for one_s, need in inside]
                bounds_s.append(_places_s(taken, sum(one // size for one in gpus)))
            bounds_s.append(_places_s([(one_s, need.count) for one_s, need in inside if not need.share], len(gpus)))
        else:
            for size in {need.share for _, need in inside}:
                taken = [(one_s, need.count) for one_s, need in inside if need.share >= size]
                bounds_s.append(_places_s(taken, sum(one >= size for one in gpus)))
    return max(bounds_s, default=0.0)


def _places_s(taken: Sequence[tuple[float, int]], places: int) -> float:
    """The bound for gangs, as duration and places taken, of a number of places."""
    lengths_s = sorted(chain.from_iterable([one_s] * count for one_s, count in taken), reverse=True)
    if not lengths_s:
        return 0.0
    rounds = range(1, (len(lengths_s) - 1) // places + 1)
    stacks_s = [math.fsum(lengths_s[(places - 1) * done : places * done + 1]) for done in rounds]
    return max([math.fsum(lengths_s) / places, *stacks_s])


def _is_other(request: GangRequest, key: str) -> bool:
    return request.key != key


def _nodes_of(need: Need) -> frozenset[int]:
    return frozenset(chain.from_iterable(need.groups))


def _need(rooms: Rooms, request: GangRequest) -> Need:
    need = rooms.need(request)
    if need is None:
        raise PlacementError(f"load group {request.key} {why_infeasible(request, rooms.nodes)}")
    return need


def _orders(requests: Sequence[GangRequest], seed: int) -> Iterator[list[GangRequest]]:
    """The rules' orders, from the one to take where only one is tried to the most mixed ones."""
    mixed = _shuffled(requests, f"{seed}")
    yield sorted(mixed, key=partial(_rank, exponent=0.5))
    yield sorted(mixed, key=lambda request: (-request.gpus, -request.duration_s))
    for exponent in EXPONENTS:
        yield sorted(mixed, key=partial(_rank, exponent=exponent))
    for exponent in EXPONENTS:
        for number in range(SHUFFLES):
            yield sorted(_shuffled(requests, f"{seed}/{number}"), key=partial(_near_rank, exponent=exponent))
    yield mixed


def _rank(request: GangRequest, exponent: float) -> float:
    return -math.pow(max(request.gpus, 1), exponent) * request.duration_s


def _near_rank(request: GangRequest, exponent: float) -> int:
    return -round(math.log(max(-_rank(request, exponent), TINY_S), NEAR))


def _shuffled(requests: Sequence[GangRequest], seed: str) -> list[GangRequest]:
    return sorted(requests, key=lambda request: digest(f"{seed}/{request.key}", 64))


def _promote(
    order: list[GangRequest], schedule: Schedule, nodes: Sequence[NodeRoom], exclusive: Exclusive, trials: int
) -> list[GangRequest]:
    """The order, or a shorter one found by moving the gang that ends last to the front, time and again."""
    best, best_s, moved = order, schedule.makespan_s, set[str]()
    for _ in range(min(trials, PROMOTIONS)):
        last = max(schedule.starts, key=lambda start: start.end_s)
        if last.start_s == 0 or last.key in moved:
            break
        moved.add(last.key)
        order = sorted(order, key=partial(_is_other, key=last.key))
        schedule = simulate(order, nodes, exclusive)
        if schedule.makespan_s < best_s * (1 - SAME):
            best, best_s = order, schedule.makespan_s
    return best
