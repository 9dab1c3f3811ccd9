"""A command's life: started, waited for, its signals passed on. What ``measure`` puts its window around."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from llem_ray.core.clock import Clock

NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
KILLED_BY: Final = 128
"""Plus the number of the signal: what a shell gives."""

_FROM_TERMINAL: Final = frozenset({signal.SIGINT, signal.SIGQUIT, signal.SIGHUP})
"""Signals that a terminal sends to every process in its foreground."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandLife:
    """A command that ran."""

    begin_ns: int
    """Just before it was started, ns of the monotonic clock."""
    end_ns: int
    """Just after it was reaped."""
    exit_code: int
    """Its own, or 128 + the number of the signal that ended it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NotStarted:
    """A command that could not be started."""

    exit_code: int
    """127 when it is not found, 126 when it cannot be executed: as ``env`` has it."""
    message: str


class SignalRelay:
    """Passes on to the command the signals that only we received."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []

    def adopt(self, child: subprocess.Popen[bytes]) -> None:
        """From now on signals go to ``child``; those that came while it was being started go there at once."""
        self._child = child
        for number in self._early:
            child.send_signal(number)
        self._early.clear()

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """The handler. A terminal's Ctrl-C reaches the command without us: it must not get it twice."""
        if number in _FROM_TERMINAL and _in_foreground():
            return
        if self._child is None:
            self._early.append(number)
        else:
            self._child.send_signal(number)


@contextmanager
def relayed_signals() -> Iterator[SignalRelay]:
    """Inside the block SIGINT, SIGQUIT, SIGTERM and SIGHUP do not end this process; the relay passes them on.

    A signal that was ignored when this process started (``nohup``, ``&`` in a script) stays ignored, here and in the command.
    Off the main thread nothing is relayed, since Python allows no handlers there.
    """
    relay = SignalRelay()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, relay.on_signal)
    try:
        yield relay
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def run_command(command: Sequence[str], relay: SignalRelay, clock: Clock, *, output_to_stderr: bool) -> CommandLife | NotStarted:
    """Start ``command``, wait until it ends, and reap it.

    It shares our standard streams as they are, without a pipe: a grandchild that lives on cannot hold us.

    Args:
        command: Program and arguments.
        relay: Passes signals on.
        clock: Stamps begin and end.
        output_to_stderr: Send the command's standard output to our standard error.
    """
    begin_ns = clock.monotonic_ns()
    try:
        child = subprocess.Popen(list(command), stdout=_stderr() if output_to_stderr else None)
    except OSError as error:
        return _not_started(command[0], error)
    relay.adopt(child)
    code = child.wait()
    end_ns = clock.monotonic_ns()
    return CommandLife(begin_ns=begin_ns, end_ns=end_ns, exit_code=code if code >= 0 else KILLED_BY - code)


def find_program(program: str) -> NotStarted | None:
    """Why ``program`` could not be started, or None when there is an executable file of that name."""
    if shutil.which(program) is not None:
        return None
    folders = [""] if "/" in program else os.get_exec_path()
    if program and any((Path(folder) / program).exists() for folder in folders):
        return _not_started(program, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return _not_started(program, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))


def _not_started(program: str, error: OSError) -> NotStarted:
    code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
    return NotStarted(exit_code=code, message=f"{program!r} cannot be started: {error.strerror}")


def _stderr() -> int:
    """Our standard error as a file descriptor; nowhere when it is closed."""
    return sys.stderr.fileno() if sys.stderr is not None else subprocess.DEVNULL


def _in_foreground() -> bool:
    """This process is among those that a Ctrl-C in its terminal reaches."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
