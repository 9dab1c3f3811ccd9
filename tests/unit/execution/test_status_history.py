"""How far a run is, and what an earlier one cost: read from run directories made by real runs on the fake engine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llem_ray.core.errors import ResultsError
from llem_ray.execution.history import find_past_run
from llem_ray.execution.status import read_planned, read_status
from llem_ray.results.reader import read_table
from llem_ray.results.rundir import RunDirectory

SWEEP = """\
schema_version: 1
name: study
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu, engine_args: {fail: {kind: nan, batch_above: 2}}}
  workload: {input_tokens: 8, output_tokens: 4}
sweep:
  workload.batch_size: [1, 2, 4]
repeats: 2
measure: {min_window_s: 0.2, idle_baseline_s: 0, sources: [replay]}
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run: two cells completed, one failed."""
    folder = tmp_path_factory.mktemp("history")
    (folder / "sweep.yaml").write_text(SWEEP)
    rows = (f"{i / 50},package,50,{i},cpu_package" for i in range(4000))
    (folder / "recording.csv").write_text("\n".join(["t_s,device_uuid,power_w,energy_j,scope", *rows]) + "\n")
    command = [sys.executable, "-m", "llem_ray", "submit", "--inline", "sweep.yaml"]
    environ = os.environ | {"LLEM_RAY_REPLAY": str(folder / "recording.csv")}
    ended = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == 3, ended.stderr
    (run,) = (folder / "runs").iterdir()
    return RunDirectory(run)


@pytest.fixture
def run(done: RunDirectory, tmp_path: Path) -> RunDirectory:
    """A copy of it to spoil."""
    return RunDirectory(Path(shutil.copytree(done.path, tmp_path / "runs" / done.name)))


def truncate_journal(run: RunDirectory, through: str) -> None:
    """Leave the journal as it was when ``through`` was first written: the process was killed then."""
    lines = run.journal_path.read_text().splitlines(keepends=True)
    last = next(number for number, line in enumerate(lines) if json.loads(line)["event"] == through)
    run.journal_path.write_text("".join(lines[: last + 1]))


def test_a_finished_run(run: RunDirectory) -> None:
    found = read_status(run)
    assert (found.total, found.done, found.failed, found.left) == (6, 4, 2, 0)
    assert (found.running, found.measuring, found.pid, found.host) == (False, None, None, None)
    assert json.loads(json.dumps(found.as_dict()))["name"] == run.name


def test_of_a_run_with_a_target_that_is_not_finished_the_count_is_a_limit(run: RunDirectory) -> None:
    plan = run.read_json("plan")
    assert not read_status(run).at_most
    (run.path / "plan.json").write_text(json.dumps({**plan, "stopping": {"half_width_rel": 0.1}}))
    assert not read_status(run).at_most
    truncate_journal(run, "measuring")
    shutil.rmtree(run.path / "trials")
    found = read_status(run)
    assert (found.at_most, found.total, found.done) == (True, 6, 0)


def test_rows_count_although_the_journal_does_not_know_them(run: RunDirectory) -> None:
    truncate_journal(run, "measuring")
    assert (read_status(run).done, read_status(run).failed) == (4, 0)


def test_a_run_that_is_held_says_what_runs_now(run: RunDirectory) -> None:
    truncate_journal(run, "measuring")
    trial_id = json.loads(run.journal_path.read_text().splitlines()[-1])["trial_id"]
    with run.lock():
        found = read_status(run)
        assert (found.running, found.pid, found.host) == (True, os.getpid(), os.uname().nodename)
        assert (found.done, found.left) == (0, 6)
        assert found.measuring == read_planned(run).trials[trial_id]
        assert found.measuring in {f"batch_size={size} repeat={repeat}" for size in (1, 2, 4) for repeat in (0, 1)}


def test_distributions_are_named_short(run: RunDirectory) -> None:
    plan = run.read_json("plan")
    for cell in plan["cells"].values():
        cell["settings"] = {"workload.think_time_s": {"distribution": "exponential", "mean": 0.05}}
    (run.path / "plan.json").write_text(json.dumps(plan))
    assert set(read_planned(run).trials.values()) == {f"think_time_s=exponential(mean=0.05) repeat={repeat}" for repeat in (0, 1)}


def test_a_run_killed_before_its_plan_was_written(run: RunDirectory) -> None:
    (run.path / "plan.json").unlink()
    assert read_status(run).total == 0


@pytest.mark.parametrize("text", ["{}", '{"groups": 3, "cells": {}}', "[]", "{broken"])
def test_a_damaged_plan_is_named(run: RunDirectory, text: str) -> None:
    (run.path / "plan.json").write_text(text)
    with pytest.raises(ResultsError, match=r"plan\.json"):
        read_status(run)


def test_a_past_run_has_times_and_power_of_what_completed(run: RunDirectory) -> None:
    past = find_past_run(run.path.parent, "study")
    assert past is not None
    assert past.name == run.name
    rows = [row for row in read_table(run.path, "trials").to_pylist() if row["status"] == "completed"]
    assert set(past.cell_seconds) == {row["cell_id"] for row in rows}
    assert past.seconds_per_trial is not None
    assert past.seconds_per_trial >= sum(row["window_s"] for row in rows) / len(rows)
    assert all(seconds >= 0.2 for seconds in past.cell_seconds.values())
    assert past.mean_power_w == pytest.approx(50.0, rel=0.05)
    assert past.seconds_per_load is not None
    assert past.gpus == 0


def test_only_runs_of_that_very_name_count(run: RunDirectory) -> None:
    assert find_past_run(run.path.parent, "stud") is None
    run.path.rename(run.path.with_name("study-two-0123abcd"))
    assert find_past_run(run.path.parent, "study") is None
    assert find_past_run(run.path.parent, "study-two") is not None


def test_the_newest_readable_run_counts(run: RunDirectory) -> None:
    newer = Path(shutil.copytree(run.path, f"{run.path}-2"))
    os.utime(newer, ns=(run.path.stat().st_mtime_ns + 1,) * 2)
    past = find_past_run(run.path.parent, "study")
    assert past is not None
    assert past.name == newer.name
    for part in (newer / "trials").iterdir():
        part.write_bytes(b"damaged")
    past = find_past_run(run.path.parent, "study")
    assert past is not None
    assert past.name == run.name


def test_without_runs_there_is_no_past(tmp_path: Path) -> None:
    assert find_past_run(tmp_path / "absent", "study") is None
    (tmp_path / "study-01234567" / "segments").mkdir(parents=True)
    assert find_past_run(tmp_path, "study") is None
