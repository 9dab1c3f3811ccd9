"""Commands about the sweep file: init, validate, schema, plan."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import click
from rich.console import Console

from llem_ray.config.schema import json_schema
from llem_ray.config.sweep import load_sweep
from llem_ray.core.errors import ConfigError
from llem_ray.core.plan import Plan
from llem_ray.core.spec import Sweep
from llem_ray.execution.history import find_past_run
from llem_ray.planning.plan import make_plan
from llem_ray.planning.serialise import plan_to_dict
from llem_ray.power.sources import count_gpus
from llem_ray.reporting.plan import plan_table

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
SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a field of the sweep file.")


def load(path: Path, overrides: tuple[str, ...]) -> Sweep:
    """The sweep file, resolved."""
    return load_sweep(path, overrides=overrides)


def build_plan(sweep: Sweep, results_dir: Path, gpus: int | None) -> Plan:
    """The one plan that `plan` prints and `submit` runs."""
    return make_plan(sweep, past_run=find_past_run(results_dir, sweep.name), gpus_available=gpus)


@click.command()
@click.argument("path", type=SWEEP, default=Path("sweep.yaml"))
@click.option("--force", is_flag=True, help="Replace an existing file.")
def init(path: Path, force: bool) -> None:
    """Write a commented sample sweep to PATH."""
    if path.exists() and not force:
        raise ConfigError("the file exists", "choose another path, or --force to replace it", file=str(path))
    text = (files("llem_ray.cli") / "sample.yaml").read_text(encoding="utf-8")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", file=str(path)) from error
    click.echo(f"wrote {path}; next: llem-ray plan {path}")


@click.command()
@click.argument("sweep", type=SWEEP)
@SET
def validate(sweep: Path, overrides: tuple[str, ...]) -> None:
    """Check SWEEP and say what it expands to."""
    loaded = load_sweep(sweep, overrides=overrides)
    trials = len(loaded.cells) * loaded.repeats
    click.echo(f"{sweep}: valid: {len(loaded.cells)} cells x {loaded.repeats} repeats = {trials} trials")


@click.command()
def schema() -> None:
    """Print the sweep file's JSON Schema, for editors."""
    click.echo(json.dumps(json_schema(), indent=2))


@click.command()
@click.argument("sweep", type=SWEEP)
@SET
@RESULTS_DIR
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(sweep: Path, overrides: tuple[str, ...], results_dir: Path, as_json: bool) -> None:
    """Show what `submit` would run: trials, order, loads, GPUs, time and energy."""
    made = build_plan(load(sweep, overrides), results_dir, count_gpus())
    if as_json:
        click.echo(json.dumps(plan_to_dict(made), indent=2))
    else:
        Console().print(plan_table(made))
