"""`llem-ray doctor`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from llem_ray.backends.batch_memory import size_text
from llem_ray.cli.output import echo_json
from llem_ray.cli.sweeps import ADDRESS, AS_JSON, SET, SWEEP, TOKEN_FILE
from llem_ray.config.sweep import load_sweep
from llem_ray.core.errors import ConfigError
from llem_ray.core.plan import LoadGroup, Plan
from llem_ray.core.spec import Sweep
from llem_ray.execution.doctor import HostReport, SourceCheck, examine_host
from llem_ray.execution.interpreter import EngineCheck
from llem_ray.execution.memory import Devices, GroupMemory, group_memory, local_devices
from llem_ray.execution.ray.address import parse_address, prepare_environment
from llem_ray.execution.ray.survey import NodeReport, survey_cluster
from llem_ray.planning.plan import make_plan
from llem_ray.reporting.numbers import count_noun


@click.command()
@click.argument("sweep", type=SWEEP, default=None)
@SET
@AS_JSON
@ADDRESS
@TOKEN_FILE
def doctor(sweep: Path | None, overrides: tuple[str, ...], as_json: bool, address: str | None, token_file: Path | None) -> None:
    """Say what works here or on a cluster, and why the rest does not.

    With SWEEP also the interpreters that it names in engine.python, and whether its models fit into memory. With --address every
    node of the cluster is examined.

    Imports every inference engine and opens every power source; loads no weights, measures nothing.
    """
    where = parse_address(address)
    if where.kind == "jobs":
        raise ConfigError("the doctor joins the cluster itself", field="--address", found=where.text, allowed="auto, HOST:PORT")
    if overrides and sweep is None:
        raise ConfigError("there is no sweep whose fields could be overridden", field="--set", allowed="with SWEEP")
    asked = load_sweep(sweep, overrides=overrides) if sweep is not None else None
    plan = make_plan(asked) if asked is not None else None
    interpreters, base_dir = (_interpreters(plan), plan.base_dir) if plan is not None else ((), ".")
    if where.kind != "embedded":
        prepare_environment(where, token_file)
        nodes = survey_cluster(where, interpreters, base_dir)
        memory = _memory(asked, _devices(nodes), sum(node.gpus for node in nodes)) if asked is not None else []
        if as_json:
            told = [node.as_dict() for node in nodes]
            echo_json({"nodes": told, "memory": [item.as_dict() for _, item in memory]} if plan is not None else told)
        else:
            click.echo("\n".join([*(line for node in nodes for line in _node(node)), *_memory_lines(memory)]))
        return
    report = examine_host(interpreters, base_dir)
    devices = local_devices()
    memory = _memory(asked, devices, len(devices.gpu_bytes)) if asked is not None else []
    if as_json:
        echo_json(report.as_dict() | ({"memory": [item.as_dict() for _, item in memory]} if plan is not None else {}))
    else:
        click.echo("\n".join([*_lines(report), *_memory_lines(memory)]))


def _interpreters(plan: Plan) -> tuple[tuple[str, str], ...]:
    """Engines of the plan that run in another interpreter, each with it."""
    engines = (group.experiment.engine for group in plan.groups)
    return tuple(dict.fromkeys((engine.backend, engine.python) for engine in engines if engine.python is not None))


def _devices(nodes: Sequence[NodeReport]) -> Devices:
    """All GPUs and hosts of the nodes that answered."""
    reports = [node.host for node in nodes if node.host is not None]
    gpus = (
        device.memory_bytes
        for report in reports
        for source in report.sources
        if source.name == "nvml"
        for device in source.devices
    )
    return Devices(gpu_bytes=tuple(gpus), host_bytes=tuple(int(report.host["memory_bytes"]) for report in reports))


def _memory(sweep: Sweep, devices: Devices, gpus: int) -> list[tuple[LoadGroup, GroupMemory]]:
    """Each load with its need. Without GPUs, ``engine.device: auto`` is the host."""
    plan = make_plan(sweep, gpus_available=gpus)
    return [(group, group_memory(group, plan.base_dir, devices)) for group in plan.groups]


def _memory_lines(memory: Sequence[tuple[LoadGroup, GroupMemory]]) -> Iterator[str]:
    if memory:
        yield "model loads of the sweep:"
    for group, item in memory:
        name = f"{group.experiment.model.id or group.experiment.model.config} on {group.experiment.engine.backend}"
        if item.refusal is not None:
            yield f"  no  {name}: {item.refusal}"
        elif item.doubt is not None:
            yield f"  ??  {name}: {item.doubt}"
        elif item.need is None or item.need.estimate_bytes is None:
            yield f"  ??  {name}: memory unknown: {item.unknown or (item.need.arithmetic if item.need is not None else '')}"
        else:
            need = f"{name}: about {size_text(item.need.estimate_bytes)} on each {item.need.device}"
            if item.available_bytes is not None:
                yield f"  ok  {need}, of {size_text(item.available_bytes)}"
            else:
                yield f"  ??  {need}, of which there is none here, or none that tells its memory"


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
    yield from _entry(
        engine.name, told or ("built in, for trying things out" if engine.name == "fake" else "plug-in"), engine.problem
    )
    if engine.device is not None:
        yield f"{'':20}device: {engine.device}"
    if engine.interpreter != sys.executable or engine.problem is None:
        yield f"{'':20}interpreter: {engine.interpreter}{f' (Python {engine.python})' if engine.python else ''}"


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
