"""A clock that jumps: minutes of sampling cost milliseconds."""

from __future__ import annotations


class VirtualClock:
    """A monotonic clock that moves only when somebody sleeps on it or advances it."""

    def __init__(self, start_ns: int = 1_000_000_000_000) -> None:
        self._now_ns = start_ns

    def monotonic_ns(self) -> int:
        """Now, in ns."""
        return self._now_ns

    def sleep_until_ns(self, t_ns: int) -> None:
        """Jump to ``t_ns``; never back."""
        self._now_ns = max(self._now_ns, t_ns)

    def advance_ns(self, duration_ns: int) -> None:
        """Let ``duration_ns`` pass."""
        self._now_ns += duration_ns
