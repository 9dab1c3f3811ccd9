from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llem_ray.core.errors import ResultsError, RunInUse
from llem_ray.results.rundir import RunDirectory, find_run, latest_run, list_runs

HOLDER = """
import sys
from pathlib import Path
from llem_ray.results.rundir import RunDirectory
with RunDirectory.open(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs", "demo-0a1b2c3d")


@pytest.fixture
def holder(run: RunDirectory) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run's lock until its stdin closes."""
    command = [sys.executable, "-c", HOLDER, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_told_who_holds_it(run: RunDirectory, holder: subprocess.Popen[str]) -> None:
    assert run.is_locked()
    assert run.holder() == (holder.pid, socket.gethostname())
    with pytest.raises(RunInUse, match=f"process {holder.pid} on {socket.gethostname()} works on {run.path}"), run.lock():
        pass


def test_kill_9_releases_the_lock(run: RunDirectory, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not run.is_locked()
    assert run.holder() is None
    with run.lock():
        assert run.is_locked()
        assert str(os.getpid()) in (run.path / "lock").read_text()
    assert not run.is_locked()
    assert (run.path / "lock").read_text() == ""


def test_the_lock_is_released_when_the_work_fails(run: RunDirectory) -> None:
    with pytest.raises(ZeroDivisionError), run.lock():
        raise ZeroDivisionError
    with run.lock():
        pass


def test_again_counts_on_and_latest_is_resumed(tmp_path: Path) -> None:
    names = [RunDirectory.create(tmp_path, "demo-0a1b2c3d", again=True).name for _ in range(3)]
    RunDirectory.create(tmp_path, "demo-0a1b2c3d-x")
    assert names == ["demo-0a1b2c3d", "demo-0a1b2c3d-2", "demo-0a1b2c3d-3"]
    assert latest_run(tmp_path, "demo-0a1b2c3d") == tmp_path / "demo-0a1b2c3d-3"
    assert latest_run(tmp_path, "other") is None
    assert latest_run(tmp_path / "absent", "demo-0a1b2c3d") is None
    with pytest.raises(ResultsError, match="File exists"):
        RunDirectory.create(tmp_path, "demo-0a1b2c3d")


def test_a_run_is_found_by_path_name_or_unique_beginning(run: RunDirectory) -> None:
    root = run.path.parent
    assert find_run(root, str(run.path)).path == run.path
    assert find_run(root, run.name).path == run.path
    assert find_run(root, "dem").path == run.path
    RunDirectory.create(root, "demo-ffff0000")
    (root / "not-a-run").mkdir()
    (root / ".demo-half-made.tmp" / "segments").mkdir(parents=True)
    assert {path.name for path in list_runs(root)} == {run.name, "demo-ffff0000"}
    with pytest.raises(ResultsError, match="any of 2 runs"):
        find_run(root, "demo-")
    with pytest.raises(ResultsError, match="no run 'nope'") as caught:
        find_run(root, "nope")
    assert run.name in (caught.value.hint or "")
    with pytest.raises(ResultsError, match="is not a run directory"):
        find_run(root, "not-a-run")
    with pytest.raises(ResultsError, match="no run 'x'") as caught:
        find_run(root / "absent", "x")
    assert "llem-ray submit" in (caught.value.hint or "")


def test_json_files_are_whole_and_checked(run: RunDirectory) -> None:
    run.write_json("plan", {"name": "dämo", "trials": [1, 2]})
    assert run.has_json("plan")
    assert run.read_json("plan") == {"name": "dämo", "trials": [1, 2]}
    run.write_text("sweep.json", '{"ä": 1}')
    assert run.read_json("sweep") == {"ä": 1}
    (run.path / "sweep.json").unlink()
    assert not list(run.path.glob("*.tmp"))
    with pytest.raises(ResultsError, match=r"cannot read .*sweep\.json: No such file"):
        run.read_json("sweep")
    (run.path / "plan.json").write_text("{")
    with pytest.raises(ResultsError, match="is not JSON"):
        run.read_json("plan")
    (run.path / "plan.json").write_text("[]")
    with pytest.raises(ResultsError, match="is not a JSON object"):
        run.read_json("plan")


def test_a_results_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match=f"cannot create {tmp_path}/file/runs: Not a directory"):
        RunDirectory.create(tmp_path / "file" / "runs", "demo")


def test_too_little_room_is_refused_before_measuring(run: RunDirectory) -> None:
    run.check_writable()
    with pytest.raises(ResultsError, match=r"MB free, at least [0-9]+ MB needed"):
        run.check_writable(min_free_bytes=2**62)
    assert not list(run.path.glob(".probe*"))
