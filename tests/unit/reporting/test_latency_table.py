"""The table of latencies and rates below a run's energies."""

from __future__ import annotations

import io
import json
from typing import Any

from rich.console import Console

from llem_ray.reporting.latency import latency_table
from llem_ray.reporting.summary import LATENCY_COLUMNS, summarise_run
from llem_ray.results.schema import SCHEMAS


def row(batch: int, repeat: int, **more: Any) -> dict[str, Any]:
    return {
        "cell_id": f"c{batch}",
        "trial_id": f"c{batch}-r{repeat}",
        "status": "completed",
        "settings": json.dumps({"workload.batch_size": batch}),
        "ttft_s_p50": 0.0521 * (1 + repeat),
        "ttft_s_p99": 0.25,
        "tpot_s_p50": 0.011,
        "tpot_s_p99": 0.0194,
        "e2e_latency_s_p50": 1.5,
        "e2e_latency_s_p99": 2.25,
        "request_throughput_req_s": 12.5,
        "total_token_throughput_tok_s": 2048.0,
        "failed_requests": 0,
        **more,
    }


def render(rows: list[dict[str, Any]], width: int = 80) -> str:
    table = latency_table(summarise_run("run", rows))
    if table is None:
        return ""
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_percentiles_are_means_over_trials_and_the_columns_exist() -> None:
    text = render([row(4, 0), row(4, 1)])
    assert "78.1/250" in text  # (52.1 + 104.2) / 2
    assert "11.0/19.4" in text
    assert "1.50/2.25" in text
    assert "12.5" in text
    assert "2048" in text
    assert "all tok/s" in text  # tok/s of the other table leaves prompts out
    assert "good" not in text
    assert "Some requests failed" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert set(LATENCY_COLUMNS) <= set(SCHEMAS["trials"].names)


def test_goodput_failures_and_what_is_missing() -> None:
    good = {"goodput_req_s": 10.0, "slo_attainment": 0.8, "failed_requests": 3}
    text = render([row(4, 0, **good), row(8, 0, tpot_s_p50=None, tpot_s_p99=None, goodput_req_s=None, slo_attainment=0.0)])
    assert max(map(len, text.splitlines())) <= 80
    assert "10.0 (80%)" in text
    assert "- (0%)" in text
    assert "-/-" in text
    assert "adj_*" in text


def test_nothing_where_no_trial_has_latencies() -> None:
    assert render([{"cell_id": "a", "trial_id": "a-r0", "status": "failed", "failure_kind": "hang", "settings": "{}"}]) == ""
