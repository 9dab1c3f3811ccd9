"""A sweep over two interpreters on an embedded Ray: rows line up, deaths and hangs are retried, nothing of it stays."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import psutil
import pytest
from submission import DEADLINE_S, Submission, kill_hard

from llem_ray.backends.process.leftovers import MARK
from llem_ray.results.reader import read_table

pytestmark = [pytest.mark.slow]

SWEEP = f"""
schema_version: 1
name: interpreters
base:
  model: {{config: llama-tiny}}
  engine: {{backend: fake, device: cpu, engine_args: {{decode_ms: 1}}}}
  workload: {{output_tokens: 8}}
experiments:
  - {{engine: {{}}}}
  - {{engine: {{python: {sys.executable}}}}}
  - {{engine: {{python: {sys.executable}, engine_args: {{fail: {{kind: die, once: died}}}}}}}}
  - {{engine: {{python: {sys.executable}, engine_args: {{fail: {{kind: hang, once: hung}}}}}}}}
repeats: 1
measure:
  sources: [replay]
  min_window_s: 0.3
  idle_baseline_s: 0
  warmup: {{batches: 0}}
  trial_timeout_s: 4
"""


def engines() -> set[int]:
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if MARK in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
    return found


def test_rows_line_up_and_deaths_and_hangs_are_retried(tmp_path: Path) -> None:
    before = engines()
    run = Submission(tmp_path, SWEEP)
    code, output = run.run()
    assert code == 0, output
    done = [row for row in run.trials() if row["status"] == "completed"]
    failed = [row for row in run.trials() if row["status"] != "completed"]
    assert len(done) == 4
    assert sorted(row["failure_kind"] for row in failed) == ["engine_died", "hang"]
    assert all(row["power_valid"] and row["output_tokens"] for row in done)
    assert engines() <= before
    loads = read_table(run.rundir.path, "loads").to_pylist()
    reached = [row for row in loads if row["reason"] is None]
    assert {row["process_start_s"] is None for row in reached} == {True, False}
    for row in reached:
        assert row["load_rest_s"] >= 0
        assert 0 < row["load_s"] < row["submit_to_first_token_s"]
    assert sorted(row["reason"].partition(":")[0] for row in loads if row["reason"]) == ["engine_died", "hang"]


def test_nothing_outlives_a_killed_run_driver(tmp_path: Path) -> None:
    before = engines()
    run = Submission(tmp_path, SWEEP.replace("min_window_s: 0.3", "min_window_s: 300").replace("timeout_s: 4", "timeout_s: 600"))
    process = run.start("--set", f"experiments=[{{engine: {{python: {sys.executable}}}}}]")
    run.wait_until(lambda: bool(engines() - before), process)
    kill_hard(process)
    deadline_s = time.monotonic() + DEADLINE_S
    while engines() - before and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert engines() <= before
