"""A disk that is really full or really read-only: a small tmpfs. Needs root; RLIMIT_FSIZE stands in elsewhere."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llem_ray.core.errors import ResultsError
from llem_ray.results.journal import Journal, JournalEvent, replay
from llem_ray.results.reader import read_table
from llem_ray.results.rundir import RunDirectory
from llem_ray.results.writer import DatasetWriter

Make = Callable[..., Any]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_up_loses_nothing_and_goes_on_when_there_is_room(small_disk: Path, make_trial: Make) -> None:
    run = RunDirectory.create(small_disk, "demo")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(600 * 1024))
    writer = DatasetWriter(run)
    written = 0

    def fill() -> None:
        nonlocal written
        for written in range(100):
            writer.write_trial(*make_trial(written))

    with pytest.raises(ResultsError, match="No space left on device") as caught:
        fill()
    assert str(run.path) in caught.value.message
    assert 1 < written < 100
    assert read_table(run.path, "trials").num_rows == written
    assert not list(run.segments_path.glob("*.tmp"))
    ballast.unlink()
    assert writer.write_trial(*make_trial(written))
    writer.finish()
    assert read_table(run.path, "trials").column("trial_id").to_pylist() == [f"cell{n:04d}-r0" for n in range(written + 1)]


def test_a_compaction_without_room_keeps_the_segments(small_disk: Path, make_trial: Make) -> None:
    run = RunDirectory.create(small_disk, "demo")
    writer = DatasetWriter(run)
    for number in range(5):
        writer.write_trial(*make_trial(number))
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize - 8192))
    with pytest.raises(ResultsError, match="No space left on device"):
        writer.compact()
    assert read_table(run.path, "trials").num_rows == 5
    ballast.unlink()
    writer.finish()
    assert read_table(run.path, "trials").num_rows == 5
    assert read_table(run.path, "requests").num_rows == 15


def test_a_full_disk_is_found_before_measuring(small_disk: Path) -> None:
    run = RunDirectory.create(small_disk, "demo")
    (small_disk / "ballast").write_bytes(bytes(1000 * 1024))
    with pytest.raises(ResultsError, match=r"cannot write .*No space left on device"):
        run.check_writable(min_free_bytes=0)


def test_a_journal_on_a_full_disk_says_so_and_stays_whole(small_disk: Path) -> None:
    path = small_disk / "journal.jsonl"
    event = JournalEvent(event="failed", trial_id="a-r0", attempt=1, detail="x" * 10_000)
    with Journal.open(path) as journal:

        def fill() -> None:
            for _ in range(200):
                journal.append(event)

        with pytest.raises(ResultsError, match="No space left on device"):
            fill()
    data = path.read_bytes()
    assert data.endswith(b"\n")
    assert replay(path).failures == {"a-r0": data.count(b"\n")}


def test_a_read_only_disk_is_found_before_measuring(small_disk: Path) -> None:
    run = RunDirectory.create(small_disk, "demo")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(ResultsError, match="Read-only file system") as caught:
        run.check_writable()
    assert "choose another results folder" in (caught.value.hint or "")
    with pytest.raises(ResultsError, match="Read-only file system"):
        RunDirectory.create(small_disk, "other")


def test_a_file_size_limit_loses_nothing(tmp_path: Path, make_trial: Make, make_batch: Make) -> None:
    run = RunDirectory.create(tmp_path, "demo")
    writer = DatasetWriter(run)
    writer.write_trial(*make_trial(0))
    writer.write_power([make_batch(1)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(ResultsError, match="File too large"):
            writer.write_trial(*make_trial(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_table(run.path, "trials").num_rows == 1
    assert writer.write_trial(*make_trial(1))
    assert read_table(run.path, "trials").num_rows == 2
    assert read_table(run.path, "power").num_rows == 8
