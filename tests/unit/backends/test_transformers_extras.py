"""Quantised weights, adapters, static caches, compilation and device maps on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from llem_ray.backends.tokenizer import train_tokenizer
from llem_ray.backends.transformers import memory
from llem_ray.backends.transformers.backend import TransformersBackend
from llem_ray.backends.transformers.decoding import generate_batch
from llem_ray.backends.transformers.loading import require_on_gpus
from llem_ray.backends.transformers.quantization import require_capability
from llem_ray.core.backend import BackendConfig, LoadReport, Request, RequestRecord
from llem_ray.core.errors import ConfigError, DeviceMemoryError, LoadError
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec

LINEAR = 4 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 352)
"""Parameters of llama-tiny's linear layers."""
REST = 1_000_576 - LINEAR
ROWS = 4 * (2 * 128 + 2 * 64 + 2 * 352 + 128)
"""Output features of those layers."""

REQUESTS = [
    Request(request_id=str(row), prompt_token_ids=tuple(range(9 + row, 9 + row + length)), max_new_tokens=8)
    for row, length in enumerate([4, 9, 6])
]


def ask(folder: Path, quantization: str | None = None, model: str = "llama-tiny", **args: Any) -> tuple[LoadReport, list[Any]]:
    """Load, serve three requests, close."""
    backend = TransformersBackend(
        BackendConfig(
            model=ModelSpec(config=model, initializer_range=0.1, quantization=quantization),
            engine=EngineSpec(engine_args={"num_threads": 1} | args),
            device="cpu",
            host="h",
            base_dir=str(folder),
            cache_dir=str(folder / "cache"),
        )
    )
    backend.check()
    report = backend.load()
    try:
        return report, tokens_of(backend)
    finally:
        backend.close()


def tokens_of(backend: TransformersBackend) -> list[Any]:
    return [event.output_token_ids for event in backend.run(REQUESTS, SamplingSpec()) if isinstance(event, RequestRecord)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("extras")


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[Any]:
    return ask(folder)[1]


def test_eight_bits_weigh_what_they_say(folder: Path) -> None:
    report, tokens = ask(folder, "bitsandbytes-8bit")
    assert report.parameters == 1_000_576
    assert report.weight_bytes == LINEAR + 4 * ROWS + 4 * REST
    assert [len(row) for row in tokens] == [8, 8, 8]
    assert report.notes["bitsandbytes"]


@pytest.mark.parametrize(
    "details", [{}, {"quant_type": "fp4"}, {"double_quant": True, "compute_dtype": "bfloat16"}], ids=["nf4", "fp4", "double"]
)
def test_four_bits_weigh_half_a_byte_and_their_scales(folder: Path, details: dict[str, Any]) -> None:
    report, tokens = ask(folder, "bitsandbytes-4bit", bitsandbytes=details)
    assert report.parameters == 1_000_576
    # One scale of 1 to 4 bytes for 64 weights, and a table of 16 or 256 numbers in each of 28 layers.
    least, most = LINEAR // 2 + LINEAR // 64, LINEAR // 2 + 4 * LINEAR // 64 + 28 * 4 * (16 + 256 + 64)
    assert report.weight_bytes is not None
    assert least <= report.weight_bytes - 4 * REST <= most
    assert [len(row) for row in tokens] == [8, 8, 8]


def test_a_checkpoint_of_four_bits_is_not_taken_for_a_wide_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 2, "num_attention_heads": 4}  # of no whole blocks
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=512, **sizes)).save_pretrained(tmp_path / "wide")
    narrow = AutoModelForCausalLM.from_pretrained(
        tmp_path / "wide", quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map={"": "cpu"}
    )
    narrow.save_pretrained(tmp_path / "narrow")
    train_tokenizer(512, tmp_path / "cache").save_pretrained(tmp_path / "narrow")
    parameters = narrow.num_parameters()
    monkeypatch.setattr(memory, "available_host_bytes", lambda: parameters)  # 8 bits of each
    backend = TransformersBackend(
        BackendConfig(
            model=ModelSpec(id=str(tmp_path / "narrow")),
            engine=EngineSpec(engine_args={"num_threads": 1}),
            device="cpu",
            host="h",
            base_dir=str(tmp_path),
            cache_dir=str(tmp_path / "cache"),
        )
    )
    report = backend.load()
    monkeypatch.undo()
    try:
        assert report.notes["quantization"] == "bitsandbytes"
        assert [len(row) for row in tokens_of(backend)] == [8, 8, 8]
    finally:
        backend.close()


def test_formats_of_four_bits_differ(folder: Path) -> None:
    assert ask(folder, "bitsandbytes-4bit")[1] != ask(folder, "bitsandbytes-4bit", bitsandbytes={"quant_type": "fp4"})[1]


def test_old_gpus_are_refused() -> None:
    require_capability("bitsandbytes-8bit", (7, 5))
    with pytest.raises(LoadError, match=r"7\.0, bitsandbytes-8bit needs 7\.5"):
        require_capability("bitsandbytes-8bit", (7, 0))


def test_layers_that_accelerate_leaves_on_the_host_are_refused() -> None:
    require_on_gpus(SimpleNamespace(hf_device_map={"model.layers.0": 0, "lm_head": 1}))
    with pytest.raises(DeviceMemoryError, match="cpu, disk") as caught:
        require_on_gpus(SimpleNamespace(hf_device_map={"model.layers.0": 0, "model.layers.1": "cpu", "lm_head": "disk"}))
    assert "engine.gpus" in str(caught.value.hint)


def test_a_device_map_has_a_rank_for_each_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BackendConfig(
        model=ModelSpec(config="llama-tiny"),
        engine=EngineSpec(engine_args={"device_map": "auto"}, gpus=2),
        device="cuda",
        host="h",
        base_dir=str(folder),
        cache_dir=str(folder),
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"{device.index:032}"))
    backend = TransformersBackend(config)
    backend.check()
    backend._engine = SimpleNamespace(close=lambda: None)  # type: ignore[assignment]
    ranks = backend.identity()
    assert [(rank.rank, rank.gpu_uuid) for rank in ranks] == [(0, f"GPU-{0:032}"), (1, f"GPU-{1:032}")]
    assert len({rank.pid for rank in ranks}) == 1


def test_a_device_map_changes_no_token(folder: Path, plain: list[Any]) -> None:
    report, tokens = ask(folder, device_map="auto")
    assert tokens == plain
    assert report.parameters == 1_000_576


def test_steps_pass_through_accelerates_hooks(folder: Path, plain: list[Any], tmp_path: Path) -> None:
    """What moves activations between GPUs moves weights from disk just as well."""
    ask(folder, device_map="auto")  # draws the weights
    (checkpoint,) = (folder / "cache" / "random-checkpoints").glob("[0-9a-f]*")
    places: dict[str, str] = {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(4)}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=places, offload_folder=tmp_path).eval()
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    events = generate_batch(model, REQUESTS, SamplingSpec(), frozenset(), 2047)
    assert [event.output_token_ids for event in events if isinstance(event, RequestRecord)] == plain


def test_a_static_cache_changes_no_token(folder: Path, plain: list[Any]) -> None:
    report, tokens = ask(folder, cache_implementation="static")
    assert tokens == plain
    assert (report.notes["cache"], report.compile_s) == ("static", None)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_steps_change_no_token_and_their_time_is_told(folder: Path, plain: list[Any]) -> None:
    limit_before = torch._dynamo.config.fail_on_recompile_limit_hit
    report, tokens = ask(folder, compile={"backend": "eager"})
    assert tokens == plain
    assert report.compile_s is not None
    assert report.warm_s is not None
    assert report.compile_s > report.warm_s
    assert report.notes["compile"] == "decode steps, eager, default"
    assert torch._dynamo.config.fail_on_recompile_limit_hit == limit_before


def test_an_unknown_compiler_is_torchs_own_error(folder: Path) -> None:
    with pytest.raises(LoadError, match="no_such_compiler"):
        ask(folder, compile={"backend": "no_such_compiler"})


@pytest.fixture(scope="module")
def adapted(folder: Path) -> tuple[LoadReport, list[Any]]:
    return ask(folder, lora={"rank": 8})


def test_a_random_adapter_follows_its_seed(folder: Path, plain: list[Any], adapted: tuple[LoadReport, list[Any]]) -> None:
    report, tokens = adapted
    assert tokens != plain
    assert ask(folder, lora={"rank": 8})[1] == tokens
    assert ask(folder, lora={"rank": 8, "seed": 1})[1] != tokens
    added = 8 * 4 * ((128 + 128) + (128 + 64))  # q_proj and v_proj of four layers
    assert report.parameters == 1_000_576 + added
    assert report.weight_bytes == 4 * (1_000_576 + added)
    assert report.notes["lora"].startswith("random")


def test_a_merged_adapter_chooses_the_same_tokens_and_weighs_nothing(folder: Path, adapted: tuple[LoadReport, list[Any]]) -> None:
    report, tokens = ask(folder, lora={"rank": 8}, merge_lora=True)
    assert tokens == adapted[1]
    assert (report.parameters, report.weight_bytes) == (1_000_576, 4 * 1_000_576)


def test_an_adapter_goes_with_quantised_weights(folder: Path) -> None:
    report, tokens = ask(folder, "bitsandbytes-4bit", lora={"rank": 8})
    assert tokens != ask(folder, "bitsandbytes-4bit")[1]
    assert "lora" in report.notes


@pytest.fixture
def saved(folder: Path, tmp_path: Path, adapted: tuple[LoadReport, list[Any]]) -> Path:
    """The random adapter as a folder of its own."""
    made = sorted((folder / "cache" / "lora-adapters").iterdir(), key=lambda path: path.stat().st_mtime)[0]
    return Path(shutil.copytree(made, tmp_path / "adapter"))


def test_an_adapter_is_read_from_a_folder(folder: Path, saved: Path, adapted: tuple[LoadReport, list[Any]]) -> None:
    report, tokens = ask(folder, lora={"path": str(saved)})
    assert tokens == adapted[1]
    assert str(saved) in report.notes["lora"]


def test_an_adapter_of_another_model_is_refused(folder: Path, saved: Path) -> None:
    with pytest.raises(ConfigError, match="of another model") as caught:
        ask(folder, model="llama-10m", lora={"path": str(saved)})
    assert caught.value.field == "engine.engine_args.lora.path"


def test_an_adapter_for_layers_the_model_lacks_is_refused(folder: Path, saved: Path) -> None:
    weights = load_file(saved / "adapter_model.safetensors")
    save_file(
        {name.replace("layers.0", "layers.7"): value for name, value in weights.items()}, saved / "adapter_model.safetensors"
    )
    with pytest.raises(ConfigError, match=r"no layer model\.layers\.7"):
        ask(folder, lora={"path": str(saved)})


def test_matrices_of_a_rank_larger_than_a_layer_are_refused(folder: Path, saved: Path) -> None:
    file = saved / "adapter_model.safetensors"  # its config still says 8
    grown = {
        name: value[:1].repeat(65, 1) if ".lora_A" in name else value[:, :1].repeat(1, 65)
        for name, value in load_file(file).items()
    }
    save_file({name: value.contiguous() for name, value in grown.items()}, file)
    with pytest.raises(ConfigError, match=r"rank is larger than layer .*: 65, the layer has 64") as caught:
        ask(folder, lora={"path": str(saved)})
    assert (caught.value.field, caught.value.allowed) == ("engine.engine_args.lora.path", "1 to 64")


def test_an_adapter_without_weights_is_refused(folder: Path, saved: Path) -> None:
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"adapter_model\.safetensors"):
        ask(folder, lora={"path": str(saved)})


def test_what_is_no_lora_adapter_is_refused(folder: Path, saved: Path) -> None:
    weights = load_file(saved / "adapter_model.safetensors")
    name = next(iter(weights))
    save_file({name.replace("lora_A", "lora_magnitude_vector"): weights[name]}, saved / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="more than LoRA matrices"):
        ask(folder, lora={"path": str(saved)})
    settings = json.loads((saved / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
