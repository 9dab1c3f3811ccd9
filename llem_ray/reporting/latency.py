"""The table of latencies and rates that ``show`` prints below the energies."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llem_ray.reporting.numbers import format_value
from llem_ray.reporting.summary import CellSummary, RunSummary

_MS = 1000.0


def latency_table(summary: RunSummary) -> RenderableType | None:
    """Median and 99th percentile of TTFT, TPOT and end-to-end latency, and rates; None where no trial has any.

    Percentiles are of a trial's successful requests, averaged over a cell's completed trials.
    """
    cells = [cell for cell in summary.cells if any(value is not None for value in cell.latency.values())]
    if not cells:
        return None
    with_goodput = any(cell.latency["goodput_req_s"] is not None for cell in cells)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left", title_style="bold")
    table.title = "latency, median / 99th percentile, and rates"
    table.add_column("cell", overflow="fold", min_width=12)
    headings = ["TTFT ms", "TPOT ms", "E2E s", "req/s", "all tok/s", *(["good req/s"] if with_goodput else [])]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in cells:
        table.add_row(*_row(cell, with_goodput=with_goodput))
    lines = [
        Text(
            "Of successful requests; the mean over a cell's completed trials. all tok/s counts prompts and outputs.", style="dim"
        )
    ]
    failed = sum(cell.latency["failed_requests"] or 0 for cell in cells)
    if failed:
        lines.append(Text("Some requests failed: adj_* in the dataset count them as infinitely late.", style="dim"))
    return Group(table, *lines)


def _row(cell: CellSummary, *, with_goodput: bool) -> list[Text]:
    found = cell.latency
    goodput = format_value(found["goodput_req_s"], 3)
    if found["slo_attainment"] is not None:
        goodput += f" ({found['slo_attainment']:.0%})"
    return [
        Text(cell.label),
        Text(_pair(cell, "ttft_s", _MS)),
        Text(_pair(cell, "tpot_s", _MS)),
        Text(_pair(cell, "e2e_latency_s", 1.0)),
        Text(format_value(found["request_throughput_req_s"], 3)),
        Text(format_value(found["total_token_throughput_tok_s"], 3)),
        *([Text(goodput)] if with_goodput else []),
    ]


def _pair(cell: CellSummary, metric: str, scale: float) -> str:
    values = (cell.latency[f"{metric}_{statistic}"] for statistic in ("p50", "p99"))
    return "/".join(format_value(None if value is None else value * scale, 3) for value in values)
