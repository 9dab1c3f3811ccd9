"""Dense peak FLOP/s of GPUs, by NVML's name and number format: what MFU divides by. Changed last on 2026-11-26.

Matrix units at their boost clock without sparsity, accumulating in float32; ``float32`` is that of the plain cores, as torch
multiplies float32 without TF32 unless it is told to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

AS_OF: Final = "2026-11-26"


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """What the maker states of a GPU, TFLOP/s; None where it has no such unit or is silent."""

    source: str
    half: float
    """float16, and bfloat16 unless ``bfloat16`` is False."""
    float32: float
    bfloat16: bool = True

    def flops_per_s(self, dtype: str) -> float | None:
        """Peak of a number format, FLOP/s."""
        if dtype == "float32":
            return self.float32 * 1e12
        if dtype == "float16" or (dtype == "bfloat16" and self.bfloat16):
            return self.half * 1e12
        return None


_SITE: Final = "https://www.nvidia.com/en-us"
_H100: Final = f"{_SITE}/data-center/h100/"
_H200: Final = f"{_SITE}/data-center/h200/"
_A100: Final = f"{_SITE}/data-center/a100/"
_V100: Final = f"{_SITE}/data-center/v100/"

PEAKS: Final[Mapping[str, Peak]] = {
    "NVIDIA B200": Peak(source=f"{_SITE}/data-center/hgx/", half=2250.0, float32=75.0),
    "NVIDIA H200": Peak(source=_H200, half=989.0, float32=67.0),
    "NVIDIA H200 NVL": Peak(source=_H200, half=835.5, float32=60.0),
    "NVIDIA GH200 480GB": Peak(source=f"{_SITE}/data-center/grace-hopper-superchip/", half=989.0, float32=67.0),
    "NVIDIA H100 80GB HBM3": Peak(source=_H100, half=989.0, float32=67.0),
    "NVIDIA H100 NVL": Peak(source=_H100, half=835.5, float32=60.0),
    "NVIDIA H100 PCIe": Peak(source=_H100, half=756.0, float32=51.0),
    **dict.fromkeys(
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"),
        Peak(source=_A100, half=312.0, float32=19.5),
    ),
    "NVIDIA L40S": Peak(source=f"{_SITE}/data-center/l40s/", half=362.05, float32=91.6),
    "NVIDIA L40": Peak(source=f"{_SITE}/data-center/l40/", half=181.05, float32=90.5),
    "NVIDIA L4": Peak(source=f"{_SITE}/data-center/l4/", half=121.0, float32=30.3),
    "NVIDIA A10": Peak(source=f"{_SITE}/data-center/products/a10-gpu/", half=125.0, float32=31.2),
    **dict.fromkeys(
        ("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"), Peak(source=_V100, half=125.0, float32=15.7, bfloat16=False)
    ),
    **dict.fromkeys(
        ("Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"), Peak(source=_V100, half=112.0, float32=14.0, bfloat16=False)
    ),
    "Tesla T4": Peak(source=f"{_SITE}/data-center/tesla-t4/", half=65.0, float32=8.1, bfloat16=False),
}
"""NVML's name -> what the maker states."""


def peak_flops_per_s(name: str, dtype: str) -> float | str:
    """Dense peak of a GPU in a number format, FLOP/s; a text says why none is known."""
    peak = PEAKS.get(name)
    if peak is None:
        return f"no peak FLOP/s is listed for {name} (table of {AS_OF})"
    found = peak.flops_per_s(dtype)
    return f"no peak FLOP/s is listed for {dtype} on {name} (table of {AS_OF})" if found is None else found
