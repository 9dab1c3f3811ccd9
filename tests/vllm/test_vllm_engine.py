"""A loaded vLLM engine beside the transformers engine, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm_models import PROMPTS, SMALL, config_of, requests_of, serve

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
    processor = engine._engine.input_processor
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


def test_flops_of_every_step_are_vllm_s_count(loaded: VllmBackend) -> None:
    (request,) = requests_of(new_tokens=4)[:1]
    steps, _ = serve(loaded, [request])
    assert [step.kind for step in steps] == ["prefill", "decode", "decode", "decode"]
    hidden, mlp, layers, heads, kv_heads, head_dim, vocab = 128, 352, 4, 4, 2, 32, 2048
    matmul = layers * (hidden * heads * head_dim * 2 + hidden * kv_heads * head_dim * 2 + 3 * hidden * mlp)
    for index, step in enumerate(steps):
        tokens, position = (len(PROMPTS[0]), len(PROMPTS[0])) if index == 0 else (1, len(PROMPTS[0]) + index)
        linear = 2 * matmul * tokens + 2 * vocab * hidden
        assert step.flops is not None
        assert linear <= step.flops <= linear + 4 * layers * heads * head_dim * tokens * position
        assert step.read_bytes is not None
        assert step.read_bytes > 4 * matmul
    model = loaded.report.flop_model  # type: ignore[attr-defined]
    by_formula = [model.prefill(len(PROMPTS[0])), *(model.decode(len(PROMPTS[0]), done, done + 1) for done in (1, 2, 3))]
    assert [step.flops for step in steps] == pytest.approx(by_formula, rel=1e-3)


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
        (config_of(tmp_path, replace(tiny, quantization="awq")), "engine.engine_args"),
    ):
        with pytest.raises(ConfigError) as caught:
            VllmBackend(config).check()
        assert caught.value.field == field
    on_gpu = replace(config_of(tmp_path, tiny), device="cuda")
    with pytest.raises(PluginError, match="is to run on cuda"):
        VllmBackend(on_gpu).check()
