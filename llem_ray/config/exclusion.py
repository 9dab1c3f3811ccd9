"""Exclude rules: which cells of the grid are dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llem_ray.config.document import Document, Where
from llem_ray.config.fields import Leaf, Path, Section, unknown_key
from llem_ray.config.patches import EXPERIMENT
from llem_ray.core.identity import plain


@dataclass(frozen=True, slots=True)
class Rule:
    """Conditions that must all hold. A field holds when it equals any of its values."""

    where: Where
    conditions: Mapping[Path, tuple[Any, ...]]
    text: str

    def matches(self, section: str, resolved: Mapping[str, Any]) -> bool:
        """Whether the conditions on this section hold; true where there are none."""
        return all(
            any(_equal(_at(resolved, path[1:]), value) for value in values)
            for path, values in self.conditions.items()
            if path[0] == section
        )


def read_rules(document: Document, items: Sequence[Mapping[str, Any]]) -> list[Rule]:
    """The rules under ``exclude``.

    Raises:
        ConfigError: A rule is empty, a field is unknown, or a value has the wrong type for its field.
    """
    return [_rule(document, ("exclude", i), item) for i, item in enumerate(items)]


def _rule(document: Document, where: Where, item: Mapping[str, Any]) -> Rule:
    if not item:
        raise document.error(where, "this rule is empty", allowed="dotted fields with a value or a list of values")
    conditions: dict[Path, tuple[Any, ...]] = {}
    for key, value in item.items():
        path = tuple(key.split("."))
        leaf = EXPERIMENT.find(path)
        if leaf is None:
            raise unknown_key(document, (*where, key), key, EXPERIMENT)
        if isinstance(leaf, Section):
            fields = ", ".join(f"{key}.{name}" for name in leaf.children)
            raise document.error((*where, key), f"{key} is a section, not a field", allowed=fields)
        values = value if isinstance(value, list) else [value]
        if not values:
            raise document.error((*where, key), "no value to match", found="[]", allowed="at least one value")
        conditions[path] = tuple(_typed(document, (*where, key), leaf, path, one) for one in values)
    text = " and ".join(f"{key}={value}" for key, value in item.items())
    return Rule(where, conditions, text)


def _typed(document: Document, where: Where, leaf: Leaf, path: Path, value: Any) -> Any:
    return value if leaf.open and path != leaf.path else plain(leaf.check(document, where, value))


def _at(resolved: Mapping[str, Any], path: Path) -> Any:
    node: Any = resolved
    for part in path:
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _equal(first: Any, second: Any) -> bool:
    return bool(first == second) and isinstance(first, bool) == isinstance(second, bool)
