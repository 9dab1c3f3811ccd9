"""`submit --inline`: a sweep on the fake engine with a recorded meter, and every way such a run is gone on with."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from llem_ray.core.errors import ResultsError
from llem_ray.results.rundir import RunDirectory
from llem_ray.results.writer import DatasetWriter


def only_run(folder: Path = Path("runs")) -> Path:
    (run,) = folder.iterdir()
    return run


def test_a_run_from_submit_to_dataset_and_after(llem, sweep: Path, recording: Path, tmp_path: Path) -> None:
    ended = llem("submit", "--inline", sweep)
    assert ended.code == 0, ended
    assert "4 of 4 trials completed" in ended.out
    assert "J/output token" in ended.out
    assert "batch_size=2" in ended.out
    assert max(map(len, ended.out.splitlines())) <= 80
    assert "run tiny-" in ended.err
    assert "4 trials, 1 model load" in ended.err

    run = only_run()
    trials = pq.read_table(run / "trials").to_pylist()
    assert len(trials) == 4
    assert all(row["status"] == "completed" and row["power_valid"] for row in trials)
    assert all(row["total_energy_j"] == pytest.approx(50 * row["window_s"], rel=0.05) for row in trials)
    for part in ("run tiny-", str(run.name)):
        assert part in ended.err
    for name in ("sweep.json", "plan.json", "environment.json"):
        json.loads((run / name).read_text())

    log = llem("logs", "tiny").out
    assert "4 trials, 1 model load" in log
    assert "replay" in log or "package" in log
    assert all(row["trial_id"] in log for row in trials)
    assert "session ended" in log
    assert llem("status", "tiny").out == f"{run.name}: finished, 4 of 4 trials done\n"
    status = json.loads(llem("status", run.name, "--json").out)
    assert (status["total"], status["done"], status["left"], status["running"]) == (4, 4, 0, False)
    assert llem("watch", run).out == f"{run.name}: finished, 4 of 4 trials done\n"
    assert "4 of 4 trials completed" in llem("show", "tiny").out
    assert json.loads(llem("show", "tiny", "--json").out)["valid"] == 4
    stopped = llem("stop", "tiny")
    assert (stopped.code, stopped.err) == (5, f"error: {run.name} is not running\n")

    exported = llem("export", "tiny", "--to", "csv", tmp_path)
    assert exported.out == f"wrote 4 rows of trials to {tmp_path}/{run.name}-trials.csv\n"
    again = llem("export", "tiny", "--to", "csv", tmp_path)
    assert again.code == 5
    assert "exists already" in again.err
    assert llem("export", "tiny", "--to", "json", "--table", "requests", "out.json").code == 0
    assert len(json.loads(Path("out.json").read_text())) > 4

    plan = llem("plan", sweep).out
    assert f"from past run {run.name}" in plan

    finished = llem("submit", "--inline", sweep)
    assert finished.code == 0
    assert f"{run.name} is finished; --again starts a new run" in finished.err
    assert "4 of 4 trials completed" in finished.out
    assert len(pq.read_table(run / "trials")) == 4

    fresh = llem("submit", "--inline", "--again", "--require-energy", sweep, "--set", "name=tiny")
    assert fresh.code == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == [run.name, f"{run.name}-2"]
    ambiguous = llem("show", "tin")
    assert ambiguous.code == 5
    assert "may be any of 2 runs" in ambiguous.err


def test_a_finished_run_whose_driver_died_before_its_last_compaction_is_compacted(
    llem, sweep: Path, recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(self: DatasetWriter) -> None:
        raise ResultsError("killed here")

    with monkeypatch.context() as killed:
        killed.setattr(DatasetWriter, "compact", die)
        assert llem("submit", "--inline", sweep, "--set", "repeats=1").code == 5
    assert list(only_run().glob("segments/*.arrows"))
    assert not list(only_run().glob("trials/*.parquet"))
    again = llem("submit", "--inline", sweep, "--set", "repeats=1")
    assert again.code == 0
    assert "is finished" in again.err
    assert len(pq.read_table(only_run() / "trials")) == 2
    assert not list(only_run().glob("segments/*.arrows"))


def test_require_energy_fails_where_nothing_measures(llem, sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recording has a GPU only, and a gang on the CPU answers for what measures the CPU."""
    path = tmp_path / "gpu.csv"
    path.write_text("t_s,device_uuid,power_w\n" + "".join(f"{i / 20},GPU-1,90\n" for i in range(2400)))
    monkeypatch.setenv("LLEM_RAY_REPLAY", str(path))
    ended = llem("submit", "--inline", "--require-energy", sweep, "--set", "repeats=1")
    assert ended.code == 4, ended
    assert "2 of 2 trials without a valid measured energy" in ended.err
    assert "2 of 2 trials completed" in ended.out
    rows = pq.read_table(only_run() / "trials").to_pylist()
    assert all(row["total_energy_j"] is None and row["energy_reason"] for row in rows)
    without = llem("submit", "--inline", sweep, "--set", "repeats=1")
    assert without.code == 0


def test_a_trial_that_fails_is_a_row_and_the_others_go_on(llem, sweep: Path, recording: Path) -> None:
    fail = "engine.engine_args={fail: {kind: out_of_memory, batch_above: 1}}"
    ended = llem("submit", "--inline", sweep, "--set", fail)
    assert ended.code == 3, ended
    assert "2 trials failed; --retry-failed" in ended.err
    assert "out_of_memory" in ended.out
    rows = pq.read_table(only_run() / "trials").to_pylist()
    assert sorted((row["status"], row["batch_size"]) for row in rows) == [("completed", 1)] * 2 + [("failed", 2)] * 2
    failed = [row for row in rows if row["status"] == "failed"]
    assert all("run out of memory" in row["failure_message"] for row in failed)
    assert "out_of_memory" in llem("logs", "tiny").out
    assert llem("status", "tiny").out.startswith(f"{only_run().name}: finished, 2 of 4 trials done, 2 failed")
    assert llem("submit", "--inline", sweep, "--set", fail).code == 3
    assert len(pq.read_table(only_run() / "trials")) == 4
    again = llem("submit", "--inline", "--retry-failed", sweep, "--set", fail)
    assert again.code == 3
    assert max(row["attempt"] for row in pq.read_table(only_run() / "trials").to_pylist()) == 2


def test_one_process_at_a_time_works_on_a_run(llem, sweep: Path, recording: Path) -> None:
    """Another process holds the run: submit refuses, status and stop name the holder, and stopping leaves it resumable."""
    slow = ["--set", "measure.min_window_s=30"]
    command = [sys.executable, "-m", "llem_ray", "submit", "--inline", str(sweep), *slow]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as other:
        while not (runs := list(Path("runs").glob("tiny-*/journal.jsonl"))) or "measuring" not in runs[0].read_text():
            assert other.poll() is None, other.stderr
            time.sleep(0.05)
        name = runs[0].parent.name
        refused = llem("submit", "--inline", sweep, *slow)
        assert refused.code == 5
        assert f"process {other.pid} on {os.uname().nodename} works on" in refused.err
        status = llem("status", "tiny").out
        assert status.startswith(f"{name}: running, 0 of 4 trials done, now batch_size=1 repeat=0, process {other.pid}")
        assert RunDirectory(runs[0].parent).is_locked()
        stopped = llem("stop", "tiny", "--now")
        assert stopped.out == f"asked process {other.pid} to stop {name} now\n"
        followed = llem("watch", "tiny")
        assert followed.out.splitlines()[-1].startswith(f"{name}: unfinished, 0 of 4 trials done, submit the same sweep again")
        assert "session ended" in llem("logs", "tiny", "--follow").out
        _, err = other.communicate()
    assert other.returncode == 130, err
    assert "submit the same sweep again to resume" in err
    assert "unfinished" in llem("status", "tiny").out
    shown = llem("show", "tiny")
    assert shown.code == 0
    assert shown.err.startswith(f"{name}: unfinished")


def test_results_go_where_the_environment_says(llem, sweep: Path, recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLEM_RAY_RESULTS", "elsewhere")
    assert llem("submit", "--inline", sweep, "--set", "repeats=1").code == 0
    assert only_run(Path("elsewhere")).name.startswith("tiny-")
    assert llem("show", "tiny").code == 0
    assert not Path("runs").exists()
