"""What an engine host makes of an engine that fails twice."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from llem_ray.core.backend import ChatMessage, Request, RequestRecord, StepEvent
from llem_ray.core.errors import ConfigError
from llem_ray.core.measure_spec import WarmupSpec
from llem_ray.core.outcome import Completed, Failed
from llem_ray.core.spec import EngineSpec, Experiment, ModelSpec
from llem_ray.core.workload_spec import LoadSpec, PromptSpec, WorkloadSpec
from llem_ray.execution import engines
from llem_ray.execution.calls import TrialOrder
from llem_ray.execution.engine_host import EngineHost
from llem_ray.testing.backend import FakeBackend
from llem_ray.testing.clock import VirtualClock

MODEL = ModelSpec(config="llama-tiny", weights="random")
ENGINE = EngineSpec(backend="fake", device="cpu", engine_args={"fail": {"kind": "generation"}})


class Broken(FakeBackend):
    """After its first failure the device answers nothing any more, as CUDA after an illegal access."""

    def reset(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(("backend", "kind"), [(FakeBackend, "generation"), (Broken, "engine_died")])
def test_an_engine_that_cannot_be_reset_is_done_for(
    backend: type[FakeBackend], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own failure is told all the same, and the next trial gets a fresh engine."""

    def load_plugin(group: str, name: str) -> type[FakeBackend]:
        return backend

    monkeypatch.setattr(engines, "load_plugin", load_plugin)
    host = EngineHost(MODEL, ENGINE, 0, str(tmp_path), str(tmp_path))
    host.load()
    experiment = Experiment(model=MODEL, engine=ENGINE, workload=WorkloadSpec(output_tokens=4))
    order = TrialOrder(
        trial_id="t-r0",
        attempt=1,
        experiment=experiment,
        guard_s=0.0,
        warmup=WarmupSpec(batches=1),
        min_window_s=0.01,
        cooldown_s=0.0,
    )
    outcome = host.run(order)
    assert isinstance(outcome, Failed)
    assert outcome.kind == kind
    assert "told to fail" in outcome.message
    assert ("illegal memory access" in outcome.message) == (kind == "engine_died")


@pytest.mark.parametrize("load", [LoadSpec(), LoadSpec(pattern="saturated")])
@pytest.mark.parametrize("batches", [0, 1])
def test_no_trial_finds_prefixes_that_an_earlier_one_cached(
    batches: int, load: LoadSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Telling(FakeBackend):
        def run(self, *args: Any) -> Any:
            told.append("run")
            return super().run(*args)

        def reset(self) -> None:
            told.append("reset")

    monkeypatch.setattr(engines, "load_plugin", lambda group, name: Telling)
    host = EngineHost(MODEL, EngineSpec(backend="fake", device="cpu"), 0, str(tmp_path), str(tmp_path), online=load.online)
    host.load()
    workload = WorkloadSpec(input_tokens=3, output_tokens=2, requests=1, load=load)
    order = TrialOrder(
        trial_id="t-r0",
        attempt=1,
        experiment=Experiment(model=MODEL, engine=ENGINE, workload=workload),
        guard_s=0.0,
        warmup=WarmupSpec(batches=batches),
        min_window_s=1e-6,
        cooldown_s=0.0,
    )
    for _ in range(2):
        assert isinstance(host.run(order), Completed)
    assert told == ["run"] * batches + ["reset", "run"] + ["run"] * batches + ["reset", "run"]


@pytest.mark.parametrize("answers", ["known", "generated"])
def test_later_turns_of_batches_hold_known_or_real_answers(answers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a second pass, which begins with histories of its own."""
    asked: list[Request] = []

    class Listening(FakeBackend):
        def run(self, requests: Sequence[Request], *rest: Any) -> Iterator[StepEvent | RequestRecord]:
            asked.extend(requests)
            return super().run(requests, *rest)

    monkeypatch.setattr(engines, "load_plugin", lambda group, name: Listening)
    engine = EngineSpec(backend="fake", device="cpu", engine_args={"prefill_ms": 3.0})
    workload = WorkloadSpec(
        prompts=PromptSpec(source="synthetic"), input_tokens=4, output_tokens=3, turns=2, turn_answers=answers
    )
    host = EngineHost(MODEL, engine, 0, str(tmp_path), str(tmp_path))
    host.load()
    order = TrialOrder(
        trial_id="t-r0",
        attempt=1,
        experiment=Experiment(model=MODEL, engine=engine, workload=workload),
        guard_s=0.0,
        warmup=WarmupSpec(batches=0),
        min_window_s=0.3,
        cooldown_s=0.0,
    )
    outcome = host.run(order)
    assert isinstance(outcome, Completed), outcome
    assert outcome.passes >= 2
    first, second = outcome.requests[:2]
    assert asked[1].prompt_token_ids[:4] == asked[0].prompt_token_ids
    assert (asked[1].prompt_token_ids[4:7] == first.output_token_ids) == (answers == "generated")
    assert [request.prompt_token_ids for request in asked[2:4]] == [request.prompt_token_ids for request in asked[:2]]
    assert (first.turn, first.shared_prompt_tokens, second.turn) == (0, 0, 1)
    assert (second.prompt_tokens, second.shared_prompt_tokens) == (11, 7 if answers == "generated" else 4)


class Counted(FakeBackend):
    """Counts its loads."""

    loads = 0

    def load(self) -> Any:
        type(self).loads += 1
        return super().load()


class Silent(Counted):
    """Tells nothing before it is loaded, as engines of other makers."""

    outlook = None  # type: ignore[assignment]


def order_of(engine: EngineSpec, workload: WorkloadSpec) -> TrialOrder:
    return TrialOrder(
        trial_id="t-r0",
        attempt=1,
        experiment=Experiment(model=MODEL, engine=engine, workload=workload),
        guard_s=0.0,
        warmup=WarmupSpec(batches=0),
        min_window_s=0.001,
        cooldown_s=0.0,
    )


FITS = WorkloadSpec(input_tokens=4, output_tokens=2)
LONG = WorkloadSpec(prompts=PromptSpec(chat_template=True), input_tokens=200, output_tokens=2)
SHORT = WorkloadSpec(prompts=PromptSpec(chat_template=True), input_tokens=1, output_tokens=2)


@pytest.mark.parametrize("python", [None, sys.executable])
def test_requests_that_no_model_takes_are_refused_before_it_is_loaded(
    python: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an interpreter of its own the engine would fail to load, so that a load is seen there as well."""
    fail = {"kind": "load"} if python is not None else None
    engine = EngineSpec(backend="fake", device="cpu", python=python, engine_args={"context_tokens": 100, "fail": fail})
    if python is None:
        monkeypatch.setattr(engines, "load_plugin", lambda _group, _name: Counted)
    monkeypatch.setattr(Counted, "loads", 0)
    host = EngineHost(MODEL, engine, 0, str(tmp_path), str(tmp_path), unsure=(SHORT, LONG))
    with pytest.raises(ConfigError) as caught:
        host.load()
    host.close()
    assert (caught.value.field, caught.value.found, caught.value.allowed) == ("workload.input_tokens", "1", "at least 4 tokens")
    assert "so it is with 1 other workload of this model" in caught.value.message
    assert Counted.loads == 0


@pytest.mark.parametrize("backend", [Counted, Silent])
def test_the_other_trials_of_a_load_go_on(backend: type[FakeBackend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineSpec(backend="fake", device="cpu", engine_args={"context_tokens": 100})
    monkeypatch.setattr(engines, "load_plugin", lambda _group, _name: backend)
    host = EngineHost(MODEL, engine, 0, str(tmp_path), str(tmp_path), unsure=(SHORT, LONG), all_unsure=False)
    told = host.load().refused
    assert [error.field for error in told] == ["workload.input_tokens"] * (0 if backend is Silent else 2)
    for workload, message in ((SHORT, "chat template alone"), (LONG, "202 tokens")):
        outcome = host.run(order_of(engine, workload))
        assert isinstance(outcome, Failed)
        assert (outcome.kind, message in outcome.message) == ("bad_request", True)
    assert isinstance(host.run(order_of(engine, FITS)), Completed)
    host.close()


def test_a_load_does_not_wait_for_long_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gang's other processes would not wait that long for the first."""
    clock = VirtualClock()

    class Slow(Counted):
        """Its tokenizer takes a minute and more."""

        def encode_chats(self, chats: Sequence[Sequence[ChatMessage]]) -> list[list[int]]:
            clock.advance_ns(61 * 10**9)
            return super().encode_chats(chats)

    engine = EngineSpec(backend="fake", device="cpu", engine_args={"context_tokens": 100})
    monkeypatch.setattr(engines, "load_plugin", lambda _group, _name: Slow)
    host = EngineHost(MODEL, engine, 0, str(tmp_path), str(tmp_path), clock=clock, unsure=(SHORT, LONG))
    assert len(host.load().refused) == 1
    host.close()
