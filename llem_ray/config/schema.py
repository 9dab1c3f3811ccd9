"""The sweep file's JSON Schema, for editors, and its reference table. Both are read off the dataclasses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import TypeAdapter

from llem_ray.config.fields import Leaf, Section, allowed_text
from llem_ray.config.file import TREE, SweepFile
from llem_ray.config.patches import EXPERIMENT

_VARIABLE: Final = {"type": "string", "pattern": r"\$\{", "description": "A variable of the environment: ${VAR:default}."}
_ENGINE_ARGS_KEY: Final = r"^engine\.engine_args\.."

_OWN_RULES: Final[Mapping[str, Mapping[str, Any]]] = {
    "base": {"$ref": "#/$defs/Experiment"},
    "sweep": {"$ref": "#/$defs/Axes"},
    "zip": {"type": "array", "items": {"$ref": "#/$defs/Axes"}},
    "experiments": {"type": "array", "items": {"$ref": "#/$defs/PartialExperiment"}},
    "exclude": {"type": "array", "items": {"$ref": "#/$defs/Rule"}},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldRow:
    """One line of the reference page."""

    key: str
    """Dotted key in the file."""
    type: str
    """What is allowed, in words."""
    default: str
    """As YAML, or ``required``."""
    description: str


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the sweep file. Each field of an experiment is defined once, under its dotted name."""
    top = TypeAdapter(SweepFile).json_schema()
    outside = {name: _with_variables(value) for name, value in top["$defs"].items()}
    leaves = {".".join(leaf.path): _or_variable(leaf.schema) for leaf in EXPERIMENT.leaves()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "llem-ray sweep",
        "description": top["description"],
        "type": "object",
        "required": top["required"],
        "additionalProperties": False,
        "properties": {
            name: {"description": value["description"], **_OWN_RULES[name]} if name in _OWN_RULES else _or_variable(value)
            for name, value in top["properties"].items()
        },
        "$defs": {
            **outside,
            **_nested_sections(),
            "Experiment": _section(EXPERIMENT),
            "PartialExperiment": _partial(),
            "Axes": _axes(),
            "Rule": _rule(),
            "Range": _short_form("range", 3, "[first, last, step]; last is included where a step meets it."),
            "PowersOfTwo": _short_form("pow2", 2, "Powers of two from first to last, both included."),
            **leaves,
        },
    }


def field_reference() -> list[FieldRow]:
    """Every field of the sweep file, in the order it is declared; an experiment's fields under ``base``."""
    rows: list[FieldRow] = []
    for name, child in TREE.children.items():
        if isinstance(child, Section):
            rows.extend(_row(".".join(leaf.path), leaf) for leaf in child.leaves())
        else:
            rows.append(_row(name, child))
        if name == "base":
            rows.extend(_experiment_rows())
    return rows


def _experiment_rows() -> list[FieldRow]:
    """Every field of an experiment; a mapping that several fields take is written out below the first."""
    rows: list[FieldRow] = []
    known: set[type] = set()
    for leaf in EXPERIMENT.leaves():
        rows.append(_row(f"base.{'.'.join(leaf.path)}", leaf))
        if leaf.shape is not None and leaf.shape.cls not in known:
            known.add(leaf.shape.cls)
            rows.extend(_row(f"base.{'.'.join(below.path)}", below) for below in leaf.shape.leaves())
    return rows


def _row(key: str, leaf: Leaf) -> FieldRow:
    empty = "{}" if leaf.open else "[]"
    default = "required" if leaf.required else json.dumps(leaf.schema["default"]) if "default" in leaf.schema else empty
    description = " ".join(str(leaf.schema.get("description", "")).split())
    return FieldRow(key=key, type=allowed_text(leaf.schema), default=default, description=description)


def _ref(node: Leaf | Section) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{'.'.join(node.path) if isinstance(node, Leaf) else node.cls.__name__}"}


def _section(section: Section) -> dict[str, Any]:
    properties = {name: _ref(child) for name, child in section.children.items()}
    return {"description": section.schema.get("description", ""), **_object(properties)}


def _nested_sections() -> dict[str, Any]:
    return {section.cls.__name__: _section(section) for section in _sections(EXPERIMENT)}


def _sections(section: Section) -> list[Section]:
    found: list[Section] = []
    for child in section.children.values():
        if isinstance(child, Section):
            found += [child, *_sections(child)]
    return found


def _dotted() -> dict[str, dict[str, Any]]:
    """Dotted key -> reference, of every section and field."""
    nodes: list[Leaf | Section] = [*_sections(EXPERIMENT), *EXPERIMENT.leaves()]
    return {".".join(node.path): _ref(node) for node in nodes}


def _partial() -> dict[str, Any]:
    """An experiment whose keys may be nested or dotted."""
    return {"description": "What differs from base; keys may be nested or dotted.", **_object(_dotted(), {_ENGINE_ARGS_KEY: {}})}


def _axes() -> dict[str, Any]:
    """Dotted fields with their values; any other name without a dot is a dependent group."""
    properties = {key: _axis(ref) for key, ref in _dotted().items()}
    group = {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/PartialExperiment"}}
    own_name = rf"^(?!({'|'.join(EXPERIMENT.children)})$)[^.]+$"
    described = {"description": "Dotted field -> values; a name of your own -> partial experiments."}
    return {**described, **_object(properties, {_ENGINE_ARGS_KEY: _axis({}), own_name: group})}


def _axis(values: Mapping[str, Any]) -> dict[str, Any]:
    plain_list = {"type": "array", "minItems": 1, "items": dict(values)}
    return {"anyOf": [plain_list, {"$ref": "#/$defs/PowersOfTwo"}, {"$ref": "#/$defs/Range"}]}


def _short_form(name: str, length: int, description: str) -> dict[str, Any]:
    numbers = {"type": "array", "items": _or_variable({"type": "number"}), "minItems": length, "maxItems": length}
    return {"description": description, "required": [name], **_object({name: numbers})}


def _rule() -> dict[str, Any]:
    """Conditions: each field with a value, or a list of values."""
    refs = {".".join(leaf.path): _ref(leaf) for leaf in EXPERIMENT.leaves()}
    properties = {key: {"anyOf": [ref, {"type": "array", "minItems": 1, "items": ref}]} for key, ref in refs.items()}
    described = {"description": "All fields must match for a cell to be dropped.", "minProperties": 1}
    return {**described, **_object(properties, {_ENGINE_ARGS_KEY: {}})}


def _object(properties: Mapping[str, Any], patterns: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A mapping of these keys and no others."""
    keys = {"properties": dict(properties)} | ({"patternProperties": dict(patterns)} if patterns else {})
    return {"type": "object", **keys, "additionalProperties": False}


def _with_variables(definition: Mapping[str, Any]) -> dict[str, Any]:
    properties = {name: _or_variable(value) for name, value in definition["properties"].items()}
    return {**definition, "properties": properties}


def _or_variable(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a value that a variable may stand for, unless it takes text anyway or is a section."""
    options = schema.get("anyOf", [schema])
    takes_text = any(option.get("type") == "string" and not {"enum", "const", "pattern"} & option.keys() for option in options)
    if takes_text or "$ref" in schema or schema.get("type") == "object":
        return {key: value for key, value in schema.items() if key != "title"}
    kept = {key: schema[key] for key in ("description", "default") if key in schema}
    inner = [{key: value for key, value in option.items() if key not in (*kept, "title")} for option in options]
    return {**kept, "anyOf": [*inner, _VARIABLE]}
