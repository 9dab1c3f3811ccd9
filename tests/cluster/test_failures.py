"""Engines and run drivers that die: what is done stays, nothing runs twice, every failure is a row."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from submission import Submission, kill_hard, suspended

from llem_ray.core.units import NS_PER_S
from llem_ray.results.reader import read_table

pytestmark = [pytest.mark.slow]

MEASURE = """
measure:
  sources: [replay]
  min_window_s: 0.3
  idle_baseline_s: 0
  warmup: {batches: 0}
  trial_timeout_s: 5
  gates: {min_coverage: 0.05}
"""

ENGINES = (
    """
schema_version: 1
name: engines
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu, engine_args: {decode_ms: 1}}
  workload: {output_tokens: 8}
experiments:
  - workload: {output_tokens: 4}
  - {engine: {engine_args: {fail: {kind: die, once: died}}}, workload: {output_tokens: 5}}
  - {engine: {engine_args: {fail: {kind: hang}}}, workload: {output_tokens: 6}}
  - {engine: {engine_args: {fail: {kind: out_of_memory, batch_above: 2}}}, workload: {output_tokens: 7, batch_size: 4}}
  - {engine: {engine_args: {fail: {kind: out_of_memory, batch_above: 2}}}, workload: {output_tokens: 7, batch_size: 2}}
  - {engine: {engine_args: {fail: {kind: nan}}}, workload: {output_tokens: 9}}
  - {engine: {engine_args: {fail: {kind: load}}}, workload: {output_tokens: 10}}
  - {engine: {engine_args: {fail: {kind: load}}}, workload: {output_tokens: 11}}
repeats: 1
"""
    + MEASURE
)

LONG = (
    """
schema_version: 1
name: long
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu, engine_args: {decode_ms: 1}}
  workload: {output_tokens: 8}
sweep:
  workload.output_tokens: {range: [4, 11, 1]}
repeats: 1
"""
    + MEASURE
)


def by_output_tokens(trials: list[dict[str, Any]]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in trials:
        found.setdefault((row["output_tokens_requested"], row["batch_size"]), []).append(row)
    return found


@pytest.mark.ray
def test_every_way_an_engine_can_fail(submission: Callable[[str], Submission]) -> None:
    sweep = submission(ENGINES)
    code, output = sweep.run()
    assert code == 3, output
    rows = by_output_tokens(sweep.trials())
    kinds = {key: [row["failure_kind"] for row in attempts] for key, attempts in rows.items()}
    assert kinds == {
        (4, 1): [None],
        (5, 1): ["engine_died", None],
        (6, 1): ["hang", "hang"],
        (7, 4): ["out_of_memory"],
        (7, 2): [None],
        (9, 1): ["numerics"],
        (10, 1): ["load"],
        (11, 1): ["load"],
    }, output
    assert all(row["power_valid"] for attempts in rows.values() for row in attempts if row["status"] == "completed")
    assert all(row["total_energy_j"] is None for attempts in rows.values() for row in attempts if row["status"] == "failed")
    phases = read_table(sweep.rundir.path, "phases").to_pylist()
    for hang in rows[6, 1]:
        assert "no answer" in hang["failure_message"]
        key = (hang["trial_id"], hang["attempt"])
        wasted_s = [row["duration_s"] for row in phases if row["phase"] == "waste" and (row["trial_id"], row["attempt"]) == key]
        # It hung for 5 s, and for as long as it took to notice, at 50 W.
        assert sum(wasted_s) >= 4.5
        assert hang["waste_energy_j"] == pytest.approx(50 * sum(wasted_s), rel=0.1)


@pytest.mark.ray
def test_kill_9_of_the_run_driver_then_resume(submission: Callable[[str], Submission]) -> None:
    sweep = submission(LONG)
    process = sweep.start()
    sweep.wait_until(lambda: sweep.journal().count('"done"') >= 2, process)
    children = psutil.Process(process.pid).children(recursive=True)
    kill_hard(process)
    done_before = {row["trial_id"] for row in sweep.trials()}
    assert 2 <= len(done_before) < 8
    _gone, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, [child.cmdline() for child in alive]
    code, output = sweep.run()
    assert code == 0, output
    trials = sweep.trials()
    completed = [row["trial_id"] for row in trials if row["status"] == "completed"]
    assert len(completed) == len(set(completed)) == 8
    kept = [row for row in trials if row["trial_id"] in done_before]
    assert all(row["attempt"] == 1 for row in kept)
    # Windows that ended just before the kill were still waiting for their last samples: they are rows too, and run again.
    cut = {row["trial_id"] for row in trials if row["failure_kind"] == "interrupted"}
    assert cut
    assert not cut & done_before
    assert all(row["attempt"] == 2 for row in trials if row["status"] == "completed" and row["trial_id"] in cut)
    assert sweep.journal().count('"run_started"') == 2


@pytest.mark.ray
def test_sigterm_keeps_what_is_done_and_exits_130(submission: Callable[[str], Submission]) -> None:
    sweep = submission(LONG)
    process = sweep.start()
    sweep.wait_until(lambda: '"done"' in sweep.journal(), process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    code, output = sweep.finish(process)
    assert code == 130, output
    assert "resume" in output
    _gone, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, [child.cmdline() for child in alive]
    assert sweep.trials()
    code, output = sweep.run("--inline", "--allow-mixed")
    assert code == 0, output
    assert len({row["trial_id"] for row in sweep.trials() if row["status"] == "completed"}) == 8


@pytest.mark.ray
def test_the_embedded_ray_is_killed_and_then_everything_is_told_to_end(submission: Callable[[str], Submission]) -> None:
    """A head that is gone ends the run with its reason; SIGTERM to all processes at once is that of the run driver."""
    sweep = submission(LONG)
    process = sweep.start()
    sweep.wait_until(lambda: '"done"' in sweep.journal(), process)
    children = psutil.Process(process.pid).children(recursive=True)
    for child in children:
        if child.name() == "gcs_server":
            child.kill()
    code, output = sweep.finish(process)
    assert code == 5, output
    assert "Ray, started by this command, has ended" in output
    _gone, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, [child.cmdline() for child in alive]
    done = sweep.journal().count('"done"')
    assert 1 <= done < 8

    process = sweep.start()
    sweep.wait_until(lambda: sweep.journal().count('"done"') > done, process)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGTERM)
    code, output = sweep.finish(process)
    assert code == 130, output
    assert "resume" in output
    _gone, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, [child.cmdline() for child in alive]
    completed = [row["trial_id"] for row in sweep.trials() if row["status"] == "completed"]
    assert len(completed) == len(set(completed)) > done


@pytest.mark.ray
def test_a_sampler_that_dies_is_started_anew_and_the_hole_is_flagged(submission: Callable[[str], Submission]) -> None:
    sweep = submission(LONG.replace("min_window_s: 0.3", "min_window_s: 3").replace("timeout_s: 5", "timeout_s: 30"))
    process = sweep.start()
    sweep.wait_until(lambda: '"measuring"' in sweep.journal(), process)
    (node,) = read_table(sweep.rundir.path, "nodes").to_pylist()
    psutil.Process(node["sampler_pid"]).kill()
    code, output = sweep.finish(process)
    assert code == 0, output
    power = read_table(sweep.rundir.path, "power", ["epoch", "t_ns"]).to_pylist()
    assert {row["epoch"] for row in power} == {1, 2}
    assert [row["epoch"] for row in read_table(sweep.rundir.path, "nodes").to_pylist()] == [1, 2]
    trials = sorted(sweep.trials(), key=lambda row: row["begin_ns"])
    assert len(trials) == 8
    assert not trials[0]["power_valid"]
    back_ns = min(row["t_ns"] for row in power if row["epoch"] == 2) + NS_PER_S
    later = [row for row in trials if row["begin_ns"] > back_ns]
    assert later
    assert all(row["power_valid"] for row in later)


def test_ctrl_c_once_finishes_the_running_trial(submission: Callable[[str], Submission]) -> None:
    sweep = submission(LONG.replace("min_window_s: 0.3", "min_window_s: 1.5"))
    process = sweep.start("--inline")
    sweep.wait_until(lambda: '"measuring"' in sweep.journal(), process)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    begun = sweep.journal().count('"measuring"')
    code, output = sweep.finish(process)
    assert code == 130, output
    # One that begins before the signal is looked at is a running one too.
    assert [row["status"] for row in sweep.trials()] in (["completed"] * begun, ["completed"] * (begun + 1))
    assert begun + 1 < 8
    assert '"interrupted"' in sweep.journal()


def test_ctrl_c_twice_aborts_at_once_and_the_attempt_is_a_row(submission: Callable[[str], Submission]) -> None:
    sweep = submission(LONG.replace("min_window_s: 0.3", "min_window_s: 60").replace("timeout_s: 5", "timeout_s: 100"))
    process = sweep.start("--inline")
    sweep.wait_until(lambda: '"measuring"' in sweep.journal(), process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    code, output = sweep.finish(process)
    assert code == 130, output
    assert time.monotonic() - begin < 50, "it waited for the 60 s window"
    (row,) = sweep.trials()
    assert (row["status"], row["failure_kind"]) == ("failed", "interrupted")


def test_a_sweep_that_only_fails_is_stopped(submission: Callable[[str], Submission]) -> None:
    text = LONG.replace("{decode_ms: 1}", "{fail: {kind: nan}}").replace("measure:", "measure:\n  max_consecutive_failures: 3")
    sweep = submission(text)
    code, output = sweep.run("--inline")
    assert code == 3, output
    assert "3 attempts failed in a row" in output
    assert len(sweep.trials()) == 3


def test_second_run_driver_is_refused(submission: Callable[[str], Submission]) -> None:
    sweep = submission(LONG.replace("timeout_s: 5", "timeout_s: 100"))
    process = sweep.start("--inline")
    sweep.wait_until(lambda: '"measuring"' in sweep.journal(), process)
    with suspended(process.pid):
        code, output = sweep.run("--inline")
    assert code == 5, output
    assert str(process.pid) in output
    code, output = sweep.finish(process)
    assert code == 0, output
