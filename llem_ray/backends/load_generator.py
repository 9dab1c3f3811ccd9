"""Sends the requests of a run one by one, each at its time, from a thread of its own."""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from llem_ray.core.backend import LoadSchedule, Request
from llem_ray.core.clock import Clock, SystemClock
from llem_ray.core.conversation import Histories
from llem_ray.core.errors import GenerationError

STOP_S: Final = 10.0
_SPIN_NS: Final = 300_000
"""Sleeping is left this long before a request is due: a kernel wakes threads late, by some 50 us and more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """When a request went its way, ns of the host's monotonic clock."""

    scheduled_ns: int
    """When the schedule wanted it sent; in a closed loop, when an earlier answer made room for it; of a later turn, when the
    answer before it and the time to think had ended."""
    queued_ns: int
    """When the generator took it up."""
    sent_ns: int
    """Just before it was handed to the engine."""


class LoadGenerator:
    """Paces requests by a schedule that was made beforehand; never waits for the engine but for its answers.

    Requests that begin conversations are sent in their order, as the schedule says. One that follows another is sent as soon as
    that has been answered and thought about; it holds its conversation's place in a closed loop meanwhile.

    Args:
        requests: In the order they are sent, each after the one that it follows.
        schedule: When.
        submit: Hands one request to the engine. Called in the generator's thread; it must not block. The request is the one
            given, or where it wants real answers a copy that holds them.
        clock: The host's.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        schedule: LoadSchedule,
        submit: Callable[[Request], None],
        clock: Clock | None = None,
    ) -> None:
        self._schedule, self._submit = schedule, submit
        self._clock = clock or SystemClock()
        self._first = deque(request for request in requests if request.follows is None)
        self._next = {request.follows: request for request in requests if request.follows is not None}
        self._check_arguments(requests)
        self._histories = Histories(requests)
        self._due: list[tuple[int, int, Request]] = []
        """Later turns whose time is known, the earliest first; the number keeps those of one time in order."""
        self._change = threading.Condition()
        self._sent: dict[str, Sent] = {}
        self._begun = self._open = self._answered = 0
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

    def done(self, request_id: str, output_token_ids: Sequence[int] = (), ended_ns: int | None = None) -> Sent:
        """A request was answered. Called from any thread, once for each.

        Args:
            request_id: Which.
            output_token_ids: Its answer.
            ended_ns: When its last token was delivered; default: now.

        Returns:
            When it was sent.
        """
        with self._change:
            now_ns = self._clock.monotonic_ns()
            following = self._next.pop(request_id, None)
            self._answered += 1
            if following is None:
                self._open -= 1
                self._room_since_ns = now_ns
            else:
                self._histories.answer(request_id, output_token_ids)
                due_ns = (now_ns if ended_ns is None else ended_ns) + following.think_ns
                heapq.heappush(self._due, (due_ns, self._answered, following))
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

    def _check_arguments(self, requests: Sequence[Request]) -> None:
        times_ns, limit = self._schedule.send_at_ns, self._schedule.max_in_flight
        if times_ns is not None and len(times_ns) != len(self._first):
            raise GenerationError(f"a schedule of {len(times_ns)} times for {len(self._first)} requests")
        if limit is not None and limit < 1:
            raise GenerationError("nothing may be in flight: max_in_flight must be 1 or more")
        seen: set[str] = set()
        for request in requests:
            if request.follows is not None and request.follows not in seen:
                raise GenerationError(f"request {request.request_id} follows {request.follows}, which does not come before it")
            seen.add(request.request_id)
        if len(self._first) + len(self._next) != len(requests):
            raise GenerationError("two requests follow the same one")

    def _generate(self) -> None:
        try:
            while (turn := self._await_turn()) is not None:
                request, scheduled_ns = turn
                queued_ns = self._clock.monotonic_ns()
                with self._change:
                    request = self._histories.ask(request)
                    self._sent[request.request_id] = Sent(
                        scheduled_ns=scheduled_ns, queued_ns=queued_ns, sent_ns=self._clock.monotonic_ns()
                    )
                self._submit(request)
        except BaseException as error:  # noqa: BLE001 - raised again by check, in the thread that serves
            self._error = error

    def _await_turn(self) -> tuple[Request, int] | None:
        """Wait until a request may be sent; it, and when the schedule wanted that. None once all are sent, or when stopped."""
        with self._change:
            while not self._stopped and (self._first or self._next or self._due):
                due_ns, scheduled_ns, later = self._earliest()
                if due_ns is None:
                    self._change.wait()
                elif (left_ns := due_ns - _SPIN_NS - self._clock.monotonic_ns()) > 0:
                    self._change.wait(left_ns / 1e9)
                else:
                    break
            else:
                return None
            request = heapq.heappop(self._due)[2] if later else self._begin()
        while self._clock.monotonic_ns() < due_ns:
            pass
        return request, scheduled_ns

    def _begin(self) -> Request:
        self._begun += 1
        self._open += 1
        return self._first.popleft()

    def _earliest(self) -> tuple[int | None, int, bool]:
        """When the next request may be sent, or None where only an answer can tell; when that was wanted; is it a later turn?"""
        times_ns, limit = self._schedule.send_at_ns, self._schedule.max_in_flight
        first_ns: int | None = None
        scheduled_ns = 0
        if self._first and (limit is None or self._open < limit):
            first_ns = scheduled_ns = self.begin_ns if times_ns is None else self.begin_ns + times_ns[self._begun]
            if times_ns is None and limit is not None:
                first_ns = scheduled_ns = self._room_since_ns
        if self._due and (first_ns is None or self._due[0][0] < first_ns):
            return self._due[0][0], self._due[0][0], True
        return first_ns, scheduled_ns, False
