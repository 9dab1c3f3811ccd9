"""`llem-ray doctor`."""

from __future__ import annotations

from collections.abc import Iterator

import click

from llem_ray.cli.output import echo_json
from llem_ray.cli.sweeps import AS_JSON
from llem_ray.execution.doctor import EngineCheck, HostReport, SourceCheck, examine_host
from llem_ray.reporting.numbers import count_noun


@click.command()
@AS_JSON
def doctor(as_json: bool) -> None:
    """Say what works on this host, and why the rest does not.

    Imports every inference engine and opens every power source; loads no model, measures nothing.
    """
    report = examine_host()
    if as_json:
        echo_json(report.as_dict())
    else:
        click.echo("\n".join(_lines(report)))


def _lines(report: HostReport) -> Iterator[str]:
    host = report.host
    yield "versions: " + ", ".join(f"{name} {version}" for name, version in report.versions.items())
    cpu = f"{host['cpu_model'] or 'unknown CPU'}, {count_noun(host['cpu_count_logical'] or 1, 'logical CPU')}"
    memory = f"{host['memory_bytes'] / 2**30:.1f} GiB"
    facts = (cpu, memory, f"kernel {host['kernel']}", f"CPU governor {host['cpu_governor'] or 'unknown'}")
    yield f"host: {', '.join(facts)}, NVIDIA driver {host.get('nvidia_driver') or 'none'}"
    yield "inference engines:"
    for engine in report.engines:
        yield from _engine(engine)
    yield "power sources:"
    for source in report.sources:
        yield from _source(source)
    if not report.can_measure:
        yield "Nothing on this host measures power: energies will be null with the reason, and estimates marked est."


def _engine(engine: EngineCheck) -> Iterator[str]:
    told = ", ".join(f"{name} {version}" for name, version in engine.versions.items())
    yield from _entry(engine.name, told or "built in, for trying things out", engine.problem)


def _source(source: SourceCheck) -> Iterator[str]:
    yield from _entry(source.name, count_noun(len(source.devices), "device"), source.problem)
    for device in source.devices:
        reason = f": {device.reason}" if device.reason else ""
        yield f"{'':20}{device.name} [{device.uuid}] {device.scope}, {device.method}{reason}"


def _entry(name: str, facts: str, problem: str | None) -> Iterator[str]:
    first, *rest = (problem or facts).splitlines()
    yield f"  {'no' if problem else 'ok'}  {name:<14}{first}"
    for line in rest:
        yield f"{'':20}{line.strip()}"
