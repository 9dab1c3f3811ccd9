"""The table of a run, as ``show`` and the end of ``submit`` print it. It reads well from 80 columns on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llem_ray.energy.stopping import NOT_REACHED
from llem_ray.energy.validity import REASONS
from llem_ray.reporting.efficiency import efficiency_table
from llem_ray.reporting.labels import NARROW, Label
from llem_ray.reporting.latency import latency_table
from llem_ray.reporting.numbers import MISSING, count_noun, format_bytes, format_energy, format_uncertain, format_value
from llem_ray.reporting.summary import CellSummary, RunSummary

PARTS = frozenset({"steady_state", "interval"})
"""Rules whose windows are parts of a run."""
EVERYWHERE = "all"
"""Mark of what holds for every cell."""
SHOWN_TRIALS = 5

_SCOPES = {
    "gpu": "GPU",
    "module": "GPU module",
    "memory": "GPU memory",
    "cpu_package": "CPU package",
    "dram": "DRAM",
    "network": "network",
    "fans": "fans",
    "host": "host",
}


def run_table(summary: RunSummary, path: Path) -> RenderableType:
    """Table of cells with a legend, what the joules cover, latencies, and where the data lies.

    A cell without valid energy shows the reason instead of J/token; an estimate is marked ``est.``.

    Args:
        summary: The run.
        path: Its directory.
    """
    if not summary.cells:
        return Group(Text(f"{summary.name}: no trial has been recorded yet", style="bold"), _where(summary, path))
    marks = _marks(summary.cells)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=_title(summary), title_justify="left")
    table.title_style = "bold"
    table.add_column("cell", min_width=NARROW)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("J/output token", justify="right", overflow="fold", min_width=16)
    if has_totals := any(cell.joules_per_total_token is not None for cell in summary.cells):
        table.add_column("J/token", justify="right", no_wrap=True)
    table.add_column("W", justify="right", no_wrap=True)
    table.add_column("tok/s", justify="right", no_wrap=True)
    table.add_column("window s", justify="right", no_wrap=True)
    rows = [_cells(cell, marks, has_totals) for cell in summary.cells]
    table.add_column("", no_wrap=True, min_width=max(len(_marked(cell, marks)) for cell in summary.cells))
    for row in rows:
        table.add_row(*row)
    loads = [Text(load.text()) for load in summary.loads]
    latencies = latency_table(summary)
    efficiency = efficiency_table(
        [(cell.label, cell.efficiency, cell.efficiency_intervals) for cell in summary.cells],
        summary.phase_methods,
        summary.currencies,
        summary.phase_residual_rel,
        summary.phase_reasons,
    )
    times = [part for table in (latencies, efficiency) if table is not None for part in (Text(""), table)]
    return Group(table, *_legend(summary, marks), *_reading(summary), *times, *loads, _where(summary, path))


def _title(summary: RunSummary) -> str:
    parts = [f"{summary.completed} of {count_noun(summary.trials, 'trial')} completed"]
    if summary.failed:
        parts.append(f"{summary.failed} failed")
    without = summary.completed - summary.valid
    if without:
        parts.append(f"{without} without valid energy")
    served = {(cell.model, cell.backend) for cell in summary.cells}
    what = f" ({', '.join(name for name in served.pop() if name)})" if len(served) == 1 else ""
    return escape(f"{summary.name}{what}: " + ", ".join(parts))


def _cells(cell: CellSummary, marks: dict[str, str], has_totals: bool) -> list[Label | Text]:
    n = str(cell.trials) if cell.valid == cell.trials else f"{cell.valid}/{cell.trials}"
    estimated = cell.est_power_w if cell.power_w is None else None
    power = format_value(cell.power_w) if estimated is None else f"est. {format_value(estimated, 3)}"
    numbers = (
        *([format_value(cell.joules_per_total_token)] if has_totals else []),
        power,
        format_value(cell.output_throughput_tok_s),
        format_value(cell.window_s, 3),
        _marked(cell, marks),
    )
    return [Label(cell.label), Text(n), _joules(cell), *map(Text, numbers)]


def _joules(cell: CellSummary) -> Text:
    """J/token, or what stands in its place."""
    if cell.joules_per_output_token is not None:
        return Text(format_uncertain(cell.joules_per_output_token.mean, cell.joules_per_output_token.half_width))
    if not cell.completed:
        return Text("failed: " + ", ".join(cell.failures), style="red")
    if cell.invalid_reasons:
        return Text("invalid: " + ", ".join(cell.invalid_reasons), style="red")
    if cell.est_joules_per_output_token is not None:
        return Text("est. " + format_value(cell.est_joules_per_output_token, 3), style="yellow")
    return Text("not measured" if cell.energy_reason else MISSING, style="yellow")


def _codes(cell: CellSummary) -> list[str]:
    """What the row's marks stand for; failures count when some repeat failed or was retried."""
    return [*cell.invalid_reasons, *cell.flags, *cell.notes, *(f"failed {kind}" for kind in cell.failures)]


def _marks(cells: Sequence[CellSummary]) -> dict[str, str]:
    """Code -> the letter that stands for it in a row; what holds for every completed cell needs none."""
    listed = [_codes(cell) for cell in cells if cell.completed]
    codes = dict.fromkeys(code for cell in cells for code in _codes(cell))
    everywhere = [code for code in codes if len(listed) > 1 and all(code in one for one in listed)]
    letters = [*ascii_lowercase, *(f"({number})" for number in range(1, len(codes) + 1))]
    rest = [code for code in codes if code not in everywhere]
    return dict.fromkeys(everywhere, EVERYWHERE) | dict(zip(rest, letters, strict=False))


def _marked(cell: CellSummary, marks: dict[str, str]) -> str:
    return "".join(sorted({marks[code] for code in _codes(cell)} - {EVERYWHERE}))


def _legend(summary: RunSummary, marks: dict[str, str]) -> list[Text]:
    lines = []
    for code, mark in marks.items():
        known = REASONS.get(code)
        if code.startswith("failed "):
            kind = code.removeprefix("failed ")
            attempts = sum(cell.failures.get(kind, 0) for cell in summary.cells)
            told = f"{count_noun(attempts, 'attempt')} failed: {kind}; the rows' failure_message says more"
        else:
            ends = " (no valid energy)" if known is not None and known.severity == "invalid" else ""
            told = f"{code}{ends}: " + (known.meaning if known else summary.details.get(code, ""))
        lines.append(Text(f"{mark}  {told}", style="dim"))
    return lines


def _reading(summary: RunSummary) -> list[Text]:
    lines = [Text("")]
    if summary.covers:
        covers = ", ".join(_device_kind(kind, count) for kind, count in summary.covers.items())
        missing = ", ".join(_SCOPES.get(scope, scope) for scope in summary.not_measured) or "nothing known"
        lines.append(Text(f"The joules cover {covers}. Not measured: {missing}."))
    lines += _plus_minus(summary)
    lines += [_part(cell) for cell in summary.cells if cell.window_rule in PARTS and cell.run_s is not None and _reached(cell)]
    if not all(map(_reached, summary.cells)) and (seen := summary.details.get(NOT_REACHED)) is not None:
        lines.append(Text(f"{NOT_REACHED}, so numbers are of whole runs; for example: {seen}."))
    missed = [trial_id for cell in summary.cells if _reached(cell) for trial_id in cell.missed_windows]
    if missed:
        lines.append(Text(f"Without the window that was asked for, and in no mean: {_named(missed)}."))
    if any(cell.valid != cell.trials for cell in summary.cells):
        lines.append(Text("n is the repeats with valid energy, of those that were tried."))
    lines += _resolved(summary)
    outliers = [trial_id for cell in summary.cells for trial_id in cell.outliers]
    if outliers:
        lines.append(Text(f"Far from the other repeats of their cells, and counted all the same: {_named(outliers)}."))
    reasons = dict.fromkeys(cell.energy_reason for cell in summary.cells if cell.energy_reason)
    lines += [Text(f"No measured energy: {reason}") for reason in reasons]
    if any(cell.est_joules_per_output_token is not None for cell in summary.cells):
        lines.append(Text("est. is a model's estimate, not a measurement; it is never part of a measured total."))
    spent = (("valid windows", summary.measured_energy_j), ("failed attempts", summary.waste_energy_j))
    told_spent = [f"{format_energy(energy_j)} in {what}" for what, energy_j in spent if energy_j is not None]
    if told_spent:
        lines.append(Text("Measured: " + ", ".join(told_spent) + "."))
    return lines


def _reached(cell: CellSummary) -> bool:
    """Some trial has the window that was asked for."""
    return not cell.missed_windows or len(cell.missed_windows) < cell.completed


def _named(trial_ids: Sequence[str]) -> str:
    return ", ".join(trial_ids[:SHOWN_TRIALS]) + (" ..." if len(trial_ids) > SHOWN_TRIALS else "")


def _plus_minus(summary: RunSummary) -> list[Text]:
    """What stands behind the ± of J per output token."""
    kinds = {cell.joules_per_output_token.kind for cell in summary.cells if cell.joules_per_output_token is not None}
    told = {"t95": "half the width of the 95 % t-interval of the mean over n repeats", "U": "2 sigma of sampling where n is 1"}
    if summary.stopping is not None:
        level = f"{100 * summary.stopping.confidence:.4g} %"
        told["stein"] = f"half the width of the {level} interval of the mean over n repeats, by the target's rule"
    if not kinds:
        return []
    gain = "" if summary.sensor_rel is None else f" The sensors' gain error, up to {summary.sensor_rel:.0%}, comes on top."
    lines = [Text("± of J/output token is " + ", or ".join(told[kind] for kind in told if kind in kinds) + "." + gain)]
    varied = [(cell.variation, cell.label) for cell in summary.cells if cell.variation is not None]
    if varied:
        least, (most, where) = min(varied)[0], max(varied)
        span = _percent(least) if len(varied) == 1 else f"{_percent(least)} to {_percent(most)}, most in {where}"
        lines.append(Text(f"It varies between repeats by {span} (standard deviation over mean)."))
    return lines


def _part(cell: CellSummary) -> Text:
    """What a window that is a part of a run leaves out."""
    window_s, run_s = format_value(cell.window_s, 3), format_value(cell.run_s, 3)
    per_token = cell.run_joules_per_output_token
    whole = "" if per_token is None else f"; {format_value(per_token)} J/output token over the whole run"
    return Text(f"{cell.label}: {cell.window_rule}, {window_s} of {run_s} s{whole}.", style="dim")


def _resolved(summary: RunSummary) -> list[Text]:
    """Which cells reached the run's target, and what the others lack."""
    target, found = summary.stopping, summary.resolution
    if target is None or target.half_width_rel is None or found is None:
        return []
    wanted = f"±{_percent(target.half_width_rel)} of {target.metric} at {100 * target.confidence:.4g} % confidence"
    told = f"Target {wanted}: reached by {len(found.resolved)} of {count_noun(found.cells, 'cell')}"
    if found.not_begun:
        told += f", {found.not_begun} without a trial yet"
    if found.more:
        told += f"; about {count_noun(found.more, 'repeat')} more would do"
    lines = [Text(told + ".")]
    for cell in summary.cells:
        one = cell.resolution
        if one is None or one.ended == "target":
            continue
        now = "no interval yet" if one.half_width_rel is None else f"±{_percent(one.half_width_rel)}"
        why = {"repeats": "all repeats are used up", "budget": "the budget is used up", None: "not finished"}[one.ended]
        more = "" if not one.more else f", {'at least' if one.more_at_least else 'about'} {count_noun(one.more, 'repeat')} more"
        lines.append(Text(f"  {cell.label}: {now}, {why}{more}", style="yellow"))
    return lines


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _device_kind(kind: str, count: int) -> str:
    source, _, scope = kind.partition("/")
    return f"{count_noun(count, _SCOPES.get(scope, scope))} ({source})"


def _where(summary: RunSummary, path: Path) -> Text:
    sizes = sorted(summary.dataset_bytes.items(), key=lambda item: -item[1])
    told = ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes)
    whole = f", {format_bytes(sum(summary.dataset_bytes.values()))}: {told}" if told else ""
    return Text(f"Dataset: {path}{whole}", overflow="fold", no_wrap=False)
