"""Online loads through the real command with embedded Ray: every kind of load, from the sweep file to the dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from submission import Submission

from llem_ray.results.reader import read_table

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.alone]

SWEEP = """
schema_version: 1
name: online
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu, engine_args: {max_sequences: 4, prefill_ms: 4, decode_ms: 4}}
  workload: {input_tokens: 8, output_tokens: 10}
experiments:
  - workload: {batch_size: 4}
  - workload: {requests: 80, load: {pattern: saturated}}
  - workload: {requests: 40, load: {pattern: closed, concurrency: 2}}
  - workload: {requests: 40, load: {pattern: poisson, rate_per_s: 10}}
  - workload: {requests: 160, load: {pattern: constant, rate_per_s: 400}}
  - workload: {load: {pattern: trace, trace: arrivals.jsonl, trace_speed: 4}}
repeats: 1
measure: {min_window_s: 0.5, idle_baseline_s: 0, sources: [replay], gates: {min_coverage: 0.05}, warmup: {batches: 5}}
"""
ARRIVALS = "".join(
    f'{{"timestamp": {200 * index}, "input_length": {4 + index % 3}, "output_length": {2 + index % 4}, "hash_ids": [1]}}\n'
    for index in range(20)
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, Any]], str, Path]:
    """The rows by load pattern, what was printed, and the run's folder."""
    folder = tmp_path_factory.mktemp("online")
    (folder / "arrivals.jsonl").write_text(ARRIVALS)
    submission = Submission(folder, SWEEP)
    code, output = submission.run()
    assert code == 0, output
    rows = read_table(submission.rundir.path, "trials").to_pylist()
    return {row["load_pattern"]: row for row in rows}, output, submission.rundir.path


def test_every_load_is_measured_on_the_engine_that_it_needs(ran: Any) -> None:
    rows, output, _ = ran
    assert len(rows) == 6
    assert "6 of 6 trials completed" in output
    assert "6 trials, 2 model loads" in output
    assert all(row["status"] == "completed" and row["warmup_batches"] == 5 for row in rows.values())
    batch = rows.pop("batch")
    assert (batch["batch_size"], batch["run_energy_j"], batch["window_rule"]) == (4, None, "total")
    assert {row["load_key"] for row in rows.values()}.isdisjoint({batch["load_key"]})
    for row in rows.values():
        assert row["run_energy_j"] == pytest.approx(50 * row["run_s"], rel=0.05)
        assert row["total_energy_j"] == pytest.approx(50 * row["window_s"], rel=0.05)
        assert row["pacing_error_p99_s"] >= row["pacing_error_p50_s"] > 0


def test_a_saturated_load_is_measured_in_its_steady_state(ran: Any) -> None:
    row = ran[0]["saturated"]
    assert (row["window_rule"], row["realised_concurrency"], row["power_valid"]) == ("steady_state", 4, True)
    assert row["run_begin_ns"] < row["begin_ns"] < row["end_ns"] < row["run_end_ns"]
    assert row["run_output_tokens"] == 800 > row["output_tokens"]
    assert row["joules_per_output_token"] == pytest.approx(row["total_energy_j"] / row["output_tokens"])


def test_a_closed_loop_keeps_its_concurrency(ran: Any) -> None:
    assert (ran[0]["closed"]["realised_concurrency"], ran[0]["closed"]["window_rule"]) == (2, "total")


def test_an_open_loop_keeps_its_rate_or_says_that_it_cannot_be_reached(ran: Any) -> None:
    kept, beyond = ran[0]["poisson"], ran[0]["constant"]
    # In the 4 s that it takes, a busy machine may send the last one 0.2 s late.
    assert kept["sent_rate_per_s"] == pytest.approx(kept["asked_rate_per_s"], rel=0.05)
    assert "rate_not_reached" not in kept["flags"]
    assert beyond["asked_rate_per_s"] == pytest.approx(400.0)
    assert beyond["achieved_rate_per_s"] < 200
    assert "rate_not_reached" in beyond["flags"]


def test_a_trace_is_replayed_with_its_own_lengths(ran: Any) -> None:
    rows, _, run = ran
    row = rows["trace"]
    assert row["asked_rate_per_s"] == pytest.approx(4 / 0.2)
    assert row["run_s"] >= 19 * 0.2 / 4
    requests = [one for one in read_table(run, "requests").to_pylist() if one["trial_id"] == row["trial_id"]]
    lengths = {int(one["request_id"].split("-")[1]): (one["prompt_tokens"], one["output_tokens"]) for one in requests}
    assert lengths == {index: (4 + index % 3, 2 + index % 4) for index in range(20)}
    assert "token_count_mismatch" not in row["invalid_reasons"]
