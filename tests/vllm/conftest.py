from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from vllm_models import config_of, requests_of, serve

from llem_ray.backends.builtin_models import BUILTIN_MODELS
from llem_ray.backends.lora import LoraArgs
from llem_ray.backends.random_adapter import random_adapter
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


@dataclass(frozen=True)
class Adapter:
    folder: Path
    tokens: list[tuple[int, ...]]
    """What the transformers engine makes of the checkpoint with the adapter added to its weights."""


@pytest.fixture(scope="session")
def adapter(checkpoint: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """A random adapter of rank 8 for the checkpoint."""
    folder = tmp_path_factory.mktemp("adapter")
    config = AutoConfig.from_pretrained(checkpoint.id)
    lora = LoraArgs(rank=8, alpha=16, seed=3)
    drawn = random_adapter(config, lora, folder, trust_remote_code=False)
    weights = load_file(drawn / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.id, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in weights:
            product = weights[f"{prefix}.lora_B.weight"] @ weights[f"{prefix}.lora_A.weight"]
            parameter.data += lora.scaled_alpha / 8 * product
    model.save_pretrained(folder / "merged")
    for file in Path(str(checkpoint.id)).glob("tokenizer*"):
        (folder / "merged" / file.name).write_bytes(file.read_bytes())
    backend = TransformersBackend(config_of(folder, ModelSpec(id=str(folder / "merged"), dtype="float32"), args={}))
    backend.load()
    _, records = serve(backend, requests_of())
    backend.close()
    return Adapter(drawn, [record.output_token_ids for record in records])
