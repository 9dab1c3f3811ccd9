"""CPU and RAM power as codecarbon's models estimate it, for hosts where nothing measures them."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Sequence
from typing import Final

from codecarbon.core.cpu import TDP
from codecarbon.core.util import count_physical_cpus
from codecarbon.external.hardware import CPU, MODE_CPU_LOAD
from codecarbon.external.ram import RAM

from llem_ray.core.clock import Clock, SystemClock
from llem_ray.core.errors import SourceUnavailable
from llem_ray.core.power import Device, DeviceState, PowerSample
from llem_ray.core.units import MW_PER_W, ns_from_s

CPU_REL: Final = 2.5
"""TDP-and-load models of one CPU differ 3.5x at half load, and codecarbon's (10 % of TDP + 90 % x load^3) is the lowest."""

MIN_INTERVAL_S: Final = 0.5
"""The kernel counts CPU time in steps of 10 ms: load over less than this is noise."""

RAM_REL: Final = 1.0
"""About 5 W a module, the number of modules guessed from the size; load is not seen at all."""


class CodecarbonSource:
    """``codecarbon:cpu`` and ``codecarbon:ram``, both ``estimated_model``: never to be added to measured energy.

    Uses codecarbon's hardware models alone: no tracker, no network, no files, no log lines. Numbers are what its tracker
    would use in ``cpu_load`` mode for the whole machine: TDP from its table (4 W a thread for a CPU that it does not
    know) x sockets, scaled by the load since the previous poll; RAM by installed size.

    Args:
        clock: Clock that stamps the samples.

    Raises:
        SourceUnavailable: codecarbon cannot make out the CPU.
    """

    name = "codecarbon"
    max_hz = 1.0
    lag_s = 0.0

    def __init__(self, *, clock: Clock | None = None) -> None:
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        self._clock = clock or SystemClock()
        try:
            chip = TDP()
            sockets = max(1, count_physical_cpus())
            if chip.tdp is None:
                raise SourceUnavailable("codecarbon: it cannot make out the model of this CPU")
            self._tdp_w = float(chip.tdp) * sockets
            self._cpu = CPU.from_utils(os.devnull, MODE_CPU_LOAD, chip.model, self._tdp_w)
            self._ram = RAM()
            self._cpu.start()
        except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
            raise SourceUnavailable(f"codecarbon: its hardware detection failed: {error}") from error
        self._model = str(chip.model)
        self._estimated_ns: int | None = None
        self._cpu_w = self._ram_w = 0.0

    def devices(self) -> tuple[Device, ...]:
        """The CPU (all sockets) and the RAM of the host."""
        cpu = Device(
            uuid=f"{self.name}:cpu",
            name=f"{self._model}, {self._tdp_w:g} W TDP model",
            source=self.name,
            scope="cpu_package",
            method="estimated_model",
            sensor_rel=CPU_REL,
        )
        ram = Device(
            uuid=f"{self.name}:ram",
            name="RAM size model",
            source=self.name,
            scope="dram",
            method="estimated_model",
            index=1,
            sensor_rel=RAM_REL,
        )
        return cpu, ram

    def read(self) -> Sequence[PowerSample]:
        """Estimated power: the CPU's is the mean since the previous estimate, which is held for ``MIN_INTERVAL_S``."""
        before_ns = self._clock.monotonic_ns()
        if self._estimated_ns is None or before_ns - self._estimated_ns >= ns_from_s(MIN_INTERVAL_S):
            self._estimated_ns = before_ns
            self._cpu_w, self._ram_w = float(self._cpu.total_power().W), float(self._ram.total_power().W)
        after_ns = self._clock.monotonic_ns()
        return [self._sample("cpu", self._cpu_w, before_ns, after_ns), self._sample("ram", self._ram_w, before_ns, after_ns)]

    def read_states(self) -> Sequence[DeviceState]:
        """None: a model has no temperature."""
        return ()

    def close(self) -> None:
        """Nothing to release."""

    def _sample(self, part: str, power_w: float, before_ns: int, after_ns: int) -> PowerSample:
        known = power_w > 0  # codecarbon answers 0 W where it fails
        return PowerSample(
            t_ns=(before_ns + after_ns) // 2,
            hw_ns=(after_ns - before_ns + 1) // 2,
            device_uuid=f"{self.name}:{part}",
            power_mw=power_w * MW_PER_W if known else None,
            power_avg_mw=None,
            energy_mj=None,
            error=None if known else f"codecarbon has no estimate for the {part}",
        )
