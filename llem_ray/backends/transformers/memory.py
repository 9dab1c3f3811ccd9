"""How much memory a batch needs, and how much there is: refuse before Linux kills the process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import psutil

from llem_ray.backends.batch_memory import BatchMemory, batch_memory, size_text
from llem_ray.backends.model_shape import read_shape
from llem_ray.core.errors import DeviceMemoryError

__all__ = [
    "BatchMemory",
    "HostMemory",
    "available_host_bytes",
    "estimate_batch_memory",
    "host_limit_bytes",
    "require_host_memory",
]

LOOK_AGAIN_S: Final = 10.0

CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


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


def available_host_bytes() -> int:
    """Memory this process can still take: the host's, or what is left of its cgroup's limit if that is less."""
    available = int(psutil.virtual_memory().available)
    for files in CGROUP_FILES:
        left = _left_in_cgroup(*map(Path, files))
        if left is not None:
            available = min(available, left)
    return available


def host_limit_bytes() -> int:
    """Memory this process could take if nobody else took any: the host's and its swap, or its cgroup's limit if that is less."""
    limit = int(psutil.virtual_memory().total + psutil.swap_memory().total)
    for name, *_ in CGROUP_FILES:
        try:
            limit = min(limit, int(Path(name).read_text()))
        except (OSError, ValueError):
            continue  # no such cgroup version, or the limit is "max"
    return limit


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


def _left_in_cgroup(limit_file: Path, usage_file: Path, stat_file: Path) -> int | None:
    try:
        limit, usage = int(limit_file.read_text()), int(usage_file.read_text())
        stat = dict(line.split() for line in stat_file.read_text().splitlines())
    except (OSError, ValueError):
        return None  # no such cgroup version, or the limit is "max"
    # File pages count as usage but are dropped under pressure.
    reclaimable = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return max(0, limit - usage + reclaimable)
