"""What of a window was seen, node by node and over the whole cluster: columns of the ``trials`` table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np

from llem_ray.core.energy import EnergyReading, Window
from llem_ray.core.power import Device, Trace
from llem_ray.core.units import MJ_PER_J, NS_PER_S, ns_from_s
from llem_ray.execution.meter import GPU_SCOPES, Meter
from llem_ray.execution.records import GangRecord, HostDevice

Row = dict[str, Any]

EDGE_S: Final = 1.0
"""A counter's readings are looked for so far beyond a window's edges."""


def node_columns(
    gang: GangRecord, meter: Meter, window: Window, held: Sequence[EnergyReading], context: Sequence[EnergyReading]
) -> Row:
    """One entry for each node of the gang: its leased and other GPUs, its CPU and memory, and what was seen of it."""
    entries: list[Row] = []
    for host in gang.hosts:
        leased = [reading for reading in held if reading.node == host]
        others = [reading for reading in context if reading.node == host]
        offset = meter.clocks.offset(host, meter.clocks.to_own(window.node, window.end_ns) or 0)
        local = _edges(window, host, meter)
        gaps_s = [_longest_gap_s(meter, item, local) for item in gang.devices if item.host == host and local is not None]
        entries.append(
            {
                "node": host,
                "hostname": meter.hostname(host),
                "role": "lead" if host == gang.node else "worker",
                "workers": sum(worker.node == host for worker in gang.workers),
                "leased_gpus": sum(reading.scope in GPU_SCOPES for reading in leased),
                "reported": bool(leased) and all(reading.energy_j is not None for reading in leased),
                "leased_energy_j": _sum(leased, GPU_SCOPES),
                "unleased_energy_j": _sum(others, GPU_SCOPES),
                "cpu_energy_j": _sum([*leased, *others], {"cpu_package"}),
                "dram_energy_j": _sum([*leased, *others], {"dram"}),
                "coverage": min((reading.coverage for reading in leased), default=None),
                "max_gap_s": max((gap_s for gap_s in gaps_s if gap_s is not None), default=None),
                "clock_offset_ns": offset.offset_ns if offset else None,
                "clock_delta_s": offset.delta_ns / NS_PER_S if offset else None,
                "reason": next((reading.reason for reading in leased if reading.reason), None),
            }
        )
    longest_s: list[float] = [entry["max_gap_s"] for entry in entries if entry["max_gap_s"] is not None]
    deltas_s = [reading.delta_s for reading in held]
    return {
        "gang": gang.name,
        "gang_nodes": entries,
        "nodes_expected": len(entries),
        "nodes_reported": sum(entry["reported"] for entry in entries) if gang.devices else 0,
        "max_gap_s": max(longest_s, default=None),
        "clock_delta_s": max(deltas_s, default=None),
    }


def cluster_columns(
    gang: GangRecord, meter: Meter, window: Window, held: Sequence[EnergyReading], context: Sequence[EnergyReading]
) -> Row:
    """GPUs that are not the gang's: on its nodes, and on all others. Context, never part of a total.

    Devices of other nodes are read by the plain difference of their counters, interpolated at the edges: good to a tick.
    """
    mine = [reading for reading in held if reading.scope in GPU_SCOPES]
    beside = [reading for reading in context if reading.scope in GPU_SCOPES]
    # A node that is gone has no energy: it is no gap in that of the cluster. One that is silent is.
    others = [host for host in meter.hosts if host not in gang.hosts and (meter.is_in_service(host) or meter.is_silent(host))]
    far_j: list[float | None] = []
    seen = 0
    for host in others:
        gpus = [device for device in meter.devices(host) if device.scope in GPU_SCOPES]
        local = _edges(window, host, meter)
        energies_j = [_counter_j(meter, host, device, local) for device in gpus] if local is not None else [None] * len(gpus)
        far_j += energies_j
        seen += local is not None and None not in energies_j
    beside_j, elsewhere_j = _sum(beside, GPU_SCOPES), _total(far_j)
    parts = [_sum(mine, GPU_SCOPES) if mine else 0.0, beside_j if beside else 0.0, elsewhere_j if far_j else 0.0]
    return {
        "unleased_gpu_energy_j": beside_j,
        "other_nodes_gpu_energy_j": elsewhere_j,
        "other_nodes_expected": len(others),
        "other_nodes_reported": seen,
        "cluster_gpu_energy_j": _total(parts) if mine or beside or far_j else None,
    }


def _edges(window: Window, host: str, meter: Meter) -> tuple[int, int] | None:
    """Begin and end of the window on the host's clock, ns."""
    if host == window.node:
        return window.begin_ns, window.end_ns
    ours = [meter.clocks.to_own(window.node, stamp) for stamp in (window.begin_ns, window.end_ns)]
    local = [None if stamp is None else meter.clocks.to_host(host, stamp) for stamp in ours]
    begin_ns, end_ns = local
    return None if begin_ns is None or end_ns is None else (begin_ns, end_ns)


def _longest_gap_s(meter: Meter, item: HostDevice, edges: tuple[int, int] | None) -> float | None:
    """Longest stretch of the window without a sample of the device, s."""
    if edges is None:
        return None
    begin_ns, end_ns = edges
    times = meter.trace(item.host, item.device.uuid, begin_ns, end_ns).t_ns
    return float(np.max(np.diff(np.concatenate(([begin_ns], times, [end_ns]))))) / NS_PER_S


def _counter_j(meter: Meter, host: str, device: Device, edges: tuple[int, int] | None) -> float | None:
    if edges is None:
        return None
    begin_ns, end_ns = edges
    trace = meter.trace(host, device.uuid, begin_ns - ns_from_s(EDGE_S), end_ns + ns_from_s(EDGE_S))
    return counter_difference_j(trace, begin_ns, end_ns)


def counter_difference_j(trace: Trace, begin_ns: int, end_ns: int) -> float | None:
    """Energy between two instants by the counter's readings next to them, J; None where it was not read, or ran backwards."""
    known = np.isfinite(trace.energy_mj)
    t_ns, energy_mj = trace.t_ns[known], trace.energy_mj[known]
    if len(t_ns) < 2 or t_ns[0] > begin_ns or t_ns[-1] < end_ns or bool(np.any(np.diff(energy_mj) < 0)):
        return None
    at = np.interp([0.0, float(end_ns - begin_ns)], (t_ns - begin_ns).astype(np.float64), energy_mj)
    return float(at[1] - at[0]) / MJ_PER_J


def _sum(readings: Iterable[EnergyReading], scopes: Iterable[str]) -> float | None:
    scopes = set(scopes)
    wanted = [reading for reading in readings if reading.scope in scopes and reading.method != "estimated_model"]
    return _total([reading.energy_j for reading in wanted])


def _total(parts: Sequence[float | None]) -> float | None:
    """The sum; None when a part is missing, or there is none."""
    known = [part for part in parts if part is not None]
    return sum(known) if known and len(known) == len(parts) else None
