"""Numbers as people read them: few digits, never more than the uncertainty allows."""

from __future__ import annotations

import math

MISSING = "-"
"""Stands for a value that is null."""


def format_value(value: float | None, digits: int = 4) -> str:
    """The value to ``digits`` significant digits; whole numbers keep all of theirs. Null is ``-``."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    if not -1 <= decimals <= digits + 3:
        return f"{value:.0f}" if 0 < -decimals <= 3 else f"{value:.{digits - 1}e}"
    return f"{value:.{max(decimals, 0)}f}"


def format_uncertain(value: float | None, half_width: float | None, digits: int = 6) -> str:
    """``0.4213 ±0.0021``: the half-width to two significant digits, the value to the same decimals.

    The value gets ``digits`` significant digits at most, or as many as it has before the point; where that cuts the half-width
    it is rounded up.
    """
    if value is None or half_width is None or half_width <= 0 or not math.isfinite(half_width):
        return format_value(value)
    decimals = min(max(1 - math.floor(math.log10(half_width)), 0), 9)
    most = digits - 1 - math.floor(math.log10(abs(value))) if value else decimals
    if decimals > max(most, 0):
        decimals = max(most, 0)
        half_width = math.ceil(half_width * 10**decimals) / 10**decimals
    return f"{value:.{decimals}f} ±{half_width:.{decimals}f}"


def format_duration(duration_s: float | None) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 10 min``, ``3 d 4 h``. Null is ``-``."""
    if duration_s is None or not math.isfinite(duration_s):
        return MISSING
    whole_s = round(duration_s)
    if whole_s < 60:
        return f"{whole_s} s"
    if whole_s < 3600:
        return f"{whole_s // 60} min {whole_s % 60:02d} s"
    whole_min = round(duration_s / 60)
    if whole_min < 48 * 60:
        return f"{whole_min // 60} h {whole_min % 60:02d} min"
    return f"{whole_min // 1440} d {whole_min % 1440 // 60} h"


def format_energy(energy_j: float | None) -> str:
    """``950 J``, ``12.5 kJ``, ``3.2 kWh`` from 1 kWh on. Null is ``-``."""
    if energy_j is None:
        return MISSING
    if abs(energy_j) >= 3_600_000:
        return f"{format_value(energy_j / 3_600_000, 3)} kWh"
    if abs(energy_j) >= 10_000:
        return f"{format_value(energy_j / 1000, 3)} kJ"
    return f"{format_value(energy_j, 3)} J"


def format_bytes(size: int) -> str:
    """``950 B``, ``12.5 kB``, ``3.2 MB``, in powers of 1000."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{format_value(size / scale, 3)} {unit}"
    return f"{size} B"


def count_noun(count: int, noun: str) -> str:
    """``1 trial``, ``3 trials``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
