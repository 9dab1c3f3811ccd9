"""The tables of latencies and of rates that ``show`` prints below the energies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llem_ray.reporting.intervals import Between
from llem_ray.reporting.labels import NARROW, Label
from llem_ray.reporting.numbers import count_noun, format_uncertain, format_value
from llem_ray.reporting.summary import LATENCY_COLUMNS, CellSummary, RunSummary

KNOWN: Final = "output_throughput_tok_s"
"""What the table of energies has shown already."""
LONG_S: Final = 10.0
"""Latencies from here on are shown in s."""
_METRICS: Final = (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("ITL", "inter_chunk_s"), ("E2E", "e2e_latency_s"))
_ONLINE: Final = "ITL"
"""Shown of online loads alone: in a batch it is the time of a step."""
_RATES: Final = (
    ("req/s", "request_throughput_req_s"),
    ("tok/s", "output_throughput_tok_s"),
    ("all tok/s", "total_token_throughput_tok_s"),
    ("good req/s", "goodput_req_s"),
)


def latency_table(summary: RunSummary) -> RenderableType | None:
    """Median and 99th percentile of TTFT, TPOT, ITL and end-to-end latency, and rates, with intervals; None where there are none.

    Percentiles are of a trial's successful requests, averaged over a cell's trials.
    """
    cells = [cell for cell in summary.cells if any(cell.latency[name] is not None for name in LATENCY_COLUMNS if name != KNOWN)]
    if not cells:
        return None
    lines = ["Of successful requests; the mean over a cell's completed trials. all tok/s counts prompts and outputs."]
    lines += _readings(cells)
    if sum(cell.latency["failed_requests"] or 0 for cell in cells):
        lines.append("Some requests failed: adj_* in the dataset count them as infinitely late.")
    return Group(_latencies(cells), _rates(cells), *(Text(line, style="dim") for line in lines))


def _latencies(cells: Sequence[CellSummary]) -> Table:
    """One block of lines for a cell, so that its label has room."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left", title_style="bold")
    table.title = "latency"
    table.add_column("cell", min_width=NARROW)
    table.add_column("", no_wrap=True)
    for heading in ("median", "99th percentile"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in cells:
        lines = [_line(cell, name, metric) for name, metric in _METRICS if name != _ONLINE or cell.run_s is not None]
        table.add_row(Label(cell.label), *(Text("\n".join(column)) for column in zip(*lines, strict=True)))
    return table


def _line(cell: CellSummary, name: str, metric: str) -> tuple[str, str, str]:
    columns = [f"{metric}_{statistic}" for statistic in ("p50", "p99")]
    scale, unit = (1.0, "s") if (cell.latency[columns[-1]] or 0.0) >= LONG_S else (1000.0, "ms")
    median, late = (_value(cell.latency[column], cell.intervals[column], scale) for column in columns)
    return f"{name} {unit}", median, late


def _rates(cells: Sequence[CellSummary]) -> Table:
    shown = [(heading, name) for heading, name in _RATES if any(cell.latency[name] is not None for cell in cells)]
    with_slo = any(cell.latency["slo_attainment"] is not None for cell in cells)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left", title_style="bold")
    table.title = "rates"
    table.add_column("cell", min_width=NARROW)
    for heading in (*(heading for heading, _ in shown), *(["in SLO"] if with_slo else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in cells:
        values = [_value(cell.latency[name], cell.intervals[name], 1.0) for _, name in shown]
        attained = cell.latency["slo_attainment"]
        if with_slo:
            values.append("-" if attained is None else f"{attained:.0%}")
        table.add_row(Label(cell.label), *map(Text, values))
    return table


def _value(value: float | None, between: Between | None, scale: float) -> str:
    """``52.1 ±1.2`` over repeats, ``52.1 (50.4-54.0)`` of a single one."""
    if value is None or between is None:
        return format_value(None if value is None else value * scale, 3)
    if between.kind == "requests":
        low, high = (format_value(end * scale, 3) for end in (between.low, between.high))
        return f"{format_value(value * scale, 3)} ({low}-{high})"
    half_width = (between.high - between.low) / 2 * scale
    return format_uncertain(value * scale, half_width, 5) if half_width > 0 else format_value(value * scale, 3)


def _readings(cells: Sequence[CellSummary]) -> list[str]:
    """What the intervals are."""
    kinds = {between.kind for cell in cells for between in cell.intervals.values() if between is not None}
    lines = []
    if kinds - {"requests"}:
        by_target = ", of the target's metric of the interval by its rule" if "stein" in kinds else ""
        lines.append(f"± is half the width of the 95 % t-interval of the mean over a cell's repeats{by_target}.")
    if "requests" in kinds:
        lines.append("In brackets: 95 % interval of a single repeat, over its requests.")
    reasons = list(dict.fromkeys(cell.interval_reason for cell in cells if cell.interval_reason))
    if reasons:
        others = f"; {count_noun(len(reasons) - 1, 'other reason')} in latency_interval_reason" if len(reasons) > 1 else ""
        lines.append(f"No interval of a single repeat: {reasons[0]}{others}.")
    return lines
