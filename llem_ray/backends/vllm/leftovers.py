"""What vLLM leaves behind: workers that take their time to end, and shared memory of those that ended in good order."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Final

import psutil

SEGMENT: Final = re.compile(r"/dev/shm/vllm_dist_[^\n]+?(?= \(deleted\)$|$)", re.MULTILINE)  # noqa: S108
RING: Final = re.compile(r"/dev/shm/psm_[0-9a-f]+$", re.MULTILINE)  # noqa: S108


def shared_segments(pids: Iterable[int], *, rings: bool = False) -> frozenset[Path]:
    """VLLM's segments that these processes have mapped, so that nobody else's are taken for ours.

    Args:
        pids: Of workers.
        rings: Also those by which they get orders, which stay when a process is killed. Not where this process made some: it
            removes them itself.
    """
    found: set[str] = set()
    for pid in pids:
        with suppress(OSError):
            maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
            found.update(SEGMENT.findall(maps), RING.findall(maps) if rings else ())
    return frozenset(map(Path, found))


def remove_segments(segments: Iterable[Path]) -> None:
    """Unlink what is still there."""
    for path in segments:
        with suppress(OSError):
            path.unlink()
            if path.name.startswith("psm_"):  # Python would look for it when this process ends, and complain
                resource_tracker.unregister(f"/{path.name}", "shared_memory")


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; one that only waits to be reaped does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end_processes(processes: Iterable[psutil.Process], grace_s: float) -> None:
    """Wait for processes that were told to end, then kill them. They are not reaped: that is for who started them.

    Args:
        processes: As they were when they were alive, so that no other process of the same number is meant.
        grace_s: For all together; again as long for the kernel to end those that are killed.
    """
    left = list(processes)
    for kill in (False, True):
        deadline_s = time.monotonic() + grace_s
        for process in left if kill else ():
            with suppress(psutil.Error):
                process.kill()
        while (left := [process for process in left if is_alive(process)]) and time.monotonic() < deadline_s:
            time.sleep(0.01)
