"""Holds one node's samples in the run driver: batches in, traces of single devices out."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import Final, TypeVar

import numpy as np

from llem_ray.core.power import DeviceState, Float64, Int64, SampleBatch, Trace

FIRST_CAPACITY: Final = 1024

MAX_BEYOND: Final = 4096
"""Batches waited for in vain are given up once this many later ones have come."""

_T = TypeVar("_T")

_BY_TIME: Final = attrgetter("t_ns")


class TraceBuffer:
    """The samples of one node, by device. Appending is amortised O(1) a row; a trace is O(log n) and views, not copies.

    One buffer a node: the monotonic clocks of two nodes must not be compared, and ``rapl:package-0`` exists on each.
    Batches may arrive twice, out of order, or overlapping in time (an old and a new sampler epoch). All methods may be
    called from any thread; a trace stays as it is while later batches arrive and old ones are trimmed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._node: str | None = None
        self._columns: dict[str, _Columns] = {}
        self._states: dict[str, list[DeviceState]] = {}
        self._errors: dict[str, list[tuple[int, str]]] = {}
        self._seen: dict[int, _Seen] = {}

    @property
    def devices(self) -> tuple[str, ...]:
        """UUIDs of all devices that any batch named, in order of appearance."""
        with self._lock:
            return tuple(self._columns)

    def append(self, batch: SampleBatch) -> bool:
        """Take in one batch.

        Returns:
            False when the batch (its epoch and number) was here already, and nothing changed.

        Raises:
            ValueError: The batch is another node's.
        """
        with self._lock:
            if self._node not in (None, batch.node):
                raise ValueError(f"batch of node {batch.node!r} for the trace buffer of node {self._node!r}")
            self._node = batch.node
            if not self._seen.setdefault(batch.epoch, _Seen()).add(batch.seq):
                return False
            for index, uuid in enumerate(batch.devices):
                columns = self._columns.setdefault(uuid, _Columns())
                rows = np.flatnonzero(batch.device == index)
                if len(rows):
                    columns.append(batch, rows)
            for state in batch.states:
                _insert(self._states.setdefault(state.device_uuid, []), state, _BY_TIME)
            for row, text in batch.errors.items():
                errors = self._errors.setdefault(batch.devices[int(batch.device[row])], [])
                _insert(errors, (int(batch.t_ns[row]), text), itemgetter(0))
            return True

    def trace(self, uuid: str, begin_ns: int, end_ns: int) -> Trace:
        """The samples of ``uuid`` with ``begin_ns <= t_ns <= end_ns``; empty for a device never heard of."""
        with self._lock:
            columns = self._columns.get(uuid) or _Columns()
            lo, hi = columns.span(begin_ns, end_ns)
            return Trace(
                device_uuid=uuid,
                t_ns=columns.ints[0, lo:hi],
                hw_ns=columns.ints[1, lo:hi],
                power_mw=columns.floats[0, lo:hi],
                power_avg_mw=columns.floats[1, lo:hi],
                energy_mj=columns.floats[2, lo:hi],
            )

    def states(self, uuid: str, begin_ns: int, end_ns: int) -> tuple[DeviceState, ...]:
        """The slow-lane readings of ``uuid`` with ``begin_ns <= t_ns <= end_ns``, in order of time."""
        with self._lock:
            states = self._states.get(uuid, [])
            lo = bisect_left(states, begin_ns, key=_BY_TIME)
            return tuple(states[lo : bisect_right(states, end_ns, key=_BY_TIME)])

    def errors(self, uuid: str, begin_ns: int, end_ns: int) -> tuple[tuple[int, str], ...]:
        """(t_ns, why) of the samples of ``uuid`` in [begin_ns, end_ns] that lack a reading."""
        with self._lock:
            errors = self._errors.get(uuid, [])
            lo = bisect_left(errors, begin_ns, key=itemgetter(0))
            return tuple(errors[lo : bisect_right(errors, end_ns, key=itemgetter(0))])

    def last_ns(self, uuid: str) -> int | None:
        """Time of the newest sample of ``uuid``; None before the first."""
        with self._lock:
            columns = self._columns.get(uuid)
            return None if columns is None else columns.last_ns

    def trim(self, before_ns: int) -> None:
        """Forget everything older than ``before_ns``; memory is given back once half of a device's rows are gone."""
        with self._lock:
            for columns in self._columns.values():
                columns.trim(before_ns)
            for states in self._states.values():
                del states[: bisect_left(states, before_ns, key=_BY_TIME)]
            for errors in self._errors.values():
                del errors[: bisect_left(errors, before_ns, key=itemgetter(0))]


class _Columns:
    """Growing columns of one device, ascending in time; rows [head, tail) are in use.

    Rows in use are never changed in place: growing, merging and trimming make new arrays, so views handed out stay true.
    """

    def __init__(self) -> None:
        self.ints: Int64 = np.empty((2, 0), np.int64)
        self.floats: Float64 = np.empty((3, 0), np.float64)
        self._head = self._tail = 0

    @property
    def last_ns(self) -> int | None:
        return int(self.ints[0, self._tail - 1]) if self._tail > self._head else None

    def append(self, batch: SampleBatch, rows: Int64) -> None:
        ints = np.stack((batch.t_ns[rows], batch.hw_ns[rows]))
        floats = np.stack((batch.power_mw[rows], batch.power_avg_mw[rows], batch.energy_mj[rows]))
        ascending = bool(np.all(np.diff(ints[0]) > 0))
        if ascending and (self.last_ns is None or ints[0, 0] > self.last_ns):
            self._extend(ints, floats)
        else:
            self._merge(ints, floats)

    def span(self, begin_ns: int, end_ns: int) -> tuple[int, int]:
        t_ns = self.ints[0, self._head : self._tail]
        lo, hi = np.searchsorted(t_ns, begin_ns, "left"), np.searchsorted(t_ns, end_ns, "right")
        return self._head + int(lo), self._head + max(int(lo), int(hi))

    def trim(self, before_ns: int) -> None:
        self._head += int(np.searchsorted(self.ints[0, self._head : self._tail], before_ns, "left"))
        if self._head > FIRST_CAPACITY and 2 * self._head > self._tail:
            self._replace(self.ints[:, self._head : self._tail], self.floats[:, self._head : self._tail])

    def _extend(self, ints: Int64, floats: Float64) -> None:
        added = ints.shape[1]
        if self._tail + added > self.ints.shape[1]:
            self._replace(self.ints[:, self._head : self._tail], self.floats[:, self._head : self._tail], room=added)
        self.ints[:, self._tail : self._tail + added] = ints
        self.floats[:, self._tail : self._tail + added] = floats
        self._tail += added

    def _merge(self, ints: Int64, floats: Float64) -> None:
        all_ints = np.concatenate((self.ints[:, self._head : self._tail], ints), axis=1)
        all_floats = np.concatenate((self.floats[:, self._head : self._tail], floats), axis=1)
        _, first = np.unique(all_ints[0], return_index=True)
        self._replace(all_ints[:, first], all_floats[:, first])

    def _replace(self, ints: Int64, floats: Float64, room: int = 0) -> None:
        rows = ints.shape[1]
        capacity = max(FIRST_CAPACITY, 2 * (rows + room))
        self.ints, old_ints = np.empty((2, capacity), np.int64), ints
        self.floats, old_floats = np.empty((3, capacity), np.float64), floats
        self.ints[:, :rows], self.floats[:, :rows] = old_ints, old_floats
        self._head, self._tail = 0, rows


class _Seen:
    """Which batch numbers of one epoch are in: all up to ``_through``, and the ``_beyond``."""

    def __init__(self) -> None:
        self._through = 0
        self._beyond: set[int] = set()

    def add(self, seq: int) -> bool:
        if seq <= self._through or seq in self._beyond:
            return False
        self._beyond.add(seq)
        if len(self._beyond) > MAX_BEYOND:
            self._through = min(self._beyond) - 1
        while self._through + 1 in self._beyond:
            self._through += 1
            self._beyond.remove(self._through)
        return True


def _insert(items: list[_T], item: _T, key: Callable[[_T], int]) -> None:
    if not items or key(item) > key(items[-1]):
        items.append(item)
    else:
        items.insert(bisect_right(items, key(item), key=key), item)
