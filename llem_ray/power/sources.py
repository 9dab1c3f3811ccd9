"""Opens the power sources that a run asks for."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import Final, Literal

from llem_ray.core.errors import PluginError, PowerError
from llem_ray.core.plugins import load_plugin
from llem_ray.core.power import Device, DeviceState, PowerSample, PowerSource

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


class _Rest:
    """A source without some of its devices."""

    def __init__(self, source: PowerSource, skip: Collection[str]) -> None:
        self._source, self._skip = source, frozenset(skip)
        self.name, self.max_hz = source.name, source.max_hz
        if hasattr(source, "lag_s"):
            self.lag_s = source.lag_s

    def devices(self) -> tuple[Device, ...]:
        return tuple(device for device in self._source.devices() if device.uuid not in self._skip)

    def read(self) -> Sequence[PowerSample]:
        return [sample for sample in self._source.read() if sample.device_uuid not in self._skip]

    def read_states(self) -> Sequence[DeviceState]:
        return [state for state in self._source.read_states() if state.device_uuid not in self._skip]

    def close(self) -> None:
        self._source.close()


def without_devices(sources: Sequence[PowerSource], skip: Collection[str]) -> list[PowerSource]:
    """The sources without the devices of these UUIDs: another sampler of the same host reads them."""
    if not skip:
        return list(sources)
    listed = {device.uuid for source in sources for device in source.devices()}
    return [_Rest(source, skip) for source in sources] if listed & set(skip) else list(sources)


def gpu_uuids(ids: Sequence[str]) -> tuple[str, ...]:
    """UUIDs of the GPUs that a scheduler names by NVML index or by UUID, as this process sees them.

    Empty when NVML does not answer here, or does not know one of them.
    """
    if all(name.startswith(("GPU-", "MIG-")) for name in ids):
        return tuple(ids)
    try:
        source = _open("nvml")
    except (PowerError, PluginError):
        return ()
    try:
        known = {str(device.index): device.uuid for device in source.devices()}
    finally:
        source.close()
    return tuple(known.get(name, name) for name in ids if name in known or name in known.values())


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
    present = len(list_gpus())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return present if visible is None else min(present, _count_visible(visible))


def list_gpus() -> tuple[Device, ...]:
    """All GPUs that NVML shows on this host; empty without NVML."""
    try:
        source = _open("nvml")
    except (PowerError, PluginError):
        return ()
    try:
        return tuple(device for device in source.devices() if device.scope in {"gpu", "module"})
    finally:
        source.close()


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
