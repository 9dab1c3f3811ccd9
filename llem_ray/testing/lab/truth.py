"""What a run in a lab should have measured: energies and clock offsets that are known exactly."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llem_ray.core.units import ns_from_s
from llem_ray.testing.lab.lab import Lab

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedReading:
    """One leased GPU's energy over one window beside the truth."""

    trial_id: str
    nodes: int
    """Nodes of the gang."""
    host: str
    led: bool
    """The window was marked on this very host."""
    uuid: str
    window_s: float
    energy_j: float
    u_j: float
    true_j: float
    bound_j: tuple[float, float]
    clock_error_ns: int
    """Error of the host's clock offset, as the trial has it; 0 on the run driver's own host."""
    clock_delta_ns: int
    """Half-width that the trial gives for it; 0 on that host too."""

    @property
    def error_rel(self) -> float:
        """Error of the energy, as a share of the truth."""
        return (self.energy_j - self.true_j) / self.true_j


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedTrial:
    """A gang's energy over one window beside the truth."""

    trial_id: str
    nodes: int
    energy_j: float
    u_j: float
    true_j: float
    readings: tuple[JudgedReading, ...]

    @property
    def error_rel(self) -> float:
        """Error of the energy, as a share of the truth."""
        return (self.energy_j - self.true_j) / self.true_j


def judge_trials(lab: Lab, trials: Iterable[Row], driver_host: str) -> list[JudgedTrial]:
    """Every completed trial with a total, beside the truth. Call it while the lab runs, soon after the run.

    Args:
        lab: Where it ran.
        trials: Rows of the ``trials`` table.
        driver_host: Name of the host that the run driver ran on.
    """
    names = {host.host_id: name for name, host in lab.hosts.items()}
    wall_ns = time.time_ns() - time.monotonic_ns()
    judged = []
    for row in trials:
        if row["status"] != "completed" or row["total_energy_j"] is None:
            continue
        lead = names[row["node"]]
        begin_ns, end_ns = (row[edge] - _shift_ns(lab, lead) + wall_ns for edge in ("begin_ns", "end_ns"))
        leased = {part.rpartition("/")[2] for part in row["energy_covers"]}
        offsets = {entry["node"]: entry for entry in row["gang_nodes"]}
        readings = []
        for device in row["devices"]:
            if device["uuid"] not in leased:
                continue
            host = names[device["node"]]
            entry = offsets[device["node"]]
            true_offset_ns = _shift_ns(lab, host) - _shift_ns(lab, driver_host)
            readings.append(
                JudgedReading(
                    trial_id=row["trial_id"],
                    nodes=len(offsets),
                    host=host,
                    led=device["node"] == row["node"],
                    uuid=device["uuid"],
                    window_s=row["window_s"],
                    energy_j=device["energy_j"],
                    u_j=device["u_j"],
                    true_j=lab.truth_j(host, device["uuid"], begin_ns, end_ns),
                    bound_j=(device["bound_lo_j"], device["bound_hi_j"]),
                    clock_error_ns=entry["clock_offset_ns"] - true_offset_ns,
                    clock_delta_ns=round(entry["clock_delta_s"] * 1e9),
                )
            )
        judged.append(
            JudgedTrial(
                trial_id=row["trial_id"],
                nodes=len(offsets),
                energy_j=row["total_energy_j"],
                u_j=row["energy_u_j"],
                true_j=sum(reading.true_j for reading in readings),
                readings=tuple(readings),
            )
        )
    return judged


def _shift_ns(lab: Lab, host: str) -> int:
    return ns_from_s(lab.hosts[host].spec.monotonic_offset_s)
