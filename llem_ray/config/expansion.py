"""Axes and explicit experiments to cells.

Cells repeat their sections: 100,000 cells of a grid have few distinct models, engines and samplings. Each distinct section
is built, checked, written as canonical JSON and matched against the exclude rules once; a cell is four look-ups and a hash.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llem_ray.config.axes import Axis
from llem_ray.config.document import Document, Where, dotted
from llem_ray.config.exclusion import Rule
from llem_ray.config.fields import Section
from llem_ray.config.file import build
from llem_ray.config.patches import EXPERIMENT, Assigned, Patch, nested, settings_of
from llem_ray.config.rules import broken_rule, implied
from llem_ray.config.workload_rules import Broken
from llem_ray.core.identity import canonical_json, digest, plain
from llem_ray.core.spec import Cell, DroppedCell, Experiment

_SECTIONS = tuple(child for child in EXPERIMENT.children.values() if isinstance(child, Section))
_BY_NAME = sorted(range(len(_SECTIONS)), key=lambda i: _SECTIONS[i].path[-1])


@dataclass(frozen=True, slots=True)
class _Built:
    """One distinct section of an experiment."""

    spec: Any
    canonical: str
    broken: Broken | None
    matching: int
    """Bit i: every condition that exclude rule i has on this section holds."""


class Expanded(NamedTuple):
    """Cells in the order of the grid, explicit experiments last; and what was dropped."""

    cells: list[Cell]
    dropped: list[DroppedCell]


class Expansion:
    """Expands one sweep file."""

    def __init__(self, document: Document, base: Patch, rules: Sequence[Rule]) -> None:
        self._document = document
        self._base = base
        self._rules = rules
        self._distinct: dict[tuple[str, str], _Built] = {}
        self._cells: dict[str, Cell] = {}
        self._dropped: list[DroppedCell] = []
        self._hits = [0] * len(rules)

    def expand(self, axes: Sequence[Axis], experiments: Sequence[Patch]) -> Expanded:
        """The grid of ``axes`` (``base`` alone without any), less what rules exclude, then ``experiments``.

        Raises:
            ConfigError: A cell breaks a rule between fields, an exclude rule matches nothing, or no cell is left.
        """
        if axes or not experiments:
            self._grid(axes, excludable=True)
        for rule, hits in zip(self._rules, self._hits, strict=True):
            if not hits:
                raise self._document.error(
                    rule.where,
                    "this exclude rule matches no cell of the grid",
                    found=rule.text,
                    hint="fields are compared after defaults are filled in; explicit experiments are never excluded",
                )
        if experiments:
            self._grid([Axis(("experiments",), tuple(experiments))], excludable=False)
        if not self._cells:
            message = f"the sweep expands to nothing: all {len(self._dropped):,} cells are excluded"
            raise self._document.error(("exclude",), message, allowed="at least one cell")
        return Expanded(list(self._cells.values()), self._dropped)

    def _grid(self, axes: Sequence[Axis], *, excludable: bool) -> None:
        settings = [[settings_of(point) for point in axis.points] for axis in axes]
        for indices, sections in self._combinations(axes):
            chosen: dict[str, Any] = {}
            for i, index in enumerate(indices):
                chosen |= settings[i][index]
            matching = -1
            for built in sections:
                matching &= built.matching
            if excludable and self._rules and matching:
                number = (matching & -matching).bit_length() - 1
                for i in range(len(self._rules)):
                    self._hits[i] += matching >> i & 1
                self._dropped.append(DroppedCell(settings=chosen, reason=f"excluded: {self._rules[number].text}"))
                continue
            for built in sections:
                if built.broken is not None:
                    raise self._broken(built.broken, axes, indices, chosen)
            self._add(sections, chosen)

    def _add(self, sections: Sequence[_Built], settings: Mapping[str, Any]) -> None:
        inner = ",".join(f'"{_SECTIONS[i].path[-1]}":{sections[i].canonical}' for i in _BY_NAME)
        cell_id = digest(f"{{{inner}}}", 16)
        first = self._cells.get(cell_id)
        if first is not None:
            reason = f"equals cell {cell_id} ({_listed(first.settings) or 'base'})"
            self._dropped.append(DroppedCell(settings=settings, reason=reason))
            return
        specs = {section.path[-1]: built.spec for section, built in zip(_SECTIONS, sections, strict=True)}
        self._cells[cell_id] = Cell(cell_id=cell_id, experiment=Experiment(**specs), settings=settings)

    def _combinations(self, axes: Sequence[Axis]) -> Iterator[tuple[tuple[int, ...], list[_Built]]]:
        """Every combination of the axes' points, the last axis fastest, with the sections it makes."""
        names = [section.path[0] for section in _SECTIONS]
        touching = [
            [i for i, axis in enumerate(axes) if any(path[0] == name for point in axis.points for path in point)]
            for name in names
        ]
        made: list[dict[tuple[int, ...], _Built]] = [{} for _ in names]
        for indices in itertools.product(*(range(len(axis.points)) for axis in axes)):
            sections: list[_Built] = []
            for number, involved in enumerate(touching):
                key = tuple([indices[i] for i in involved])
                built = made[number].get(key)
                if built is None:
                    points = [axes[i].points[indices[i]] for i in involved]
                    built = made[number][key] = self._section(_SECTIONS[number], points)
                sections.append(built)
            yield indices, sections

    def _section(self, section: Section, points: Sequence[Patch]) -> _Built:
        name = section.path[0]
        flat = {path[1:]: item.value for patch in (self._base, *points) for path, item in patch.items() if path[0] == name}
        values = implied(name, nested(flat))
        spec = build(section, values)
        canonical = canonical_json(spec)
        built = self._distinct.get((name, canonical))
        if built is None:
            resolved = plain(spec) if self._rules else {}
            matching = sum(rule.matches(name, resolved) << i for i, rule in enumerate(self._rules))
            built = self._distinct[name, canonical] = _Built(spec, canonical, broken_rule(spec), matching)
        return built

    def _broken(self, broken: Broken, axes: Sequence[Axis], indices: Sequence[int], settings: Mapping[str, Any]) -> Exception:
        where: Where = ("base", *broken.path)
        for patch in (self._base, *(axis.points[index] for axis, index in zip(axes, indices, strict=True))):
            for path, assigned in patch.items():
                if path[: len(broken.path)] == broken.path:
                    where = assigned.where
                elif path == broken.path[: len(path)]:
                    where = (*assigned.where, *broken.path[len(path) :])
        cell = f"in the cell {_listed(settings)}" if settings else None
        found = ", ".join(part for part in (broken.found, cell) if part) or None
        message = f"{broken.message} ({dotted(broken.path)})"
        return self._document.error(where, message, found=found, allowed=broken.allowed, hint=broken.hint)


def check_size(document: Document, axes: Sequence[Axis], experiments: Sequence[Patch], limit: int) -> None:
    """Refuse a sweep of more than ``limit`` cells before any is made.

    Raises:
        ConfigError: It has more.
    """
    count = len(experiments) + (math.prod(len(axis.points) for axis in axes) if axes or not experiments else 0)
    if count > limit:
        parts = [f"{dotted(axis.where)}: {len(axis.points):,}" for axis in axes]
        parts += [f"experiments: {len(experiments):,}"] if experiments else []
        raise document.error(
            (max(axes, key=lambda axis: len(axis.points)).where) if axes else ("experiments",),
            "the sweep expands to too many cells",
            found=f"{count:,} cells ({', '.join(parts)})",
            allowed=f"up to {limit:,}",
            hint=f"raise it with max_cells: {count} if this is meant",
        )


def refuse_hidden_overrides(document: Document, axes: Sequence[Axis], experiments: Sequence[Patch]) -> None:
    """Refuse a ``--set`` on a base field that an axis or experiment sets anyway.

    Raises:
        ConfigError: The flag would have no effect, or only in some cells.
    """
    points: list[tuple[Where, Patch]] = [(axis.where, point) for axis in axes for point in axis.points]
    points += [(("experiments", i), patch) for i, patch in enumerate(experiments)]
    for flagged in document.flags:
        if flagged[0] != "base":
            continue
        path = tuple(str(part) for part in flagged[1:])
        for where, point in points:
            if any(_covers(set_path, path) for set_path in point):
                key = ".".join(path)
                hint = f"set the axis: --set 'sweep.{key}=[...]'" if where == ("sweep", key) else None
                raise document.error(flagged, f"{dotted(where)} sets {key} in the cells", found=_found(point, path), hint=hint)


def _covers(first: tuple[str, ...], second: tuple[str, ...]) -> bool:
    shorter = min(len(first), len(second))
    return first[:shorter] == second[:shorter]


def _found(point: Patch, path: tuple[str, ...]) -> str:
    matching = {key: Assigned(item.value, item.where) for key, item in point.items() if _covers(key, path)}
    return _listed(settings_of(matching))


def _listed(settings: Mapping[str, Any]) -> str:
    return shorten_list(f"{key}={value}" for key, value in settings.items())


def shorten_list(parts: Iterator[str] | Sequence[str]) -> str:
    """Parts joined by commas, cut to a readable length."""
    text = ", ".join(parts)
    return text if len(text) <= 200 else f"{text[:197]}..."
