"""From the sweep file to the arguments of TensorRT-LLM's LLM class. Needs no TensorRT-LLM: its own models validate them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from llem_ray.backends.engine_args import FIELD, parse_engine_args
from llem_ray.backends.model_source import ModelSource
from llem_ray.core.backend import BackendConfig, Request
from llem_ray.core.errors import ConfigError
from llem_ray.core.spec import EngineSpec, SamplingSpec

RESERVED: Final[Mapping[str, str]] = {
    "model": "set `model.id` or `model.config`",
    "tokenizer": "set `model.tokenizer`",
    "tokenizer_mode": "prompts reach TensorRT-LLM as token ids, the same for every engine",
    "custom_tokenizer": "prompts reach TensorRT-LLM as token ids, the same for every engine",
    "skip_tokenizer_init": "prompts reach TensorRT-LLM as token ids, the same for every engine",
    "num_postprocess_workers": "answers leave TensorRT-LLM as token ids",
    "postprocess_tokenizer_dir": "answers leave TensorRT-LLM as token ids",
    "revision": "set `model.revision`",
    "tokenizer_revision": "set `model.revision`",
    "dtype": "set `model.dtype`",
    "trust_remote_code": "set `model.trust_remote_code`",
    "tensor_parallel_size": "set `engine.tensor_parallel`",
    "pipeline_parallel_size": "set `engine.pipeline_parallel`",
    "context_parallel_size": "the gang has `engine.tensor_parallel` x `engine.pipeline_parallel` GPUs",
    "gpus_per_node": "set `engine.nodes`",
    "orchestrator_type": "workers are started by MPI on one node, by Ray on several: set `engine.nodes`",
    "ray_placement_config": "workers that Ray starts are placed where the gang's GPUs are",
    "ray_worker_extension_cls": "workers that Ray starts tell us who they are by one of ours",
    "mpi_session": "workers are started when the model is loaded",
    "_mpi_session": "workers are started when the model is loaded",
    "enable_lora": "no adapter would be used: this engine serves none yet",
    "lora_config": "no adapter would be used: this engine serves none yet",
    "peft_cache_config": "no adapter would be used: this engine serves none yet",
    "stream_interval": "the time of each token is measured",
    "enable_iter_perf_stats": "set `iteration_stats`",
    "max_stats_len": "all statistics of a run are kept",
}
"""Arguments that llem-ray sets itself or leaves out, and what to do instead."""

DEFAULT_MEMORY_FRACTION: Final = 0.9
"""Share of the GPU's free memory that the KV cache takes: TensorRT-LLM's own default, stated so that it stays."""

RAY_EXTENSION: Final = "llem_ray.backends.tensorrt_llm.ray_extension.WorkerExtension"

STATS_KEPT: Final = 200_000
"""Iterations of one run whose statistics are kept; TensorRT-LLM alone keeps 1000 and forgets the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnArgs:
    """What `engine.engine_args` may hold beside TensorRT-LLM's own arguments."""

    backend: Literal["pytorch", "tensorrt"] = "pytorch"
    """`pytorch` runs the model by TensorRT-LLM's PyTorch backend, `tensorrt` builds a TensorRT engine and runs that."""
    iteration_stats: bool | None = None
    """Read the engine's statistics of every iteration; default: where requests are sent one by one, on one node."""
    stats_wait_s: float = 0.6
    """Statistics travel in bunches, 0.2 s apart: after this long without any, those of a run are complete."""
    step_timeout_s: float = 300.0
    """Longest wait for the next token."""


OWN_NAMES: Final = tuple(field.name for field in dataclasses.fields(OwnArgs))


def own_args(config: BackendConfig) -> OwnArgs:
    """Those of our own, validated.

    Raises:
        ConfigError: One has a wrong value.
    """
    args = parse_engine_args(OwnArgs, {k: v for k, v in config.engine.engine_args.items() if k in OWN_NAMES})
    for name, value in (("stats_wait_s", args.stats_wait_s), ("step_timeout_s", args.step_timeout_s)):
        if value <= 0:
            raise ConfigError("wrong value", field=f"{FIELD}.{name}", found=str(value), allowed="seconds, more than 0")
    return args


def foreign_args(config: BackendConfig) -> dict[str, Any]:
    """Those of TensorRT-LLM, as the sweep file has them."""
    return {name: value for name, value in config.engine.engine_args.items() if name not in OWN_NAMES}


def reads_stats(config: BackendConfig) -> bool:
    """Whether the engine's statistics become steps. They come late, so a batch would wait for them inside its window."""
    asked = own_args(config).iteration_stats
    return (config.online and not spans_nodes(config.engine)) if asked is None else asked


def spans_nodes(engine: EngineSpec) -> bool:
    """Whether the gang has several nodes: its workers are started by Ray then."""
    return (engine.nodes or 1) > 1


def check_spec(config: BackendConfig) -> None:
    """Refuse what needs no TensorRT-LLM to be seen as wrong.

    Raises:
        ConfigError: An argument is one that llem-ray sets, or the model or engine asks for what this engine cannot do.
    """
    own_args(config)
    for name in config.engine.engine_args:
        if name in RESERVED:
            raise ConfigError("llem-ray sets this argument itself", RESERVED[name], field=f"{FIELD}.{name}", found=name)
    _check_gang(config)
    _check_model(config)


def _check_gang(config: BackendConfig) -> None:
    engine = config.engine
    if config.device != "cuda":
        raise ConfigError(
            "TensorRT-LLM runs on NVIDIA GPUs only",
            "set engine.device: cuda and run it where the GPUs are",
            field="engine.device",
            found=config.device,
            allowed="cuda",
        )
    if engine.data_parallel != 1:
        raise ConfigError(
            "the tensorrt engine does not run replicas",
            "give each replica a trial of its own",
            field="engine.data_parallel",
            found=str(engine.data_parallel),
            allowed="1",
        )
    if spans_nodes(engine):
        _check_nodes(config)
    elif config.rendezvous is not None:
        raise ConfigError(
            "the gang was placed on several nodes, which the tensorrt engine must know beforehand",
            "say how many, or choose a gang that one node holds",
            field="engine.nodes",
            found=str(engine.nodes or "none"),
            allowed="the number of nodes",
        )


def _check_nodes(config: BackendConfig) -> None:
    engine = config.engine
    if config.rendezvous is None or config.rendezvous.reservation is None:
        raise ConfigError(
            "TensorRT-LLM's workers on several nodes are started by Ray, and there is no Ray here",
            "submit it to a Ray cluster",
            field="engine.nodes",
            found=str(engine.nodes),
            allowed="1",
        )
    if engine.gpus not in (None, engine.world_size):
        raise ConfigError(
            "each of TensorRT-LLM's workers has one GPU",
            "leave it out",
            field="engine.gpus",
            found=str(engine.gpus),
            allowed=str(engine.world_size),
        )
    if own_args(config).backend != "pytorch":
        raise ConfigError(
            "only TensorRT-LLM's PyTorch backend runs on several nodes",
            field=f"{FIELD}.backend",
            found=own_args(config).backend,
            allowed="pytorch",
        )


def _check_model(config: BackendConfig) -> None:
    model = config.model
    if model.quantization is not None:
        raise ConfigError(
            "TensorRT-LLM takes its quantisation from the checkpoint",
            f"name a checkpoint that ModelOpt has quantised in `model.id`; the KV cache has {FIELD}.kv_cache_config.dtype",
            field="model.quantization",
            found=model.quantization,
            allowed="null",
        )
    random = model.weights == "random" or model.config is not None
    if random and model.initializer_range is not None:
        raise ConfigError(
            "TensorRT-LLM draws random weights in its own way",
            "leave it out, or name the folder of a saved random checkpoint in `model.id`, the same for every engine",
            field="model.initializer_range",
            found=str(model.initializer_range),
            allowed="null",
        )
    load_format = config.engine.engine_args.get("load_format")
    if random and str(load_format or "dummy").lower() != "dummy":
        raise ConfigError(
            "random weights have no file to load", field=f"{FIELD}.load_format", found=str(load_format), allowed="dummy"
        )


def engine_arguments(
    config: BackendConfig, source: ModelSource, location: str, dtype: str, context_tokens: int | None
) -> dict[str, Any]:
    """Keyword arguments of TensorRT-LLM's LLM class; `kv_cache_config` as a mapping.

    Args:
        config: Checked by ``check_spec``.
        source: Where the model comes from.
        location: Hub id, or folder with at least a config.json.
        dtype: Number format of the weights, or ``auto``.
        context_tokens: Longest prompt plus output of the model; None where its config names no limit.

    Raises:
        ConfigError: `kv_cache_config` is no mapping.
    """
    given = foreign_args(config)
    cache = given.pop("kv_cache_config", None) or {}
    if not isinstance(cache, Mapping):
        raise ConfigError("wrong value", field=f"{FIELD}.kv_cache_config", found=repr(cache), allowed="a mapping")
    values: dict[str, Any] = {
        "model": location,
        "skip_tokenizer_init": True,
        "trust_remote_code": config.model.trust_remote_code,
        "dtype": dtype,
        "tensor_parallel_size": config.engine.tensor_parallel,
        "pipeline_parallel_size": config.engine.pipeline_parallel,
    }
    if source.kind == "hub" and config.model.revision is not None:
        values["revision"] = config.model.revision
    if source.random:
        values["load_format"] = "dummy"
    if context_tokens is not None:
        values["max_seq_len"] = context_tokens
    if own_args(config).backend == "pytorch":
        values["backend"] = "pytorch"
        values["stream_interval"] = 1
        if spans_nodes(config.engine):
            values |= ray_arguments(config.engine)
        if reads_stats(config):
            values["enable_iter_perf_stats"] = True
            values["max_stats_len"] = STATS_KEPT
    elif (longest := given.get("max_seq_len", context_tokens)) is not None:
        values["max_input_len"] = longest  # the engine would be built for prompts of 1024 tokens
    return values | given | {"kv_cache_config": cache_arguments(cache)}


def ray_arguments(engine: EngineSpec) -> dict[str, Any]:
    """Keyword arguments of the LLM class for workers that Ray starts on several nodes, but for where: see ``ray_workers``."""
    return {
        "orchestrator_type": "ray",
        "gpus_per_node": engine.world_size // (engine.nodes or 1),
        "allreduce_strategy": "NCCL",  # stated, so that it is known: what `AUTO` becomes between hosts is not
        "ray_worker_extension_cls": RAY_EXTENSION,
    }


def cache_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of KvCacheConfig: no block is reused and the share of memory is stated, unless the user says otherwise."""
    values: dict[str, Any] = {"enable_block_reuse": False}
    if "max_tokens" not in given:
        values["free_gpu_memory_fraction"] = DEFAULT_MEMORY_FRACTION
    return values | dict(given)


def sampling_arguments(request: Request, sampling: SamplingSpec, row: int, end_token_ids: Sequence[int]) -> dict[str, Any]:
    """Keyword arguments of TensorRT-LLM's SamplingParams.

    Args:
        request: What is asked.
        sampling: How tokens are chosen.
        row: Place of the request in its run: each draws from a seed of its own, as rows of one batch of the other engines do.
        end_token_ids: Ids that end an answer which does not ignore them.
    """
    ends = () if request.ignore_eos else tuple(end_token_ids)
    values: dict[str, Any] = {
        "max_tokens": request.max_new_tokens,
        "ignore_eos": request.ignore_eos,
        "end_id": ends[0] if ends else -1,  # without a tokenizer of its own the library insists on one
        "detokenize": False,
    }
    if len(ends) > 1:
        values |= {"stop_token_ids": list(ends[1:]), "include_stop_str_in_output": True}
    if sampling.temperature > 0:  # greedy is what the library does when nothing is said
        values |= {
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "seed": sampling.seed * 1_000_003 + row,
        }
        if sampling.top_k is not None:
            values["top_k"] = sampling.top_k
    return values
