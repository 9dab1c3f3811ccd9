"""Reads a run's tables, while it runs as well as afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llem_ray.core.errors import ResultsError
from llem_ray.results import segments
from llem_ray.results.files import storage_errors
from llem_ray.results.journal import JournalState
from llem_ray.results.rundir import RunDirectory
from llem_ray.results.schema import SCHEMAS, TableName, check_schema_version

_READ_TRIES = 10


def read_table(run_dir: Path, name: TableName, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of a table, Parquet parts and segments alike, in the order they were written.

    Takes no lock: when a compaction moves rows under its hands it reads again.

    Args:
        run_dir: The run directory.
        name: The table.
        columns: Columns to read, in this order; default: all.

    Raises:
        ResultsError: There is no run, a column is unknown, or a file is damaged or of another schema version.
    """
    known = SCHEMAS[name].names
    if unknown := [column for column in columns or () if column not in known]:
        raise ResultsError(f"table {name} has no column {', '.join(unknown)}")
    if not run_dir.is_dir():
        raise ResultsError(f"no run directory at {run_dir}")
    for _ in range(_READ_TRIES):
        parts, covered = segments.list_parts(run_dir / name)
        try:
            loose = _read_loose(run_dir / "segments", name, columns, covered)
        except FileNotFoundError:
            continue
        if segments.list_parts(run_dir / name)[0] == parts:
            pieces = [_read_part(path, name, columns) for path in parts]
            return pa.concat_tables([*pieces, *loose]) if pieces or loose else _empty(name, columns)
    raise ResultsError(f"table {name} of {run_dir} changed faster than it could be read", "try again")


def _empty(name: TableName, columns: Sequence[str] | None) -> pa.Table:
    return segments.conform(name, SCHEMAS[name].empty_table(), columns)


def _read_loose(folder: Path, name: TableName, columns: Sequence[str] | None, covered: int) -> list[pa.Table]:
    numbered = segments.list_segments(folder)
    found = (segments.read_segment(path, (name,)) for number, path in numbered.items() if number > covered)
    return [segments.conform(name, tables[name], columns) for tables in found if name in tables]


def _read_part(path: Path, name: TableName, columns: Sequence[str] | None) -> pa.Table:
    try:
        with storage_errors(path, "read"), pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            check_schema_version(schema.metadata, str(path))
            present = None if columns is None else [column for column in columns if column in schema.names]
            return segments.conform(name, file.read(columns=present), columns)
    except pa.ArrowInvalid as error:
        raise ResultsError(f"{path} is damaged: {error}", "it was changed from outside") from error


def recorded_attempts(run_dir: Path) -> dict[tuple[str, int], str]:
    """(trial, attempt) -> status of every row of ``trials``; that of a failure of kind ``interrupted`` is ``interrupted``.

    Raises:
        ResultsError: The table cannot be read.
    """
    table = read_table(run_dir, "trials", ["trial_id", "attempt", "status", "failure_kind"])
    trials, attempts, status, kinds = (column.to_pylist() for column in table.columns)
    cut_short = ("interrupted" if kind == "interrupted" else state for state, kind in zip(status, kinds, strict=True))
    return dict(zip(zip(trials, attempts, strict=True), cut_short, strict=True))


def settled_state(run: RunDirectory) -> JournalState:
    """The journal's state, set right by the dataset: what a resume starts from.

    A trial is done when its row is in a renamed segment. The run driver may be killed between that and the journal's
    ``done`` or ``failed``: the row counts. A trial that the journal calls done but whose row is gone is not done.

    Raises:
        ResultsError: Journal or dataset is damaged.
    """
    state = run.replay()
    recorded = recorded_attempts(run.path)
    for trial_id, attempt in [item for item in state.done.items() if item not in recorded]:
        del state.done[trial_id]
        state.attempts[trial_id] = max(attempt, state.attempts.get(trial_id, 0))
        state.finished = False
    for (trial_id, attempt), status in recorded.items():
        state.attempts[trial_id] = max(attempt, state.attempts.get(trial_id, 0))
        if status in {"completed", "partial"}:
            if trial_id not in state.done:
                state.apply({"event": "done", "trial_id": trial_id, "attempt": attempt})
        elif state.open_attempts.get(trial_id) == attempt:
            state.apply({"event": status, "trial_id": trial_id, "attempt": attempt})
    return state
