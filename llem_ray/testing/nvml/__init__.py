"""A fake NVML for tests: a C library that the real nvidia-ml-py loads, with exactly known energy."""

from llem_ray.testing.nvml.library import FakeNvml, NvmlClock, build, default_cache, environment, fake_nvml
from llem_ray.testing.nvml.scenario import Fault, Gpu, Scenario, Sensor
from llem_ray.testing.nvml.waveform import Segment, Waveform

__all__ = [
    "FakeNvml",
    "Fault",
    "Gpu",
    "NvmlClock",
    "Scenario",
    "Segment",
    "Sensor",
    "Waveform",
    "build",
    "default_cache",
    "environment",
    "fake_nvml",
]
