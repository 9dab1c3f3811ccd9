"""What the fake NVML pretends: GPUs, their true power, their sensors and what goes wrong when."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from llem_ray.testing.nvml.waveform import Waveform

FaultKind = Literal[
    "gpu_lost",
    "not_supported",
    "no_permission",
    "timeout",
    "zero_reading",
    "counter_reset",
    "freeze",
    "slow_call",
    "temperature",
    "clock_events",
    "memory_used",
    "power_limit",
]
Target = Literal["counter", "instant", "average", "legacy", "state"]

_TARGETS: Final[dict[Target, int]] = {"counter": 1, "instant": 2, "average": 4, "legacy": 8, "state": 16}
_READINGS: Final[tuple[Target, ...]] = ("counter", "instant", "average", "legacy")
_FOREVER_S: Final = 1e18
NOT_SUPPORTED: Final = 3
"""NVML_ERROR_NOT_SUPPORTED."""
DRIVER_NOT_LOADED: Final = 9
"""NVML_ERROR_DRIVER_NOT_LOADED."""
_ARCHITECTURES: Final = {(7, 0): 5, (7, 5): 6, (8, 0): 7, (8, 6): 7, (8, 9): 8, (9, 0): 9, (10, 0): 10, (12, 0): 10}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that goes wrong from ``begin_s`` until before ``end_s`` (s of the scenario).

    ``value`` is: us for ``slow_call``, the counter's new value in mJ for ``counter_reset`` (which happens once, at
    ``begin_s``), degrees C for ``temperature``, the NVML mask for ``clock_events``, bytes for ``memory_used``, mW for
    ``power_limit``. ``targets`` narrows not_supported, no_permission, timeout and zero_reading to some
    readings; a gpu_lost GPU answers nothing at all.
    """

    kind: FaultKind
    begin_s: float = 0.0
    end_s: float = _FOREVER_S
    value: float = 0.0
    targets: tuple[Target, ...] = _READINGS


@dataclass(frozen=True, kw_only=True)
class Sensor:
    """A register that is renewed every ``period_s``, at ``phase_s`` plus multiples of it.

    The new value is the mean over the ``window_s`` before the tick (an energy counter: the energy until the tick) and can be
    read ``lag_s`` later. Ticks come up to ``jitter_s`` early or late; ``noise_w`` is the standard deviation of a power
    reading; ``gain`` is the sensor's systematic error as a factor.
    """

    period_s: float = 0.1
    phase_s: float = 0.0
    lag_s: float = 0.0
    window_s: float = 0.0
    gain: float = 1.0
    noise_w: float = 0.0
    jitter_s: float = 0.0

    def __post_init__(self) -> None:
        if self.period_s <= 0 or self.jitter_s < 0 or self.jitter_s >= self.period_s / 2:
            raise ValueError(
                f"a sensor needs a period > 0 and a jitter below half of it, not {self.period_s} and {self.jitter_s} s"
            )

    def line(self) -> str:
        """As the scenario file has it."""
        values = (self.period_s, self.phase_s, self.lag_s, self.window_s, self.gain, self.noise_w, self.jitter_s)
        return " ".join(repr(float(value)) for value in values)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU. The defaults are an H100's or H200's sensors: a 100 ms counter, instant power that sees 25 ms of every 100 ms."""

    uuid: str
    waveform: Waveform
    name: str = "NVIDIA H200"
    memory_total_bytes: int = 143_771 * 2**20
    memory_used_bytes: int = 512 * 2**20
    processes: int = 0
    power_limit_w: float = 700.0
    compute_capability: tuple[int, int] = (9, 0)
    pci_bus_id: str | None = None
    """Default: made from the index."""
    mig: bool | None = None
    """None: MIG is not supported."""
    legacy: Literal["auto", "instant", "average"] = "auto"
    """What nvmlDeviceGetPowerUsage means; ``auto``: the 1 s average on Ampere (except GA100) and newer."""
    counter: Sensor = Sensor()
    instant: Sensor = Sensor(window_s=0.025)
    average: Sensor = Sensor(window_s=1.0)
    energy_base_mj: float = 1e9
    """The counter's value at scenario time 0."""
    quantum_mj: float = 1.0
    module_extra_w: float | None = None
    """Grace Hopper: power of the module beyond the GPU, which the counter covers too. None: an ordinary GPU."""
    has_counter: bool = True
    has_instant: bool = True
    has_average: bool = True
    has_legacy_energy: bool = True
    has_legacy_power: bool = True
    temperature_c: float = 45.0
    sm_clock_mhz: int = 1980
    memory_clock_mhz: int = 3201
    clock_event_mask: int = 0
    latency_us: float = 0.0
    """Time every call on this GPU takes."""
    seed: int = 0
    faults: tuple[Fault, ...] = ()

    def energy_j(self, begin_s: float, end_s: float) -> float:
        """True energy of what the counter covers, between two times of the scenario, J."""
        extra_w = self.module_extra_w or 0.0
        return self.waveform.energy_j(begin_s, end_s) + extra_w * (end_s - begin_s)

    def lines(self, index: int) -> list[str]:
        """As the scenario file has it."""
        if not self.uuid or " " in self.uuid or "\n" in self.uuid + self.name:
            raise ValueError(f"a GPU needs a UUID without spaces and a name of one line, not {self.uuid!r} and {self.name!r}")
        limit_mw = round(self.power_limit_w * 1e3)
        architecture = _ARCHITECTURES.get(self.compute_capability, 0xFFFFFFFF if self.compute_capability < (7, 0) else 10)
        averaged = self.legacy == "average" or (self.legacy == "auto" and self.compute_capability > (8, 0))
        supported = (self.has_counter, self.has_instant, self.has_average, self.has_legacy_energy, self.has_legacy_power)
        state = (self.sm_clock_mhz, self.memory_clock_mhz, self.clock_event_mask, self.processes)
        mig = -1 if self.mig is None else int(self.mig)
        return [
            f"gpu {self.uuid}",
            f"name {self.name}",
            f"pci {self.pci_bus_id or f'00000000:{0x1B + index:02X}:00.0'}",
            f"memory {self.memory_total_bytes} {self.memory_used_bytes}",
            f"limit {limit_mw} {limit_mw // 4} {limit_mw}",
            f"chip {self.compute_capability[0]} {self.compute_capability[1]} {architecture}",
            f"mig {mig}",
            f"legacy {int(averaged)}",
            f"module {-1.0 if self.module_extra_w is None else self.module_extra_w!r}",
            f"state {self.temperature_c!r} " + " ".join(map(str, state)),
            "codes " + " ".join(str(0 if has else NOT_SUPPORTED) for has in supported),
            f"energy {self.energy_base_mj!r} {self.quantum_mj!r}",
            f"seed {self.seed}",
            f"latency_us {self.latency_us!r}",
            f"counter {self.counter.line()}",
            f"instant {self.instant.line()}",
            f"average {self.average.line()}",
            *(_fault_line(fault) for fault in self.faults),
            f"waveform {len(self.waveform.segments)} {self.waveform.repeat_s or 0.0!r}",
            *(f"{kind[0]} {t_s!r} {power_w!r}" for t_s, power_w, kind in self.waveform.segments),
        ]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A host's GPUs and the clock their waveforms run on.

    On the virtual clock, scenario time 0 is ``origin_ns`` and time passes only when ``NvmlClock`` is advanced. On the real-time
    clock ``origin_ns`` is a CLOCK_REALTIME stamp: truth is evaluated there, so a shifted monotonic clock does not shift it.
    """

    gpus: tuple[Gpu, ...]
    clock: Literal["virtual", "realtime"] = "virtual"
    origin_ns: int = 1_000_000_000_000
    driver_version: str = "570.86.15"
    cuda_version: int = 12080
    """As NVML gives it: 1000 x major + 10 x minor."""
    init_code: int = 0
    """What nvmlInit returns: 9 is "driver not loaded", 4 "no permission"."""
    _by_uuid: dict[str, Gpu] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_uuid", {gpu.uuid: gpu for gpu in self.gpus})
        if len(self._by_uuid) != len(self.gpus):
            raise ValueError("the UUIDs of a scenario must differ")

    def gpu(self, uuid: str) -> Gpu:
        """The GPU with this UUID; KeyError without one."""
        return self._by_uuid[uuid]

    def energy_j(self, uuid: str, begin_s: float, end_s: float) -> float:
        """True energy of one GPU between two times of the scenario, J."""
        return self.gpu(uuid).energy_j(begin_s, end_s)

    def seconds(self, t_ns: int) -> float:
        """Scenario time of a stamp of the scenario's clock, s."""
        return (t_ns - self.origin_ns) / 1e9

    def write(self, path: Path) -> Path:
        """Write the scenario file that the library reads; returns ``path``."""
        lines = [
            "fake-nvml 1",
            f"clock {self.clock} {self.origin_ns}",
            f"driver {self.driver_version} {self.cuda_version}",
            f"init {self.init_code}",
        ]
        for index, gpu in enumerate(self.gpus):
            lines.extend(gpu.lines(index))
        path.write_text("\n".join(lines) + "\n", encoding="ascii")
        return path


def _fault_line(fault: Fault) -> str:
    if not (math.isfinite(fault.begin_s) and math.isfinite(fault.end_s)):
        raise ValueError("a fault's times must be finite")
    mask = sum(_TARGETS[target] for target in fault.targets)
    return f"fault {fault.kind} {float(fault.begin_s)!r} {float(fault.end_s)!r} {float(fault.value)!r} {mask}"
