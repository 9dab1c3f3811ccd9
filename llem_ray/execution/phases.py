"""Prefill and decode energy of an attempt, from the step log of its leading host and the counters of its gang."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llem_ray.core.energy import EnergyReading
from llem_ray.core.outcome import Completed
from llem_ray.core.units import ns_from_s
from llem_ray.energy.phase_energy import PhaseTotal, split_device, sum_splits
from llem_ray.energy.phase_split import NoSplit, PhaseSplit
from llem_ray.execution.clock_windows import moved_window
from llem_ray.execution.meter import Meter
from llem_ray.execution.records import GangRecord, HostDevice

Row = dict[str, Any]


def split_gang(gang: GangRecord, meter: Meter, done: Completed, held: Sequence[EnergyReading]) -> PhaseTotal | NoSplit:
    """Split the energy of a window over all devices of a gang.

    Args:
        gang: Who ran it.
        meter: Where samples come from.
        done: The window and its steps.
        held: Energies of ``gang.devices``, in their order.

    Returns:
        NoSplit as soon as one device has no split.
    """
    if done.step_log is None:
        return NoSplit(reason="steps are not kept (measure.record_steps)")
    if not held:
        return NoSplit(reason=gang.reason or "nothing was measured")
    splits = []
    for item, reading in zip(gang.devices, held, strict=True):
        found = _split(item, meter, done, reading)
        if isinstance(found, NoSplit):
            return NoSplit(reason=f"{item.device.uuid}: {found.reason}" if len(held) > 1 else found.reason)
        splits.append(found)
    return sum_splits(splits)


def _split(item: HostDevice, meter: Meter, done: Completed, reading: EnergyReading) -> PhaseSplit | NoSplit:
    window = moved_window(done.window, item.host, meter.clocks)
    if reading.energy_j is None or window is None or done.step_log is None:
        return NoSplit(reason=reading.reason or "it has no energy")
    if reading.method != "measured_counter":
        return NoSplit(reason="its energy is not a counter's")
    margin_ns = ns_from_s(meter.margin_s(item.host, item.device))
    return split_device(
        done.step_log,
        done.window,
        window,
        calibration=meter.calibration(item.host, item.device),
        trace=meter.trace(item.host, item.device.uuid, window.begin_ns - margin_ns, window.end_ns + margin_ns),
        sample_period_s=meter.period_s(item.host, item.device),
        energy_j=reading.energy_j,
    )


def phase_columns(found: PhaseTotal | NoSplit, *, gpus: int) -> Row:
    """Columns of the split; those of the GPUs alone are null on the CPU."""
    if isinstance(found, NoSplit):
        return {"phase_reason": found.reason}
    row: Row = {
        "prefill_energy_j": found.prefill_j,
        "prefill_energy_u_j": found.prefill_u_j,
        "decode_energy_j": found.decode_j,
        "decode_energy_u_j": found.decode_u_j,
        "phase_rest_energy_j": found.rest_j,
        "phase_method": found.method,
        "phase_residual_rel": found.residual_rel,
    }
    if gpus:
        row |= {"prefill_gpu_energy_j": found.prefill_j, "decode_gpu_energy_j": found.decode_j}
    return row
