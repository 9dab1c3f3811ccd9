"""kill -9 at every file operation of a write and a compaction: nothing is lost, nothing is twice."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llem_ray.results.journal import Journal, JournalEvent
from llem_ray.results.reader import read_table, settled_state
from llem_ray.results.rundir import RunDirectory
from llem_ray.results.writer import DatasetWriter

Make = Callable[..., Any]
FILE_EVENTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.truncate"})
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def run_and_die(work: Callable[[], None], at_event: int) -> bool:
    """Run ``work`` in a child that kills itself just before its ``at_event``-th file operation; False when it got through."""
    pid = os.fork()
    if pid == 0:
        seen = 0

        def count(event: str, args: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in FILE_EVENTS:
                seen += 1
                if seen == at_event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            work()
        except BaseException:  # noqa: BLE001 - the child must never return into pytest
            os._exit(3)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return False


def counts(run: RunDirectory) -> dict[str, Counter[str]]:
    return {name: Counter(read_table(run.path, name).column("trial_id").to_pylist()) for name in ("trials", "requests", "phases")}


@pytest.mark.parametrize("compact_trials", [1, 100])
def test_killed_anywhere_the_dataset_stays_whole(tmp_path: Path, make_trial: Make, make_batch: Make, compact_trials: int) -> None:
    base = RunDirectory.create(tmp_path, "base")
    writer = DatasetWriter(base, compact_trials=3)
    for number in range(5):
        writer.write_power([make_batch(number)])
        writer.write_trial(*make_trial(number))
    before = {f"cell{number:04d}-r0" for number in range(5)}
    new = "cell0005-r0"

    for at_event in range(1, 500):
        run = RunDirectory(tmp_path / "copy" / base.name)
        shutil.copytree(base.path, run.path)

        def work(run: RunDirectory = run) -> None:
            writer = DatasetWriter(run, compact_trials)
            writer.write_power([make_batch(5)])
            writer.write_trial(*make_trial(5))
            writer.finish()

        died = run_and_die(work, at_event)
        seen = counts(run)
        there = before | set(seen["trials"]) & {new}
        assert seen["trials"] == Counter(there), f"event {at_event}"
        assert seen["requests"] == Counter(dict.fromkeys(there, 3))
        assert seen["phases"] == Counter(dict.fromkeys(there, 2))
        assert read_table(run.path, "power").num_rows == 8 * len(there)

        again = DatasetWriter(run, compact_trials)
        assert not list(run.path.rglob("*.tmp"))
        written = [again.write_trial(*make_trial(number)) for number in range(6)]
        assert written == [False] * 5 + [new not in there]
        again.finish()
        after = counts(run)
        assert after["trials"] == Counter(before | {new})
        assert after["requests"] == Counter(dict.fromkeys(before | {new}, 3))
        assert after["phases"] == Counter(dict.fromkeys(before | {new}, 2))
        assert list(run.segments_path.iterdir()) == []
        shutil.rmtree(run.path)
        if not died:
            break
    assert at_event > 20, "the child was never killed"
    assert not died


def test_killed_between_row_and_journal_the_trial_counts_as_done(tmp_path: Path, make_trial: Make) -> None:
    run = RunDirectory.create(tmp_path, "demo")
    with Journal.open(run.journal_path) as journal:
        journal.append(JournalEvent(event="run_started", pid=1, host="h"))
        for number in range(4):
            journal.append(JournalEvent(event="leased", trial_id=f"cell{number:04d}-r0", attempt=1))
    writer = DatasetWriter(run)
    writer.write_trial(*make_trial(0))
    writer.write_trial(*make_trial(1, status="failed", failure_kind="hang"))
    writer.write_trial(*make_trial(2, status="failed", failure_kind="interrupted"))
    state = settled_state(run)
    assert state.done == {"cell0000-r0": 1}
    assert state.failures == {"cell0001-r0": 1}
    assert state.open_attempts == {"cell0003-r0": 1}
    assert [state.next_attempt(f"cell{number:04d}-r0") for number in range(5)] == [2, 2, 2, 2, 1]


def test_a_done_trial_whose_row_is_gone_is_run_again(tmp_path: Path, make_trial: Make) -> None:
    run = RunDirectory.create(tmp_path, "demo")
    writer = DatasetWriter(run)
    with Journal.open(run.journal_path) as journal:
        for number in range(2):
            writer.write_trial(*make_trial(number))
            journal.append(JournalEvent(event="done", trial_id=f"cell{number:04d}-r0", attempt=1))
        journal.append(JournalEvent(event="run_finished"))
    assert settled_state(run).finished
    (run.segments_path / "00000002.arrows").unlink()
    state = settled_state(run)
    assert (state.done, state.finished, state.next_attempt("cell0001-r0")) == ({"cell0000-r0": 1}, False, 2)
