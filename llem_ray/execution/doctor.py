"""What works on this host, and why the rest does not."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Final

from llem_ray.core.errors import LlemRayError
from llem_ray.core.plan import LoadGroup, Plan
from llem_ray.core.plugins import EXTRAS, install_command, load_plugin, plugin_names
from llem_ray.core.power import Device, PowerSource
from llem_ray.execution.interpreter import EngineCheck, probe_engine
from llem_ray.execution.memory import Devices, GroupMemory, group_memory, memory_problem, with_memory_limit
from llem_ray.execution.placement import is_measured
from llem_ray.execution.preflight import check_load
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
    """Host facts as the ``nodes`` table has them, and ``memory_limit_bytes``."""
    engines: tuple[EngineCheck, ...]
    sources: tuple[SourceCheck, ...]
    can_measure: bool
    """Some device is measured, rather than estimated."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadCheck:
    """One model load of a sweep, checked where it would run."""

    group: LoadGroup
    memory: GroupMemory
    memory_problem: LlemRayError | None
    """Why it cannot fit there."""
    engine_problem: LlemRayError | None
    """Why it cannot run there for another reason: its engine, arguments, model or GPUs."""

    @property
    def problems(self) -> tuple[LlemRayError, ...]:
        """All that keeps it from running."""
        return tuple(problem for problem in (self.engine_problem, self.memory_problem) if problem is not None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self.memory.as_dict() | {"problems": [str(problem) for problem in self.problems]}


def check_loads(plan: Plan, devices: Devices, gpus: int, cache_dir: str) -> tuple[LoadCheck, ...]:
    """Check every model load of a plan on this host, as `submit` does before it starts. Loads no model.

    Args:
        plan: The plan.
        devices: Those of this host.
        gpus: Whole GPUs that it has.
        cache_dir: Writable folder for what engines write before they load.
    """

    def check(group: LoadGroup) -> None:
        check_load(group, gpus, plan.base_dir, cache_dir)

    return judge_loads(plan, devices, [problem_of(check, group) for group in plan.groups])


def problem_of(check: Callable[[LoadGroup], None], group: LoadGroup) -> LlemRayError | None:
    """What the check of a load raises."""
    try:
        check(group)
    except LlemRayError as error:
        return error
    return None


def judge_loads(
    plan: Plan, devices: Devices, problems: Sequence[LlemRayError | None], *, larger_may_come: bool = False
) -> tuple[LoadCheck, ...]:
    """Put what checks found together with the memory that there is.

    Args:
        plan: The plan.
        devices: What its loads could run on.
        problems: What was found wrong with each of its loads.
        larger_may_come: That a load fits on none of the devices is no reason to refuse it.
    """
    checks = []
    for group, problem in zip(plan.groups, problems, strict=True):
        memory = group_memory(group, plan.base_dir, devices)
        refused = None if larger_may_come else memory_problem(group, memory, hosts=len(devices.host_bytes))
        checks.append(LoadCheck(group=group, memory=memory, memory_problem=refused, engine_problem=problem))
    return tuple(checks)


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
        host=with_memory_limit(read_host_facts()),
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
        problem = f"not installed: {', '.join(missing)}" + (f"\n  hint: {install_command(extra)}" if extra else "")
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
