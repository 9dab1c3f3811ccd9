"""Dense peak FLOP/s of GPUs, by NVML's name and number format: what MFU divides by.

Each row names the maker's page that states it, and where it was checked on 2026-11-26: copies of NVIDIA's tables, and tables of
open source tools that were made from NVIDIA's datasheets. The pages themselves were not read, and no GPU was asked.

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
    """The maker's page."""
    checked: str
    """Where the numbers were found again on ``AS_OF``."""
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

# Where rows were checked. NVIDIA's pages state Hopper, Blackwell and Ada with sparsity: half of that is dense.
_TITAN: Final = "pytorch/torchtitan, torchtitan/tools/utils.py"
_LIGHTNING: Final = "_CUDA_FLOPS of Lightning-AI/pytorch-lightning, fabric/utilities/throughput.py"
_HPCTECH: Final = "copy of NVIDIA's table, archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html"
_MULLET: Final = "copy of NVIDIA's table, mullet.se, product 355414"
_CLOCK: Final = "float32: 132 SM x 128 cores x 2 x 1.785 GHz = 60.3, while tables of before the release have 67"

PEAKS: Final[Mapping[str, Peak]] = {
    "NVIDIA B200": Peak(
        source=f"{_SITE}/data-center/hgx/",
        half=2250.0,
        float32=75.0,
        checked=f"{_TITAN}; float32: copy of NVIDIA's HGX table, zdszero.github.io (older copies have 80)",
    ),
    "NVIDIA H200": Peak(
        source=_H200, half=989.0, float32=67.0, checked=f"{_TITAN}; float32: the die and clock of the H100 SXM, {_HPCTECH}"
    ),
    "NVIDIA H200 NVL": Peak(
        source=_H200, half=835.5, float32=60.0, checked=f"karpathy/nanochat, nanochat/common.py (836); {_CLOCK}"
    ),
    "NVIDIA GH200 480GB": Peak(
        source=f"{_SITE}/data-center/grace-hopper-superchip/",
        half=990.0,
        float32=67.0,
        checked="copy of NVIDIA's datasheet 3773000, atineoSE/coding-model-seeks-gpu, pipeline/pipeline/sources/gh200_specs.md",
    ),
    "NVIDIA H100 80GB HBM3": Peak(source=_H100, half=989.0, float32=67.0, checked=f"{_HPCTECH}; {_TITAN}"),
    "NVIDIA H100 NVL": Peak(source=_H100, half=835.5, float32=60.0, checked=f"{_TITAN} (835); {_CLOCK}"),
    "NVIDIA H100 PCIe": Peak(source=_H100, half=756.0, float32=51.0, checked=f"{_HPCTECH}; {_TITAN}"),
    **dict.fromkeys(
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"),
        Peak(source=_A100, half=312.0, float32=19.5, checked=f"{_LIGHTNING}; {_TITAN}"),
    ),
    "NVIDIA L40S": Peak(source=f"{_SITE}/data-center/l40s/", half=362.05, float32=91.6, checked=f"{_MULLET}; {_TITAN} (362)"),
    "NVIDIA L40": Peak(source=f"{_SITE}/data-center/l40/", half=181.05, float32=90.5, checked=f"{_MULLET}; {_LIGHTNING} (181)"),
    "NVIDIA L4": Peak(
        source=f"{_SITE}/data-center/l4/",
        half=121.0,
        float32=30.3,
        checked=f"{_LIGHTNING}; winston-zhang-orz/gpu-specs, specs.md",
    ),
    "NVIDIA A10": Peak(
        source=f"{_SITE}/data-center/products/a10-gpu/",
        half=125.0,
        float32=31.2,
        checked=f"{_LIGHTNING} (a10g, from the A10's datasheet); winston-zhang-orz/gpu-specs, specs.md",
    ),
    **dict.fromkeys(
        ("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"),
        Peak(source=_V100, half=125.0, float32=15.7, bfloat16=False, checked=_LIGHTNING),
    ),
    **dict.fromkeys(
        ("Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"),
        Peak(source=_V100, half=112.0, float32=14.0, bfloat16=False, checked=_LIGHTNING),
    ),
    "Tesla T4": Peak(source=f"{_SITE}/data-center/tesla-t4/", half=65.0, float32=8.1, bfloat16=False, checked=_LIGHTNING),
}
"""NVML's name -> what the maker states."""


def peak_flops_per_s(name: str, dtype: str) -> float | str:
    """Dense peak of a GPU in a number format, FLOP/s; a text says why none is known."""
    peak = PEAKS.get(name)
    if peak is None:
        return f"no peak FLOP/s is listed for {name} (table of {AS_OF})"
    found = peak.flops_per_s(dtype)
    return f"no peak FLOP/s is listed for {dtype} on {name} (table of {AS_OF})" if found is None else found
