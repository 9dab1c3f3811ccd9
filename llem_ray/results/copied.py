"""What a copy of a run looks like at its destination: who writes it, its journal in pieces, and how it is fetched.

owner.json                      who copies, and when it was last heard of
journal/<first line>.jsonl      whole lines of the journal from that number on
everything else                 as in the run directory
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

from llem_ray.core.errors import ResultsError, RunInUse
from llem_ray.results import files
from llem_ray.results.destination import Destination, destination_errors
from llem_ray.results.rundir import RunDirectory, run_numbers
from llem_ray.results.schema import TABLE_NAMES

OWNER: Final = "owner.json"
SILENT_S: Final = 120.0
"""An owner that was not heard of for so long is dead."""
DOCUMENTS: Final = ("sweep.json", "plan.json", "environment.json")
LOG_NAME: Final = "run.log"

_JOURNAL: Final = re.compile(r"journal/([0-9]{8,})\.jsonl")
_DATA: Final = re.compile(rf"segments/[0-9]{{8,}}\.arrows|({'|'.join(TABLE_NAMES)})/part-[0-9]{{8,}}-[0-9]{{8,}}\.parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """The process that writes a copy."""

    host: str
    pid: int
    session: str
    """Tells two processes apart that share host name and process id."""
    heartbeat_s: float | None
    """Seconds since 1970 when it was last heard of; None: it ended in peace."""

    def is_active(self) -> bool:
        """It may still write: it was heard of lately, and on this host it is another process that lives."""
        if self.heartbeat_s is None or time.time() - self.heartbeat_s > SILENT_S:
            return False
        return self.host != socket.gethostname() or (self.pid != os.getpid() and _lives(self.pid))

    def encode(self) -> bytes:
        """As the contents of its file."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def read(cls, copy: Destination) -> Self | None:
        """Who writes ``copy``; None when nobody ever did or its file cannot be understood."""
        try:
            found = json.loads(copy.read(OWNER))
            beat = found["heartbeat_s"]
            host, pid, session = str(found["host"]), int(found["pid"]), str(found["session"])
            return cls(host=host, pid=pid, session=session, heartbeat_s=None if beat is None else float(beat))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return None


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True


def refuse_active(copy: Destination, owner: Owner | None) -> None:
    """Leave a copy alone that another process writes.

    Raises:
        RunInUse: It seems to do so.
    """
    if owner is not None and owner.is_active():
        raise RunInUse(
            f"process {owner.pid} on {owner.host} works on {copy.shown}",
            "stop it there first; if it is dead, wait 2 minutes or add --take-over",
        )


def journal_path(first_line: int) -> str:
    """File of the journal's lines from number ``first_line`` (from 1) on."""
    return f"journal/{first_line:08d}.jsonl"


def journal_pieces(names: Iterable[str]) -> dict[int, str]:
    """First line -> file of the pieces among ``names``, ascending."""
    return dict(sorted((int(match[1]), name) for name in names if (match := _JOURNAL.fullmatch(name))))


def data_files(names: Iterable[str]) -> set[str]:
    """Segments and Parquet parts among ``names``."""
    return {name for name in names if _DATA.fullmatch(name)}


def join_journal(copy: Destination, names: Iterable[str]) -> bytes:
    """The copied journal. Pieces may overlap: a merger of pieces was cut short.

    Raises:
        ResultsError: A piece is missing.
    """
    lines: list[bytes] = []
    for first, name in journal_pieces(names).items():
        if first > len(lines) + 1:
            raise ResultsError(f"{copy.shown} is damaged: lines {len(lines) + 1} to {first - 1} of its journal are missing")
        piece = copy.read(name).splitlines(keepends=True)
        lines += piece[len(lines) + 1 - first :]
    return b"".join(lines)


def copied_runs(destination: Destination) -> tuple[str, ...]:
    """Names of the runs there.

    Raises:
        ResultsError: It cannot be read.
    """
    with destination_errors(destination, "read"):
        return destination.list_folders()


def fetch_run(destination: Destination, root: Path, run_name: str, *, take_over: bool = False) -> RunDirectory | None:
    """Bring the latest copy of a run of that name into ``root``, to be resumed there.

    Args:
        destination: The folder with copies of runs.
        root: Where the run directory appears, whole or not at all.
        run_name: Its name without ``-2``, ``-3`` of further runs.
        take_over: Also when another process seems to write the copy.

    Returns:
        The run, or None: there is no copy of it.

    Raises:
        RunInUse: Another process seems to write the copy.
        ResultsError: The copy cannot be read, is damaged, or cannot be stored here.
    """
    numbered = run_numbers(copied_runs(destination), run_name)
    if not numbered:
        return None
    name = numbered[max(numbered)]
    copy = destination.child(name)
    with destination_errors(copy, "fetch"):
        sizes = copy.list_files()
        if not journal_pieces(sizes):
            return None
        if not take_over:
            refuse_active(copy, Owner.read(copy))
        root = root.absolute()
        fresh = root / f".{name}-{os.getpid()}{files.TEMPORARY_SUFFIX}"
        try:
            _download(copy, sizes, fresh)
            with files.storage_errors(root / name, "create"):
                fresh.rename(root / name)
                files.sync_directory(root)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return RunDirectory.open(root / name)


def _download(copy: Destination, sizes: dict[str, int], folder: Path) -> None:
    with files.storage_errors(folder, "create"):
        (folder / "segments").mkdir(parents=True)
    wanted = data_files(sizes) | {name for name in (*DOCUMENTS, LOG_NAME) if name in sizes}
    for name in sorted(wanted):
        path = folder / name
        data = copy.read(name)
        if len(data) != sizes[name]:
            raise ResultsError(f"{copy.shown} changed while it was fetched", "try again")
        with files.storage_errors(path, "create"):
            path.parent.mkdir(exist_ok=True)
        files.write_atomic(path, data)
    files.write_atomic(folder / "journal.jsonl", join_journal(copy, sizes))
