"""Conversions between the units that names end in (_s _ms _ns _w _mw _j _mj)."""

from __future__ import annotations

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000
MJ_PER_J = 1_000.0
MW_PER_W = 1_000.0
J_PER_KWH = 3_600_000.0


def s_from_ns(duration_ns: int | float) -> float:
    """Seconds from nanoseconds."""
    return duration_ns / NS_PER_S


def ns_from_s(duration_s: float) -> int:
    """Nanoseconds from seconds, rounded."""
    return round(duration_s * NS_PER_S)


def kwh_from_j(energy_j: float) -> float:
    """Kilowatt-hours from joules."""
    return energy_j / J_PER_KWH
