"""What an energy measurement says: windows, readings, flags, phases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from llem_ray.core.power import Method, Scope

Severity = Literal["invalid", "flag", "note"]

Phase = Literal[
    "startup",
    "bare_idle",
    "load",
    "warmup",
    "resident_idle",
    "guard",
    "measured",
    "cooldown",
    "waste",
    "finalise",
    "gap",
    "shutdown",
    "unleased",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """A stretch of time on one node's monotonic clock."""

    node: str
    begin_ns: int
    end_ns: int
    delta_ns: int = 0
    """Half-width of the clock offset's uncertainty; 0 on the node that marked the window."""
    common_delta_ns: int = 0
    """The part of ``delta_ns`` that all nodes but the marking one share: half-width of that one's own offset."""

    @property
    def duration_s(self) -> float:
        """Length in s."""
        return (self.end_ns - self.begin_ns) / 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """A stable reason code with what was seen. ``invalid`` means no J/token is printed."""

    code: str
    severity: Severity
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EnergyReading:
    """Energy of one device over one window. ``energy_j`` is None with a ``reason``, never 0 for missing."""

    node: str
    device_uuid: str
    name: str
    source: str
    scope: Scope
    method: Method
    energy_j: float | None
    u_j: float | None
    """One sigma of sampling, J."""
    bound_j: tuple[float, float] | None
    """Hard bound [lo, hi] from the raw poll brackets, J; None without a counter."""
    cross_check_j: float | None
    """The same window's energy by the independent 1 s average power, scaled to the window; None with a note."""
    cross_check_ratio: float | None
    sensor_rel: float | None
    shift_w: float | None
    """By how much the energy errs with a shift of the window, W: what an error of the clock or the lag multiplies."""
    delta_s: float
    """Half-width of the window's clock offset, s."""
    lag_s: float
    coverage: float
    """Samples that arrived over samples expected inside the window, at most 1."""
    mean_power_w: float | None
    flags: tuple[Flag, ...] = ()
    reason: str | None = None
    common_delta_s: float = 0.0
    """The part of ``delta_s`` that is that of the marking node's clock: one error for all other nodes."""

    @property
    def valid(self) -> bool:
        """There is an energy and no flag says it is invalid."""
        return self.energy_j is not None and not any(flag.severity == "invalid" for flag in self.flags)


@dataclass(frozen=True, kw_only=True, slots=True)
class EnergyTotal:
    """Sum over distinct (node, UUID). Null when a part is missing: ``reason`` names it and ``parts`` are shown."""

    energy_j: float | None
    u_j: float | None
    sensor_j: float | None
    """Sum of sensor_rel x energy: adds linearly."""
    covers: tuple[str, ...]
    """``<source>/<scope>/<uuid>`` of every device in the sum."""
    not_measured: tuple[str, ...]
    """Scopes that were not measured: ``cpu_package``, ``dram``, ``network``, ``fans``."""
    parts: tuple[EnergyReading, ...]
    reason: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """Idle power of one device."""

    device_uuid: str
    kind: Literal["bare", "resident"]
    power_w: float | None
    u_w: float | None
    begin_ns: int
    end_ns: int
    reason: str | None = None
    peak_w: float | None = None
    """Highest power reading of the stretch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseSpan:
    """A piece of a gang's life. The spans of a gang tile [run start, run end] without overlap or hole."""

    phase: Phase
    begin_ns: int
    end_ns: int
    trial_id: str | None = None
    attempt: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseEnergy:
    """Energy of one device over one phase span."""

    span: PhaseSpan
    device_uuid: str
    energy_j: float | None
    u_j: float | None
    method: Method
    reason: str | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
