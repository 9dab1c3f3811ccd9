"""What check() refuses without torch: missing folders, broken configs, missing tokenizers, impossible arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llem_ray.backends.model_source import find_model, git_commit
from llem_ray.backends.transformers import backend as backend_module
from llem_ray.backends.transformers.backend import TransformersBackend
from llem_ray.core.backend import BackendConfig
from llem_ray.core.errors import ConfigError, PluginError
from llem_ray.core.plugins import install_command
from llem_ray.core.spec import EngineSpec, ModelSpec


def folder_with(path: Path, *names: str, config: str = '{"model_type": "llama"}') -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(config)
    for name in names:
        (path / name).write_text("")
    return path


def config_of(base: Path, model: ModelSpec, engine: EngineSpec | None = None, device: Any = "cpu") -> BackendConfig:
    return BackendConfig(
        model=model, engine=engine or EngineSpec(), device=device, host="h", base_dir=str(base), cache_dir=str(base)
    )


def test_hub_ids_need_no_files(tmp_path: Path) -> None:
    for name in ("gpt2", "meta-llama/Llama-3.2-1B"):
        source = find_model(ModelSpec(id=name), str(tmp_path))
        assert (source.kind, source.location, source.random, source.tokenizer) == ("hub", name, False, name)
    assert find_model(ModelSpec(id="gpt2", weights="random"), str(tmp_path)).tokenizer_optional


def test_an_existing_relative_folder_wins_over_a_hub_id(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "org" / "model", "model.safetensors", "tokenizer.json")
    source = find_model(ModelSpec(id="org/model"), str(tmp_path))
    assert (source.kind, source.location, source.tokenizer) == ("folder", str(folder), str(folder))


@pytest.mark.parametrize("name", ["./models/none", "/nowhere/at/all", "~/no-such-model-folder", "a/b/c"])
def test_missing_folder_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="the folder does not exist") as caught:
        find_model(ModelSpec(id=name), str(tmp_path))
    assert caught.value.field == "model.id"
    assert caught.value.found == name


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ('{\n  "model_type": "llama",\n  "hidden_size": 64,,\n}', "not valid JSON", 3),
        ("", "not valid JSON", 1),
        ("[1, 2]", "not a model config", None),
        ('{"hidden_size": 64}', "no model_type", None),
        ('{"model_type": "qwen3_moe", "decoder_sparse_step": 0}', "wrong decoder_sparse_step", None),
        ('{"model_type": "qwen3_vl_moe", "text_config": {"decoder_sparse_step": null}}', "wrong decoder_sparse_step", None),
    ],
)
@pytest.mark.parametrize("field", ["model.id", "model.config"])
def test_bad_config_json_is_named_with_its_line(tmp_path: Path, text: str, message: str, line: int | None, field: str) -> None:
    folder = folder_with(tmp_path / "m", "model.safetensors", "tokenizer.json", config=text)
    spec = ModelSpec(id=str(folder)) if field == "model.id" else ModelSpec(config=str(folder / "config.json"))
    with pytest.raises(ConfigError, match=message) as caught:
        find_model(spec, str(tmp_path))
    assert (caught.value.file, caught.value.line, caught.value.field) == (str(folder / "config.json"), line, field)


def test_binary_config_json_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m")
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        find_model(ModelSpec(id=str(folder)), str(tmp_path))


def test_folder_without_config_weights_or_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        find_model(ModelSpec(id="./empty"), str(tmp_path))
    folder_with(tmp_path / "bare")
    with pytest.raises(ConfigError, match="no weights"):
        find_model(ModelSpec(id="./bare"), str(tmp_path))
    folder_with(tmp_path / "mute", "model.safetensors")
    with pytest.raises(ConfigError, match="no tokenizer") as caught:
        find_model(ModelSpec(id="./mute"), str(tmp_path))
    assert caught.value.field == "model.tokenizer"
    assert "tokenizer.json" in str(caught.value.allowed)


def test_named_tokenizer_folder_must_hold_one(tmp_path: Path) -> None:
    folder_with(tmp_path / "mute", "model.safetensors")
    (tmp_path / "tok").mkdir()
    spec = ModelSpec(id="./mute", tokenizer="./tok")
    with pytest.raises(ConfigError, match="no tokenizer"):
        find_model(spec, str(tmp_path))
    (tmp_path / "tok" / "tokenizer.json").write_text("{}")
    assert find_model(spec, str(tmp_path)).tokenizer == str(tmp_path / "tok")


def test_random_weights_need_the_config_alone(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "bare")
    source = find_model(ModelSpec(id="./bare", weights="random"), str(tmp_path))
    assert (source.random, source.tokenizer) == (True, None)
    source = find_model(ModelSpec(config="bare/config.json"), str(tmp_path))
    assert (source.kind, source.location, source.random) == ("file", str(folder / "config.json"), True)
    assert find_model(ModelSpec(config="bare"), str(tmp_path)).location == str(folder / "config.json")


def test_unknown_builtin_model_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        find_model(ModelSpec(config="lama-tiny"), str(tmp_path))
    assert caught.value.hint == "did you mean 'llama-tiny'?"
    assert "llama-100m" in str(caught.value.allowed)


@pytest.mark.parametrize("spec", [ModelSpec(), ModelSpec(id="gpt2", config="llama-tiny")])
def test_exactly_one_of_id_and_config(tmp_path: Path, spec: ModelSpec) -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        find_model(spec, str(tmp_path))


TINY = ModelSpec(config="llama-tiny")


@pytest.mark.parametrize(
    ("model", "engine", "field"),
    [
        (TINY, EngineSpec(tensor_parallel=2), "engine.tensor_parallel"),
        (TINY, EngineSpec(pipeline_parallel=2), "engine.pipeline_parallel"),
        (TINY, EngineSpec(data_parallel=4), "engine.data_parallel"),
        (replace(TINY, quantization="awq"), EngineSpec(), "model.quantization"),
        (TINY, EngineSpec(engine_args={"attn_implementation": "sdp"}), "engine.engine_args.attn_implementation"),
        (TINY, EngineSpec(engine_args={"attn_implementation": "flash_attention_2"}), "engine.engine_args.attn_implementation"),
        (TINY, EngineSpec(engine_args={"num_threads": 0}), "engine.engine_args.num_threads"),
        (TINY, EngineSpec(engine_args={"num_thread": 1}), "engine.engine_args.num_thread"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, model: ModelSpec, engine: EngineSpec, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TransformersBackend(config_of(tmp_path, model, engine)).check()
    assert caught.value.field == field
    assert caught.value.allowed


def test_gpu_attention_is_allowed_on_cuda(tmp_path: Path) -> None:
    engine = EngineSpec(engine_args={"attn_implementation": "flash_attention_2"})
    TransformersBackend(config_of(tmp_path, TINY, engine, device="cuda")).check()


def test_missing_package_answers_with_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "REQUIRED_PACKAGES", ("torch", "no_such_engine_package"))
    with pytest.raises(PluginError, match="no_such_engine_package") as caught:
        TransformersBackend(config_of(tmp_path, TINY)).check()
    assert caught.value.hint == install_command("transformers")


def test_check_does_not_import_torch(tmp_path: Path) -> None:
    code = f"""
import sys
from llem_ray.backends.transformers.backend import TransformersBackend
from llem_ray.core.backend import BackendConfig
from llem_ray.core.spec import EngineSpec, ModelSpec
TransformersBackend(BackendConfig(model=ModelSpec(config="llama-tiny"), engine=EngineSpec(), device="cpu", host="h",
                                  base_dir={str(tmp_path)!r}, cache_dir={str(tmp_path)!r})).check()
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_commit_of_a_tracked_model_folder(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "repo" / "model")
    assert git_commit(folder) is None

    def git(*words: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
        done = subprocess.run(
            ["git", *identity, "-C", str(tmp_path / "repo"), *words], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    assert git_commit(folder) is None
    git("add", "model/config.json")
    git("commit", "-q", "-m", "model")
    assert git_commit(folder) == git("rev-parse", "HEAD")
    (tmp_path / "repo" / "other").mkdir()
    (tmp_path / "repo" / "other" / "config.json").write_text(json.dumps({}))
    assert git_commit(tmp_path / "repo" / "other") is None
