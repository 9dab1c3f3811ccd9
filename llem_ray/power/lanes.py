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

BUSY_SHARE: Final = 0.5
"""Reads may take this share of the period before it is lengthened. Reading the counter of one H200 takes 2.4 ms (driver 580), so
those of eight take 42 % of the period that its ticks want; fewer polls leave wider brackets around each tick."""

SLOWER: Final = 1.5
"""A longer period is at least so many times the one before."""

JUDGED_POLLS: Final = 20
MAX_PERIOD_S: Final = 1.0

Note = Callable[[str], None]


def followed_tick_s(source: PowerSource, calibrations: Mapping[str, Calibration]) -> float | None:
    """Period of the ticks that polls of the source follow, the shortest not under ``FAST_COUNTER_S``; None without such ticks."""
    known = (calibrations.get(device.uuid) for device in source.devices())
    ticks_s = [item.tick_period_s for item in known if item is not None and item.tick_period_s is not None]
    return min((tick_s for tick_s in ticks_s if tick_s >= FAST_COUNTER_S), default=None)


def polling_period_s(source: PowerSource, sample_hz: float, tick_s: float | None) -> float:
    """About min(1/sample_hz, T/2) for ticks ``tick_s`` = T apart, never in step with them; at least 1/max_hz."""
    period_s = 1.0 / sample_hz
    if tick_s is not None:
        # Detuned once, by one of them: GPUs of one model tick alike to some ppm, and each step would shorten it more.
        period_s = detuned_period_s(tick_s, min(period_s, tick_s / 2))
    return max(period_s, 1.0 / source.max_hz)


def detuned_period_s(tick_s: float, longest_s: float) -> float:
    """The longest poll period up to ``longest_s`` that never falls into step with ticks ``tick_s`` apart.

    Polls in step with the counter bracket every tick alike, and a line through the brackets then says no more than one of
    them. With T/h = n + 0.1459 (a noble number) the brackets' ends spread evenly over the tick.
    """
    polls = math.ceil(tick_s / longest_s - DETUNE - 1e-9) + DETUNE
    return tick_s / polls


def slower_period_s(tick_s: float | None, period_s: float) -> float:
    """The next longer poll period: never in step with ticks ``tick_s`` apart, and twice ``period_s`` where they are not known."""
    if tick_s is None:
        return 2 * period_s
    wanted_s = SLOWER * period_s
    if wanted_s <= tick_s / (1 + DETUNE):
        return tick_s / (math.floor(tick_s / wanted_s - DETUNE + 1e-9) + DETUNE)
    return tick_s * (max(1, math.ceil(wanted_s / tick_s - DETUNE - 1e-9)) + DETUNE)


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
        self._tick_s: float | None = None
        self._quicker_ns: list[int] = []
        self._call_ns: deque[int] = deque(maxlen=JUDGED_POLLS)

    def set_period(self, period_s: float, tick_s: float | None = None) -> None:
        """Poll every ``period_s`` from the next deadline on; ``tick_s``: what longer periods must not be in step with."""
        self._period_ns, self._tick_s = ns_from_s(period_s), tick_s
        self._quicker_ns.clear()
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
        slower_ns = ns_from_s(slower_period_s(self._tick_s, self.period_s))
        if call_ns > BUSY_SHARE * self._period_ns and slower_ns <= MAX_PERIOD_S * NS_PER_S:
            self._quicker_ns.append(self._period_ns)
            self._period_ns = slower_ns
            self._note(
                f"{self.source.name}: a read takes {call_ns / 1e6:.1f} ms, over {BUSY_SHARE:.0%} of the period: "
                f"slowed down to {1 / self.period_s:.3g} Hz"
            )
        elif self._quicker_ns and call_ns < BUSY_SHARE * self._period_ns / 4:
            self._period_ns = self._quicker_ns.pop()
            self._note(f"{self.source.name}: reads are quick again: back to {1 / self.period_s:.3g} Hz")


class StateLane(_Lane):
    """Slow lane of one source: temperature, clocks, throttling, memory."""

    def poll(self) -> Sequence[DeviceState]:
        """The source's slow readings; none when it fails, and a note says why."""
        try:
            return self.source.read_states()
        except Exception as error:  # noqa: BLE001 - the border: whatever a meter's driver raises, the loop goes on
            self._note(f"{self.source.name}: no slow readings: {type(error).__name__}: {error}")
            return ()
