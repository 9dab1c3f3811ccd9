"""When gangs start: now, and in a simulation of the whole sweep by which their order is chosen."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llem_ray.core.errors import PlacementError
from llem_ray.core.measure_spec import Exclusive
from llem_ray.planning.packing import GangRequest, Need, NodeRoom, Rooms, Seat, Shape, emptied, why_infeasible


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A gang that runs now."""

    key: str
    seats: tuple[Seat, ...]
    end_s: float
    """Expected, on the clock of ``now_s``; one that has passed counts as now."""


class Start(NamedTuple):
    """A gang's place in a schedule. Times count from the schedule's begin."""

    key: str
    start_s: float
    end_s: float
    seats: tuple[Seat, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """What a simulation did."""

    makespan_s: float
    starts: tuple[Start, ...]
    """In the order of their starts."""


def next_starts(
    pending: Sequence[GangRequest],
    nodes: Sequence[NodeRoom],
    exclusive: Exclusive,
    running: Sequence[Running] = (),
    now_s: float = 0.0,
) -> tuple[tuple[GangRequest, tuple[Seat, ...]], ...]:
    """Which of the pending gangs to start now, and where.

    EASY backfilling (Mu'alem and Feitelson 2001, doi:10.1109/71.932708): the first gang of the order that must wait gets a
    reservation on the nodes that come free for it first. Others go ahead of it on other nodes, on GPUs it leaves over, or when
    they are expected to end before it can start. So no gang waits for ever behind later ones, even where no ends are known: then
    the nodes with the most free GPUs are kept for it. A gang that the nodes could never hold, or that only waits for GPUs that
    others than our gangs hold, keeps nobody waiting.

    Args:
        pending: In priority order.
        nodes: What there is and is free now.
        exclusive: What a gang has to itself.
        running: Those of the gangs on the nodes whose ends are known.
        now_s: The time now.
    """
    agenda = Agenda(nodes, exclusive)
    for gang in running:
        agenda.expect(gang)
    return tuple(agenda.starts(Queue(pending), now_s))


def simulate(
    requests: Sequence[GangRequest],
    nodes: Sequence[NodeRoom],
    exclusive: Exclusive,
    true_s: Mapping[str, float] | None = None,
) -> Schedule:
    """All gangs from first to last on the nodes, empty at first, each event answered as ``next_starts`` does.

    Args:
        requests: In priority order.
        nodes: What there is; what is not free now is taken to be.
        exclusive: What a gang has to itself.
        true_s: By key, how long gangs really take; only ``duration_s`` is known in advance. Default: these are true.

    Raises:
        PlacementError: The nodes could never hold one of them.
    """
    agenda, queue = Agenda(emptied(nodes), exclusive), Queue(requests)
    for request in requests:
        if agenda.rooms.need(request) is None:
            raise PlacementError(f"load group {request.key} {why_infeasible(request, nodes)}")
    starts: list[Start] = []
    ends: list[tuple[float, int, Running]] = []
    now_s = 0.0
    while True:
        for request, seats in agenda.starts(queue, now_s):
            length_s = request.duration_s if true_s is None else true_s[request.key]
            gang = Running(key=request.key, seats=seats, end_s=now_s + request.duration_s)
            heapq.heappush(ends, (now_s + length_s, len(starts), gang))
            starts.append(Start(request.key, now_s, now_s + length_s, seats))
        if not ends:
            return Schedule(makespan_s=now_s, starts=tuple(starts))
        now_s = ends[0][0]
        while ends and ends[0][0] <= now_s:
            agenda.end(heapq.heappop(ends)[2])


class Queue:
    """Pending gangs by shape, each shape in priority order.

    Args:
        pending: In priority order.
    """

    def __init__(self, pending: Iterable[GangRequest]) -> None:
        self.lines: dict[Shape, list[tuple[int, GangRequest]]] = {}
        for rank, request in enumerate(pending):
            self.lines.setdefault(request.shape, []).append((rank, request))
        for line in self.lines.values():
            line.reverse()  # the first is last, where removing it costs nothing

    def heads(self) -> list[tuple[int, Shape]]:
        """Rank and shape of each shape's first gang, as a heap."""
        heads = [(line[-1][0], shape) for shape, line in self.lines.items() if line]
        heapq.heapify(heads)
        return heads

    def first_within(self, shape: Shape, most_s: float) -> GangRequest | None:
        """Take out the shape's first gang that is expected to last no longer."""
        line = self.lines[shape]
        for place in range(len(line) - 1, -1, -1):
            if line[place][1].duration_s <= most_s:
                return line.pop(place)[1]
        return None


@dataclass(slots=True)
class Reservation:
    """Nodes kept for a gang that must wait."""

    begin_s: float
    """When it can start; -inf when that is not known, so that nobody ends before."""
    spare: dict[int, int] = field(default_factory=dict)
    """By position of its nodes: GPUs that it will leave over; -1 where it shares with nobody."""

    def closed(self, share: int) -> set[int]:
        """Nodes where a share would be in its way."""
        return {number for number, spare in self.spare.items() if spare < share}

    def use(self, found: Iterable[int], share: int) -> None:
        """A gang that may outlast ``begin_s`` starts there."""
        for number in found:
            if number in self.spare:
                self.spare[number] -= share


class Agenda:
    """Rooms, and when what is taken comes free.

    Args:
        nodes: What there is and is free.
        exclusive: What a gang has to itself.
    """

    def __init__(self, nodes: Sequence[NodeRoom], exclusive: Exclusive) -> None:
        self.rooms = Rooms(nodes, exclusive)
        self._ends: list[dict[str, tuple[float, int]]] = [{} for _ in nodes]
        self._free_from: list[dict[int, float | None]] = [{} for _ in nodes]

    def expect(self, gang: Running) -> None:
        """The end of a gang that holds its seats already. Seats on nodes that are gone are passed over."""
        for seat in gang.seats:
            number = self.rooms.positions.get(seat.node)
            if number is not None:
                self._ends[number][gang.key] = (gang.end_s, seat.gpus)
                self._free_from[number].clear()

    def end(self, gang: Running) -> None:
        """The gang has ended."""
        self.rooms.release(gang.seats)
        for seat in gang.seats:
            number = self.rooms.positions[seat.node]
            del self._ends[number][gang.key]
            self._free_from[number].clear()

    def starts(self, queue: Queue, now_s: float) -> list[tuple[GangRequest, tuple[Seat, ...]]]:
        """Take out of the queue what starts now, and give it its seats."""
        started: list[tuple[GangRequest, tuple[Seat, ...]]] = []
        heads, kept = queue.heads(), None
        while heads:
            _, shape = heapq.heappop(heads)
            line = queue.lines[shape]
            need = self.rooms.need(line[-1][1])
            if need is None:
                continue
            request, found = self._first(queue, shape, need, kept, now_s)
            if request is not None and found is not None:
                seats = self.rooms.seats(need, found)
                self.rooms.take(seats)
                self.expect(Running(key=request.key, seats=seats, end_s=now_s + request.duration_s))
                started.append((request, seats))
                if line:
                    heapq.heappush(heads, (line[-1][0], shape))
            elif kept is None:
                kept = self._reserve(need, now_s)
        return started

    def _first(
        self, queue: Queue, shape: Shape, need: Need, kept: Reservation | None, now_s: float
    ) -> tuple[GangRequest | None, tuple[int, ...] | None]:
        """The first gang of that shape that may start now, taken out of the queue, and the nodes it gets."""
        found = self.rooms.find(need)
        if found is None:
            return None, None
        line = queue.lines[shape]
        if kept is None:
            return line.pop()[1], found
        slack_s = kept.begin_s - now_s
        if line[-1][1].duration_s <= slack_s:
            return line.pop()[1], found
        beside = self.rooms.find(need, kept.closed(need.share))
        if beside is not None:
            kept.use(beside, need.share)
            return line.pop()[1], beside
        return queue.first_within(shape, slack_s), found

    def _reserve(self, need: Need, now_s: float) -> Reservation | None:
        """The nodes that come free first for a gang that must wait; None when it does not wait for our gangs."""
        if self.rooms.exclusive == "cluster":
            return None
        best: list[tuple[float, int, int]] | None = None
        for group in need.groups:
            times = [
                (max(free_s, now_s), -self.rooms.free[number], number)
                for number in group
                if (free_s := self._free_s(number, need.share)) is not None
            ]
            if len(times) >= need.count:
                chosen = [min(times)] if need.count == 1 else sorted(times)[: need.count]
                best = chosen if best is None else min(best, chosen, key=lambda one: one[-1])
        if best is None:
            return None
        begin_s = best[-1][0]
        spare = {number: self._spare(number, need.share, begin_s) for _, _, number in best}
        return Reservation(begin_s=begin_s if begin_s < math.inf else -math.inf, spare=spare)

    def _free_s(self, number: int, share: int) -> float | None:
        """When a share of the node comes free: -inf now, inf when the ends are not known, None: not by our gangs' ends."""
        known = self._free_from[number]
        if share not in known:
            known[share] = self._find_free_s(number, share)
        return known[share]

    def _find_free_s(self, number: int, share: int) -> float | None:
        rooms = self.rooms
        if rooms.holds(number, share):
            return -math.inf
        ends = sorted(self._ends[number].values())
        all_known = len(ends) >= rooms.gangs[number]
        if rooms.exclusive == "none" and share:
            free = rooms.free[number]
            for end_s, gpus in ends:
                free += gpus
                if free >= share:
                    return end_s
            return None if all_known else math.inf
        if not all_known:
            return math.inf
        if rooms.free[number] + sum(gpus for _, gpus in ends) < share or not ends:
            return None
        alone = rooms.exclusive == "node" or rooms.nodes[number].cpu_gangs is None
        return max((end_s for end_s, gpus in ends if alone or not gpus), default=math.inf)

    def _spare(self, number: int, share: int, begin_s: float) -> int:
        if self.rooms.exclusive != "none" or not share or begin_s == math.inf:
            return -1
        return self.rooms.free[number] + sum(gpus for end_s, gpus in self._ends[number].values() if end_s <= begin_s) - share
