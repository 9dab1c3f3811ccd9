"""What `engine.engine_args` may hold for the transformers engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from llem_ray.backends.engine_args import FIELD, parse_engine_args
from llem_ray.backends.lora import LoraArgs, parse_lora
from llem_ray.backends.transformers.combinations import check_combinations
from llem_ray.core.backend import BackendConfig
from llem_ray.core.errors import ConfigError
from llem_ray.core.spec import EngineSpec, ModelSpec

AttentionImplementation = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]

CPU_ATTENTION: Final = ("sdpa", "eager")
QUANTIZATIONS: Final = ("bitsandbytes-8bit", "bitsandbytes-4bit")
MANY: Final = 64
"""Larger sizes are not listed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineArgs:
    """Continuous batching, where requests come one by one. Names and defaults are the library's unless noted."""

    num_blocks: int | None = None
    """Blocks of the cache; default: on the CPU up to 64 and 1 GiB, on CUDA what `max_memory_percent` leaves room for."""
    page_size: int = 256
    """Tokens of a block."""
    max_batch_tokens: int | None = None
    """Token positions of one step, longer prompts are cut into chunks; default: 256 on the CPU, on CUDA by its memory."""
    max_requests_per_batch: int | None = None
    """Requests of one step; default 1024."""
    max_memory_percent: float | None = None
    """Share of the free memory that the cache may take, 0 to 1; default 0.9."""
    allow_block_sharing: bool = False
    """Prefixes that another request computed are reused. The library's default is true."""
    cudnn_attention: bool = True
    """`sdpa` may take cuDNN's kernels, as torch prefers on Hopper GPUs. They prepare anew for every number of requests and length
    of context: false makes steps of changing shapes several times faster there. Not of the library."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BitsAndBytesArgs:
    """Details of `model.quantization: bitsandbytes-8bit` or `bitsandbytes-4bit`."""

    int8_threshold: float | None = None
    """8 bits: activations beyond it are computed in 16 bits; default 6."""
    quant_type: Literal["nf4", "fp4"] | None = None
    """4 bits: number format; default nf4."""
    double_quant: bool | None = None
    """4 bits: the scales are quantised, too; default false."""
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """4 bits: number format of the arithmetic; default: the model's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileArgs:
    """torch.compile of the decode steps; `{}` takes its defaults. Implies a static cache."""

    backend: str = "inductor"
    """Compiler, as torch names it."""
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """What inductor tries."""
    dynamic: bool | None = None
    """One program for all sizes; default: torch makes one when a size changes."""
    fullgraph: bool = False
    """Refuse models that compile in pieces only."""


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
    """How long one rank waits for another in a step, and the longest step of continuous batching."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """Accelerate's way to spread the layers over the GPUs of one process, `engine.gpus` of them, one working at a time."""
    bitsandbytes: BitsAndBytesArgs | None = None
    """Details of the quantisation that `model.quantization` names."""
    lora: LoraArgs | None = None
    """A LoRA adapter over the model."""
    merge_lora: bool = False
    """Add it to the weights after loading, so that it costs nothing any more."""
    cache_implementation: Literal["dynamic", "static"] | None = None
    """`static` allocates a batch's cache at its full length; default: dynamic, static with `compile`."""
    compile: CompileArgs | None = None
    """Compile the decode steps."""
    online: OnlineArgs = OnlineArgs()
    """Continuous batching, where requests come one by one; batches take no notice of it."""

    @property
    def static_cache(self) -> bool:
        """The cache of a batch has a fixed size."""
        return self.cache_implementation == "static" or (self.compile is not None and self.cache_implementation is None)


def check_arguments(config: BackendConfig) -> TransformersArgs:
    """Validate everything of ``config.engine``, and the model's number format.

    Raises:
        ConfigError: An argument is unknown or wrong, or asks for what this engine cannot do.
    """
    args = parse_engine_args(TransformersArgs, config.engine.engine_args)
    check_combinations(
        config,
        device_map=args.device_map,
        lora=args.lora is not None,
        merge_lora=args.merge_lora,
        static_cache=args.static_cache,
        compiled=args.compile is not None,
    )
    _check_gang(config)
    _check_quantization(config, args.bitsandbytes)
    parse_lora(config.engine.engine_args, config.base_dir)
    if args.merge_lora and args.lora is None:
        raise ConfigError(
            "there is no adapter to merge", field=f"{FIELD}.merge_lora", found="true", allowed="false, or set `lora`"
        )
    _check_numbers(args)
    if config.device == "cpu" and args.attn_implementation not in (None, *CPU_ATTENTION):
        raise ConfigError(
            "this attention needs an NVIDIA GPU",
            field=f"{FIELD}.attn_implementation",
            found=args.attn_implementation,
            allowed=f"{', '.join(CPU_ATTENTION)} on the CPU",
        )
    if config.online and args.attn_implementation == "flex_attention":
        raise ConfigError(
            "continuous batching does not know this attention",
            field=f"{FIELD}.attn_implementation",
            found=args.attn_implementation,
            allowed="sdpa, eager, flash_attention_2, flash_attention_3",
        )
    if args.compile is not None and args.cache_implementation == "dynamic":
        raise ConfigError(
            "only steps over a cache of fixed size can be compiled",
            "leave it out",
            field=f"{FIELD}.cache_implementation",
            found="dynamic",
            allowed="static",
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


def require_plain(model: ModelSpec, existing: Any) -> None:
    """Refuse to quantise a checkpoint twice.

    Args:
        model: Says whether it is to be quantised.
        existing: The checkpoint's `quantization_config`, or None.

    Raises:
        ConfigError: It is quantised already.
    """
    if model.quantization is None or existing is None:
        return
    method = existing.get("quant_method") if isinstance(existing, Mapping) else getattr(existing, "quant_method", None)
    raise ConfigError(
        f"the checkpoint is quantised already ({method})", field="model.quantization", found=model.quantization, allowed="null"
    )


def _check_numbers(args: TransformersArgs) -> None:
    online = args.online
    counts = {
        "num_threads": args.num_threads,
        "online.num_blocks": online.num_blocks,
        "online.max_batch_tokens": online.max_batch_tokens,
        "online.max_requests_per_batch": online.max_requests_per_batch,
    }
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ConfigError("wrong value", field=f"{FIELD}.{name}", found=str(count), allowed="1 and more")
    if online.page_size < 4:
        raise ConfigError("wrong value", field=f"{FIELD}.online.page_size", found=str(online.page_size), allowed="4 and more")
    share = online.max_memory_percent
    if share is not None and not 0 < share <= 1:
        raise ConfigError(
            "wrong value", field=f"{FIELD}.online.max_memory_percent", found=f"{share:g}", allowed="above 0, up to 1"
        )
    for name in ("meet_timeout_s", "step_timeout_s"):
        if (timeout_s := getattr(args, name)) <= 0:
            raise ConfigError("wrong value", field=f"{FIELD}.{name}", found=f"{timeout_s:g}", allowed="more than 0")


def _check_quantization(config: BackendConfig, details: BitsAndBytesArgs | None) -> None:
    name = config.model.quantization
    if name is not None and name not in QUANTIZATIONS:
        raise ConfigError(
            "the transformers engine does not quantise weights in this way",
            "a checkpoint that is already quantised needs no `model.quantization`",
            field="model.quantization",
            found=name,
            allowed=f"null, {', '.join(QUANTIZATIONS)}",
        )
    bits = None if name is None else name.removeprefix("bitsandbytes-")
    allowed = {"8bit": ("int8_threshold",), "4bit": ("quant_type", "double_quant", "compute_dtype")}.get(bits or "", ())
    for argument in ("int8_threshold", "quant_type", "double_quant", "compute_dtype"):
        if details is not None and getattr(details, argument) is not None and argument not in allowed:
            raise ConfigError(
                f"has no meaning with `model.quantization: {name or 'null'}`",
                field=f"{FIELD}.bitsandbytes.{argument}",
                found=str(getattr(details, argument)),
                allowed=", ".join(allowed) or "nothing",
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
