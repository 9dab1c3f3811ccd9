"""Loading and running real, small models on the CPU."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llem_ray.backends.builtin_models import BUILTIN_MODELS
from llem_ray.backends.tokenizer import train_tokenizer
from llem_ray.backends.transformers import engine, memory
from llem_ray.backends.transformers.backend import TransformersBackend
from llem_ray.backends.transformers.engine import is_out_of_memory
from llem_ray.backends.transformers.memory import estimate_batch_memory
from llem_ray.core.backend import BackendConfig, Request, RequestRecord
from llem_ray.core.errors import DeviceMemoryError, GenerationError, LoadError, NumericsError
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec
from llem_ray.core.workload_spec import PromptSpec
from llem_ray.workloads.prompts import load_prompts

TINY = ModelSpec(config="llama-tiny", initializer_range=0.1)


def backend_of(folder: Path, model: ModelSpec = TINY, device: Any = "cpu", **args: Any) -> TransformersBackend:
    engine = EngineSpec(engine_args={"num_threads": 1} | args)
    return TransformersBackend(
        BackendConfig(model=model, engine=engine, device=device, host="h", base_dir=str(folder), cache_dir=str(folder / "cache"))
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersBackend]:
    backend = backend_of(tmp_path_factory.mktemp("tiny"))
    backend.load()
    yield backend
    backend.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as a user has it: config, weights, tokenizer, in bfloat16."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(5)
    config = AutoConfig.for_model("llama", **(BUILTIN_MODELS["llama-tiny"].config | {"initializer_range": 0.1}))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    train_tokenizer(2048, folder / "cache").save_pretrained(folder)
    return folder


def ask(backend: TransformersBackend, rows: int = 2, new_tokens: int = 6, prompt: int = 5) -> list[tuple[int, ...]]:
    requests = [
        Request(request_id=str(row), prompt_token_ids=tuple(range(10 + row, 10 + row + prompt)), max_new_tokens=new_tokens)
        for row in range(rows)
    ]
    return [e.output_token_ids for e in backend.run(requests, SamplingSpec()) if isinstance(e, RequestRecord)]


@pytest.mark.parametrize("name", list(BUILTIN_MODELS))
def test_builtin_models_have_the_documented_size(name: str) -> None:
    config = AutoConfig.for_model("llama", **BUILTIN_MODELS[name].config)
    with torch.device("meta"):
        assert AutoModelForCausalLM.from_config(config).num_parameters() == BUILTIN_MODELS[name].parameters


def test_llama_1b_has_the_size_of_llama_3_2_1b() -> None:
    assert BUILTIN_MODELS["llama-1b"].parameters == 1_235_814_400


def test_report_of_a_random_model(tmp_path: Path) -> None:
    backend = backend_of(tmp_path, attn_implementation="eager")
    report = backend.load()
    backend.close()
    assert (report.parameters, report.weight_bytes, report.dtype) == (1_000_576, 4_002_304, "float32")
    assert (report.context_tokens, report.vocab_size, report.device) == (2048, 2048, "cpu")
    assert report.random_weights
    assert report.model_commit is None
    assert report.special_token_ids == (0, 1, 2)
    assert report.notes["attention"] == "eager"
    assert report.notes["tokenizer"] == "trained locally"
    assert report.notes["torch"] == torch.__version__
    assert report.notes["threads"] == "1"
    assert report.warm_s is not None
    assert report.warm_s > 0


def test_threads_are_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    backend = backend_of(tmp_path, num_threads=before + 1)
    backend.load()
    assert torch.get_num_threads() == before + 1
    backend.close()
    assert torch.get_num_threads() == before


def test_random_weights_follow_their_seed(tmp_path: Path) -> None:
    outputs = []
    for seed in (0, 0, 1):
        backend = backend_of(tmp_path, replace(TINY, seed=seed))
        backend.load()
        outputs.append(ask(backend))
        backend.close()
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(99)
    expected = torch.rand(3)
    torch.manual_seed(99)
    backend = backend_of(tmp_path)
    backend.load()
    backend.close()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_number_formats(tmp_path: Path, dtype: Any) -> None:
    backend = backend_of(tmp_path, replace(TINY, dtype=dtype))
    report = backend.load()
    assert report.dtype == dtype
    assert report.weight_bytes == 1_000_576 * (4 if dtype == "float32" else 2)
    assert [len(tokens) for tokens in ask(backend)] == [6, 6]
    backend.close()


def test_checkpoint_folder_keeps_its_own_dtype_and_tokenizer(tmp_path: Path, checkpoint: Path) -> None:
    backend = backend_of(tmp_path, ModelSpec(id=str(checkpoint)))
    backend.check()
    report = backend.load()
    assert (report.dtype, report.random_weights) == ("bfloat16", False)
    assert report.notes["tokenizer"] == str(checkpoint)
    reference = AutoModelForCausalLM.from_pretrained(checkpoint)
    expected = reference.generate(
        torch.arange(10, 15)[None], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert ask(backend, rows=1) == [tuple(expected[0, 5:].tolist())]
    backend.close()


def test_config_json_alone_makes_a_random_model(tmp_path: Path) -> None:
    config = {"model_type": "llama", "vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    (tmp_path / "my.json").write_text(json.dumps(config | {"num_attention_heads": 2, "max_position_embeddings": 64}))
    backend = backend_of(tmp_path, ModelSpec(config="my.json"))
    report = backend.load()
    assert (report.vocab_size, report.context_tokens, report.random_weights) == (600, 64, True)
    assert max(token for ids in backend.encode(load_prompts(PromptSpec()).texts) for token in ids) < 600
    backend.close()


def test_local_tokenizer_is_the_same_each_time_and_loses_nothing(tmp_path: Path) -> None:
    first = train_tokenizer(1000, tmp_path / "a")
    again = train_tokenizer(1000, tmp_path / "b")
    cached = train_tokenizer(1000, tmp_path / "a")
    texts = [*load_prompts(PromptSpec()).texts, "emoji \U0001f600, 漢字, tabs\tand\nlines"]
    ids = first(texts)["input_ids"]
    assert ids == again(texts)["input_ids"] == cached(texts)["input_ids"]
    assert len(first) <= 1000
    assert [first.decode(row[1:]) for row in ids] == texts
    assert all(row[0] == first.bos_token_id for row in ids)
    assert [path.name for path in (tmp_path / "a" / "tokenizers").iterdir()] == [
        path.name for path in (tmp_path / "b" / "tokenizers").iterdir()
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_unwritable_cache_does_not_stop_a_load(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert len(train_tokenizer(1000, tmp_path)) <= 1000


def test_vocabulary_too_small_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="vocabulary of 200"):
        train_tokenizer(200, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no-such-architecture"}, "no-such-architecture"),
        ({"model_type": "llama", "hidden_size": "big"}, "hidden_size"),
        ({"model_type": "t5"}, "T5Config"),
    ],
)
def test_config_that_transformers_refuses(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=message) as caught:
        backend_of(tmp_path, ModelSpec(config=".")).load()
    assert len(str(caught.value)) < 600


def test_broken_weights_are_a_load_error(tmp_path: Path, checkpoint: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(LoadError, match="cannot be loaded"):
        backend_of(tmp_path, ModelSpec(id=str(tmp_path))).load()


def test_broken_tokenizer_is_a_load_error(tmp_path: Path, checkpoint: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(LoadError, match="cannot be loaded"):
        backend_of(tmp_path, ModelSpec(id=str(tmp_path))).load()


def test_hub_model_that_is_not_cached_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="nobody/no-such-model") as caught:
        backend_of(tmp_path, ModelSpec(id="nobody/no-such-model")).load()
    assert "hf download" in str(caught.value.hint)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this host has a CUDA device")
def test_cuda_without_a_device_is_a_load_error(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no CUDA device"):
        backend_of(tmp_path, device="cuda").load()


def test_absurd_batch_is_refused_with_the_arithmetic(tiny: TransformersBackend) -> None:
    request = Request(request_id="0", prompt_token_ids=(7,), max_new_tokens=1999)
    with pytest.raises(
        DeviceMemoryError, match=r"KV cache \(2 x 4 layers x 2 heads x 32 x 2000 tokens\) x 1000000 rows x 4 B"
    ) as caught:
        list(tiny.run([request] * 1_000_000, SamplingSpec()))
    assert "available" in str(caught.value)
    assert len(ask(tiny)) == 2


def test_model_that_does_not_fit_is_refused_before_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 4_000_000)
    with pytest.raises(DeviceMemoryError, match="1000576 parameters x 4 B"):
        backend_of(tmp_path).load()


def test_model_larger_than_all_memory_is_refused_once_its_config_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "host_limit_bytes", lambda: 4_000_000)
    with pytest.raises(DeviceMemoryError, match=r"4 MB on each host, which has 4 MB: .*1,000,576 parameters x 4 B"):
        backend_of(tmp_path).load()


def test_allocator_failures_are_told_from_bugs() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_allocator_failure_in_a_step_is_typed_and_survived(tmp_path: Path) -> None:
    backend = backend_of(tmp_path)
    backend.load()
    model = backend._engine._model  # type: ignore[union-attr]
    hook = model.model.layers[2].register_forward_hook(lambda *_: torch.empty(10**15))
    with pytest.raises(DeviceMemoryError, match=r"does not fit.*KV cache"):
        ask(backend)
    hook.remove()
    assert len(ask(backend)) == 2
    backend.close()


def test_bug_in_the_model_is_a_generation_error(tmp_path: Path) -> None:
    backend = backend_of(tmp_path)
    backend.load()
    model = backend._engine._model  # type: ignore[union-attr]
    model.model.norm.weight.data = torch.ones(7)
    with pytest.raises(GenerationError, match="the engine failed"):
        ask(backend)
    backend.close()


def test_nan_weights_fail_the_trial_and_not_the_load(tmp_path: Path, checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    train_tokenizer(2048, tmp_path / "cache").save_pretrained(tmp_path)
    backend = backend_of(tmp_path, ModelSpec(id=str(tmp_path)))
    backend.load()
    with pytest.raises(NumericsError):
        ask(backend)
    backend.close()


@pytest.mark.parametrize("ids", [(), (5, 2048), (-1, 5)])
def test_impossible_prompts_are_refused_by_name(tiny: TransformersBackend, ids: tuple[int, ...]) -> None:
    with pytest.raises(GenerationError, match="request bad"):
        list(tiny.run([Request(request_id="bad", prompt_token_ids=ids, max_new_tokens=1)], SamplingSpec()))


def test_close_frees_the_weights(tmp_path: Path) -> None:
    backend = backend_of(tmp_path)
    backend.load()
    weight = backend._engine._model.lm_head.weight  # type: ignore[union-attr]
    alive = weakref.ref(weight)
    del weight
    backend.close()
    assert alive() is None


def test_memory_is_looked_at_again_for_a_larger_batch_or_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    monkeypatch.setattr(memory, "available_host_bytes", lambda: looks.append(1) or 1000)
    now_s = [50.0]
    monkeypatch.setattr(memory.time, "monotonic", lambda: now_s[0])
    host = memory.HostMemory()
    for needed_bytes in (10, 10, 5, 20, 20):
        host.require(needed_bytes, "a batch", "")
    assert len(looks) == 2
    now_s[0] += memory.LOOK_AGAIN_S + 1
    host.require(10, "a batch", "")
    assert len(looks) == 3
    for _ in range(2):
        with pytest.raises(DeviceMemoryError):
            host.require(1001, "a batch", "")


def test_memory_estimate_grows_with_every_dimension() -> None:
    config = AutoConfig.for_model("llama", **BUILTIN_MODELS["llama-tiny"].config)
    base = {"rows": 2, "prompt_tokens": 64, "new_tokens": 16, "element_bytes": 4, "eager": False}
    small = estimate_batch_memory(config, **base)
    assert small is not None
    assert small.kv_cache_bytes == 2 * 5 * 2 * 32 * 80 * 2 * 4
    for change in ({"rows": 4}, {"prompt_tokens": 128}, {"new_tokens": 64}, {"element_bytes": 8}):
        larger = estimate_batch_memory(config, **(base | change))
        assert larger is not None
        assert larger.total_bytes > small.total_bytes
    long = base | {"prompt_tokens": 2000}
    eager, fused = estimate_batch_memory(config, **(long | {"eager": True})), estimate_batch_memory(config, **long)
    assert eager is not None
    assert fused is not None
    assert eager.total_bytes > fused.total_bytes


def test_unknown_dimensions_give_no_estimate() -> None:
    assert estimate_batch_memory(object(), rows=1, prompt_tokens=1, new_tokens=1, element_bytes=4, eager=False) is None
