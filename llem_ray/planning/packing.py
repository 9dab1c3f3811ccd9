"""Which GPUs of which nodes a gang gets: evenly spread, on one GPU type, beside others only where that is allowed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from llem_ray.core.measure_spec import Exclusive

Shape: TypeAlias = tuple[int, int | None, str | None, str | None, frozenset[str]]
"""What decides where a gang may run: GPUs, nodes, GPU type, engine, nodes to avoid."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeRoom:
    """What one node has and has free."""

    node: str
    """Key, unique in the cluster."""
    gpus: int
    """Whole usable GPUs it has."""
    free_gpus: int
    """Those that nobody holds, our gangs or others."""
    gangs: int
    """Gangs on it now."""
    gpu_type: str | None = None
    """As Ray names it."""
    backend: str | None = None
    """The only engine whose gangs it takes; None: any."""
    cpu_gangs: int | None = None
    """Those of its gangs that run on the CPU; None when that is not known: each may be one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GangRequest:
    """What one load group needs."""

    key: str
    """Its load key; unique."""
    gpus: int
    """Whole GPUs on all its nodes together; 0 on the CPU."""
    nodes: int | None = None
    """Nodes it must be spread over, evenly; None: as few as hold its GPUs, even if more nodes were free earlier."""
    gpu_type: str | None = None
    """Type its nodes must have, see ``same_gpu_type``; None: any, the same on all its nodes."""
    backend: str | None = None
    """Its engine, for nodes that take those of one engine only."""
    duration_s: float = 1.0
    """Expected, from its start to its end, load included."""
    avoid: frozenset[str] = frozenset()
    """Nodes it failed on: used only when no others could ever hold it."""

    @property
    def shape(self) -> Shape:
        """What decides where it may run; requests of one shape can stand in for each other."""
        return (self.gpus, self.nodes, self.gpu_type, self.backend, self.avoid)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """A gang's share of one node."""

    node: str
    gpus: int
    """0 on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """A request put in terms of one cluster's nodes."""

    count: int
    """Nodes."""
    share: int
    """GPUs on each of them; 0 on the CPU."""
    groups: tuple[tuple[int, ...], ...]
    """Positions of nodes that could hold a share, by GPU type; each group has ``count`` or more."""


def same_gpu_type(one: str, other: str) -> bool:
    """The two name one GPU type: equal but for case, or one is the end of the other in whole words (`H100`, `NVIDIA-H100`)."""
    words, others = one.casefold().split("-"), other.casefold().split("-")
    short = min(len(words), len(others))
    return words[-short:] == others[-short:]


def why_infeasible(request: GangRequest, nodes: Sequence[NodeRoom]) -> str | None:
    """Why the request could not be placed even on an empty cluster, with what is needed and what there is; None when it could."""
    found = need_of(request, nodes)
    return found if isinstance(found, str) else None


def seats_for(request: GangRequest, nodes: Sequence[NodeRoom], exclusive: Exclusive) -> tuple[Seat, ...] | None:
    """Seats that are free now, or None. All of a gang's nodes have one GPU type and the same number of its GPUs.

    Best fit: of the nodes that hold a share, those with the fewest free GPUs, then with the fewest GPUs, then by name.
    ``node``: only nodes without gangs. ``cluster``: only when no gang runs anywhere. ``none``: gangs share a node, each with
    its own GPUs; of gangs on the CPU, which would slow each other, a node has one at a time, where the fewest gangs run.
    """
    rooms = Rooms(nodes, exclusive)
    need = rooms.need(request)
    found = None if need is None else rooms.find(need)
    return None if need is None or found is None else rooms.seats(need, found)


class Rooms:
    """The nodes of a cluster, with what is free on them as gangs come and go. Nodes are known by position.

    Args:
        nodes: What there is, and is free at first.
        exclusive: What a gang has to itself.
    """

    def __init__(self, nodes: Sequence[NodeRoom], exclusive: Exclusive) -> None:
        # Smaller nodes come first, so that of two equal fits the smaller is taken.
        self.nodes = tuple(sorted(nodes, key=lambda room: (room.gpus, room.node)))
        self.exclusive = exclusive
        self.positions = {room.node: number for number, room in enumerate(self.nodes)}
        self.free = [room.free_gpus for room in self.nodes]
        self.gangs = [room.gangs for room in self.nodes]
        self._cpu_gangs = [room.gangs if room.cpu_gangs is None else room.cpu_gangs for room in self.nodes]
        self._running = sum(self.gangs)
        self._needs: dict[Shape, Need | None] = {}
        # One number by node, -1 where no gang may come: the fewest free GPUs (or gangs), then the position.
        self._gpu_fit = [0] * len(self.nodes)
        self._cpu_fit = [0] * len(self.nodes)
        for number in range(len(self.nodes)):
            self._judge(number)

    def need(self, request: GangRequest) -> Need | None:
        """The request in terms of these nodes; None when they could never hold it."""
        shape = request.shape
        if shape not in self._needs:
            found = need_of(request, self.nodes)
            self._needs[shape] = None if isinstance(found, str) else found
        return self._needs[shape]

    def find(self, need: Need, closed: Collection[int] = ()) -> tuple[int, ...] | None:
        """Positions of the best free nodes other than ``closed``, or None."""
        if self.exclusive == "cluster" and self._running:
            return None
        fit = self._gpu_fit if need.share else self._cpu_fit
        least, best, best_fit = need.share * len(self.nodes), None, 0
        for group in need.groups:
            able = [fit[number] for number in group if fit[number] >= least]
            if closed:
                able = [one for one in able if one % len(self.nodes) not in closed]
            if len(able) < need.count:
                continue
            chosen = [min(able)] if need.count == 1 else sorted(able)[: need.count]
            if best is None or sum(chosen) < best_fit:
                best, best_fit = chosen, sum(chosen)
        return None if best is None else tuple(one % len(self.nodes) for one in best)

    def holds(self, number: int, share: int) -> bool:
        """A share is free on the node now."""
        return (self._gpu_fit if share else self._cpu_fit)[number] >= share * len(self.nodes)

    def seats(self, need: Need, found: Sequence[int]) -> tuple[Seat, ...]:
        """The seats on the nodes found."""
        return tuple(Seat(node=self.nodes[number].node, gpus=need.share) for number in found)

    def take(self, seats: Sequence[Seat]) -> None:
        """A gang starts there."""
        self._change(seats, 1)

    def release(self, seats: Sequence[Seat]) -> None:
        """A gang that was there has ended."""
        self._change(seats, -1)

    def _change(self, seats: Sequence[Seat], by: int) -> None:
        for seat in seats:
            number = self.positions[seat.node]
            self.free[number] -= by * seat.gpus
            self.gangs[number] += by
            self._running += by
            if not seat.gpus or self.nodes[number].cpu_gangs is None:
                self._cpu_gangs[number] += by
            self._judge(number)

    def _judge(self, number: int) -> None:
        shared = self.exclusive == "none"
        size, gangs = len(self.nodes), self.gangs[number]
        self._gpu_fit[number] = max(0, self.free[number]) * size + number if shared or not gangs else -1
        lonely = not (self._cpu_gangs[number] if shared else gangs)
        self._cpu_fit[number] = gangs * size + number if lonely else -1


def need_of(request: GangRequest, nodes: Sequence[NodeRoom]) -> Need | str:
    """The request in terms of these nodes, or why an empty cluster could not hold it."""
    if not nodes:
        return f"needs {_amount(request)}; there are no nodes"
    count = request.nodes
    if count is not None and request.gpus % count:
        return f"{request.gpus} GPUs cannot be spread evenly over {count} nodes"
    able = _able(request, nodes)
    if isinstance(able, str):
        return able
    counts = range(1, len(able) + 1) if count is None else (count,)
    for spread in counts:
        if request.gpus % spread:
            continue
        share = request.gpus // spread
        groups = _groups([number for number in able if nodes[number].gpus >= share], nodes, share, spread)
        if groups:
            left = [tuple(number for number in group if nodes[number].node not in request.avoid) for group in groups]
            return Need(count=spread, share=share, groups=tuple(group for group in left if len(group) >= spread) or groups)
    return _shortage(request, [nodes[number] for number in able], _for_engine(request, nodes))


def _able(request: GangRequest, nodes: Sequence[NodeRoom]) -> list[int] | str:
    """Positions of the nodes of the right engine and GPU type, with GPUs where those are needed; or why there are none."""
    able = [number for number, room in enumerate(nodes) if room.backend in {None, request.backend}]
    if not able:
        known = ", ".join(sorted({room.backend for room in nodes if room.backend is not None}))
        return f"needs a node for engine {request.backend}; the nodes are for {known}"
    if request.gpus and not any(nodes[number].gpus for number in able):
        return f"needs {_amount(request)}; no node{_for_engine(request, nodes)} has any"
    able = [number for number in able if nodes[number].gpus or not request.gpus]
    wanted = request.gpu_type
    if wanted is not None:
        types = [nodes[number].gpu_type for number in able]
        able = [number for number, there in zip(able, types, strict=True) if there is not None and same_gpu_type(wanted, there)]
        if not able:
            known = ", ".join(sorted({there for there in types if there is not None}))
            return f"needs GPU type {wanted}; " + (f"there are {known}" if known else "the nodes name none")
    return able


def _groups(able: Sequence[int], nodes: Sequence[NodeRoom], share: int, count: int) -> tuple[tuple[int, ...], ...]:
    """Those of the nodes that may serve one gang together: of one type where there are GPUs, and enough of them."""
    by_type: dict[str, list[int]] = {}
    for number in able:
        by_type.setdefault((nodes[number].gpu_type or "").casefold() if share else "", []).append(number)
    return tuple(tuple(group) for group in by_type.values() if len(group) >= count)


def _amount(request: GangRequest) -> str:
    if not request.gpus:
        return "a node" if request.nodes in {None, 1} else f"{request.nodes} nodes"
    return f"{request.gpus} GPU{'s' if request.gpus > 1 else ''}"


def _for_engine(request: GangRequest, nodes: Sequence[NodeRoom]) -> str:
    """Where some nodes are for one engine only: that the others were looked at."""
    return f" for engine {request.backend}" if any(room.backend is not None for room in nodes) else ""


def _shortage(request: GangRequest, able: Sequence[NodeRoom], engine: str) -> str:
    """What nodes of the right type and engine lack."""
    kind = ("" if request.gpu_type is None else f" of type {request.gpu_type}") + engine
    if request.nodes is None:
        sizes = Counter(room.gpus for room in able)
        there = ", ".join(f"{number} x {gpus}" for gpus, number in sorted(sizes.items()))
        return f"needs {_amount(request)}, evenly on nodes of one GPU type; the nodes{kind} have {there}"
    share, largest = request.gpus // request.nodes, max(room.gpus for room in able)
    if share > largest:
        where = "on one node" if request.nodes == 1 else f"on each of {request.nodes} nodes"
        return f"needs {share} GPU{'s' if share > 1 else ''} {where}; the largest node{kind} has {largest}"
    if len(able) < request.nodes:
        return f"needs {request.nodes} nodes{kind}, there {_are(len(able))}"
    roomy = Counter((room.gpu_type or "").casefold() for room in able if room.gpus >= share)
    most = max(roomy.values())
    return f"needs {request.nodes} nodes{kind} with {share} GPUs each and one GPU type; there {_are(most)}"


def _are(number: int) -> str:
    return "is 1" if number == 1 else f"are {number}"


def emptied(nodes: Sequence[NodeRoom]) -> tuple[NodeRoom, ...]:
    """The nodes as if nothing ran on them."""
    return tuple(replace(room, free_gpus=room.gpus, gangs=0, cpu_gangs=0) for room in nodes)
