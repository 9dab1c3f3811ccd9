"""Continuous batching on the CPU, beyond the contract: its own limits, failures and threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llem_ray.backends.transformers.backend import TransformersBackend
from llem_ray.core.backend import BackendConfig, LoadSchedule, Request, RequestRecord, StepEvent
from llem_ray.core.errors import DeviceMemoryError, EngineDied, GenerationError, HangError, LoadError, NumericsError
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec

TWO = LoadSchedule(max_in_flight=2)
ONE = LoadSchedule(max_in_flight=1)
ALL = LoadSchedule()


def backend_of(folder: Path, serving: bool = True, **args: Any) -> TransformersBackend:
    backend = TransformersBackend(
        BackendConfig(
            model=ModelSpec(config="llama-tiny", initializer_range=0.1),
            engine=EngineSpec(engine_args={"num_threads": 1} | args),
            device="cpu",
            host="h",
            base_dir=str(folder),
            cache_dir=str(folder / "cache"),
            online=serving,
        )
    )
    backend.load()
    return backend


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersBackend]:
    backend = backend_of(tmp_path_factory.mktemp("served"))
    yield backend
    backend.close()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[TransformersBackend]:
    """One that may be broken."""
    backend = backend_of(tmp_path)
    yield backend
    backend.close()


def requests_of(lengths: list[int], new_tokens: int, ignore_eos: bool = True) -> list[Request]:
    return [
        Request(
            request_id=f"r{row}",
            prompt_token_ids=tuple(3 + (31 * row + 7 * column) % 2000 for column in range(length)),
            max_new_tokens=new_tokens,
            ignore_eos=ignore_eos,
        )
        for row, length in enumerate(lengths)
    ]


def run(
    backend: TransformersBackend, requests: list[Request], schedule: LoadSchedule | None, sampling: SamplingSpec | None = None
) -> tuple[list[StepEvent], dict[str, RequestRecord]]:
    events = list(backend.run(requests, sampling or SamplingSpec(), schedule))
    records = {event.request_id: event for event in events if isinstance(event, RequestRecord)}
    return [event for event in events if isinstance(event, StepEvent)], records


def outputs(records: dict[str, RequestRecord]) -> dict[str, tuple[int, ...]]:
    return {name: record.output_token_ids for name, record in records.items()}


def model_of(backend: TransformersBackend) -> Any:
    return backend._engine._model  # type: ignore[union-attr]


def test_steps_tell_what_was_prefilled_and_decoded(served: TransformersBackend) -> None:
    steps, records = run(served, requests_of([6, 4], 3), ONE)
    told = [(step.kind, step.prefill_tokens, step.decode_tokens, step.computed_tokens) for step in steps]
    decode = ("decode", 0, 1, 1)
    assert told == [("prefill", 6, 1, 6), decode, decode, ("prefill", 4, 1, 4), decode, decode]
    assert [record.token_times_ns for record in records.values()] == [
        tuple(step.end_ns for step in steps[:3]),
        tuple(step.end_ns for step in steps[3:]),
    ]


def test_long_prompts_are_prefilled_in_chunks_beside_decoding_requests(served: TransformersBackend) -> None:
    requests = [*requests_of([5], 8), Request(request_id="long", prompt_token_ids=tuple(range(3, 703)), max_new_tokens=2)]
    steps, records = run(served, requests, TWO)
    assert sum(step.prefill_tokens for step in steps) == 705
    assert sum(step.decode_tokens for step in steps) == 10
    assert all(step.computed_tokens <= 256 for step in steps)
    assert "mixed" in {step.kind for step in steps}
    _, batch = run(served, requests, None)
    assert outputs(batch) == outputs(records)


def test_sampling_follows_its_seed(served: TransformersBackend) -> None:
    requests = requests_of([5, 9], 10)
    drawn = [outputs(run(served, requests, ONE, SamplingSpec(temperature=1.0, top_k=50, seed=seed))[1]) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_end_token_ends_a_request_that_honours_it(served: TransformersBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain = run(served, requests_of([5, 9], 8), TWO)
    end = plain["r0"].output_token_ids[3]
    length = plain["r0"].output_token_ids.index(end) + 1
    monkeypatch.setattr(served._engine._server, "_eos_token_ids", frozenset({end}))  # type: ignore[union-attr]
    _, records = run(served, requests_of([5, 9], 8, ignore_eos=False), TWO)
    assert records["r0"].output_token_ids == plain["r0"].output_token_ids[:length]
    assert records["r0"].finish_reason == "stop"
    _, ignoring = run(served, requests_of([5, 9], 8), TWO)
    assert outputs(ignoring) == outputs(plain)


def batching_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "llem-ray-batching"]


def test_reset_and_batches_stop_the_thread(served: TransformersBackend) -> None:
    requests = requests_of([5, 9], 4)
    before = outputs(run(served, requests, TWO)[1])
    assert batching_threads()
    served.reset()
    assert not batching_threads()
    assert outputs(run(served, requests, TWO)[1]) == before
    assert outputs(run(served, requests, None)[1]) == before
    assert not batching_threads()


def test_a_model_loaded_for_batches_takes_no_schedule(tmp_path: Path) -> None:
    backend = backend_of(tmp_path, serving=False)
    with pytest.raises(GenerationError, match="was not loaded for requests that come one by one"):
        run(backend, requests_of([5], 2), ONE)
    backend.close()


def test_requests_put_off_for_want_of_room_are_answered_in_full(tmp_path: Path) -> None:
    backend = backend_of(tmp_path, online={"num_blocks": 8, "page_size": 16})
    requests = requests_of([20, 21, 22], 100)  # each alone nearly fills the cache
    steps, records = run(backend, requests, ALL)
    assert sum(step.decode_tokens for step in steps) == 300
    assert sum(step.prefill_tokens for step in steps) > 63  # some were computed again
    _, batch = run(backend, requests, None)
    assert outputs(batch) == outputs(records)
    with pytest.raises(GenerationError, match="the engine's cache has 128") as caught:
        run(backend, requests_of([100], 40), ALL)
    assert "num_blocks" in str(caught.value.hint)
    backend.close()


def test_shared_prefixes_are_computed_once_until_reset(tmp_path: Path) -> None:
    backend = backend_of(tmp_path, online={"page_size": 16, "num_blocks": 32, "allow_block_sharing": True})
    request = requests_of([100], 4)
    steps, first = run(backend, request, ONE)
    assert sum(step.prefill_tokens for step in steps) == 100
    steps, second = run(backend, request, ONE)
    assert sum(step.prefill_tokens for step in steps) == 100 - 6 * 16
    assert outputs(first) == outputs(second)
    backend.reset()
    steps, _ = run(backend, request, ONE)
    assert sum(step.prefill_tokens for step in steps) == 100
    backend.close()


@pytest.mark.parametrize("allowed", [True, False])
def test_cudnn_may_be_kept_out_of_attention_while_it_serves(tmp_path: Path, allowed: bool) -> None:
    backend = backend_of(tmp_path, online={"cudnn_attention": allowed})
    assert torch.backends.cuda.cudnn_sdp_enabled()
    events = backend.run(requests_of([5], 4), SamplingSpec(), ONE)
    next(events)
    assert torch.backends.cuda.cudnn_sdp_enabled() is allowed
    events.close()
    assert torch.backends.cuda.cudnn_sdp_enabled()
    backend.close()


def test_eager_attention_is_given_back_for_batches(tmp_path: Path) -> None:
    backend = backend_of(tmp_path, attn_implementation="eager")
    requests = requests_of([5, 9], 6)
    _, online = run(backend, requests, TWO)
    assert model_of(backend).config._attn_implementation != "eager"
    _, batch = run(backend, requests, None)
    assert model_of(backend).config._attn_implementation == "eager"
    assert outputs(online) == outputs(batch)
    backend.close()


def test_logits_that_are_no_numbers_fail_the_run_only(own: TransformersBackend) -> None:
    weight = model_of(own).model.norm.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="request r0"):
        run(own, requests_of([5], 4), ONE)
    with torch.no_grad():
        weight.copy_(before)
    assert len(run(own, requests_of([5], 4), ONE)[1]["r0"].output_token_ids) == 4


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), DeviceMemoryError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), GenerationError),
    ],
    ids=["memory", "other"],
)
def test_an_error_in_the_loop_is_typed_and_the_next_run_works(
    own: TransformersBackend, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: type[Exception]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(model_of(own).model, "forward", fail)
        with pytest.raises(expected):
            run(own, requests_of([5, 5], 4), TWO)
    assert len(run(own, requests_of([5], 4), ONE)[1]) == 1


def test_a_step_that_does_not_end_is_a_hang(own: TransformersBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    forward = model_of(own).model.forward

    def block(*args: Any, **kwargs: Any) -> Any:
        go_on.wait(30)
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(model_of(own).model, "forward", block)
        patch.setattr(own._engine._server, "_step_timeout_s", 0.5)  # type: ignore[union-attr]
        with pytest.raises(HangError, match="no step ended within"):
            run(own, requests_of([5], 4), ONE)
        for schedule in (ONE, None):
            with pytest.raises(EngineDied, match="did not end"):
                run(own, requests_of([5], 4), schedule)
        go_on.set()


def test_a_cache_too_small_for_the_first_request_names_the_argument(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="the engine's cache has 4") as caught:
        backend_of(tmp_path, online={"num_blocks": 1, "page_size": 4})
    assert "num_blocks" in str(caught.value.hint)
