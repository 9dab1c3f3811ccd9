"""Ends what an embedded Ray leaves behind when its run driver dies hard. Standard library only; run by path, isolated.

After ``kill -9`` of a driver Ray's own agents wait for minutes for a server that is gone, and an engine's own children may
stay for good. This process holds the read end of a pipe of the driver's: when the pipe closes, the driver is gone, and every
process of its Ray is killed, a grace period later: those that carry the run's mark in their environment, and those that have a
file in the Ray folder open (a process that changed its title may have overwritten its environment). Then the folder is removed.

    python -I -S reaper.py MARK FOLDER DRIVER_PID
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

GRACE_S = 5.0
PASSES = 3


def left_behind(mark: bytes, folder: str, spared: set[int]) -> list[int]:
    """Process ids that belong to the Ray of ``folder``, ``spared`` ones left out."""
    pids = {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()} - spared
    return [pid for pid in pids if _is_marked(pid, mark) or _has_open(pid, folder)]


def kill_left_behind(mark: bytes, folder: str, spared: set[int]) -> None:
    """End them, and what they start meanwhile."""
    for _ in range(PASSES):
        left = left_behind(mark, folder, spared)
        if not left:
            break
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)


def _is_marked(pid: int, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _has_open(pid: int, folder: str) -> bool:
    try:
        links = list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False
    for link in links:
        with contextlib.suppress(OSError):
            if str(link.readlink()).startswith(folder + "/"):
                return True
    return False


def main() -> None:
    """Wait for the driver's end, then clean up."""
    mark, folder, driver_pid = sys.argv[1].encode(), sys.argv[2], int(sys.argv[3])
    spared = {os.getpid(), driver_pid}
    # Ctrl-C and the like are for the driver; we end when it does.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    if left_behind(mark, folder, spared):
        time.sleep(GRACE_S)
    kill_left_behind(mark, folder, spared)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
