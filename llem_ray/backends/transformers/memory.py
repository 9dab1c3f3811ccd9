"""How much memory a batch needs, and how much there is: refuse before Linux kills the process."""

from __future__ import annotations

from typing import Any

from llem_ray.backends.batch_memory import BatchMemory, batch_memory, size_text
from llem_ray.backends.host_memory import available_host_bytes
from llem_ray.backends.model_shape import read_shape
from llem_ray.core.errors import DeviceMemoryError

__all__ = ["BatchMemory", "estimate_batch_memory", "require_host_memory"]


def estimate_batch_memory(
    config: Any, *, rows: int, prompt_tokens: int, new_tokens: int, element_bytes: int, eager: bool
) -> BatchMemory | None:
    """``batch_memory`` of transformers' text config; None where it does not tell the dimensions."""
    shape = read_shape(config.to_dict()) if hasattr(config, "to_dict") else None
    if shape is None:
        return None
    return batch_memory(
        shape, rows=rows, prompt_tokens=prompt_tokens, new_tokens=new_tokens, element_bytes=element_bytes, eager=eager
    )


def require_host_memory(needed_bytes: int, what: str, arithmetic: str) -> None:
    """Refuse what the host cannot hold.

    Raises:
        DeviceMemoryError: More is needed than is available; the message shows the arithmetic.
    """
    available = available_host_bytes()
    if needed_bytes > available:
        raise DeviceMemoryError(
            f"{what} needs about {size_text(needed_bytes)}, but {size_text(available)} of memory are available: {arithmetic}"
        )
