"""What every engine behind the seam must do: subclass ``BackendContract`` in a test module and say which engines."""

from __future__ import annotations

import dataclasses
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from llem_ray.core.backend import (
    BackendConfig,
    ChatMessage,
    InferenceBackend,
    LoadReport,
    LoadSchedule,
    ModelOutlook,
    Request,
    RequestRecord,
    StepEvent,
)
from llem_ray.core.errors import BackendError, ConfigError, GenerationError, LlemRayError
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec

GREEDY = SamplingSpec()
TEXTS = ["A river", "runs through it, and on."]
SHAPES = [([5], [1]), ([7], [9]), ([4, 4, 4], [6, 6, 6]), ([3, 12, 1, 8], [5, 5, 5, 5]), ([6, 2, 9], [1, 7, 3])]


@dataclass(frozen=True)
class Engine:
    factory: Callable[[BackendConfig], InferenceBackend]
    model: ModelSpec
    args: dict[str, Any]
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    online: bool = False
    device: Literal["cpu", "cuda"] = "cpu"


@dataclass(frozen=True)
class Loaded:
    backend: InferenceBackend
    report: LoadReport
    config: BackendConfig
    load_s: float
    """Check and load by the wall."""
    outlook: ModelOutlook | None
    """What it told before it was loaded."""
    early_ids: list[list[int]] | None
    """Ids of ``TEXTS`` before it was loaded."""


def load(engine: Engine, config: BackendConfig) -> Loaded:
    backend = engine.factory(config)
    begin_s = time.monotonic()
    backend.check()
    tell = getattr(backend, "outlook", None)
    outlook = tell() if tell is not None else None
    early_ids = backend.encode(TEXTS) if outlook is not None else None
    report = backend.load()
    return Loaded(backend, report, config, time.monotonic() - begin_s, outlook, early_ids)


def requests_of(loaded: Loaded, lengths: list[int], new_tokens: list[int]) -> list[Request]:
    first = len(loaded.report.special_token_ids)
    ordinary = loaded.report.vocab_size - first
    return [
        Request(
            request_id=f"r{row}",
            prompt_token_ids=tuple(first + (31 * row + 7 * column) % ordinary for column in range(length)),
            max_new_tokens=count,
        )
        for row, (length, count) in enumerate(zip(lengths, new_tokens, strict=True))
    ]


def conversations_of(loaded: Loaded, *, think_ns: int) -> list[Request]:
    """Two conversations, ``a`` and ``b``, of three turns: 4 tokens, then 2 new ones after each answer of 3.

    The tokens that stand for a history are more than it has, as where an answer ends early.
    """
    requests: list[Request] = []
    for name, words in zip("ab", requests_of(loaded, [16, 16], [3, 3]), strict=True):
        for turn in range(3):
            requests.append(
                Request(
                    request_id=f"{name}{turn}",
                    prompt_token_ids=words.prompt_token_ids[: 4 + 6 * turn],
                    max_new_tokens=3,
                    follows=f"{name}{turn - 1}" if turn else None,
                    think_ns=think_ns if turn else 0,
                    new_prompt_tokens=2 if turn else None,
                )
            )
    return requests


def serve(
    loaded: Loaded, requests: list[Request], sampling: SamplingSpec = GREEDY
) -> tuple[list[StepEvent], list[RequestRecord]]:
    events = list(loaded.backend.run(requests, sampling))
    return [e for e in events if isinstance(e, StepEvent)], [e for e in events if isinstance(e, RequestRecord)]


class LoadedEngine:
    """A subclass defines the class-scoped fixture ``engine``, an ``Engine``."""

    @pytest.fixture(scope="class")
    @classmethod
    def make_config(cls, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., BackendConfig]:
        folder = tmp_path_factory.mktemp("engine")

        def make(**args: Any) -> BackendConfig:
            return BackendConfig(
                model=engine.model,
                engine=EngineSpec(
                    backend="any",
                    device=engine.device,
                    tensor_parallel=engine.tensor_parallel,
                    pipeline_parallel=engine.pipeline_parallel,
                    data_parallel=engine.data_parallel,
                    engine_args=engine.args | args,
                ),
                device=engine.device,
                host="host-1",
                base_dir=str(folder),
                cache_dir=str(folder / "cache"),
                online=engine.online,
            )

        return make

    @pytest.fixture(scope="class")
    @classmethod
    def loaded(cls, engine: Engine, make_config: Callable[..., BackendConfig]) -> Iterator[Loaded]:
        one = load(engine, make_config())
        yield one
        one.backend.close()

    def test_what_it_tells_before_a_load_is_what_the_load_finds(self, loaded: Loaded) -> None:
        told, report = loaded.outlook, loaded.report
        if told is None:
            pytest.skip("it tells nothing")
        assert (told.context_tokens, told.vocab_size) == (report.context_tokens, report.vocab_size)
        assert told.special_token_ids == report.special_token_ids
        assert loaded.early_ids == loaded.backend.encode(TEXTS)


class OnlineContract(LoadedEngine):
    """For engines that ``serves_online``, loaded with ``online=True``."""

    def served(
        self, loaded: Loaded, requests: list[Request], schedule: LoadSchedule
    ) -> tuple[list[StepEvent], dict[str, RequestRecord]]:
        events = list(loaded.backend.run(requests, GREEDY, schedule))
        records = [event for event in events if isinstance(event, RequestRecord)]
        assert sorted(record.request_id for record in records) == sorted(request.request_id for request in requests)
        return [event for event in events if isinstance(event, StepEvent)], {record.request_id: record for record in records}

    def test_a_schedule_is_kept(self, loaded: Loaded) -> None:
        requests = requests_of(loaded, [4, 9, 5, 7], [3, 6, 1, 4])
        due_ns = [0, 20_000_000, 20_000_000, 60_000_000]
        before_ns = time.monotonic_ns()
        steps, records = self.served(loaded, requests, LoadSchedule(send_at_ns=tuple(due_ns)))
        after_ns = time.monotonic_ns()
        begin_ns = records["r0"].scheduled_ns
        assert before_ns <= begin_ns
        for request, due in zip(requests, due_ns, strict=True):
            record = records[request.request_id]
            assert record.output_tokens == request.max_new_tokens
            assert record.prompt_tokens == len(request.prompt_token_ids)
            assert record.scheduled_ns == begin_ns + due
            assert record.scheduled_ns <= record.queued_ns <= record.sent_ns <= record.token_times_ns[0]
            assert list(record.token_times_ns) == sorted(record.token_times_ns)
            assert record.token_times_ns[-1] <= after_ns
        edges = [edge for step in steps for edge in (step.begin_ns, step.end_ns)]
        assert edges == sorted(edges)
        assert sum(step.prefill_tokens for step in steps) == 25
        assert sum(step.decode_tokens for step in steps) == 14

    def test_a_limit_in_flight_is_kept(self, loaded: Loaded) -> None:
        requests = requests_of(loaded, [5] * 7, [4] * 7)
        _, records = self.served(loaded, requests, LoadSchedule(max_in_flight=2))
        changes = [(record.sent_ns, 1) for record in records.values()]
        changes += [(record.token_times_ns[-1], -1) for record in records.values()]
        in_flight, most = 0, 0
        for _, change in sorted(changes):
            in_flight += change
            most = max(most, in_flight)
        assert most == 2

    def test_tokens_are_those_of_a_batch(self, loaded: Loaded) -> None:
        requests = requests_of(loaded, [5, 9, 3], [8, 8, 8])
        _, online = self.served(loaded, requests, LoadSchedule(max_in_flight=2))
        _, batch = serve(loaded, requests)
        assert {record.request_id: record.output_token_ids for record in batch} == {
            name: record.output_token_ids for name, record in online.items()
        }

    def test_a_request_beyond_the_context_is_refused(self, loaded: Loaded) -> None:
        context = loaded.report.context_tokens
        with pytest.raises(GenerationError, match=str(context)):
            list(loaded.backend.run(requests_of(loaded, [context], [1]), GREEDY, LoadSchedule(max_in_flight=1)))
        self.served(loaded, requests_of(loaded, [4], [2]), LoadSchedule(max_in_flight=1))

    def test_an_abandoned_run_leaves_the_engine_usable(self, loaded: Loaded) -> None:
        run = loaded.backend.run(requests_of(loaded, [4, 4], [50, 50]), GREEDY, LoadSchedule(max_in_flight=1))
        next(run)
        del run
        self.served(loaded, requests_of(loaded, [4], [3]), LoadSchedule(max_in_flight=1))

    @pytest.mark.parametrize(
        "schedule", [LoadSchedule(), LoadSchedule(max_in_flight=1), LoadSchedule(send_at_ns=(0, 30_000_000))], ids=str
    )
    def test_a_turn_comes_after_the_answer_before_it_and_holds_it(self, loaded: Loaded, schedule: LoadSchedule) -> None:
        requests = conversations_of(loaded, think_ns=4_000_000)
        _, records = self.served(loaded, requests, schedule)
        sent = {request.request_id: request.prompt_token_ids for request in requests}
        for request in requests:
            record = records[request.request_id]
            if request.follows is not None:
                before = records[request.follows]
                assert record.scheduled_ns == before.token_times_ns[-1] + request.think_ns
                assert request.new_prompt_tokens is not None
                history = sent[request.follows] + before.output_token_ids
                sent[request.request_id] = history + request.prompt_token_ids[-request.new_prompt_tokens :]
            assert record.scheduled_ns <= record.queued_ns <= record.sent_ns <= record.token_times_ns[0]
            assert record.prompt_tokens == len(sent[request.request_id])
        if schedule.max_in_flight == 1:
            first, second = (sorted((r for n, r in records.items() if n[0] == name), key=lambda r: r.sent_ns) for name in "ab")
            assert first[-1].token_times_ns[-1] <= second[0].scheduled_ns
        _, batch = serve(loaded, [Request(request_id=n, prompt_token_ids=ids, max_new_tokens=3) for n, ids in sent.items()])
        assert {r.request_id: r.output_token_ids for r in batch} == {n: r.output_token_ids for n, r in records.items()}

    def test_answers_that_are_known_are_sent_as_they_are(self, loaded: Loaded) -> None:
        requests = [dataclasses.replace(request, new_prompt_tokens=None) for request in conversations_of(loaded, think_ns=0)]
        _, records = self.served(loaded, requests, LoadSchedule(max_in_flight=2))
        _, batch = serve(loaded, [dataclasses.replace(request, follows=None) for request in requests])
        assert {r.request_id: r.output_token_ids for r in batch} == {n: r.output_token_ids for n, r in records.items()}


class BackendContract(LoadedEngine):
    """What holds for every engine, without schedules."""

    @pytest.mark.parametrize(("lengths", "new_tokens"), SHAPES)
    def test_serves_every_request_in_full(self, loaded: Loaded, lengths: list[int], new_tokens: list[int]) -> None:
        requests = requests_of(loaded, lengths, new_tokens)
        steps, records = serve(loaded, requests)

        assert [record.request_id for record in records] == [request.request_id for request in requests]
        assert [record.output_tokens for record in records] == new_tokens
        assert [record.prompt_tokens for record in records] == lengths
        assert all(record.padded_tokens >= record.prompt_tokens for record in records)
        assert {record.finish_reason for record in records} == {"length"}
        assert all(0 <= token < loaded.report.vocab_size for record in records for token in record.output_token_ids)
        assert sum(step.prefill_tokens for step in steps) == sum(lengths)
        assert sum(step.decode_tokens for step in steps) == sum(new_tokens)
        assert all(
            step.computed_tokens >= max(step.prefill_tokens, step.decode_tokens if step.kind == "decode" else 0) for step in steps
        )

    @pytest.mark.parametrize(("lengths", "new_tokens"), SHAPES)
    def test_times_ascend_inside_the_run(self, loaded: Loaded, lengths: list[int], new_tokens: list[int]) -> None:
        begin_ns = time.monotonic_ns()
        steps, records = serve(loaded, requests_of(loaded, lengths, new_tokens))
        end_ns = time.monotonic_ns()

        edges = [edge for step in steps for edge in (step.begin_ns, step.end_ns)]
        assert edges == sorted(edges)
        assert begin_ns <= edges[0]
        assert edges[-1] <= end_ns
        for record in records:
            assert len(record.token_times_ns) == record.output_tokens
            assert begin_ns <= record.scheduled_ns <= record.queued_ns <= record.sent_ns <= record.token_times_ns[0]
            assert list(record.token_times_ns) == sorted(record.token_times_ns)
            assert record.token_times_ns[-1] <= end_ns

    def test_greedy_is_repeatable_across_runs_and_reset(self, loaded: Loaded) -> None:
        requests = requests_of(loaded, [5, 9], [8, 8])
        _, first = serve(loaded, requests)
        _, second = serve(loaded, requests)
        loaded.backend.reset()
        _, third = serve(loaded, requests)
        outputs = [[record.output_token_ids for record in records] for records in (first, second, third)]
        assert outputs[0] == outputs[1] == outputs[2]

    def test_sampling_follows_its_seed(self, loaded: Loaded) -> None:
        requests = requests_of(loaded, [5, 9], [12, 12])
        drawn = [serve(loaded, requests, SamplingSpec(temperature=1.0, seed=seed))[1] for seed in (1, 1, 2)]
        outputs = [[record.output_token_ids for record in records] for records in drawn]
        assert outputs[0] == outputs[1]
        assert outputs[0] != outputs[2]

    def test_encode_yields_ids_of_the_vocabulary(self, loaded: Loaded) -> None:
        texts = ["Hello", "Why is the sky blue?", "naïve Grüße 你好 ∑"]
        encoded = loaded.backend.encode(texts)
        assert len(encoded) == len(texts)
        assert all(encoded)
        assert all(0 <= token < loaded.report.vocab_size for ids in encoded for token in ids)
        assert encoded == loaded.backend.encode(texts)

    def test_chats_are_rendered_by_the_models_template_or_refused(self, loaded: Loaded) -> None:
        chats = [[ChatMessage(role="user", content=text)] for text in ("Hello", "Why is the sky blue?")]
        if loaded.report.notes.get("tokenizer") == "trained locally":
            with pytest.raises(ConfigError, match="no chat template") as caught:
                loaded.backend.encode_chats(chats)
            assert caught.value.field == "workload.prompts.chat_template"
            return
        encoded = loaded.backend.encode_chats(chats)
        plain = loaded.backend.encode(["Hello", "Why is the sky blue?"])
        assert all(len(ids) > len(bare) for ids, bare in zip(encoded, plain, strict=True))
        assert all(0 <= token < loaded.report.vocab_size for ids in encoded for token in ids)

    def test_too_long_prompt_is_refused_and_the_next_run_works(self, loaded: Loaded) -> None:
        context = loaded.report.context_tokens
        with pytest.raises(GenerationError, match=str(context)) as caught:
            serve(loaded, requests_of(loaded, [context], [1]))
        assert "r0" in str(caught.value)
        _, records = serve(loaded, requests_of(loaded, [4], [3]))
        assert records[0].output_tokens == 3

    def test_abandoned_run_leaves_the_engine_usable(self, loaded: Loaded) -> None:
        run = loaded.backend.run(requests_of(loaded, [4], [50]), GREEDY)
        assert isinstance(next(run), StepEvent)
        del run
        _, records = serve(loaded, requests_of(loaded, [4], [3]))
        assert records[0].output_tokens == 3

    def test_identity_names_this_host(self, loaded: Loaded) -> None:
        ranks = loaded.backend.identity()
        assert [rank.rank for rank in ranks] == list(range(loaded.config.engine.world_size))
        assert {rank.host for rank in ranks} == {"host-1"}
        assert all(rank.pid > 0 and (rank.gpu_uuid is None) == (loaded.config.device == "cpu") for rank in ranks)

    def test_report_is_complete(self, loaded: Loaded) -> None:
        report = loaded.report
        assert report.import_s >= 0
        assert report.construct_s >= 0
        parts_s = (report.process_start_s, report.import_s, report.construct_s, report.compile_s, report.warm_s)
        assert sum(part_s or 0.0 for part_s in parts_s) <= loaded.load_s
        assert report.context_tokens > 0
        assert report.device == loaded.config.device
        assert report.parameters == 1_000_576 or report.notes["engine"] == "fake"
        assert report.flop_model is not None or report.notes["engine"] == "fake"
        assert report.random_weights
        assert report.notes["engine"].partition(" ")[2] or report.notes["engine"] == "fake"
        assert all(isinstance(text, str) for text in report.notes.values())
        assert pickle.loads(pickle.dumps(report)) == report

    def test_unknown_argument_is_refused_before_loading(self, engine: Engine, make_config: Callable[..., BackendConfig]) -> None:
        name = next(iter(engine.args))
        with pytest.raises(ConfigError, match="unknown engine argument") as caught:
            engine.factory(make_config(**{name + "x": 1})).check()
        assert name in str(caught.value.hint)
        assert caught.value.field == f"engine.engine_args.{name}x"

    def test_wrong_type_is_refused_before_loading(self, engine: Engine, make_config: Callable[..., BackendConfig]) -> None:
        name = next(iter(engine.args))
        with pytest.raises(ConfigError, match=name):
            engine.factory(make_config(**{name: "many"})).check()

    def test_close_may_come_at_any_point_and_twice(self, engine: Engine, loaded: Loaded) -> None:
        engine.factory(loaded.config).close()
        loaded.backend.close()
        loaded.backend.close()
        request = Request(request_id="r0", prompt_token_ids=(5,), max_new_tokens=1)
        with pytest.raises(BackendError, match="not loaded"):
            list(loaded.backend.run([request], GREEDY))
        loaded.backend.load()
        _, records = serve(loaded, [request])
        assert records[0].output_tokens == 1

    def test_empty_batch_is_a_typed_error(self, loaded: Loaded) -> None:
        with pytest.raises(LlemRayError, match="no requests"):
            serve(loaded, [])

    def test_records_and_steps_are_plain_data(self, loaded: Loaded) -> None:
        steps, records = serve(loaded, requests_of(loaded, [4, 6], [2, 2]))
        assert all(type(value) in (int, float, str, type(None)) for step in steps for value in dataclasses.asdict(step).values())
        assert all(type(token) is int for record in records for token in record.output_token_ids)
