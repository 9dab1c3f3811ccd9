"""`llem-ray doctor`."""

from __future__ import annotations

import json

import click

from llem_ray.execution.doctor import HostReport, examine_host


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def doctor(as_json: bool) -> None:
    """Say what works on this host: engines, power sources, versions."""
    report = examine_host()
    click.echo(json.dumps(report.as_dict(), indent=2, default=str) if as_json else "\n".join(_lines(report)))


def _lines(report: HostReport) -> list[str]:
    lines = ["versions: " + ", ".join(f"{name} {version}" for name, version in report.versions.items())]
    lines.append(f"host: {report.host.get('cpu_model') or 'unknown CPU'}, kernel {report.host.get('kernel')}")
    lines.append("engines:")
    for engine in report.engines:
        versions = ", ".join(f"{name} {version}" for name, version in engine.versions.items())
        lines.append(_line(engine.name, engine.importable, versions, engine.problem))
    lines.append("power sources:")
    for source in report.sources:
        lines.append(_line(source.name, source.problem is None, ", ".join(source.devices), source.problem))
    if not report.can_measure:
        lines.append("nothing on this host measures power: energies will be null, and estimates marked est.")
    return lines


def _line(name: str, works: bool, facts: str, problem: str | None) -> str:
    told = facts if works else (problem or "").replace("\n", " ")
    return f"  {'ok ' if works else 'no '} {name:<14} {told}".rstrip()
