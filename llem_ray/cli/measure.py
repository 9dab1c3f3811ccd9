"""`llem-ray measure -- COMMAND`: the meter on any command."""

from __future__ import annotations

import json
import sys

import click

from llem_ray.core.errors import LlemRayError
from llem_ray.execution.measure import CommandMeasurement, measure_command, to_json

OWN_FAILURE = 125


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout; COMMAND's output goes to stderr.")
@click.option("--hz", "sample_hz", type=click.FloatRange(0.2, 200), default=20.0, show_default=True, help="Polls per second.")
@click.option("--source", "sources", multiple=True, help="Power source to use; several are allowed. Default: all that work.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def measure(as_json: bool, sample_hz: float, sources: tuple[str, ...], command: tuple[str, ...]) -> None:
    """Measure the energy of this host's devices while COMMAND runs.

    The window is the command's life. Exits with the command's code; 125 when measuring itself failed, 126 when COMMAND
    cannot be executed, 127 when it is not found.
    """
    try:
        result = measure_command(command, sources=sources or "auto", sample_hz=sample_hz, output_to_stderr=as_json)
    except LlemRayError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(OWN_FAILURE)
    if as_json:
        click.echo(json.dumps(to_json(result), indent=2, allow_nan=False))
    else:
        _print(result)
    sys.exit(result.exit_code)


def _print(result: CommandMeasurement) -> None:
    """The result as lines on stderr, so that the command's stdout stays its own."""
    lines = [f"{result.window.duration_s:.3f} s"]
    for reading in result.readings:
        lines.append(_line(reading.name, reading.device_uuid, reading.energy_j, reading.u_j, reading.reason, ""))
    lines.extend(
        _line(reading.name, reading.device_uuid, reading.energy_j, None, reading.reason, "est. ") for reading in result.estimates
    )
    total = result.total
    if total.energy_j is None:
        lines.append(f"measured total: none ({total.reason})")
    else:
        u_j = f" +- {2 * total.u_j:.2f}" if total.u_j is not None else ""
        lines.append(f"measured total: {total.energy_j:.2f}{u_j} J")
    click.echo("\n".join(lines), err=True)


def _line(name: str, uuid: str, energy_j: float | None, u_j: float | None, reason: str | None, mark: str) -> str:
    if energy_j is None:
        return f"  {name} [{uuid}]: none ({reason})"
    spread = f" +- {2 * u_j:.2f}" if u_j is not None else ""
    return f"  {name} [{uuid}]: {mark}{energy_j:.2f}{spread} J"
