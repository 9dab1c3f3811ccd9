"""Rest before a trial until its gang's devices are cool."""

from __future__ import annotations

from typing import Final

from llem_ray.core.clock import Clock
from llem_ray.core.measure_spec import MeasureSpec
from llem_ray.core.units import NS_PER_S, ns_from_s
from llem_ray.execution.interrupts import Aborted
from llem_ray.execution.meter import Meter
from llem_ray.execution.records import GangRecord, HostDevice
from llem_ray.execution.waits import Waits

LOOK_S: Final = 0.5
FRESH_S: Final = 6.0
"""Older temperatures do not count; the slow lane reads about one a second."""


def rest_until_cool(record: GangRecord, meter: Meter, measure: MeasureSpec, waits: Waits, clock: Clock) -> str | None:
    """Wait until no device of the gang is hotter than ``measure.cooldown_until_c``, or until the limit.

    Returns:
        What is still too hot; None when all are cool, or nothing was asked.

    Raises:
        Aborted: The user wants out.
    """
    limit_c = measure.cooldown_until_c
    if limit_c is None:
        return None
    deadline_ns = clock.monotonic_ns() + ns_from_s(measure.cooldown_limit_s)
    while True:
        seen = {item: temperature_c(item, meter, clock.monotonic_ns()) for item in record.devices}
        if not any(found is not None for found in seen.values()):
            return "no temperature can be read"
        hot = {item: found for item, found in seen.items() if found is not None and found > limit_c}
        if not hot:
            return None
        if clock.monotonic_ns() >= deadline_ns:
            device, found_c = max(hot.items(), key=lambda one: one[1])
            where = f"{device.device.name} on {meter.hostname(device.host)}"
            return f"{where} at {found_c:.0f} C after {measure.cooldown_limit_s:g} s, asked for {limit_c:g} C"
        if not waits.sleep(LOOK_S):
            raise Aborted


def temperature_c(item: HostDevice, meter: Meter, now_ns: int) -> float | None:
    """The device's last temperature, C; None where it is not read."""
    there_ns = meter.clocks.to_host(item.host, now_ns)
    if there_ns is None:
        return None
    states = meter.states(item.host, item.device.uuid, there_ns - ns_from_s(FRESH_S), there_ns + NS_PER_S)
    known = [state.temperature_c for state in states if state.temperature_c is not None]
    return known[-1] if known else None
