"""A run's directory to the summary that is shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llem_ray.execution.status import Planned, read_planned
from llem_ray.reporting.summary import RunSummary, summarise_run
from llem_ray.results.reader import read_table
from llem_ray.results.rundir import RunDirectory
from llem_ray.results.sizes import dataset_sizes


def read_summary(
    run: RunDirectory, rows: Iterable[Mapping[str, Any]] | None = None, planned: Planned | None = None
) -> RunSummary:
    """Summary of a run as its directory stands now.

    Args:
        run: The run.
        rows: Its rows of ``trials`` where they have been read already.
        planned: What its plan says, where that has been read already.

    Raises:
        ResultsError: A table or the plan cannot be read.
    """
    planned = planned or read_planned(run)
    return summarise_run(
        run.name,
        read_table(run.path, "trials").to_pylist() if rows is None else rows,
        stopping=planned.stopping,
        repeats=planned.repeats,
        planned_cells=planned.cells,
        loads=read_table(run.path, "loads").to_pylist(),
        dataset_bytes=dataset_sizes(run.path),
    )
