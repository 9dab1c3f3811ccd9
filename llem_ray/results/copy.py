"""Copies a run's finished files elsewhere while it runs: each whole, in an order that leaves a readable dataset throughout."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pyarrow as pa

from llem_ray.core.errors import LlemRayError, ResultsError
from llem_ray.results.copied import (
    DOCUMENTS,
    LOG_NAME,
    OWNER,
    Owner,
    data_files,
    join_journal,
    journal_path,
    journal_pieces,
    refuse_active,
)
from llem_ray.results.destination import STORE_ERRORS, Destination, destination_error, destination_errors
from llem_ray.results.journal import whole_lines
from llem_ray.results.rundir import RunDirectory
from llem_ray.results.schema import TABLE_NAMES
from llem_ray.results.segments import list_parts, list_segments

LOG = logging.getLogger(__name__)

PAUSE_S: Final = 5.0
"""Between two looks at the run directory."""
LONGEST_PAUSE_S: Final = 120.0
"""Between two tries while the destination fails."""
HEARTBEAT_S: Final = 30.0
STALL_S: Final = 30.0
"""At the end of a run the copy is given up after so long without progress."""
JOURNAL_PIECES: Final = 100
"""So many pieces of the journal are merged into one."""
_TRIES: Final = 10
_SESSION_MARK: Final = b'"event":"run_started"'


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyReport:
    """What became of a copy."""

    files: int
    """Files written by this process, pieces of the journal included."""
    size_bytes: int
    missing: int
    """Files that are not there, the journal counted as one; 0 when the copy is complete."""
    reason: str | None
    """Why they are not."""


class _Vanished(Exception):
    """A local file was compacted away while it was being copied."""


class _TakenOver(ResultsError):
    """Another process writes the copy now."""


class RunCopy:
    """Copies one run to a folder of a destination that is named after it.

    As a context manager it copies in the background: failures of the destination never reach the run. Inside, the thread alone
    uses the destination.

    Args:
        run: The run.
        destination: The folder with copies of runs.
        tell: Told, once each, that copying fails, works again, was taken over.
        take_over: Write although another process seems to.
        pause_s: Between two looks at the run directory.
        stall_s: At the end, give up after so long without progress.

    Raises:
        ResultsError: The destination is the run directory itself.
    """

    def __init__(
        self,
        run: RunDirectory,
        destination: Destination,
        *,
        tell: Callable[[str], None] = LOG.warning,
        take_over: bool = False,
        pause_s: float = PAUSE_S,
        stall_s: float = STALL_S,
    ) -> None:
        self.copy = destination.child(run.name)
        if self.copy.is_local and Path(self.copy.path).resolve() == run.path.resolve():
            raise ResultsError(f"{self.copy.shown} is the run directory itself", "copy to a folder outside the results folder")
        self._run, self._argument, self._tell = run, destination.argument, tell
        self._take_over, self._pause_s, self._stall_s = take_over, pause_s, stall_s
        self._session = uuid.uuid4().hex
        self._there: dict[str, int] | None = None
        self._journal = b""
        self._documents: dict[str, tuple[int, int]] = {}
        self._beaten_s = self._advanced_s = float("-inf")
        self._files = self._size_bytes = 0
        self._reason: str | None = None
        self._complete = False
        self._stop, self._abandoned = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._keep_copying, name="run-copy", daemon=True)

    def claim(self) -> None:
        """Make sure that the copy is of this run and nobody else's, and say that it is ours.

        Raises:
            RunInUse: Another process seems to write it.
            ResultsError: It is of another run, or of this one after it went on elsewhere; or it cannot be read or written.
        """
        with destination_errors(self.copy):
            if not self._take_over:
                refuse_active(self.copy, Owner.read(self.copy))
            self._look()
            self._write_owner(active=True)

    def copy_once(self) -> CopyReport:
        """Copy everything now, in this thread.

        Raises:
            RunInUse: Another process seems to write the copy.
            ResultsError: It belongs to another run, or the destination fails.
        """
        self.claim()
        with destination_errors(self.copy):
            self._bring_up_to_date()
            self._round_off()
        return self._report()

    def __enter__(self) -> Self:
        self.claim()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        report = self.close()
        if report.missing:
            lack = f"{report.missing} files are missing ({report.reason})"
            rest = f"llem-ray copy {self._run.path} '{self._argument}'"
            self._tell(f"the copy in {self.copy.shown} is not complete: {lack}. Nothing is lost; finish it with: {rest}")

    def close(self) -> CopyReport:
        """Copy what is left; gives up when nothing moves for ``stall_s``."""
        self._advanced_s = time.monotonic()
        self._stop.set()
        try:
            while self._thread.is_alive() and time.monotonic() - self._advanced_s < self._stall_s:
                self._thread.join(0.1)
        except KeyboardInterrupt:
            self._reason = self._reason or "interrupted"
        self._abandoned.set()
        if self._thread.is_alive() and self._reason is None:
            self._reason = f"no progress within {self._stall_s:g} s"
        return self._report()

    def _keep_copying(self) -> None:
        pause_s = self._pause_s
        while not self._abandoned.is_set():
            self._stop.wait(pause_s)
            stopping = self._stop.is_set()
            try:
                self._bring_up_to_date()
                if stopping:
                    self._round_off()
                    return
            except _TakenOver as error:
                self._reason = error.message
                self._tell(f"{error.message}: nothing more is copied from here")
                return
            except Exception as error:  # noqa: BLE001 - whatever ails the copy, the run goes on
                self._note_trouble(error)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                if stopping:
                    self._abandoned.wait(min(self._pause_s, PAUSE_S))
                continue
            if self._reason is not None:
                self._tell(f"copying to {self.copy.shown} works again")
            self._reason, pause_s = None, self._pause_s

    def _note_trouble(self, error: Exception) -> None:
        """What the destination holds is not known any more; the user hears of it once."""
        self._there = None
        told = self._reason is not None
        if isinstance(error, STORE_ERRORS):
            self._reason = destination_error(self.copy, error).message
        else:
            self._reason = error.message if isinstance(error, LlemRayError) else f"{type(error).__name__}: {error}"
        LOG.info("%s", self._reason, exc_info=error)
        if not told:
            self._tell(f"{self._reason}; the run goes on, copying is tried again")

    def _report(self) -> CopyReport:
        missing = 0 if self._complete else self._count_missing()
        return CopyReport(
            files=self._files, size_bytes=self._size_bytes, missing=missing, reason=self._reason if missing else None
        )

    def _count_missing(self) -> int:
        there = self._there or {}
        files = {**self._local_segments(), **self._local_parts()}
        data = sum(there.get(name) != path.stat().st_size for name, path in files.items() if path.exists())
        documents = sum(
            self._documents.get(name) != _stamp(path) for name in DOCUMENTS if (path := self._run.path / name).exists()
        )
        return data + documents + 1  # the journal or the log

    # Everything below runs in the copying thread.

    def _bring_up_to_date(self) -> None:
        """Copy whatever is new; begin anew when a compaction moves rows meanwhile."""
        for _ in range(_TRIES):
            try:
                self._beat()
                if self._there is None:
                    self._look()
                return self._mirror()
            except _Vanished:
                continue
        raise ResultsError(f"{self._run.path} changed faster than it could be copied")

    def _mirror(self) -> None:
        """One pass. Rows go before the journal that calls them done, Parquet parts before their segments are deleted."""
        journal = self._local_journal()
        segments = self._local_segments()  # before the parts: what is compacted in between is in those
        parts = self._local_parts()
        there = self._index()
        for name in DOCUMENTS:
            self._send_document(name)
        # A session is told before its rows: two machines that both went on from this copy then differ in the journal.
        self._send_journal(journal[: journal.find(b"\n", max(journal.rfind(_SESSION_MARK), 0)) + 1])
        known = data_files(there)
        self._delete(name for name in sorted(known - parts.keys()) if not name.startswith("segments/"))
        for name, path in {**parts, **segments}.items():
            self._send_file(name, path)
        self._delete(name for name in sorted(known - segments.keys()) if name.startswith("segments/"))
        self._send_journal(journal)

    def _round_off(self) -> None:
        """The run is over for this process: its log, and the copy is free for others."""
        if self._run.log_path.exists():
            self._send(LOG_NAME, self._run.log_path.read_bytes())
        self._write_owner(active=False)
        self._complete = True

    def _look(self) -> None:
        """Find out what the destination holds.

        Raises:
            ResultsError: It is not an earlier state of this run.
        """
        there = self.copy.list_files()
        copied, local = join_journal(self.copy, there), self._local_journal()
        if not local.startswith(copied) or (not copied and data_files(there)):
            raise ResultsError(
                f"{self.copy.shown} holds another run of this name, or this run after it went on elsewhere",
                f"to go on from the copy move {self._run.path} away and submit again; to keep both choose another destination",
            )
        self._there, self._journal = there, copied

    def _index(self) -> dict[str, int]:
        assert self._there is not None, "nobody has looked yet"
        return self._there

    def _beat(self) -> None:
        """Say now and then that we are alive.

        Raises:
            _TakenOver: Another process writes the copy now.
        """
        if time.monotonic() - self._beaten_s < HEARTBEAT_S and self._there is not None:
            return
        owner = Owner.read(self.copy)
        if owner is not None and owner.session != self._session:
            raise _TakenOver(f"process {owner.pid} on {owner.host} has taken over {self.copy.shown}")
        self._write_owner(active=True)

    def _write_owner(self, *, active: bool) -> None:
        now_s = time.time() if active else None
        owner = Owner(host=socket.gethostname(), pid=os.getpid(), session=self._session, heartbeat_s=now_s)
        self.copy.write(OWNER, owner.encode())
        self._beaten_s = time.monotonic()

    def _send(self, name: str, data: bytes | pa.Buffer) -> None:
        self._beat()
        self.copy.write(name, data, self._advance)
        self._index()[name] = len(data)
        self._files += 1
        self._size_bytes += len(data)

    def _advance(self) -> None:
        self._advanced_s = time.monotonic()

    def _send_file(self, name: str, path: Path) -> None:
        try:
            size = path.stat().st_size
            if self._index().get(name) == size:
                return
            with pa.memory_map(str(path)) as source:
                self._send(name, source.read_buffer())
        except FileNotFoundError as error:
            if path.exists():
                raise
            raise _Vanished from error

    def _send_document(self, name: str) -> None:
        path = self._run.path / name
        if path.exists() and self._documents.get(name) != (stamp := _stamp(path)):
            self._send(name, path.read_bytes())
            self._documents[name] = stamp

    def _send_journal(self, journal: bytes) -> None:
        """Send the lines that are not there yet, as a piece of their own."""
        fresh = journal[len(self._journal) :]
        if fresh:
            self._send(journal_path(self._journal.count(b"\n") + 1), fresh)
            self._journal = journal
        pieces = journal_pieces(self._index())
        if len(pieces) > JOURNAL_PIECES:
            first, *others = pieces.values()
            self._send(first, self._journal)
            self._delete(others)

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            self.copy.delete([name])
            self._index().pop(name, None)
            self._advance()

    def _local_journal(self) -> bytes:
        return whole_lines(self._run.journal_path)[0] if self._run.journal_path.exists() else b""

    def _local_segments(self) -> dict[str, Path]:
        return {f"segments/{path.name}": path for path in list_segments(self._run.segments_path).values()}

    def _local_parts(self) -> dict[str, Path]:
        tables = {table: list_parts(self._run.table_path(table))[0] for table in TABLE_NAMES}
        return {f"{table}/{path.name}": path for table, paths in tables.items() for path in paths}


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size
