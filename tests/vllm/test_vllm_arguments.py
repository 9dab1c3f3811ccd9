"""What `engine_args` and `model.quantization` pass through: each runs for real, and changes what it should and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm_models import NEW_TOKENS, PROMPTS, SMALL, config_of, requests_of, serve, tokens_of

from llem_ray.backends.builtin_models import BUILTIN_MODELS
from llem_ray.backends.context_limit import context_limit
from llem_ray.backends.vllm.backend import VllmBackend
from llem_ray.core.backend import LoadReport, RequestRecord, StepEvent
from llem_ray.core.errors import ConfigError, LoadError
from llem_ray.core.spec import ModelSpec

TINY = ModelSpec(config="llama-tiny")
Ran = tuple[LoadReport, list[StepEvent], list[RequestRecord]]
Run = Callable[..., Ran]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Loads a model with arguments, serves the usual requests, closes."""

    def run(model: ModelSpec, args: Mapping[str, Any]) -> Ran:
        backend = VllmBackend(config_of(tmp_path, model, {**SMALL, **args}))
        try:
            report = backend.load()
            steps, records = serve(backend, requests_of())
        finally:
            backend.close()
        assert [record.output_tokens for record in records] == [NEW_TOKENS] * len(PROMPTS)
        assert [record.cached_tokens for record in records] == [0] * len(PROMPTS)
        assert sum(step.prefill_tokens for step in steps) == sum(map(len, PROMPTS))
        assert sum(step.decode_tokens for step in steps) == NEW_TOKENS * len(PROMPTS)
        return report, steps, records

    return run


LOOKUP = {"prompt_lookup_min": 1, "prompt_lookup_max": 3}


@pytest.mark.parametrize(
    "args",
    [
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, **LOOKUP}},
        {"spec_method": "ngram", "spec_tokens": 3, "speculative_config": LOOKUP},
    ],
)
def test_speculation_keeps_the_tokens_and_counts_what_it_drafts(
    args: dict[str, Any], run: Run, checkpoint: ModelSpec, expected: dict[str, Any]
) -> None:
    report, steps, records = run(checkpoint, args)
    assert report.notes["speculation"].startswith("ngram, 3 tokens")
    assert tokens_of(records) == tokens_of(expected["fixed"])
    drafted, accepted = (sum(getattr(record, name) for record in records) for name in ("draft_tokens", "accepted_tokens"))
    assert drafted > accepted > 0
    for record in records:
        assert record.output_tokens - record.output_chunks == record.accepted_tokens
    computed = sum(step.computed_tokens for step in steps)
    assert computed == sum(map(len, PROMPTS)) + sum(record.output_chunks - 1 for record in records) + drafted


def test_a_prompt_longer_than_a_step_is_prefilled_in_chunks(run: Run, checkpoint: ModelSpec, expected: dict[str, Any]) -> None:
    report, steps, records = run(checkpoint, {"enable_chunked_prefill": True, "max_num_batched_tokens": 16})
    assert report.notes["chunked_prefill"] == "on"
    assert tokens_of(records) == tokens_of(expected["fixed"])
    assert max(step.prefill_tokens for step in steps) == 16
    assert any(step.kind == "mixed" for step in steps)


def test_a_cache_of_fewer_bits_changes_the_tokens_and_holds_more(
    run: Run, checkpoint: ModelSpec, expected: dict[str, Any]
) -> None:
    report, _, records = run(checkpoint, {"kv_cache_dtype": "fp8"})
    assert report.notes["kv_cache_dtype"].startswith("fp8")
    assert tokens_of(records) != tokens_of(expected["fixed"])
    assert int(report.notes["kv_cache_tokens"]) == 4 * 524_288


def test_weights_are_quantised_as_they_are_loaded(run: Run, checkpoint: ModelSpec) -> None:
    quantised = replace(checkpoint, dtype="bfloat16", quantization="int8_per_channel_weight_only")
    report, _, _ = run(quantised, {})
    assert report.notes["quantization"] == "int8_per_channel_weight_only"
    assert report.weight_bytes is None


@pytest.mark.parametrize(
    ("quantization", "says"),
    [("mxfp4", "Failed to find a kernel that can implement"), ("fp8_per_tensor", "static_scaled_fp8_quant")],
)
def test_a_quantisation_that_only_the_load_shows_to_be_impossible(tmp_path: Path, quantization: str, says: str) -> None:
    backend = VllmBackend(config_of(tmp_path, replace(TINY, dtype="bfloat16", quantization=quantization)))
    backend.check()
    with pytest.raises(LoadError, match=says) as caught:
        backend.load()
    assert quantization in str(caught.value.hint)
    backend.close()


class TestLora:
    def test_an_adapter_is_what_it_adds_to_the_weights(self, run: Run, checkpoint: ModelSpec, adapter: Any) -> None:
        report, _, records = run(checkpoint, {"lora": {"path": str(adapter.folder)}})
        assert f"{adapter.folder}, rank 8" in report.notes["lora"]
        assert tokens_of(records) == adapter.tokens
        assert all(len(set(record.output_token_ids)) > 30 for record in records)

    def test_a_random_one_changes_the_tokens_by_its_seed(
        self, run: Run, checkpoint: ModelSpec, adapter: Any, expected: dict[str, Any]
    ) -> None:
        _, _, same = run(checkpoint, {"lora": {"rank": 8, "alpha": 16, "seed": 3}})
        _, _, other = run(checkpoint, {"lora": {"rank": 20, "target_modules": ["o_proj", "down_proj"]}, "max_lora_rank": 64})
        assert tokens_of(same) == adapter.tokens
        assert len({*map(tuple, (adapter.tokens, tokens_of(other), tokens_of(expected["fixed"])))}) == 3

    @pytest.mark.parametrize(
        ("args", "field", "says"),
        [
            (
                {"lora": {"rank": 16}, "max_lora_rank": 8},
                "engine.engine_args.lora",
                "LoRA rank 16 is greater than max_lora_rank 8",
            ),
            ({"lora": {"rank": 1024}}, "engine.engine_args.lora", "LoRA rank 1024 is greater than max_lora_rank 512"),
            ({"lora": {"rank": 8}, "enable_lora": False}, "engine.engine_args.lora", "LoRA is not enabled"),
            ({"lora": {"rank": 8}, "max_lora_rank": 9}, "engine.engine_args", "Input should be 1, 8, 16"),
            ({"lora": {"rank": 8, "target_modules": ["q"]}}, "engine.engine_args.lora.target_modules", "down_proj, gate_proj"),
        ],
    )
    def test_one_that_cannot_be_is_refused_before_loading(
        self, tmp_path: Path, args: dict[str, Any], field: str, says: str
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            VllmBackend(config_of(tmp_path, TINY, {**SMALL, **args})).check()
        assert says in str(caught.value)
        assert caught.value.field == field

    def test_a_saved_one_of_too_large_a_rank_is_refused(self, tmp_path: Path, adapter: Any) -> None:
        args = {**SMALL, "lora": {"path": str(adapter.folder)}, "max_lora_rank": 1}
        with pytest.raises(ConfigError, match="LoRA rank 8 is greater than max_lora_rank 1"):
            VllmBackend(config_of(tmp_path, TINY, args)).check()

    def test_a_saved_one_of_another_model_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 16, "target_modules": ["c_attn"]}')
        with pytest.raises(ConfigError, match="of another model") as caught:
            VllmBackend(config_of(tmp_path, TINY, {**SMALL, "lora": {"path": "."}})).check()
        assert caught.value.field == "engine.engine_args.lora.path"


def test_an_unknown_argument_is_refused_in_vllm_s_words_with_a_close_match(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unexpected keyword argument 'kv_cache_dtyp'") as caught:
        VllmBackend(config_of(tmp_path, TINY, {"kv_cache_dtyp": "fp8"})).check()
    assert caught.value.field == "engine.engine_args.kv_cache_dtyp"
    assert caught.value.hint == "did you mean 'kv_cache_dtype'?"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"enforce_eager": "sometimes"}, "enforce_eager"),
        ({"compilation_config": {"cudagraph_mode": "ALWAYS"}}, "cudagraph_mode"),
        ({"compilation_config": {"mod": 3}}, "mod"),
        ({"speculative_config": {"method": "ngrams", "num_speculative_tokens": 3}}, "method"),
        ({"speculative_config": {"method": "ngram"}}, "num_speculative_tokens"),
        ({"max_num_batched_tokens": 16, "enable_chunked_prefill": False}, "max_num_batched_tokens"),
    ],
)
def test_wrong_values_are_refused_in_vllm_s_words(tmp_path: Path, args: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        VllmBackend(config_of(tmp_path, TINY, {**SMALL, **args})).check()
    assert "vLLM 0.32" in caught.value.message
    assert caught.value.field == "engine.engine_args"


ROPE = {"rope_theta": 10000.0}
CONTEXTS: list[dict[str, Any]] = [
    {},
    {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 4.0}},
    {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}},
    {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
]


@pytest.mark.parametrize("changes", CONTEXTS)
@pytest.mark.parametrize("args", [{}, {"max_model_len": 100}])
def test_the_context_by_the_config_alone_is_what_vllm_settles_on(
    changes: dict[str, Any], args: dict[str, Any], tmp_path: Path
) -> None:
    config = {**BUILTIN_MODELS["llama-tiny"].config, "model_type": "llama", "max_position_embeddings": 256, **changes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = config_of(tmp_path, ModelSpec(config="config.json"), args)
    backend = VllmBackend(asked)
    try:
        backend.check()
        told = backend.outlook()
    finally:
        backend.close()
    limit = context_limit(config, asked.model, asked.engine)
    assert limit is not None
    assert told.context_tokens == limit.tokens
