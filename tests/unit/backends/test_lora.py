"""The LoRA adapter that a sweep file names: what is refused, and what a random one is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from llem_ray.backends.builtin_models import BUILTIN_MODELS
from llem_ray.backends.lora import LoraArgs, adapter_rank, parse_lora
from llem_ray.backends.random_adapter import random_adapter
from llem_ray.backends.transformers.backend import TransformersBackend
from llem_ray.core.backend import BackendConfig
from llem_ray.core.errors import ConfigError, LoadError
from llem_ray.core.spec import EngineSpec, ModelSpec

TINY = AutoConfig.for_model("llama", **BUILTIN_MODELS["llama-tiny"].config)


def drawn(folder: Path, **args: Any) -> Path:
    return random_adapter(TINY, LoraArgs(**args), folder, trust_remote_code=False)


@pytest.mark.parametrize(
    ("lora", "field", "says"),
    [
        ({}, "lora", "a folder or a rank"),
        ({"rank": 8, "path": "x"}, "lora", "a folder or a rank"),
        ({"rank": 0}, "lora.rank", "1 and more"),
        ({"rank": 4, "alpha": 0}, "lora.alpha", "1 and more"),
        ({"rank": "8"}, "lora.rank", "int"),
        ({"ranks": 8}, "lora.ranks", "did you mean 'rank'?"),
        ({"path": "nowhere"}, "lora.path", "there is no adapter_config.json"),
        (8, "lora", "a mapping"),
    ],
)
def test_what_names_no_adapter_is_refused(tmp_path: Path, lora: Any, field: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_lora({"lora": lora}, str(tmp_path))
    assert caught.value.field == f"engine.engine_args.{field}"
    assert says in str(caught.value)


def test_a_folder_is_found_beside_the_sweep_file(tmp_path: Path) -> None:
    assert parse_lora({}, str(tmp_path)) is None
    folder = drawn(tmp_path, rank=4)
    lora = parse_lora({"lora": {"path": str(folder.relative_to(tmp_path))}}, str(tmp_path))
    assert lora is not None
    assert lora.path == str(folder)
    assert adapter_rank(lora) == 4
    for text in ("{", "[]", "{}"):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ConfigError, match="not an adapter of PEFT"):
            adapter_rank(lora)


def test_a_random_one_has_two_matrices_for_every_layer_it_names(tmp_path: Path) -> None:
    folder = drawn(tmp_path, rank=8, target_modules=("q_proj", "down_proj"))
    weights = load_file(folder / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * TINY.num_hidden_layers
    prefix = "base_model.model.model.layers.0.mlp.down_proj"
    down, up = weights[f"{prefix}.lora_A.weight"], weights[f"{prefix}.lora_B.weight"]
    assert (down.shape, up.shape) == ((8, TINY.intermediate_size), (TINY.hidden_size, 8))
    assert 0.9 < up.abs().max() * 8**0.5 <= 1
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (8, 16, ["q_proj", "down_proj"])


def test_it_follows_its_seed_and_is_made_once(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.3.self_attn.v_proj.lora_B.weight"
    before = torch.random.get_rng_state()
    folders = [drawn(tmp_path / str(place), rank=2, seed=seed) for place, seed in enumerate((1, 1, 2))]
    first, again, other = (load_file(folder / "adapter_model.safetensors")[name] for folder in folders)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())
    written_ns = (folders[0] / "adapter_config.json").stat().st_mtime_ns
    assert drawn(tmp_path / "0", rank=2, seed=1) == folders[0]
    assert (folders[0] / "adapter_config.json").stat().st_mtime_ns == written_ns
    assert [path.name for path in folders[0].parent.iterdir()] == [folders[0].name]


def test_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such linear layers") as caught:
        drawn(tmp_path, rank=2, target_modules=("q_proj", "query"))
    assert (caught.value.found, caught.value.field) == ("query", "engine.engine_args.lora.target_modules")
    assert "up_proj" in str(caught.value.allowed)


def test_a_folder_that_cannot_be_written_is_a_load_error(tmp_path: Path) -> None:
    (tmp_path / "lora-adapters").write_text("in the way")
    with pytest.raises(LoadError, match="cannot be written"):
        drawn(tmp_path, rank=2)


def checked(tmp_path: Path, lora: dict[str, Any], model: str = "llama-tiny") -> None:
    """The transformers engine's check, which loads nothing."""
    engine = EngineSpec(backend="transformers", device="cpu", engine_args={"lora": lora})
    TransformersBackend(
        BackendConfig(
            model=ModelSpec(config=model), engine=engine, device="cpu", host="h", base_dir=str(tmp_path), cache_dir=str(tmp_path)
        )
    ).check()


def saved(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    (tmp_path / "saved").mkdir()
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], **changes}
    (tmp_path / "saved/adapter_config.json").write_text(json.dumps(config))
    return {"path": "saved"}


@pytest.mark.parametrize(
    ("lora", "field", "says"),
    [
        ({"rank": 8, "target_modules": ["q_proj", "query"]}, "lora.target_modules", "no such linear layers\n  found: query"),
        ({"rank": 65}, "lora.rank", "layers v_proj, which have 64\n  found: rank 65\n  allowed: 1 to 64"),
        ({"rank": 65, "target_modules": ["k_proj", "down_proj"]}, "lora.rank", "allowed: 1 to 64"),
        ({"rank": 129, "target_modules": ["q_proj"]}, "lora.rank", "allowed: 1 to 128"),
    ],
)
def test_a_random_adapter_that_cannot_fit_is_refused_before_anything_loads(
    tmp_path: Path, lora: dict[str, Any], field: str, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(tmp_path, lora)
    assert caught.value.field == f"engine.engine_args.{field}"
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"r": 129}, "layers q_proj, which have 128\n  found: rank 129"),
        ({"target_modules": ["c_attn"]}, "of another model: this one has no such layers"),
        ({"target_modules": ["model.layers.0.self_attn.query"]}, "for query\n  allowed: down_proj, gate_proj"),
    ],
)
def test_a_saved_adapter_that_cannot_fit_is_refused_before_anything_loads(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(tmp_path, saved(tmp_path, **changes))
    assert caught.value.field == "engine.engine_args.lora.path"
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{}, {"target_modules": ["query", "v_proj"]}, {"target_modules": r".*_proj"}, {"target_modules": "all-linear"}]
)
def test_what_may_fit_is_left_to_the_weights(tmp_path: Path, changes: dict[str, Any]) -> None:
    checked(tmp_path, saved(tmp_path, **changes))


def test_layers_of_a_model_that_is_not_known_are_left_to_the_engine(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "of-tomorrow", "hidden_size": 8}')
    checked(tmp_path, {"rank": 4096, "target_modules": ["anything"]}, model="config.json")
