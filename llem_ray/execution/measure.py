"""The meter on any command: the sampler and estimator of a run, around the life of one child process."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final

from llem_ray.core.clock import Clock, SystemClock
from llem_ray.core.energy import EnergyReading, EnergyTotal, Window
from llem_ray.core.power import SamplerInfo
from llem_ray.core.spec import GateSpec
from llem_ray.core.units import ns_from_s
from llem_ray.energy.estimator import edge_margin_s, read_window
from llem_ray.energy.total import sum_readings
from llem_ray.execution.placement import is_measured
from llem_ray.execution.sampler_host import CALIBRATION_S
from llem_ray.power.host import host_id
from llem_ray.power.sampler import SamplerLoop
from llem_ray.power.sources import open_sources
from llem_ray.power.traces import TraceBuffer

NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
KILLED_BY: Final = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandMeasurement:
    """What a command's life cost."""

    window: Window
    """From just before the child was started to just after it was reaped."""
    readings: tuple[EnergyReading, ...]
    """Measuring devices."""
    estimates: tuple[EnergyReading, ...]
    """Devices whose power is a model's; never in the total."""
    total: EnergyTotal
    unavailable: Mapping[str, str]
    """Power source -> why it gives nothing here."""
    exit_code: int
    """The command's; 128 + signal when one ended it, 126 when it cannot be executed, 127 when it is not found."""


def measure_command(
    command: Sequence[str],
    *,
    sources: Sequence[str] | str = "auto",
    sample_hz: float = 20.0,
    output_to_stderr: bool = False,
    clock: Clock | None = None,
) -> CommandMeasurement:
    """Run ``command`` and measure every device of this host meanwhile.

    This process only samples and waits, so it is to the command what a sampler process is to an engine.

    Args:
        command: Program and arguments.
        sources: Names of power sources, or ``auto``.
        sample_hz: Polls per second.
        output_to_stderr: Send the command's standard output to our standard error.
        clock: The host's monotonic clock.

    Raises:
        PowerError: A source asked for by name cannot work here.
    """
    clock = clock or SystemClock()
    opened, unavailable = open_sources("auto" if isinstance(sources, str) else tuple(sources))
    loop = SamplerLoop(opened, node=host_id(), clock=clock, sample_hz=sample_hz, unavailable=unavailable)
    try:
        loop.calibrate(CALIBRATION_S)
        loop.start()
        margin_ns = ns_from_s(_margin_s(loop.info()))
        clock.sleep_until_ns(clock.monotonic_ns() + margin_ns)
        begin_ns = clock.monotonic_ns()
        exit_code = _run(command, output_to_stderr)
        end_ns = clock.monotonic_ns()
        clock.sleep_until_ns(end_ns + margin_ns)
        buffer = TraceBuffer()
        for batch in loop.fetch(0, flush=True):
            buffer.append(batch)
        info = loop.info()
    finally:
        loop.close()
    window = Window(node=info.node, begin_ns=begin_ns, end_ns=end_ns)
    return _evaluate(info, buffer, window, margin_ns, exit_code)


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


def _run(command: Sequence[str], output_to_stderr: bool) -> int:
    """The child's life; signals meant for us reach it, and we live on to report."""
    try:
        child = subprocess.Popen(list(command), stdout=sys.stderr if output_to_stderr else None)
    except FileNotFoundError as error:
        print(f"llem-ray measure: {command[0]}: not found ({error.strerror})", file=sys.stderr)
        return NOT_FOUND
    except OSError as error:
        print(f"llem-ray measure: {command[0]}: cannot be executed ({error.strerror})", file=sys.stderr)
        return NOT_EXECUTABLE
    with _forwarding(child):
        code = child.wait()
    return code if code >= 0 else KILLED_BY - code


@contextmanager
def _forwarding(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """A terminal's Ctrl-C reaches the child by itself (one process group); SIGTERM and SIGHUP are passed on."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            child.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _evaluate(info: SamplerInfo, buffer: TraceBuffer, window: Window, margin_ns: int, exit_code: int) -> CommandMeasurement:
    readings = [
        read_window(
            device=device,
            calibration=info.calibrations[device.uuid],
            trace=buffer.trace(device.uuid, window.begin_ns - margin_ns, window.end_ns + margin_ns),
            window=window,
            sample_period_s=info.periods_s.get(device.uuid, 1.0 / info.sample_hz),
            gates=GateSpec(),
            states=buffer.states(device.uuid, window.begin_ns - margin_ns, window.end_ns),
        )
        for device in info.devices
    ]
    measuring = {device.uuid for device in info.devices if is_measured(device) and not device.shared}
    measured = tuple(reading for reading in readings if reading.method != "estimated_model")
    return CommandMeasurement(
        window=window,
        readings=measured,
        estimates=tuple(reading for reading in readings if reading.method == "estimated_model"),
        total=sum_readings([r for r in measured if r.device_uuid in measuring], {(info.node, uuid) for uuid in measuring}),
        unavailable=info.unavailable,
        exit_code=exit_code,
    )


def to_json(result: CommandMeasurement) -> dict[str, Any]:
    """The documented JSON object of ``llem-ray measure --json``."""
    window = result.window
    return {
        "window": {"begin_ns": window.begin_ns, "end_ns": window.end_ns, "duration_s": window.duration_s},
        "devices": [_device_json(reading) for reading in result.readings],
        "total": {
            "energy_j": result.total.energy_j,
            "u_j": result.total.u_j,
            "covers": list(result.total.covers),
            "reason": result.total.reason,
        },
        "estimates": [_device_json(reading) for reading in result.estimates],
        "unavailable": dict(result.unavailable),
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
        "sensor_rel": reading.sensor_rel,
        "coverage": reading.coverage,
        "flags": [{"code": item.code, "severity": item.severity, "detail": item.detail} for item in reading.flags],
        "reason": reading.reason,
    }
