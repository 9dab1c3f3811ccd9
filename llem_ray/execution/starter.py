"""Starts samplers on nodes, several at once, and tries again where one dies before it has begun."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from llem_ray.core.clock import Clock
from llem_ray.core.errors import EngineDied, HangError, LlemRayError
from llem_ray.core.power import SamplerInfo
from llem_ray.core.units import NS_PER_S, ns_from_s
from llem_ray.execution.calls import Call, Executor, Node, Sampler, SamplerSettings
from llem_ray.execution.clocks import Exchange

LOG = logging.getLogger(__name__)

START_TIMEOUT_S: Final = 90.0
ANSWER_S: Final = 10.0
TRIES: Final = 4
"""Starts in a row before a node is left alone for ``REST_S``."""
RETRY_S: Final = 1.5
"""Times the number of the try. A sampler that has just died still has its name: asking for it gives the dead one."""
REST_S: Final = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """A sampler that polls."""

    node: Node
    sampler: Sampler
    info: SamplerInfo
    exchange: Exchange
    """First look at its clock."""


@dataclass(slots=True)
class _Opening:
    """A sampler that is being started: it is asked for its host, then to begin, then for its clock."""

    node: Node
    sampler: Sampler
    call: Call[str] | Call[SamplerInfo] | Call[tuple[int, int]]
    begun_ns: int
    sent_ns: int
    host: str | None = None
    info: SamplerInfo | None = None


class SamplerStarter:
    """``want`` and ``forget`` may be called from any thread, ``step`` from one at a time.

    Args:
        executor: Where samplers are started.
        settings: How they work.
        clock: The run driver's clock.
        told_host: Told node id and host id as soon as a node's host is known.
        begin_of: Host id -> UUIDs that the sampler is to leave out, and its lowest epoch.
    """

    def __init__(
        self,
        executor: Executor,
        settings: SamplerSettings,
        clock: Clock,
        told_host: Callable[[str, str], None],
        begin_of: Callable[[str], tuple[Sequence[str], int]],
    ) -> None:
        self._executor, self._settings, self._clock = executor, settings, clock
        self._told_host, self._begin_of = told_host, begin_of
        self._lock = threading.Lock()
        self._wanted: dict[str, tuple[Node, int]] = {}
        """Node id -> the node, and when to begin."""
        self._openings: dict[str, _Opening] = {}
        self._tries: dict[str, int] = {}
        self._refused: dict[str, str] = {}
        """Node id -> why it will never have a sampler."""
        self.problems: dict[str, str] = {}
        """Node id -> why it has none."""

    def is_busy(self) -> bool:
        """A sampler is being started, or will be soon."""
        soon_ns = self._clock.monotonic_ns() + ns_from_s(TRIES * RETRY_S)
        with self._lock:
            return bool(self._openings) or any(begin_ns <= soon_ns for _, begin_ns in self._wanted.values())

    def want(self, node: Node) -> None:
        """Start a sampler on the node, unless that is under way or was refused for good."""
        with self._lock:
            if node.node_id in self._wanted or node.node_id in self._openings or node.node_id in self._refused:
                return
            self._wanted[node.node_id] = (node, self._clock.monotonic_ns() + self._delay_ns(node.node_id))

    def settle(self, node_id: str) -> None:
        """Its sampler works: the next start is the first of its row again."""
        with self._lock:
            self._tries.pop(node_id, None)

    def forget(self, node_id: str, reason: str) -> None:
        """The node is gone."""
        with self._lock:
            self._wanted.pop(node_id, None)
            self._tries.pop(node_id, None)
            opening = self._openings.pop(node_id, None)
            self.problems[node_id] = reason
        if opening is not None:
            opening.sampler.close(force=True)

    def step(self) -> tuple[list[Started], LlemRayError | None]:
        """Bring every start one step further; returns samplers that poll now, and what the first that cannot start raises."""
        self._begin()
        with self._lock:
            openings = list(self._openings.values())
        answered = {id(call) for call in self._executor.wait([one.call for one in openings], 0.0)} if openings else set()
        started: list[Started] = []
        failed: LlemRayError | None = None
        for opening in openings:
            try:
                if id(opening.call) in answered and not self._must_wait(opening, started):
                    started += self._advance(opening)
                elif self._clock.monotonic_ns() - opening.begun_ns > START_TIMEOUT_S * NS_PER_S:
                    raise HangError(f"the power sampler of {opening.node.hostname} did not start within {START_TIMEOUT_S:g} s")
            except LlemRayError as error:
                failed = failed or self._fail(opening, error)
        return started, failed

    def wait(self, timeout_s: float) -> None:
        """Wait until the starts that are under way are answered, or for so long."""
        with self._lock:
            calls = [one.call for one in self._openings.values()]
        if calls:
            self._executor.wait(calls, timeout_s)
        else:
            self._clock.sleep_until_ns(self._clock.monotonic_ns() + ns_from_s(timeout_s))

    def close(self) -> None:
        """Give up what is under way."""
        with self._lock:
            openings = list(self._openings.values())
            self._openings.clear()
            self._wanted.clear()
        for opening in openings:
            opening.sampler.close(force=True)

    def _delay_ns(self, node_id: str) -> int:
        tries = self._tries.get(node_id, 0)
        return ns_from_s(REST_S if tries >= TRIES else RETRY_S * tries)

    def _begin(self) -> None:
        now_ns = self._clock.monotonic_ns()
        with self._lock:
            due = [node for node, begin_ns in self._wanted.values() if begin_ns <= now_ns]
        for node in due:
            sampler = self._executor.open_sampler(node, self._settings)
            opening = _Opening(node, sampler, sampler.host(), now_ns, now_ns)
            with self._lock:
                if self._wanted.pop(node.node_id, None) is None:  # forgotten meanwhile
                    continue
                self._tries[node.node_id] = self._tries.get(node.node_id, 0) + 1
                self._openings[node.node_id] = opening
                self.problems.pop(node.node_id, None)

    def _must_wait(self, opening: _Opening, started: Sequence[Started]) -> bool:
        """Samplers of one host begin one after the other: each leaves out the devices of those before."""
        if opening.host is not None:
            return False
        host = opening.call.result(ANSWER_S)
        with self._lock:
            begun = {other.host for other in self._openings.values()}
        return host in begun or host in {one.info.node for one in started}

    def _advance(self, opening: _Opening) -> list[Started]:
        answer = opening.call.result(ANSWER_S)
        answered_ns = self._clock.monotonic_ns()
        if isinstance(answer, str):
            opening.host = answer
            self._told_host(opening.node.node_id, answer)
            skip, min_epoch = self._begin_of(answer)
            opening.call = opening.sampler.describe(skip, min_epoch)
            return []
        if isinstance(answer, SamplerInfo):
            opening.info = answer
            opening.sent_ns = answered_ns
            opening.call = opening.sampler.probe()
            return []
        with self._lock:
            if self._openings.pop(opening.node.node_id, None) is None:
                return []
        assert opening.info is not None
        received_ns, replied_ns = answer
        exchange = Exchange(
            sent_ns=opening.sent_ns, received_ns=received_ns, replied_ns=replied_ns, answered_ns=self._clock.monotonic_ns()
        )
        return [Started(node=opening.node, sampler=opening.sampler, info=opening.info, exchange=exchange)]

    def _fail(self, opening: _Opening, error: LlemRayError) -> LlemRayError | None:
        """Try again if its process died; returns the error where that makes no sense any more."""
        node = opening.node
        with self._lock:
            if self._openings.pop(node.node_id, None) is None:
                return None
            self.problems[node.node_id] = error.message
            again = isinstance(error, EngineDied)
            tried = self._tries.get(node.node_id, 0)
            if not again:
                self._refused[node.node_id] = error.message
        opening.sampler.close(force=True)
        if again and tried < TRIES:
            LOG.warning("the sampler of %s died before it began, try %d: %s", node.hostname, tried, error.message)
            self.want(node)
            return None
        LOG.error("no sampler on %s: %s", node.hostname, error)
        return error
