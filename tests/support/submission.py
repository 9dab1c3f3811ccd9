"""Runs of the real command in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from llem_ray.results.reader import read_table
from llem_ray.results.rundir import RunDirectory

RECORDING = "t_s,device_uuid,power_w,energy_j,scope\n" + "".join(
    f"{tick / 10:.1f},cpu-0,50,{tick * 5},cpu_package\n" for tick in range(0, 3000)
)
DEADLINE_S = 120.0


class Submission:
    """`llem-ray submit` of one sweep, as a process that tests may signal."""

    def __init__(self, folder: Path, sweep: str) -> None:
        self.folder = folder
        self.results = folder / "runs"
        (folder / "sweep.yaml").write_text(sweep)
        (folder / "recording.csv").write_text(RECORDING)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "llem_ray", "submit", str(self.folder / "sweep.yaml"), "--results", str(self.results)]
        env = {**os.environ, "LLEM_RAY_REPLAY": str(self.folder / "recording.csv"), "LLEM_RAY_REPLAY_LOOP": "1"}
        return subprocess.Popen(
            [*command, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def finish(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        output, _ = process.communicate(timeout=DEADLINE_S)
        return process.returncode, output

    def run(self, *arguments: str) -> tuple[int, str]:
        return self.finish(self.start(*arguments))

    @property
    def rundir(self) -> RunDirectory:
        return RunDirectory.open(next(self.results.iterdir()))

    def trials(self) -> list[dict[str, object]]:
        return read_table(self.rundir.path, "trials").to_pylist()

    def wait_until(self, condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the condition never came true"
            time.sleep(0.05)

    def journal(self) -> str:
        runs = list(self.results.iterdir()) if self.results.is_dir() else []
        path = runs[0] / "journal.jsonl" if runs else None
        return path.read_text() if path is not None and path.exists() else ""


@contextlib.contextmanager
def suspended(pid: int) -> Iterator[None]:
    """The process runs but gets no further, however long this one takes meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def kill_hard(process: subprocess.Popen[str]) -> None:
    """kill -9 of the run driver alone: whatever it started must notice by itself."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=DEADLINE_S)
    if process.stdout is not None:
        process.stdout.close()
