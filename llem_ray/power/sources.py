"""Opens the power sources that a run asks for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import takewhile
from typing import Final, Literal

from llem_ray.core.errors import PluginError, PowerError
from llem_ray.core.plugins import load_plugin
from llem_ray.core.power import PowerSource

AUTO: Final = ("nvml", "rapl")
"""Measuring sources that ``auto`` tries. Others are opened by name only."""

ESTIMATE: Final = "codecarbon"
"""What ``auto`` adds where nothing measures the CPU."""

_CPU_SCOPES: Final = frozenset({"cpu_package", "module", "host"})


def open_sources(names: Sequence[str] | Literal["auto"]) -> tuple[list[PowerSource], dict[str, str]]:
    """Open power sources by the name of their plug-in.

    Args:
        names: Names, each of which must work; or ``auto``: nvml and rapl where they work, and codecarbon's estimate
            where neither measures the CPU.

    Returns:
        The open sources, for the caller to close; and under ``auto``, name -> why a source that was tried gives nothing.

    Raises:
        PluginError: A named source is unknown or not installed.
        PowerError: A named source does not work on this host.
        ConfigError: A source's own settings are wrong (``replay``), also under ``auto``.
    """
    if names == "auto":
        return _open_auto()
    sources: list[PowerSource] = []
    try:
        for name in dict.fromkeys(names):
            sources.append(_open(name))
    except BaseException:
        close_sources(sources)
        raise
    return sources, {}


def close_sources(sources: Sequence[PowerSource]) -> None:
    """Close them all."""
    for source in sources:
        source.close()


def measures_cpu(sources: Sequence[PowerSource]) -> bool:
    """Whether any device of ``sources`` is a measured one whose scope includes the CPU."""
    return any(
        device.scope in _CPU_SCOPES and device.method.startswith("measured") for source in sources for device in source.devices()
    )


def count_gpus() -> int:
    """Whole GPUs that NVML shows on this host and ``CUDA_VISIBLE_DEVICES`` leaves to us; 0 without NVML."""
    try:
        source = _open("nvml")
    except (PowerError, PluginError):
        return 0
    try:
        present = sum(device.scope in {"gpu", "module"} for device in source.devices())
    finally:
        source.close()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return present if visible is None else min(present, _count_visible(visible))


def _count_visible(visible: str) -> int:
    """Entries of ``CUDA_VISIBLE_DEVICES``; as in CUDA, one that names no device (-1, NoDevFiles, none) hides all after it."""
    names = (name.strip() for name in visible.split(","))
    return sum(1 for _ in takewhile(lambda name: name.isdecimal() or name.startswith(("GPU-", "MIG-")), names))


def _open_auto() -> tuple[list[PowerSource], dict[str, str]]:
    sources: list[PowerSource] = []
    unavailable: dict[str, str] = {}
    try:
        for name in (*AUTO, ESTIMATE):
            if name == ESTIMATE and measures_cpu(sources):
                continue
            try:
                sources.append(_open(name))
            except (PowerError, PluginError) as error:
                unavailable[name] = str(error)
    except BaseException:
        close_sources(sources)
        raise
    return sources, unavailable


def _open(name: str) -> PowerSource:
    source: PowerSource = load_plugin("llem_ray.power_sources", name)()
    return source
