"""Builds the model: from a checkpoint, or with random weights from its config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from llem_ray.backends.model_config import count_parameters, weight_dtype
from llem_ray.backends.model_source import ModelSource
from llem_ray.backends.quantized_bits import weight_bits
from llem_ray.backends.transformers.adapter import add_adapter
from llem_ray.backends.transformers.arguments import TransformersArgs
from llem_ray.backends.transformers.memory import require_host_memory
from llem_ray.backends.transformers.quantization import avoid_packing, quantization_config, require_capability
from llem_ray.backends.transformers.random_checkpoint import random_checkpoint
from llem_ray.core.backend import BackendConfig
from llem_ray.core.errors import DeviceMemoryError
from llem_ray.core.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """How a model is shared by the ranks of this process's group."""

    tensor: int
    pipeline: int
    location: Path | None
    """Checkpoint of random weights, or None where the model has its own."""


def build_model(
    config: BackendConfig,
    source: ModelSource,
    args: TransformersArgs,
    model_config: Any,
    device: torch.device,
    split: Split | None = None,
) -> PreTrainedModel:
    """The model on its device or devices, or this rank's share of it, with its adapter, ready for inference.

    Random weights depend on the seed, the torch version and the device's kind. Where the model is split, spread over devices
    or quantised, they are the CPU's.

    Raises:
        ConfigError: The checkpoint is quantised already, or the adapter is not the model's.
        LoadError: The GPU is too old for the quantisation, or the adapter cannot be read.
        DeviceMemoryError: The host's memory, or that of the devices, cannot hold it.
    """
    model, known_dtype = config.model, weight_dtype(source, config.model, model_config, config.device)
    quantization, dtype = quantization_config(model, args, model_config, known_dtype), known_dtype or "auto"
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if args.attn_implementation is not None:
        options["attn_implementation"] = args.attn_implementation
    if device.type == "cpu":
        _require_memory(model_config, dtype, model, split)
    elif model.quantization is not None:
        require_capability(model.quantization, torch.cuda.get_device_capability(device))
    location: str | Path = source.location
    if split is not None:
        location = split.location or location
        options["distributed_config"] = DistributedConfig(tp_size=split.tensor, pp_size=split.pipeline)
    elif args.device_map is not None or quantization is not None:
        location = random_folder(config, source, model_config) if source.random else location
        options["device_map"] = args.device_map or {"": device}
        options |= {"quantization_config": quantization} if quantization is not None else {}
    elif device.type == "cuda" and not source.random:
        options["device_map"] = {"": device}
    if source.random and location == source.location:
        built = _draw(model, model_config, dtype, device, options)
    else:
        built = AutoModelForCausalLM.from_pretrained(
            location, config=model_config, revision=model.revision or "main", dtype=dtype, **options
        )
    if device.type == "cpu":
        avoid_packing(built)  # a checkpoint may be quantised already
    if device.type == "cuda" and args.device_map is not None:
        require_on_gpus(built)
    if args.lora is not None:
        built = add_adapter(config, model_config, built, merge=args.merge_lora)
    return built.eval()


def random_folder(config: BackendConfig, source: ModelSource, model_config: Any) -> Path:
    """Random weights on disk. Raises as ``random_checkpoint``."""
    model = config.model
    dtype = weight_dtype(source, model, model_config, config.device)
    assert dtype is not None
    needed = dtype.itemsize * count_parameters(model_config, trust_remote_code=model.trust_remote_code)
    return random_checkpoint(model, model_config, dtype, needed, Path(config.cache_dir))


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of this process's weights as they lie in memory, an adapter and the scales of quantised weights included."""
    total = 0
    for parameter in model.parameters():
        share = getattr(parameter, "_local_tensor", parameter)
        total += share.numel() * share.element_size()
    return total + sum(scale.numel() * scale.element_size() for module in model.modules() for scale in _scales(module))


def _scales(module: Any) -> Iterator[torch.Tensor]:
    """What bitsandbytes keeps beside a quantised weight: in the weight, and for 8 bits in the layer after the first use."""
    weight = getattr(module, "weight", None)
    kept = (getattr(holder, "SCB", None) for holder in (weight, getattr(module, "state", None)))
    yield from (scale for scale in kept if scale is not None)
    state = getattr(weight, "quant_state", None)
    while state is not None:
        yield from (part for part in (state.absmax, state.code, getattr(state, "offset", None)) if part is not None)
        state = getattr(state, "state2", None)


def require_on_gpus(model: Any) -> None:
    """Refuse what accelerate does where the GPUs are too small: leave layers in the host's memory, or on disk.

    Raises:
        DeviceMemoryError: It did.
    """
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if elsewhere := sorted(places & {"cpu", "disk", "meta"}):
        raise DeviceMemoryError(
            f"the GPUs of the gang do not hold the model: accelerate would leave layers on {', '.join(elsewhere)}",
            "set a larger engine.gpus",
        )


def _draw(model: ModelSpec, model_config: Any, dtype: Any, device: torch.device, options: dict[str, Any]) -> PreTrainedModel:
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        stack.enter_context(device)
        torch.manual_seed(model.seed)
        return AutoModelForCausalLM.from_config(model_config, dtype=dtype, **options)


def eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """Ids that end a text by the model's generation config; empty where it names none."""
    generation = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = getattr(model.config.get_text_config(), "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset(ids) if isinstance(ids, list | tuple) else frozenset((ids,))


def _require_memory(config: Any, dtype: Any, model: ModelSpec, split: Split | None) -> None:
    parameters = count_parameters(config, trust_remote_code=model.trust_remote_code)
    method, bits = weight_bits(config.to_dict(), model)
    if method is None:
        bits = 8 * (dtype if isinstance(dtype, torch.dtype) else torch.float32).itemsize
    elif bits is None:
        return
    ranks = 1 if split is None else split.tensor * split.pipeline
    needed, share = parameters * bits // 8 // ranks, "" if split is None else f" / {ranks} ranks"
    require_host_memory(needed, "the model", f"{parameters} parameters x {bits / 8:g} B{share} = {needed} B")
