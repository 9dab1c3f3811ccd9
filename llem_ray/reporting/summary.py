"""Rows of ``trials`` to one typed summary per cell: what ``show`` prints and ``show --json`` gives."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Final

from llem_ray.core.measure_spec import StoppingSpec
from llem_ray.core.progress import format_setting
from llem_ray.energy.stopping import NOT_REACHED, coefficient_of_variation, find_outliers
from llem_ray.reporting.efficiency import EFFICIENCY_COLUMNS, efficiency_intervals, mean_efficiency
from llem_ray.reporting.intervals import (
    INTERVAL_COLUMNS,
    LATENCIES,
    RATES,
    Between,
    Uncertain,
    joules_interval,
    serving_intervals,
)
from llem_ray.reporting.loads import LoadSummary, summarise_loads
from llem_ray.reporting.resolution import Resolution, RunResolution, cell_resolution, run_resolution

Row = Mapping[str, Any]

LATENCY_COLUMNS: Final = (*LATENCIES, *RATES, "slo_attainment", "failed_requests")
"""Columns of ``trials`` that the tables of latencies and rates show."""

SUMMARY_COLUMNS: Final = (
    *INTERVAL_COLUMNS, "latency_interval_reason", "slo_attainment", "failed_requests", *EFFICIENCY_COLUMNS,
    "cell_id", "trial_id", "repeat", "status", "failure_kind", "settings", "model", "backend", "window_s",
    "window_rule", "run_s", "run_joules_per_output_token", "total_energy_j", "energy_uncertainty_j",
    "sensor_rel", "energy_covers", "energy_not_measured", "energy_reason",
    "waste_energy_j", "joules_per_output_token", "joules_per_total_token", "est_energy_j", "est_joules_per_output_token",
    "power_valid", "invalid_reasons", "flags", "notes", "reason_details",
)  # fmt: skip
"""Columns of ``trials`` that a summary is made from: reading only these takes less than half the time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CellSummary:
    """All attempts at all repeats of one cell.

    Means are over its completed trials that have the window that was asked for; of energy, over the valid ones.
    """

    cell_id: str
    label: str
    settings: Mapping[str, Any]
    model: str | None
    backend: str | None
    trials: int
    """Repeats that were tried."""
    completed: int
    valid: int
    """Completed with valid measured energy."""
    failed: int
    """Repeats without any completed attempt."""
    failures: Mapping[str, int]
    """Failure kind -> attempts that failed so."""
    joules_per_output_token: Uncertain | None
    variation: float | None
    """Standard deviation over mean of J per output token of the valid repeats."""
    outliers: tuple[str, ...]
    """Trials whose J per output token, or output tokens per second, is far from the others'. They are part of every mean."""
    resolution: Resolution | None
    """None where the run has no target."""
    joules_per_total_token: float | None
    total_energy_j: float | None
    power_w: float | None
    """Mean power of everything that the energy covers."""
    est_joules_per_output_token: float | None
    """Estimated by a model, not measured; only where nothing was measured."""
    est_power_w: float | None
    window_s: float | None
    output_throughput_tok_s: float | None
    efficiency: Mapping[str, float | None]
    """Energy by phase and token, MFU, J/FLOP, carbon and cost: means over completed trials."""
    efficiency_intervals: Mapping[str, Uncertain | None]
    """Their intervals; of a single repeat those of prefill and decode alone, twice the sigma of the fit."""
    latency: Mapping[str, float | None]
    """Columns of ``LATENCY_COLUMNS``, means over the completed trials."""
    intervals: Mapping[str, Between | None]
    """Intervals of latency percentiles and rates, by column."""
    interval_reason: str | None
    """Why percentiles of a single repeat have no interval."""
    missed_windows: tuple[str, ...]
    """Completed trials that do not have the window that was asked for: their numbers are of whole runs. They are in no mean,
    unless the cell has no others."""
    window_rule: str | None
    """Which part of their runs the windows are."""
    run_s: float | None
    """Length of the online runs that the windows are parts of."""
    run_joules_per_output_token: float | None
    """Energy of the whole runs over all their output tokens."""
    invalid_reasons: tuple[str, ...]
    flags: tuple[str, ...]
    notes: tuple[str, ...]
    energy_reason: str | None
    """Why a completed trial has no measured total."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """A run at a glance."""

    name: str
    cells: tuple[CellSummary, ...]
    trials: int
    completed: int
    valid: int
    failed: int
    measured_energy_j: float | None
    """Sum over all valid windows."""
    waste_energy_j: float | None
    """Sum over failed attempts."""
    covers: Mapping[str, int]
    """``<source>/<scope>`` -> devices of that kind in a total, at most."""
    not_measured: tuple[str, ...]
    sensor_rel: float | None
    """Largest systematic gain error of a sensor; never part of an interval."""
    details: Mapping[str, str]
    """Reason code -> an example of what was seen."""
    phase_methods: tuple[str, ...]
    """How prefill and decode were told apart."""
    phase_reasons: tuple[str, ...]
    """Why they were not, of trials with valid energy."""
    phase_residual_rel: float | None
    """What the worst fit left over of a tick's energy."""
    currencies: tuple[str, ...]
    """Of the costs."""
    stopping: StoppingSpec | None
    """The run's target; None where it has none."""
    resolution: RunResolution | None
    """Which cells reached it, and how many repeats the others lack; None without a target."""
    loads: tuple[LoadSummary, ...] = ()
    """Where the time to the first token went, by engine."""
    dataset_bytes: Mapping[str, int] = field(default_factory=dict)
    """Part of the dataset -> its size on disk."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def summarise_run(
    name: str,
    rows: Iterable[Row],
    *,
    stopping: StoppingSpec | None = None,
    repeats: int | None = None,
    planned_cells: int | None = None,
    loads: Iterable[Row] = (),
    dataset_bytes: Mapping[str, int] | None = None,
) -> RunSummary:
    """Summary of a run.

    Args:
        name: Its name.
        rows: Rows of ``trials``: all attempts, in the order they were written.
        stopping: The run's target.
        repeats: What a cell gets at most.
        planned_cells: Cells of the plan.
        loads: Rows of ``loads``.
        dataset_bytes: Part of the dataset -> its size on disk.
    """
    rows = list(rows)
    target = stopping if stopping is not None and stopping.half_width_rel is not None else None
    by_cell: dict[str, list[Row]] = {}
    for row in rows:
        by_cell.setdefault(row["cell_id"], []).append(row)
    settings = {cell_id: json.loads(cell_rows[0].get("settings") or "{}") for cell_id, cell_rows in by_cell.items()}
    label = _labeller(settings.values())
    cells = tuple(_summarise_cell(cell_id, settings[cell_id], label, by_cell[cell_id], target, repeats) for cell_id in by_cell)
    found = {cell.cell_id: cell.resolution for cell in cells if cell.resolution is not None}
    return RunSummary(
        name=name,
        cells=cells,
        trials=sum(cell.trials for cell in cells),
        completed=sum(cell.completed for cell in cells),
        valid=sum(cell.valid for cell in cells),
        failed=sum(cell.failed for cell in cells),
        measured_energy_j=_sum(row.get("total_energy_j") for row in rows if row.get("power_valid")),
        waste_energy_j=_sum(row.get("waste_energy_j") for row in rows),
        covers=_covers(rows),
        not_measured=_distinct(row.get("energy_not_measured") for row in rows),
        sensor_rel=_largest(rows, "sensor_rel"),
        details={code: seen for row in rows for code, seen in dict(row.get("reason_details") or {}).items()},
        phase_reasons=_named((row for row in rows if row.get("power_valid")), "phase_reason"),
        phase_methods=_named(rows, "phase_method"),
        phase_residual_rel=_largest(rows, "phase_residual_rel"),
        currencies=_named(rows, "currency"),
        stopping=target,
        resolution=None if target is None else run_resolution(found, planned_cells),
        loads=summarise_loads(loads),
        dataset_bytes=dict(dataset_bytes or {}),
    )


def _summarise_cell(
    cell_id: str,
    settings: Mapping[str, Any],
    label: Callable[[Mapping[str, Any]], str],
    rows: Sequence[Row],
    target: StoppingSpec | None,
    repeats: int | None,
) -> CellSummary:
    last = {row["trial_id"]: row for row in rows if row.get("status") != "failed"}
    completed = sorted(last.values(), key=lambda row: row.get("repeat") or 0)
    missed = [row["trial_id"] for row in completed if NOT_REACHED in (row.get("invalid_reasons") or ())]
    counted = [row for row in completed if row["trial_id"] not in missed] or completed
    tried = {row["trial_id"] for row in rows}
    valid = [row for row in completed if row.get("power_valid")]
    unmeasured = [row for row in completed if row.get("total_energy_j") is None]
    first = rows[0]
    known = [row for row in valid if row.get("joules_per_output_token") is not None]
    joules = [row["joules_per_output_token"] for row in known]
    return CellSummary(
        cell_id=cell_id,
        label=label(settings) or str(first.get("model") or cell_id),
        settings=settings,
        model=first.get("model"),
        backend=first.get("backend"),
        trials=len(tried),
        completed=len(completed),
        valid=len(valid),
        failed=len(tried) - len(completed),
        failures=dict(Counter(row.get("failure_kind") or "unknown" for row in rows if row.get("status") == "failed")),
        joules_per_output_token=joules_interval(known, target),
        variation=coefficient_of_variation(joules),
        outliers=_outliers(known, counted),
        resolution=cell_resolution(rows, completed, target, repeats) if target is not None else None,
        joules_per_total_token=_mean(valid, "joules_per_total_token"),
        total_energy_j=_mean(valid, "total_energy_j"),
        power_w=_mean_power(valid, "total_energy_j"),
        est_joules_per_output_token=_mean(unmeasured, "est_joules_per_output_token") if not valid else None,
        est_power_w=_mean_power(unmeasured, "est_energy_j") if not valid else None,
        window_s=_mean(counted, "window_s"),
        output_throughput_tok_s=_mean(counted, "output_throughput_tok_s"),
        efficiency=mean_efficiency(counted),
        efficiency_intervals=efficiency_intervals(counted),
        latency={name: _mean(counted, name) for name in LATENCY_COLUMNS},
        intervals=serving_intervals(counted, target),
        interval_reason=counted[0].get("latency_interval_reason") if len(counted) == 1 else None,
        missed_windows=tuple(missed),
        window_rule=next((row["window_rule"] for row in completed if row.get("window_rule")), None),
        run_s=_mean(counted, "run_s"),
        run_joules_per_output_token=_mean(valid, "run_joules_per_output_token"),
        invalid_reasons=_distinct(row.get("invalid_reasons") for row in completed),
        flags=_distinct(row.get("flags") for row in completed),
        notes=_distinct(row.get("notes") for row in completed),
        energy_reason=next((row["energy_reason"] for row in unmeasured if row.get("energy_reason")), None),
    )


def _outliers(known: Sequence[Row], counted: Sequence[Row]) -> tuple[str, ...]:
    served = [row for row in counted if row.get("output_throughput_tok_s") is not None]
    found = []
    for rows, name in ((known, "joules_per_output_token"), (served, "output_throughput_tok_s")):
        found += [rows[index]["trial_id"] for index in find_outliers([row[name] for row in rows])]
    return tuple(dict.fromkeys(found))


def _labeller(settings: Iterable[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], str]:
    """Labels such as ``batch_size=4 dtype=float32``: what differs between cells, all of it when there is one cell.

    The dotted key stands in full where its last word is not unique.
    """
    settings = list(settings)
    keys = dict.fromkeys(key for one in settings for key in one)
    varying = {key for key in keys if len({format_setting(one.get(key)) for one in settings}) > 1} or set(keys)
    last_words = Counter(key.rpartition(".")[2] for key in keys)
    short = {key: last if last_words[last := key.rpartition(".")[2]] == 1 else key for key in keys}

    def label(one: Mapping[str, Any]) -> str:
        return " ".join(f"{short[key]}={format_setting(value)}" for key, value in one.items() if key in varying)

    return label


def _covers(rows: Iterable[Row]) -> dict[str, int]:
    covers: dict[str, int] = {}
    for row in rows:
        kinds = Counter("/".join(device.split("/")[:2]) for device in row.get("energy_covers") or ())
        covers |= {kind: max(count, covers.get(kind, 0)) for kind, count in kinds.items()}
    return covers


def _named(rows: Iterable[Row], name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row[name] for row in rows if row.get(name)))


def _largest(rows: Iterable[Row], name: str) -> float | None:
    return max((row[name] for row in rows if row.get(name) is not None), default=None)


def _mean(rows: Iterable[Row], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return fmean(values) if values else None


def _mean_power(rows: Iterable[Row], energy: str) -> float | None:
    values = [row[energy] / row["window_s"] for row in rows if row.get(energy) is not None and row.get("window_s")]
    return fmean(values) if values else None


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _distinct(lists: Iterable[Sequence[str] | None]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(code for codes in lists for code in codes or ()))
