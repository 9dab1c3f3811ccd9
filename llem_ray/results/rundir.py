"""The run directory: its lock, its files, its name."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from llem_ray.core.errors import ResultsError, RunInUse
from llem_ray.results import files
from llem_ray.results.journal import JournalState, replay
from llem_ray.results.schema import TABLE_NAMES, TableName

T = TypeVar("T")

MIN_FREE_BYTES: Final = 256 * 1024 * 1024
"""Room a run must find on its disk before it starts."""


class RunDirectory:
    """A run's folder. Making the object touches nothing; ``create`` and ``open`` do.

    sweep.json plan.json environment.json   written once, whole
    journal.jsonl run.log lock              appended to, held
    segments/<seq>.arrows                   rows of single trials, until they are compacted
    <table>/part-<first>-<last>.parquet     the dataset
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.journal_path = path / "journal.jsonl"
        self.log_path = path / "run.log"
        self.segments_path = path / "segments"
        self._lock_path = path / "lock"

    @classmethod
    def create(cls, root: Path, run_name: str, *, again: bool = False, taken: Iterable[str] = ()) -> RunDirectory:
        """Make ``root/run_name``, or with ``again`` the next free ``root/run_name-2``, ``-3`` and so on.

        Args:
            root: Folder of run directories.
            run_name: The run's name.
            again: Take the next free name.
            taken: Further names that are not free.

        Raises:
            ResultsError: It exists already (without ``again``) or cannot be made.
        """
        root = root.absolute()
        with files.storage_errors(root, "create"):
            root.mkdir(parents=True, exist_ok=True)
        path = root / (next_run_name(root, run_name, taken) if again else run_name)
        fresh = root / f".{path.name}-{os.getpid()}{files.TEMPORARY_SUFFIX}"
        with files.storage_errors(path, "create"):
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            (fresh / "segments").mkdir(parents=True)
            fresh.rename(path)
            files.sync_directory(root)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """An existing run.

        Raises:
            ResultsError: There is none at ``path``.
        """
        path = path.absolute()
        if not path.is_dir():
            raise ResultsError(f"no run directory at {path}")
        if not (path / "segments").is_dir() and not any((path / table).is_dir() for table in TABLE_NAMES):
            raise ResultsError(f"{path} is not a run directory: it has neither segments nor tables")
        return cls(path)

    def table_path(self, table: TableName) -> Path:
        """Folder of a table's Parquet files."""
        return self.path / table

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process. The kernel lets go when the process ends, even by kill -9.

        Raises:
            RunInUse: Another process holds it; the message names it.
            ResultsError: The lock file cannot be opened.
        """
        with files.storage_errors(self._lock_path, "lock"):
            descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _try_lock(descriptor):
                raise self._in_use(descriptor)
            holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode()
            with files.storage_errors(self._lock_path, "write"):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, holder, 0)
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)

    def _in_use(self, descriptor: int) -> RunInUse:
        holder = _read_holder(descriptor)
        who = f"process {holder[0]} on {holder[1]}" if holder else "another process"
        return RunInUse(f"{who} works on {self.path}", "wait until it ends, or stop it")

    def is_locked(self) -> bool:
        """Some process works on the run now."""
        return self._look(lambda _: True) is True

    def holder(self) -> tuple[int, str] | None:
        """Process id and host name of who works on the run now, or None: nobody does, or it is only just starting."""
        return self._look(_read_holder)

    def _look(self, answer: Callable[[int], T]) -> T | None:
        """``answer`` of the lock file while somebody holds the lock, else None."""
        try:
            descriptor = os.open(self._lock_path, os.O_RDONLY)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return answer(descriptor)
        finally:
            os.close(descriptor)
        return None

    def check_writable(self, min_free_bytes: int = MIN_FREE_BYTES) -> None:
        """Refuse a results disk that is read-only or full, before anything is measured.

        Raises:
            ResultsError: A file cannot be written, synced and renamed, or less than ``min_free_bytes`` is free.
        """
        files.check_writable(self.path, min_free_bytes)

    def replay(self) -> JournalState:
        """What the journal says.

        Raises:
            ResultsError: It is damaged.
        """
        return replay(self.journal_path)

    def write_text(self, name: str, text: str) -> None:
        """Write the file ``name``, whole and durable.

        Raises:
            ResultsError: It cannot be written.
        """
        files.write_atomic(self.path / name, text.encode())

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write ``<name>.json``, whole and durable.

        Raises:
            ResultsError: It cannot be written.
        """
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        files.write_atomic(self.path / f"{name}.json", text.encode() + b"\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Contents of ``<name>.json``.

        Raises:
            ResultsError: It is missing or is not a JSON object.
        """
        path = self.path / f"{name}.json"
        with files.storage_errors(path, "read"):
            data = path.read_bytes()
        try:
            value = json.loads(data)
        except ValueError as error:
            raise ResultsError(f"{path} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ResultsError(f"{path} is not a JSON object")
        return value

    def has_json(self, name: str) -> bool:
        """``<name>.json`` exists."""
        return (self.path / f"{name}.json").is_file()


def _read_holder(descriptor: int) -> tuple[int, str] | None:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return int(holder["pid"]), str(holder["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _try_lock(descriptor: int) -> bool:
    """Take the lock; a second attempt outlasts the instant in which ``is_locked`` of another process looks."""
    for pause_s in (0.05, 0.0):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(pause_s)
        else:
            return True
    return False


def run_numbers(names: Iterable[str], run_name: str) -> dict[int, str]:
    """Those of ``names`` that are runs of ``run_name``: 1 -> ``run_name``, 2 -> ``run_name-2`` and so on."""
    pattern = re.compile(re.escape(run_name) + r"(?:-([2-9]|[1-9][0-9]+))?")
    matches = ((pattern.fullmatch(name), name) for name in names)
    return {int(match[1] or 1): name for match, name in matches if match}


def _run_names(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []


def next_run_name(root: Path, run_name: str, taken: Iterable[str] = ()) -> str:
    """``run_name`` when it is free, else ``run_name-2`` or the number after the highest under ``root`` and among ``taken``."""
    numbered = run_numbers([*_run_names(root), *taken], run_name)
    return f"{run_name}-{max(numbered) + 1}" if numbered else run_name


def latest_run(root: Path, run_name: str) -> Path | None:
    """The run of that name with the highest number, or None: what ``submit`` resumes."""
    numbered = run_numbers(_run_names(root), run_name)
    return root / numbered[max(numbered)] if numbered else None


def list_runs(root: Path) -> tuple[Path, ...]:
    """All run directories under ``root``, oldest first."""
    if not root.is_dir():
        return ()
    found = (path for path in root.iterdir() if not path.name.startswith("."))
    runs = (path for path in found if (path / "segments").is_dir() or (path / "trials").is_dir())
    return tuple(sorted(runs, key=lambda path: (path.stat().st_mtime_ns, path.name)))


def find_run(root: Path, text: str) -> RunDirectory:
    """The run a user means: a path, a name under ``root``, or the beginning of exactly one name.

    Raises:
        ResultsError: There is none, or several; the hint lists names.
    """
    for path in (Path(text), root / text):
        if path.is_dir():
            return RunDirectory.open(path)
    names = [path.name for path in list_runs(root)]
    matches = [name for name in names if name.startswith(text)]
    if len(matches) == 1:
        return RunDirectory.open(root / matches[0])
    if matches:
        raise ResultsError(f"{text!r} may be any of {len(matches)} runs", "one of: " + ", ".join(matches[:10]))
    hint = "runs there: " + ", ".join(names[-10:]) if names else "there are none yet; `llem-ray submit SWEEP` makes one"
    raise ResultsError(f"no run {text!r} under {root}", hint)
