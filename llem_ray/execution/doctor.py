"""What works on this host, and why the rest does not."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Final

from llem_ray.core.errors import LlemRayError
from llem_ray.core.plugins import EXTRAS, load_plugin, plugin_names
from llem_ray.core.power import Device, PowerSource
from llem_ray.execution.interpreter import EngineCheck, probe_engine
from llem_ray.execution.placement import is_measured
from llem_ray.power.host import read_host_facts
from llem_ray.results.environment import ENGINE_PACKAGES, installed_versions

PROBES_AT_ONCE: Final = 4
_OWN_PACKAGES = ("llem-ray", "ray", "pyarrow", "nvidia-ml-py")


Prober = Callable[[str, str | None, str], EngineCheck]
"""Engine, interpreter (None: this one) and base folder -> what it can do there."""


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


def examine_host(
    interpreters: Sequence[tuple[str, str]] = (), base_dir: str = ".", *, probe: Prober = probe_engine
) -> HostReport:
    """Try every engine and every power source that is installed here. Loads no model.

    Args:
        interpreters: Further engines to try, each with the ``engine.python`` that is to serve it.
        base_dir: Folder that relative paths of interpreters start from.
        probe: Asks an interpreter about an engine.
    """
    sources = tuple(_check_source(name) for name in plugin_names("llem_ray.power_sources"))
    asked: list[tuple[str, str | None]] = [*((name, None) for name in plugin_names("llem_ray.backends")), *interpreters]
    with ThreadPoolExecutor(max_workers=PROBES_AT_ONCE) as pool:
        engines = tuple(pool.map(lambda item: _check_engine(item[0], item[1], base_dir, probe), asked))
    return HostReport(
        versions={"python": platform.python_version(), **installed_versions(_OWN_PACKAGES)},
        host=read_host_facts(),
        engines=engines,
        sources=sources,
        can_measure=any(is_measured(device) for source in sources for device in source.devices),
    )


def _check_engine(name: str, interpreter: str | None, base_dir: str, probe: Prober) -> EngineCheck:
    packages = ENGINE_PACKAGES.get(name, ())
    if interpreter is not None:
        return probe(name, interpreter, base_dir)
    versions = installed_versions(packages)
    missing = [package for package in packages if package not in versions]
    problem = None
    if missing:
        extra = EXTRAS.get(name)
        problem = f"not installed: {', '.join(missing)}" + (f"\n  hint: pip install 'llem-ray[{extra}]'" if extra else "")
    elif packages:
        return probe(name, None, base_dir)
    else:  # a plug-in, of which nobody knows what it needs: its factory must come
        try:
            load_plugin("llem_ray.backends", name)
        except Exception as error:  # noqa: BLE001 - whatever an engine's import raises, the doctor goes on to the next
            problem = _told(error)
    return EngineCheck(
        name=name,
        interpreter=sys.executable,
        python=platform.python_version(),
        importable=problem is None,
        versions=versions,
        device="any: it computes nothing" if name == "fake" else None,
        problem=problem,
    )


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
