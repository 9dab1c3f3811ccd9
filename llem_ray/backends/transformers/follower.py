"""A rank above 0: does what the rank that leads it orders, until that closes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from llem_ray.backends.gang.links import Link
from llem_ray.backends.process.wire import error_body, pack_flat, unpack, unpack_each
from llem_ray.backends.transformers.engine import Engine
from llem_ray.backends.transformers.replica import CLOSE_S, SETTLE_S, Replica
from llem_ray.core.backend import Request, StepEvent
from llem_ray.core.errors import BackendError, EngineDied, GenerationError, HangError, LlemRayError
from llem_ray.core.spec import SamplingSpec

PROGRESS_NS: Final = 20_000_000
"""The leader of a replica tells rank 0 about its steps no more often than this."""


class Follower:
    """A rank that is led. If it leads a replica itself, it passes orders on.

    Args:
        engine: With this rank's share of the model.
        replica: With connections to the other ranks.
    """

    def __init__(self, engine: Engine, replica: Replica) -> None:
        assert replica.circle.leader is not None
        self._engine = engine
        self._replica = replica
        self._leader: Link = replica.circle.leader
        self._serving = threading.Lock()
        self._closing = False

    def start(self) -> dict[str, str]:
        """Serve until rank 0 has found that every rank is ready; returns notes for the report.

        Raises:
            EngineDied: It gave up.
        """
        if not self._replica.layout.place:
            self._leader.send(0, "ready", 0)
        self._serve("loaded")
        return self._replica.notes()

    def follow_orders(self) -> None:
        """See ``FollowerBackend.follow``."""
        with self._serving:
            try:
                self._serve("close")
            except BackendError as error:
                self._replica.give_up(error.message)
                if self._closing:
                    return
                raise GenerationError(error.message, error.hint) from error

    def close(self) -> None:
        """Stop following, in whichever thread that is, and drop the model."""
        self._closing = True
        self._leader.shut_down()
        if not self._serving.acquire(timeout=CLOSE_S):
            return  # it is stuck in a collective operation: only the end of the process ends that
        try:
            self._engine.close()
            self._replica.close()
        finally:
            self._serving.release()

    def _serve(self, last: str) -> None:
        """Carry out orders up to and including ``last``."""
        kind = ""
        while kind != last:
            call, kind, body = self._leader.receive(None, "a wait for orders")
            if kind == "ping":
                self._leader.send(call, "pong", time.monotonic_ns())
            elif kind == "batch":
                self._share(call, body)
            elif kind == "run":
                self._run(call, body)
            elif kind in ("loaded", "reset", "close"):
                self._pass_on(call, kind)

    def _pass_on(self, call: int, kind: str) -> None:
        if kind == "close":
            self._replica.expect_end()
        if self._replica.circle.members:
            timeout_s = CLOSE_S if kind == "close" else self._replica.step_timeout_s
            self._replica.order(self._replica.circle.members, kind, timeout_s)
        if kind == "reset":
            self._engine.release_memory()
        self._leader.send(call, "done", None)

    def _share(self, call: int, body: Any) -> None:
        """Compute this rank's share of a batch."""

        def chosen() -> Sequence[int] | None:
            _, kind, tokens = self._leader.receive(None, "a batch")
            return tokens if kind == "step" else None

        try:
            self._engine.follow(body[0], body[1], chosen)
        except (EngineDied, HangError):
            raise
        except BackendError as error:
            self._leader.send(call, "ended", error_body(error))
            # All ranks may have failed alike, and then they can go on. Else the leader waits for this one in the middle of a
            # step: it is set free by the end of this rank.
            with contextlib.suppress(HangError):
                if self._leader.receive(SETTLE_S / 2, "a batch that failed")[1] == "stop":
                    return
            raise
        self._leader.send(call, "ended", None)

    def _run(self, call: int, body: Any) -> None:
        """Lead this rank's replica through its share of the requests."""
        requests, sampling = unpack_each(Request, body[0]), unpack(SamplingSpec, body[1])
        records, counts, told_ns = [], [0, 0, 0], time.monotonic_ns()
        try:
            with contextlib.closing(self._engine.run(requests, sampling)) as events:  # type: ignore[type-var]
                for event in events:
                    if not isinstance(event, StepEvent):
                        records.append(pack_flat(event))
                        continue
                    counts[0] += event.prefill_tokens
                    counts[1] += event.decode_tokens
                    counts[2] += event.computed_tokens
                    if event.end_ns - told_ns >= PROGRESS_NS:
                        self._leader.send(call, "progress", counts)
                        counts, told_ns = [0, 0, 0], event.end_ns
                    if self._leader.pending():  # rank 0 speaks during a batch to give it up, or is gone
                        break
        except LlemRayError as error:
            self._leader.send(call, "error", error_body(error))
            if isinstance(error, EngineDied | HangError):
                raise
            return
        self._leader.send(call, "progress", counts)
        self._leader.send(call, "done", records)
