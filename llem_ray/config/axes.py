"""Axes of a sweep: lists, powers of two, ranges, dependent groups and zipped blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from llem_ray.config.document import Document, Where, dotted, shorten
from llem_ray.config.fields import Path, unknown_key
from llem_ray.config.file import SweepFile
from llem_ray.config.patches import EXPERIMENT, Patch, read_patch


@dataclass(frozen=True, slots=True)
class Axis:
    """Points of which every cell takes one."""

    where: Where
    points: tuple[Patch, ...]


def read_axes(document: Document, file: SweepFile) -> list[Axis]:
    """All axes of the grid, in the order they are written.

    Raises:
        ConfigError: An axis is empty, unknown, of the wrong type, too long, or sets what another one sets.
    """
    axes = [_axis(document, ("sweep", key), key, value, file.max_cells) for key, value in file.sweep.items()]
    axes += [_zipped(document, ("zip", i), block, file.max_cells) for i, block in enumerate(file.zip)]
    _refuse_overlap(document, axes)
    return axes


def read_experiments(document: Document, file: SweepFile) -> list[Patch]:
    """The explicit experiments.

    Raises:
        ConfigError: A key is unknown or a value has the wrong type.
    """
    return [read_patch(document, ("experiments", i), item) for i, item in enumerate(file.experiments)]


def _axis(document: Document, where: Where, key: str, value: Any, limit: int) -> Axis:
    path = tuple(key.split("."))
    if EXPERIMENT.find(path) is None:
        if "." in key or not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
            raise unknown_key(
                document,
                where,
                key,
                EXPERIMENT,
                () if "." in key else ("or a name of your own for a list of partial experiments",),
            )
        path = ()
    points = tuple(read_patch(document, origin, item, path) for item, origin in _values(document, where, value, limit))
    for i, point in enumerate(points):
        if not point:
            raise document.error((*where, i), "this point sets nothing", allowed="a partial experiment")
    return Axis(where, points)


def _zipped(document: Document, where: Where, block: dict[str, Any], limit: int) -> Axis:
    if not block:
        raise document.error(where, "this zip block is empty", allowed="dotted fields with equally long lists")
    axes = [_axis(document, (*where, key), key, value, limit) for key, value in block.items()]
    _refuse_overlap(document, axes)
    lengths = {dotted((axis.where[-1],)): len(axis.points) for axis in axes}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{key}: {length}" for key, length in lengths.items())
        raise document.error(where, "lists of one zip block differ in length", found=found, allowed="equally long lists")
    points: list[Patch] = []
    for row in zip(*(axis.points for axis in axes), strict=True):
        points.append({path: assigned for point in row for path, assigned in point.items()})
    return Axis(where, tuple(points))


def _refuse_overlap(document: Document, axes: list[Axis]) -> None:
    owners: dict[Path, Axis] = {}
    above: dict[Path, Axis] = {}
    for axis in axes:
        paths = sorted({path for point in axis.points for path in point})
        for path in paths:
            other = above.get(path) or next((owners[head] for head in heads(path) if head in owners), None)
            if other is not None:
                message = f"{'.'.join(path)} is already set by {dotted(other.where)}"
                raise document.error(axis.where, message, allowed="one axis for a field")
        for path in paths:
            owners[path] = axis
            above.update(dict.fromkeys(heads(path), axis))


def heads(path: Path) -> list[Path]:
    """The path and every path above it."""
    return [path[:end] for end in range(1, len(path) + 1)]


def _values(document: Document, where: Where, value: Any, limit: int) -> Iterator[tuple[Any, Where]]:
    if isinstance(value, list):
        if not value:
            raise document.error(where, "this axis is empty", found="[]", allowed="at least one value")
        return ((item, (*where, i)) for i, item in enumerate(value))
    if isinstance(value, dict) and len(value) == 1:
        ((kind, arguments),) = value.items()
        if kind == "pow2":
            return ((item, where) for item in _pow2(document, (*where, kind), arguments))
        if kind == "range":
            return ((item, where) for item in _range(document, (*where, kind), arguments, limit))
    hint = f"[{value}] makes it an axis of one value" if not isinstance(value, dict) else None
    allowed = "a list, {pow2: [1, 64]} or {range: [first, last, step]}"
    raise document.error(where, "an axis is a list of values", found=shorten(value), allowed=allowed, hint=hint)


def _pow2(document: Document, where: Where, arguments: Any) -> list[int]:
    allowed = "[first, last], both powers of two, first <= last <= 2^40"
    match arguments:
        case [int() as first, int() as last] if 0 < first <= last <= 2**40 and first.bit_count() == last.bit_count() == 1:
            return [2**exponent for exponent in range(first.bit_length() - 1, last.bit_length())]
    raise document.error(where, "pow2 takes two powers of two", found=shorten(arguments), allowed=allowed)


def _range(document: Document, where: Where, arguments: Any, limit: int) -> Iterator[int | float]:
    if not isinstance(arguments, list) or len(arguments) != 3 or any(type(item) not in (int, float) for item in arguments):
        allowed = "[first, last, step], all numbers"
        raise document.error(where, "range takes three numbers", found=shorten(arguments), allowed=allowed)
    first, last, step = (Decimal(str(item)) for item in arguments)
    if step == 0 or (last - first) * step < 0:
        found, allowed = shorten(arguments), "a step that leads from first to last"
        raise document.error(where, "this range is empty", found=found, allowed=allowed)
    count = math.floor((last - first) / step) + 1
    if count > limit:
        raise document.error(where, "this range is too long", found=f"{count:,} values", allowed=f"up to {limit:,} (max_cells)")
    whole = all(isinstance(item, int) for item in arguments)
    values = (first + step * i for i in range(count))
    return (int(item) if whole else float(item) for item in values)
