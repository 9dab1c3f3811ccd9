"""The real engine through the real command: trials that cannot run fail alone, everything else is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import duckdb
import pytest
from submission import Submission

from llem_ray.core.energy import PhaseSpan
from llem_ray.energy.ledger import check_tiling
from llem_ray.results.reader import read_table

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SWEEP = """
schema_version: 1
name: real
base:
  model: {config: llama-tiny}
  engine: {engine_args: {num_threads: 1}}
  workload: {input_tokens: 16, output_tokens: 8}
experiments:
  - workload: {batch_size: 2}
  - workload: {batch_size: 100000, output_tokens: 2000}
  - workload: {input_tokens: null, prompts: {source: file, path: long.jsonl}}
  - workload: {batch_size: 3, prompts: {source: synthetic}}
  - {workload: {batch_size: 2}, sampling: {temperature: 0.8, top_k: 20, top_p: 0.9}}
  - {workload: {batch_size: 2}, engine: {engine_args: {attn_implementation: eager}}}
repeats: 2
measure: {min_window_s: 1.2, idle_baseline_s: 1.5, sources: [replay, codecarbon], gates: {min_coverage: 0.05}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Submission, str]:
    folder = tmp_path_factory.mktemp("real")
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "every word is a token, or more, of " * 500}), encoding="utf-8")
    sweep = Submission(folder, SWEEP)
    code, output = sweep.run()
    assert code == 3, output
    return sweep, output


def trials(finished: tuple[Submission, str]) -> list[dict[str, Any]]:
    return finished[0].trials()


def test_only_the_impossible_trials_fail(finished: tuple[Submission, str]) -> None:
    failed = {(row["batch_size"], row["input_tokens"]): row for row in trials(finished) if row["status"] == "failed"}
    assert {key: row["failure_kind"] for key, row in failed.items()} == {
        (100000, 16): "out_of_memory",
        (1, None): "bad_request",
    }
    assert "KV cache" in failed[100000, 16]["failure_message"]
    assert "2048" in failed[1, None]["failure_message"]
    assert sum(row["status"] == "completed" for row in trials(finished)) == 8


def test_rows_of_completed_trials_are_whole(finished: tuple[Submission, str]) -> None:
    for row in trials(finished):
        if row["status"] != "completed":
            continue
        assert row["power_valid"], row["invalid_reasons"]
        assert [code for code in row["flags"] if code != "edge_gap"] == ["random_weights"]  # a busy machine misses ticks
        assert row["weights"] == "random"
        assert row["output_tokens"] == row["requests"] * 8
        assert row["prompt_tokens"] == row["requests"] * 16
        # 50 W by the recording.
        assert row["total_energy_j"] == pytest.approx(50 * row["window_s"], rel=0.02)
        assert row["joules_per_output_token"] == pytest.approx(row["total_energy_j"] / row["output_tokens"])
        assert row["est_energy_j"] > 0
        assert not any("codecarbon" in part for part in row["energy_covers"])
        assert row["ttft_s_p50"] > 0
        assert row["net_energy_j"] == pytest.approx(0, abs=0.1 * row["total_energy_j"])


def test_the_ledger_tiles_from_process_start_to_end(finished: tuple[Submission, str]) -> None:
    rows = read_table(finished[0].rundir.path, "phases").to_pylist()
    spans = [PhaseSpan(phase=r["phase"], begin_ns=r["begin_ns"], end_ns=r["end_ns"]) for r in rows if r["device_uuid"] == "cpu-0"]
    check_tiling(spans, min(span.begin_ns for span in spans), max(span.end_ns for span in spans))
    names = {span.phase for span in spans}
    assert names == {
        *("startup", "bare_idle", "load", "resident_idle", "warmup", "guard", "measured"),
        *("waste", "gap", "finalise", "shutdown"),
    } - ({"guard"} - names) | ({"unleased"} & names)


def test_two_loads_served_all_cells(finished: tuple[Submission, str]) -> None:
    rows = trials(finished)
    assert len({row["load_key"] for row in rows}) == 2
    phases = read_table(finished[0].rundir.path, "phases").to_pylist()
    assert len({row["begin_ns"] for row in phases if row["phase"] == "load"}) == 2


def test_duckdb_reads_the_dataset(finished: tuple[Submission, str]) -> None:
    path = finished[0].rundir.path
    (count,) = duckdb.sql(f"select count(*) from '{path}/trials/*.parquet' where power_valid").fetchall()[0]
    assert count == 8
    (requests,) = duckdb.sql(f"select count(*) from '{path}/requests/*.parquet'").fetchall()[0]
    assert requests == sum(row["requests"] or 0 for row in trials(finished))


def test_show_prints_it_again(finished: tuple[Submission, str]) -> None:
    sweep, output = finished
    command = [sys.executable, "-m", "llem_ray", "show", sweep.rundir.name, "--results", str(sweep.results)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "failed: out_of_memory" in shown.stdout
    assert shown.stdout in output
    as_json = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(as_json.stdout)["completed"] == 8


def test_submitting_again_says_that_it_is_finished(finished: tuple[Submission, str]) -> None:
    sweep, _ = finished
    code, output = sweep.run()
    assert "finished" in output
    assert code == 3
    assert len(sweep.trials()) == 12


def test_the_time_to_the_first_token_is_split_by_load(finished: tuple[Submission, str]) -> None:
    loads = read_table(finished[0].rundir.path, "loads").to_pylist()
    reached = [row for row in loads if row["reason"] is None]
    assert reached
    for row in reached:
        parts_s = (row["import_s"], row["construct_s"], row["warm_s"], row["load_rest_s"])
        assert min(parts_s) >= 0
        assert row["import_s"] > 0.1
        assert sum(parts_s) == pytest.approx(row["load_s"], abs=1e-6)
        assert (
            row["startup_s"] + row["queue_s"] + row["place_s"] + row["load_s"] + row["first_token_s"]
            < (row["submit_to_first_token_s"])
        )


def test_every_step_of_a_window_is_recorded(finished: tuple[Submission, str]) -> None:
    steps = read_table(finished[0].rundir.path, "steps", ["trial_id", "attempt"]).to_pylist()
    for row in trials(finished):
        mine = sum((step["trial_id"], step["attempt"]) == (row["trial_id"], row["attempt"]) for step in steps)
        assert mine == (row["steps"] or 0)
