"""What the reaper ends, and what it leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llem_ray.execution.ray as package

REAPER = Path(package.__file__).with_name("reaper.py")
SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(300)"]


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_it_ends_what_carries_the_mark_or_has_the_folder_open(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    folder = tmp_path / "ray"
    folder.mkdir()
    mark = f"LLEM_RAY_EMBEDDED={folder}"
    with (folder / "log").open("w") as log:
        marked = subprocess.Popen(SLEEP, env={**os.environ, "LLEM_RAY_EMBEDDED": str(folder)})
        logging = subprocess.Popen(SLEEP, stderr=log)
    driver = subprocess.Popen(SLEEP, env={**os.environ, "LLEM_RAY_EMBEDDED": str(folder)})
    stranger = subprocess.Popen(SLEEP, env={**os.environ, "LLEM_RAY_EMBEDDED": f"{folder}-2"})
    started += [marked, logging, driver, stranger]
    command = [sys.executable, "-I", "-S", str(REAPER), mark, str(folder), str(driver.pid)]
    reaper = subprocess.Popen(command, stdin=subprocess.PIPE)
    started.append(reaper)
    assert reaper.stdin is not None
    assert [process.poll() for process in started] == [None] * 5
    reaper.stdin.close()
    assert reaper.wait(timeout=60) == 0
    assert marked.wait(timeout=10) == -9
    assert logging.wait(timeout=10) == -9
    assert driver.poll() is None
    assert stranger.poll() is None
    assert not folder.exists()


def test_with_nothing_left_it_ends_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    folder.mkdir()
    command = [sys.executable, "-I", "-S", str(REAPER), f"LLEM_RAY_EMBEDDED={folder}", str(folder), "1"]
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True, timeout=60)
    assert not folder.exists()
