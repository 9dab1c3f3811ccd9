"""The requests of one run, streamed: every token with the time at which the event loop got it."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, Final

from llem_ray.backends.load_generator import LoadGenerator, Sent
from llem_ray.backends.tensorrt_llm.waiting import EventLoop
from llem_ray.core.backend import FinishReason, LoadSchedule, Request, RequestRecord
from llem_ray.core.errors import EngineDied, GenerationError, HangError

FINISH_REASONS: Final[Mapping[str, FinishReason]] = {"length": "length", "stop": "stop"}
"""TensorRT-LLM's others are `timeout` and `cancelled`: no answer."""

LOOK_S: Final = 0.5
"""How often a wait looks whether the workers live."""

ABORT_S: Final = 10.0
"""Longest wait for requests that were given up."""

Submit = Callable[[Request, int], Any]
"""Hands a request and its place in the run to the library; called in the event loop."""


@dataclass(slots=True)
class _Row:
    request: Request
    index: int
    token_ids: list[int] = field(default_factory=list)
    times_ns: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    output: Any = None
    given_up: bool = False
    error: BaseException | None = None

    def abort(self) -> None:
        """In the event loop, so that a request which is just being handed over is not missed."""
        if self.output is not None and not self.output.finished:
            self.output.abort()


class Stream:
    """One run on its way through TensorRT-LLM.

    Args:
        loop: The engine's.
        submit: See ``Submit``.
        requests: Valid ones, within the context.
        schedule: When each is sent.
        step_timeout_s: Longest wait for the next token.
        check: Raises when a worker is gone.
    """

    def __init__(
        self,
        loop: EventLoop,
        submit: Submit,
        requests: Sequence[Request],
        schedule: LoadSchedule,
        step_timeout_s: float,
        check: Callable[[], None],
    ) -> None:
        self._loop, self._submit, self._check, self._step_timeout_s = loop, submit, check, step_timeout_s
        self._rows = {request.request_id: _Row(request=request, index=index) for index, request in enumerate(requests)}
        if len(self._rows) != len(requests):
            raise GenerationError("two requests of one run have the same id")
        self._tasks: list[Future[None]] = []
        self._answered: queue.SimpleQueue[_Row] = queue.SimpleQueue()
        self._heard_ns = 0
        self._generator = LoadGenerator(requests, schedule, self._send)
        self.usable = True
        """False once the library did not even end what was given up: the engine cannot serve any more."""

    @property
    def begin_ns(self) -> int:
        """When the run started."""
        return self._generator.begin_ns

    def records(self) -> Iterator[RequestRecord]:
        """Send the requests; yields each record as its answer ends.

        Raises:
            GenerationError: A request was refused, failed, or ended early.
            HangError: No token came for ``step_timeout_s``.
        """
        self._generator.start()
        self._heard_ns = self.begin_ns
        try:
            for _ in range(len(self._rows)):
                row = self._next()
                ended_ns = row.times_ns[-1] if row.times_ns else None
                sent = self._generator.done(row.request.request_id, row.token_ids, ended_ns)
                if row.error is not None:
                    raise row.error
                yield _record(row, sent)
        except (HangError, EngineDied):
            self.usable = False
            raise
        finally:
            self._generator.stop()
            self._give_up()

    def _send(self, request: Request) -> None:
        """In the generator's thread."""
        self._heard_ns = max(self._heard_ns, time.monotonic_ns())
        row = self._rows[request.request_id]
        row.request = request
        self._tasks.append(self._loop.start(self._answer(row)))

    async def _answer(self, row: _Row) -> None:
        """In the event loop. What the stream yields is always the same object, so tokens are copied as they come."""
        try:
            if row.given_up:
                return
            row.output = self._submit(row.request, row.index)
            async for output in row.output:
                now_ns = time.monotonic_ns()
                completion = output.outputs[0]
                new = [int(token) for token in completion.token_ids_diff]
                row.token_ids += new
                row.times_ns += [now_ns] * len(new)
                row.finish_reason = completion.finish_reason
                self._heard_ns = now_ns
        except Exception as error:  # noqa: BLE001 - raised again in the thread that serves the run
            row.error = error
        finally:
            self._answered.put(row)

    def _next(self) -> _Row:
        while True:
            try:
                return self._answered.get(timeout=LOOK_S)
            except queue.Empty:
                self._generator.check()
                self._check()
            silent_ns = time.monotonic_ns() - self._heard_ns
            if silent_ns > self._step_timeout_s * 1e9 and not all(task.done() for task in list(self._tasks)):
                raise HangError(
                    f"TensorRT-LLM delivered no token for {self._step_timeout_s:g} s",
                    "a longer engine.engine_args.step_timeout_s gives it more time",
                )

    def _give_up(self) -> None:
        """Abort what still runs, so that the next run finds an engine at rest."""
        for row in self._rows.values():
            row.given_up = True
            self._loop.call(row.abort)
        running = [task for task in self._tasks if not task.done()]
        if self.usable and running and wait(running, timeout=ABORT_S).not_done:
            self.usable = False


def _record(row: _Row, sent: Sent) -> RequestRecord:
    request = row.request
    reason = FINISH_REASONS.get(row.finish_reason or "")
    wrong_length = request.ignore_eos and len(row.token_ids) != request.max_new_tokens
    if reason is None or wrong_length or not row.token_ids:
        raise GenerationError(
            f"request {request.request_id} ended with {len(row.token_ids)} of {request.max_new_tokens} tokens"
            f" (finish reason {row.finish_reason!r})"
        )
    return RequestRecord(
        request_id=request.request_id,
        prompt_tokens=len(request.prompt_token_ids),
        padded_tokens=len(request.prompt_token_ids),
        output_token_ids=tuple(row.token_ids),
        finish_reason=reason,
        scheduled_ns=sent.scheduled_ns,
        queued_ns=sent.queued_ns,
        sent_ns=sent.sent_ns,
        token_times_ns=tuple(row.times_ns),
    )
