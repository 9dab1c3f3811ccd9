"""What `engine.engine_args` may hold for the transformers engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from llem_ray.backends.engine_args import FIELD, parse_engine_args
from llem_ray.core.backend import BackendConfig
from llem_ray.core.errors import ConfigError
from llem_ray.core.spec import EngineSpec

AttentionImplementation = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]

CPU_ATTENTION: Final = ("sdpa", "eager")
MANY: Final = 64
"""Larger sizes are not listed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformersArgs:
    """Arguments of the transformers engine."""

    attn_implementation: AttentionImplementation | None = None
    """How attention is computed; default: the model's own choice, usually `sdpa`."""
    num_threads: int | None = None
    """CPU threads of one operation; default: what torch finds, shared by the ranks of a host."""
    meet_timeout_s: float = 300.0
    """How long the processes of a gang wait for each other before they load."""
    step_timeout_s: float = 300.0
    """How long one rank waits for another in a step."""


def check_arguments(config: BackendConfig) -> TransformersArgs:
    """Validate everything of ``config.engine``, and the model's number format.

    Raises:
        ConfigError: An argument is unknown or wrong, or asks for what this engine cannot do.
    """
    engine = config.engine
    args = parse_engine_args(TransformersArgs, engine.engine_args)
    _check_gang(config)
    if config.model.quantization is not None:
        raise ConfigError(
            "the transformers engine does not quantise weights",
            "use `dtype`, or a checkpoint that is already quantised",
            field="model.quantization",
            found=config.model.quantization,
            allowed="null",
        )
    if args.num_threads is not None and args.num_threads < 1:
        raise ConfigError("wrong value", field=f"{FIELD}.num_threads", found=str(args.num_threads), allowed="1 and more")
    for name in ("meet_timeout_s", "step_timeout_s"):
        if (timeout_s := getattr(args, name)) <= 0:
            raise ConfigError("wrong value", field=f"{FIELD}.{name}", found=f"{timeout_s:g}", allowed="more than 0")
    if config.device == "cpu" and args.attn_implementation not in (None, *CPU_ATTENTION):
        raise ConfigError(
            "this attention needs an NVIDIA GPU",
            field=f"{FIELD}.attn_implementation",
            found=args.attn_implementation,
            allowed=f"{', '.join(CPU_ATTENTION)} on the CPU",
        )
    return args


def check_shape(engine: EngineSpec, model_config: Mapping[str, Any]) -> None:
    """Refuse to split a model into parts that are not equal.

    Args:
        engine: Says into how many.
        model_config: The model's config.json, or its text part; what it does not tell is not checked.

    Raises:
        ConfigError: A number of the model is not divisible by ``tensor_parallel``, or it has fewer layers than stages.
    """
    inner = model_config.get("text_config")
    numbers = inner if isinstance(inner, Mapping) else model_config
    size = engine.tensor_parallel
    for name in ("num_attention_heads", "num_key_value_heads", "vocab_size"):
        count = numbers.get(name)
        if isinstance(count, int) and count % size:
            raise ConfigError(
                f"the model's {name} ({count}) must be divisible by it",
                field="engine.tensor_parallel",
                found=str(size),
                allowed=", ".join(str(part) for part in range(1, min(count, MANY) + 1) if count % part == 0),
            )
    layers, stages = numbers.get("num_hidden_layers"), engine.pipeline_parallel
    if isinstance(layers, int) and stages > layers:
        raise ConfigError(
            f"the model has {layers} layers", field="engine.pipeline_parallel", found=str(stages), allowed=f"1 to {layers}"
        )


def _check_gang(config: BackendConfig) -> None:
    engine, place = config.engine, config.rendezvous
    if place is None and engine.world_size > 1:
        sizes = ("tensor_parallel", "pipeline_parallel", "data_parallel")
        name = next(name for name in sizes if getattr(engine, name) > 1)
        raise ConfigError(
            "the transformers engine needs one process for each rank, and this is the only one",
            "run it on a Ray cluster, or give each device a trial of its own",
            field=f"engine.{name}",
            found=str(getattr(engine, name)),
            allowed="1",
        )
    if place is not None and place.world_size != engine.world_size:
        raise ConfigError(
            "the transformers engine needs one process for each rank",
            field="engine",
            found=f"{place.world_size} processes for {engine.world_size} ranks",
            allowed=f"{engine.world_size} processes",
        )
