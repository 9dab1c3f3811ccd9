"""Holds one node's samples in the run driver: batches in, traces of single devices out."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan
from operator import itemgetter
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from llem_ray.core.power import DeviceState, DeviceStates, Int64, SampleBatch, Trace

BLOCK_ROWS: Final = 1024
"""Batches are joined as long as they are smaller together."""

MAX_BEYOND: Final = 4096
"""Batches waited for in vain are given up once this many later ones have come."""

_T = TypeVar("_T")

_Column = npt.NDArray[Any]

_TYPES: Final = (np.int64, np.int64, np.float64, np.float64, np.float64)
"""Of t_ns, hw_ns, power_mw, power_avg_mw and energy_mj."""


class TraceBuffer:
    """The samples of one node, by device: blocks of rows as they came, put together when a trace is asked for.

    On a large cluster most samples are never looked at singly, so taking one in must cost little time and memory: numbers that
    fit are held in 4 bytes. A trace copies its rows; it stays as it is while later batches arrive and old ones are trimmed.

    One buffer a node: the monotonic clocks of two nodes must not be compared, and ``rapl:package-0`` exists on each.
    Batches may arrive twice, out of order, or overlapping in time (an old and a new sampler epoch). All methods may be
    called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._node: str | None = None
        self._blocks: deque[_Block] = deque()
        self._last_ns: dict[str, int | None] = {}
        self._disordered: set[str] = set()
        """Devices of which a batch came too late, or again in parts."""
        self._trimmed_ns = -(2**63)
        self._errors: dict[str, list[tuple[int, str]]] = {}
        self._seen: dict[int, _Seen] = {}

    @property
    def devices(self) -> tuple[str, ...]:
        """UUIDs of all devices that any batch named, in order of appearance."""
        with self._lock:
            return tuple(self._last_ns)

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
            block = _block_of(batch)
            self._notice(block)
            if self._blocks and self._blocks[-1].rows + block.rows <= BLOCK_ROWS:
                block = _joined(self._blocks.pop(), block)
            self._blocks.append(block)
            for row, text in batch.errors.items():
                errors = self._errors.setdefault(batch.devices[int(batch.device[row])], [])
                _insert(errors, (int(batch.t_ns[row]), text), itemgetter(0))
            return True

    def _notice(self, block: _Block) -> None:
        """Whose newest sample it has, and whose samples do not follow those that were here."""
        for uuid, first, end in zip(block.devices, block.bounds[:-1], block.bounds[1:], strict=True):
            known_ns = self._last_ns.setdefault(uuid, None)
            if first == end:
                continue
            t_ns = block.times_ns(uuid)
            if not block.is_ascending or (known_ns is not None and t_ns[0] <= known_ns):
                self._disordered.add(uuid)
            last_ns = int(t_ns[-1] if block.is_ascending else t_ns.max())
            self._last_ns[uuid] = last_ns if known_ns is None else max(known_ns, last_ns)

    def trace(self, uuid: str, begin_ns: int, end_ns: int) -> Trace:
        """The samples of ``uuid`` with ``begin_ns <= t_ns <= end_ns``; empty for a device never heard of."""
        with self._lock:
            begin_ns = max(begin_ns, self._trimmed_ns)
            held = [block.of_device(uuid, begin_ns, end_ns) for block in self._blocks if block.reaches(begin_ns, end_ns)]
            disordered = uuid in self._disordered
        pieces = [piece for piece in held if piece is not None]
        parts = [_put_together([piece[i] for piece in pieces], dtype) for i, dtype in enumerate(_TYPES)]
        if disordered:
            _, first = np.unique(parts[0], return_index=True)
            parts = [part[first] for part in parts]
        return Trace(
            device_uuid=uuid, t_ns=parts[0], hw_ns=parts[1], power_mw=parts[2], power_avg_mw=parts[3], energy_mj=parts[4]
        )

    def states(self, uuid: str, begin_ns: int, end_ns: int) -> tuple[DeviceState, ...]:
        """The slow-lane readings of ``uuid`` with ``begin_ns <= t_ns <= end_ns``, in order of time."""
        with self._lock:
            begin_ns = max(begin_ns, self._trimmed_ns)
            held = [states for block in self._blocks if block.reaches(begin_ns, end_ns) for states in block.states]
        found = (state for states in held for state in states.of_device(uuid, begin_ns, end_ns))
        return tuple(sorted(found, key=lambda state: state.t_ns))

    def errors(self, uuid: str, begin_ns: int, end_ns: int) -> tuple[tuple[int, str], ...]:
        """(t_ns, why) of the samples of ``uuid`` in [begin_ns, end_ns] that lack a reading."""
        with self._lock:
            errors = self._errors.get(uuid, [])
            lo = bisect_left(errors, begin_ns, key=itemgetter(0))
            return tuple(errors[lo : bisect_right(errors, end_ns, key=itemgetter(0))])

    def last_ns(self, uuid: str) -> int | None:
        """Time of the newest sample of ``uuid``; None before the first."""
        with self._lock:
            last_ns = self._last_ns.get(uuid)
            return None if last_ns is None or last_ns < self._trimmed_ns else last_ns

    def latest_power_mw(self, uuid: str, since_ns: int) -> float | None:
        """Instant power of the newest sample of ``uuid``; None where that is older than ``since_ns`` or was not read."""
        last_ns = self.last_ns(uuid)
        if last_ns is None or last_ns < since_ns:
            return None
        with self._lock:
            for block in reversed(self._blocks):
                power_mw = block.power_at(uuid, last_ns)
                if power_mw is not None:
                    return None if isnan(power_mw) else power_mw
        return None

    def trim(self, before_ns: int) -> None:
        """Forget everything older than ``before_ns``; memory is given back block by block."""
        with self._lock:
            self._trimmed_ns = max(self._trimmed_ns, before_ns)
            while self._blocks and self._blocks[0].last_ns < before_ns:
                self._blocks.popleft()
            for errors in self._errors.values():
                del errors[: bisect_left(errors, before_ns, key=itemgetter(0))]


@dataclass(slots=True)
class _Packed:
    """Whole numbers, device by device, as what they are off from an even progression: 4 bytes each, exactly."""

    first: Int64
    step: Int64
    rest: npt.NDArray[np.int32]

    def unpacked(self, index: int, begin: int, end: int) -> Int64:
        """All of device ``index``, whose rows these are."""
        values: Int64 = self.first[index] + self.step[index] * np.arange(end - begin) + self.rest[begin:end]
        return values

    def last(self, index: int, begin: int, end: int) -> int:
        """The last of device ``index``."""
        return int(self.first[index] + self.step[index] * (end - 1 - begin) + self.rest[end - 1])


def _packed(values: _Column, bounds: Sequence[int]) -> _Packed | _Column:
    """The values in half the space, or as they are where some are missing, broken or far from even."""
    if not len(values) or not np.isfinite(values).all() or np.abs(values).max() >= 2**62:
        return values
    whole = values.astype(np.int64)
    if not np.array_equal(whole, values):
        return values
    starts, counts = np.array(bounds[:-1]), np.diff(bounds)
    first, last = whole[np.minimum(starts, len(whole) - 1)], whole[np.maximum(starts + counts - 1, 0)]
    step = (last - first) // np.maximum(counts - 1, 1)
    even = np.repeat(first - step * starts, counts) + np.repeat(step, counts) * np.arange(len(whole))
    rest = whole - even
    if np.abs(rest).max() >= 2**31:
        return values
    return _Packed(first, step, rest.astype(np.int32))


@dataclass(slots=True)
class _Block:
    """Rows of one batch or several, device by device; those of a device in order of time if ``is_ascending``. Never changed."""

    devices: tuple[str, ...]
    bounds: list[int]
    """Rows of device i are [bounds[i], bounds[i + 1])."""
    columns: tuple[_Packed | _Column, ...]
    """t_ns, hw_ns, power_mw, power_avg_mw, energy_mj, in the smallest form that holds them exactly."""
    states: list[DeviceStates]
    first_ns: int
    last_ns: int
    is_ascending: bool

    @property
    def rows(self) -> int:
        return self.bounds[-1] + sum(map(len, self.states))

    def reaches(self, begin_ns: int, end_ns: int) -> bool:
        return self.first_ns <= end_ns and self.last_ns >= begin_ns

    def times_ns(self, uuid: str) -> Int64:
        """Times of all rows of one device."""
        return self._column(0, self.devices.index(uuid))

    def _column(self, number: int, index: int) -> _Column:
        column, (begin, end) = self.columns[number], self.bounds[index : index + 2]
        return column.unpacked(index, begin, end) if isinstance(column, _Packed) else column[begin:end]

    def of_device(self, uuid: str, begin_ns: int = -(2**63), end_ns: int = 2**63 - 1) -> tuple[_Column, ...] | None:
        """Rows of one device as columns; None where it has none within these times."""
        if uuid not in self.devices:
            return None
        index = self.devices.index(uuid)
        columns = [self._column(number, index) for number in range(len(self.columns))]
        if begin_ns > self.first_ns or end_ns < self.last_ns:
            wanted = (columns[0] >= begin_ns) & (columns[0] <= end_ns)
            columns = [column[wanted] for column in columns]
        return tuple(columns) if len(columns[0]) else None

    def power_at(self, uuid: str, t_ns: int) -> float | None:
        """Instant power of the sample that was taken just then; None where there is none."""
        if not self.first_ns <= t_ns <= self.last_ns or uuid not in self.devices:
            return None
        index = self.devices.index(uuid)
        end, times = self.bounds[index + 1], self.columns[0]
        if end > self.bounds[index] and isinstance(times, _Packed) and times.last(index, self.bounds[index], end) == t_ns:
            powers = self.columns[2]
            return float(powers.last(index, self.bounds[index], end) if isinstance(powers, _Packed) else powers[end - 1])
        rows = np.flatnonzero(self._column(0, index) == t_ns)
        return float(self._column(2, index)[rows[0]]) if len(rows) else None


def _block_of(batch: SampleBatch) -> _Block:
    order = np.argsort(batch.device, kind="stable")
    counts = np.bincount(batch.device, minlength=len(batch.devices))
    columns = [column[order] for column in (batch.t_ns, batch.hw_ns, batch.power_mw, batch.power_avg_mw, batch.energy_mj)]
    states = [_own(DeviceStates.of(batch.states))] if len(batch.states) else []
    return _made(batch.devices, [0, *np.cumsum(counts).tolist()], columns, states)


def _made(devices: tuple[str, ...], bounds: list[int], columns: Sequence[_Column], states: list[DeviceStates]) -> _Block:
    t_ns, hw_ns, power_mw, power_avg_mw, energy_mj = columns
    falls = (np.flatnonzero(np.diff(t_ns) <= 0) + 1).tolist()
    times = [column for column in (t_ns, *(part.t_ns for part in states)) if len(column)]
    return _Block(
        devices=devices,
        bounds=bounds,
        columns=(
            _packed(t_ns, bounds),
            _small(hw_ns, np.int32),
            _small(power_mw, np.float32),
            _small(power_avg_mw, np.float32),
            _packed(energy_mj, bounds),
        ),
        states=states,
        first_ns=min((int(column.min()) for column in times), default=2**62),
        last_ns=max((int(column.max()) for column in times), default=-(2**62)),
        is_ascending=set(falls) <= set(bounds),
    )


def _own(states: DeviceStates) -> DeviceStates:
    """A copy: what came from another process is a view of the whole message, and would keep it."""
    return DeviceStates(states.uuids, states.ints.copy(), states.floats.copy())


def _small(column: _Column, dtype: type) -> _Column:
    """The column in a smaller type, where that holds all of it exactly."""
    with np.errstate(over="ignore"):
        small: _Column = column.astype(dtype)
    return small if np.array_equal(small, column, equal_nan=column.dtype.kind == "f") else column


def _joined(old: _Block, new: _Block) -> _Block:
    """Both as one block; of the rows of a device those of the older one come first."""
    devices = tuple(dict.fromkeys((*old.devices, *new.devices)))
    pieces: list[tuple[_Column, ...]] = []
    bounds = [0]
    for uuid in devices:
        mine = [rows for block in (old, new) if (rows := block.of_device(uuid)) is not None]
        pieces += mine
        bounds.append(bounds[-1] + sum(len(rows[0]) for rows in mine))
    columns = [_put_together([piece[i] for piece in pieces], dtype) for i, dtype in enumerate(_TYPES)]
    return _made(devices, bounds, columns, _joined_states(old.states, new.states))


def _joined_states(old: list[DeviceStates], new: list[DeviceStates]) -> list[DeviceStates]:
    if not old or not new or old[-1].uuids != new[0].uuids:
        return [*old, *new]
    both = (old[-1], new[0])
    joined = DeviceStates(
        new[0].uuids,
        np.concatenate([one.ints for one in both], axis=1),
        np.concatenate([one.floats for one in both], axis=1),
    )
    return [*old[:-1], joined, *new[1:]]


def _put_together(pieces: Sequence[_Column], dtype: type) -> _Column:
    return np.concatenate(pieces, dtype=dtype) if pieces else np.empty(0, dtype)


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
