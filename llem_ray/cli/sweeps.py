"""Commands about the sweep file: init, validate, schema, plan."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Final

import click
from rich.console import Console

from llem_ray.cli.output import echo_json
from llem_ray.config.locate import locate
from llem_ray.config.schema import json_schema
from llem_ray.config.sweep import load_sweep
from llem_ray.core.errors import ConfigError
from llem_ray.core.plan import Plan
from llem_ray.core.spec import Sweep
from llem_ray.execution.history import find_past_run
from llem_ray.execution.memory import group_memory, local_devices
from llem_ray.execution.preflight import check_files
from llem_ray.planning.plan import make_plan
from llem_ray.planning.serialise import plan_to_dict
from llem_ray.power.sources import count_gpus
from llem_ray.reporting.numbers import count_noun
from llem_ray.reporting.plan import LoadMemory, plan_table

SWEEP = click.Path(path_type=Path)
RESULTS_DIR = click.option(
    "--results",
    "results_dir",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    envvar="LLEM_RAY_RESULTS",
    help="Folder of run directories.",
)
ADDRESS = click.option(
    "--address",
    envvar="LLEM_RAY_ADDRESS",
    metavar="ADDRESS",
    help="A Ray cluster: auto, HOST:PORT, or http://HOST:8265 for a Ray job. Default: this machine alone.",
)
TOKEN_FILE = click.option(
    "--token-file", type=click.Path(path_type=Path), metavar="PATH", help="File that holds the cluster's token."
)
SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a field of the sweep file. May be repeated."
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
SCHEMA_FILE: Final = "sweep.schema.json"


def build_plan(sweep: Sweep, results_dir: Path, gpus: int | None) -> Plan:
    """The one plan that `plan` prints and `submit` runs."""
    return make_plan(sweep, past_run=find_past_run(results_dir, sweep.name), gpus_available=gpus)


def load_checked(path: Path, overrides: tuple[str, ...]) -> Sweep:
    """A sweep whose prompts, lengths and traces were looked at, as far as they are on this machine; notes go to stderr.

    Raises:
        ConfigError: The sweep, or a file that it names, is wrong.
    """
    loaded = load_sweep(path, overrides=overrides)
    try:
        tell_unseen(loaded)
    except ConfigError as error:
        raise locate(error, path, overrides=overrides) from error
    return loaded


def tell_unseen(sweep: Sweep) -> None:
    """Check the files that a sweep names; what could not be looked at here goes to stderr.

    Raises:
        ConfigError: One is missing or wrong.
    """
    for note in check_files(sweep):
        click.echo(f"note: {note}", err=True)


@click.command()
@click.argument("path", type=SWEEP, default=Path("sweep.yaml"))
@click.option("--force", is_flag=True, help="Replace existing files.")
def init(path: Path, force: bool) -> None:
    """Write a commented sample sweep to PATH.

    The JSON Schema that its first line names, by which editors complete and check it, is written beside it.
    """
    if path.is_dir():
        path /= "sweep.yaml"
    schema_path = path.with_name(SCHEMA_FILE)
    if not force and path.exists():
        raise ConfigError("the file exists", "choose another path, or --force to replace it", file=str(path))
    _write(path, (files("llem_ray.cli") / "sample.yaml").read_text(encoding="utf-8"))
    if force or not schema_path.exists():
        _write(schema_path, json.dumps(json_schema(), indent=2) + "\n")
    click.echo(f"wrote {path}, and {schema_path} for your editor; next: llem-ray plan {path}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", file=str(path)) from error


@click.command()
@click.argument("sweep", type=SWEEP)
@SET
def validate(sweep: Path, overrides: tuple[str, ...]) -> None:
    """Check SWEEP and the files it names, and say what it expands to."""
    loaded = load_checked(sweep, overrides)
    counted = f"{count_noun(len(loaded.cells), 'cell')} x {count_noun(loaded.repeats, 'repeat')}"
    dropped = f", {count_noun(len(loaded.dropped), 'cell')} dropped" if loaded.dropped else ""
    click.echo(f"{sweep}: valid: {counted} = {count_noun(len(loaded.cells) * loaded.repeats, 'trial')}{dropped}")


@click.command()
def schema() -> None:
    """Print the JSON Schema of sweep files."""
    echo_json(json_schema())


@click.command()
@click.argument("sweep", type=SWEEP)
@SET
@RESULTS_DIR
@AS_JSON
def plan(sweep: Path, overrides: tuple[str, ...], results_dir: Path, as_json: bool) -> None:
    """Show what `submit` would run.

    Trials in run order, model loads, GPUs and the memory each of them needs, cells dropped and why, and what it will take: known
    from an earlier run of a sweep of this name, or from `rates` in the file.
    """
    made = build_plan(load_checked(sweep, overrides), results_dir, count_gpus())
    devices = local_devices()
    memory = [group_memory(group, made.base_dir, devices) for group in made.groups]
    if as_json:
        echo_json({**plan_to_dict(made), "memory": [item.as_dict() for item in memory]})
    else:
        needs = [LoadMemory(item.need, item.unknown, item.refusal, item.doubt) for item in memory]
        Console().print(plan_table(made, needs))
