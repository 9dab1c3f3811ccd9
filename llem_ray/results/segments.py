"""Files of a dataset on disk: segments (Arrow IPC streams) while a run goes on, Parquet parts afterwards.

A segment holds the rows that belong together, such as one trial with its requests and phases, of several tables: one
IPC stream per table, back to back. It appears by one rename, so it is there whole or not at all. Segments are numbered.
A part of a table holds its rows of segments ``first`` to ``last``; a table's rows of a segment count only when the
segment's number is above the last of that table's parts. So a compaction may stop anywhere: nothing is lost or twice.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final, cast

import pyarrow as pa
import pyarrow.parquet as pq

from llem_ray.core.errors import ResultsError
from llem_ray.results.files import atomic_file, storage_errors, sync_directory
from llem_ray.results.schema import SCHEMAS, TABLE_NAMES, TableName, check_schema_version

_SEGMENT = re.compile(r"([0-9]{8,})\.arrows")
_PART = re.compile(r"part-([0-9]{8,})-([0-9]{8,})\.parquet")
_LZ4: Final = pa.ipc.IpcWriteOptions(compression="lz4")
_COMPRESSED_FROM_BYTES: Final = 16 * 1024
"""Below this, compressing a stream's many small buffers costs more than it saves."""

_MERGE_PIECES: Final = 32
"""One-row tables merged at a time in a compaction: each costs memory for each of its columns until then."""

ROW_GROUP: Final = 64 * 1024
"""Rows of a Parquet row group, and about what a compaction holds of a table at a time."""

_ENCODINGS: Final[Mapping[TableName, Mapping[str, str]]] = {
    "power": {"t_ns": "DELTA_BINARY_PACKED", "hw_ns": "DELTA_BINARY_PACKED", "energy_mj": "BYTE_STREAM_SPLIT"},
    "steps": {"begin_ns": "DELTA_BINARY_PACKED", "end_ns": "DELTA_BINARY_PACKED"},
    "requests": {"token_times_ns.list.element": "DELTA_BINARY_PACKED"},
}
"""Of columns whose numbers hardly repeat: a dictionary is not worth it, building it costs more time than anything else."""

_NAMES: Final = frozenset({"run", "node", "device_uuid", "trial_id", "kind"})


def _stream_type(table: TableName, field: pa.Field) -> pa.DataType:
    """Samples and steps are many and their names few: as numbers into a dictionary they cost a tenth of the time."""
    named = table in {"power", "states", "steps"} and field.name in _NAMES
    return pa.dictionary(pa.int32(), pa.string()) if named else field.type


_STREAM_SCHEMAS: Final[Mapping[TableName, pa.Schema]] = {
    table: pa.schema([pa.field(field.name, _stream_type(table, field)) for field in schema], metadata=schema.metadata)
    for table, schema in SCHEMAS.items()
}
"""As ``SCHEMAS`` without descriptions, which would be most of a one-row segment."""


def stream_schema(table: TableName) -> pa.Schema:
    """Schema of ``table`` in segments: types and version, no descriptions; names of samples and steps are dictionary-encoded."""
    return _STREAM_SCHEMAS[table]


def segment_path(segments: Path, number: int) -> Path:
    """File of segment ``number``."""
    return segments / f"{number:08d}.arrows"


def part_path(folder: Path, first: int, last: int) -> Path:
    """Parquet file with the rows of segments ``first`` to ``last``."""
    return folder / f"part-{first:08d}-{last:08d}.parquet"


def list_segments(segments: Path) -> dict[int, Path]:
    """Number -> file of every segment, ascending.

    Raises:
        ResultsError: The folder cannot be read.
    """
    with storage_errors(segments, "read"):
        names = [path.name for path in segments.iterdir()] if segments.is_dir() else []
    found = ((match, name) for name in names if (match := _SEGMENT.fullmatch(name)))
    return dict(sorted((int(match[1]), segments / name) for match, name in found))


def list_parts(folder: Path) -> tuple[tuple[Path, ...], int]:
    """A table's Parquet parts in order, and the number of the last segment they cover (0 without a part).

    Raises:
        ResultsError: The folder cannot be read.
    """
    with storage_errors(folder, "read"):
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = sorted((int(match[1]), int(match[2]), name) for name in names if (match := _PART.fullmatch(name)))
    return tuple(folder / name for _, _, name in found), max((last for _, last, _ in found), default=0)


def write_segment(path: Path, tables: Mapping[TableName, pa.Table]) -> None:
    """Write one segment, durable when this returns. Tables without rows are left out.

    Raises:
        ResultsError: It cannot be written; nothing of it remains.
    """
    with atomic_file(path) as file:
        for table in tables.values():
            if table.num_rows:
                options = _LZ4 if table.nbytes >= _COMPRESSED_FROM_BYTES else None
                with pa.ipc.new_stream(file, table.schema, options=options) as stream:
                    stream.write_table(table)


def read_segment(path: Path, wanted: Collection[TableName]) -> dict[TableName, pa.Table]:
    """The wanted tables of a segment; those it has no rows of are absent.

    Raises:
        FileNotFoundError: It was compacted away in the meantime.
        ResultsError: It is damaged or of another schema version.
    """
    tables: dict[TableName, pa.Table] = {}
    try:
        with pa.memory_map(str(path)) as source:
            while source.tell() < source.size():
                stream = pa.ipc.open_stream(source)
                metadata = stream.schema.metadata
                check_schema_version(metadata, str(path))
                name = metadata[b"llem_ray.table"].decode()
                table = stream.read_all()
                if name in wanted:
                    tables[cast(TableName, name)] = table
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ResultsError(f"{path} is damaged: {error}", "it was changed from outside; remove it and resume the run") from error
    return tables


def to_table(name: TableName, rows: Iterable[Mapping[str, object]]) -> pa.Table:
    """Rows as an Arrow table with the schema of ``name``; what a row leaves out is null.

    Raises:
        ResultsError: A row has a column that the table does not have, or a value of the wrong type.
    """
    schema = _STREAM_SCHEMAS[name]
    known = frozenset(schema.names)
    records = list(rows)
    for record in records:
        if unknown := record.keys() - known:
            raise ResultsError(f"table {name} has no column {', '.join(sorted(unknown))}")
    try:
        return pa.Table.from_pylist(records, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise ResultsError(f"table {name}: {_offender(schema, records) or error}") from error


def _offender(schema: pa.Schema, records: list[Mapping[str, object]]) -> str | None:
    for field in schema:
        for record in records:
            try:
                pa.array([record.get(field.name)], type=field.type)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
                return f"column {field.name} ({field.type}): {error}"
    return None


def conform(name: TableName, table: pa.Table, columns: Sequence[str] | None = None) -> pa.Table:
    """The table with exactly the columns of today's schema: columns added since are null, descriptions are put back.

    Args:
        name: The table.
        table: Its rows, perhaps of an older llem-ray.
        columns: Only these, in this order; default: all.

    Raises:
        ResultsError: A column's type cannot be converted.
    """
    schema = SCHEMAS[name]
    if columns is not None:
        schema = pa.schema([schema.field(column) for column in columns], metadata=schema.metadata)
    if table.schema.equals(schema, check_metadata=True):
        return table
    present = frozenset(table.schema.names)
    try:
        arrays = [
            table.column(field.name).cast(field.type) if field.name in present else pa.nulls(len(table), field.type)
            for field in schema
        ]
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ResultsError(f"table {name} does not fit this llem-ray: {error}") from error
    return pa.Table.from_arrays(arrays, schema=schema)


def write_part(folder: Path, first: int, last: int, name: TableName, table: pa.Table) -> Path:
    """Write a table's rows of segments ``first`` to ``last`` as Parquet, durable when this returns.

    Raises:
        ResultsError: It cannot be written; nothing of it remains.
    """
    path = _new_part_path(folder, first, last)
    with atomic_file(path) as file, _parquet_writer(file, name) as writer:
        _write_rows(writer, name, table)
    return path


def _new_part_path(folder: Path, first: int, last: int) -> Path:
    with storage_errors(folder, "create"):
        if not folder.is_dir():
            folder.mkdir(exist_ok=True)
            sync_directory(folder.parent)
    return part_path(folder, first, last)


def _parquet_writer(file: BinaryIO, name: TableName) -> pq.ParquetWriter:
    schema, encodings = SCHEMAS[name], _ENCODINGS.get(name, {})
    repeating = [field.name for field in schema if field.name not in encodings]
    return pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=repeating, column_encoding=encodings or None)


def _write_rows(writer: pq.ParquetWriter, name: TableName, table: pa.Table) -> None:
    for begin in range(0, max(1, table.num_rows), ROW_GROUP):
        writer.write_table(conform(name, table.slice(begin, ROW_GROUP)), row_group_size=ROW_GROUP)


def compact(root: Path, segments: Path) -> int:
    """Turn all segments into Parquet parts, then delete them. May be stopped anywhere and started again.

    Segments are read one after the other, and their rows written as soon as there are enough for a row group: memory does not
    grow with what is compacted.

    Returns:
        Number of segments compacted.

    Raises:
        ResultsError: Something cannot be read or written; the rows stay where they are.
    """
    numbered = list_segments(segments)
    if not numbered:
        return 0
    last = max(numbered)
    covered = {table: list_parts(root / table)[1] for table in TABLE_NAMES}
    with contextlib.ExitStack() as parts:
        opened: dict[TableName, _OpenPart] = {}
        for name, table in _read_all(numbered, covered):
            if name not in opened:
                path = _new_part_path(root / name, max(covered[name] + 1, min(numbered)), last)
                writer = parts.enter_context(_parquet_writer(parts.enter_context(atomic_file(path)), name))
                opened[name] = _OpenPart(name, writer)
            opened[name].add(table)
        for part in opened.values():
            part.write()
    delete(segments, numbered.values())
    return len(numbered)


def _read_all(numbered: Mapping[int, Path], covered: Mapping[TableName, int]) -> Iterator[tuple[TableName, pa.Table]]:
    for number, path in numbered.items():
        wanted = [table for table in TABLE_NAMES if number > covered[table]]
        try:
            found = read_segment(path, wanted)
        except FileNotFoundError as error:
            raise ResultsError(f"{path} has vanished while the run was locked") from error
        yield from found.items()


class _OpenPart:
    """A part that is being written. Small tables are merged on the way: each costs memory for each of its columns until then."""

    def __init__(self, name: TableName, writer: pq.ParquetWriter) -> None:
        self._name, self._writer = name, writer
        self._fresh: list[pa.Table] = []
        self._merged: list[pa.Table] = []
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        self._fresh.append(table)
        self._rows += table.num_rows
        if self._rows >= ROW_GROUP:
            self.write()
        elif len(self._fresh) >= _MERGE_PIECES:
            self._merged.append(_joined(self._name, self._fresh).combine_chunks())
            self._fresh = []

    def write(self) -> None:
        if self._rows:
            _write_rows(self._writer, self._name, _joined(self._name, [*self._merged, *self._fresh]))
        self._merged, self._fresh, self._rows = [], [], 0


def _joined(name: TableName, pieces: list[pa.Table]) -> pa.Table:
    if any(not piece.schema.equals(pieces[0].schema) for piece in pieces):  # an older llem-ray began the run
        pieces = [conform(name, piece) for piece in pieces]
    return pa.concat_tables(pieces)


def delete(folder: Path, paths: Iterable[Path]) -> None:
    """Delete files of one folder durably.

    Raises:
        ResultsError: One cannot be deleted.
    """
    with storage_errors(folder, "clean up"):
        for path in paths:
            path.unlink(missing_ok=True)
        sync_directory(folder)


def leftovers(folder: Path) -> Iterator[Path]:
    """Temporary files that a killed writer left in ``folder``."""
    if folder.is_dir():
        yield from folder.glob("*.tmp")
