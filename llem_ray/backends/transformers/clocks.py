"""Clocks of other hosts, read over a link."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from llem_ray.backends.gang.links import Link, gather

PINGS: Final = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerClock:
    """The monotonic clock of another rank's host against ours."""

    offset_ns: int
    """Theirs minus ours; 0 where both are on one host."""
    half_width_ns: int
    """Half of the shortest round trip: the offset is known this well, and a message takes about as long."""

    def ours(self, theirs_ns: int) -> int:
        """A time of theirs on our clock."""
        return theirs_ns - self.offset_ns


def measure_clock(link: Link, call: int, timeout_s: float, same_host: bool) -> PeerClock:
    """Ask for the time again and again; the quickest answer is the best.

    Raises:
        EngineDied: Nobody is there.
        HangError: No answer came.
    """
    best: tuple[int, int] | None = None
    for _ in range(PINGS):
        begin_ns = time.monotonic_ns()
        link.send(call, "ping", None, timeout_s)
        _, theirs_ns = gather([link], call, timeout_s, "a reading of its clock")[link.rank]
        end_ns = time.monotonic_ns()
        found = (end_ns - begin_ns, theirs_ns - (begin_ns + end_ns) // 2)
        best = found if best is None else min(best, found)
    assert best is not None
    return PeerClock(offset_ns=0 if same_host else best[1], half_width_ns=best[0] // 2)
