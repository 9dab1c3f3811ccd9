"""Arguments of the transformers engine that cannot be, alone or together. No torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llem_ray.backends.transformers import backend as backend_module
from llem_ray.backends.transformers.arguments import check_arguments
from llem_ray.backends.transformers.backend import TransformersBackend
from llem_ray.backends.transformers.combinations import EXCLUDED
from llem_ray.core.backend import BackendConfig
from llem_ray.core.errors import ConfigError, PluginError
from llem_ray.core.plugins import install_command
from llem_ray.core.spec import EngineSpec, ModelSpec

EIGHT, FOUR = "bitsandbytes-8bit", "bitsandbytes-4bit"


def config_of(
    base: Path, *, serving: bool = False, quantization: str | None = None, parallel: dict[str, int] | None = None, **args: Any
) -> BackendConfig:
    return BackendConfig(
        model=ModelSpec(config="llama-tiny", quantization=quantization),
        engine=EngineSpec(engine_args=args, **(parallel or {})),  # type: ignore[arg-type]
        device="cpu",
        host="h",
        base_dir=str(base),
        cache_dir=str(base),
        online=serving,
    )


@pytest.mark.parametrize(
    ("field", "args"),
    [
        ("online.num_blocks", {"online": {"num_blocks": 0}}),
        ("online.max_batch_tokens", {"online": {"max_batch_tokens": -1}}),
        ("online.max_requests_per_batch", {"online": {"max_requests_per_batch": 0}}),
        ("online.page_size", {"online": {"page_size": 3}}),
        ("online.max_memory_percent", {"online": {"max_memory_percent": 1.5}}),
        ("online.num_block", {"online": {"num_block": 8}}),
        ("device_map", {"device_map": "everywhere"}),
        ("compile", {"compile": True}),
        ("compile.mode", {"compile": {"mode": "fast"}}),
        ("cache_implementation", {"cache_implementation": "dynamic", "compile": {}}),
        ("bitsandbytes.quant_type", {"bitsandbytes": {"quant_type": "nf4"}}),
        ("bitsandbytes.quant_type", {"bitsandbytes": {"quant_type": "nf4"}, "quantization": EIGHT}),
        ("bitsandbytes.int8_threshold", {"bitsandbytes": {"int8_threshold": 5.0}, "quantization": FOUR}),
        ("merge_lora", {"merge_lora": True}),
        ("lora", {"lora": {}}),
        ("lora", {"lora": {"rank": 8, "path": "there"}}),
        ("lora.rank", {"lora": {"rank": 0}}),
        ("lora.path", {"lora": {"path": "no/such/folder"}}),
        ("attn_implementation", {"attn_implementation": "flex_attention"}),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(tmp_path: Path, field: str, args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_arguments(config_of(tmp_path, **args))
    assert caught.value.field == f"engine.engine_args.{field}"


ASKED: dict[str, dict[str, Any]] = {
    "split": {"parallel": {"tensor_parallel": 2}},
    "replicas": {"parallel": {"data_parallel": 2}},
    "device_map": {"device_map": "auto"},
    "quantization": {"quantization": EIGHT},
    "lora": {"lora": {"rank": 8}},
    "merge_lora": {"lora": {"rank": 8}, "merge_lora": True},
    "compile": {"compile": {}},
    "static cache": {"cache_implementation": "static"},
    "online": {"serving": True},
}


@pytest.mark.parametrize(("first", "second", "reason"), EXCLUDED, ids=lambda text: text[:12])
def test_what_excludes_each_other_is_refused_with_the_reason(tmp_path: Path, first: str, second: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        check_arguments(config_of(tmp_path, **ASKED[first], **ASKED[second]))
    assert "with" in str(caught.value.found)


@pytest.mark.parametrize("feature", [name for name in ASKED if name not in ("split", "replicas")])
def test_each_alone_is_accepted(tmp_path: Path, feature: str) -> None:
    check_arguments(config_of(tmp_path, **ASKED[feature]))


def test_layers_over_several_processes_are_refused_in_both_ways(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one process") as caught:
        check_arguments(config_of(tmp_path, serving=True, parallel={"pipeline_parallel": 2}))
    assert "engine.pipeline_parallel: 2" in str(caught.value.found)


@pytest.mark.parametrize("name", ["awq", "bitsandbytes", "fp8"])
def test_unknown_quantisations_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=FOUR) as caught:
        check_arguments(config_of(tmp_path, quantization=name))
    assert caught.value.found == name


def test_a_quantised_checkpoint_is_not_quantised_again(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = dataclasses.replace(config_of(tmp_path), model=ModelSpec(config=str(tmp_path / "config.json"), quantization=EIGHT))
    with pytest.raises(ConfigError, match="quantised already"):
        TransformersBackend(asked).check()


@pytest.mark.parametrize(("package", "args"), [("peft", {"lora": {"rank": 8}}), ("bitsandbytes", {"quantization": FOUR})])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, args: dict[str, Any]
) -> None:
    monkeypatch.setattr(backend_module, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(PluginError) as caught:
        TransformersBackend(config_of(tmp_path, **args)).check()
    assert caught.value.hint == install_command("transformers", package)
