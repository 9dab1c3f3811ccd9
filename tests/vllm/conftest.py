from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm_models import config_of, requests_of, serve

from llem_ray.backends.builtin_models import BUILTIN_MODELS
from llem_ray.backends.tokenizer import train_tokenizer
from llem_ray.backends.transformers.backend import TransformersBackend
from llem_ray.core.spec import ModelSpec

os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("vllm") is None:
        reason = "vllm is not installed here: scripts/test-vllm runs these in an environment of their own"
        for item in items:
            if "tests/vllm/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """A random llama whose greedy output varies, saved once for both engines."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = AutoConfig.for_model("llama", **{**BUILTIN_MODELS["llama-tiny"].config, "initializer_range": 0.1})
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    train_tokenizer(config.vocab_size, folder / "cache").save_pretrained(folder)
    return ModelSpec(id=str(folder), dtype="float32")


@pytest.fixture(scope="session")
def expected(checkpoint: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the transformers engine makes of the checkpoint."""
    backend = TransformersBackend(config_of(tmp_path_factory.mktemp("expected"), checkpoint, args={}))
    backend.check()
    report = backend.load()
    _, fixed = serve(backend, requests_of())
    _, free = serve(backend, requests_of(ignore_eos=False))
    encoded = backend.encode(["Why is the sky blue?", "naïve Grüße"])
    backend.close()
    return {"report": report, "fixed": fixed, "free": free, "encoded": encoded}
