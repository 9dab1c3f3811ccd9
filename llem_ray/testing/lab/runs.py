"""Runs of the real command in a lab, with what their run directory says meanwhile: for breaking things at the right moment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from llem_ray.results.reader import read_table
from llem_ray.results.schema import TableName
from llem_ray.testing.lab.lab import Lab
from llem_ray.testing.lab.machine import Entered, Process

DEADLINE_S: Final = 150.0
_POLL_S: Final = 0.05


class LabRun:
    """``llem-ray submit`` of one sweep on a host of a lab.

    Args:
        lab: An entered lab with Ray.
        folder: Holds the sweep, the results and what the command says.
        sweep: Text of the sweep file.
        host: Where the command runs; default: the head.
    """

    def __init__(self, lab: Lab, folder: Path, sweep: str, *, host: str | None = None) -> None:
        assert lab.head is not None
        self.lab, self.folder, self.host = lab, folder, host or lab.head
        self.results = folder / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sweep.yaml").write_text(sweep, encoding="utf-8")
        self._process: Entered | None = None

    def start(self, *arguments: str, env: Mapping[str, str] | None = None) -> Entered:
        """Start the command."""
        command = [sys.executable, "-m", "llem_ray", "submit", str(self.folder / "sweep.yaml"), "--results", str(self.results)]
        command += ["--address", self.lab.address, *arguments]
        with (self.folder / "output.txt").open("ab") as log:
            self._process = self.lab.popen(self.host, command, env=env, stdout=log, stderr=subprocess.STDOUT)
        return self._process

    def finish(self, timeout_s: float = DEADLINE_S) -> int:
        """Wait for the command's end and return its exit code.

        Raises:
            TimeoutError: It did not end; it has been killed, and the text is the end of what it said.
        """
        assert self._process is not None
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            raise TimeoutError(f"the run did not end within {timeout_s:g} s; the end of what it said:\n{self.said()}") from None

    def run(self, *arguments: str, timeout_s: float = DEADLINE_S, env: Mapping[str, str] | None = None) -> int:
        """Start and finish."""
        self.start(*arguments, env=env)
        return self.finish(timeout_s)

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Within it the command gets no further, however long that takes."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)
            os.kill(self._process.pid, signal.SIGCONT)  # nsenter stops with its command

    def kill(self) -> None:
        """SIGKILL the command alone."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(DEADLINE_S)

    def said(self) -> str:
        """What the command said, all sessions, and the end of the run's log."""
        path = self.folder / "output.txt"
        log = self.path / "run.log" if self.results.is_dir() and any(self.results.iterdir()) else None
        tail = log.read_text(encoding="utf-8")[-8000:] if log is not None and log.exists() else ""
        return path.read_text(encoding="utf-8", errors="replace") + "\n--- run.log ---\n" + tail

    @property
    def path(self) -> Path:
        """The run directory."""
        return next(self.results.iterdir())

    def table(self, name: TableName) -> list[dict[str, Any]]:
        """Rows of a table so far."""
        rows: list[dict[str, Any]] = read_table(self.path, name).to_pylist()
        return rows

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        """Lines of the journal so far, of one name or all."""
        if not self.results.is_dir() or not any(self.results.iterdir()):
            return []
        journal = self.path / "journal.jsonl"
        lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in events if name in {None, event["event"]}]

    def wait_until(self, true: Callable[[], bool], what: str, timeout_s: float = DEADLINE_S) -> None:
        """Wait for something to become true while the command runs.

        Raises:
            RuntimeError: The command has ended before.
            TimeoutError: It did not become true in time.
        """
        assert self._process is not None
        deadline = time.monotonic() + timeout_s
        while not true():
            if self._process.poll() is not None:
                raise RuntimeError(f"the run ended with {self._process.returncode} before {what}:\n{self.said()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout_s:g} s for {what}:\n{self.said()}")
            time.sleep(_POLL_S)

    def wait_for(self, name: str, count: int, timeout_s: float = DEADLINE_S) -> dict[str, Any]:
        """Wait for the journal's ``count``-th event of a name, and return it."""
        self.wait_until(lambda: len(self.events(name)) >= count, f"{name} number {count}", timeout_s)
        return self.events(name)[count - 1]

    def actors(self, host: str, kind: str) -> Sequence[Process]:
        """Actor processes of a host: ``EngineActor`` or ``SamplerActor``."""
        return [process for process in self.lab.pids(host) if process.command.startswith(f"ray::{kind}")]

    def kill_actors(self, host: str, kind: str) -> int:
        """SIGKILL the actor processes of a host; returns how many there were."""
        found = self.actors(host, kind)
        for process in found:
            os.kill(process.pid, signal.SIGKILL)
        return len(found)
