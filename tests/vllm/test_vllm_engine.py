"""A loaded vLLM engine beside the transformers engine, and what it refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from vllm_models import PROMPTS, SMALL, config_of, flops_of, read_bytes_of, requests_of, serve

from llem_ray.backends.vllm.backend import VllmBackend, installed_version
from llem_ray.core.backend import Request
from llem_ray.core.errors import ConfigError, GenerationError, LoadError, PluginError
from llem_ray.core.spec import ModelSpec


@pytest.fixture(scope="module")
def loaded(checkpoint: ModelSpec, expected: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmBackend]:
    backend = VllmBackend(config_of(tmp_path_factory.mktemp("vllm"), checkpoint))
    backend.check()
    backend.report = backend.load()  # type: ignore[attr-defined]
    yield backend
    backend.close()


def test_greedy_tokens_are_those_of_the_transformers_engine(loaded: VllmBackend, expected: dict[str, Any]) -> None:
    _, records = serve(loaded, requests_of())
    assert all(len(set(record.output_token_ids)) > 30 for record in records)
    assert [record.output_token_ids for record in records] == [record.output_token_ids for record in expected["fixed"]]


def test_texts_end_where_the_transformers_engine_ends_them(loaded: VllmBackend, expected: dict[str, Any]) -> None:
    _, records = serve(loaded, requests_of(ignore_eos=False))
    assert [(r.output_token_ids, r.finish_reason) for r in records] == [
        (r.output_token_ids, r.finish_reason) for r in expected["free"]
    ]


def test_an_end_token_ends_a_request_unless_it_is_ignored(loaded: VllmBackend, expected: dict[str, Any]) -> None:
    stop = expected["fixed"][0].output_token_ids[3]
    engine = loaded._engine
    assert engine is not None
    processor = engine._engine.llm.input_processor
    before = dict(processor.generation_config_fields)
    processor.generation_config_fields["eos_token_id"] = stop
    try:
        _, free = serve(loaded, requests_of(ignore_eos=False))
        _, fixed = serve(loaded, requests_of())
    finally:
        processor.generation_config_fields.clear()
        processor.generation_config_fields.update(before)
    first = expected["fixed"][0].output_token_ids
    assert free[0].finish_reason == "stop"
    assert free[0].output_token_ids == first[: first.index(stop) + 1]
    assert fixed[0].output_token_ids == first


def test_rows_of_both_engines_line_up(loaded: VllmBackend, expected: dict[str, Any]) -> None:
    report, other = loaded.report, expected["report"]  # type: ignore[attr-defined]
    assert loaded.encode(["Why is the sky blue?", "naïve Grüße"]) == expected["encoded"]
    for name in ("vocab_size", "parameters", "weight_bytes", "dtype", "device", "special_token_ids", "random_weights"):
        assert getattr(report, name) == getattr(other, name), name
    assert report.context_tokens == SMALL["max_model_len"]
    assert report.notes["engine"] == f"vllm {installed_version()}"
    assert "NaN" in report.notes["numerics"]


def test_flops_and_bytes_of_every_step_are_exact(loaded: VllmBackend, checkpoint: ModelSpec) -> None:
    (request,) = requests_of(new_tokens=4)[:1]
    steps, _ = serve(loaded, [request])
    length = len(request.prompt_token_ids)
    assert [step.kind for step in steps] == ["prefill", "decode", "decode", "decode"]
    shapes = [(length, length), (1, length + 1), (1, length + 2), (1, length + 3)]
    assert [step.flops for step in steps] == [flops_of(*shape) for shape in shapes]
    assert [step.read_bytes for step in steps] == [read_bytes_of(*shape) for shape in shapes]
    formula = loaded.report.flop_model  # type: ignore[attr-defined]
    by_formula = [formula.prefill(length), *(formula.decode(length, done, done + 1) for done in (1, 2, 3))]
    assert [step.flops for step in steps] == by_formula
    model = AutoModelForCausalLM.from_pretrained(checkpoint.id, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([request.prompt_token_ids])
    with FlopCounterMode(display=False) as counter:
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    assert steps[0].flops == pytest.approx(counter.get_total_flops(), rel=1e-3)
    with FlopCounterMode(display=False) as counter:
        model(ids[:, :1], past_key_values=cache)
    assert steps[1].flops == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_flops_of_a_batch_add_up(loaded: VllmBackend) -> None:
    steps, _ = serve(loaded, requests_of(new_tokens=3))
    lengths = [len(prompt) for prompt in PROMPTS]
    computed = [flops_of(length, length) + flops_of(1, length + 1) + flops_of(1, length + 2) for length in lengths]
    assert sum(step.flops or 0 for step in steps) == sum(computed)


def test_every_token_has_the_time_of_its_step_and_steps_follow_each_other(loaded: VllmBackend) -> None:
    steps, records = serve(loaded, requests_of())
    produced = {step.end_ns: step.decode_tokens for step in steps if step.decode_tokens}
    times = Counter(time_ns for record in records for time_ns in record.token_times_ns)
    assert times == produced
    assert all(before.end_ns <= after.begin_ns < after.end_ns for before, after in pairwise(steps))


def test_tokens_that_no_step_tells_of_are_no_result(loaded: VllmBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = loaded._engine._engine._recorder  # type: ignore[union-attr]
    monkeypatch.setattr(recorder, "note", lambda _: None)
    with pytest.raises(GenerationError, match="told of 0 of the 64 tokens of request r0"):
        serve(loaded, requests_of())


def test_a_request_that_comes_back_short_is_no_result(loaded: VllmBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = import_module("llem_ray.backends.vllm.serving").sampling_params

    def clip(request: Request, *args: Any) -> Any:
        return whole(replace(request, max_new_tokens=min(request.max_new_tokens, 5)), *args)

    monkeypatch.setattr("llem_ray.backends.vllm.offline.sampling_params", clip)
    with pytest.raises(GenerationError, match=r"request r0 ended with 5 of 64 tokens \(finish reason 'length'\)"):
        serve(loaded, requests_of())
    assert serve(loaded, requests_of(new_tokens=5))[1]


def test_a_request_that_vllm_would_clip_is_refused_before_it_is_sent(loaded: VllmBackend) -> None:
    request = replace(requests_of()[0], max_new_tokens=256 - len(PROMPTS[0]) + 1)
    with pytest.raises(GenerationError, match="257 exceed the model's context of 256"):
        serve(loaded, [request])
    _, records = serve(loaded, [replace(request, max_new_tokens=request.max_new_tokens - 1)])
    assert records[0].output_tokens == 256 - len(PROMPTS[0])


def test_no_prefix_is_cached_across_batches(loaded: VllmBackend) -> None:
    request = Request(request_id="r", prompt_token_ids=tuple(range(5, 205)), max_new_tokens=2)
    for _ in range(2):
        steps, _ = serve(loaded, [request])
        assert sum(step.prefill_tokens for step in steps) == 200


def test_a_second_engine_in_one_process_is_refused(loaded: VllmBackend, checkpoint: ModelSpec, tmp_path: Path) -> None:
    other = VllmBackend(config_of(tmp_path, checkpoint))
    with pytest.raises(LoadError, match="another vLLM engine is loaded"):
        other.load()
    other.close()
    assert serve(loaded, requests_of(new_tokens=2))[1]
    loaded._environment.apply()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"max_num_seq": 4}, "unexpected keyword argument 'max_num_seq'"),
        ({"kv_cache_dtype": "fp3"}, "Input should be 'auto', 'float16'"),
        ({"enable_lora": True, "max_lora_rank": 7}, "Input should be 1, 8, 16"),
        ({"max_model_len": 100_000}, "greater than the derived max_model_len"),
        ({"tensor_parallel_size": 2}, "llem-ray sets this argument itself"),
    ],
)
def test_bad_arguments_are_refused_in_vllm_s_words_before_loading(tmp_path: Path, args: dict[str, Any], message: str) -> None:
    backend = VllmBackend(config_of(tmp_path, ModelSpec(config="llama-tiny"), args))
    with pytest.raises(ConfigError) as caught:
        backend.check()
    assert message in str(caught.value)
    assert str(caught.value.field).startswith("engine.engine_args")
    assert next(reversed(args)) in str(caught.value)


def test_what_this_engine_cannot_do_is_refused(tmp_path: Path) -> None:
    tiny = ModelSpec(config="llama-tiny")
    for config, field in (
        (config_of(tmp_path, replace(tiny, initializer_range=0.1)), "model.initializer_range"),
        (config_of(tmp_path, tiny, data_parallel=2), "engine.data_parallel"),
        (config_of(tmp_path, tiny, {"load_format": "auto"}), "engine.engine_args.load_format"),
        (config_of(tmp_path, replace(tiny, quantization="awq")), "model.quantization"),
        (config_of(tmp_path, replace(tiny, quantization="bitsandbytes")), "model.quantization"),
        (config_of(tmp_path, replace(tiny, quantization="fp8")), "model.quantization"),
    ):
        with pytest.raises(ConfigError) as caught:
            VllmBackend(config).check()
        assert caught.value.field == field
    on_gpu = replace(config_of(tmp_path, tiny), device="cuda")
    with pytest.raises(PluginError, match="is to run on cuda"):
        VllmBackend(on_gpu).check()
