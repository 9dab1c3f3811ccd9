"""What the clocks of other hosts show when the run driver's shows something: an offset with a bound that holds.

Every exchange gives hard limits: the host's clock was read between our question and its answer. Exchanges of other moments hold
too, widened by what two clocks may drift apart meanwhile. What is common to all of them is the offset.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Final

from llem_ray.core.units import NS_PER_S

MAX_DRIFT: Final = 200e-6
"""Two clocks drift apart by less. Crystals do 50e-6, and time daemons slew CLOCK_MONOTONIC gently once they are settled."""

REACH_S: Final = 60.0
"""Exchanges further away say nothing that nearer ones do not."""

SLOT_NS: Final = NS_PER_S // 4
"""Of the exchanges within one slot only the tightest is kept."""

KEEP_S: Final = 900.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """A question to a host and its answer. ``sent`` and ``answered`` on our clock, ``received`` and ``replied`` on the host's."""

    sent_ns: int
    received_ns: int
    replied_ns: int
    answered_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Offset:
    """A host's clock less ours. The truth lies within ``offset_ns`` +- ``delta_ns``."""

    offset_ns: int
    delta_ns: int


@dataclass(slots=True)
class _Known:
    at_ns: int
    lo_ns: int
    hi_ns: int

    @property
    def width_ns(self) -> int:
        return self.hi_ns - self.lo_ns


_SAME: Final = Offset(offset_ns=0, delta_ns=0)


class ClockTable:
    """Offsets of all hosts of a run. Its methods may be called from any thread.

    Args:
        own_host: Stable id of the host whose clock is the reference: its own offset is 0, exactly.
        max_drift: Largest relative difference of two clocks' rates.
    """

    def __init__(self, own_host: str, max_drift: float = MAX_DRIFT) -> None:
        self._own_host = own_host
        self._max_drift = max_drift
        self._known: dict[str, deque[_Known]] = {}
        self._lock = threading.Lock()

    def is_own(self, host: str) -> bool:
        """The host's clock is the reference."""
        return host == self._own_host

    def add(self, host: str, exchange: Exchange) -> None:
        """Take in one exchange. Exchanges must come in order of time, to within a slot."""
        if self.is_own(host):
            return
        fresh = _Known(
            at_ns=(exchange.sent_ns + exchange.answered_ns) // 2,
            lo_ns=exchange.replied_ns - exchange.answered_ns,
            hi_ns=exchange.received_ns - exchange.sent_ns,
        )
        if fresh.width_ns < 0:  # answered before it was asked: no exchange
            return
        with self._lock:
            known = self._known.setdefault(host, deque())
            if known and fresh.at_ns // SLOT_NS == known[-1].at_ns // SLOT_NS:
                if fresh.width_ns < known[-1].width_ns:
                    known[-1] = fresh
            else:
                known.append(fresh)
            while known and known[0].at_ns < fresh.at_ns - KEEP_S * NS_PER_S:
                known.popleft()

    def forget(self, host: str) -> None:
        """The host was restarted: its clock is another one."""
        with self._lock:
            self._known.pop(host, None)

    def offset(self, host: str, at_ns: int) -> Offset | None:
        """The host's clock less ours at ``at_ns`` of our clock; None when there was no exchange within reach.

        Where exchanges contradict each other (a clock that drifts more than it may), the limits are those of all of them.
        """
        if self.is_own(host):
            return _SAME
        with self._lock:
            near = [one for one in self._known.get(host, ()) if abs(one.at_ns - at_ns) <= REACH_S * NS_PER_S]
            if not near:
                return self._far(host, at_ns)
        lo_ns, hi_ns = -(2**63), 2**63
        for one in near:
            drift_ns = round(self._max_drift * abs(one.at_ns - at_ns))
            lo_ns, hi_ns = max(lo_ns, one.lo_ns - drift_ns), min(hi_ns, one.hi_ns + drift_ns)
        lo_ns, hi_ns = min(lo_ns, hi_ns), max(lo_ns, hi_ns)
        return Offset(offset_ns=(lo_ns + hi_ns) // 2, delta_ns=(hi_ns - lo_ns + 1) // 2)

    def _far(self, host: str, at_ns: int) -> Offset | None:
        """From the nearest exchange, however far: a host that fell silent still had its clock."""
        nearest = min(self._known.get(host, ()), key=lambda one: abs(one.at_ns - at_ns), default=None)
        if nearest is None:
            return None
        drift_ns = round(self._max_drift * abs(nearest.at_ns - at_ns))
        middle_ns = (nearest.lo_ns + nearest.hi_ns) // 2
        return Offset(offset_ns=middle_ns, delta_ns=(nearest.width_ns + 1) // 2 + drift_ns)

    def latest(self, host: str) -> Offset | None:
        """The offset of the newest exchange, as it was then."""
        if self.is_own(host):
            return _SAME
        with self._lock:
            known = self._known.get(host)
            if not known:
                return None
            newest = known[-1]
        return Offset(offset_ns=(newest.lo_ns + newest.hi_ns) // 2, delta_ns=(newest.width_ns + 1) // 2)

    def to_host(self, host: str, at_ns: int) -> int | None:
        """``at_ns`` of our clock on the host's clock, ns; None when its offset is not known."""
        found = self.offset(host, at_ns)
        return None if found is None else at_ns + found.offset_ns

    def to_own(self, host: str, host_ns: int) -> int | None:
        """``host_ns`` of the host's clock on ours, ns; None when its offset is not known."""
        if self.is_own(host):
            return host_ns
        with self._lock:
            known = self._known.get(host)
            if not known:
                return None
            guess_ns = host_ns - (known[-1].lo_ns + known[-1].hi_ns) // 2
        found = self.offset(host, guess_ns)
        return None if found is None else host_ns - found.offset_ns
