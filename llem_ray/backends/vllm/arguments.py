"""From the sweep file to the arguments of vLLM's EngineArgs. Needs no vLLM: its own config validates them afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from llem_ray.backends.engine_args import FIELD
from llem_ray.backends.lora import parse_lora
from llem_ray.backends.model_source import ModelSource
from llem_ray.backends.vllm.worker import WORKER_EXTENSION
from llem_ray.core.backend import BackendConfig, Rendezvous
from llem_ray.core.errors import ConfigError

RESERVED: Final[Mapping[str, str]] = {
    "model": "set `model.id` or `model.config`",
    "tokenizer": "set `model.tokenizer`",
    "revision": "set `model.revision`",
    "tokenizer_revision": "set `model.revision`",
    "dtype": "set `model.dtype`",
    "quantization": "set `model.quantization`",
    "trust_remote_code": "set `model.trust_remote_code`",
    "tensor_parallel_size": "set `engine.tensor_parallel`",
    "pipeline_parallel_size": "set `engine.pipeline_parallel`",
    "data_parallel_size": "set `engine.data_parallel`",
    "prefill_context_parallel_size": "the gang has `engine.tensor_parallel` x `engine.pipeline_parallel` GPUs",
    "device_ids": "it follows from where the gang is placed",
    "distributed_executor_backend": "it follows from `engine.tensor_parallel`",
    "nnodes": "set `engine.nodes`",
    "node_rank": "it follows from where the gang is placed",
    "master_addr": "it follows from where the gang is placed",
    "master_port": "a free port of the first host is taken",
    "skip_tokenizer_init": "prompts reach vLLM as token ids, the same for every engine",
    "worker_extension_cls": "llem-ray asks the workers for their GPUs through it",
    "enable_logging_iteration_details": "the steps in the dataset come from it",
    "enable_mfu_metrics": "the FLOPs in the dataset come from it",
    "disable_log_stats": "the steps in the dataset come from the statistics",
    "stream_interval": "the time of each token is measured",
}
"""Arguments that llem-ray sets itself, and what to do instead."""

EAGER_ARGUMENTS: Final = ("enforce_eager", "compilation_config", "optimization_level")
"""Who names one of these decides about compilation; otherwise the CPU runs eagerly."""

SPECULATION: Final = ("speculative_config", "spec_method", "spec_model", "spec_tokens")
"""Arguments each of which switches speculation on."""

OURS: Final = ("lora", "meet_timeout_s")
"""Arguments that vLLM does not know."""

MEET_TIMEOUT_S: Final = 300.0
"""Longest meeting of the processes of a gang, unless `engine_args.meet_timeout_s` says otherwise."""

DISTRIBUTED_TIMEOUT_S: Final = 600
"""Longest wait of one host for another inside torch.distributed: `distributed_timeout_seconds` of `engine_args`, and for gloo's
groups `cpu_distributed_timeout_seconds`. vLLM leaves both to torch: half an hour for gloo."""

LORA_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `max_lora_rank`."""


def check_spec(config: BackendConfig) -> None:
    """Refuse what needs no vLLM to be seen as wrong.

    Raises:
        ConfigError: An argument is one that llem-ray sets, or the model or engine asks for what this engine cannot do.
    """
    for name in config.engine.engine_args:
        if name in RESERVED or name.startswith("data_parallel_"):
            hint = RESERVED.get(name, RESERVED["data_parallel_size"])
            raise ConfigError("llem-ray sets this argument itself", hint, field=f"{FIELD}.{name}", found=name)
    parse_lora(config.engine.engine_args, config.base_dir)
    if config.engine.data_parallel != 1:
        raise ConfigError(
            "the vllm engine does not run replicas yet",
            "give each replica a trial of its own",
            field="engine.data_parallel",
            found=str(config.engine.data_parallel),
            allowed="1",
        )
    _check_hosts(config)
    model = config.model
    random = model.weights == "random" or model.config is not None
    if random and model.initializer_range is not None:
        raise ConfigError(
            "vLLM draws random weights in its own way, uniform in +-0.001",
            "leave it out, or name the folder of a saved random checkpoint in `model.id`, the same for every engine",
            field="model.initializer_range",
            found=str(model.initializer_range),
            allowed="null",
        )
    load_format = config.engine.engine_args.get("load_format")
    if random and load_format not in (None, "dummy"):
        raise ConfigError(
            "random weights have no file to load", field=f"{FIELD}.load_format", found=str(load_format), allowed="dummy"
        )


def place_of(config: BackendConfig) -> Rendezvous | None:
    """Where this process meets the others of its gang; None where it is alone."""
    place = config.rendezvous
    return place if place is not None and place.world_size > 1 else None


def local_workers(config: BackendConfig) -> int:
    """Workers of the gang on this host."""
    place = place_of(config)
    if place is None:
        return config.engine.world_size
    return config.engine.world_size // place.world_size * place.hosts.count(place.hosts[place.rank])


def meet_timeout_s(config: BackendConfig) -> float:
    """Longest meeting of the gang's processes.

    Raises:
        ConfigError: It is no positive number.
    """
    value = config.engine.engine_args.get("meet_timeout_s", MEET_TIMEOUT_S)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError("not a time", field=f"{FIELD}.meet_timeout_s", found=repr(value), allowed="seconds, more than 0")
    return float(value)


def _check_hosts(config: BackendConfig) -> None:
    """Refuse gangs that vLLM cannot spread over their hosts."""
    meet_timeout_s(config)
    place, engine = place_of(config), config.engine
    if place is None:
        return
    if engine.world_size % place.world_size:
        raise ConfigError(
            f"vLLM gives every host the same number of workers: tensor_parallel x pipeline_parallel = {engine.world_size}",
            field="engine.nodes",
            found=str(place.world_size),
            allowed=f"a divisor of {engine.world_size}",
        )
    if engine.pipeline_parallel > 1 and config.device == "cpu":
        raise ConfigError(
            "vLLM 0.32 does not pass activations between pipeline stages on CPUs of several hosts",
            "use tensor_parallel",
            field="engine.pipeline_parallel",
            found=str(engine.pipeline_parallel),
            allowed="1",
        )


def runs_eagerly(config: BackendConfig) -> bool:
    """Whether nothing is to be compiled: asked for, or the default of the CPU."""
    args = config.engine.engine_args
    if args.get("enforce_eager") is True:
        return True
    return config.device == "cpu" and not any(name in args for name in EAGER_ARGUMENTS)


def engine_arguments(
    config: BackendConfig, source: ModelSource, location: str, dtype: str, lora_rank: int | None = None
) -> dict[str, Any]:
    """Keyword arguments of vLLM's EngineArgs.

    Args:
        config: Checked by ``check_spec``.
        source: Where the model comes from.
        location: Hub id, or folder with at least a config.json.
        dtype: Number format of the weights, or ``auto``.
        lora_rank: Rank of the adapter, where there is one.
    """
    engine, model = config.engine, config.model
    values: dict[str, Any] = {
        "model": location,
        "revision": model.revision if source.kind == "hub" else None,
        "dtype": dtype,
        "quantization": model.quantization,
        "trust_remote_code": model.trust_remote_code,
        "tensor_parallel_size": engine.tensor_parallel,
        "pipeline_parallel_size": engine.pipeline_parallel,
        "skip_tokenizer_init": True,
        "worker_extension_cls": WORKER_EXTENSION,
        "enable_logging_iteration_details": True,
        "enable_mfu_metrics": True,
        "enable_prefix_caching": False,
        "use_tqdm_on_load": False,
    }
    if source.random:
        values["load_format"] = "dummy"
    if engine.tensor_parallel * engine.pipeline_parallel > 1:
        # Left out, vLLM takes Ray as soon as it finds itself in a placement group, and waits for GPUs that we hold.
        values["distributed_executor_backend"] = "mp"
    place = place_of(config)
    if place is not None:
        # The first host chooses the port at the meeting.
        values |= {"nnodes": place.world_size, "node_rank": place.rank, "master_addr": place.master_addr}
        values |= {"distributed_timeout_seconds": DISTRIBUTED_TIMEOUT_S, "cpu_distributed_timeout_seconds": DISTRIBUTED_TIMEOUT_S}
    if runs_eagerly(config):
        values["enforce_eager"] = True
    if any(engine.engine_args.get(name) is not None for name in SPECULATION):
        values["per_request_spec_decode_metrics"] = "summary"
    if lora_rank is not None:
        values["enable_lora"] = True
        values["max_lora_rank"] = next((rank for rank in LORA_RANKS if rank >= lora_rank), LORA_RANKS[-1])
    return values | {name: value for name, value in engine.engine_args.items() if name not in OURS}
