"""Weights quantised by bitsandbytes while they are read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Final

import torch
from transformers import BitsAndBytesConfig

from llem_ray.backends.transformers.arguments import BitsAndBytesArgs, TransformersArgs
from llem_ray.core.errors import ConfigError, LoadError
from llem_ray.core.spec import ModelSpec

LEAST_CAPABILITY: Final[Mapping[str, tuple[int, int]]] = {"bitsandbytes-8bit": (7, 5), "bitsandbytes-4bit": (6, 0)}
"""CUDA compute capability that bitsandbytes 0.50 asks for (its installation guide)."""


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
    if (existing := getattr(model_config, "quantization_config", None)) is not None:
        method = existing.get("quant_method") if isinstance(existing, Mapping) else getattr(existing, "quant_method", None)
        raise ConfigError(
            f"the checkpoint is quantised already ({method})",
            field="model.quantization",
            found=model.quantization,
            allowed="null",
        )
    # Activations in another format than float16 are cast, which the library tells for every layer.
    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast", category=UserWarning)
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
