"""A small meter whose every reading is known, on a clock that jumps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from llem_ray.core.clock import Clock
from llem_ray.core.power import Device, DeviceState, PowerSample
from llem_ray.testing.clock import VirtualClock


@dataclass
class SteadyMeter:
    """100 W a device; the counter ticks every ``tick_s``; a read takes ``call_s`` of the clock."""

    clock: Clock
    uuids: Sequence[str] = ("gpu-0",)
    tick_s: float = 0.1
    call_s: float = 0.0
    name: str = "steady"
    max_hz: float = 1000.0
    fault: Exception | None = None
    state_fault: Exception | None = None
    dead: tuple[str, ...] = ()
    before_read: Callable[[], None] = lambda: None
    reads: int = 0
    closes: int = 0
    extra: list[PowerSample] = field(default_factory=list)

    def devices(self) -> tuple[Device, ...]:
        return tuple(
            Device(
                uuid=uuid,
                name=uuid,
                source=self.name,
                scope="gpu",
                method="unavailable" if uuid in self.dead else "measured_counter",
                index=i,
            )
            for i, uuid in enumerate(self.uuids)
        )

    def read(self) -> list[PowerSample]:
        self.reads += 1
        self.before_read()
        before_ns = self.clock.monotonic_ns()
        self.clock.sleep_until_ns(before_ns + round(self.call_s * 1e9))
        if self.fault is not None:
            raise self.fault
        t_ns = (before_ns + self.clock.monotonic_ns()) // 2
        ticks = t_ns // round(self.tick_s * 1e9)
        samples = [
            PowerSample(
                t_ns=t_ns,
                hw_ns=round(self.call_s * 5e8),
                device_uuid=uuid,
                power_mw=100_000.0,
                power_avg_mw=None,
                energy_mj=ticks * self.tick_s * 100_000.0,
            )
            for uuid in self.uuids
        ]
        return samples + self.extra

    def read_states(self) -> list[DeviceState]:
        if self.state_fault is not None:
            raise self.state_fault
        return [DeviceState(t_ns=self.clock.monotonic_ns(), device_uuid=uuid, temperature_c=40.0) for uuid in self.uuids]

    def close(self) -> None:
        self.closes += 1


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def meter(clock: VirtualClock) -> SteadyMeter:
    return SteadyMeter(clock)


@pytest.fixture
def new_meter() -> type[SteadyMeter]:
    return SteadyMeter
