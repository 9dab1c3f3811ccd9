"""Work on many hosts, spread evenly over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from llem_ray.core.units import ns_from_s

T = TypeVar("T")


class Turns:
    """Whose turn it is: everybody's once in a period, spread evenly over it.

    Args:
        period_s: Time between two turns of one.
        begin_ns: When the first period begins.
    """

    def __init__(self, period_s: float, begin_ns: int) -> None:
        self._period_ns = ns_from_s(period_s)
        self._served_ns = begin_ns

    def take(self, items: Sequence[T], now_ns: int) -> list[T]:
        """Those whose turn came since the last call, up to now; nobody twice."""
        if now_ns < self._served_ns:
            return []
        first_ns, self._served_ns = max(self._served_ns, now_ns - self._period_ns), now_ns
        n, period_ns = len(items), self._period_ns
        begin, end = first_ns * n // period_ns, now_ns * n // period_ns
        return [items[number % n] for number in range(begin, end)]
