"""What the clocks of other hosts show when the run driver's shows something: an offset with a bound that holds.

Every exchange gives hard limits: the host's clock was read between our question and its answer. Exchanges of other moments hold
too, widened by what two clocks may drift apart meanwhile. What is common to all of them is the offset.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import Final

import numpy as np

from llem_ray.core.power import Int64
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


class _Track:
    """What exchanges with one host told, in order of time, as bare integers: a large cluster has hundreds of thousands."""

    def __init__(self) -> None:
        self.at_ns, self.lo_ns, self.hi_ns = array("q"), array("q"), array("q")

    def add(self, at_ns: int, lo_ns: int, hi_ns: int) -> None:
        index = bisect_right(self.at_ns, at_ns)
        if index and at_ns // SLOT_NS == self.at_ns[index - 1] // SLOT_NS:
            if hi_ns - lo_ns < self.hi_ns[index - 1] - self.lo_ns[index - 1]:
                self.at_ns[index - 1], self.lo_ns[index - 1], self.hi_ns[index - 1] = at_ns, lo_ns, hi_ns
            return
        for column, value in ((self.at_ns, at_ns), (self.lo_ns, lo_ns), (self.hi_ns, hi_ns)):
            column.insert(index, value)
        stale = bisect_left(self.at_ns, at_ns - round(KEEP_S * NS_PER_S))
        for column in (self.at_ns, self.lo_ns, self.hi_ns):
            del column[:stale]

    def near(self, at_ns: int) -> tuple[Int64, Int64, Int64]:
        """Those within reach: when, and the limits they set."""
        reach_ns = round(REACH_S * NS_PER_S)
        rows = slice(bisect_left(self.at_ns, at_ns - reach_ns), bisect_right(self.at_ns, at_ns + reach_ns))
        at, lo, hi = (np.array(column[rows], np.int64) for column in (self.at_ns, self.lo_ns, self.hi_ns))
        return at, lo, hi

    def nearest(self, at_ns: int) -> tuple[int, int, int]:
        """The one that is nearest, however far."""
        right = bisect_right(self.at_ns, at_ns)
        around = [index for index in (right - 1, right) if 0 <= index < len(self.at_ns)]
        index = min(around, key=lambda index: abs(self.at_ns[index] - at_ns))
        return self.at_ns[index], self.lo_ns[index], self.hi_ns[index]


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
        self._known: dict[str, _Track] = {}
        self._lock = threading.Lock()

    def is_own(self, host: str) -> bool:
        """The host's clock is the reference."""
        return host == self._own_host

    def add(self, host: str, exchange: Exchange) -> None:
        """Take in one exchange."""
        if self.is_own(host):
            return
        lo_ns, hi_ns = exchange.replied_ns - exchange.answered_ns, exchange.received_ns - exchange.sent_ns
        if hi_ns < lo_ns:  # the clocks drifted apart while the answer was held, or it was answered before it was asked
            if lo_ns - hi_ns > round(self._max_drift * (exchange.replied_ns - exchange.received_ns)) + 1:
                return
            lo_ns, hi_ns = hi_ns, lo_ns
        with self._lock:
            self._known.setdefault(host, _Track()).add((exchange.sent_ns + exchange.answered_ns) // 2, lo_ns, hi_ns)

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
            known = self._known.get(host)
            if known is None:
                return None
            near_ns, los_ns, his_ns = known.near(at_ns)
            if not len(near_ns):
                return self._far(known, at_ns)
        drift_ns = np.rint(self._max_drift * np.abs(near_ns - at_ns)).astype(np.int64)
        limits_ns = int((los_ns - drift_ns).max()), int((his_ns + drift_ns).min())
        lo_ns, hi_ns = min(limits_ns), max(limits_ns)
        return Offset(offset_ns=(lo_ns + hi_ns) // 2, delta_ns=(hi_ns - lo_ns + 1) // 2)

    def _far(self, known: _Track, at_ns: int) -> Offset:
        """From the nearest exchange, however far: a host that fell silent still had its clock."""
        nearest_ns, lo_ns, hi_ns = known.nearest(at_ns)
        drift_ns = round(self._max_drift * abs(nearest_ns - at_ns))
        return Offset(offset_ns=(lo_ns + hi_ns) // 2, delta_ns=(hi_ns - lo_ns + 1) // 2 + drift_ns)

    def latest(self, host: str) -> Offset | None:
        """The offset of the newest exchange, as it was then."""
        if self.is_own(host):
            return _SAME
        newest = self._newest(host)
        return None if newest is None else Offset(offset_ns=sum(newest) // 2, delta_ns=(newest[1] - newest[0] + 1) // 2)

    def _newest(self, host: str) -> tuple[int, int] | None:
        with self._lock:
            known = self._known.get(host)
            return None if known is None else (known.lo_ns[-1], known.hi_ns[-1])

    def to_host(self, host: str, at_ns: int) -> int | None:
        """``at_ns`` of our clock on the host's clock, ns; None when its offset is not known."""
        found = self.offset(host, at_ns)
        return None if found is None else at_ns + found.offset_ns

    def to_own(self, host: str, host_ns: int) -> int | None:
        """``host_ns`` of the host's clock on ours, ns; None when its offset is not known."""
        if self.is_own(host):
            return host_ns
        newest = self._newest(host)
        if newest is None:
            return None
        found = self.offset(host, host_ns - sum(newest) // 2)
        return None if found is None else host_ns - found.offset_ns
