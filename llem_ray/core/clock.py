"""The one notion of time: CLOCK_MONOTONIC in nanoseconds, system-wide on a Linux host."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock that can also wait. Tests pass a virtual one."""

    def monotonic_ns(self) -> int:
        """Now, in ns of the host's monotonic clock."""
        ...

    def sleep_until_ns(self, t_ns: int) -> None:
        """Return once ``monotonic_ns() >= t_ns``; at once if it is already so."""
        ...


class SystemClock:
    """The host's CLOCK_MONOTONIC."""

    def monotonic_ns(self) -> int:
        """Now, in ns."""
        return time.monotonic_ns()

    def sleep_until_ns(self, t_ns: int) -> None:
        """Sleep until ``t_ns``; time.sleep on Linux is itself monotonic and restarts after signals."""
        while (left_ns := t_ns - time.monotonic_ns()) > 0:
            time.sleep(left_ns / 1e9)
