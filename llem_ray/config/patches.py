"""Partial experiments as flat assignments, field path -> value, each knowing where it was written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final, NamedTuple, TypeAlias

from llem_ray.config.document import Document, Where, secret_error
from llem_ray.config.fields import Leaf, Path, Section, section_of, unknown_key
from llem_ray.core.identity import plain
from llem_ray.core.spec import Experiment

EXPERIMENT: Final = section_of(Experiment)
"""The tree of everything a cell may set."""

_SECRET_KEY: Final = re.compile(
    r"(hf_|hub_|access_|auth_|use_auth_|bearer_|api_|secret_)*(token|key)|.*(password|passwd|secret|credential|api_?key)s?",
    re.IGNORECASE,
)


class Assigned(NamedTuple):
    """A checked value and where it stands."""

    value: Any
    where: Where


Patch: TypeAlias = dict[Path, Assigned]


def read_patch(
    document: Document, where: Where, value: Any, at: Path = (), *, tree: Section = EXPERIMENT, dotted_keys: bool = True
) -> Patch:
    """Flatten and check a partial experiment, or a part of one that lies at ``at``.

    Keys may be nested or, with ``dotted_keys``, dotted (``workload.batch_size: 4``).

    Raises:
        ConfigError: A key is unknown, a value has the wrong type, a field is set twice, or a key asks for an access token.
    """
    patch: Patch = {}
    for path, item, origin in _walk(document, where, value, at, tree, dotted_keys):
        if path in patch:
            raise document.error(origin, f"{'.'.join(path)} is set twice")
        patch[path] = Assigned(item, origin)
    return patch


def _walk(
    document: Document, where: Where, value: Any, at: Path, tree: Section, dotted_keys: bool
) -> Iterator[tuple[Path, Any, Where]]:
    node = tree.find(at)
    if isinstance(node, Leaf) and node.open:
        yield from _open(document, where, value, at, node)
    elif isinstance(node, Leaf):
        yield at, node.check(document, where, value), where
    elif isinstance(node, Section):
        if value is not None and not isinstance(value, dict):
            allowed = f"a mapping of {', '.join(node.children)}"
            raise document.error(where, "expected a mapping", found=repr(value)[:60], allowed=allowed)
        for key, item in (value or {}).items():
            below = (*at, *key.split(".")) if dotted_keys else (*at, key)
            if tree.find(below) is None:
                error = unknown_key(document, (*where, key), key, node)
                if tree.find((*at, *key.split("."))) is not None:
                    error.hint = "dotted keys are for axes and partial experiments: nest it here"
                raise error
            yield from _walk(document, (*where, key), item, below, tree, dotted_keys)


def _open(document: Document, where: Where, value: Any, at: Path, leaf: Leaf) -> Iterator[tuple[Path, Any, Where]]:
    """Below an open mapping nothing is known: mappings merge key by key, all else is a value."""
    if at == leaf.path and value is not None and not isinstance(value, dict):
        raise document.error(where, "expected a mapping", found=repr(value)[:60], allowed="a mapping of the engine's arguments")
    if at != leaf.path and _SECRET_KEY.fullmatch(at[-1]) and value is not None and not isinstance(value, bool):
        raise secret_error(document, where)
    if isinstance(value, dict) and (value or at == leaf.path):
        for key, item in value.items():
            yield from _open(document, (*where, key), item, (*at, key), leaf)
    elif at != leaf.path:
        _refuse_secrets(document, where, value)
        yield at, value, where


def _refuse_secrets(document: Document, where: Where, value: Any) -> None:
    if isinstance(value, list):
        for i, item in enumerate(value):
            _refuse_secrets(document, (*where, i), item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if _SECRET_KEY.fullmatch(key):
                raise secret_error(document, (*where, key))
            _refuse_secrets(document, (*where, key), item)


def nested(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """Flat assignments as nested dicts; a later one replaces what it covers."""
    top: dict[str, Any] = {}
    for path, value in flat.items():
        node = top
        for part in path[:-1]:
            child = node.get(part)
            if not isinstance(child, dict):
                child = node[part] = {}
            node = child
        node[path[-1]] = value
    return top


def settings_of(patch: Patch) -> dict[str, Any]:
    """The patch's values by dotted key, for display; of a dataclass what differs from its defaults."""
    return {".".join(path): _shown(assigned.value) for path, assigned in patch.items()}


def _shown(value: Any) -> Any:
    if not is_dataclass(value) or isinstance(value, type):
        return value
    held = {item.name: getattr(value, item.name) for item in fields(value) if getattr(value, item.name) != item.default}
    return plain(held)
