"""A sweep file to a Sweep."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from llem_ray.config.axes import read_axes, read_experiments
from llem_ray.config.document import Document, dotted, read_document
from llem_ray.config.exclusion import read_rules
from llem_ray.config.expansion import Expansion, check_size, refuse_hidden_overrides
from llem_ray.config.file import NAME_PATTERN, SweepFile, read_top_level
from llem_ray.config.footprint import check_footprint
from llem_ray.config.overrides import apply_overrides
from llem_ray.config.patches import read_patch
from llem_ray.config.rules import broken_measure, broken_window
from llem_ray.core.measure_spec import MeasureSpec, StoppingSpec
from llem_ray.core.spec import Cell, Sweep


def load_sweep(path: Path, *, overrides: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> Sweep:
    """Read, check and expand a sweep file.

    Args:
        path: The YAML file. Relative paths in it start from its folder and stay as they are written.
        overrides: ``key=value`` of each ``--set``.
        environ: Where ``${VAR}`` is looked up.

    Raises:
        ConfigError: The first thing that is wrong with it, with file, line, field, what was found and what is allowed.
    """
    document = read_document(path, environ)
    apply_overrides(document, overrides, environ)
    file = read_top_level(document)
    _check_stopping(document, file)
    check_footprint(document, file.footprint)
    base = read_patch(document, ("base",), file.base, dotted_keys=False)
    axes = read_axes(document, file)
    experiments = read_experiments(document, file)
    rules = read_rules(document, file.exclude)
    refuse_hidden_overrides(document, axes, experiments)
    check_size(document, axes, experiments, file.max_cells)
    expanded = Expansion(document, base, rules).expand(axes, experiments)
    _check_measure(document, file.measure, expanded.cells)
    return Sweep(
        name=file.name or _name_from(path, document),
        schema_version=file.schema_version,
        cells=tuple(expanded.cells),
        dropped=tuple(expanded.dropped),
        repeats=file.repeats,
        order=file.order,
        seed=file.seed,
        measure=file.measure,
        rates=file.rates,
        stopping=file.stopping,
        footprint=file.footprint,
        base_dir=str(path.resolve().parent),
    )


def _check_measure(document: Document, measure: MeasureSpec, cells: Sequence[Cell]) -> None:
    """Refuse what the measure section cannot ask for, of itself or of a cell's workload."""
    alone = broken_measure(measure)
    if alone is not None:
        raise document.error(alone.path, alone.message, hint=alone.hint)
    for cell in {id(cell.experiment.workload): cell for cell in cells}.values():
        broken = broken_window(measure, cell.experiment.workload)
        if broken is not None:
            where = broken.path if broken.path[0] == "measure" else ("base", *broken.path)
            found = ", ".join(f"{key}={value}" for key, value in cell.settings.items())
            message = f"{broken.message} ({dotted(broken.path)})"
            raise document.error(where, message, found=f"in the cell {found}" if found else None, hint=broken.hint)


def _check_stopping(document: Document, file: SweepFile) -> None:
    """Rules between `repeats`, `stopping` and `measure`."""
    stopping = file.stopping
    if stopping.half_width_rel is None:
        if stopping != StoppingSpec():
            raise document.error(("stopping",), "without a target nothing is stopped", hint="set stopping.half_width_rel: 0.02")
        return
    if file.repeats < stopping.first:
        raise document.error(
            ("repeats",),
            "repeats is the most that a cell may get, and fewer than stopping.first",
            found=str(file.repeats),
            allowed=f"{stopping.first} and more",
        )
    if stopping.budget_s is not None and stopping.budget_s < file.measure.min_window_s:
        raise document.error(
            ("stopping", "budget_s"),
            "the budget is smaller than one repeat",
            found=f"{stopping.budget_s:g} s",
            allowed=f"{file.measure.min_window_s:g} s (measure.min_window_s) and more",
        )


def _name_from(path: Path, document: Document) -> str:
    if not re.fullmatch(NAME_PATTERN, path.stem):
        raise document.error(("name",), "the file's name cannot name a run", found=path.stem, hint="add a line: name: my-sweep")
    return path.stem
