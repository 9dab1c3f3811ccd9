"""What works on this host, and why the rest does not."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llem_ray.core.errors import PluginError, PowerError
from llem_ray.core.plugins import load_plugin, plugin_names
from llem_ray.core.power import PowerSource
from llem_ray.power.host import read_host_facts
from llem_ray.results.environment import ENGINE_PACKAGES, installed_versions


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCheck:
    """One inference engine."""

    name: str
    importable: bool
    versions: Mapping[str, str]
    """Package -> version."""
    problem: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCheck:
    """One power source."""

    name: str
    devices: tuple[str, ...]
    """``<name> [<uuid>] <method>`` of each device."""
    problem: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class HostReport:
    """A host as llem-ray sees it."""

    versions: Mapping[str, str]
    host: Mapping[str, Any]
    engines: tuple[EngineCheck, ...]
    sources: tuple[SourceCheck, ...]

    @property
    def can_measure(self) -> bool:
        """Some source measures, rather than estimates."""
        return any("measured" in device for source in self.sources for device in source.devices)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def examine_host() -> HostReport:
    """Try every engine and every power source that is installed here. Loads no model."""
    return HostReport(
        versions={"python": platform.python_version(), **installed_versions(["llem-ray", "ray", "pyarrow", "nvidia-ml-py"])},
        host=read_host_facts(),
        engines=tuple(_check_engine(name) for name in plugin_names("llem_ray.backends")),
        sources=tuple(_check_source(name) for name in plugin_names("llem_ray.power_sources")),
    )


def _check_engine(name: str) -> EngineCheck:
    versions = installed_versions(ENGINE_PACKAGES.get(name, ()))
    missing = [package for package in ENGINE_PACKAGES.get(name, ()) if package not in versions]
    try:
        load_plugin("llem_ray.backends", name)
    except PluginError as error:
        return EngineCheck(name=name, importable=False, versions=versions, problem=str(error))
    problem = f"not installed: {', '.join(missing)}; pip install 'llem-ray[{name}]'" if missing else None
    return EngineCheck(name=name, importable=not missing, versions=versions, problem=problem)


def _check_source(name: str) -> SourceCheck:
    try:
        source: PowerSource = load_plugin("llem_ray.power_sources", name)()
    except (PluginError, PowerError) as error:
        return SourceCheck(name=name, devices=(), problem=str(error))
    try:
        devices = tuple(f"{device.name} [{device.uuid}] {device.method}" for device in source.devices())
    finally:
        source.close()
    return SourceCheck(name=name, devices=devices, problem=None)
