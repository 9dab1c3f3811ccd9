"""Weights quantised by bitsandbytes while they are read."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from llem_ray.backends.transformers.arguments import BitsAndBytesArgs, TransformersArgs, require_plain
from llem_ray.core.errors import LoadError
from llem_ray.core.spec import ModelSpec

LEAST_CAPABILITY: Final[Mapping[str, tuple[int, int]]] = {"bitsandbytes-8bit": (7, 5), "bitsandbytes-4bit": (6, 0)}
"""CUDA compute capability that bitsandbytes 0.50 asks for (its installation guide)."""
PACKED_ROWS: Final = 32


def quantization_config(
    model: ModelSpec, args: TransformersArgs, model_config: Any, dtype: torch.dtype | None
) -> BitsAndBytesConfig | None:
    """How weights are quantised while they are read; None where they are not.

    Args:
        model: Names the method.
        args: Its details.
        model_config: transformers config of the checkpoint.
        dtype: Of what is not quantised, and of the arithmetic unless ``args`` names another.

    Raises:
        ConfigError: The checkpoint is quantised already.
    """
    if model.quantization is None:
        return None
    require_plain(model, getattr(model_config, "quantization_config", None))
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of every cast of every layer in every step
    details = args.bitsandbytes or BitsAndBytesArgs()
    if model.quantization == "bitsandbytes-8bit":
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=6.0 if details.int8_threshold is None else details.int8_threshold
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=details.quant_type or "nf4",
        bnb_4bit_use_double_quant=bool(details.double_quant),
        bnb_4bit_compute_dtype=dtype if details.compute_dtype is None else getattr(torch, details.compute_dtype),
    )


def require_capability(quantization: str, capability: tuple[int, int]) -> None:
    """Refuse a GPU that bitsandbytes does not support.

    Args:
        quantization: Method.
        capability: CUDA compute capability of the device.

    Raises:
        LoadError: It is too old.
    """
    least = LEAST_CAPABILITY[quantization]
    if capability < least:
        raise LoadError(
            f"this GPU has compute capability {capability[0]}.{capability[1]}, {quantization} needs {least[0]}.{least[1]}",
            "leave out model.quantization, or name another engine.gpu_type",
        )


def avoid_packing(model: PreTrainedModel) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes packs 4-bit weights anew, and fails for layers that no whole blocks fill.

    Those are computed as on other CPUs.
    """
    module: Any
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and (module.in_features % state.blocksize or module.out_features % PACKED_ROWS):
            module.support_avx512bf16_for_cpu = False
