"""Waiting with a deadline, a named reason and an eye on the user's signals."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from llem_ray.core.clock import Clock
from llem_ray.core.errors import HangError
from llem_ray.core.units import NS_PER_S, ns_from_s
from llem_ray.execution.calls import Call
from llem_ray.execution.interrupts import Aborted, Interrupts

T = TypeVar("T")

TICK_S = 0.2


class Waits:
    """Every wait of the run driver.

    Args:
        clock: The run driver's clock.
        interrupts: What the user asked for.
        on_tick: Called about every 0.2 s while waiting; may raise to end the run.
    """

    def __init__(self, clock: Clock, interrupts: Interrupts, on_tick: Callable[[], None]) -> None:
        self._clock = clock
        self._interrupts = interrupts
        self._on_tick = on_tick
        self.halt = threading.Event()
        """Set when the run ends for another reason than the user's: what runs is finished, nothing new is started."""

    @property
    def stop_requested(self) -> bool:
        """Start nothing new."""
        return self._interrupts.stop_requested or self.halt.is_set()

    @property
    def user_stops(self) -> bool:
        """It was the user who asked to stop."""
        return self._interrupts.stop_requested

    def tick(self) -> None:
        """Look at the user's signals and at the run's surroundings, as every wait does.

        Raises:
            Aborted: The user wants out.
        """
        self._look_up(may_stop=False)

    def answer(
        self, call: Call[T], timeout_s: float, what: str, *, may_stop: bool = False, check: Callable[[], None] | None = None
    ) -> T:
        """Wait for a call.

        Args:
            call: The call.
            timeout_s: Deadline from now.
            what: Named in the error.
            may_stop: Nothing is lost if it is given up: the first Ctrl-C ends the wait too.
            check: Called now and then while waiting; what it raises ends the wait.

        Raises:
            HangError: No answer before the deadline.
            Aborted: The user wants out.
            LlemRayError: What the call raises.
        """
        deadline_ns = self._clock.monotonic_ns() + ns_from_s(timeout_s)
        while True:
            left_s = (deadline_ns - self._clock.monotonic_ns()) / NS_PER_S
            try:
                return call.result(max(min(TICK_S, left_s), 0.0))
            except TimeoutError:
                self._look_up(may_stop)
                if check is not None:
                    check()
                if self._clock.monotonic_ns() >= deadline_ns:
                    raise HangError(f"no answer to {what} within {timeout_s:g} s") from None

    def sleep(self, duration_s: float) -> bool:
        """Wait; False when the user wants to stop and the wait was cut short.

        Raises:
            Aborted: The user wants out.
        """
        end_ns = self._clock.monotonic_ns() + ns_from_s(duration_s)
        while (now_ns := self._clock.monotonic_ns()) < end_ns:
            if self.stop_requested:
                self._interrupts.raise_if_aborted()
                return False
            self._clock.sleep_until_ns(min(end_ns, now_ns + ns_from_s(TICK_S)))
            self._on_tick()
        return True

    def _look_up(self, may_stop: bool) -> None:
        self._interrupts.raise_if_aborted()
        if may_stop and self.stop_requested:
            raise Aborted
        self._on_tick()
