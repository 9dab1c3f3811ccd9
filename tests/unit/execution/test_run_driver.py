"""The run driver in this process, with the fake engine and a recorded meter: what it does when its surroundings fail."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from submission import RECORDING

from llem_ray.config.sweep import load_sweep
from llem_ray.core.errors import ResultsError
from llem_ray.core.plan import Plan
from llem_ray.execution import driver
from llem_ray.execution.bookkeeper import Bookkeeper
from llem_ray.execution.driver import RunDriver, RunOptions, RunResult
from llem_ray.execution.inline import InlineExecutor
from llem_ray.planning.plan import make_plan
from llem_ray.results import segments
from llem_ray.results.journal import Journal, JournalEvent
from llem_ray.results.reader import read_table
from llem_ray.results.rundir import RunDirectory

SWEEP = """
schema_version: 1
name: driver
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu, engine_args: {}}
  workload: {output_tokens: 8}
sweep:
  workload.output_tokens: [4, 5, 6, 7, 8]
repeats: 1
measure: {sources: [replay], min_window_s: 1, idle_baseline_s: 0, warmup: {batches: 0}}
"""


class Silent:
    """A progress display that keeps its messages to itself."""

    live = False

    def __init__(self) -> None:
        self.messages: list[str] = []

    def update(self, event: Any) -> None:
        pass

    def message(self, text: str) -> None:
        self.messages.append(text)


class Session:
    """A run directory and sessions of its run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rundir = RunDirectory.create(folder, "driver-00000000")

    def plan(self, text: str = SWEEP) -> Plan:
        path = self.folder / "sweep.yaml"
        path.write_text(text)
        return make_plan(load_sweep(path), past_run=None, gpus_available=0)

    def run(self, text: str = SWEEP, **options: Any) -> RunResult:
        chosen = RunOptions(begin_ns=time.monotonic_ns(), cache_dir=str(self.folder), **options)
        return RunDriver(self.plan(text), self.rundir, InlineExecutor(), chosen, Silent()).run()

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self.rundir.journal_path.read_text().splitlines()]

    def rows(self, table: Any = "trials") -> list[dict[str, Any]]:
        return read_table(self.rundir.path, table).to_pylist()


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    (tmp_path / "recording.csv").write_text(RECORDING)
    monkeypatch.setenv("LLEM_RAY_REPLAY", str(tmp_path / "recording.csv"))
    monkeypatch.setenv("LLEM_RAY_REPLAY_LOOP", "1")
    return Session(tmp_path)


def full_after(trials: int, write: Callable[..., None]) -> Callable[..., None]:
    """``segments.write_segment`` on a disk that is full once it holds so many trials."""
    written = 0

    def write_segment(path: Path, tables: Any) -> None:
        nonlocal written
        written += "trials" in tables
        if written > trials:
            raise ResultsError(f"cannot write {path}: No space left on device")
        write(path, tables)

    return write_segment


def test_a_disk_that_fills_up_ends_the_run_with_that_error(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no failure of the trial that happens to run then: nothing is tried again, no trial is given up."""
    monkeypatch.setattr(segments, "write_segment", full_after(1, segments.write_segment))
    with pytest.raises(ResultsError, match="No space left on device"):
        session.run()
    assert session.events().count("done") == 1
    assert "failed" not in session.events()
    monkeypatch.undo()
    monkeypatch.setenv("LLEM_RAY_REPLAY", str(session.folder / "recording.csv"))
    monkeypatch.setenv("LLEM_RAY_REPLAY_LOOP", "1")
    assert session.run().left == 0
    completed = [row["trial_id"] for row in session.rows() if row["status"] == "completed"]
    assert len(completed) == len(set(completed)) == 5


def test_the_last_attempt_is_recorded_even_if_its_samples_never_come(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "DRAIN_TIMEOUT_S", 0.0)
    assert session.run().left == 0
    assert [row["status"] for row in session.rows()] == ["completed"] * 5
    assert session.events()[-1] == "run_finished"


def wait_until_broken(book: Bookkeeper, timeout_s: float) -> None:
    while book.is_running:
        time.sleep(0.05)


def test_an_error_of_the_very_last_row_is_not_lost(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bookkeeping lags behind the trials: it may break after the last one has ended, with room on the disk again then."""
    write = segments.write_segment
    refused = False

    def write_segment(path: Path, tables: Any) -> None:
        nonlocal refused
        if "trials" in tables and tables["trials"].column("output_tokens")[0].as_py() and not refused:
            refused = True
            raise ResultsError(f"cannot write {path}: No space left on device")
        write(path, tables)

    monkeypatch.setattr(segments, "write_segment", write_segment)
    one = SWEEP.replace("[4, 5, 6, 7, 8]", "[4]")
    monkeypatch.setattr(Bookkeeper, "drain", wait_until_broken)
    with pytest.raises(ResultsError, match="No space left on device"):
        session.run(one)


def test_a_failed_load_s_waste_is_what_its_phase_says(session: Session) -> None:
    """Start-up and the bare idle baseline before the load are phases of their own, and no waste."""
    failing = SWEEP.replace("engine_args: {}", "engine_args: {load_ms: 1000, fail: {kind: load}}").replace(
        "idle_baseline_s: 0", "idle_baseline_s: 2"
    )
    session.run(failing)
    first = min((row for row in session.rows() if row["waste_energy_j"] is not None), key=lambda row: row["trial_id"])
    phases = session.rows("phases")
    wasted = [row for row in phases if row["phase"] == "waste"]
    before = [row for row in phases if row["phase"] in {"startup", "bare_idle"}]
    assert first["failure_kind"] == "load"
    assert first["waste_energy_j"] == pytest.approx(sum(row["energy_j"] for row in wasted), rel=0.1)
    # It loaded for a second, and what the machine made of that, at 50 W.
    wasted_s = sum(row["duration_s"] for row in wasted)
    assert wasted_s >= 1.0
    assert first["waste_energy_j"] == pytest.approx(50 * wasted_s, rel=0.1)
    assert sum(row["duration_s"] for row in before) >= 2.0
    assert max(row["end_ns"] for row in before) <= min(row["begin_ns"] for row in wasted)


def test_stopping_for_failures_in_a_row_gives_up_nothing_else(session: Session) -> None:
    """The cause may be this machine's: what was not tried is still to do, and a resumed run tries it."""
    failing = SWEEP.replace("engine_args: {}", "engine_args: {fail: {kind: load, once: struck}}").replace(
        "measure: {", "measure: {max_consecutive_failures: 1, "
    )
    stopped = session.run(failing)
    assert (stopped.left, stopped.failed) == (5, 0)
    assert stopped.stopped is not None
    assert session.run(failing).completed == 5


def test_attempts_that_were_cut_short_do_not_use_up_the_retries(session: Session) -> None:
    failing = SWEEP.replace("engine_args: {}", "engine_args: {fail: {kind: hang, once: struck}}").replace(
        "measure: {sources: [replay], min_window_s: 1", "measure: {trial_timeout_s: 4, sources: [replay], min_window_s: 0.2"
    )
    trials = session.plan(failing).trials
    with Journal.open(session.rundir.journal_path) as journal:
        journal.append(JournalEvent(event="measuring", trial_id=trials[0].trial_id, attempt=3))
    result = session.run(failing)
    assert (result.completed, result.failed) == (5, 0)
    attempts = {row["attempt"]: row["failure_kind"] for row in session.rows() if row["trial_id"] == trials[0].trial_id}
    assert attempts == {3: "interrupted", 4: "hang", 5: None}


def test_a_retried_repeat_opens_what_its_cell_did_not_need(session: Session) -> None:
    """With another value among the first ones a cell may need more than it got: whether it does is asked again."""
    # Any five durations are as close together as that, on any machine.
    target = "repeats: 8\nstopping: {half_width_rel: 0.9, confidence: 0.6, metric: output_throughput_tok_s}"
    failing = (
        SWEEP.replace("[4, 5, 6, 7, 8]", "[4]").replace("repeats: 1", target).replace("min_window_s: 1", "min_window_s: 0.2")
    )
    failing = failing.replace("engine_args: {}", "engine_args: {decode_ms: 20, fail: {kind: nan, once: struck}}").replace(
        "measure: {", "measure: {max_attempts: 1, "
    )
    first = session.run(failing)
    assert (first.completed, first.failed, first.left) == (5, 1, 0)
    assert session.events().count("not_needed") == 2
    again = session.run(failing, retry_failed=True)
    assert (again.completed, again.failed, again.left) == (1, 0, 0)
    assert session.events().count("not_needed") == 4
