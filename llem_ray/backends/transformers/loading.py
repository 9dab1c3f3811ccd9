"""Builds the model: from a checkpoint, or with random weights from its config."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from llem_ray.backends.model_config import count_parameters, weight_dtype
from llem_ray.backends.model_source import ModelSource
from llem_ray.backends.transformers.arguments import TransformersArgs
from llem_ray.backends.transformers.memory import require_host_memory
from llem_ray.core.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """How a model is shared by the ranks of this process's group."""

    tensor: int
    pipeline: int
    location: Path | None
    """Checkpoint of random weights, or None where the model has its own."""


def build_model(
    source: ModelSource, model: ModelSpec, args: TransformersArgs, config: Any, device: torch.device, split: Split | None = None
) -> PreTrainedModel:
    """The model on its device, or this rank's share of it, ready for inference.

    Random weights depend on the seed, the torch version and the device's kind; those of a split model are the CPU's.

    Raises:
        DeviceMemoryError: The host's memory cannot hold it.
    """
    dtype = weight_dtype(source, model, config, "cuda" if device.type == "cuda" else "cpu") or "auto"
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if args.attn_implementation is not None:
        options["attn_implementation"] = args.attn_implementation
    if device.type == "cpu":
        _require_memory(config, dtype, model.trust_remote_code, split)
    if split is not None:
        built = AutoModelForCausalLM.from_pretrained(
            split.location or source.location,
            config=config,
            revision=model.revision or "main",
            dtype=dtype,
            distributed_config=DistributedConfig(tp_size=split.tensor, pp_size=split.pipeline),
            **options,
        )
    elif source.random:
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
            stack.enter_context(device)
            torch.manual_seed(model.seed)
            built = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    else:
        if device.type == "cuda":
            options["device_map"] = {"": device}
        built = AutoModelForCausalLM.from_pretrained(
            source.location, config=config, revision=model.revision or "main", dtype=dtype, **options
        )
    return built.eval()


def eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """Ids that end a text by the model's generation config; empty where it names none."""
    generation = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = getattr(model.config.get_text_config(), "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset(ids) if isinstance(ids, list | tuple) else frozenset((ids,))


def _require_memory(config: Any, dtype: Any, trust_remote_code: bool, split: Split | None) -> None:
    parameters = count_parameters(config, trust_remote_code=trust_remote_code)
    element_bytes = (dtype if isinstance(dtype, torch.dtype) else torch.float32).itemsize
    ranks = 1 if split is None else split.tensor * split.pipeline
    needed, share = parameters * element_bytes // ranks, "" if split is None else f" / {ranks} ranks"
    require_host_memory(needed, "the model", f"{parameters} parameters x {element_bytes} B{share} = {needed} B")
