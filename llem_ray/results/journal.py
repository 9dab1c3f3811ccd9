"""The run's journal: fsynced, append-only JSON Lines. What a resumed run knows, it knows from here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, get_args

from llem_ray.core.errors import ResultsError
from llem_ray.results.files import storage_errors, sync_directory

EventName = Literal["run_started", "leased", "measuring", "done", "failed", "not_needed", "interrupted", "run_finished"]

_NAMES: Final = frozenset(get_args(EventName))
_ATTEMPT_NAMES: Final = frozenset({"leased", "measuring", "done", "failed"})


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalEvent:
    """One line of the journal.

    ``leased``, ``measuring``, ``done`` and ``failed`` are about one attempt and need ``trial_id`` and ``attempt``;
    ``interrupted`` may name the attempt it cut short; ``not_needed`` names a trial whose cell had enough repeats.
    """

    event: EventName
    trial_id: str | None = None
    cell_id: str | None = None
    repeat: int | None = None
    attempt: int | None = None
    """From 1."""
    load_key: str | None = None
    host: str | None = None
    epoch: int | None = None
    """Restarts of the sampler on that host."""
    pid: int | None = None
    kind: str | None = None
    """Failure kind of a ``failed`` event."""
    final: bool | None = None
    """Of a ``failed`` event: the trial will not be tried again."""
    detail: str | None = None
    wall_time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    """ISO 8601, UTC. Information only."""


_FIELDS: Final = tuple(item.name for item in fields(JournalEvent))


def encode_event(event: JournalEvent) -> bytes:
    """The event as one line, newline included; fields that are None are left out."""
    record = {name: value for name in _FIELDS if (value := getattr(event, name)) is not None}
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


@dataclass(slots=True)
class JournalState:
    """What a journal says, event by event. ``apply`` is the only way it changes."""

    done: dict[str, int] = field(default_factory=dict)
    """Trial -> the attempt that completed it."""
    given_up: dict[str, str] = field(default_factory=dict)
    """Trial that failed for good -> failure kind."""
    not_needed: set[str] = field(default_factory=set)
    """Trials that were not run, as their cells had enough repeats."""
    attempts: dict[str, int] = field(default_factory=dict)
    """Trial -> its highest attempt so far."""
    failures: dict[str, int] = field(default_factory=dict)
    """Trial -> attempts that failed."""
    open_attempts: dict[str, int] = field(default_factory=dict)
    """Trial -> attempt that was leased and neither done nor failed: cut short when nobody runs it now."""
    sessions: int = 0
    """Times the run was started or resumed."""
    finished: bool = False
    """The last session ran to its end."""
    consecutive_failures: int = 0
    """Failed attempts in a row in this session."""
    last_host: str | None = None
    last_pid: int | None = None

    def next_attempt(self, trial_id: str) -> int:
        """Number of the trial's next attempt, from 1."""
        return self.attempts.get(trial_id, 0) + 1

    def is_settled(self, trial_id: str) -> bool:
        """The trial is done, failed for good, or is not needed."""
        return trial_id in self.done or trial_id in self.given_up or trial_id in self.not_needed

    def apply(self, record: Mapping[str, Any]) -> None:
        """Take in one event, as parsed from its line.

        Raises:
            ValueError: The event's name is unknown, or its trial or attempt is missing or of the wrong type.
        """
        name, trial_id, attempt = record.get("event"), record.get("trial_id"), record.get("attempt")
        if name not in _NAMES:
            raise ValueError(f"unknown event {name!r}")
        if name in _ATTEMPT_NAMES:
            if not isinstance(trial_id, str) or type(attempt) is not int:
                raise ValueError(f"event {name!r} needs a trial_id and an attempt number")
            self._apply_attempt(name, trial_id, attempt, record)
        elif name == "run_started":
            self.sessions += 1
            self.finished, self.consecutive_failures = False, 0
            self.last_host, self.last_pid = record.get("host"), record.get("pid")
        elif name == "run_finished":
            self.finished = True
        elif name == "not_needed":
            if not isinstance(trial_id, str):
                raise ValueError("event 'not_needed' needs a trial_id")
            self.not_needed.add(trial_id)
        elif isinstance(trial_id, str):
            self.open_attempts.pop(trial_id, None)

    def _apply_attempt(self, name: str, trial_id: str, attempt: int, record: Mapping[str, Any]) -> None:
        self.attempts[trial_id] = max(attempt, self.attempts.get(trial_id, 0))
        self.not_needed.discard(trial_id)
        if name in {"leased", "measuring"}:
            self.open_attempts[trial_id] = attempt
            return
        self.open_attempts.pop(trial_id, None)
        if name == "done":
            self.done[trial_id] = attempt
            self.given_up.pop(trial_id, None)
            self.consecutive_failures = 0
            return
        self.failures[trial_id] = self.failures.get(trial_id, 0) + 1
        self.consecutive_failures += 1
        if record.get("final") is True and trial_id not in self.done:
            self.given_up[trial_id] = str(record.get("kind") or "unknown")


def whole_lines(path: Path) -> tuple[bytes, int]:
    """The newline-terminated part of a journal and its length in bytes; a torn last line is left out.

    Raises:
        ResultsError: It cannot be read.
    """
    with storage_errors(path, "read"):
        data = path.read_bytes()
    length = data.rfind(b"\n") + 1
    return data[:length], length


def _records(path: Path, data: bytes) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ResultsError(f"{path}:{number}: not a journal line: {error}", _DAMAGED) from error
        if not isinstance(record, dict):
            raise ResultsError(f"{path}:{number}: not a journal line: {type(record).__name__} instead of an object", _DAMAGED)
        yield number, record


_DAMAGED: Final = "the journal was changed from outside; restore it, or start over with --again"


def replay(path: Path) -> JournalState:
    """Read a journal. A torn last line (no newline: the writer was killed in it) is forgiven, nothing else is.

    A missing file is an empty journal: the run was killed before its first event.

    Raises:
        ResultsError: A line is damaged or says something impossible; names file and line.
    """
    state = JournalState()
    if not path.exists():
        return state
    for number, record in _records(path, whole_lines(path)[0]):
        try:
            state.apply(record)
        except ValueError as error:
            raise ResultsError(f"{path}:{number}: {error}", _DAMAGED) from error
    return state


class Journal:
    """The journal, open for appending. Every event is on disk when ``append`` returns."""

    def __init__(self, path: Path, descriptor: int, length: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._length = length

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open or create the journal; a torn last line is cut off first.

        Raises:
            ResultsError: It cannot be opened or written.
        """
        created = not path.exists()
        length = 0 if created else whole_lines(path)[1]
        with storage_errors(path, "open"):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            os.ftruncate(descriptor, length)
            os.fsync(descriptor)
            if created:
                sync_directory(path.parent)
        return cls(path, descriptor, length)

    def append(self, event: JournalEvent) -> None:
        """Append one event and wait until it is on disk.

        Raises:
            ResultsError: It cannot be written; the journal is as it was before.
        """
        line = encode_event(event)
        with storage_errors(self.path, "append to"):
            try:
                written = 0
                while written < len(line):
                    written += os.pwrite(self._descriptor, line[written:], self._length + written)
                os.fdatasync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, self._length)
                raise
        self._length += len(line)

    def close(self) -> None:
        """Close the file; may be called more than once."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
