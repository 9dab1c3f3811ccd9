"""Content hashes: what makes two experiments, two loads or two runs the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
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
    """JSON with sorted keys and no spaces: equal values give equal text.

    Raises:
        ValueError: A number is not finite.
        TypeError: Something is not a dataclass, mapping, list, text, number, bool or None.
    """
    return _ENCODER.encode(plain(value))


def digest(text: str, hex_digits: int) -> str:
    """The first hex digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:hex_digits]


def cell_id(experiment: Experiment) -> str:
    """16 hex digits over every field of the experiment, defaults included. Paths count as written, not what they hold."""
    return digest(canonical_json(experiment), 16)


def load_key(model: ModelSpec, engine: EngineSpec) -> str:
    """16 hex digits over all that needs another load when it changes: model, backend, device, parallelism, engine args."""
    return digest(canonical_json({"model": model, "engine": engine}), 16)
