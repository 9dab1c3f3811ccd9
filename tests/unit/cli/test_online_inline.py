"""An online load through `submit --inline` and `show`, with a meter that knows no temperature."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

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


CONVERSATIONS = """\
schema_version: 1
name: talks
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu, engine_args: {decode_ms: 2, prefill_ms: 2}}
  workload: {prompts: {source: synthetic}, input_tokens: 8, output_tokens: 4}
experiments:
- workload: {requests: 18, turns: 3, think_time_s: 0.01, load: {pattern: saturated, concurrency: 2}}
- workload: {requests: 18, turns: 3, think_time_s: 0.01, load: {pattern: closed, concurrency: 2}}
- workload: {requests: 18, turns: 3, think_time_s: 0.01, load: {pattern: poisson, rate_per_s: 50}}
- workload: {load: {pattern: trace, trace: t.jsonl, trace_max_input_tokens: 506}}
repeats: 1
measure: {min_window_s: 0.01, window: {rule: total}, idle_baseline_s: 0, edge_guard_s: 0, sources: [replay]}
"""


def test_conversations_and_shared_prompts_from_submit_to_the_dataset(llem: Any, recording: Path, tmp_path: Path) -> None:
    """Each turn is sent when the one before was answered; rates and limits count conversations."""
    shared = ([1, 2], [1, 3], [4])
    lines = [{"timestamp": 0, "input_length": 512 * len(ids) - 12, "output_length": 2, "hash_ids": ids} for ids in shared]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "talks.yaml").write_text(CONVERSATIONS)
    ended = llem("submit", "--inline", "talks.yaml")
    assert ended.code == 0, ended
    run = next(Path("runs").iterdir())
    all_requests = pq.read_table(run / "requests").to_pylist()
    trials = {row["load_pattern"]: row for row in pq.read_table(run / "trials").to_pylist()}
    assert set(trials) == {"saturated", "closed", "poisson", "trace"}
    for pattern, row in trials.items():
        requests = [request for request in all_requests if request["trial_id"] == row["trial_id"]]
        if pattern == "trace":
            lengths = sorted((r["request_id"], r["prompt_tokens"], r["shared_prompt_tokens"]) for r in requests)
            assert lengths == [("0-0", 506, 0), ("0-1", 506, 256), ("0-2", 250, 0)]
            assert (row["prompt_tokens"], row["shared_prompt_tokens"]) == (1262, 256)
        else:
            check_conversations(pattern, row, {(r["conversation"], r["turn"]): r for r in requests})


def check_conversations(pattern: str, row: dict[str, Any], requests: dict[tuple[int, int], dict[str, Any]]) -> None:
    assert set(requests) == {(number, turn) for number in range(6) for turn in range(3)}
    for (number, turn), request in requests.items():
        assert (request["prompt_tokens"], request["shared_prompt_tokens"]) == (8 + 12 * turn, 12 * turn)
        if turn:
            assert request["scheduled_ns"] == requests[number, turn - 1]["last_token_ns"] + 10_000_000
        assert request["sent_ns"] >= request["scheduled_ns"]
    counted = (row["requests"], row["prompt_tokens"], row["shared_prompt_tokens"], row["failed_prompt_tokens"])
    assert counted == (18, 6 * 60, 6 * 36, 0)
    begun = sorted(requests[number, 0]["scheduled_ns"] for number in range(6))
    if pattern == "poisson":
        assert row["asked_rate_per_s"] == pytest.approx(5e9 / (begun[-1] - begun[0]))
        return
    assert row["asked_rate_per_s"] is None
    assert row["realised_concurrency"] <= 2
    changes = [(requests[number, 0]["sent_ns"], 1) for number in range(6)]
    changes += [(requests[number, 2]["last_token_ns"], -1) for number in range(6)]
    assert max(accumulate(change for _, change in sorted(changes))) == 2


def test_an_engine_that_is_too_small_for_a_request_says_so_in_the_row(llem: Any, sweep: Path, recording: Path) -> None:
    """Tokens beyond the context, of an engine whose context nobody knows but itself: asked before it loads."""
    overrides = {
        "sweep.workload.batch_size": "[1]",
        "workload.requests": "3",
        "workload.load": "{pattern: constant, rate_per_s: 100}",
        "engine.engine_args.context_tokens": "10",
        "engine.engine_args.fail": "{kind: load}",
        "repeats": "1",
    }
    ended = llem("submit", "--inline", sweep, *(part for item in overrides.items() for part in ("--set", "=".join(item))))
    assert ended.code == 3, ended
    (row,) = pq.read_table(next(Path("runs").iterdir()) / "trials").to_pylist()
    assert (row["status"], row["failure_kind"]) == ("failed", "bad_request")
    assert "12 tokens" in row["failure_message"]
    assert str(row["failure_message"]).startswith(f"{sweep}:6: workload.input_tokens: ")
