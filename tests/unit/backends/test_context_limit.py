"""The context by a config.json alone, against what transformers' configs say of the same model."""

from __future__ import annotations

from typing import Any

import model_configs as models
import pytest
from transformers import AutoConfig

from llem_ray.backends.context_limit import context_limit
from llem_ray.backends.model_config import UNLIMITED_CONTEXT_TOKENS, context_tokens
from llem_ray.core.spec import EngineSpec, ModelSpec

LLAMA = {"model_type": "llama", "max_position_embeddings": 2048}
MODEL = ModelSpec(id="org/model")


def limit_of(config: dict[str, Any], backend: str = "transformers", model: ModelSpec = MODEL, **args: Any) -> int | None:
    found = context_limit(config, model, EngineSpec(backend=backend, engine_args=args))
    return None if found is None else found.tokens


def rope(kind: str, factor: float, **other: Any) -> dict[str, Any]:
    return LLAMA | {"rope_parameters": {"rope_type": kind, "factor": factor, "rope_theta": 10000.0, **other}}


YARN = {"original_max_position_embeddings": 512}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (LLAMA, 2048),
        (models.MISTRAL_7B, 32768),  # its window of 4096 limits what a token sees, not how long a prompt is
        (models.QWEN2_7B, 131072),
        (rope("linear", 4.0), 8192),
        (rope("dynamic", 2.0), 4096),
        (rope("yarn", 4.0, **YARN), 2048),  # states the whole context, and so do the others
        (rope("llama3", 8.0, **LLAMA3), 2048),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),  # as transformers 4 writes it
        ({"model_type": "gpt2", "n_positions": 512}, 512),
        ({"model_type": "bloom", "hidden_size": 64, "n_head": 4}, None),
        ({"model_type": "mamba", "hidden_size": 64}, None),
    ],
)
def test_what_a_config_tells_is_what_the_engine_finds(config: dict[str, Any], tokens: int | None) -> None:
    assert limit_of(config) == limit_of(config, "tensorrt") == tokens
    assert context_tokens(AutoConfig.for_model(**config)) == (tokens or UNLIMITED_CONTEXT_TOKENS)


@pytest.mark.parametrize(
    ("args", "tokens"),
    [
        ({}, 2048),
        ({"max_model_len": 100}, 100),
        ({"max_model_len": 9000}, 9000),  # vLLM has its own word on that
        ({"max_model_len": -1}, 2048),
        ({"max_model_len": "auto"}, None),
        ({"disable_sliding_window": True}, 512),
        ({"hf_overrides": {"max_position_embeddings": 4096}}, None),
        ({"config_format": "own-format"}, None),
    ],
)
def test_arguments_of_vllm_go_before_the_config(args: dict[str, Any], tokens: int | None) -> None:
    assert limit_of(LLAMA | {"sliding_window": 512}, "vllm", **args) == tokens


def test_a_window_that_a_model_does_not_use_limits_nothing() -> None:
    qwen = {"model_type": "qwen2", "max_position_embeddings": 2048, "sliding_window": 512, "use_sliding_window": False}
    assert AutoConfig.for_model(**qwen).sliding_window is None
    assert limit_of(qwen, "vllm", disable_sliding_window=True) == 2048


def test_what_only_the_engine_knows_is_unknown() -> None:
    assert limit_of({}) is limit_of({"model_type": "llama"}) is limit_of(LLAMA, "fake") is limit_of({}, "vllm") is None
    remote = LLAMA | {"auto_map": {"AutoConfig": "configuration.Config"}}
    assert limit_of(remote, model=ModelSpec(id="org/model", trust_remote_code=True)) is None
    assert limit_of(remote) == 2048
    assert limit_of({"model_type": "any", "text_config": LLAMA}) == 2048
    assert limit_of(LLAMA, "tensorrt", max_seq_len=64) == 64
    assert limit_of({}, "vllm", max_model_len=64) == 64
    assert (
        limit_of({"model_type": "gemma3_text", "max_position_embeddings": 8, "rope_scaling": {"type": "linear", "factor": 8}})
        == 8
    )
