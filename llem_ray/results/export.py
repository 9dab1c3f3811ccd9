"""Writes a table of a run as one CSV, JSON or Parquet file."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from llem_ray.core.errors import ResultsError
from llem_ray.results.files import atomic_file, storage_errors
from llem_ray.results.reader import read_table
from llem_ray.results.schema import TableName

ExportFormat = Literal["csv", "json", "parquet"]

EXPORT_FORMATS: Final[tuple[ExportFormat, ...]] = get_args(ExportFormat)

_CHUNK_ROWS = 16_384


def export_run(run_dir: Path, fmt: ExportFormat, dest: Path, *, table: TableName = "trials", force: bool = False) -> int:
    """Write a table to ``dest``, whole or not at all. Works while the run goes on.

    CSV holds lists, maps and structs as JSON text and null as an empty field. JSON is an array of objects.

    Args:
        run_dir: The run directory.
        fmt: File format.
        dest: The file to write; a folder takes ``<run>-<table>.<fmt>``.
        table: The table.
        force: Overwrite an existing file.

    Returns:
        Number of rows written.

    Raises:
        ResultsError: The run cannot be read, ``dest`` exists already, its folder is missing, or it cannot be written.
    """
    if fmt not in EXPORT_FORMATS:
        raise ResultsError(f"unknown export format {fmt!r}", "one of: " + ", ".join(EXPORT_FORMATS))
    data = read_table(run_dir, table)
    path = dest / f"{run_dir.absolute().name}-{table}.{fmt}" if dest.is_dir() else dest
    with storage_errors(path, "write"):
        if path.exists() and not force:
            raise ResultsError(f"{path} exists already", "choose another file, or overwrite it with --force")
    if not path.parent.is_dir():
        raise ResultsError(f"cannot write {path}: there is no folder {path.parent}")
    writers = {"csv": _write_csv, "json": _write_json, "parquet": _write_parquet}
    with atomic_file(path) as file:
        writers[fmt](data, file)
    return int(data.num_rows)


def records(data: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows as plain objects: maps are dicts, wall times ISO 8601 text in UTC, and NaN is null."""
    maps = [field.name for field in data.schema if pa.types.is_map(field.type)]
    for batch in data.to_batches(max_chunksize=_CHUNK_ROWS):
        for row in batch.to_pylist():
            for name in maps:
                row[name] = None if row[name] is None else dict(row[name])
            yield {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds") + "Z"
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


def _write_csv(data: pa.Table, file: BinaryIO) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    writer = csv.writer(text)
    writer.writerow(data.schema.names)
    writer.writerows([_cell(value) for value in row.values()] for row in records(data))
    text.detach()


def _write_json(data: pa.Table, file: BinaryIO) -> None:
    file.write(b"[")
    for index, row in enumerate(records(data)):
        file.write(b",\n " if index else b"\n ")
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode())
    file.write(b"\n]\n")


def _write_parquet(data: pa.Table, file: BinaryIO) -> None:
    pq.write_table(data, file, compression="zstd")
