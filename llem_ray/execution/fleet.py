"""The run driver's view of the cluster: which nodes are there, what is free on them, which are lost, which GPUs are unfit."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np

from llem_ray.core.clock import Clock
from llem_ray.core.errors import LlemRayError, NodeLost, PlacementError
from llem_ray.core.units import NS_PER_S
from llem_ray.execution.calls import Executor, Leased, Node
from llem_ray.execution.meter import GPU_SCOPES, Meter
from llem_ray.execution.records import DeviceKey, GangRecord, HostDevice
from llem_ray.planning.packing import NodeRoom, Seat

LOG = logging.getLogger(__name__)

LOOK_S: Final = 2.0
IDLE_S: Final = 60.0
PING_S: Final = 4.0
SETTLE_S: Final = 30.0
"""What a gang held must be free again by then."""
MEMORY_SLACK_BYTES: Final = 256 * 2**20
POWER_SLACK_REL: Final = 0.10
POWER_SLACK_W: Final = 10.0


class Fleet:
    """Nodes as they come and go. Its methods may be called from any thread.

    Args:
        executor: Knows the nodes.
        meter: Has a sampler on each.
        clock: The run driver's clock.
        tell: Shows the user a line.
    """

    def __init__(self, executor: Executor, meter: Meter, clock: Clock, tell: Callable[[str], None]) -> None:
        self._executor, self._meter, self._clock, self._tell = executor, meter, clock, tell
        self._lock = threading.Lock()
        self._nodes: dict[str, Node] = {}
        self._seats: dict[str, tuple[Seat, ...]] = {}
        self._lost: set[str] = set()
        self._suspect_ns: dict[str, int] = {}
        self._idle_ns: dict[str, int] = {}
        self._warned: set[str] = set()
        self.quarantined: dict[DeviceKey, str] = {}
        """(host, UUID) -> why the GPU is not used any more."""
        self._looked_ns = 0
        self._unanswered: str | None = None

    def start(self) -> tuple[Node, ...]:
        """The nodes there are at the begin.

        Raises:
            PlacementError: There is none, or nobody tells.
        """
        nodes = self._executor.nodes()
        if not nodes:
            raise PlacementError("the cluster has no live node", "ray status tells what it waits for")
        self._nodes = {node.node_id: node for node in nodes}
        return nodes

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Nodes that are alive, as far as is known."""
        with self._lock:
            return tuple(self._nodes.values())

    def look(self) -> None:
        """See which nodes came and went; at most every 2 s."""
        now_ns = self._clock.monotonic_ns()
        if now_ns - self._looked_ns < LOOK_S * NS_PER_S:
            return
        self._looked_ns = now_ns
        try:
            found = {node.node_id: node for node in self._executor.nodes()}
        except PlacementError as error:
            if self._unanswered is None:
                self._tell(f"the cluster does not tell its nodes: {error.message}")
            self._unanswered = error.message
            return
        if self._unanswered is not None:
            self._tell("the cluster tells its nodes again")
            self._unanswered = None
        with self._lock:
            gone = [node for node_id, node in self._nodes.items() if node_id not in found]
            fresh = [node for node_id, node in found.items() if node_id not in self._nodes]
            self._nodes = found
        for node in gone:
            self._lost.add(node.node_id)
            self._tell(f"node {node.hostname} ({node.address}) is gone")
            self._meter.drop(node.node_id, "the node is gone")
        for node in fresh:
            self._tell(f"node {node.hostname} ({node.address}) has joined")
        self._meter.adopt(found.values())

    def take(self, lane: str, seats: Sequence[Seat]) -> None:
        """The seats are the lane's until it gives them back."""
        with self._lock:
            self._seats[lane] = tuple(seats)

    def give_back(self, lane: str) -> None:
        """The lane's seats are free."""
        with self._lock:
            self._seats.pop(lane, None)

    def rooms(self) -> tuple[NodeRoom, ...]:
        """What every node that can be measured has and has free.

        A node of which something was heard to be wrong is left out until its sampler answers again. Nodes of one host count each
        other's gangs: they share CPU, fans and power supply.
        """
        with self._lock:
            nodes, seats = list(self._nodes.values()), [seat for taken in self._seats.values() for seat in taken]
        hosts = {node.node_id: self._meter.host_of(node.node_id) for node in nodes}
        taken: dict[str, int] = {}
        gangs: dict[str | None, int] = {}
        on_cpu: dict[str | None, int] = {}
        for seat in seats:
            taken[seat.node] = taken.get(seat.node, 0) + seat.gpus
            host = hosts.get(seat.node)
            gangs[host] = gangs.get(host, 0) + 1
            on_cpu[host] = on_cpu.get(host, 0) + (seat.gpus == 0)
        rooms = []
        for node in nodes:
            host = hosts[node.node_id]
            if host is None or not self._meter.is_in_service(host) or not self._is_sound(node, host):
                continue
            gpus = self._usable_gpus(node, host)
            rooms.append(
                NodeRoom(
                    node=node.node_id,
                    gpus=gpus,
                    free_gpus=max(0, gpus - node.gpus_elsewhere - taken.get(node.node_id, 0)),
                    gangs=gangs.get(host, 0),
                    cpu_gangs=on_cpu.get(host, 0),
                    gpu_type=node.gpu_type,
                    backend=node.backend,
                )
            )
        return tuple(rooms)

    def release_idle(self) -> None:
        """End the samplers of nodes that have had no gang for a minute, so that an autoscaler can take the nodes away.

        Call it when no gang waits for a place any more.
        """
        now_ns = self._clock.monotonic_ns()
        with self._lock:
            busy = {self._meter.host_of(seat.node) for seats in self._seats.values() for seat in seats}
            nodes = list(self._nodes.values())
        for node in nodes:
            if self._meter.host_of(node.node_id) in busy or not self._meter.has_sampler(node.node_id):
                self._idle_ns.pop(node.node_id, None)
            elif now_ns - self._idle_ns.setdefault(node.node_id, now_ns) > IDLE_S * NS_PER_S:
                LOG.info("node %s is not needed any more: its sampler ends", node.hostname)
                self._meter.release(node.node_id)

    def recall(self) -> None:
        """Nodes whose samplers were ended are needed again."""
        self._idle_ns.clear()
        self._meter.adopt(self.nodes)

    def _usable_gpus(self, node: Node, host: str) -> int:
        """Those of its GPUs that can be measured and are not quarantined."""
        measured = sum(device.scope in GPU_SCOPES for device in self._meter.devices(host))
        if node.gpus > measured and node.node_id not in self._warned:
            self._warned.add(node.node_id)
            where = f"node {node.hostname} ({node.address})"
            self._tell(f"{where} has {node.gpus} GPUs for Ray, of which {measured} can be measured: only these are used")
        with self._lock:
            unfit = sum(held == host for held, _ in self.quarantined)
        return max(0, min(node.gpus, measured) - unfit)

    def hosts_of(self, seats: Iterable[Seat]) -> tuple[str, ...]:
        """Stable ids of the seats' hosts."""
        hosts = (self._meter.host_of(seat.node) for seat in seats)
        return tuple(dict.fromkeys(host for host in hosts if host is not None))

    def _is_sound(self, node: Node, host: str) -> bool:
        since_ns = self._suspect_ns.get(node.node_id)
        if since_ns is None:
            return True
        now_ns = self._clock.monotonic_ns()
        if now_ns - since_ns < LOOK_S * NS_PER_S or self._meter.is_silent(host):
            return False
        if not self._answers(host):
            self._suspect_ns[node.node_id] = self._clock.monotonic_ns()
            return False
        self._suspect_ns.pop(node.node_id, None)
        return True

    def raise_if_lost(self, seats: Sequence[Seat]) -> None:
        """Raise NodeLost when a node of the seats is gone."""
        for seat in seats:
            if seat.node in self._lost:
                raise NodeLost(f"node {seat.node[:12]} of the gang is gone")

    def lost_node(self, seats: Sequence[Seat]) -> str | None:
        """The node of the seats that does not answer any more, if one does not; it is not used until it answers again."""
        for seat in seats:
            host = self._meter.host_of(seat.node)
            if seat.node in self._lost or host is None or not self._answers(host):
                self._suspect_ns[seat.node] = self._clock.monotonic_ns()
                return seat.node
        return None

    def _answers(self, host: str) -> bool:
        sampler = self._meter.sampler_of(host)
        try:
            return sampler is not None and bool(sampler.probe().result(PING_S))
        except (LlemRayError, TimeoutError):
            return False

    def settle(self, gang: GangRecord, lost: str | None = None) -> None:
        """Wait until what a closed gang held is free again: its processes gone, its GPUs' memory and idle power as before.

        A GPU that is not by then is quarantined: no gang of this run gets it any more, and the user is told which and why.

        Args:
            gang: The gang.
            lost: A node of it that does not answer: nothing can be said of what it holds.
        """
        without = None if lost is None else self._meter.host_of(lost)
        until_ns = self._clock.monotonic_ns() + round(SETTLE_S * NS_PER_S)
        while True:
            problems = self._leftovers(gang, without)
            if not problems:
                return
            if self._clock.monotonic_ns() >= until_ns:
                break
            self._clock.sleep_until_ns(self._clock.monotonic_ns() + NS_PER_S // 5)
        for item, reason in problems:
            with self._lock:
                self.quarantined[item.key] = reason
            name = self._meter.hostname(item.host)
            LOG.error("GPU %s on %s is quarantined: %s", item.device.uuid, name, reason)
            self._tell(f"GPU {item.device.uuid} on {name} is not used any more: {reason}")
        self.hold([item.key for item, _ in problems])

    def hold(self, unfit: Iterable[DeviceKey]) -> None:
        """Keep every gang off the GPUs."""
        for host, uuid in unfit:
            for node in self.nodes:
                if node.gpus and self._meter.host_of(node.node_id) == host:
                    self._executor.quarantine(node.node_id, uuid)

    def unfit(self, workers: Iterable[Leased]) -> list[DeviceKey]:
        """Those of the GPUs that processes hold which are quarantined."""
        with self._lock:
            return [
                (worker.node, uuid) for worker in workers for uuid in worker.gpu_uuids if (worker.node, uuid) in self.quarantined
            ]

    def _leftovers(self, gang: GangRecord, without: str | None) -> list[tuple[HostDevice, str]]:
        found: list[tuple[HostDevice, str]] = []
        for host in gang.hosts:
            if host == without:
                continue
            gpus = [item for item in gang.devices if item.host == host and item.device.scope in GPU_SCOPES]
            if not gpus or not self._meter.is_in_service(host):
                continue
            mine = [worker for worker in gang.workers if worker.node == host]
            pids = [worker.pid for worker in mine]
            pids += [rank.pid for rank in gang.loaded.ranks if rank.host == host] if gang.loaded else []
            # Process ids mean something in the container they are of, whose sampler is that of its own node.
            sampler = self._meter.sampler_on(mine[0].node_id)
            try:
                alive = sampler.alive(pids).result(PING_S) if sampler is not None else ()
            except (LlemRayError, TimeoutError):
                continue  # nothing can be said of a host that does not answer
            if alive:
                processes = f"processes {', '.join(map(str, alive))} of the gang before are still there"
                found += [(item, processes) for item in gpus]
            else:
                told = [(item, self._gpu_leftover(gang, item)) for item in gpus]
                found += [(item, text) for item, text in told if text is not None]
        return found

    def _gpu_leftover(self, gang: GangRecord, item: HostDevice) -> str | None:
        now_ns = self._meter.clocks.to_host(item.host, self._clock.monotonic_ns())
        baseline = gang.bare.get(item.key)
        if now_ns is None or baseline is None:
            return None
        before = gang.bare_memory_bytes.get(item.key)
        latest = self._meter.states(item.host, item.device.uuid, now_ns - 5 * NS_PER_S, now_ns)
        used = latest[-1].memory_used_bytes if latest else None
        if before is not None and used is not None and used - before > MEMORY_SLACK_BYTES:
            return f"{(used - before) / 2**20:.0f} MiB more memory in use than before its load"
        power_mw = self._meter.trace(item.host, item.device.uuid, now_ns - 2 * NS_PER_S, now_ns).power_mw
        known = power_mw[np.isfinite(power_mw)]
        if baseline.peak_w is None or not len(known):
            return None
        limit_w = baseline.peak_w * (1 + POWER_SLACK_REL) + POWER_SLACK_W
        if float(known.min()) / 1e3 > limit_w:
            return f"{float(known.min()) / 1e3:.0f} W, more than the {limit_w:.0f} W of its idle baseline"
        return None
