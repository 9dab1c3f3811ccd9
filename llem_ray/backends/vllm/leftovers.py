"""Shared memory that vLLM's CPU workers leave behind even when they end in good order."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

SEGMENT: Final = re.compile(r"/dev/shm/vllm_dist_[^\n]+?(?= \(deleted\)$|$)", re.MULTILINE)  # noqa: S108


def shared_segments(pids: Iterable[int]) -> frozenset[Path]:
    """VLLM's segments that these processes have mapped, so that nobody else's are taken for ours."""
    found: set[Path] = set()
    for pid in pids:
        with suppress(OSError):
            found.update(map(Path, SEGMENT.findall(Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace"))))
    return frozenset(found)


def remove_segments(segments: Iterable[Path]) -> None:
    """Unlink what is still there."""
    for path in segments:
        with suppress(OSError):
            path.unlink(missing_ok=True)
