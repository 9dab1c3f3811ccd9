"""What works on this host, and why the rest does not."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llem_ray.core.errors import LlemRayError
from llem_ray.core.plugins import EXTRAS, load_plugin, plugin_names
from llem_ray.core.power import Device, PowerSource
from llem_ray.execution.placement import is_measured
from llem_ray.power.host import read_host_facts
from llem_ray.results.environment import ENGINE_PACKAGES, installed_versions

_OWN_PACKAGES = ("llem-ray", "ray", "pyarrow", "nvidia-ml-py")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCheck:
    """One inference engine."""

    name: str
    importable: bool
    versions: Mapping[str, str]
    """Package -> version."""
    problem: str | None
    """Why it does not work here, and what to do about it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCheck:
    """One power source."""

    name: str
    devices: tuple[Device, ...]
    problem: str | None
    """Why it gives nothing here, and what to do about it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostReport:
    """A host as llem-ray sees it."""

    versions: Mapping[str, str]
    host: Mapping[str, Any]
    """Host facts as the ``nodes`` table has them."""
    engines: tuple[EngineCheck, ...]
    sources: tuple[SourceCheck, ...]
    can_measure: bool
    """Some device is measured, rather than estimated."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def examine_host() -> HostReport:
    """Try every engine and every power source that is installed here. Loads no model."""
    sources = tuple(_check_source(name) for name in plugin_names("llem_ray.power_sources"))
    return HostReport(
        versions={"python": platform.python_version(), **installed_versions(_OWN_PACKAGES)},
        host=read_host_facts(),
        engines=tuple(_check_engine(name) for name in plugin_names("llem_ray.backends")),
        sources=sources,
        can_measure=any(is_measured(device) for source in sources for device in source.devices),
    )


def _check_engine(name: str) -> EngineCheck:
    packages = ENGINE_PACKAGES.get(name, ())
    versions = installed_versions(packages)
    missing = [package for package in packages if package not in versions]
    problem = (
        f"not installed: {', '.join(missing)}\n  hint: pip install 'llem-ray[{EXTRAS.get(name, name)}]'" if missing else None
    )
    try:
        load_plugin("llem_ray.backends", name)
    except Exception as error:  # noqa: BLE001 - whatever an engine's import raises, the doctor goes on to the next
        problem = problem or _told(error)
    return EngineCheck(name=name, importable=problem is None, versions=versions, problem=problem)


def _check_source(name: str) -> SourceCheck:
    try:
        source: PowerSource = load_plugin("llem_ray.power_sources", name)()
    except Exception as error:  # noqa: BLE001 - whatever a meter raises, the doctor goes on to the next
        return SourceCheck(name=name, devices=(), problem=_told(error))
    try:
        return SourceCheck(name=name, devices=tuple(source.devices()), problem=None)
    except Exception as error:  # noqa: BLE001 - as above
        return SourceCheck(name=name, devices=(), problem=_told(error))
    finally:
        source.close()


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, LlemRayError) else f"{type(error).__name__}: {error}"
