"""Keeps the clock offsets of hosts sharp while a gang runs on several of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Final

from llem_ray.core.clock import Clock
from llem_ray.core.errors import LlemRayError
from llem_ray.execution.calls import Sampler
from llem_ray.execution.clocks import ClockTable, Exchange

LOG = logging.getLogger(__name__)

PROBES: Final = 4
"""Exchanges in a row with one host: the quickest of them counts."""
PERIOD_S: Final = 0.5
SHARE_S: Final = 0.05
"""A host is asked no more often than this times the number of hosts, so that a large cluster costs no more than a small one."""
ANSWER_S: Final = 2.0


class ClockProber:
    """A thread that exchanges times with the hosts of gangs that run on several hosts.

    Args:
        table: Where exchanges go.
        clock: The run driver's clock.
        sampler_of: Host -> its sampler, or None.
    """

    def __init__(self, table: ClockTable, clock: Clock, sampler_of: Callable[[str], Sampler | None]) -> None:
        self._table, self._clock, self._sampler_of = table, clock, sampler_of
        self._wanted: dict[str, tuple[str, ...]] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, name: str, hosts: Iterable[str]) -> None:
        """Keep the offsets of these hosts sharp until ``watch_no_more(name)``; the first exchanges are made before it returns."""
        mine = tuple(host for host in hosts if not self._table.is_own(host))
        for host in mine:
            self._probe(host)
        with self._lock:
            self._wanted[name] = mine
            if self._thread is None and mine:
                self._thread = threading.Thread(target=self._work, name="llem-ray-clocks", daemon=True)
                self._thread.start()

    def watch_no_more(self, name: str) -> None:
        """The gang is gone."""
        with self._lock:
            self._wanted.pop(name, None)

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=ANSWER_S * PROBES)

    def _work(self) -> None:
        while True:
            with self._lock:
                hosts = sorted({host for mine in self._wanted.values() for host in mine})
            for host in hosts:
                if self._end.is_set():
                    return
                self._probe(host)
            if self._end.wait(max(PERIOD_S, SHARE_S * len(hosts))):
                return

    def _probe(self, host: str) -> None:
        sampler = self._sampler_of(host)
        if sampler is None:
            return
        for _ in range(PROBES):
            sent_ns = self._clock.monotonic_ns()
            try:
                received_ns, replied_ns = sampler.probe().result(ANSWER_S)
            except (LlemRayError, TimeoutError):
                return  # whoever fetches its samples notices too, and does something about it
            answered_ns = self._clock.monotonic_ns()
            self._table.add(
                host, Exchange(sent_ns=sent_ns, received_ns=received_ns, replied_ns=replied_ns, answered_ns=answered_ns)
            )
