"""When to poll a source next, and what a poll that fails turns into."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Final

from llem_ray.core.clock import Clock
from llem_ray.core.power import Calibration, DeviceState, PowerSample, PowerSource
from llem_ray.core.units import NS_PER_S, ns_from_s

DETUNE: Final = 0.1458980337503154
"""Golden ratio to the power of -4."""

FAST_COUNTER_S: Final = 0.015
"""A counter that ticks faster than this is fresh at every poll: no need to follow each tick."""

BUSY_SHARE: Final = 0.2
"""Reads may take this share of the period before it is doubled."""

JUDGED_POLLS: Final = 20
MAX_PERIOD_S: Final = 1.0

Note = Callable[[str], None]


def polling_period_s(source: PowerSource, sample_hz: float, calibrations: Mapping[str, Calibration]) -> float:
    """About min(1/sample_hz, T/2), T over the source's counters slower than ``FAST_COUNTER_S``, never in step with one.

    At least 1/max_hz.
    """
    known = (calibrations.get(device.uuid) for device in source.devices())
    ticks_s = [item.tick_period_s for item in known if item is not None and item.tick_period_s is not None]
    slow_s = [tick_s for tick_s in ticks_s if tick_s >= FAST_COUNTER_S]
    period_s = 1.0 / sample_hz
    if slow_s:
        # Detuned once, by the fastest of them: GPUs of one model tick alike to some ppm, and each step would shorten it more.
        fastest_s = min(slow_s)
        period_s = detuned_period_s(fastest_s, min(period_s, fastest_s / 2))
    return max(period_s, 1.0 / source.max_hz)


def detuned_period_s(tick_s: float, longest_s: float) -> float:
    """The longest poll period up to ``longest_s`` that never falls into step with ticks ``tick_s`` apart.

    Polls in step with the counter bracket every tick alike, and a line through the brackets then says no more than one of
    them. With T/h = n + 0.1459 (a noble number) the brackets' ends spread evenly over the tick.
    """
    polls = math.ceil(tick_s / longest_s - DETUNE - 1e-9) + DETUNE
    return tick_s / polls


class _Lane:
    """Absolute deadlines, ``period_s`` apart."""

    def __init__(self, source: PowerSource, period_s: float, clock: Clock, note: Note) -> None:
        self.source = source
        self.next_ns = 0
        self._clock = clock
        self._note = note
        self._period_ns = ns_from_s(period_s)

    @property
    def period_s(self) -> float:
        return self._period_ns / NS_PER_S

    def begin(self, now_ns: int) -> None:
        """Make the first deadline now, unless one is still to come."""
        self.next_ns = max(self.next_ns, now_ns)

    def schedule(self, now_ns: int) -> None:
        """Move on to the first deadline after ``now_ns``; those missed are skipped."""
        self.next_ns += self._period_ns * ((now_ns - self.next_ns) // self._period_ns + 1)


class PowerLane(_Lane):
    """Fast lane of one source: power and energy."""

    def __init__(self, source: PowerSource, period_s: float, clock: Clock, note: Note) -> None:
        super().__init__(source, period_s, clock, note)
        self.uuids = tuple(device.uuid for device in source.devices() if device.method != "unavailable")
        self._unavailable = frozenset(device.uuid for device in source.devices()) - frozenset(self.uuids)
        self._base_ns = self._period_ns
        self._call_ns: deque[int] = deque(maxlen=JUDGED_POLLS)

    def set_period(self, period_s: float) -> None:
        """Poll every ``period_s`` from the next deadline on."""
        self._period_ns = self._base_ns = ns_from_s(period_s)
        self._call_ns.clear()

    def poll(self) -> Sequence[PowerSample]:
        """One sample a device; an error of the source becomes a sample with the error for each of its devices."""
        before_ns = self._clock.monotonic_ns()
        try:
            samples = self.source.read()
        except Exception as error:  # noqa: BLE001 - the border: whatever a meter's driver raises, the loop goes on
            samples = self._failed(before_ns, self._clock.monotonic_ns(), error)
        self._call_ns.append(self._clock.monotonic_ns() - before_ns)
        if len(self._call_ns) == JUDGED_POLLS:
            self._judge()
        if self._unavailable:
            return [sample for sample in samples if sample.device_uuid not in self._unavailable]
        return samples

    def _failed(self, before_ns: int, after_ns: int, error: Exception) -> list[PowerSample]:
        text = f"{type(error).__name__}: {error}"
        return [
            PowerSample(
                t_ns=(before_ns + after_ns) // 2,
                hw_ns=(after_ns - before_ns + 1) // 2,
                device_uuid=uuid,
                power_mw=None,
                power_avg_mw=None,
                energy_mj=None,
                error=text,
            )
            for uuid in self.uuids
        ]

    def _judge(self) -> None:
        call_ns = median(self._call_ns)
        self._call_ns.clear()
        if call_ns > BUSY_SHARE * self._period_ns and 2 * self._period_ns <= MAX_PERIOD_S * NS_PER_S:
            self._period_ns *= 2
            self._note(
                f"{self.source.name}: a read takes {call_ns / 1e6:.1f} ms, over {BUSY_SHARE:.0%} of the period: "
                f"slowed down to {1 / self.period_s:g} Hz"
            )
        elif self._period_ns > self._base_ns and call_ns < BUSY_SHARE * self._period_ns / 4:
            self._period_ns //= 2
            self._note(f"{self.source.name}: reads are quick again: back to {1 / self.period_s:g} Hz")


class StateLane(_Lane):
    """Slow lane of one source: temperature, clocks, throttling, memory."""

    def poll(self) -> Sequence[DeviceState]:
        """The source's slow readings; none when it fails, and a note says why."""
        try:
            return self.source.read_states()
        except Exception as error:  # noqa: BLE001 - the border: whatever a meter's driver raises, the loop goes on
            self._note(f"{self.source.name}: no slow readings: {type(error).__name__}: {error}")
            return ()
