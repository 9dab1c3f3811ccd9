"""The seam between llem-ray and a power meter, and the samples that cross it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from typing import Any, Final, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Int64: TypeAlias = npt.NDArray[np.int64]
Float64: TypeAlias = npt.NDArray[np.float64]

Scope = Literal["gpu", "module", "memory", "cpu_package", "dram", "host"]
Method = Literal["measured_counter", "measured_power_integral", "estimated_model", "unavailable"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One thing whose power can be read. ``uuid`` is its identity; ``index`` is for display."""

    uuid: str
    """NVML GPU UUID, ``rapl:<package>``, ``codecarbon:cpu`` and the like; unique on its host."""
    name: str
    source: str
    """Name of the power source that reads it."""
    scope: Scope
    method: Method
    """The best method the device offers; a window may fall back to a lesser one, and says so."""
    index: int = 0
    counter_quantum_mj: float | None = None
    """Step of the energy counter in mJ; None without a counter."""
    power_limit_mw: float | None = None
    """Enforced power limit."""
    memory_bytes: int | None = None
    """All memory of a GPU; None for other devices, and where NVML does not tell."""
    sensor_rel: float | None = None
    """Systematic gain error of the sensor, relative; published beside the reading, never folded into ``u_j``."""
    shared: bool = False
    """Several tenants share the reading (MIG): no joules per tenant."""
    reason: str | None = None
    """Why ``method`` is ``unavailable``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerSample:
    """One poll of one device. A part that was not read is None and ``error`` says why."""

    t_ns: int
    """Mean of the monotonic clock before and after the call."""
    hw_ns: int
    """Half the time the call took."""
    device_uuid: str
    power_mw: float | None
    """Instant power."""
    power_avg_mw: float | None
    """One-second average power."""
    energy_mj: float | None
    """Cumulative energy counter; wraps of the hardware register are already undone."""
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceState:
    """Slow-lane reading of one device, about once a second. Each part may be None."""

    t_ns: int
    device_uuid: str
    temperature_c: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    clock_event_mask: int | None = None
    """NVML clocks-event reasons."""
    memory_used_bytes: int | None = None
    process_count: int | None = None
    power_limit_mw: float | None = None


_ABSENT: Final = -(2**63)
_INT_PARTS: Final = ("clock_event_mask", "memory_used_bytes", "process_count")
_FLOAT_PARTS: Final = ("temperature_c", "sm_clock_mhz", "memory_clock_mhz", "power_limit_mw")


@dataclass(frozen=True, slots=True, eq=False)
class DeviceStates(Sequence[DeviceState]):
    """Readings of the slow lane as columns: a large cluster sends thousands a second, too many to be objects each.

    Args:
        uuids: Devices that ``device`` indexes.
        ints: One row each: device, t_ns, clock_event_mask, memory_used_bytes, process_count; the smallest integer for None.
        floats: One row each: temperature_c, sm_clock_mhz, memory_clock_mhz, power_limit_mw; NaN for None.
    """

    uuids: tuple[str, ...]
    ints: Int64
    floats: Float64

    @classmethod
    def of(cls, states: Sequence[DeviceState]) -> DeviceStates:
        """The same readings as columns, in the same order."""
        if isinstance(states, DeviceStates):
            return states
        uuids = tuple(dict.fromkeys(state.device_uuid for state in states))
        index = {uuid: i for i, uuid in enumerate(uuids)}
        ints = np.array(
            [
                [index[state.device_uuid] for state in states],
                [state.t_ns for state in states],
                *([_ABSENT if (part := getattr(state, name)) is None else part for state in states] for name in _INT_PARTS),
            ],
            np.int64,
        )
        floats = np.array([[getattr(state, name) for state in states] for name in _FLOAT_PARTS], np.float64)
        return cls(uuids, ints, floats)

    @property
    def device(self) -> Int64:
        """Index into ``uuids``, by reading."""
        device: Int64 = self.ints[0]
        return device

    @property
    def t_ns(self) -> Int64:
        """Time, by reading."""
        t_ns: Int64 = self.ints[1]
        return t_ns

    def column(self, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """A part of all readings, and where it is None."""
        if name in _INT_PARTS:
            ints = self.ints[2 + _INT_PARTS.index(name)]
            return ints, ints == _ABSENT
        floats = self.floats[_FLOAT_PARTS.index(name)]
        return floats, np.isnan(floats)

    def of_device(self, uuid: str, begin_ns: int, end_ns: int) -> list[DeviceState]:
        """Readings of one device with ``begin_ns <= t_ns <= end_ns``, in the order they have here."""
        if uuid not in self.uuids:
            return []
        wanted = (self.device == self.uuids.index(uuid)) & (self.t_ns >= begin_ns) & (self.t_ns <= end_ns)
        return [self[int(at)] for at in np.flatnonzero(wanted)]

    def __len__(self) -> int:
        return len(self.ints[0])

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return DeviceStates(self.uuids, self.ints[:, at], self.floats[:, at])
        device, t_ns, *ints = self.ints[:, at].tolist()
        parts: dict[str, Any] = {name: None if part == _ABSENT else part for name, part in zip(_INT_PARTS, ints, strict=True)}
        floats = self.floats[:, at].tolist()
        parts |= {name: None if isnan(part) else part for name, part in zip(_FLOAT_PARTS, floats, strict=True)}
        return DeviceState(t_ns=t_ns, device_uuid=self.uuids[device], **parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What watching a device for 2 s told about its sensor."""

    device_uuid: str
    tick_period_s: float | None
    """Period of the energy counter's ticks; None without a counter or when none was seen."""
    has_instant: bool
    has_average: bool
    lag_s: float
    """Assumed publication lag of the counter."""
    call_s: float
    """Median time of one read."""


class PowerSource(Protocol):
    """A meter on this host. The plug-in's factory is ``() -> PowerSource`` and raises PowerError where it cannot work."""

    name: str
    max_hz: float
    """Polling faster than this is pointless; the sampler honours it."""

    def devices(self) -> tuple[Device, ...]:
        """All devices of this source, fixed for its life.

        Raises:
            PowerError: They cannot be listed.
        """
        ...

    def read(self) -> Sequence[PowerSample]:
        """Poll every device once: one sample a device, in the order of ``devices()``.

        A device that fails yields a sample with ``error`` set; the others are read all the same.
        """
        ...

    def read_states(self) -> Sequence[DeviceState]:
        """Slow-lane readings; empty where the source has none."""
        ...

    def close(self) -> None:
        """Release the meter; may be called more than once."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleBatch:
    """Consecutive samples of one node's sampler as columns of equal length n, in polling order.

    NaN stands for a reading that is missing; ``errors`` says why, by row.
    """

    node: str
    epoch: int
    """Counts the sampler's restarts on this node."""
    seq: int
    """Counts batches within an epoch, from 1."""
    devices: tuple[str, ...]
    """UUIDs that ``device`` indexes."""
    device: npt.NDArray[np.int32]
    t_ns: Int64
    hw_ns: Int64
    power_mw: Float64
    power_avg_mw: Float64
    energy_mj: Float64
    errors: Mapping[int, str] = field(default_factory=dict)
    states: Sequence[DeviceState] = ()
    """Slow-lane readings of the same stretch of time."""

    def __len__(self) -> int:
        return len(self.t_ns)

    def __reduce__(self) -> tuple[Any, ...]:
        columns = (self.device, self.t_ns, self.hw_ns, self.power_mw, self.power_avg_mw, self.energy_mj)
        who = (self.node, self.epoch, self.seq, self.devices)
        return _as_sent, (*who, *columns, dict(self.errors), DeviceStates.of(self.states) if self.states else ())


_BATCH_PARTS: Final = (
    "node", "epoch", "seq", "devices", "device", "t_ns", "hw_ns", "power_mw", "power_avg_mw", "energy_mj", "errors", "states"
)  # fmt: skip


def _as_sent(*parts: Any) -> SampleBatch:
    return SampleBatch(**dict(zip(_BATCH_PARTS, parts, strict=True)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """All samples of one device over a stretch of time: columns of equal length n, ``t_ns`` strictly ascending."""

    device_uuid: str
    t_ns: Int64
    hw_ns: Int64
    power_mw: Float64
    power_avg_mw: Float64
    energy_mj: Float64

    def __len__(self) -> int:
        return len(self.t_ns)

    def between(self, begin_ns: int, end_ns: int) -> Trace:
        """The samples with ``begin_ns <= t_ns <= end_ns``; views, not copies."""
        lo, hi = np.searchsorted(self.t_ns, begin_ns, "left"), np.searchsorted(self.t_ns, end_ns, "right")
        return Trace(
            device_uuid=self.device_uuid,
            t_ns=self.t_ns[lo:hi],
            hw_ns=self.hw_ns[lo:hi],
            power_mw=self.power_mw[lo:hi],
            power_avg_mw=self.power_avg_mw[lo:hi],
            energy_mj=self.energy_mj[lo:hi],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerInfo:
    """Who samples a node, and what it found there."""

    node: str
    """Stable host id."""
    hostname: str
    pid: int
    epoch: int
    sample_hz: float
    devices: tuple[Device, ...]
    calibrations: Mapping[str, Calibration]
    unavailable: Mapping[str, str]
    """Power source -> why it gives nothing on this host."""
    host: Mapping[str, Any]
    """Host facts for the ``nodes`` table: NVIDIA driver, CPU model, governor, kernel, memory."""
    periods_s: Mapping[str, float] = field(default_factory=dict)
    """Device UUID -> seconds between its polls, as they are now."""
    notes: tuple[str, ...] = ()
    """What the sampler did about trouble: slowed down, lost its spool, ended its lease. Oldest first, bounded."""
