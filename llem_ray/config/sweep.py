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
from llem_ray.config.file import NAME_PATTERN, read_top_level
from llem_ray.config.overrides import apply_overrides
from llem_ray.config.patches import read_patch
from llem_ray.config.rules import broken_window
from llem_ray.core.spec import Cell, MeasureSpec, Sweep


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
    base = read_patch(document, ("base",), file.base, dotted_keys=False)
    axes = read_axes(document, file)
    experiments = read_experiments(document, file)
    rules = read_rules(document, file.exclude)
    refuse_hidden_overrides(document, axes, experiments)
    check_size(document, axes, experiments, file.max_cells)
    expanded = Expansion(document, base, rules).expand(axes, experiments)
    _check_windows(document, file.measure, expanded.cells)
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
        base_dir=str(path.resolve().parent),
    )


def _check_windows(document: Document, measure: MeasureSpec, cells: Sequence[Cell]) -> None:
    """Refuse a window that a cell's workload cannot have."""
    for cell in {id(cell.experiment.workload): cell for cell in cells}.values():
        broken = broken_window(measure, cell.experiment.workload)
        if broken is not None:
            where = broken.path if broken.path[0] == "measure" else ("base", *broken.path)
            found = ", ".join(f"{key}={value}" for key, value in cell.settings.items())
            message = f"{broken.message} ({dotted(broken.path)})"
            raise document.error(where, message, found=f"in the cell {found}" if found else None, hint=broken.hint)


def _name_from(path: Path, document: Document) -> str:
    if not re.fullmatch(NAME_PATTERN, path.stem):
        raise document.error(("name",), "the file's name cannot name a run", found=path.stem, hint="add a line: name: my-sweep")
    return path.stem
