"""Shared memory that vLLM's CPU workers leave behind even when they end in good order."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Final

SEGMENT: Final = re.compile(r"/dev/shm/vllm_dist_[^\n]+?(?= \(deleted\)$|$)", re.MULTILINE)  # noqa: S108
RING: Final = re.compile(r"/dev/shm/psm_[0-9a-f]+$", re.MULTILINE)  # noqa: S108


def shared_segments(pids: Iterable[int], *, rings: bool = False) -> frozenset[Path]:
    """VLLM's segments that these processes have mapped, so that nobody else's are taken for ours.

    Args:
        pids: Of workers.
        rings: Also those by which they get orders, which stay when a process is killed. Not where this process made some: it
            removes them itself.
    """
    found: set[str] = set()
    for pid in pids:
        with suppress(OSError):
            maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
            found.update(SEGMENT.findall(maps), RING.findall(maps) if rings else ())
    return frozenset(map(Path, found))


def remove_segments(segments: Iterable[Path]) -> None:
    """Unlink what is still there."""
    for path in segments:
        with suppress(OSError):
            path.unlink()
            if path.name.startswith("psm_"):  # Python would look for it when this process ends, and complain
                resource_tracker.unregister(f"/{path.name}", "shared_memory")
