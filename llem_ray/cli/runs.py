"""Commands about a run: status, watch, logs, stop, show, export."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path
from typing import Final

import click
from rich.console import Console

from llem_ray.cli.output import echo_json
from llem_ray.cli.remote import logs_of_job, show_of_job, status_of_job, stop_job, watch_job
from llem_ray.cli.summaries import read_summary
from llem_ray.cli.sweeps import ADDRESS, AS_JSON, RESULTS_DIR, TOKEN_FILE
from llem_ray.core.errors import ResultsError
from llem_ray.execution.ray.address import parse_address, prepare_environment
from llem_ray.execution.ray.jobs import RunJobs
from llem_ray.execution.status import RunStatus, read_planned, read_status
from llem_ray.reporting.numbers import count_noun
from llem_ray.reporting.tables import run_table
from llem_ray.results.export import EXPORT_FORMATS, ExportFormat, export_run
from llem_ray.results.rundir import find_run
from llem_ray.results.schema import TABLE_NAMES, TableName

RUN = click.argument("run")
"""A run's name, the beginning of exactly one name, or a path."""
POLL_S: Final = 1.0


@click.command()
@RUN
@RESULTS_DIR
@ADDRESS
@TOKEN_FILE
@AS_JSON
def status(run: str, results_dir: Path, address: str | None, token_file: Path | None, as_json: bool) -> None:
    """Say how far RUN is.

    RUN is a name, the beginning of exactly one name, or a path; so it is for all commands below. With an http address it is a run
    that was submitted there as a Ray job.
    """
    if jobs := _jobs(address, token_file):
        status_of_job(jobs, run, as_json=as_json)
        return
    found = read_status(find_run(results_dir, run))
    if as_json:
        echo_json(found.as_dict())
    else:
        click.echo(_status_line(found))


@click.command()
@RUN
@RESULTS_DIR
@ADDRESS
@TOKEN_FILE
def watch(run: str, results_dir: Path, address: str | None, token_file: Path | None) -> None:
    """Follow RUN until it ends.

    Prints a line whenever a trial begins or ends. Ctrl-C stops watching, not the run.
    """
    if jobs := _jobs(address, token_file):
        watch_job(jobs, run)
        return
    directory = find_run(results_dir, run)
    planned = read_planned(directory)
    seen = ""
    while True:
        found = read_status(directory, planned)
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
@ADDRESS
@TOKEN_FILE
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends.")
def logs(run: str, results_dir: Path, address: str | None, token_file: Path | None, follow: bool) -> None:
    """Print RUN's log."""
    if jobs := _jobs(address, token_file):
        logs_of_job(jobs, run, follow=follow)
        return
    directory = find_run(results_dir, run)
    if not directory.log_path.exists():
        raise ResultsError(f"{directory.name} has no log: {directory.log_path} is not there")
    try:
        with directory.log_path.open(encoding="utf-8", errors="replace") as file:
            while True:
                running = follow and directory.is_locked()
                click.echo(file.read(), nl=False)
                if not running:
                    return
                time.sleep(POLL_S)
    except PermissionError as error:
        raise ResultsError(f"cannot read {directory.log_path}: {error.strerror}") from error


@click.command()
@RUN
@RESULTS_DIR
@ADDRESS
@TOKEN_FILE
@click.option("--now", is_flag=True, help="Abort the running trial instead of finishing it.")
def stop(run: str, results_dir: Path, address: str | None, token_file: Path | None, now: bool) -> None:
    """Stop RUN, to be resumed later.

    The running trial is finished first. What is done is kept, and `submit` of the same sweep goes on from there.
    """
    if jobs := _jobs(address, token_file):
        stop_job(jobs, run, now=now)
        return
    directory = find_run(results_dir, run)
    holder = directory.holder()
    if holder is None:
        raise ResultsError(f"{directory.name} is not running")
    pid, host = holder
    if host != socket.gethostname():
        raise ResultsError(f"{directory.name} runs on {host}", f"stop it there: kill -{'TERM' if now else 'INT'} {pid}")
    try:
        os.kill(pid, signal.SIGTERM if now else signal.SIGINT)
    except OSError as error:
        raise ResultsError(f"process {pid}, which runs {directory.name}, cannot be signalled: {error.strerror}") from error
    click.echo(f"asked process {pid} to stop {directory.name} " + ("now" if now else "after its running trial"))


@click.command()
@RUN
@RESULTS_DIR
@ADDRESS
@TOKEN_FILE
@AS_JSON
def show(run: str, results_dir: Path, address: str | None, token_file: Path | None, as_json: bool) -> None:
    """Print RUN's results, also while it runs."""
    if jobs := _jobs(address, token_file):
        show_of_job(jobs, run, as_json=as_json)
        return
    directory = find_run(results_dir, run)
    summary = read_summary(directory)
    if as_json:
        echo_json(summary.as_dict())
    else:
        Console().print(run_table(summary, directory.path))
        with contextlib.suppress(ResultsError):  # a plan that cannot be read is no reason to hide the results
            found = read_status(directory)
            if found.left:
                click.echo(_status_line(found), err=True)


@click.command()
@RUN
@RESULTS_DIR
@click.option("--to", "fmt", type=click.Choice(EXPORT_FORMATS), required=True, help="Format of the file.")
@click.option("--table", type=click.Choice(TABLE_NAMES), default="trials", show_default=True, help="Table to write.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.argument("dest", type=click.Path(path_type=Path))
def export(run: str, results_dir: Path, fmt: ExportFormat, table: TableName, force: bool, dest: Path) -> None:
    """Write a table of RUN to the file DEST.

    When DEST is a folder the file is named after run and table.
    """
    directory = find_run(results_dir, run)
    path = dest / f"{directory.name}-{table}.{fmt}" if dest.is_dir() else dest
    rows = export_run(directory.path, fmt, path, table=table, force=force)
    click.echo(f"wrote {count_noun(rows, 'row')} of {table} to {path}")


def _jobs(address: str | None, token_file: Path | None) -> RunJobs | None:
    """The cluster's Ray jobs when the address is theirs; a run driver of any other address wrote to a folder here."""
    where = parse_address(address)
    if where.kind != "jobs":
        return None
    prepare_environment(where, token_file)
    return RunJobs(where)


def _status_line(found: RunStatus) -> str:
    state = "running" if found.running else "unfinished" if found.left else "finished"
    limit = "at most " if found.at_most else ""
    parts = [f"{found.name}: {state}", f"{found.done} of {limit}{count_noun(found.total, 'trial')} done"]
    if found.failed:
        parts.append(f"{found.failed} failed")
    if found.measuring is not None:
        parts.append(f"now {found.measuring}")
    if found.running and found.pid is not None:
        parts.append(f"process {found.pid} on {found.host}")
    if state == "unfinished":
        parts.append("submit the same sweep again to resume it")
    return ", ".join(parts)
