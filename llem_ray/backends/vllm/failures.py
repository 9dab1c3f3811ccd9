"""VLLM's errors, which are plain exceptions of every kind, as ours."""

from __future__ import annotations

import re
from typing import Final

import torch

from llem_ray.backends.model_config import first_line, load_error
from llem_ray.backends.model_source import ModelSource
from llem_ray.core.backend import BackendConfig
from llem_ray.core.errors import BackendError, DeviceMemoryError, EngineDied, GenerationError, HangError, LoadError

OUT_OF_MEMORY_TEXTS: Final = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "No available memory for the cache blocks",
    "is less than desired",
    "KV cache memory",
)
"""What vLLM's and torch's plain errors say when the device is too small."""

KILLED_AT_START: Final = re.compile(r"Failed core proc\(s\): .*?: -(\d+)")
"""What vLLM says when a signal ended its process before it was ready."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host was too small."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY_TEXTS)


def load_failure(config: BackendConfig, source: ModelSource, error: Exception) -> BackendError:
    """What a failed load is called.

    Args:
        config: What was to be loaded.
        source: Where the model comes from.
        error: As vLLM or a model's code raised it.
    """
    if isinstance(error, BackendError) and not isinstance(error, GenerationError):
        return error
    if is_out_of_memory(error):
        return DeviceMemoryError(f"the model does not fit: {first_line(error)}")
    if killed := KILLED_AT_START.search(str(error)):
        return EngineDied(f"vLLM's engine process was killed by signal {killed[1]} while it loaded {source.location!r}")
    failure = load_error(f"model {source.location!r}", error)
    if isinstance(error, TimeoutError):
        return HangError(failure.message)
    quantization = config.model.quantization
    if "root cause" in str(error):
        failure = LoadError(failure.message, "the cause stands on standard error, written by vLLM's own process")
    elif quantization is not None and failure.hint is None:
        hint = (
            f"`model.quantization: {quantization}` may be more than this {config.device} can do, or need a checkpoint made for it"
        )
        failure = LoadError(failure.message, hint)
    return failure


def whole_message(error: Exception) -> str:
    """The text of an exception without pydantic's address and dump of the input."""
    lines = (line.partition(" [type=")[0].strip() for line in str(error).splitlines())
    text = " ".join(line for line in lines if line and not line.startswith("For further information")) or type(error).__name__
    return text if len(text) <= 600 else text[:597] + "..."
