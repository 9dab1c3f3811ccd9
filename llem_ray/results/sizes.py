"""How large a run's dataset is on disk, table by table."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llem_ray.results.schema import TABLE_NAMES
from llem_ray.results.segments import list_parts, list_segments


def dataset_sizes(run_dir: Path) -> dict[str, int]:
    """Bytes of each table that has any, of ``token_times`` apart from ``requests``, and of ``segments`` not yet compacted.

    Raises:
        ResultsError: A folder cannot be read.
    """
    parts = {table: list_parts(run_dir / table)[0] for table in TABLE_NAMES}
    sizes: dict[str, int] = {table: _size(paths) for table, paths in parts.items()}
    sizes["token_times"] = sum(map(_token_times_bytes, parts["requests"]))
    sizes["requests"] = max(0, sizes["requests"] - sizes["token_times"])
    sizes["segments"] = _size(list_segments(run_dir / "segments").values())
    return {name: size for name, size in sizes.items() if size}


def _size(paths: Iterable[Path]) -> int:
    total = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # compacted away meanwhile
            total += path.stat().st_size
    return total


def _token_times_bytes(path: Path) -> int:
    try:
        metadata = pq.read_metadata(path)
    except (OSError, pa.ArrowInvalid):  # gone or damaged: whoever reads its rows says so
        return 0
    columns = [
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    ]
    return sum(column.total_compressed_size for column in columns if column.path_in_schema.startswith("token_times_ns."))
