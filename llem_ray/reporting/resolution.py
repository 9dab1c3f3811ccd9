"""Which cells of a run have reached its target, and what the others lack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llem_ray.core.measure_spec import StoppingSpec
from llem_ray.energy.metrics import t_interval
from llem_ray.energy.stopping import Ended, Repeat, judge, metric_value, stein_interval, values_in_order

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolution:
    """How far a cell is from the run's target."""

    metric: str
    mean: float | None
    half_width_rel: float | None
    """Half of the interval's width over the mean; None while there are too few values."""
    ended: Ended | None
    """What ended the cell's repeats: the target was reached, or the repeats or the budget are used up; None: it goes on."""
    more: int | None
    """Further repeats that the target would take, 0 when it is reached; None where that cannot be told."""
    more_at_least: bool = False
    """``more`` are the first repeats: how many the target takes is known after them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResolution:
    """How far a run is from its target."""

    cells: int
    """Cells of the run; those that no trial has been recorded of included."""
    resolved: tuple[str, ...]
    """Ids of the cells that reached the target."""
    unresolved: tuple[str, ...]
    """Ids of the cells that have trials and did not, or not yet."""
    not_begun: int
    """Cells that no trial has been recorded of."""
    more: int | None
    """Further repeats that the unresolved cells would take together, as far as that can be told."""


def cell_resolution(rows: Sequence[Row], completed: Sequence[Row], target: StoppingSpec, repeats: int | None) -> Resolution:
    """By the same rule that the run itself goes by.

    Args:
        rows: All attempts at the cell's repeats.
        completed: Each completed repeat's last attempt.
        target: The run's target.
        repeats: What a cell gets at most.
    """
    done = {row["repeat"]: row for row in completed}
    last = {row["repeat"]: done.get(row["repeat"], row) for row in rows}
    ended = {
        number: Repeat(value=metric_value(row, target.metric), window_s=row.get("window_s") or 0.0)
        for number, row in last.items()
    }
    verdict, values = judge(ended, target), values_in_order(ended)
    interval = stein_interval(values, target) if verdict.needed is not None else t_interval(values, target.confidence)
    half_width_rel = None
    if interval is not None and interval.half_width is not None and interval.mean:
        half_width_rel = interval.half_width / abs(interval.mean)
    used_up = repeats is not None and len(last) >= repeats
    lacking = max(0, (verdict.needed or target.first) - len(values))
    return Resolution(
        metric=target.metric,
        mean=None if interval is None else interval.mean,
        half_width_rel=half_width_rel,
        ended=verdict.ended or ("repeats" if used_up else None),
        more=lacking if verdict.needed is not None or lacking else None,
        more_at_least=verdict.needed is None and lacking > 0,
    )


def run_resolution(found: Mapping[str, Resolution], cells: int | None) -> RunResolution:
    """Of a run with a target.

    Args:
        found: Id of each cell that has trials, and how far it is.
        cells: Cells of the plan; None where that is not known.
    """
    resolved = tuple(cell for cell, one in found.items() if one.ended == "target")
    open_cells = {cell: one for cell, one in found.items() if one.ended != "target"}
    known = [one.more for one in open_cells.values() if one.more is not None]
    return RunResolution(
        cells=max(len(found), cells or 0),
        resolved=resolved,
        unresolved=tuple(open_cells),
        not_begun=max(0, (cells or 0) - len(found)),
        more=sum(known) if known or not open_cells else None,
    )
