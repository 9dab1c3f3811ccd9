"""Learns a sensor's habits by watching it closely for a moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Final

import numpy as np

from llem_ray.core.clock import Clock
from llem_ray.core.errors import PowerError
from llem_ray.core.power import Calibration, PowerSample, PowerSource
from llem_ray.core.units import NS_PER_S, ns_from_s

FINE_HZ: Final = 500.0
"""Polling rate while calibrating: a tick is seen within 2 ms."""

DEFAULT_LAG_S: Final = 0.010
"""Publication lag assumed for a counter that nobody has probed."""

Tick = tuple[int, int]
"""Poll times (ns) before and at the poll that first saw the new counter value."""


class _Watch:
    """What was seen of one device."""

    def __init__(self) -> None:
        self.ticks: list[Tick] = []
        self.call_ns: list[int] = []
        self.has_instant = False
        self.has_average = False
        self._last: tuple[int, float] | None = None

    def see(self, sample: PowerSample) -> None:
        self.call_ns.append(2 * sample.hw_ns)
        self.has_instant |= sample.power_mw is not None
        self.has_average |= sample.power_avg_mw is not None
        if sample.energy_mj is None:
            self._last = None
            return
        if self._last is not None and sample.energy_mj != self._last[1]:
            self.ticks.append((self._last[0], sample.t_ns))
        self._last = (sample.t_ns, sample.energy_mj)


def tick_period_s(ticks: Sequence[Tick]) -> float | None:
    """Period of a counter from the polls that bracket its ticks; None under 3 ticks.

    A weighted line through (tick number, middle of the bracket); a tick that was missed only skips a number.
    """
    if len(ticks) < 3:
        return None
    brackets = np.asarray(ticks, dtype=np.float64) / NS_PER_S
    middle, width = brackets.mean(axis=1), brackets[:, 1] - brackets[:, 0]
    gaps = np.diff(middle)
    number = np.concatenate(([0.0], np.cumsum(np.maximum(1.0, np.round(gaps / np.median(gaps))))))
    slope = np.polyfit(number, middle - middle[0], 1, w=1.0 / np.maximum(width, 1e-6))[0]
    return float(slope)


def calibrate_sources(
    sources: Sequence[PowerSource], clock: Clock, *, duration_s: float, lag_s: float = DEFAULT_LAG_S
) -> Mapping[str, Calibration]:
    """Poll every source as fast as it allows, up to ``FINE_HZ``, for ``duration_s``.

    A source may know its counter's lag: its attribute ``lag_s``, in s, goes before the argument. A source that fails
    while it is watched gets the calibration of what was seen.

    Returns:
        Device UUID -> calibration, for every device that was read at least once.
    """
    begin_ns = clock.monotonic_ns()
    end_ns = begin_ns + ns_from_s(duration_s)
    period_ns = [ns_from_s(1.0 / min(FINE_HZ, source.max_hz)) for source in sources]
    next_ns = [begin_ns] * len(sources)
    watches: dict[str, tuple[_Watch, float]] = {}
    while sources and min(next_ns) < end_ns:
        clock.sleep_until_ns(min(next_ns))
        for i, source in enumerate(sources):
            now_ns = clock.monotonic_ns()
            if next_ns[i] > now_ns:
                continue
            next_ns[i] += period_ns[i] * ((now_ns - next_ns[i]) // period_ns[i] + 1)
            for sample in _read(source):
                if sample.device_uuid not in watches:
                    watches[sample.device_uuid] = (_Watch(), float(getattr(source, "lag_s", lag_s)))
                watches[sample.device_uuid][0].see(sample)
    clock.sleep_until_ns(end_ns)
    return {
        uuid: Calibration(
            device_uuid=uuid,
            tick_period_s=tick_period_s(watch.ticks),
            has_instant=watch.has_instant,
            has_average=watch.has_average,
            lag_s=lag,
            call_s=median(watch.call_ns) / NS_PER_S,
        )
        for uuid, (watch, lag) in watches.items()
    }


def _read(source: PowerSource) -> Sequence[PowerSample]:
    try:
        return source.read()
    except (PowerError, OSError):
        return ()
