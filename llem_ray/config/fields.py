"""The fields of a sweep file as a tree, read off the core dataclasses: lookup, type checks, "did you mean"."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any, TypeAlias, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from llem_ray.config.document import Document, Where, shorten
from llem_ray.core.errors import ConfigError

Path: TypeAlias = tuple[str, ...]
"""Field names from the top of a tree; keys below an open mapping included."""


@dataclass(frozen=True)
class Leaf:
    """A field that holds a value."""

    path: Path
    hint: Any
    schema: Mapping[str, Any]
    """JSON Schema of the field: type, default, description."""
    required: bool
    shape: Section | None = None
    """The dataclass that a mapping stands for here, where the field also takes plain values."""

    @cached_property
    def open(self) -> bool:
        """A mapping with any keys."""
        return get_origin(self.hint) in (dict, Mapping)

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.hint)

    def parse(self, value: Any) -> Any:
        """The value in the field's own type (1 becomes 1.0 where a number is asked for).

        Raises:
            ValidationError: It has another type, or is out of range.
        """
        return self._adapter.validate_json(json.dumps(value), strict=True)

    def check(self, document: Document, where: Where, value: Any) -> Any:
        """As ``parse``, with the error of this place.

        Raises:
            ConfigError: The value has another type, or is out of range.
        """
        try:
            return self.parse(value)
        except ValidationError:
            if self.shape is not None and isinstance(value, dict):
                _check_mapping(document, where, self.shape, value)
            allowed = allowed_text(self.schema)
            message = f"wrong value for {self.path[-1]}"
            raise document.error(where, message, found=shorten(value), allowed=allowed) from None


@dataclass(frozen=True)
class Section:
    """A dataclass of fields."""

    path: Path
    cls: type
    schema: Mapping[str, Any]
    children: Mapping[str, Leaf | Section] = field(default_factory=dict)

    def find(self, path: Iterable[str]) -> Leaf | Section | None:
        """What lies at ``path``; the open mapping itself for any key below one."""
        node: Leaf | Section = self
        for part in path:
            if isinstance(node, Leaf):
                return node if node.open else None
            if part not in node.children:
                return None
            node = node.children[part]
        return node

    def leaves(self) -> list[Leaf]:
        """All fields below, in the order they are declared."""
        found: list[Leaf] = []
        for child in self.children.values():
            found.extend([child] if isinstance(child, Leaf) else child.leaves())
        return found


def section_of(cls: type, path: Path = ()) -> Section:
    """The tree of a dataclass and of the dataclasses in it."""
    schema = TypeAdapter(cls).json_schema()
    return _section(cls, path, schema, schema.get("$defs", {}))


def _section(cls: type, path: Path, schema: Mapping[str, Any], defs: Mapping[str, Any]) -> Section:
    hints = get_type_hints(cls, include_extras=True)
    children: dict[str, Leaf | Section] = {}
    for item in fields(cls):
        hint, below = hints[item.name], (*path, item.name)
        entry = schema["properties"][item.name]
        if is_dataclass(hint) and isinstance(hint, type):
            children[item.name] = _section(hint, below, {**defs[hint.__name__], **_described(entry)}, defs)
        else:
            required = item.default is MISSING and item.default_factory is MISSING
            shapes = [part for part in get_args(hint) if is_dataclass(part) and isinstance(part, type)]
            shape = _section(shapes[0], below, defs[shapes[0].__name__], defs) if shapes else None
            children[item.name] = Leaf(below, hint, _inlined(entry, defs), required, shape)
    return Section(path, cls, schema, children)


def _inlined(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with the dataclasses it refers to written out."""
    whole = {**defs[schema["$ref"].rsplit("/", maxsplit=1)[-1]], **schema} if "$ref" in schema else dict(schema)
    whole.pop("$ref", None)
    if "anyOf" in whole:
        whole["anyOf"] = [_inlined(option, defs) for option in whole["anyOf"]]
    return whole


def _check_mapping(document: Document, where: Where, shape: Section, value: Mapping[str, Any]) -> None:
    """Find out what is wrong with a mapping that stands for a dataclass.

    Raises:
        ConfigError: A key is unknown or missing, or its value has another type.
    """
    for key, item in value.items():
        child = shape.children.get(key)
        if not isinstance(child, Leaf):
            raise unknown_key(document, (*where, key), key, shape)
        child.check(document, (*where, key), item)
    for name, child in shape.children.items():
        if isinstance(child, Leaf) and child.required and name not in value:
            raise document.error((*where, name), f"{name} is missing", allowed=allowed_text(child.schema))


def _described(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": entry["description"]} if "description" in entry else {}


def allowed_text(schema: Mapping[str, Any]) -> str:
    """What a JSON Schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(allowed_text(option) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(str(option) for option in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    words = {
        "integer": "integer",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
        "object": "mapping",
        "array": "list",
    }
    text = words.get(schema.get("type", ""), "any value")
    if text == "mapping" and "properties" in schema:
        text = f"mapping of {', '.join(schema['properties'])}"
    if text == "list" and "items" in schema:
        text = f"{'non-empty ' if schema.get('minItems') else ''}list of {allowed_text(schema['items'])}"
    signs = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    bounds = " and ".join(f"{sign} {schema[name]:g}" for name, sign in signs if name in schema)
    pattern = f"matching {schema['pattern']}" if "pattern" in schema else ""
    return " ".join(part for part in (text, bounds, pattern) if part)


def closest(word: str, known: Iterable[str]) -> str | None:
    """``did you mean ...?``, or None where nothing is near."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if not near:
        near = [name for name in names if name.rsplit(".", maxsplit=1)[-1] == word.rsplit(".", maxsplit=1)[-1]][:1]
    return f"did you mean {near[0]!r}?" if near else None


def unknown_key(document: Document, where: Where, key: str, section: Section, extra: Iterable[str] = ()) -> ConfigError:
    """The error for a key, plain or dotted, that ``section`` does not have. Lists what the part of it that exists has."""
    parts = key.split(".")
    while len(parts) > 1 and isinstance(child := section.children.get(parts[0]), Section):
        section, parts = child, parts[1:]
    prefix = key[: len(key) - len(".".join(parts))]
    known = [f"{prefix}{name}" for name in section.children]
    below = [prefix + ".".join(leaf.path[len(section.path) :]) for leaf in section.leaves()]
    hint = closest(key, below) or closest(key, known) if len(parts) > 1 or prefix else closest(key, known) or closest(key, below)
    return document.error(where, f"unknown key {key!r}", allowed=", ".join([*known, *extra]), hint=hint)
