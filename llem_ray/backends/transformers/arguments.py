"""What `engine.engine_args` may hold for the transformers engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from llem_ray.backends.engine_args import FIELD, parse_engine_args
from llem_ray.core.backend import BackendConfig
from llem_ray.core.errors import ConfigError

AttentionImplementation = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]

CPU_ATTENTION: Final = ("sdpa", "eager")


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformersArgs:
    """Arguments of the transformers engine."""

    attn_implementation: AttentionImplementation | None = None
    """How attention is computed; default: the model's own choice, usually `sdpa`."""
    num_threads: int | None = None
    """CPU threads of one operation; default: what torch finds."""


def check_arguments(config: BackendConfig) -> TransformersArgs:
    """Validate everything of ``config.engine``, and the model's number format.

    Raises:
        ConfigError: An argument is unknown or wrong, or asks for what this engine cannot do.
    """
    engine = config.engine
    args = parse_engine_args(TransformersArgs, engine.engine_args)
    for name in ("tensor_parallel", "pipeline_parallel", "data_parallel"):
        if (size := getattr(engine, name)) != 1:
            raise ConfigError(
                "the transformers engine runs a model on one device",
                "give each device a trial of its own, or pick an engine that splits models",
                field=f"engine.{name}",
                found=str(size),
                allowed="1",
            )
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
    if config.device == "cpu" and args.attn_implementation not in (None, *CPU_ATTENTION):
        raise ConfigError(
            "this attention needs an NVIDIA GPU",
            field=f"{FIELD}.attn_implementation",
            found=args.attn_implementation,
            allowed=f"{', '.join(CPU_ATTENTION)} on the CPU",
        )
    return args
