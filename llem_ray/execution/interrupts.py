"""Ctrl-C once finishes the running trial, twice aborts it; SIGTERM and SIGHUP abort at once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Aborted(BaseException):
    """The user wants out now; what is done stays."""


class Interrupts:
    """Counts what the user asked for. Install it after Ray has started: Ray replaces the SIGTERM handler."""

    def __init__(self) -> None:
        self._asked = 0
        self._aborted = False
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Take over SIGINT, SIGTERM and SIGHUP; under ``nohup`` SIGHUP stays ignored."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._on_signal)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()

    @property
    def stop_requested(self) -> bool:
        """Finish the running trial, start no other."""
        return self._asked > 0 or self._aborted

    def raise_if_aborted(self) -> None:
        """Raise Aborted once the user wants out at once."""
        if self._aborted:
            raise Aborted

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._asked += 1
        if number != signal.SIGINT or self._asked > 1:
            self._aborted = True
