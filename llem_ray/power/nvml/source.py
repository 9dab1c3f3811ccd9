"""The NVML power source: all NVIDIA GPUs of this host."""

from __future__ import annotations

from collections.abc import Sequence

import pynvml

from llem_ray.core.clock import Clock, SystemClock
from llem_ray.core.errors import PowerError, SourceUnavailable
from llem_ray.core.power import Device, DeviceState, PowerSample
from llem_ray.power.nvml.gpu import open_gpu
from llem_ray.power.nvml.native import Session, own_error


class NvmlSource:
    """All NVIDIA GPUs of this host.

    One ``nvmlDeviceGetFieldValues`` per GPU and poll reads the energy counter (83), instant power (186) and the 1 s average
    (185), each with its own return code. Where a driver lacks a field, the legacy calls stand in: ``nvmlDeviceGetPowerUsage``
    is a 1 s average on Ampere (except GA100) and newer and goes to that column there, to instant power on older ones. The
    ``error`` of a sample begins with a stable code: gpu_lost, timeout, no_permission, not_supported, zero_reading or
    read_failed. ``read`` is for one thread at a time.

    Args:
        clock: What stamps the samples; default: the host's monotonic clock.
        lag_s: The energy counter's publication lag where it is known; default: what the sampler assumes.

    Raises:
        SourceUnavailable: No driver library, driver not loaded, or no GPU.
        PowerPermissionDenied: This user may not use the driver.
        ReadFailed: The GPUs cannot be listed.
    """

    name = "nvml"
    max_hz = 500.0
    lag_s: float

    def __init__(self, clock: Clock | None = None, lag_s: float | None = None) -> None:
        self._clock = clock or SystemClock()
        if lag_s is not None:
            self.lag_s = lag_s
        self._session = Session()
        try:
            self._gpus = tuple(open_gpu(index) for index in range(pynvml.nvmlDeviceGetCount()))
            if not self._gpus:
                raise SourceUnavailable("NVML: the driver is loaded but lists no GPU", "in a container: was a GPU given to it?")
            self._devices = tuple(gpu.device() for gpu in self._gpus)
        except pynvml.NVMLError as error:
            self._session.close()
            raise own_error(error, "cannot list the GPUs") from error
        except PowerError:
            self._session.close()
            raise

    def devices(self) -> tuple[Device, ...]:
        """All GPUs, in NVML's order (that of the PCI bus)."""
        return self._devices

    def read(self) -> Sequence[PowerSample]:
        """One sample a GPU. A GPU that fails gives a sample with ``error``; the others are read all the same."""
        return [gpu.sample(self._clock) for gpu in self._gpus]

    def read_states(self) -> Sequence[DeviceState]:
        """Temperature, clocks, clocks-event reasons, memory, processes and enforced limit of every GPU."""
        return [gpu.state(self._clock) for gpu in self._gpus]

    def close(self) -> None:
        """Give NVML back; may be called more than once."""
        self._session.close()
