"""Writes a run's dataset: a trial is done when its segment has been renamed into place."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa

from llem_ray.core.power import SampleBatch
from llem_ray.core.step_log import StepLog
from llem_ray.results import segments
from llem_ray.results.memory import return_freed_memory, trim_heap
from llem_ray.results.reader import read_table, recorded_attempts
from llem_ray.results.rundir import RunDirectory
from llem_ray.results.samples import power_table, state_table
from llem_ray.results.schema import SCHEMA_VERSION, SCHEMAS, TABLE_NAMES, TableName
from llem_ray.results.steps import step_table

COMPACT_TRIALS: Final = 256
"""Trials between compactions: opening 10,000 one-row files would take 19 s."""
COMPACT_BYTES: Final = 256 * 1024 * 1024
"""Size of uncompacted rows that also starts a compaction: a large cluster samples this much in a minute."""
FLUSH_ROWS: Final = 65_536
"""Samples held back at most, in rows; the next trial takes them along in its segment."""

TRIM_ROWS: Final = 500_000
"""Samples after which what they needed in memory is given back."""
TABLE_BATCHES: Final = 128
"""Batches turned into one table at a time."""

Row = Mapping[str, Any]


class DatasetWriter:
    """Appends to the tables of one run. The caller holds the run's lock. Its methods may be called from any thread.

    Args:
        run: The run directory. Leftovers of a killed writer are removed.
        compact_trials: Trials between compactions.

    Raises:
        ResultsError: The dataset cannot be read, or its folder cannot be written.
    """

    def __init__(self, run: RunDirectory, compact_trials: int = COMPACT_TRIALS) -> None:
        return_freed_memory()
        self._run = run
        self._compact_trials = compact_trials
        self._mutex = threading.Lock()
        self._attempts = set(recorded_attempts(run.path))
        self._pending: dict[TableName, list[pa.Table]] = {"power": [], "states": [], "clocks": []}
        self._pending_rows = self._untrimmed_rows = 0
        self._sampled = _last_sampled(run)
        for folder in (run.segments_path, *(run.table_path(table) for table in TABLE_NAMES)):
            stale = tuple(segments.leftovers(folder))
            if stale:
                segments.delete(folder, stale)
        present = segments.list_segments(run.segments_path)
        ends = (segments.list_parts(run.table_path(table))[1] for table in TABLE_NAMES)
        self._last = max([0, *present, *ends])
        self._loose_segments = len(present)
        self._loose_bytes = sum(path.stat().st_size for path in present.values())

    def write_trial(
        self,
        row: Row,
        requests: Sequence[Row] = (),
        phases: Sequence[Row] = (),
        loads: Sequence[Row] = (),
        steps: StepLog | None = None,
    ) -> bool:
        """Write one attempt with all that belongs to it, and the samples so far: all at once, durable when this returns.

        Before that, it compacts when enough trials have gathered. ``run`` and ``schema_version`` are filled in.

        Returns:
            False when this attempt of this trial is in the dataset already; nothing is written then.

        Raises:
            ResultsError: A column is unknown or of the wrong type, or the disk is full or read-only: nothing is written.
        """
        key = (row["trial_id"], row["attempt"])
        with self._mutex:
            if key in self._attempts:
                return False
            self._compact_if_due()
            tables: dict[TableName, pa.Table] = {
                "trials": segments.to_table("trials", [{**row, "run": self._run.name, "schema_version": SCHEMA_VERSION}]),
                "requests": self._to_table("requests", requests),
                "phases": self._to_table("phases", phases),
                "loads": self._to_table("loads", loads),
            }
            if steps is not None:
                tables["steps"] = step_table(steps, trial_id=row["trial_id"], attempt=row["attempt"], run=self._run.name)
            self._write(tables)
            self._attempts.add(key)
        return True

    def write_phases(self, rows: Sequence[Row]) -> None:
        """Write phases that belong to no attempt, such as start-up and load; durable when this returns.

        Raises:
            ResultsError: They cannot be written.
        """
        with self._mutex:
            self._write({"phases": self._to_table("phases", rows)})

    def write_nodes(self, rows: Sequence[Row]) -> None:
        """Write what samplers found on their hosts; durable when this returns.

        Raises:
            ResultsError: They cannot be written.
        """
        with self._mutex:
            self._write({"nodes": self._to_table("nodes", rows)})

    def write_clocks(self, rows: Sequence[Row]) -> None:
        """Write clock offsets; they reach the disk with the next trial.

        Raises:
            ResultsError: A row does not fit the table.
        """
        if rows:
            with self._mutex:
                self._pending["clocks"].append(self._to_table("clocks", rows))

    def write_power(self, batches: Iterable[SampleBatch]) -> None:
        """Take in raw samples and device states. They reach the disk with the next trial, or when many have gathered.

        A sampler that outlived an earlier session hands out again what that one wrote down: such batches are left out.

        Raises:
            ResultsError: Many had gathered and cannot be written; they are kept for the next attempt.
        """
        with self._mutex:
            some = [batch for batch in batches if not self._is_written(batch)]
            for start in range(0, len(some), TABLE_BATCHES):
                these = some[start : start + TABLE_BATCHES]
                self._pending["power"].append(power_table(self._run.name, these))
                self._pending["states"].append(state_table(self._run.name, these))
                self._pending_rows += sum(map(len, these))
                if self._pending_rows >= FLUSH_ROWS:
                    self._compact_if_due()
                    self._write({})

    @property
    def held_rows(self) -> int:
        """Samples taken in that are not on the disk yet."""
        return self._pending_rows

    def _is_written(self, batch: SampleBatch) -> bool:
        """An earlier session wrote it."""
        last_ns = self._sampled.get((batch.node, batch.epoch))
        return last_ns is not None and len(batch) > 0 and int(batch.t_ns.max()) <= last_ns

    def flush(self) -> None:
        """Bring samples that are held back to the disk.

        Raises:
            ResultsError: They cannot be written; they are kept for the next attempt.
        """
        with self._mutex:
            self._write({})

    def compact(self) -> int:
        """Turn segments into Parquet and return how many. Called now and then while writing, and by ``finish``.

        Raises:
            ResultsError: Something cannot be written; the rows stay in their segments.
        """
        with self._mutex:
            return self._compact()

    def finish(self) -> None:
        """Write what is held back, compact, and give every table without rows an empty Parquet file: readers find them all.

        Raises:
            ResultsError: Something cannot be written; nothing that was durable is lost.
        """
        with self._mutex:
            self._write({})
            self._compact()
            for table in TABLE_NAMES:
                folder = self._run.table_path(table)
                if not segments.list_parts(folder)[0]:
                    segments.write_part(folder, 0, 0, table, SCHEMAS[table].empty_table())

    def _to_table(self, name: TableName, rows: Sequence[Row]) -> pa.Table:
        return segments.to_table(name, ({**row, "run": self._run.name} for row in rows))

    def _write(self, tables: Mapping[TableName, pa.Table]) -> None:
        samples = {name: pa.concat_tables(pieces) for name, pieces in self._pending.items() if pieces}
        everything = {**tables, **samples}
        if not any(table.num_rows for table in everything.values()):
            return
        path = segments.segment_path(self._run.segments_path, self._last + 1)
        segments.write_segment(path, everything)
        self._last += 1
        self._loose_segments += 1
        self._loose_bytes += path.stat().st_size
        self._pending = {"power": [], "states": [], "clocks": []}
        self._untrimmed_rows += self._pending_rows
        self._pending_rows = 0
        if self._untrimmed_rows >= TRIM_ROWS:
            self._untrimmed_rows = 0
            trim_heap()

    def _compact_if_due(self) -> None:
        if self._loose_segments >= self._compact_trials or self._loose_bytes >= COMPACT_BYTES:
            self._compact()

    def _compact(self) -> int:
        trim_heap()
        count = segments.compact(self._run.path, self._run.segments_path)
        self._loose_segments = self._loose_bytes = 0
        return count


def _last_sampled(run: RunDirectory) -> dict[tuple[str, int], int]:
    """Newest sample in the dataset of each start of a sampler, on its host's clock. Batches are written whole, in order."""
    times = read_table(run.path, "power", ["node", "epoch", "t_ns"])
    newest = times.group_by(["node", "epoch"]).aggregate([("t_ns", "max")]).to_pylist()
    return {(row["node"], row["epoch"]): row["t_ns_max"] for row in newest}
