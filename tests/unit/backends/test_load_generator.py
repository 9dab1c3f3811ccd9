"""Requests sent one by one: their order, their times, the number in flight."""

import queue
import threading
import time
from collections import deque

import pytest

from llem_ray.backends.load_generator import LoadGenerator
from llem_ray.core.backend import BackendConfig, LoadSchedule, Request, RequestRecord, StepEvent
from llem_ray.core.errors import GenerationError
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec
from llem_ray.testing.backend import FakeBackend

MS = 1_000_000
WAIT_S = 20.0


def some(count: int, new_tokens: int = 4) -> list[Request]:
    return [Request(request_id=str(i), prompt_token_ids=(1, 5 + i), max_new_tokens=new_tokens) for i in range(count)]


def fake(**arguments: object) -> FakeBackend:
    engine = EngineSpec(backend="fake", engine_args=arguments)
    backend = FakeBackend(
        BackendConfig(model=ModelSpec(config="x"), engine=engine, device="cpu", host="h", base_dir=".", cache_dir=".")
    )
    backend.load()
    return backend


class TestOpenLoop:
    def test_none_goes_before_its_time_and_answers_are_not_waited_for(self) -> None:
        arrived: queue.SimpleQueue[Request] = queue.SimpleQueue()
        due_ms = (0, 10, 10, 30)
        generator = LoadGenerator(some(4), LoadSchedule(send_at_ns=tuple(t * MS for t in due_ms)), arrived.put)
        generator.start()
        got = [arrived.get(timeout=WAIT_S).request_id for _ in range(4)]
        assert got == ["0", "1", "2", "3"]
        for name, t in zip(got, due_ms, strict=True):
            sent = generator.done(name)
            assert sent.scheduled_ns == generator.begin_ns + t * MS
            assert sent.scheduled_ns <= sent.queued_ns <= sent.sent_ns
        generator.stop()

    def test_a_limit_in_flight_delays_and_the_delay_shows(self) -> None:
        arrived: queue.SimpleQueue[Request] = queue.SimpleQueue()
        generator = LoadGenerator(some(2), LoadSchedule(send_at_ns=(0, 0), max_in_flight=1), arrived.put)
        generator.start()
        arrived.get(timeout=WAIT_S)
        time.sleep(0.02)
        assert generator.sent == 1
        generator.done("0")
        arrived.get(timeout=WAIT_S)
        sent = generator.done("1")
        assert sent.scheduled_ns == generator.begin_ns
        assert sent.sent_ns - sent.scheduled_ns >= 20 * MS


class TestClosedLoop:
    def test_without_a_limit_all_are_due_at_the_begin_however_early_answers_come(self) -> None:
        sent: list[int] = []
        ended = threading.Event()

        def answer_at_once(request: Request) -> None:
            time.sleep(0.001)
            sent.append(generator.done(request.request_id).scheduled_ns)
            if len(sent) == 3:
                ended.set()

        generator = LoadGenerator(some(3), LoadSchedule(), answer_at_once)
        generator.start()
        assert ended.wait(WAIT_S)
        generator.stop()
        assert sent == [generator.begin_ns] * 3

    def test_never_more_in_flight_than_allowed(self) -> None:
        in_flight, most, lock = set[str](), 0, threading.Lock()
        arrived: queue.SimpleQueue[Request] = queue.SimpleQueue()

        def submit(request: Request) -> None:
            nonlocal most
            with lock:
                in_flight.add(request.request_id)
                most = max(most, len(in_flight))
            arrived.put(request)

        generator = LoadGenerator(some(50), LoadSchedule(max_in_flight=3), submit)
        generator.start()
        before_ns = generator.begin_ns
        # As many as may be are in flight before each answer.
        served = deque(arrived.get(timeout=WAIT_S).request_id for _ in range(3))
        for number in range(50):
            name = served.popleft()
            with lock:
                in_flight.remove(name)
            sent = generator.done(name)
            assert before_ns <= sent.scheduled_ns <= sent.sent_ns
            if number < 47:
                served.append(arrived.get(timeout=WAIT_S).request_id)
        assert most == 3
        generator.stop()


def conversation(name: str, turns: int, *, think_ns: int = 0, generated: bool = True) -> list[Request]:
    """Each turn's prompt is 2 tokens longer than all before it, answers of 1 token included."""
    return [
        Request(
            request_id=f"{name}{turn}",
            prompt_token_ids=tuple(range(2 + 3 * turn)),
            max_new_tokens=1,
            follows=f"{name}{turn - 1}" if turn else None,
            think_ns=think_ns if turn else 0,
            new_prompt_tokens=2 if turn and generated else None,
        )
        for turn in range(turns)
    ]


class TestConversations:
    def test_a_turn_is_due_when_the_answer_before_was_thought_about(self) -> None:
        arrived: queue.SimpleQueue[Request] = queue.SimpleQueue()
        generator = LoadGenerator(conversation("a", 2, think_ns=30 * MS), LoadSchedule(send_at_ns=(0,)), arrived.put)
        generator.start()
        assert arrived.get(timeout=WAIT_S).prompt_token_ids == (0, 1)
        with pytest.raises(queue.Empty):
            arrived.get(timeout=0.02)
        ended_ns = time.monotonic_ns() - MS
        generator.done("a0", (77,), ended_ns)
        assert arrived.get(timeout=WAIT_S).prompt_token_ids == (0, 1, 77, 3, 4)
        sent = generator.done("a1", (78,))
        assert sent.scheduled_ns == ended_ns + 30 * MS
        assert sent.scheduled_ns <= sent.queued_ns <= sent.sent_ns
        generator.stop()

    def test_histories_grow_by_what_was_answered_also_where_that_is_short(self) -> None:
        arrived: queue.SimpleQueue[Request] = queue.SimpleQueue()
        generator = LoadGenerator(conversation("a", 3), LoadSchedule(), arrived.put)
        generator.start()
        prompts = []
        for name, answer in (("a0", (70, 71)), ("a1", ()), ("a2", (72,))):
            prompts.append(arrived.get(timeout=WAIT_S).prompt_token_ids)
            generator.done(name, answer)
        assert prompts == [(0, 1), (0, 1, 70, 71, 3, 4), (0, 1, 70, 71, 3, 4, 6, 7)]

    def test_known_answers_are_sent_as_they_are(self) -> None:
        arrived: queue.SimpleQueue[Request] = queue.SimpleQueue()
        generator = LoadGenerator(conversation("a", 2, generated=False), LoadSchedule(), arrived.put)
        generator.start()
        arrived.get(timeout=WAIT_S)
        generator.done("a0", (77,))
        assert arrived.get(timeout=WAIT_S).prompt_token_ids == (0, 1, 2, 3, 4)
        generator.stop()

    def test_a_conversation_keeps_its_place_until_it_ends(self) -> None:
        """Also while it is thought about: what is limited are conversations."""
        arrived: queue.SimpleQueue[Request] = queue.SimpleQueue()
        requests = [*conversation("a", 2, think_ns=20 * MS), *conversation("b", 2), *conversation("c", 1)]
        generator = LoadGenerator(requests, LoadSchedule(max_in_flight=1), arrived.put)
        generator.start()
        order = []
        for _ in requests:
            order.append(arrived.get(timeout=WAIT_S).request_id)
            generator.done(order[-1])
        assert order == ["a0", "a1", "b0", "b1", "c0"]
        generator._thread.join(WAIT_S)
        assert not generator._thread.is_alive()

    def test_rates_count_conversations_and_later_turns_go_between(self) -> None:
        arrived: queue.SimpleQueue[Request] = queue.SimpleQueue()
        requests = [*conversation("a", 2), *conversation("b", 1)]
        generator = LoadGenerator(requests, LoadSchedule(send_at_ns=(0, 60 * MS)), arrived.put)
        generator.start()
        order = []
        for _ in requests:
            order.append(arrived.get(timeout=WAIT_S).request_id)
            sent = generator.done(order[-1])
        assert order == ["a0", "a1", "b0"]
        assert sent.scheduled_ns == generator.begin_ns + 60 * MS
        generator.stop()

    def test_stop_ends_the_wait_for_an_answer(self) -> None:
        generator = LoadGenerator(conversation("a", 2), LoadSchedule(), lambda _: None)
        generator.start()
        generator.stop()
        assert not generator._thread.is_alive()
        assert generator.sent <= 1

    @pytest.mark.parametrize(
        ("requests", "says"),
        [
            (conversation("a", 3)[1:], "a1 follows a0, which does not come before it"),
            ([*conversation("a", 2), *conversation("a", 2)[1:]], "two requests follow the same one"),
        ],
    )
    def test_a_conversation_that_hangs_together_badly_is_refused(self, requests: list[Request], says: str) -> None:
        with pytest.raises(GenerationError, match=says):
            LoadGenerator(requests, LoadSchedule(), lambda _: None)


class TestEnds:
    def test_stop_ends_a_long_wait(self) -> None:
        generator = LoadGenerator(some(1), LoadSchedule(send_at_ns=(3_600_000 * MS,)), lambda _: None)
        generator.start()
        generator.stop()
        assert not generator._thread.is_alive()
        assert generator.sent == 0

    def test_an_engine_that_refuses_is_told(self) -> None:
        def submit(_: Request) -> None:
            raise ValueError("full")

        generator = LoadGenerator(some(2), LoadSchedule(max_in_flight=2), submit)
        generator.start()
        generator._thread.join(WAIT_S)
        with pytest.raises(GenerationError, match="full"):
            generator.check()

    @pytest.mark.parametrize("schedule", [LoadSchedule(send_at_ns=(0,)), LoadSchedule(max_in_flight=0)])
    def test_an_impossible_schedule_is_refused(self, schedule: LoadSchedule) -> None:
        with pytest.raises(GenerationError):
            LoadGenerator(some(2), schedule, lambda _: None)


def test_the_fake_engine_batches_continuously() -> None:
    backend = fake(max_sequences=2, prefill_ms=1.0, decode_ms=1.0)
    events = list(backend.run(some(5), SamplingSpec(), LoadSchedule(max_in_flight=4)))
    records = {event.request_id: event for event in events if isinstance(event, RequestRecord)}
    steps = [event for event in events if isinstance(event, StepEvent)]
    assert set(records) == set("01234")
    assert all(record.output_tokens == 4 for record in records.values())
    assert sum(step.decode_tokens for step in steps) == 20
    assert sum(step.prefill_tokens for step in steps) == 10
    assert max(step.decode_tokens for step in steps) == 2
    batched = [event for event in backend.run(some(5), SamplingSpec()) if isinstance(event, RequestRecord)]
    assert {r.request_id: r.output_token_ids for r in batched} == {k: r.output_token_ids for k, r in records.items()}


def test_the_fake_engine_fails_on_demand_online() -> None:
    backend = fake(fail={"kind": "generation"})
    with pytest.raises(GenerationError, match="told to fail"):
        list(backend.run(some(4), SamplingSpec(), LoadSchedule(max_in_flight=2)))
