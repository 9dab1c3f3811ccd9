"""A Plan as plain data and back: what ``plan --json`` prints and a run directory keeps.

Cells refer to their sections by number, since 100,000 cells have few distinct models, engines and samplings.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final, get_args, get_type_hints

from llem_ray.core.errors import PlanError
from llem_ray.core.identity import plain
from llem_ray.core.measure_spec import FootprintSpec, MeasureSpec, StoppingSpec
from llem_ray.core.plan import Estimate, LoadGroup, Plan, Trial
from llem_ray.core.spec import Cell, DroppedCell, Experiment

PLAN_SCHEMA_VERSION: Final = 1

_SECTIONS: Final[Mapping[str, type]] = {
    item.name: get_type_hints(Experiment)[item.name] for item in dataclasses.fields(Experiment)
}


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as dicts, lists, text and numbers.

    ``specs`` lists the distinct sections; ``cells`` maps cell id to the number of each of its sections and to its settings;
    ``groups`` lists the model loads in run order, each with its trials in run order.
    """
    specs: dict[str, list[Any]] = {name: [] for name in _SECTIONS}
    numbers: dict[int, int] = {}
    cells: dict[str, Any] = {}
    for group in plan.groups:
        for trial in group.trials:
            if trial.cell.cell_id not in cells:
                cells[trial.cell.cell_id] = _cell_to_dict(trial.cell, specs, numbers)
    return {
        "schema_version": PLAN_SCHEMA_VERSION,
        "name": plan.name,
        "run_hash": plan.run_hash,
        "counts": {"cells": len(cells), "trials": len(plan.trials), "loads": len(plan.groups), "dropped": len(plan.dropped)},
        "estimate": plain(plan.estimate),
        "repeats": plan.repeats,
        "order": plan.order,
        "seed": plan.seed,
        "base_dir": plan.base_dir,
        "measure": plain(plan.measure),
        "stopping": plain(plan.stopping),
        "footprint": plain(plan.footprint),
        "specs": specs,
        "cells": cells,
        "groups": [_group_to_dict(group) for group in plan.groups],
        "dropped": [plain(cell) for cell in plan.dropped],
    }


def plan_from_dict(data: Mapping[str, Any]) -> Plan:
    """The plan that ``plan_to_dict`` made ``data`` from; JSON may lie in between.

    Raises:
        PlanError: It is no such record, or one of another schema version.
    """
    version = data.get("schema_version")
    if version != PLAN_SCHEMA_VERSION:
        raise PlanError(f"the plan has schema version {version!r}, this llem-ray reads {PLAN_SCHEMA_VERSION}")
    try:
        specs = {name: [_made(cls, item) for item in data["specs"][name]] for name, cls in _SECTIONS.items()}
        cells = {cell_id: _cell_from_dict(cell_id, item, specs) for cell_id, item in data["cells"].items()}
        return Plan(
            name=data["name"],
            run_hash=data["run_hash"],
            groups=tuple(_group_from_dict(item, cells) for item in data["groups"]),
            dropped=tuple(_made(DroppedCell, item) for item in data["dropped"]),
            repeats=data["repeats"],
            order=data["order"],
            seed=data["seed"],
            measure=_made(MeasureSpec, data["measure"]),
            estimate=_made(Estimate, data["estimate"]),
            base_dir=data["base_dir"],
            stopping=_made(StoppingSpec, data.get("stopping", {})),
            footprint=_made(FootprintSpec, data.get("footprint", {})),
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise PlanError(f"the plan's record is broken: {type(error).__name__}: {error}") from error


def _cell_to_dict(cell: Cell, specs: dict[str, list[Any]], numbers: dict[int, int]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, known in specs.items():
        section = getattr(cell.experiment, name)
        if id(section) not in numbers:
            numbers[id(section)] = len(known)
            known.append(plain(section))
        row[name] = numbers[id(section)]
    row["settings"] = plain(cell.settings)
    return row


def _group_to_dict(group: LoadGroup) -> dict[str, Any]:
    trials = [{"trial_id": trial.trial_id, "cell_id": trial.cell.cell_id, "repeat": trial.repeat} for trial in group.trials]
    return {"load_key": group.load_key, "gpus": group.gpus, "trials": trials}


def _cell_from_dict(cell_id: str, item: Mapping[str, Any], specs: Mapping[str, Sequence[Any]]) -> Cell:
    sections = {name: known[item[name]] for name, known in specs.items()}
    return Cell(cell_id=cell_id, experiment=Experiment(**sections), settings=item["settings"])


def _group_from_dict(item: Mapping[str, Any], cells: Mapping[str, Cell]) -> LoadGroup:
    trials = tuple(Trial(trial_id=row["trial_id"], cell=cells[row["cell_id"]], repeat=row["repeat"]) for row in item["trials"])
    return LoadGroup(load_key=item["load_key"], trials=trials, gpus=item["gpus"])


def _made(cls: type, data: Mapping[str, Any]) -> Any:
    """A dataclass from its dict: nested dataclasses likewise, lists where a tuple is declared as tuples."""
    hints = _hints(cls)
    return cls(**{name: _value(hints[name], value) for name, value in data.items()})


@functools.cache
def _hints(cls: type) -> Mapping[str, Any]:
    return get_type_hints(cls)


def _value(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _made(hint, value)
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict):
        for part in get_args(hint):
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                return _made(part, value)
    return value
