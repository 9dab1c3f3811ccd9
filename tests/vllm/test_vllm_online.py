"""vLLM's AsyncLLM beside the transformers engine: the same tokens and honest times."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import psutil
import pytest
from vllm_models import PROMPTS, SMALL, config_of, requests_of, serve, tokens_of

from llem_ray.backends.vllm.backend import VllmBackend
from llem_ray.core.backend import LoadSchedule, Request
from llem_ray.core.errors import GenerationError
from llem_ray.core.spec import ModelSpec, SamplingSpec

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
ONE_AT_A_TIME = LoadSchedule(max_in_flight=1)
LONG = Request(request_id="long", prompt_token_ids=tuple(range(5, 205)), max_new_tokens=2)


@pytest.fixture(scope="module")
def loaded(checkpoint: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmBackend]:
    args = {**SMALL, "enable_prefix_caching": True, "speculative_config": NGRAM}
    backend = VllmBackend(config_of(tmp_path_factory.mktemp("vllm"), checkpoint, args, online=True))
    backend.check()
    backend.report = backend.load()  # type: ignore[attr-defined]
    yield backend
    backend.close()


@pytest.mark.parametrize("schedule", [None, ONE_AT_A_TIME, LoadSchedule(send_at_ns=(0, 5_000_000, 40_000_000))])
def test_greedy_tokens_are_those_of_the_transformers_engine(
    loaded: VllmBackend, expected: dict[str, Any], schedule: LoadSchedule | None
) -> None:
    steps, records = serve(loaded, requests_of(), schedule)
    assert all(len(set(record.output_token_ids)) > 30 for record in records)
    assert tokens_of(records) == tokens_of(expected["fixed"])
    assert sum(step.prefill_tokens for step in steps) == sum(map(len, PROMPTS))
    assert sum(step.decode_tokens for step in steps) == sum(record.output_tokens for record in records)
    assert all(step.flops and step.read_bytes for step in steps)
    assert sum(record.draft_tokens or 0 for record in records) > 0
    for record in records:
        assert record.accepted_tokens is not None
        assert record.output_tokens - record.output_chunks >= record.accepted_tokens  # more where chunks merged under load


def test_the_report_tells_how_it_serves(loaded: VllmBackend) -> None:
    notes = loaded.report.notes  # type: ignore[attr-defined]
    assert notes["serving"] == "online, AsyncLLM"
    assert notes["prefix_caching"] == "on, reset between trials"
    assert psutil.Process(loaded.identity()[0].pid).ppid() == os.getpid()


def test_prefixes_are_forgotten_between_trials(loaded: VllmBackend) -> None:
    loaded.reset()
    cached = [serve(loaded, [LONG], ONE_AT_A_TIME)[1][0].cached_tokens for _ in range(2)]
    loaded.reset()
    cached.append(serve(loaded, [LONG], ONE_AT_A_TIME)[1][0].cached_tokens)
    assert cached == [0, 128, 0]


@pytest.mark.parametrize(("new_prompt_tokens", "cached"), [(10, 128), (None, 0)])
def test_real_answers_are_found_in_the_prefix_cache_and_made_up_ones_are_not(
    loaded: VllmBackend, new_prompt_tokens: int | None, cached: int
) -> None:
    """Blocks have 128 tokens: the first one of the second turn ends in the answer to the first."""
    loaded.reset()
    first = Request(request_id="0", prompt_token_ids=tuple(range(5, 125)), max_new_tokens=20)
    second = Request(
        request_id="1",
        prompt_token_ids=tuple(range(5, 155)),
        max_new_tokens=2,
        follows="0",
        new_prompt_tokens=new_prompt_tokens,
    )
    records = serve(loaded, [first, second], LoadSchedule())[1]
    loaded.reset()
    assert [(record.prompt_tokens, record.cached_tokens) for record in records] == [(120, 0), (150, cached)]


def test_an_abandoned_run_aborts_its_requests_and_leaves_no_step_behind(loaded: VllmBackend, expected: dict[str, Any]) -> None:
    begun = loaded.run(requests_of(new_tokens=190), SamplingSpec(), LoadSchedule(max_in_flight=3))
    next(begun)
    del begun
    steps, records = serve(loaded, requests_of(), ONE_AT_A_TIME)
    assert tokens_of(records) == tokens_of(expected["fixed"])
    assert sum(step.prefill_tokens for step in steps) == sum(map(len, PROMPTS))
    assert steps[0].begin_ns >= records[0].sent_ns


def test_an_idle_engine_is_in_no_step(loaded: VllmBackend) -> None:
    requests = requests_of(new_tokens=2)[:2]
    steps, records = serve(loaded, requests, LoadSchedule(send_at_ns=(0, 1_500_000_000)))
    firsts = [step for step in steps if step.kind == "prefill"]
    assert [step.prefill_tokens for step in firsts] == [len(request.prompt_token_ids) for request in requests]
    assert all(step.begin_ns >= record.sent_ns for step, record in zip(firsts, records, strict=True))


def test_a_request_that_comes_back_short_is_no_result(loaded: VllmBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = import_module("llem_ray.backends.vllm.serving").sampling_params

    def clip(*args: Any) -> Any:
        params = whole(*args)
        params.max_tokens = 5
        return params

    monkeypatch.setattr("llem_ray.backends.vllm.online.sampling_params", clip)
    with pytest.raises(GenerationError, match=r"ended with 5 of 64 tokens"):
        serve(loaded, requests_of(), ONE_AT_A_TIME)
    assert serve(loaded, requests_of(new_tokens=5))[1]


def test_a_schedule_of_another_length_is_refused(loaded: VllmBackend) -> None:
    with pytest.raises(GenerationError, match="a schedule of 1 times for 3 requests"):
        serve(loaded, requests_of(), LoadSchedule(send_at_ns=(0,)))
