"""Sends the requests of a run one by one, each at its time, from a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from llem_ray.core.backend import LoadSchedule, Request
from llem_ray.core.clock import Clock, SystemClock
from llem_ray.core.errors import GenerationError

STOP_S: Final = 10.0
_SPIN_NS: Final = 300_000
"""Sleeping is left this long before a request is due: a kernel wakes threads late, by some 50 us and more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """When a request went its way, ns of the host's monotonic clock."""

    scheduled_ns: int
    """When the schedule wanted it sent; in a closed loop, when an earlier answer made room for it."""
    queued_ns: int
    """When the generator took it up."""
    sent_ns: int
    """Just before it was handed to the engine."""


class LoadGenerator:
    """Paces requests by a schedule that was made beforehand; never waits for the engine but for its answers.

    Args:
        requests: In the order they are sent.
        schedule: When.
        submit: Hands one request to the engine. Called in the generator's thread; it must not block.
        clock: The host's.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        schedule: LoadSchedule,
        submit: Callable[[Request], None],
        clock: Clock | None = None,
    ) -> None:
        if schedule.send_at_ns is not None and len(schedule.send_at_ns) != len(requests):
            raise GenerationError(f"a schedule of {len(schedule.send_at_ns)} times for {len(requests)} requests")
        if schedule.max_in_flight is not None and schedule.max_in_flight < 1:
            raise GenerationError("nothing may be in flight: max_in_flight must be 1 or more")
        self._requests, self._schedule, self._submit = requests, schedule, submit
        self._clock = clock or SystemClock()
        self._change = threading.Condition()
        self._sent: dict[str, Sent] = {}
        self._in_flight = 0
        self._room_since_ns = 0
        self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._generate, name="llem-ray-load", daemon=True)
        self.begin_ns = 0
        """When the run started; known after ``start``."""

    def start(self) -> None:
        """Begin: the schedule's zero is now."""
        self.begin_ns = self._room_since_ns = self._clock.monotonic_ns()
        self._thread.start()

    def done(self, request_id: str) -> Sent:
        """A request was answered. Called from any thread, once for each.

        Returns:
            When it was sent.
        """
        with self._change:
            self._in_flight -= 1
            self._room_since_ns = self._clock.monotonic_ns()
            self._change.notify_all()
            return self._sent[request_id]

    @property
    def sent(self) -> int:
        """Requests handed to the engine so far."""
        return len(self._sent)

    def check(self) -> None:
        """Raise what ended the generator early.

        Raises:
            GenerationError: The engine would not take a request.
        """
        if self._error is not None:
            if isinstance(self._error, GenerationError):
                raise self._error
            raise GenerationError(f"the engine took no more requests: {self._error}") from self._error

    def stop(self) -> None:
        """Send nothing more; returns once the thread has ended, or after ``STOP_S``."""
        with self._change:
            self._stopped = True
            self._change.notify_all()
        if self._thread.is_alive():
            self._thread.join(STOP_S)

    def _generate(self) -> None:
        try:
            for index, request in enumerate(self._requests):
                scheduled_ns = self._await_turn(index)
                if scheduled_ns is None:
                    return
                queued_ns = self._clock.monotonic_ns()
                with self._change:
                    self._in_flight += 1
                    self._sent[request.request_id] = Sent(
                        scheduled_ns=scheduled_ns, queued_ns=queued_ns, sent_ns=self._clock.monotonic_ns()
                    )
                self._submit(request)
        except BaseException as error:  # noqa: BLE001 - raised again by check, in the thread that serves
            self._error = error

    def _await_turn(self, index: int) -> int | None:
        """Wait until this request may be sent; when the schedule wanted that, or None where it was stopped meanwhile."""
        times_ns, limit = self._schedule.send_at_ns, self._schedule.max_in_flight
        due_ns = self.begin_ns if times_ns is None else self.begin_ns + times_ns[index]
        with self._change:
            while not self._stopped and (left_ns := due_ns - _SPIN_NS - self._clock.monotonic_ns()) > 0:
                self._change.wait(left_ns / 1e9)
            while not self._stopped and limit is not None and self._in_flight >= limit:
                self._change.wait()
            if self._stopped:
                return None
            if times_ns is None:
                return due_ns if limit is None else self._room_since_ns
        while self._clock.monotonic_ns() < due_ns:
            pass
        return due_ns
