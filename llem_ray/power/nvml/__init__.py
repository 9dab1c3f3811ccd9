"""NVIDIA GPUs: energy counter, instant and 1 s average power from NVML, by GPU UUID.

NVML ignores CUDA_VISIBLE_DEVICES, so every GPU of the host (or of the container) is listed, and identity is the UUID.
"""

from llem_ray.power.nvml.native import driver_facts
from llem_ray.power.nvml.source import NvmlSource

__all__ = ["NvmlSource", "driver_facts"]
