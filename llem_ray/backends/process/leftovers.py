"""What an engine leaves behind: processes of its group, and shared-memory segments that nobody maps any more."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

MARK: Final = "LLEM_RAY_ENGINE"
"""Environment variable that every process of an engine carries."""
SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - where the kernel keeps POSIX shared memory
_PID_IN_NAME: Final = re.compile(r"torch_(\d+)_")
"""torch names its segments after the process that made them."""
_DELETED: Final = " (deleted)"
_POLL_S: Final = 0.01


def find_processes(group: int, mark: str) -> set[int]:
    """Live processes but this one, of the process group or with the variable ``mark`` (``NAME=value``) in their environment."""
    wanted, found = mark.encode(), set()
    for pid in _pids():
        if pid == os.getpid():
            continue
        with contextlib.suppress(OSError, IndexError):
            state, _, process_group = (Path("/proc") / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()[:3]
            if state in b"ZX":
                continue
            if int(process_group) == group or wanted in (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0"):
                found.add(pid)
    return found


def kill_processes(group: int, mark: str, number: signal.Signals, timeout_s: float) -> set[int]:
    """Send the signal to all of them and wait for their end; returns those still alive at the deadline."""
    deadline_s = time.monotonic() + timeout_s
    told: set[int] = set()
    while True:
        left = find_processes(group, mark)
        for pid in left - told:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        told |= left
        if not left or time.monotonic() >= deadline_s:
            return left
        time.sleep(_POLL_S)


class SegmentLog:
    """Shared-memory segments that an engine's processes made.

    A segment counts as the engine's if it was not there when the log was opened, belongs to this user, and either one of the
    engine's processes was seen with it open or mapped, or its name carries the id of one.

    Args:
        folder: Where the segments lie.
    """

    def __init__(self, folder: Path = SHARED_MEMORY) -> None:
        self._folder = folder
        self._before = set(self._segments())
        self._ours: set[tuple[str, int]] = set()
        self._pids: set[int] = set()

    def observe(self, pids: Iterable[int]) -> None:
        """Note what these processes have open or mapped now."""
        for pid in pids:
            self._pids.add(pid)
            self._ours.update(set(_open_files(pid, self._folder)) - self._before)

    def remove_leftovers(self) -> tuple[str, ...]:
        """Remove those of the engine that no live process has open or mapped. Call it when the engine's processes are gone."""
        candidates = {segment for segment in self._segments() if segment in self._ours or self._is_named_after_us(segment)}
        if not candidates:
            return ()
        for pid in _pids():
            candidates -= set(_open_files(pid, self._folder))
        removed = []
        for name, inode in sorted(candidates):
            with contextlib.suppress(OSError):
                found = (self._folder / name).lstat()
                if found.st_ino == inode and found.st_uid == os.getuid():
                    (self._folder / name).unlink()
                    removed.append(name)
        return tuple(removed)

    def _is_named_after_us(self, segment: tuple[str, int]) -> bool:
        named = _PID_IN_NAME.match(segment[0])
        return segment not in self._before and named is not None and int(named[1]) in self._pids

    def _segments(self) -> Iterator[tuple[str, int]]:
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._folder):
                with contextlib.suppress(OSError):
                    if entry.is_file(follow_symlinks=False):
                        yield entry.name, entry.inode()


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]  # noqa: PTH208 - a Path for each is not needed


def _open_files(pid: int, folder: Path) -> Iterator[tuple[str, int]]:
    """Name and inode of the files of ``folder`` that the process has mapped or open."""
    process, prefix = Path("/proc") / str(pid), f"{folder}/"
    with contextlib.suppress(OSError):
        for line in (process / "maps").read_text(encoding="utf-8", errors="replace").splitlines():
            if prefix in line:
                inode, path = line.split(maxsplit=5)[4:6]
                yield path.removesuffix(_DELETED).removeprefix(prefix), int(inode)
    with contextlib.suppress(OSError):
        for entry in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                path = str(entry.readlink())
                if path.startswith(prefix):
                    yield path.removesuffix(_DELETED).removeprefix(prefix), entry.stat().st_ino
