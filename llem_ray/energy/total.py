"""Energy of several devices: each integrated on its own, then summed over distinct (node, UUID)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

import numpy as np

from llem_ray.core.energy import EnergyReading, EnergyTotal
from llem_ray.core.power import Scope

_COVERS: Final[Mapping[Scope, frozenset[str]]] = {
    "gpu": frozenset(),
    "memory": frozenset(),
    "module": frozenset({"cpu_package", "dram"}),
    "cpu_package": frozenset({"cpu_package"}),
    "dram": frozenset({"dram"}),
    "host": frozenset({"cpu_package", "dram", "fans"}),
}
_BOUNDARY: Final = ("cpu_package", "dram", "network", "fans")

ALIKE: Final = 0.05
"""Correlation of the sampling errors of a gang's devices: their power steps together, so what ticks hide errs alike in part.

The least that keeps truth within 2 u for 32 devices that run the same steps, on simulated loads.
"""


def sum_readings(readings: Sequence[EnergyReading], expected: Collection[tuple[str, str]]) -> EnergyTotal:
    """Sum the readings of the ``expected`` (node, UUID); readings of other devices are context and stay out.

    u^2 = (1 - r) sum s^2 + r (sum s)^2 + (c^2 + (sum lag P)^2) / 3. Sampling errors s are correlated by r (``ALIKE``), the
    counter's lag is one error for all devices, P is ``shift_w``, and c^2 is ``_clock_j2``. The sensors' gain error adds linearly.

    Returns:
        A total that is None with a ``reason`` when nothing is expected, a device did not report, has no energy, or has only an
        estimate: estimates are never summed with measurements. Invalid readings are summed; ``parts`` says that they are.

    Raises:
        ValueError: Two readings are of the same (node, UUID).
    """
    by_device: dict[tuple[str, str], EnergyReading] = {}
    for reading in readings:
        key = (reading.node, reading.device_uuid)
        if key in by_device:
            raise ValueError(f"device {key[1]} of node {key[0]} was read twice")
        by_device[key] = reading
    wanted = sorted(set(expected))
    parts = tuple(by_device[key] for key in wanted if key in by_device)
    covered = frozenset[str]().union(*(_COVERS[part.scope] for part in parts if part.energy_j is not None))
    not_measured = tuple(scope for scope in _BOUNDARY if scope not in covered)
    covers = tuple(f"{part.source}/{part.scope}/{part.device_uuid}" for part in parts)
    reason = _why_partial(wanted, by_device)
    energies_j = [part.energy_j for part in parts if part.energy_j is not None]
    return EnergyTotal(
        energy_j=None if reason else float(sum(energies_j)),
        u_j=None if reason else _common_u_j(parts),
        sensor_j=None if reason else _sensor_j(parts),
        covers=covers,
        not_measured=not_measured,
        parts=parts,
        reason=reason,
    )


def _why_partial(wanted: Sequence[tuple[str, str]], by_device: Mapping[tuple[str, str], EnergyReading]) -> str | None:
    if not wanted:
        return "no device with a meter belongs to it"
    problems = []
    for node, uuid in wanted:
        reading = by_device.get((node, uuid))
        if reading is None:
            problems.append(f"{uuid} on {node} did not report")
        elif reading.energy_j is None:
            problems.append(f"{uuid} on {node}: {reading.reason or 'no energy'}")
        elif reading.method == "estimated_model":
            problems.append(f"{uuid} on {node} is only estimated")
    return f"partial: {'; '.join(problems)}" if problems else None


def _common_u_j(parts: Sequence[EnergyReading]) -> float | None:
    """One sigma of the sum, J; None when a part has none."""
    sampling_j: list[float] = []
    lag_j = 0.0
    for part in parts:
        if part.u_j is None:
            return None
        own_s = part.delta_s - part.common_delta_s
        shift_j2 = (part.shift_w or 0.0) ** 2 * (own_s**2 + part.common_delta_s**2 + part.lag_s**2) / 3
        sampling_j.append(max(0.0, part.u_j**2 - shift_j2) ** 0.5)
        lag_j += part.lag_s * (part.shift_w or 0.0)
    sampling_j2 = (1 - ALIKE) * sum(each_j**2 for each_j in sampling_j) + ALIKE * sum(sampling_j) ** 2
    return float(np.sqrt(sampling_j2 + (_clock_j2(parts) + lag_j**2) / 3))


def _clock_j2(parts: Sequence[EnergyReading]) -> float:
    """Three times the variance that clocks add to the sum, J^2.

    On a node n the window is off by e_n - e_m: the errors of that node's offset and of the marking node's, both against the run
    driver's clock. e_m is one error for all nodes, and so is what the e_n have in common: where the way there takes longer than
    the way back, it does on every node. The variance is linear in their correlation, so the larger of its ends holds for all.
    """
    own_j: dict[str, float] = {}
    marked_j = 0.0
    for part in parts:
        own_j[part.node] = own_j.get(part.node, 0.0) + (part.delta_s - part.common_delta_s) * (part.shift_w or 0.0)
        marked_j += part.common_delta_s * (part.shift_w or 0.0)
    unrelated_j2 = sum(each_j**2 for each_j in own_j.values()) + marked_j**2
    alike_j2 = (sum(own_j.values()) - marked_j) ** 2
    return max(unrelated_j2, alike_j2)


def _sensor_j(parts: Sequence[EnergyReading]) -> float | None:
    """Sum of sensor_rel x energy, J; None when a part does not know its own."""
    known = [part.sensor_rel * part.energy_j for part in parts if part.sensor_rel is not None and part.energy_j is not None]
    return float(sum(known)) if len(known) == len(parts) else None
