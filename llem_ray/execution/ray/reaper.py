"""Ends what an embedded Ray leaves behind when its run driver dies hard. Standard library only; run by path, isolated.

After ``kill -9`` of a driver Ray's own agents wait for minutes for a server that is gone, and an engine's own children may
stay for good. This process holds the read end of a pipe of the driver's: when the pipe closes, the driver is gone, and every
process that still carries the run's mark in its environment is killed, a grace period later. Then the Ray folder is removed.

    python -I -S reaper.py MARK FOLDER
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


def marked(mark: bytes) -> list[int]:
    """Process ids, other than our own, whose environment holds ``mark``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def main() -> None:
    """Wait for the driver's end, then clean up."""
    mark, folder = sys.argv[1].encode(), sys.argv[2]
    # Ctrl-C and the like are for the driver; we end when it does.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    if marked(mark):
        time.sleep(GRACE_S)
    for _ in range(PASSES):
        left = marked(mark)
        if not left:
            break
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
