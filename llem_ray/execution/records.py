"""What the run driver tells the bookkeeper, in the order it happened. Times are ns of the run driver's monotonic clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeAlias

from llem_ray.core.energy import Baseline, PhaseSpan
from llem_ray.core.outcome import Outcome
from llem_ray.core.plan import LoadGroup, Trial
from llem_ray.core.power import Device
from llem_ray.execution.calls import Leased, Loaded
from llem_ray.execution.load_times import LoadMarks

DeviceKey: TypeAlias = tuple[str, str]
"""(host, UUID)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostDevice:
    """A device and the host it is in."""

    host: str
    device: Device

    @property
    def key(self) -> DeviceKey:
        """What identifies it in the whole cluster."""
        return (self.host, self.device.uuid)


@dataclass(slots=True)
class GangRecord:
    """One gang's facts as they become known: by the run driver (placement, load), then by the bookkeeper (energies)."""

    name: str
    group: LoadGroup
    workers: tuple[Leased, ...]
    """Its processes, by rank; the first leads."""
    devices: tuple[HostDevice, ...]
    """Devices whose energy is the gang's: its GPUs, or on the CPU what measures its hosts' CPU and memory."""
    context: tuple[HostDevice, ...]
    """The other devices of its hosts."""
    reason: str | None
    """Why ``devices`` is empty."""
    loaded: Loaded | None = None
    bare: dict[DeviceKey, Baseline] = field(default_factory=dict)
    resident: dict[DeviceKey, Baseline] = field(default_factory=dict)
    bare_memory_bytes: dict[DeviceKey, int] = field(default_factory=dict)
    """Memory in use before the load."""
    load_energy_j: float | None = None
    """Once per load."""
    generations: dict[str, int] = field(default_factory=dict)
    """Host -> how often it had been restarted when the gang was placed."""
    begin_ns: int = 0
    end_ns: int | None = None
    """When its processes were gone; None while they are not."""
    marks: LoadMarks = field(default_factory=LoadMarks)
    """How far its load has come."""
    neighbours: set[str] = field(default_factory=set)
    """Names of gangs that were on one of its hosts at the same time."""

    @property
    def lead(self) -> Leased:
        """The process that leads."""
        return self.workers[0]

    @property
    def node(self) -> str:
        """Stable id of the leading process's host, whose clock the gang's windows are on."""
        return self.workers[0].node

    @property
    def hosts(self) -> tuple[str, ...]:
        """Stable ids of its hosts, the leading one first."""
        return tuple(dict.fromkeys(worker.node for worker in self.workers))


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneOpened:
    """From ``begin_ns`` on some devices of these hosts may be a gang's: nobody else accounts for them meanwhile."""

    lane: str
    hosts: tuple[str, ...]
    begin_ns: int

    @property
    def needs_ns(self) -> int:
        """It needs no samples."""
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class GangPlaced:
    """The lane's gang holds just the devices of its record."""

    lane: str
    gang: GangRecord

    @property
    def needs_ns(self) -> int:
        """It needs no samples."""
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneClosed:
    """The lane's gang is gone; its devices are nobody's again."""

    lane: str
    end_ns: int

    @property
    def needs_ns(self) -> int:
        """It needs no samples."""
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SpansAdded:
    """The ledger grew: of a gang's devices, or with no gang of all devices that no lane has."""

    gang: GangRecord | None
    spans: tuple[PhaseSpan, ...]
    lane: str = ""

    @property
    def needs_ns(self) -> int:
        """Samples up to here make it final."""
        return max((span.end_ns for span in self.spans), default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class IdleTaken:
    """An idle baseline ended."""

    gang: GangRecord
    resident: bool
    span: PhaseSpan
    lane: str = ""

    @property
    def needs_ns(self) -> int:
        """Samples up to here make it final."""
        return self.span.end_ns


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadEnded:
    """A model was loaded."""

    gang: GangRecord
    span: PhaseSpan
    lane: str = ""

    @property
    def needs_ns(self) -> int:
        """Samples up to here make it final."""
        return self.span.end_ns


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptEnded:
    """An attempt at a trial ended, well or badly."""

    gang: GangRecord | None
    """None when no gang could be had for it."""
    group: LoadGroup
    trial: Trial
    attempt: int
    outcome: Outcome
    """A completed one's window and spans are on the clock of the gang's leading host."""
    begin_ns: int
    end_ns: int
    started_utc: datetime
    gap_s: float | None
    final: bool
    """The trial will not be tried again."""
    lane: str = ""
    hot: str | None = None
    """What was too hot when it began, or not known; None where nothing was asked or all was cool."""

    @property
    def needs_ns(self) -> int:
        """Samples up to here make it final."""
        return self.end_ns


Event: TypeAlias = LaneOpened | GangPlaced | LaneClosed | SpansAdded | IdleTaken | LoadEnded | AttemptEnded
