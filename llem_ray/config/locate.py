"""Where in a sweep file the field stands that an engine refused: the check of an engine knows the experiment, not the file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from llem_ray.config.document import Document, Where, read_document, shorten
from llem_ray.config.overrides import apply_overrides
from llem_ray.config.patches import EXPERIMENT
from llem_ray.core.errors import ConfigError

_CONTAINERS: Final = ("base", "sweep", "zip", "experiments")


def locate(
    error: ConfigError, path: Path, *, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ
) -> ConfigError:
    """The error with the file and line, or the flag, that its field comes from; the same error where that cannot be told.

    Args:
        error: What was raised about a field such as ``engine.engine_args.lora.rank``.
        path: The sweep file, which ``load_sweep`` has read.
        overrides: As given to ``load_sweep``.
        environ: As given to ``load_sweep``.
    """
    if error.field is None or error.file is not None:
        return error
    return locator(path, overrides=overrides, environ=environ)(error)


def locator(
    path: Path, *, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ
) -> Callable[[ConfigError], ConfigError]:
    """``locate`` for errors to come, by the sweep file as it is now: while a long run goes on it may be edited or removed.

    Args:
        path: As of ``locate``.
        overrides: As of ``locate``.
        environ: As of ``locate``.
    """
    document = read_document(path, environ)
    apply_overrides(document, overrides, environ)
    return partial(_located, document)


def _located(document: Document, error: ConfigError) -> ConfigError:
    if error.field is None or error.file is not None:
        return error
    places = _places(document, error.field.split("."))
    if len(places) > 1:
        places = [where for where in places if error.found in _texts(_value_at(document, where))]
    if len(places) != 1:
        return error
    placed = document.error(places[0], error.message, found=error.found, allowed=error.allowed, hint=error.hint)
    placed.field = error.field
    return placed


def _places(document: Document, field: Sequence[str]) -> list[Where]:
    """Where the field is set, or where the closest field above it is."""
    best, places = 1, list[Where]()  # `engine` alone says nothing
    for where in (*document.lines, *document.flags):
        names = _names(where)
        length = len(names)
        if length < best or length > len(field) or names != list(field[:length]) or where in places:
            continue
        if length > best:
            best, places = length, []
        places.append(where)
    return [] if best < 2 else [where for where in places if not any(_is_inside(where, other) for other in places)]


def _names(where: Where) -> list[str]:
    """The field of an experiment, or of the top level, that stands there."""
    parts = [part for part in where if isinstance(part, str)]
    if parts and parts[0] in _CONTAINERS:
        parts = parts[1:]
        if len(parts) > 1 and parts[0].split(".")[0] not in EXPERIMENT.children:
            parts = parts[1:]  # the name of a dependent group
    return [name for part in parts for name in part.split(".")]


def _is_inside(where: Where, other: Where) -> bool:
    """An item of a list is of the same field as the list, which stands for it."""
    return where != other and where[: len(other)] == other


def _value_at(document: Document, where: Where) -> Any:
    value: Any = document.value
    for part in where:
        value = value[part]
    return value


def _texts(value: Any) -> tuple[str, ...]:
    """How errors show a value, or one of an axis's."""
    values = (value, *value) if isinstance(value, list) else (value,)
    return tuple(text for item in values for text in (str(item), repr(item), shorten(item)))
