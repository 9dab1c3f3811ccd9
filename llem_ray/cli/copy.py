"""`llem-ray copy`, and what `submit --copy-to` needs."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import click

from llem_ray.cli.runs import RUN
from llem_ray.cli.sweeps import RESULTS_DIR
from llem_ray.core.errors import ConfigError, ResultsError
from llem_ray.reporting.numbers import count_noun
from llem_ray.results.copied import copied_runs, fetch_run
from llem_ray.results.copy import RunCopy
from llem_ray.results.destination import Destination, holds_secret, open_destination
from llem_ray.results.rundir import RunDirectory, find_run

LOG = logging.getLogger(__name__)

COPY_TO = click.option(
    "--copy-to",
    metavar="URI",
    envvar="LLEM_RAY_COPY_TO",
    help="Copy the run's files there too, and resume from that copy where this sweep has no run here: s3://, gs://, abfs://, file://.",
)
TAKE_OVER = click.option("--take-over", is_flag=True, help="Go on with a copy although another process seems to write it.")


@click.command()
@RUN
@click.argument("uri", envvar="LLEM_RAY_COPY_TO")
@RESULTS_DIR
@TAKE_OVER
def copy(run: str, uri: str, results_dir: Path, take_over: bool) -> None:
    """Copy RUN to the folder URI, or complete a copy of it.

    URI is s3://bucket/folder, gs://bucket/folder, abfs://account@container/folder or file:///folder. What is there already is not
    copied again.
    """
    directory = find_run(results_dir, run)
    copying = RunCopy(directory, open_destination(uri), take_over=take_over)
    report = copying.copy_once()
    click.echo(
        f"{directory.name}: {count_noun(report.files, 'file')} ({report.size_bytes / 1e6:.1f} MB) copied to {copying.copy.shown}"
    )


class CopyTarget:
    """Where `submit` copies to. Without a URI nothing is copied.

    Args:
        uri: Of the folder with copies of runs, or None.
        take_over: Go on with a copy although another process seems to write it.

    Raises:
        ConfigError: It is not a URI of a place to copy to.
        ResultsError: It cannot be reached or written.
    """

    def __init__(self, uri: str | None, take_over: bool) -> None:
        self._destination: Destination | None = None if uri is None else open_destination(uri)
        self._take_over = take_over

    def fetch(self, results_dir: Path, run_name: str) -> Path | None:
        """Bring the copy of that run here, if there is one."""
        if self._destination is None:
            return None
        found = fetch_run(self._destination, results_dir, run_name, take_over=self._take_over)
        if found is None:
            return None
        _tell(f"no run {run_name} in {results_dir}: going on from its copy in {self._destination.child(found.name).shown}")
        return found.path

    def taken_names(self) -> tuple[str, ...]:
        """Names of runs that have a copy there."""
        return () if self._destination is None else copied_runs(self._destination)

    def copying(self, rundir: RunDirectory) -> contextlib.AbstractContextManager[object]:
        """Copies the run inside the block.

        Raises:
            RunInUse: Another process seems to write the copy.
            ResultsError: The copy is of another run.
        """
        if self._destination is None:
            return contextlib.nullcontext()
        return RunCopy(rundir, self._destination, tell=_tell, take_over=self._take_over)


def refuse_secret(uri: str) -> None:
    """Keep a password out of the command line of a Ray job.

    Raises:
        ConfigError: The URI holds one.
    """
    if holds_secret(uri):
        hint = "let the environment of the head hold the credentials"
        raise ConfigError("a password in the URI would show among the cluster's jobs", hint, field="--copy-to")


def _tell(message: str) -> None:
    LOG.warning("%s", message)
    with contextlib.suppress(OSError, ValueError, ResultsError):  # a terminal that went away stops no copy
        click.echo(message, err=True)
