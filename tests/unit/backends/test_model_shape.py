"""Sizes read from a config, against published numbers, transformers' own models and what torch allocates."""

import json
from pathlib import Path

import model_configs as models
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from llem_ray.backends.builtin_models import BUILTIN_MODELS
from llem_ray.backends.checkpoint_files import find_snapshot, read_stored_weights
from llem_ray.backends.model_shape import ModelShape, linear_layers, read_shape
from llem_ray.core.spec import ModelSpec


def shape_of(config: dict) -> ModelShape:
    shape = read_shape(config)
    assert shape is not None
    return shape


@pytest.mark.parametrize(
    ("config", "parameters", "cache_bytes_per_token"),
    [
        # Published counts; 2 bytes x (2 x layers x key-value heads x head size) of each token.
        (models.LLAMA_3_8B, 8_030_261_248, 131_072),
        (models.LLAMA_3_70B, 70_553_706_496, 327_680),
        (models.MISTRAL_7B, 7_241_732_096, 131_072),
        (models.MIXTRAL_8X7B, 46_702_792_704, 131_072),
        (models.QWEN2_7B, 7_615_616_512, 57_344),
        (models.QWEN3_8B, 8_190_735_360, 147_456),
        (models.QWEN3_30B_A3B, 30_532_122_624, 98_304),
        # 61 layers x (512 + 64) of the latent x 2 bytes.
        (models.DEEPSEEK_V3, 671_026_404_352, 70_272),
    ],
)
def test_published_models(config: dict, parameters: int, cache_bytes_per_token: int) -> None:
    shape = shape_of(config)
    assert shape.parameters == parameters
    assert 2 * shape.cache_numbers(1) == cache_bytes_per_token


@pytest.mark.parametrize("name", BUILTIN_MODELS)
def test_our_own_models(name: str) -> None:
    model = BUILTIN_MODELS[name]
    assert shape_of({"model_type": "llama", **model.config}).parameters == model.parameters


@pytest.mark.parametrize("name", models.SMALL)
def test_parameters_are_those_that_transformers_builds(name: str) -> None:
    config = AutoConfig.for_model(**models.SMALL[name])
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    assert shape_of(models.SMALL[name]).parameters == built.num_parameters()
    assert shape_of(config.to_dict()).parameters == built.num_parameters()


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "qwen2-half-sliding", "mixtral", "deepseek-v3"])
def test_the_cache_is_what_torch_allocates(name: str) -> None:
    config = AutoConfig.for_model(**models.SMALL[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    rows, tokens = 3, 40
    cache = DynamicCache(config=config)
    with torch.inference_mode():
        model(torch.ones(rows, tokens - 1, dtype=torch.long), past_key_values=cache)
        model(torch.ones(rows, 1, dtype=torch.long), past_key_values=cache)
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    assert rows * 4 * shape_of(models.SMALL[name]).cache_numbers(tokens) == held


def test_tensor_parallel_ranks_share_heads_but_never_a_latent() -> None:
    llama, deepseek = shape_of(models.LLAMA_3_8B), shape_of(models.DEEPSEEK_V3)
    assert llama.cache_numbers(10, 4) * 4 == llama.cache_numbers(10)
    assert llama.cache_numbers(10, 16) * 8 == llama.cache_numbers(10)
    assert deepseek.cache_numbers(10, 8) == deepseek.cache_numbers(10)


def test_an_unknown_architecture_has_no_count() -> None:
    shape = shape_of(models.SMALL["llama"] | {"model_type": "of-tomorrow"})
    assert shape.parameters is None
    assert read_shape({"model_type": "llama"}) is None


@pytest.mark.parametrize("step", [0, None])
def test_experts_in_every_0th_layer_cannot_be_counted(step: int | None) -> None:
    config = models.SMALL["qwen3-moe"] | {"decoder_sparse_step": step}
    assert shape_of(config).parameters is None
    dense = {**config, "num_experts": 0}
    assert shape_of(dense).parameters == shape_of({**dense, "decoder_sparse_step": 1}).parameters


def test_a_checkpoint_is_counted_by_its_headers(tmp_path: Path) -> None:
    config = AutoConfig.for_model(**models.SMALL["qwen3-moe"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    stored = read_stored_weights(tmp_path, 5, tied=False)
    assert stored is not None
    assert stored.float_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert stored.loaded_bytes(4) == 2 * stored.float_bytes
    next(tmp_path.glob("*-00001-*.safetensors")).unlink()
    assert read_stored_weights(tmp_path, 5, tied=False) is None


def write_header(path: Path, tensors: dict) -> None:
    header = json.dumps(
        {name: {"dtype": kind, "shape": shape, "data_offsets": [0, 0]} for name, (kind, shape) in tensors.items()}
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())


def test_what_a_text_model_leaves_out_is_not_counted(tmp_path: Path) -> None:
    write_header(
        tmp_path / "model.safetensors",
        {
            "model.embed_tokens.weight": ("BF16", [10, 4]),
            "lm_head.weight": ("BF16", [10, 4]),
            "model.layers.0.mlp.weight": ("F8_E4M3", [8, 8]),
            "model.layers.0.mlp.qweight": ("I32", [2, 2]),
            "model.layers.1.mtp.weight": ("BF16", [100, 100]),
            "vision_tower.weight": ("BF16", [100, 100]),
        },
    )
    stored = read_stored_weights(tmp_path, 1, tied=True)
    assert stored is not None
    assert (stored.float_numbers, stored.packed_bytes) == (40, 64 + 16)
    assert stored.loaded_bytes(None) == 80 + 80


def test_a_second_copy_of_the_weights_is_not_counted(tmp_path: Path) -> None:
    for name in ("model.safetensors", "consolidated.safetensors"):  # Mistral's repositories have both
        write_header(tmp_path / name, {f"{name}.weight": ("BF16", [10, 4])})
    stored = read_stored_weights(tmp_path, 1, tied=False)
    assert stored is not None
    assert stored.float_bytes == 80


@pytest.mark.parametrize("content", [b"", b"\xff" * 16, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{{"])
def test_a_broken_file_tells_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert read_stored_weights(tmp_path, 1, tied=False) is None


def test_a_hub_model_is_found_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    model = ModelSpec(id="org/model")
    assert find_snapshot(model) is None
    snapshot = tmp_path / "models--org--model/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--org--model/refs").mkdir()
    (tmp_path / "models--org--model/refs/main").write_text("abc")
    assert find_snapshot(model) == snapshot
    assert find_snapshot(ModelSpec(id="org/model", revision="abc")) == snapshot
    assert find_snapshot(ModelSpec(id="org/model", revision="other")) is None


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "qwen2-half-sliding", "qwen3", "phi3"])
def test_linear_layers_are_those_that_transformers_builds(name: str) -> None:
    config = AutoConfig.for_model(**models.SMALL[name])
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    linear = {key.rpartition(".")[2]: part for key, part in built.named_modules() if isinstance(part, torch.nn.Linear)}
    assert linear_layers(models.SMALL[name]) == {key: (part.in_features, part.out_features) for key, part in linear.items()}


def test_layers_of_other_architectures_are_not_known() -> None:
    assert linear_layers(models.SMALL["mixtral"]) is None
    assert linear_layers({"model_type": "llama"}) is None
