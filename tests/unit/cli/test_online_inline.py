"""An online load through `submit --inline` and `show`, with a meter that knows no temperature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from llem_ray.reporting.numbers import format_value


def test_a_steady_state_from_submit_to_show(llem: Any, sweep: Path, recording: Path) -> None:
    overrides = {
        "sweep.workload.batch_size": "[1]",
        "workload.requests": "9",
        "workload.load.pattern": "saturated",
        "engine.engine_args": "{max_sequences: 2, decode_ms: 10, prefill_ms: 10}",
        "repeats": "1",
        "measure.min_window_s": "0.05",
        "measure.cooldown_until_c": "40",
    }
    ended = llem("submit", "--inline", sweep, *(part for item in overrides.items() for part in ("--set", "=".join(item))))
    assert ended.code == 0, ended
    (row,) = pq.read_table(next(Path("runs").iterdir()) / "trials").to_pylist()
    assert row["window_rule"] == "steady_state"
    assert row["power_valid"]
    assert dict(row["reason_details"])["not_cooled_down"] == "no temperature can be read"
    assert row["ttft_s_p50_lo"] is None
    assert "requests, p50 takes 100" in row["latency_interval_reason"]
    per_token = format_value(row["run_joules_per_output_token"])
    shown = llem("show", "tiny").out
    assert f"steady_state, {format_value(row['window_s'], 3)} of {format_value(row['run_s'], 3)} s; {per_token}" in shown
    assert "not_cooled_down: A device was still hotter" in shown
    assert json.loads(llem("show", "tiny", "--json").out)["cells"][0]["window_rule"] == "steady_state"


def test_an_engine_that_is_too_small_for_a_request_says_so_in_the_row(llem: Any, sweep: Path, recording: Path) -> None:
    """Tokens beyond the context, of a load whose requests are built once the model is there."""
    overrides = {
        "sweep.workload.batch_size": "[1]",
        "workload.requests": "3",
        "workload.load": "{pattern: constant, rate_per_s: 100}",
        "engine.engine_args.context_tokens": "10",
        "repeats": "1",
    }
    ended = llem("submit", "--inline", sweep, *(part for item in overrides.items() for part in ("--set", "=".join(item))))
    assert ended.code == 3, ended
    (row,) = pq.read_table(next(Path("runs").iterdir()) / "trials").to_pylist()
    assert (row["status"], row["failure_kind"]) == ("failed", "bad_request")
    assert "12 tokens" in row["failure_message"]
