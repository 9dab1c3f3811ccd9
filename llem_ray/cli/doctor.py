"""`llem-ray doctor`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from llem_ray.backends.batch_memory import size_text
from llem_ray.cli.output import echo_json
from llem_ray.cli.sweeps import ADDRESS, AS_JSON, SET, SWEEP, TOKEN_FILE
from llem_ray.config.locate import locate
from llem_ray.config.sweep import load_sweep
from llem_ray.core.errors import ConfigError, LlemRayError
from llem_ray.core.plan import Plan
from llem_ray.core.spec import Sweep
from llem_ray.execution.doctor import HostReport, LoadCheck, SourceCheck, check_loads, examine_host, judge_loads
from llem_ray.execution.engine_host import host_cache_dir
from llem_ray.execution.interpreter import EngineCheck
from llem_ray.execution.memory import Devices, GroupMemory, host_bytes, local_devices
from llem_ray.execution.preflight import check_prompts
from llem_ray.execution.ray.address import parse_address, prepare_environment
from llem_ray.execution.ray.survey import ClusterReport, NodeReport, survey_cluster
from llem_ray.planning.plan import make_plan
from llem_ray.power.sources import count_gpus
from llem_ray.reporting.numbers import count_noun


@click.command()
@click.argument("sweep", type=SWEEP, default=None)
@SET
@AS_JSON
@ADDRESS
@TOKEN_FILE
def doctor(sweep: Path | None, overrides: tuple[str, ...], as_json: bool, address: str | None, token_file: Path | None) -> None:
    """Say what works here or on a cluster, and why the rest does not.

    Imports every inference engine and opens every power source; loads no weights, measures nothing. With --address every node of
    the cluster is examined.

    With SWEEP also the interpreters that it names in engine.python, its prompts, and each of its model loads: engine, arguments,
    model, GPUs and memory, as `submit` checks them. Exit code 0 if it can run, 2 if something in it is wrong, 5 if what it needs
    is not there. Without SWEEP it is 0 whatever is missing.
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
        planned = None if asked is None else lambda gpus: make_plan(asked, gpus_available=gpus)
        cluster = survey_cluster(where, interpreters, base_dir, planned)
        devices = _devices(cluster.nodes)
        loads = _loads_there(cluster, devices)
        report: Any = [node.as_dict() for node in cluster.nodes]
        if cluster.plan is not None:
            report = {"nodes": report}
        lines = [line for node in cluster.nodes for line in _node(node)]
    else:
        host = examine_host(interpreters, base_dir)
        loads = _loads_here(asked) if asked is not None else ()
        report, lines = host.as_dict(), list(_lines(host))
    problems = _problems(plan, loads) if plan is not None else []
    if sweep is not None:
        problems = [locate(item, sweep, overrides=overrides) if isinstance(item, ConfigError) else item for item in problems]
    if as_json:
        told = {"memory": [load.as_dict() for load in loads], "problems": [str(problem) for problem in problems]}
        echo_json(report | told if plan is not None else report)
    else:
        click.echo("\n".join([*lines, *_load_lines(loads)]))
    if problems:
        raise problems[0]


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
    hosts = (host_bytes(report.host) for report in reports)
    return Devices(gpu_bytes=tuple(gpus), host_bytes=tuple(size for size in hosts if size))


def _loads_there(cluster: ClusterReport, devices: Devices) -> tuple[LoadCheck, ...]:
    """Each load of the sweep, checked on the cluster."""
    if cluster.plan is None:
        return ()
    waits = cluster.plan.measure.wait_for_nodes_s > 0
    return judge_loads(cluster.plan, devices, cluster.problems, larger_may_come=waits)


def _loads_here(sweep: Sweep) -> tuple[LoadCheck, ...]:
    """Each load of the sweep, checked on this host. Without GPUs, ``engine.device: auto`` is the host."""
    gpus = count_gpus()
    return check_loads(make_plan(sweep, gpus_available=gpus), local_devices(), gpus, str(host_cache_dir()))


def _problems(plan: Plan, loads: Sequence[LoadCheck]) -> list[LlemRayError]:
    """What keeps the sweep from running, what is wrong in it first."""
    found = [problem for load in loads for problem in load.problems]
    try:
        check_prompts(plan)
    except LlemRayError as error:
        found.append(error)
    return sorted(found, key=lambda error: not isinstance(error, ConfigError))


def _load_lines(loads: Sequence[LoadCheck]) -> Iterator[str]:
    if loads:
        yield "model loads of the sweep:"
    for load in loads:
        model = load.group.experiment.model
        verdict, memory = _memory(load.memory)
        name = f"{model.id or model.config} on {load.group.experiment.engine.backend}"
        yield f"  {'no' if load.problems else verdict}  {name}: {memory}"
        for problem in load.problems:
            message, *rest = str(problem).splitlines()
            yield from (f"{'':8}{line.strip()}" for line in (rest if problem is load.memory_problem else [message, *rest]))


def _memory(item: GroupMemory) -> tuple[str, str]:
    """What is thought of a load's need, and the need."""
    if item.refusal is not None:
        return "no", item.refusal
    if item.doubt is not None:
        return "??", item.doubt
    if item.need is None or item.need.estimate_bytes is None:
        return "??", f"memory unknown: {item.unknown or (item.need.arithmetic if item.need is not None else '')}"
    need = f"about {size_text(item.need.estimate_bytes)} on each {item.need.device}"
    if item.available_bytes is None:
        return "??", f"{need}, of which there is none here, or none that tells its memory"
    return "ok", f"{need}, of {size_text(item.available_bytes)}"


def _node(node: NodeReport) -> Iterator[str]:
    kind = f" {node.gpu_type}" if node.gpu_type else ""
    engine = f", for engine {node.backend}" if node.backend else ""
    yield f"{node.hostname} ({node.address}), {count_noun(node.gpus, f'{kind.strip()} GPU'.strip())}{engine}"
    if node.problem:
        yield f"  no  {node.problem}"
    if node.host is not None:
        yield from (f"  {line}" for line in _lines(node.host))


def _lines(report: HostReport) -> Iterator[str]:
    host = report.host
    yield "versions: " + ", ".join(f"{name} {version}" for name, version in report.versions.items())
    cpu = f"{host['cpu_model'] or 'unknown CPU'}, {count_noun(host['cpu_count_logical'] or 1, 'logical CPU')}"
    memory = f"{host['memory_bytes'] / 2**30:.1f} GiB"
    limit = host_bytes(host)
    if limit is not None and limit < host["memory_bytes"]:
        memory += f" of which {limit / 2**30:.1f} GiB for this container"
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
