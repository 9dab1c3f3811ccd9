"""What this host offers TensorRT-LLM, asked before anything of it is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from llem_ray.core.errors import PluginError

PYTHON: Final = (3, 12)
"""The only Python that TensorRT-LLM 1.2 is tested with."""

OLDEST_CAPABILITY: Final = (8, 0)
"""Ampere A100; nothing older is in TensorRT-LLM's list of supported hardware."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU, in the order in which CUDA counts those that this process may use."""

    name: str
    uuid: str
    """As NVML writes it: `GPU-...`."""
    capability: tuple[int, int]
    """CUDA compute capability, major and minor."""


class Machine(Protocol):
    """The host as far as the engine cares. Tests pass one that pretends."""

    def python(self) -> tuple[int, int]:
        """Major and minor version of the interpreter."""
        ...

    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs that this process may use."""
        ...


class ThisMachine:
    """The real one, as torch sees it."""

    def python(self) -> tuple[int, int]:
        """Of this process."""
        return sys.version_info[:2]

    def gpus(self) -> tuple[Gpu, ...]:
        """Empty without a driver, a GPU or a torch that can use one."""
        import torch  # noqa: PLC0415 - the backend's module must be importable where there is no torch

        if not torch.cuda.is_available():
            return ()
        found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
        return tuple(
            Gpu(name=str(gpu.name), uuid=f"GPU-{gpu.uuid}", capability=(int(gpu.major), int(gpu.minor))) for gpu in found
        )


def require_python(found: tuple[int, int]) -> None:
    """Refuse an interpreter that TensorRT-LLM does not support.

    Raises:
        PluginError: It is another version.
    """
    if found != PYTHON:
        raise PluginError(
            f"TensorRT-LLM 1.2 needs Python {PYTHON[0]}.{PYTHON[1]}, this is Python {found[0]}.{found[1]}",
            "give it an environment of its own and name its interpreter in `engine.python`",
        )


def require_gpus(gpus: Sequence[Gpu], needed: int) -> None:
    """Refuse a host without enough GPUs that are new enough.

    Args:
        gpus: Those that this process may use.
        needed: Workers of the gang; worker number i takes the i-th GPU.

    Raises:
        PluginError: There are too few, or one of them is too old.
    """
    if len(gpus) < needed:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
        raise PluginError(
            f"TensorRT-LLM needs {needed} NVIDIA GPU{'' if needed == 1 else 's'}, {len(gpus)} can be used here{seen}",
            "check `nvidia-smi`, and that torch in this environment is one with CUDA",
        )
    for gpu in gpus[:needed]:
        if gpu.capability < OLDEST_CAPABILITY:
            raise PluginError(
                f"TensorRT-LLM 1.2 needs GPUs of compute capability 8.0 or newer (A100 and later),"
                f" {gpu.name} has {gpu.capability[0]}.{gpu.capability[1]}",
                "choose another node by `engine.gpu_type`, or another engine",
            )
