"""A run's directory to the summary that is shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llem_ray.core.spec import StoppingSpec
from llem_ray.execution.status import planned_target
from llem_ray.reporting.summary import RunSummary, summarise_run
from llem_ray.results.reader import read_table
from llem_ray.results.rundir import RunDirectory
from llem_ray.results.sizes import dataset_sizes


def read_summary(
    run: RunDirectory,
    rows: Iterable[Mapping[str, Any]] | None = None,
    target: tuple[StoppingSpec, int | None, int | None] | None = None,
) -> RunSummary:
    """Summary of a run as its directory stands now.

    Args:
        run: The run.
        rows: Its rows of ``trials`` where they have been read already.
        target: Its target, what a cell gets at most, and its number of cells, where that is known already.

    Raises:
        ResultsError: A table or the plan cannot be read.
    """
    stopping, repeats, cells = target or planned_target(run)
    return summarise_run(
        run.name,
        read_table(run.path, "trials").to_pylist() if rows is None else rows,
        stopping=stopping,
        repeats=repeats,
        planned_cells=cells,
        loads=read_table(run.path, "loads").to_pylist(),
        dataset_bytes=dataset_sizes(run.path),
    )
