"""`llem-ray measure -- COMMAND`: the meter on any command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import click

from llem_ray.cli.output import echo_json, tell_error
from llem_ray.core.energy import EnergyReading
from llem_ray.execution.command import NotStarted
from llem_ray.execution.measure import CommandMeasurement, measure_command, to_json
from llem_ray.reporting.numbers import format_uncertain, format_value

OWN_FAILURE: Final = 125


class _WrongUsage(click.UsageError):
    """Wrong usage of `measure` itself."""

    exit_code = OWN_FAILURE


class _LikeEnv(click.Command):
    """Keeps its own failures, wrong usage included, apart from the exit codes of the command it runs."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            raise _WrongUsage(error.format_message(), error.ctx) from error


@click.command(cls=_LikeEnv, context_settings={"allow_interspersed_args": False})
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout; COMMAND's stdout goes to stderr.")
@click.option("--hz", "sample_hz", type=click.FloatRange(1, 200), default=20.0, show_default=True, help="Polls per second.")
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="NAME",
    help="Power source: nvml, rapl, codecarbon, replay. May be repeated. Default: every one that measures.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def measure(as_json: bool, sample_hz: float, sources: tuple[str, ...], command: tuple[str, ...]) -> int:
    """Measure this host's energy while COMMAND runs.

    The window is the command's life: from just before it is started to just after it has ended. All devices of the host count,
    whoever uses them. Calibration, and samples before and after the window, take some seconds on top: about 5 s with an
    NVIDIA GPU, up to 10 s where there is only an estimate.

    COMMAND's input and output are passed through; the result goes to stderr, or with --json to stdout. Ctrl-C and SIGTERM reach
    COMMAND, and the result is printed all the same.

    Exits with COMMAND's code (128 + signal when one ended it); 125 when measuring failed, 126 when COMMAND cannot be executed,
    127 when it is not found. A device that cannot be measured is no failure: its energy is null, with a reason.
    """
    try:
        result = measure_command(command, sources=sources or "auto", sample_hz=sample_hz, output_to_stderr=as_json)
        if isinstance(result, NotStarted):
            click.echo(f"error: {result.message}", err=True)
        elif as_json:
            echo_json(to_json(result))
        else:
            click.echo("\n".join(_lines(result)), err=True)
    except Exception as error:  # noqa: BLE001 - the command's own codes must stay its own
        tell_error(error)
        return OWN_FAILURE
    return result.exit_code


def _lines(result: CommandMeasurement) -> list[str]:
    lines = [f"measured over {result.window.duration_s:.3f} s, exit code {result.exit_code}"]
    for reading in result.readings:
        lines += _device(reading, "")
    lines += _total(result)
    if result.estimates:
        lines.append("estimated by a model, not measured:")
    for reading in result.estimates:
        lines += _device(reading, "est. ")
    return lines + [f"note: {note}" for note in result.notes]


def _total(result: CommandMeasurement) -> Iterator[str]:
    total = result.total
    if total.energy_j is None:
        yield f"  total: none ({total.reason})"
        return
    if len(total.parts) > 1:
        invalid = "" if all(part.valid for part in total.parts) else ", invalid: see above"
        power_w = format_value(total.energy_j / result.window.duration_s)
        yield f"  total: {_joules(total.energy_j, total.u_j)}, {power_w} W{invalid}"
    if total.not_measured:
        yield f"  not measured: {', '.join(total.not_measured)}"


def _device(reading: EnergyReading, mark: str) -> Sequence[str]:
    head = f"  {reading.name} [{reading.device_uuid}]: "
    if reading.energy_j is None:
        line = f"{head}none ({reading.reason})"
    elif mark:
        line = f"{head}{mark}{format_value(reading.energy_j, 3)} J, {mark}{format_value(reading.mean_power_w, 3)} W"
    else:
        line = f"{head}{_joules(reading.energy_j, reading.u_j)}, {format_value(reading.mean_power_w)} W"
    return [line, *(f"    {item.severity}: {item.code}: {item.detail}" for item in reading.flags)]


def _joules(energy_j: float, u_j: float | None) -> str:
    return f"{format_uncertain(energy_j, None if u_j is None else 2 * u_j)} J"
