"""An engine of several processes, as rank 0 sees it: it deals batches out to the replicas and gathers what they made.

Orders go from rank to rank over ``links``, tensors over torch.distributed. In each step the leader of a replica chooses the
tokens and sends their ids, so that all its ranks go on with the same ones, or stop together. Replicas do not wait for each
other.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

from llem_ray.backends.gang.layout import deal
from llem_ray.backends.gang.links import Link
from llem_ray.backends.process.wire import pack_flat, restored, unpack_each
from llem_ray.backends.transformers.clocks import PeerClock, measure_clock
from llem_ray.backends.transformers.engine import Engine
from llem_ray.backends.transformers.replica import CLOSE_S, LOAD_S, Replica
from llem_ray.core.backend import ChatMessage, Request, RequestRecord, StepEvent, StepKind
from llem_ray.core.errors import BackendError, EngineDied, HangError
from llem_ray.core.spec import SamplingSpec


class Gang:
    """Rank 0 of several.

    Args:
        engine: With this rank's share of the model.
        replica: With connections to the other ranks.
    """

    def __init__(self, engine: Engine, replica: Replica) -> None:
        self._engine = engine
        self._replica = replica
        self._clocks: dict[int, PeerClock] = {}

    def start(self) -> dict[str, str]:
        """Wait until every replica is loaded; returns notes for the report.

        Raises:
            LlemRayError: One is not.
        """
        replica = self._replica
        replica.await_ready(replica.circle.deputies, LOAD_S)
        notes = replica.notes()
        if replica.circle.members:
            clocks = [self._clock_of(link) for link in replica.circle.members]
            notes["control_step_us"] = f"{max(clock.half_width_ns for clock in clocks) / 1000:.1f}"
        self._measure_clocks()
        if self._clocks:
            notes["clock_half_width_us"] = f"{max(clock.half_width_ns for clock in self._clocks.values()) / 1000:.1f}"
        replica.order(replica.circle.led, "loaded", replica.step_timeout_s)
        return notes

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        return self._engine.encode(texts)

    def encode_chats(self, chats: Sequence[Sequence[ChatMessage]]) -> list[list[int]]:
        """Token ids of each chat by the model's own template."""
        return self._engine.encode_chats(chats)

    def run(self, requests: Sequence[Request], sampling: SamplingSpec) -> Iterator[StepEvent | RequestRecord]:
        """See ``InferenceBackend.run``."""
        self._engine.require_valid(requests)
        if not self._replica.circle.deputies:
            return self._engine.run(requests, sampling)
        return self._run_replicas(requests, sampling)

    def release_memory(self) -> None:
        """Have every rank give memory back that nothing uses any more, and read the clocks anew."""
        self._replica.order(self._replica.circle.led, "reset", self._replica.step_timeout_s)
        self._measure_clocks()
        self._engine.release_memory()

    def close(self) -> None:
        """Have the others stop following, and drop the model."""
        self._replica.expect_end()
        with contextlib.suppress(BackendError):
            self._replica.order(self._replica.circle.led, "close", CLOSE_S)
        self._engine.close()
        self._replica.close()

    def _run_replicas(self, requests: Sequence[Request], sampling: SamplingSpec) -> Iterator[StepEvent | RequestRecord]:
        """A step counts what all replicas are known to have done since the one before."""
        self._replica.require_usable()
        sent_ns = time.monotonic_ns()
        own, *others = deal(requests, self._replica.layout.data)
        records: dict[str, RequestRecord] = {}
        shares: list[Share] = []
        try:
            shares += self._deal_out(others, sampling)
            yield from self._steps(own, sampling, shares, records)
        except (EngineDied, HangError) as error:
            self._replica.give_up(error.message)
            raise
        finally:
            self._recall(shares)
        end_ns = time.monotonic_ns()
        for share in shares:
            records |= {record.request_id: record for record in share.records}
        for request in requests:
            yield _within(records[request.request_id], sent_ns, end_ns)

    def _steps(
        self, own: Sequence[Request], sampling: SamplingSpec, shares: Sequence[Share], records: dict[str, RequestRecord]
    ) -> Iterator[StepEvent]:
        last_ns = time.monotonic_ns()
        with contextlib.closing(_generator(self._engine.run(own, sampling))) as events:
            for event in events:
                if isinstance(event, RequestRecord):
                    records[event.request_id] = event
                    continue
                for share in shares:
                    share.drain()
                yield _step(event.begin_ns, event.end_ns, [_counts(event), *(share.take() for share in shares)])
                last_ns = time.monotonic_ns()
        for share in shares:
            while not share.done:
                share.receive(self._replica.step_timeout_s)
                if any(counts := share.take()):
                    now_ns = time.monotonic_ns()
                    yield _step(last_ns, now_ns, [counts])
                    last_ns = time.monotonic_ns()

    def _deal_out(self, hands: Sequence[Sequence[Request]], sampling: SamplingSpec) -> list[Share]:
        shares = []
        for link, hand in zip(self._replica.circle.deputies, hands, strict=True):
            if hand:
                call = self._replica.next_call()
                body = [[pack_flat(request) for request in hand], pack_flat(sampling)]
                link.send(call, "run", body, self._replica.step_timeout_s)
                shares.append(Share(link, call, self._clocks[link.rank]))
        return shares

    def _recall(self, shares: Sequence[Share]) -> None:
        """Have replicas that still work stop, and wait until they have."""
        working = [share for share in shares if not share.done]
        try:
            self._replica.require_usable()
            for share in working:
                share.link.send(share.call, "cancel", None, self._replica.step_timeout_s)
            for share in working:
                share.await_end(self._replica.step_timeout_s)
        except (EngineDied, HangError) as error:
            self._replica.give_up(error.message)

    def _measure_clocks(self) -> None:
        self._clocks = {link.rank: self._clock_of(link) for link in self._replica.circle.deputies}

    def _clock_of(self, link: Link) -> PeerClock:
        hosts = self._replica.circle.hosts
        return measure_clock(link, self._replica.next_call(), self._replica.step_timeout_s, hosts[link.rank] == hosts[0])


class Share:
    """What another replica does of a batch.

    Args:
        link: To its leader.
        call: Number of the order.
        clock: Of its host.
    """

    def __init__(self, link: Link, call: int, clock: PeerClock) -> None:
        self.link = link
        self.call = call
        self.done = False
        self.records: list[RequestRecord] = []
        self._clock = clock
        self._counts = (0, 0, 0)

    def drain(self) -> None:
        """Take what has arrived."""
        while not self.done and self.link.pending():
            self.receive(None)

    def receive(self, timeout_s: float | None) -> None:
        """Wait for the next message.

        Raises:
            BackendError: What went wrong there.
        """
        call, kind, body = self.link.receive(timeout_s, "a batch")
        if call != self.call:
            return
        if kind == "progress":
            prefill, decode, computed = self._counts
            self._counts = (prefill + body[0], decode + body[1], computed + body[2])
            return
        self.done = True
        if kind == "error":
            raise restored(body)
        self.records = [self._converted(record) for record in unpack_each(RequestRecord, body)]

    def await_end(self, timeout_s: float) -> None:
        """Wait until it has stopped, whatever the outcome."""
        while not self.done:
            call, kind, _ = self.link.receive(timeout_s, "the end of a batch")
            self.done = call == self.call and kind != "progress"

    def take(self) -> tuple[int, int, int]:
        """Prompt tokens, output tokens and computed positions since the last call."""
        counts, self._counts = self._counts, (0, 0, 0)
        return counts

    def _converted(self, record: RequestRecord) -> RequestRecord:
        return replace(record, token_times_ns=tuple(map(self._clock.ours, record.token_times_ns)))


def _counts(event: StepEvent) -> tuple[int, int, int]:
    return event.prefill_tokens, event.decode_tokens, event.computed_tokens


def _step(begin_ns: int, end_ns: int, counts: Sequence[tuple[int, int, int]]) -> StepEvent:
    prefill, decode, computed = map(sum, zip(*counts, strict=True))
    pure = all(item[0] for item in counts if any(item))
    kind: StepKind = "decode" if not prefill else "prefill" if pure else "mixed"
    return StepEvent(
        begin_ns=begin_ns, end_ns=end_ns, kind=kind, prefill_tokens=prefill, decode_tokens=decode, computed_tokens=computed
    )


def _within(record: RequestRecord, sent_ns: int, end_ns: int) -> RequestRecord:
    """The record with times of this run; what the clocks' uncertainty puts outside of it is moved to its edge."""
    times_ns = tuple(min(max(time_ns, sent_ns), end_ns) for time_ns in record.token_times_ns)
    return replace(record, scheduled_ns=sent_ns, queued_ns=sent_ns, sent_ns=sent_ns, token_times_ns=times_ns)


def _generator(events: Iterator[Any]) -> Generator[Any]:
    assert isinstance(events, Generator)
    return events
