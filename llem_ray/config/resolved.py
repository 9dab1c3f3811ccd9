"""A resolved sweep as text: what a run directory keeps, and what resume reads instead of the sweep file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from llem_ray.config.document import shorten
from llem_ray.config.fields import Section
from llem_ray.config.file import SCHEMA_VERSION
from llem_ray.config.patches import EXPERIMENT
from llem_ray.core.errors import ConfigError
from llem_ray.core.identity import plain
from llem_ray.core.measure_spec import FootprintSpec, MeasureSpec, StoppingSpec
from llem_ray.core.spec import Cell, DroppedCell, Experiment, Rates, Sweep

_SECTIONS: Final = {name: child.cls for name, child in EXPERIMENT.children.items() if isinstance(child, Section)}
_SCALARS: Final = ("schema_version", "name", "repeats", "order", "seed", "base_dir")


def dump_sweep(sweep: Sweep) -> str:
    """The sweep as JSON, a line for every section and cell. Equal sweeps give equal text.

    ``specs`` lists the distinct sections; each cell names its sections by their number there.
    """
    specs: dict[str, dict[str, int]] = {name: {} for name in _SECTIONS}
    lines: dict[int, int] = {}
    cells: list[str] = []
    for cell in sweep.cells:
        row: dict[str, Any] = {"cell_id": cell.cell_id}
        for name, known in specs.items():
            section = getattr(cell.experiment, name)
            if id(section) not in lines:
                lines[id(section)] = known.setdefault(_line(plain(section)), len(known))
            row[name] = lines[id(section)]
        cells.append(_line({**row, "settings": plain(cell.settings)}))
    parts = [f'"{name}": {_line(getattr(sweep, name))}' for name in _SCALARS]
    parts += [f'"measure": {_line(plain(sweep.measure))}', f'"rates": {_line(plain(sweep.rates))}']
    if sweep.stopping != StoppingSpec():
        parts.append(f'"stopping": {_line(plain(sweep.stopping))}')
    if sweep.footprint != FootprintSpec():
        parts.append(f'"footprint": {_line(plain(sweep.footprint))}')
    parts.append('"specs": {\n' + ",\n".join(f'"{name}": {_block(known)}' for name, known in specs.items()) + "\n}")
    parts.append(f'"cells": {_block(cells)}')
    parts.append(f'"dropped": {_block(_line(plain(cell)) for cell in sweep.dropped)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def load_resolved(text: str) -> Sweep:
    """The sweep that ``dump_sweep`` wrote. Cell ids are kept as they are, also those of an older llem-ray.

    Raises:
        ConfigError: It is not such a text, or one of another schema version.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"the resolved sweep is not JSON: {error}") from error
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
        found = shorten(data.get("schema_version")) if isinstance(data, dict) else shorten(data)
        raise ConfigError("not a resolved sweep of this schema version", found=found, allowed=str(SCHEMA_VERSION))
    try:
        specs = {name: _checked(list[cls], data["specs"][name]) for name, cls in _SECTIONS.items()}  # type: ignore[valid-type]
        return Sweep(
            **{name: data[name] for name in _SCALARS},
            measure=_checked(MeasureSpec, data["measure"]),
            rates=_checked(Rates, data["rates"]),
            stopping=_checked(StoppingSpec, data.get("stopping", {})),
            footprint=_checked(FootprintSpec, data.get("footprint", {})),
            cells=tuple(_cell(row, specs) for row in data["cells"]),
            dropped=tuple(DroppedCell(settings=row["settings"], reason=row["reason"]) for row in data["dropped"]),
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            "the resolved sweep is broken", field=field, found=shorten(first["input"]), allowed=first["msg"]
        ) from error
    except (KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"the resolved sweep is broken: {type(error).__name__}: {error}") from error


def _cell(row: Mapping[str, Any], specs: Mapping[str, list[Any]]) -> Cell:
    experiment = Experiment(**{name: known[row[name]] for name, known in specs.items()})
    return Cell(cell_id=row["cell_id"], experiment=experiment, settings=row["settings"])


def _checked(hint: Any, data: Any) -> Any:
    return TypeAdapter(hint).validate_json(json.dumps(data), strict=True)


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _block(lines: Iterable[str]) -> str:
    return "[" + ",".join(f"\n{line}" for line in lines) + "\n]"
