"""A cluster in this process, for tests that kill nodes, silence samplers, add hosts late, and compare every joule with the truth.

The engines run on threads, on the clocks of their nodes.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from dataclasses import replace
from typing import Any, Final, TypeVar

from llem_ray.core.errors import EngineDied, LlemRayError
from llem_ray.core.outcome import Completed, Outcome
from llem_ray.core.plan import LoadGroup
from llem_ray.execution.calls import (
    Call,
    Leased,
    Loaded,
    Node,
    PowerSeen,
    SamplerSettings,
    TrialOrder,
    WarmupProgress,
)
from llem_ray.execution.context import unsure_workloads
from llem_ray.execution.engine_host import EngineHost
from llem_ray.planning.packing import Seat
from llem_ray.testing.nodes import PretendCall, PretendHost, PretendNode, PretendSampler

T = TypeVar("T")

FIRST_PID: Final = 10_000_000
"""Above what Linux gives: these processes do not exist."""


class PretendGang:
    """A `fake` engine on a thread, on the clock of its leading node; one process for each seat."""

    def __init__(self, cluster: PretendCluster, group: LoadGroup, nodes: Sequence[PretendNode], host: EngineHost) -> None:
        self._cluster, self._group, self._nodes, self._host = cluster, group, tuple(nodes), host
        self.workers: tuple[Leased, ...] = ()
        self._calls: list[PretendCall[Any]] = []
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="pretend-engine", daemon=True).start()

    def lease(self) -> PretendCall[tuple[Leased, ...]]:
        """Answered at once where the GPUs are free, else never."""
        return self._ask(lambda: self.workers, never=not self.workers)

    def load(self) -> PretendCall[Loaded]:
        """Load the model."""
        return self._ask(lambda: self._placed(self._host.load()))

    def run(self, order: TrialOrder) -> PretendCall[Outcome]:
        """Run one attempt."""
        return self._ask(lambda: self._run(order))

    def phase(self) -> str | None:
        """What the engine does now."""
        return self._host.phase()

    def tell_warmup(self, trial_id: str, attempt: int, seen: PowerSeen | None) -> PretendCall[WarmupProgress]:
        """Tell the engine; its times are those of its host."""
        call: PretendCall[WarmupProgress] = PretendCall()
        call.answer(lambda: self._host.tell_warmup(trial_id, attempt, seen))
        return call

    def close(self, timeout_s: float) -> None:
        """Unload; what is still unanswered then fails, and the thread is left behind."""
        with contextlib.suppress(LlemRayError, TimeoutError):
            self._ask(self._host.close).result(timeout_s)
        self._tasks.put(None)
        for call in self._calls:
            call.fail(EngineDied("the gang was closed"))
        self._cluster.release(self)

    def last_words(self) -> str | None:
        """None: it writes no log."""
        return None

    def _ask(self, function: Callable[[], T], *, never: bool = False) -> PretendCall[T]:
        """A question to the engine's thread; it fails when any node of the gang dies."""
        call: PretendCall[T] = PretendCall()
        self._calls.append(call)
        for node in self._nodes:
            beside = node.ask(lambda: None, patient=True)
            beside.future.add_done_callback(lambda done: call.fail(EngineDied(str(done.exception()))))
        if not never:
            self._tasks.put(lambda: call.answer(function))
        return call

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()

    def _run(self, order: TrialOrder) -> Outcome:
        """The engine's own times are of our clock, except those that its host took."""
        self._cluster.on_trial(order, tuple(node.node.node_id for node in self._nodes))
        outcome, host = self._host.run(order), self._nodes[0].host
        if not isinstance(outcome, Completed):
            return outcome
        requests = tuple(
            replace(
                record,
                scheduled_ns=host.to_host(record.scheduled_ns),
                queued_ns=host.to_host(record.queued_ns),
                sent_ns=host.to_host(record.sent_ns),
                token_times_ns=tuple(map(host.to_host, record.token_times_ns)),
            )
            for record in outcome.requests
        )
        log = outcome.step_log
        if log is not None:
            log.begin_ns, log.end_ns = array("q", map(host.to_host, log.begin_ns)), array("q", map(host.to_host, log.end_ns))
        return replace(outcome, window=replace(outcome.window, node=host.name), requests=requests)

    def _placed(self, loaded: Loaded) -> Loaded:
        """Ranks are spread over the workers evenly."""
        share = max(1, len(loaded.ranks) // len(self.workers))
        ranks = [
            replace(rank, host=worker.node, pid=worker.pid)
            for rank in loaded.ranks
            for worker in [self.workers[min(rank.rank // share, len(self.workers) - 1)]]
        ]
        return replace(loaded, ranks=tuple(ranks))


class PretendCluster:
    """An executor whose nodes are all in this process.

    Args:
        hosts: Each is one node from the begin, with all its GPUs.
    """

    def __init__(self, hosts: Iterable[PretendHost] = ()) -> None:
        self._lock = threading.Lock()
        self._nodes: dict[str, PretendNode] = {}
        self._held: dict[tuple[str, str], PretendGang | None] = {}
        """(host, UUID) -> who has it; None: it is quarantined."""
        self._pids = FIRST_PID
        self.on_trial: Callable[[TrialOrder, tuple[str, ...]], None] = lambda _order, _nodes: None
        """Called on the engine's thread when a trial begins, with the node ids of its gang, the leading one first."""
        self.asked: list[tuple[LoadGroup, ...]] = []
        """What an autoscaler was asked for."""
        self.gone = False
        """Its head is gone for good."""
        for host in hosts:
            self.add(host, uptime_s=60.0)

    def add(
        self,
        host: PretendHost,
        *,
        gpus: int | None = None,
        gpu_type: str | None = None,
        elsewhere: int = 0,
        uptime_s: float = 0.0,
    ) -> str:
        """A node joins; its node id. After ``kill`` the same host may come back, also with another clock.

        Args:
            host: Where it is. Several nodes may be on one host.
            gpus: Whole GPUs the scheduler counts there; None: all of the host's.
            gpu_type: As the scheduler names it.
            elsewhere: GPUs that somebody else holds.
            uptime_s: How long it has been up.
        """
        with self._lock:
            number = len(self._nodes) + 1
            node = Node(
                node_id=f"{host.name}-node-{number}",
                hostname=host.name,
                address=f"10.0.0.{number}",
                gpus=len(host.gpus) if gpus is None else gpus,
                gpus_elsewhere=elsewhere,
                gpu_type=gpu_type,
            )
            self._nodes[node.node_id] = PretendNode(node, host, uptime_s)
            return node.node_id

    def kill(self, node_id: str) -> None:
        """The node is gone, with all that ran there."""
        self._nodes[node_id].die()

    def silence(self, node_id: str, *, silent: bool = True) -> None:
        """The node's sampler answers nothing, or all again."""
        self._nodes[node_id].hush(silent=silent)

    def host_of(self, node_id: str) -> PretendHost:
        """Where a node is or was."""
        return self._nodes[node_id].host

    def release(self, gang: PretendGang) -> None:
        """What the gang held is free."""
        with self._lock:
            self._held = {key: holder for key, holder in self._held.items() if holder is not gang}
            for node in self._nodes.values():
                node.pids -= {worker.pid for worker in gang.workers}

    def start(self) -> None:
        """Nothing to reach."""

    def nodes(self) -> tuple[Node, ...]:
        """Those that are alive."""
        with self._lock:
            return tuple(one.node for one in self._nodes.values() if one.alive)

    def open_sampler(self, node: Node, settings: SamplerSettings) -> PretendSampler:
        """A fresh one."""
        return PretendSampler(self._nodes[node.node_id], settings)

    def check(self, groups: Sequence[LoadGroup], base_dir: str, cache_dir: str) -> None:
        """Nothing."""

    def open_gang(self, group: LoadGroup, seats: Sequence[Seat], base_dir: str, cache_dir: str) -> PretendGang:
        """A gang on the first GPUs of its seats that are free."""
        nodes = [self._nodes[seat.node] for seat in seats]
        experiment = group.experiment
        clock = nodes[0].host
        unsure, all_unsure = unsure_workloads(group, base_dir)
        engine = EngineHost(
            experiment.model,
            experiment.engine,
            group.gpus,
            base_dir,
            cache_dir,
            clock=clock,
            online=group.online,
            unsure=unsure,
            all_unsure=all_unsure,
        )
        gang = PretendGang(self, group, nodes, engine)
        with self._lock:
            gang.workers = self._lease(gang, seats)
        return gang

    def quarantine(self, node_id: str, gpu_uuid: str) -> None:
        """Nobody gets the GPU any more."""
        with self._lock:
            self._held[self._nodes[node_id].host.name, gpu_uuid] = None

    def ask_for_nodes(self, groups: Sequence[LoadGroup]) -> None:
        """Noted in ``asked``."""
        self.asked.append(tuple(groups))

    def wait(self, calls: Sequence[Call[Any]], timeout_s: float) -> Sequence[Call[Any]]:
        """Those that are answered."""
        ours = [call for call in calls if isinstance(call, PretendCall)]
        futures.wait([call.future for call in ours], timeout_s)
        return [call for call in ours if call.future.done()]

    def is_gone(self) -> bool:
        """As ``gone`` says."""
        return self.gone

    def facts(self) -> Mapping[str, str]:
        """For the environment record."""
        return {"executor": "pretend"}

    def close(self) -> None:
        """Nothing is left to end."""

    def _lease(self, gang: PretendGang, seats: Sequence[Seat]) -> tuple[Leased, ...]:
        """Empty where too little is free."""
        workers = []
        for rank, seat in enumerate(seats):
            one = self._nodes[seat.node]
            free = [(i, gpu) for i, gpu in enumerate(one.host.gpus) if (one.host.name, gpu.uuid) not in self._held][: seat.gpus]
            if len(free) < seat.gpus:
                return ()
            self._held |= {(one.host.name, gpu.uuid): gang for _, gpu in free}
            self._pids += 1
            one.pids.add(self._pids)
            workers.append(
                Leased(
                    node=one.host.name,
                    hostname=one.host.name,
                    pid=self._pids,
                    gpu_ids=tuple(str(index) for index, _ in free),
                    gpu_uuids=tuple(gpu.uuid for _, gpu in free),
                    rank=rank,
                    address=one.node.address,
                    node_id=one.node.node_id,
                )
            )
        return tuple(workers)
