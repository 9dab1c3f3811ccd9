"""The meter on any command: the sampler and estimator of a run, around the life of one child process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llem_ray.core.clock import Clock, SystemClock
from llem_ray.core.energy import EnergyReading, EnergyTotal, Window
from llem_ray.core.measure_spec import GateSpec
from llem_ray.core.power import Calibration, Device, SamplerInfo
from llem_ray.core.units import ns_from_s
from llem_ray.energy.estimator import edge_margin_s, read_window
from llem_ray.energy.total import sum_readings
from llem_ray.energy.validity import check_errors
from llem_ray.execution.command import CommandLife, NotStarted, find_program, relayed_signals, run_command
from llem_ray.execution.placement import is_measured
from llem_ray.execution.sampler_host import CALIBRATION_S
from llem_ray.power.host import host_id
from llem_ray.power.sampler import SamplerLoop
from llem_ray.power.sources import close_sources, open_sources
from llem_ray.power.traces import TraceBuffer


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandMeasurement:
    """What a command's life cost."""

    window: Window
    """From just before the child was started to just after it was reaped."""
    readings: tuple[EnergyReading, ...]
    """Devices that measure, and those that were to."""
    estimates: tuple[EnergyReading, ...]
    """Devices whose power is a model's; never in the total."""
    total: EnergyTotal
    unavailable: Mapping[str, str]
    """Power source -> why it gives nothing here."""
    notes: tuple[str, ...]
    """What the sampler did about trouble."""
    exit_code: int
    """The command's; 128 + the number of the signal when one ended it."""


def measure_command(
    command: Sequence[str],
    *,
    sources: Sequence[str] | str = "auto",
    sample_hz: float = 20.0,
    output_to_stderr: bool = False,
    clock: Clock | None = None,
) -> CommandMeasurement | NotStarted:
    """Run ``command`` and measure every device of this host meanwhile.

    This process only samples and waits, so it is to the command what a sampler process is to an engine. It takes longer than
    the command: 2 s of calibration, and before and after the window as much as the estimator needs of the slowest device,
    about 1.4 s each with a counter that ticks every 100 ms. The command starts after the first and has ended before the last.

    Args:
        command: Program and arguments.
        sources: Names of power sources, or ``auto``.
        sample_hz: Polls per second.
        output_to_stderr: Send the command's standard output to our standard error.
        clock: The host's monotonic clock.

    Raises:
        PowerError: A source asked for by name cannot work here.
        PluginError: A source asked for by name is unknown or not installed.
        ConfigError: A source's own settings are wrong.
    """
    refused = find_program(command[0])
    if refused is not None:
        return refused
    clock = clock or SystemClock()
    loop = _open_loop(sources, sample_hz, clock)
    try:
        loop.calibrate(CALIBRATION_S)
        loop.start()
        margin_ns = ns_from_s(_margin_s(loop.info()))
        clock.sleep_until_ns(clock.monotonic_ns() + margin_ns)
        with relayed_signals() as relay:
            life = run_command(command, relay, clock, output_to_stderr=output_to_stderr)
            if isinstance(life, NotStarted):
                return life
            clock.sleep_until_ns(life.end_ns + margin_ns)
            buffer = TraceBuffer()
            for batch in loop.fetch(0, flush=True):
                buffer.append(batch)
            return evaluate_life(loop.info(), buffer, life, margin_ns)
    finally:
        loop.close()


def _open_loop(sources: Sequence[str] | str, sample_hz: float, clock: Clock) -> SamplerLoop:
    opened, unavailable = open_sources("auto" if isinstance(sources, str) else tuple(sources))
    try:
        return SamplerLoop(opened, node=host_id(), clock=clock, sample_hz=sample_hz, unavailable=unavailable)
    except BaseException:
        close_sources(opened)
        raise


def _margin_s(info: SamplerInfo) -> float:
    """What the slowest device needs on both sides of an edge."""
    return max(
        (
            edge_margin_s(info.calibrations[device.uuid], info.periods_s[device.uuid], device.method)
            for device in info.devices
            if device.uuid in info.calibrations and device.uuid in info.periods_s
        ),
        default=0.0,
    )


def evaluate_life(info: SamplerInfo, buffer: TraceBuffer, life: CommandLife, margin_ns: int) -> CommandMeasurement:
    """What a command's life cost, from the samples around it.

    Args:
        info: The sampler that took them.
        buffer: The samples, from ``margin_ns`` before the life to as much after it.
        life: The window.
        margin_ns: How much the estimator may look beyond the window, ns.
    """
    window = Window(node=info.node, begin_ns=life.begin_ns, end_ns=life.end_ns)
    readings = [_read(info, buffer, device, window, margin_ns) for device in info.devices]
    estimated = {device.uuid for device in info.devices if device.method == "estimated_model"}
    measured = tuple(reading for reading in readings if reading.device_uuid not in estimated)
    expected = {(info.node, device.uuid) for device in info.devices if is_measured(device) and not device.shared}
    total = sum_readings([reading for reading in measured if (info.node, reading.device_uuid) in expected], expected)
    return CommandMeasurement(
        window=window,
        readings=measured,
        estimates=tuple(reading for reading in readings if reading.device_uuid in estimated),
        total=total if expected else replace(total, reason=_why_nothing(measured, info.unavailable)),
        unavailable=info.unavailable,
        notes=info.notes,
        exit_code=life.exit_code,
    )


def _read(info: SamplerInfo, buffer: TraceBuffer, device: Device, window: Window, margin_ns: int) -> EnergyReading:
    begin_ns, end_ns = window.begin_ns - margin_ns, window.end_ns + margin_ns
    reading = read_window(
        device=device,
        calibration=info.calibrations.get(device.uuid) or _not_calibrated(device.uuid),
        trace=buffer.trace(device.uuid, begin_ns, end_ns),
        window=window,
        sample_period_s=info.periods_s.get(device.uuid, 1.0 / info.sample_hz),
        gates=GateSpec(),
        states=buffer.states(device.uuid, begin_ns, window.end_ns),
    )
    errors = check_errors(buffer.errors(device.uuid, begin_ns, end_ns), window.begin_ns, window.end_ns)
    return replace(reading, flags=(*reading.flags, *errors))


def _not_calibrated(uuid: str) -> Calibration:
    """A device that never answered."""
    return Calibration(device_uuid=uuid, tick_period_s=None, has_instant=False, has_average=False, lag_s=0.0, call_s=0.0)


def _why_nothing(readings: Sequence[EnergyReading], unavailable: Mapping[str, str]) -> str:
    reasons = [f"{reading.name}: {reading.reason}" for reading in readings]
    reasons += [text.splitlines()[0] for text in unavailable.values()]
    return "nothing here measures: " + ("; ".join(reasons) or "the power sources have no devices")


def to_json(result: CommandMeasurement) -> dict[str, Any]:
    """The documented JSON object of ``llem-ray measure --json``."""
    window, total = result.window, result.total
    return {
        "window": {"begin_ns": window.begin_ns, "end_ns": window.end_ns, "duration_s": window.duration_s},
        "devices": [_device_json(reading) for reading in result.readings],
        "total": {
            "energy_j": total.energy_j,
            "u_j": total.u_j,
            "covers": list(total.covers),
            "not_measured": list(total.not_measured),
            "valid": total.energy_j is not None and all(part.valid for part in total.parts),
            "reason": total.reason,
        },
        "estimates": [_device_json(reading) for reading in result.estimates],
        "unavailable": dict(result.unavailable),
        "notes": list(result.notes),
        "exit_code": result.exit_code,
    }


def _device_json(reading: EnergyReading) -> dict[str, Any]:
    return {
        "uuid": reading.device_uuid,
        "name": reading.name,
        "source": reading.source,
        "scope": reading.scope,
        "method": reading.method,
        "energy_j": reading.energy_j,
        "u_j": reading.u_j,
        "bound_j": list(reading.bound_j) if reading.bound_j else None,
        "cross_check_j": reading.cross_check_j,
        "cross_check_ratio": reading.cross_check_ratio,
        "mean_power_w": reading.mean_power_w,
        "sensor_rel": reading.sensor_rel,
        "coverage": reading.coverage,
        "flags": [{"code": item.code, "severity": item.severity, "detail": item.detail} for item in reading.flags],
        "valid": reading.valid,
        "reason": reading.reason,
    }
