"""Sees to it that an engine's process, and what it starts, never outlives the process that asked for it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import socket
from pathlib import Path
from typing import Final, NoReturn

from llem_ray.backends.process.leftovers import MARK, SegmentLog, find_processes, kill_processes

_PR_SET_PDEATHSIG: Final = 1
_KILL_S: Final = 10.0
_NOTE_S: Final = 10.0


class Watchdog:
    """Ties this process to its parent, however that ends.

    The kernel kills this process when the thread that started it ends. A small fork of it waits for the parent's end, kills all
    that is left of the engine, and removes its shared memory and the parent's folder. Make it before anything else runs here.

    Args:
        parent: Process id of the parent.
        folder: Folder of the parent's that goes with it.
    """

    def __init__(self, parent: int, folder: Path) -> None:
        before = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != before:
            raise SystemExit("the parent ended")
        self._fork: socket.socket | None = None
        try:
            watched = os.pidfd_open(parent)
        except OSError:  # its process id means nothing here (a container): the socket's end tells
            return
        self._fork, ours = socket.socketpair()
        if os.fork() == 0:
            self._fork.close()
            _watch(watched, ours, folder)
            os._exit(0)
        os.close(watched)
        ours.close()
        self._fork.settimeout(_NOTE_S)

    def note_segments(self) -> None:
        """Have the shared memory that the engine has now remembered; back when that is done."""
        if self._fork is not None:
            with contextlib.suppress(OSError):  # it was killed: only this process can be ended then
                self._fork.sendall(b".")
                self._fork.recv(1)

    def end(self) -> NoReturn:
        """The parent is gone: end at once, and leave the rest to the fork, or kill the process group where there is none."""
        if self._fork is None:
            os.killpg(0, signal.SIGKILL)
        os._exit(1)


def _watch(watched: int, engine: socket.socket, folder: Path) -> None:
    group, mark = os.getpgid(0), f"{MARK}={os.environ.get(MARK, '')}"
    segments = SegmentLog()
    events = select.poll()
    events.register(watched, select.POLLIN)
    events.register(engine, select.POLLIN)
    while watched not in dict(events.poll()):
        segments.observe(find_processes(group, mark))
        try:
            engine.sendall(engine.recv(1) or b"x")
        except OSError:  # the engine ended: its parent sees to the rest, if it lives to
            events.unregister(engine)
    segments.observe(find_processes(group, mark))
    kill_processes(group, mark, signal.SIGKILL, _KILL_S)
    segments.remove_leftovers()
    shutil.rmtree(folder, ignore_errors=True)
