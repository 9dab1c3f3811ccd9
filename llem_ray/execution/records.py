"""What the run driver tells the bookkeeper, in the order it happened."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeAlias

from llem_ray.core.energy import Baseline, PhaseSpan
from llem_ray.core.outcome import Outcome
from llem_ray.core.plan import LoadGroup, Trial
from llem_ray.core.power import Device
from llem_ray.execution.calls import Leased, Loaded


@dataclass(slots=True)
class GangRecord:
    """One gang's facts as they become known: by the run driver (placement, load), then by the bookkeeper (energies)."""

    name: str
    group: LoadGroup
    leased: Leased
    devices: tuple[Device, ...]
    """Devices whose energy is the gang's: its GPUs, or on the CPU what measures its node's CPU and memory."""
    context: tuple[Device, ...]
    """The other devices of its node."""
    reason: str | None
    """Why ``devices`` is empty."""
    loaded: Loaded | None = None
    bare: dict[str, Baseline] = field(default_factory=dict)
    resident: dict[str, Baseline] = field(default_factory=dict)
    load_energy_j: float | None = None
    """Once per load."""
    memory_before_load_bytes: dict[str, int] = field(default_factory=dict)
    """Device UUID -> memory in use before the model was loaded."""

    @property
    def node(self) -> str:
        """Stable id of the gang's host."""
        return self.leased.node


@dataclass(frozen=True, kw_only=True, slots=True)
class SpansAdded:
    """The ledger grew."""

    gang: GangRecord | None
    spans: tuple[PhaseSpan, ...]

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

    @property
    def needs_ns(self) -> int:
        """Samples up to here make it final."""
        return self.span.end_ns


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadEnded:
    """A model was loaded."""

    gang: GangRecord
    span: PhaseSpan

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
    begin_ns: int
    end_ns: int
    started_utc: datetime
    gap_s: float | None
    final: bool
    """The trial will not be tried again."""

    @property
    def needs_ns(self) -> int:
        """Samples up to here make it final."""
        return self.end_ns


Event: TypeAlias = SpansAdded | IdleTaken | LoadEnded | AttemptEnded
