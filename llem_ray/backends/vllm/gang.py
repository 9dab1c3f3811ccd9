"""A gang on several hosts: vLLM's own multi-node mode, and what that lacks.

The first host leads. vLLM there talks to the workers of all hosts; on the other hosts nothing of vLLM runs but workers, which
know of no deadline and wait for ever for a leader that is gone. So the processes of a gang meet before vLLM starts, over
connections of their own, and stay connected: whoever fails says so, whoever ends is noticed, and then all end what vLLM started.
"""

from __future__ import annotations

import contextlib
import hashlib
import queue
import select
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import psutil

from llem_ray.backends.gang.layout import Layout
from llem_ray.backends.gang.links import Link, meet
from llem_ray.backends.process.wire import error_body, pack, restored
from llem_ray.backends.vllm.arguments import meet_timeout_s
from llem_ray.core.backend import BackendConfig, Rank, Rendezvous
from llem_ray.core.errors import BackendError, EngineDied, HangError, LlemRayError, LoadError
from llem_ray.core.ports import reserve_port

LOAD_S: Final = 6 * 3600.0
"""Longest wait for another host that loads; the caller's own deadline is shorter."""
SEND_S: Final = 10.0
SETTLE_S: Final = 3.0
"""How long after vLLM failed another host may take to say that it is why."""
AGAIN_MS: Final = 200
CLOSE_S: Final = 10.0
"""Longest wait for the other hosts to end their workers."""

Said = tuple[int, str, Any]
"""Rank of a process, kind of message, body."""


class Gang:
    """This process and its connections to the others: those of all other hosts for rank 0, the one to rank 0 for them.

    Args:
        place: Where they meet, and which of them this one is.

    Attributes:
        failure: Why the gang is of no use any more; None while it is.
    """

    def __init__(self, place: Rendezvous) -> None:
        self.place = place
        self.port = 0
        self.failure: LlemRayError | None = None
        self._links: dict[int, Link] = {}
        self._said: queue.SimpleQueue[Said | None] = queue.SimpleQueue()
        self._failed = threading.Event()
        self._ending = False
        self._lock = threading.Lock()
        self._processes: dict[int, str] = {}
        self._foreign: frozenset[int] = frozenset()
        self._wake, self._wakes = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="llem-ray-gang", daemon=True)

    @classmethod
    def meet(cls, config: BackendConfig, version: str) -> Gang:
        """Connect this process to the others, and agree on the port that torch.distributed meets at.

        Args:
            config: With a rendezvous.
            version: Of vLLM: it must be the same everywhere.

        Raises:
            LoadError: Somebody did not come in time, or was given something else; the message names who.
        """
        place = config.rendezvous
        assert place is not None
        gang = cls(place)
        try:
            gang._meet(_key(config, version), meet_timeout_s(config))
        except BaseException:
            gang.close()
            raise
        gang._foreign = frozenset(process.pid for process in psutil.Process().children())
        gang._thread.start()
        return gang

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.place.rank == 0

    def ranks_of(self, workers: Sequence[Mapping[str, Any]], rank: int | None = None) -> tuple[Rank, ...]:
        """The workers of one process's host, by rank.

        Args:
            workers: What all workers of the gang told of themselves.
            rank: Of the process; default: this one.
        """
        share = len(workers) // self.place.world_size
        begin = (self.place.rank if rank is None else rank) * share
        return ranks_of(workers, self.place.hosts)[begin : begin + share]

    def tell_loaded(self, workers: Sequence[Mapping[str, Any]]) -> None:
        """Tell the others that all are loaded, and who their workers are.

        Raises:
            EngineDied: One is gone.
        """
        for rank, link in self._links.items():
            link.send(0, "loaded", [pack(worker) for worker in self.ranks_of(workers, rank)], SEND_S)

    def watch_process(self, descriptor: int, name: str) -> None:
        """The gang fails when this process ends.

        Args:
            descriptor: Becomes readable then.
            name: For messages.
        """
        self._processes[descriptor] = name
        self._wakes.send(b".")

    def hear(self, kind: str, timeout_s: float | None, doing: str) -> Any:
        """Body of the next message, which must be of a kind.

        Raises:
            LlemRayError: The gang failed.
            HangError: It did not come in time.
        """
        rank, told, body = self._next(timeout_s, doing)
        if told != kind:
            raise EngineDied(f"{self._links[rank].name} said {told!r} during {doing}")
        return body

    def explain(self, error: Exception) -> LlemRayError | None:
        """Why vLLM failed here, where that is because of another host.

        Args:
            error: What vLLM raised. Another host may not have told of its end yet: that is waited for.
        """
        if not isinstance(error, LlemRayError):
            self._failed.wait(SETTLE_S)
        return self.failure

    def give_up(self, error: Exception, failure: LlemRayError) -> LlemRayError:
        """The load failed here: the others hear why, and end too. Returns what to raise.

        Args:
            error: As it was raised.
            failure: What it is called if no other host is the reason.
        """
        lost = self.explain(error)
        if lost is None:
            self._fail(failure)
            return failure
        died = isinstance(lost, EngineDied | HangError)
        return LoadError(f"the gang did not load: {lost.message}", lost.hint) if died else lost

    def begin_end(self) -> None:
        """Have the others end their workers; from now on nobody's end is a failure."""
        self._ending = True
        if self.leads and self.failure is None:
            for link in self._links.values():
                with contextlib.suppress(BackendError):
                    link.send(0, "close", None, SEND_S)

    def await_end(self) -> None:
        """Wait until the others have ended their workers, or are gone; bounded in time."""
        deadline_s, waiting = time.monotonic() + CLOSE_S, set(self._links)
        with contextlib.suppress(LlemRayError):
            while waiting:
                waiting.discard(self._next(max(0.0, deadline_s - time.monotonic()), "close")[0])

    def tell_closed(self) -> None:
        """Tell rank 0 that the workers have ended."""
        with contextlib.suppress(BackendError):
            self._links[0].send(0, "closed", None, SEND_S)

    def close(self) -> None:
        """Close the connections; whoever waits in ``hear`` is told."""
        self._ending = True
        self.failure = self.failure or EngineDied("the gang was closed")
        self._said.put(None)
        self._wakes.close()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        for link in self._links.values():
            link.close()
        self._wake.close()

    def end_processes(self) -> None:
        """Kill all that vLLM started since the meeting."""
        ours = [process for process in psutil.Process().children() if process.pid not in self._foreign]
        for process in tuple(ours):
            with contextlib.suppress(psutil.NoSuchProcess):
                ours += process.children(recursive=True)
        for process in ours:
            with contextlib.suppress(psutil.NoSuchProcess):
                if "resource_tracker" not in " ".join(process.cmdline()):
                    process.kill()

    def _next(self, timeout_s: float | None, doing: str) -> Said:
        try:
            said = self._said.get(timeout=timeout_s)
        except queue.Empty as error:
            raise HangError(f"nothing was heard of the gang's other hosts during {doing} within {timeout_s:g} s") from error
        if said is None:
            self._said.put(None)  # for whoever asks next
            assert self.failure is not None
            raise self.failure
        return said

    def _meet(self, key: str, timeout_s: float) -> None:
        # A star around rank 0, as the ranks of one model have it in the transformers engine.
        star = Layout(tensor=self.place.world_size, pipeline=1, data=1, rank=self.place.rank)
        circle = meet(self.place, star, key, timeout_s)
        self._links = {link.rank: link for link in ((circle.leader,) if circle.leader is not None else circle.members)}
        try:
            if self.leads:
                self.port = reserve_port(socket.AF_INET6 if ":" in self.place.node_addr else socket.AF_INET)
                for link in self._links.values():
                    link.send(0, "join", self.port, SEND_S)
            else:
                self.port = int(self._links[0].receive(timeout_s, "the meeting")[2])
        except (EngineDied, HangError) as error:
            raise LoadError(f"the gang did not meet: {error.message}") from error

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for link in self._links.values():
            poll.register(link.fileno(), select.POLLIN | select.POLLRDHUP)
        by_descriptor = {link.fileno(): link for link in self._links.values()}
        while True:
            ready = poll.poll(AGAIN_MS if self.failure is not None else None)
            if not ready:  # vLLM may have been about to start something when the gang failed
                self.end_processes()
            for descriptor, _ in ready:
                if descriptor == self._wake.fileno():
                    if not self._wake.recv(64):
                        return
                    for process in self._processes:
                        poll.register(process, select.POLLIN)
                elif descriptor in by_descriptor:
                    if not self._listen(by_descriptor[descriptor]):
                        poll.unregister(descriptor)
                else:
                    poll.unregister(descriptor)
                    if not self._ending:
                        self._fail(EngineDied(f"{self._processes[descriptor]} ended"))

    def _listen(self, link: Link) -> bool:
        """Take what has arrived; False at the connection's end."""
        while link.pending():
            try:
                _, kind, body = link.receive(SEND_S, "the gang's work")
            except (EngineDied, HangError) as error:
                if self._ending:
                    self._said.put((link.rank, "closed", None))
                else:
                    self._fail(error)
                return False
            if kind == "error":
                told = restored(body)
                self._fail(type(told)(f"{link.name}: {told.message}", *told.args[1:]))
            else:
                self._said.put((link.rank, kind, body))
        return True

    def _fail(self, error: LlemRayError) -> None:
        with self._lock:
            if self.failure is not None:
                return
            self.failure = error
        for link in self._links.values():
            with contextlib.suppress(BackendError):
                link.send(0, "error", error_body(error), SEND_S)
        self.end_processes()
        self._said.put(None)
        self._failed.set()


def ranks_of(workers: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> tuple[Rank, ...]:
    """What the workers told of themselves, by rank; every host has as many, one host's after the other's."""
    share = len(workers) // len(hosts)
    return tuple(
        Rank(rank=index, host=hosts[index // share], pid=int(worker["pid"]), gpu_uuid=worker["gpu_uuid"] or None)
        for index, worker in enumerate(sorted(workers, key=lambda worker: int(worker["rank"])))
    )


def _key(config: BackendConfig, version: str) -> str:
    facts = repr((pack(config.model), replace(config.engine, python=None), config.online, version))
    return hashlib.sha256(facts.encode()).hexdigest()
