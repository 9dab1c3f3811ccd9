"""Only what an engine made, and nobody uses, is removed from shared memory."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

from llem_ray.backends.process.leftovers import MARK, SegmentLog, find_processes, kill_processes

HOLD = "import sys; held = open(sys.argv[1], 'r+b'); print(flush=True); sys.stdin.read()"


def hold(path: Path) -> subprocess.Popen[bytes]:
    """A process that has the file open."""
    process = subprocess.Popen([sys.executable, "-S", "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    process.communicate()


def test_what_was_seen_in_use_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    log = SegmentLog(tmp_path)
    (tmp_path / "ours").write_bytes(b"ours")
    (tmp_path / "foreign").write_bytes(b"foreign")
    engines = [hold(tmp_path / "old"), hold(tmp_path / "ours")]
    log.observe([engine.pid for engine in engines])
    for engine in engines:
        end(engine)
    assert log.remove_leftovers() == ("ours",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "old"]
    assert log.remove_leftovers() == ()


def test_what_somebody_still_uses_stays(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path)
    for name in ("open", "mapped"):
        (tmp_path / name).write_bytes(bytes(4096))
        engine = hold(tmp_path / name)
        log.observe([engine.pid])
        end(engine)
    with (tmp_path / "mapped").open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 4096)
    other = hold(tmp_path / "open")
    assert log.remove_leftovers() == ()
    mapped.close()
    assert log.remove_leftovers() == ("mapped",)
    end(other)
    assert log.remove_leftovers() == ("open",)


def test_a_name_that_was_taken_over_by_another_file_stays(tmp_path: Path) -> None:
    log = SegmentLog(tmp_path)
    path = tmp_path / "name"
    path.write_bytes(b"ours")
    engine = hold(path)
    log.observe([engine.pid])
    end(engine)
    (tmp_path / "other").write_bytes(b"theirs")
    (tmp_path / "other").rename(path)
    assert log.remove_leftovers() == ()
    assert path.read_bytes() == b"theirs"


def test_a_name_with_the_id_of_an_engine_s_process_is_the_engine_s(tmp_path: Path) -> None:
    (tmp_path / "torch_77_1_0").touch()
    log = SegmentLog(tmp_path)
    log.observe([77])
    for name in ("torch_77_2_0", "torch_78_2_0", "x_torch_77_2_0"):
        (tmp_path / name).touch()
    (tmp_path / "torch_77_link").symlink_to(tmp_path / "torch_78_2_0")
    assert log.remove_leftovers() == ("torch_77_2_0",)


def test_processes_are_found_by_group_and_by_mark() -> None:
    mark = f"{MARK}=test-{os.getpid()}"
    name, _, value = mark.partition("=")
    sleep = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    leader = subprocess.Popen(sleep, start_new_session=True)
    marked = subprocess.Popen(sleep, start_new_session=True, env={**os.environ, name: value})
    other = subprocess.Popen(sleep, start_new_session=True, env={**os.environ, name: value + "0"})
    try:
        assert find_processes(leader.pid, mark) == {leader.pid, marked.pid}
        assert kill_processes(leader.pid, mark, signal.SIGKILL, 20.0) == set()
        assert (leader.wait(), marked.wait(), other.poll()) == (-9, -9, None)
    finally:
        other.kill()
        other.wait()
