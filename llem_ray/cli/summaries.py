"""A run's directory to the summary that is shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llem_ray.reporting.summary import RunSummary, summarise_run
from llem_ray.results.reader import read_table
from llem_ray.results.rundir import RunDirectory
from llem_ray.results.sizes import dataset_sizes


def read_summary(run: RunDirectory, rows: Iterable[Mapping[str, Any]] | None = None) -> RunSummary:
    """Summary of a run as its directory stands now.

    Args:
        run: The run.
        rows: Its rows of ``trials`` where they have been read already.

    Raises:
        ResultsError: A table cannot be read.
    """
    trials = read_table(run.path, "trials").to_pylist() if rows is None else rows
    loads = read_table(run.path, "loads").to_pylist()
    return summarise_run(run.name, trials, loads, dataset_sizes(run.path))
