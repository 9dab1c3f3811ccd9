"""Every name of TensorRT-LLM that the engine uses exists in the recorded API of 1.2.1, and so does every name of the stand-in."""

from __future__ import annotations

import ast
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pretended_tensorrt import fake_tensorrt

import llem_ray.backends.tensorrt_llm as package
from llem_ray.backends.model_source import find_model
from llem_ray.backends.tensorrt_llm import arguments, iteration_stats, settings
from llem_ray.backends.tensorrt_llm.arguments import cache_arguments, engine_arguments, sampling_arguments
from llem_ray.core.backend import BackendConfig, Request
from llem_ray.core.spec import EngineSpec, ModelSpec, SamplingSpec

DATA = Path(__file__).parents[1] / "data" / "tensorrt_llm_1_2_1.json"
FACTS: dict[str, Any] = json.loads(DATA.read_text())
SOURCES = sorted(Path(package.__path__[0]).glob("*.py"))
OBJECTS = {
    "self._llm": {*FACTS["llm_methods"], *FACTS["llm_methods"]["properties"]},
    "llm": {*FACTS["llm_methods"], *FACTS["llm_methods"]["properties"]},
    "output": {
        *FACTS["request_output"]["properties"],
        *FACTS["request_output"]["attributes"],
        *FACTS["request_output"]["methods"],
    },
    "completion": {*FACTS["completion_output"]["fields"], *FACTS["completion_output"]["properties"]},
}
"""How the engine's sources call the library's objects -> what these have."""
CLASSES = {
    "SamplingParams": "sampling_params",
    "KvCacheConfig": "kv_cache_config",
    "RayPlacementConfig": "ray_placement_config",
}
OBJECTS["row.output"] = OBJECTS["self.output"] = OBJECTS["output"]


def problems_of(source: str) -> list[str]:
    """What the source takes from TensorRT-LLM that is not in the recorded API."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "tensorrt_llm":
            known = FACTS["imports"].get(node.module, ())
            found += [f"from {node.module} import {name.name}" for name in node.names if name.name not in known]
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner in OBJECTS and node.attr not in OBJECTS[owner]:
                found.append(f"{owner}.{node.attr}")
            if owner in FACTS["imports"] and node.attr not in FACTS["imports"][owner]:
                found.append(f"{owner}.{node.attr}")
        elif isinstance(node, ast.Call):
            found += unknown_keywords(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(("TLLM_", "TRTLLM_")):
            found += [node.value] if node.value not in FACTS["environment_variables"] else []
    return found


def unknown_keywords(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    known: Any = None
    if name.startswith(("self._llm.", "llm.")):
        known = FACTS["llm_methods"].get(name.rpartition(".")[2], {}).get("params", ())
    elif name in CLASSES:
        known = FACTS[CLASSES[name]]
    return [] if known is None else [f"{name}({k.arg}=)" for k in call.keywords if k.arg is not None and k.arg not in known]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_every_name_in_the_sources_is_in_the_recorded_api(path: Path) -> None:
    assert problems_of(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from tensorrt_llm.llmapi import QuantumConfig",
        "import tensorrt_llm\ntensorrt_llm.LLMs",
        "class A:\n def f(self): self._llm.generate_fast([1])",
        "class A:\n def f(self): self._llm.generate_async([1], stream=True)",
        "completion.token_ids_new",
        "SamplingParams(max_new_tokens=4)",
        "KvCacheConfig(enable_blocks=True)",
        "RayPlacementConfig(gpu_share=0.5)",
        "def f(llm): llm._collective_rpc('report_device_id', blocking=False)",
        "X = 'TLLM_WORKER_USE_ONE_PROCESS'",
    ],
)
def test_a_name_that_is_not_in_it_is_found(source: str) -> None:
    assert len(problems_of(source)) == 1


def test_the_sources_use_the_names_that_matter() -> None:
    """Otherwise the check above looks at nothing: names of variables would have changed."""
    text = "\n".join(path.read_text() for path in SOURCES)
    for name in (
        "self._llm.generate_async(",
        "self._llm.get_stats(",
        "completion.token_ids_diff",
        "output.abort",
        "SamplingParams(",
        "RayPlacementConfig(",
        "llm._collective_rpc(",
    ):
        assert name in text


def config_of(nodes: int = 1, **args: Any) -> BackendConfig:
    spec = EngineSpec(backend="tensorrt", tensor_parallel=2, nodes=nodes, engine_args=args)
    model = ModelSpec(config="llama-tiny")
    return BackendConfig(model=model, engine=spec, device="cuda", host="h", base_dir=".", cache_dir=".", online=True)


def test_every_argument_that_is_set_is_in_the_recorded_api() -> None:
    torch, base = FACTS["torch_llm_args"], FACTS["base_llm_args_names"]
    for backend, nodes, known in (("pytorch", 1, torch), ("pytorch", 2, torch), ("tensorrt", 1, base)):
        config = config_of(nodes, backend=backend)
        given = engine_arguments(config, find_model(config.model, "."), "folder", "bfloat16", 2048)
        assert set(given) <= set(known), backend
        assert set(given["kv_cache_config"]) <= set(FACTS["kv_cache_config"])
    assert set(cache_arguments({})) <= set(FACTS["kv_cache_config"])
    request = Request(request_id="r", prompt_token_ids=(5,), max_new_tokens=7, ignore_eos=False)
    drawn = sampling_arguments(request, SamplingSpec(temperature=1.0, top_k=3), 0, (1, 2))
    assert {"temperature", "stop_token_ids", "top_k"} <= set(drawn) <= set(FACTS["sampling_params"])
    assert set(arguments.RESERVED) <= {*FACTS["torch_llm_args"], *FACTS["llm_init"]["extra_accepted_kwargs"]}
    assert {settings.SINGLE_PROCESS, *settings.TAKEN_OUT, *settings.MISLEADING_ORCHESTRATOR} <= set(
        FACTS["environment_variables"]
    )


def test_our_own_arguments_take_no_name_of_the_library_but_backend() -> None:
    assert set(arguments.OWN_NAMES) & set(FACTS["torch_llm_args"]) == {"backend"}


def test_every_statistic_that_is_read_is_in_the_recorded_api() -> None:
    known = FACTS["metrics"]["iteration_stats"]
    tree = ast.parse(Path(iteration_stats.__file__).read_text())
    read = {ast.literal_eval(node.slice) for node in ast.walk(tree) if isinstance(node, ast.Subscript) and is_text(node.slice)}
    counted = {
        ast.literal_eval(node.args[1])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_batch"
    }
    assert {"timestamp", "iterLatencyMS", "inflightBatchingStats"} == read <= set(known["keys"])
    assert {"numCtxTokens", "numContextRequests", "numGenRequests"} == counted <= set(known["inflightBatchingStats"])


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Any]:
    with fake_tensorrt():
        yield importlib.import_module("tensorrt_llm._runtime")


def test_the_stand_in_has_no_name_that_the_library_lacks(runtime: Any) -> None:
    params = runtime.SamplingParams(end_id=-1)
    output = runtime.RequestOutput(1, [5], params, streaming=True)
    for found, known in (
        (runtime.LLM, OBJECTS["llm"]),
        (runtime.TrtLLM, OBJECTS["llm"]),
        (output, OBJECTS["output"]),
        (output.outputs[0], OBJECTS["completion"]),
        (params, {*FACTS["sampling_params"], "model_fields"}),
    ):
        assert {name for name in dir(found) if not name.startswith("_")} <= known


def test_the_stand_in_refuses_what_the_library_refuses(runtime: Any) -> None:
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        runtime.SamplingParams(max_new_tokens=4)
    with pytest.raises(ValueError, match="valid int"):
        runtime.KvCacheConfig(max_tokens="many")
    with pytest.raises(ValueError, match="Invalid backend"):
        runtime.LLM("folder", backend="tensorrt")
    with pytest.raises(ValueError, match="quant_config"):
        runtime.LLM("folder", quant_config={})
    with pytest.raises(ValueError, match="only supported with orchestrator_type='ray'"):
        runtime.TorchLlmArgs(model="folder", ray_worker_extension_cls="module.Class")
    with pytest.raises(ValueError, match="does not support collective RPC"):
        object.__new__(runtime.LLM)._collective_rpc("report_device_id")
    runtime.BEHAVIOUR.gpus = 0
    with pytest.raises(RuntimeError, match="No CUDA GPUs"):
        runtime.TorchLlmArgs(model="folder")
    runtime.BEHAVIOUR.gpus = 2


def test_the_recorded_api_is_an_extract_of_the_one_it_was_taken_from() -> None:
    folder = os.environ.get("LLEM_RAY_TEST_DATA")
    if not folder or not Path(folder, "trtllm_api.json").exists():
        pytest.skip("LLEM_RAY_TEST_DATA names no folder with trtllm_api.json")
    whole = json.loads(Path(folder, "trtllm_api.json").read_text())
    for name, value in FACTS.items():
        if name == "metrics":
            assert value["iteration_stats"] == whole["metrics"]["iteration_stats"]
        elif name != "imports":
            assert value == whole[name], name


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"gpu_share": 0.5}, "Extra inputs are not permitted"),
        ({"placement_groups": []}, "must be provided together"),
        ({"placement_groups": [], "placement_bundle_indices": [[0]]}, "must equal placement_bundle_indices length"),
        ({"placement_groups": ["0f"], "placement_bundle_indices": [[0]]}, "must be a Ray PlacementGroup, got str"),
        ({"per_worker_gpu_share": 0.0}, "between 0 and 1"),
    ],
)
def test_the_stand_in_refuses_placements_that_the_library_refuses(runtime: Any, given: dict[str, Any], told: str) -> None:
    del runtime
    config = importlib.import_module("tensorrt_llm.llmapi.llm_args").RayPlacementConfig
    with pytest.raises((ValueError, TypeError), match=told):
        config(**given)
