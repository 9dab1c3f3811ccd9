"""Commands about a run: status, watch, logs, stop, show, export."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import click
from rich.console import Console

from llem_ray.cli.sweeps import RESULTS_DIR
from llem_ray.core.errors import ResultsError
from llem_ray.execution.status import RunStatus, read_status
from llem_ray.reporting.summary import summarise_run
from llem_ray.reporting.tables import run_table
from llem_ray.results.export import export_run
from llem_ray.results.reader import read_table
from llem_ray.results.rundir import find_run

RUN = click.argument("run")
POLL_S = 1.0


@click.command()
@RUN
@RESULTS_DIR
@click.option("--json", "as_json", is_flag=True, help="Print the status as JSON.")
def status(run: str, results_dir: Path, as_json: bool) -> None:
    """Say how far RUN is: a name, the beginning of one, or a path."""
    found = read_status(find_run(results_dir, run))
    click.echo(json.dumps(found.as_dict()) if as_json else _status_line(found))


@click.command()
@RUN
@RESULTS_DIR
def watch(run: str, results_dir: Path) -> None:
    """Follow RUN until it ends. Ctrl-C stops watching, not the run."""
    directory = find_run(results_dir, run)
    seen = ""
    while True:
        found = read_status(directory)
        line = _status_line(found)
        if line != seen:
            click.echo(line)
            seen = line
        if not found.running:
            return
        time.sleep(POLL_S)


@click.command()
@RUN
@RESULTS_DIR
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends.")
def logs(run: str, results_dir: Path, follow: bool) -> None:
    """Print RUN's log."""
    directory = find_run(results_dir, run)
    if not directory.log_path.exists():
        raise ResultsError(f"{directory.name} has no log yet")
    with directory.log_path.open(encoding="utf-8", errors="replace") as file:
        while True:
            click.echo(file.read(), nl=False)
            if not follow or not read_status(directory).running:
                return
            time.sleep(POLL_S)


@click.command()
@RUN
@RESULTS_DIR
@click.option("--now", is_flag=True, help="Abort the running trial instead of finishing it.")
def stop(run: str, results_dir: Path, now: bool) -> None:
    """Stop RUN after its running trial; what is done stays and `submit` resumes it."""
    directory = find_run(results_dir, run)
    holder = directory.holder()
    if holder is None:
        raise ResultsError(f"{directory.name} is not running")
    pid, host = holder
    if host != os.uname().nodename:
        raise ResultsError(f"{directory.name} runs on {host}", f"stop it there: kill -INT {pid}")
    os.kill(pid, signal.SIGTERM if now else signal.SIGINT)
    click.echo(f"asked process {pid} to stop" + (" now" if now else " after the running trial"))


@click.command()
@RUN
@RESULTS_DIR
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def show(run: str, results_dir: Path, as_json: bool) -> None:
    """Print RUN's results."""
    directory = find_run(results_dir, run)
    summary = summarise_run(directory.name, read_table(directory.path, "trials").to_pylist())
    if as_json:
        click.echo(json.dumps(summary.as_dict(), indent=2))
    else:
        Console().print(run_table(summary, directory.path))


@click.command()
@RUN
@RESULTS_DIR
@click.option("--to", "fmt", type=click.Choice(["csv", "json", "parquet"]), required=True, help="Format.")
@click.option(
    "--table",
    type=click.Choice(["trials", "requests", "power", "states", "phases", "nodes"]),
    default="trials",
    show_default=True,
    help="Table.",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.argument("dest", type=click.Path(path_type=Path))
def export(run: str, results_dir: Path, fmt: str, table: str, force: bool, dest: Path) -> None:
    """Write a table of RUN to the file DEST."""
    directory = find_run(results_dir, run)
    rows = export_run(directory.path, fmt, dest, table=table, force=force)  # type: ignore[arg-type]
    click.echo(f"wrote {rows} rows of {table} to {dest}")


def _status_line(found: RunStatus) -> str:
    state = "running" if found.running else "finished" if not found.left else "unfinished"
    parts = [f"{found.name}: {state}", f"{found.done}/{found.total} trials done"]
    if found.failed:
        parts.append(f"{found.failed} failed")
    if found.running and found.pid is not None:
        parts.append(f"process {found.pid}")
    if state == "unfinished":
        parts.append("submit the same sweep again to resume it")
    return ", ".join(parts)
