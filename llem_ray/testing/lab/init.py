"""Process 1 of a lab's host: makes the host's own mounts, reaps orphans, and ends when its standard input does.

Runs as a file, without the package. The creator holds the other end of standard input: however it dies, the host dies with it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def main(spec: str) -> None:
    """Set the host up from ``spec`` (JSON: hostname, mounts), say ``ready``, and wait."""
    wanted = json.loads(spec)
    if hostname := wanted.get("hostname"):
        socket.sethostname(hostname)
    for arguments in wanted.get("mounts", ()):
        if not Path(arguments[-1]).exists():
            Path(arguments[-1]).mkdir(parents=True)
        subprocess.run(["mount", *arguments], check=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel then reaps what is re-parented to us
    os.write(1, b"ready\n")
    while os.read(0, 4096):
        pass


if __name__ == "__main__":
    main(sys.argv[2])
