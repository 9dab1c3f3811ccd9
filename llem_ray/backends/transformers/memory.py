"""How much memory a batch needs, and how much there is: refuse before Linux kills the process."""

from __future__ import annotations

import time
from typing import Any, Final

from llem_ray.backends.batch_memory import BatchMemory, batch_memory, size_text
from llem_ray.backends.host_memory import available_host_bytes
from llem_ray.backends.model_shape import read_shape
from llem_ray.core.errors import DeviceMemoryError

__all__ = ["BatchMemory", "HostMemory", "estimate_batch_memory", "require_host_memory"]

LOOK_AGAIN_S: Final = 10.0


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


class HostMemory:
    """What the host can hold, looked at again only for a larger need or after ``LOOK_AGAIN_S``: batches come in passes."""

    def __init__(self) -> None:
        self._enough_for_bytes = 0
        self._looked_s = 0.0

    def require(self, needed_bytes: int, what: str, arithmetic: str) -> None:
        """Refuse what does not fit. Raises as ``require_host_memory``."""
        now_s = time.monotonic()
        if needed_bytes > self._enough_for_bytes or now_s - self._looked_s > LOOK_AGAIN_S:
            require_host_memory(needed_bytes, what, arithmetic)
            self._enough_for_bytes, self._looked_s = needed_bytes, now_s
