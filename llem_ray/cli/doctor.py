"""`llem-ray doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from llem_ray.cli.output import echo_json
from llem_ray.cli.sweeps import ADDRESS, AS_JSON, TOKEN_FILE
from llem_ray.core.errors import ConfigError
from llem_ray.execution.doctor import EngineCheck, HostReport, SourceCheck, examine_host
from llem_ray.execution.ray.address import parse_address, prepare_environment
from llem_ray.execution.ray.survey import NodeReport, survey_cluster
from llem_ray.reporting.numbers import count_noun


@click.command()
@AS_JSON
@ADDRESS
@TOKEN_FILE
def doctor(as_json: bool, address: str | None, token_file: Path | None) -> None:
    """Say what works here or on a cluster, and why the rest does not.

    With --address every node of the cluster is examined.

    Imports every inference engine and opens every power source; loads no model, measures nothing.
    """
    where = parse_address(address)
    if where.kind == "jobs":
        raise ConfigError("the doctor joins the cluster itself", field="--address", found=where.text, allowed="auto, HOST:PORT")
    if where.kind != "embedded":
        prepare_environment(where, token_file)
        nodes = survey_cluster(where)
        if as_json:
            echo_json([node.as_dict() for node in nodes])
        else:
            click.echo("\n".join(line for node in nodes for line in _node(node)))
        return
    report = examine_host()
    if as_json:
        echo_json(report.as_dict())
    else:
        click.echo("\n".join(_lines(report)))


def _node(node: NodeReport) -> Iterator[str]:
    kind = f" {node.gpu_type}" if node.gpu_type else ""
    yield f"{node.hostname} ({node.address}), {count_noun(node.gpus, f'{kind.strip()} GPU'.strip())}"
    if node.problem:
        yield f"  no  {node.problem}"
    if node.host is not None:
        yield from (f"  {line}" for line in _lines(node.host))


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
