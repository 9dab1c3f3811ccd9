"""Content hashes: what makes two experiments, two loads or two runs the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from typing import Any, Final

from llem_ray.core.spec import EngineSpec, Experiment, ModelSpec

_SCALARS: Final = frozenset({str, int, float, bool, type(None)})
_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """Dataclasses and mappings as dicts, tuples as lists: what JSON can hold."""
    if type(value) in _SCALARS:
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. Fields marked ``ADDED`` are left out at their default.

    Raises:
        ValueError: A number is not finite.
        TypeError: Something is not a dataclass, mapping, list, text, number, bool or None.
    """
    return _ENCODER.encode(_identity(value))


def _identity(value: Any) -> Any:
    if type(value) in _SCALARS:
        return value
    if is_dataclass(value) and not isinstance(value, type):
        held = ((item, getattr(value, item.name)) for item in fields(value))
        return {item.name: _identity(found) for item, found in held if not _is_unused(item, found)}
    if isinstance(value, Mapping):
        return {str(key): _identity(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_identity(item) for item in value]
    return value


def _is_unused(item: Field[Any], found: Any) -> bool:
    return "added" in item.metadata and found == item.default


def digest(text: str, hex_digits: int) -> str:
    """The first hex digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:hex_digits]


def cell_id(experiment: Experiment) -> str:
    """16 hex digits over every field of the experiment, defaults included. Paths count as written, not what they hold."""
    return digest(canonical_json(experiment), 16)


def load_key(model: ModelSpec, engine: EngineSpec) -> str:
    """16 hex digits over all that needs another load when it changes: model, backend, device, parallelism, engine args."""
    return digest(canonical_json({"model": model, "engine": engine}), 16)
