"""Recorded arrivals: CSV or JSON Lines with times, and often with the lengths of prompts and answers."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any, Final

from llem_ray.core.errors import ConfigError

FIELD: Final = "workload.load.trace"


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """One request of a trace."""

    at_s: float
    """When it arrived, on the trace's own clock."""
    input_tokens: int | None
    output_tokens: int | None
    line: int
    """Of the file, from 1."""
    hash_ids: tuple[int, ...] | None = None
    """Ids of the blocks that its prompt consists of (Mooncake)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shape:
    """Names of a published trace's columns."""

    name: str
    time: str
    input: str
    output: str
    needs_lengths: bool


_SHAPES: Final = (
    _Shape(name="own", time="timestamp_s", input="input_tokens", output="output_tokens", needs_lengths=False),
    _Shape(name="Mooncake", time="timestamp", input="input_length", output="output_length", needs_lengths=True),
    _Shape(name="Azure", time="TIMESTAMP", input="ContextTokens", output="GeneratedTokens", needs_lengths=True),
)
"""Ours: seconds. Mooncake's (github.com/kvcache-ai/Mooncake, FAST25-release): milliseconds. Azure's LLM inference traces
(github.com/Azure/AzurePublicDataset): wall time."""


def load_trace(path: str, base_dir: str | os.PathLike[str] = ".") -> tuple[Arrival, ...]:
    """The arrivals of a trace in order; its shape is recognised by its time column.

    Args:
        path: A ``.csv`` or ``.jsonl`` file.
        base_dir: Folder that a relative path starts from.

    Raises:
        ConfigError: The file is missing, empty, of another kind, or a line is wrong: it is named, with what was found.
    """
    file = Path(base_dir) / Path(path).expanduser()
    text = _read_text(file)
    if file.suffix == ".csv":
        rows = _csv_rows(text, file)
    elif file.suffix in {".jsonl", ".json"}:
        rows = _json_rows(text, file)
    else:
        raise ConfigError("a trace is CSV or JSON Lines", field=FIELD, found=file.name, allowed="*.csv, *.jsonl")
    arrivals: list[Arrival] = []
    shape: _Shape | None = None
    for line, row in rows:
        shape = shape or _shape_of(row, file, line)
        arrival = _arrival(shape, row, file, line)
        if arrivals and arrival.at_s < arrivals[-1].at_s:
            late_s = arrivals[-1].at_s - arrival.at_s
            found = f"{row[shape.time]}, {late_s:.6g} s before line {arrivals[-1].line}"
            raise _wrong(file, line, "the trace is out of order", found, "times that never go back")
        arrivals.append(arrival)
    if not arrivals:
        raise ConfigError("the trace is empty", file=str(file), field=FIELD, allowed="one arrival a line")
    return tuple(arrivals)


def _shape_of(row: Mapping[str, Any], file: Path, line: int) -> _Shape:
    for shape in _SHAPES:
        if shape.time in row:
            return shape
    allowed = ", or ".join(f"{shape.time} ({shape.name})" for shape in _SHAPES)
    raise _wrong(file, line, "the trace has no time column", f"columns {', '.join(row) or 'none'}", allowed)


def _arrival(shape: _Shape, row: Mapping[str, Any], file: Path, line: int) -> Arrival:
    return Arrival(
        at_s=_time_s(shape, row, file, line),
        input_tokens=_length(shape, shape.input, row, file, line),
        output_tokens=_length(shape, shape.output, row, file, line),
        line=line,
        hash_ids=_hash_ids(row, file, line) if shape.name == "Mooncake" else None,
    )


def _hash_ids(row: Mapping[str, Any], file: Path, line: int) -> tuple[int, ...] | None:
    ids = row.get("hash_ids")
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(type(number) is int for number in ids):
        raise _wrong(file, line, "hash_ids is not a list of block ids", repr(ids), "a list of whole numbers")
    return tuple(ids)


def _time_s(shape: _Shape, row: Mapping[str, Any], file: Path, line: int) -> float:
    value = row.get(shape.time)
    try:
        if shape.name == "Azure":
            at = datetime.fromisoformat(str(value))
            return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()  # a zone's summer time would make or hide an hour
        seconds = float(value) / (1000.0 if shape.name == "Mooncake" else 1.0)  # type: ignore[arg-type]
        if not isfinite(seconds):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        kinds = {"own": "seconds", "Mooncake": "milliseconds", "Azure": "a time such as 2023-11-16 18:15:46.6805900"}
        raise _wrong(file, line, f"{shape.time} is not a time", repr(value), kinds[shape.name]) from None
    return seconds


def _length(shape: _Shape, column: str, row: Mapping[str, Any], file: Path, line: int) -> int | None:
    value = row.get(column)
    if value is None or value == "":
        if shape.needs_lengths:
            raise _wrong(file, line, f"the trace has no {column}", f"columns {', '.join(row)}", f"a column {column}")
        return None
    try:
        count = int(value)
    except (TypeError, ValueError, OverflowError):
        count = 0
    if count < 1 or isinstance(value, (bool, float)):
        raise _wrong(file, line, f"{column} is not a length", repr(value), "tokens, 1 and more")
    return count


def _csv_rows(text: str, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    for row in reader:
        if None in row or None in row.values():
            names = reader.fieldnames or ()
            raise _wrong(
                file, reader.line_num, "a row has another number of columns than the header", "", f"{len(names)} columns"
            )
        yield reader.line_num, row


def _json_rows(text: str, file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise _wrong(file, line, f"not JSON: {error.msg} at column {error.colno}", content, "a JSON object") from error
        if not isinstance(row, dict):
            raise _wrong(file, line, "a line is not an arrival", content, "a JSON object")
        yield line, row


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError("the trace does not exist", file=str(file), field=FIELD) from error
    except UnicodeDecodeError as error:
        raise ConfigError("the trace is not UTF-8 text", file=str(file), field=FIELD, allowed="CSV or JSON Lines") from error
    except OSError as error:
        raise ConfigError(f"the trace cannot be read: {error.strerror}", file=str(file), field=FIELD) from error


def _wrong(file: Path, line: int, message: str, found: str, allowed: str) -> ConfigError:
    shown = found if len(found) <= 80 else f"{found[:77]}..."
    return ConfigError(message, file=str(file), line=line, field=FIELD, found=shown or None, allowed=allowed)
