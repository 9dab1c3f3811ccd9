"""Content hashes: what makes two experiments, two loads or two runs the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final

from llem_ray.core.spec import EngineSpec, Experiment, ModelSpec
from llem_ray.core.spec_fields import HASHED_IF_SET

_SCALARS: Final = frozenset({str, int, float, bool, type(None)})
_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def plain(value: Any, *, hashed: bool = False) -> Any:
    """Dataclasses and mappings as dicts, tuples as lists: what JSON can hold.

    Args:
        value: What is to be told.
        hashed: Leave out the fields that are marked to be hashed only where they differ from their default.
    """
    if type(value) in _SCALARS:
        return value
    if is_dataclass(value) and not isinstance(value, type):
        kept = {item.name: (getattr(value, item.name), item) for item in fields(value)}
        return {
            name: plain(inner, hashed=hashed)
            for name, (inner, item) in kept.items()
            if not (hashed and HASHED_IF_SET in item.metadata and inner == item.default)
        }
    if isinstance(value, Mapping):
        return {str(key): plain(item, hashed=hashed) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, hashed=hashed) for item in value]
    return value


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. Fields that came later count only where they are set.

    Raises:
        ValueError: A number is not finite.
        TypeError: Something is not a dataclass, mapping, list, text, number, bool or None.
    """
    return _ENCODER.encode(plain(value, hashed=True))


def digest(text: str, hex_digits: int) -> str:
    """The first hex digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:hex_digits]


def cell_id(experiment: Experiment) -> str:
    """16 hex digits over every field of the experiment, defaults included, but for those added later. Paths count as written."""
    return digest(canonical_json(experiment), 16)


def load_key(model: ModelSpec, engine: EngineSpec, *, online: bool = False) -> str:
    """16 hex digits over all that needs another load: model, backend, device, parallelism, engine args, serving online."""
    key = {"model": model, "engine": engine} | ({"online": True} if online else {})
    return digest(canonical_json(key), 16)
