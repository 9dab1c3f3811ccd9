"""How much memory a host has for this process: its own, or less where a cgroup limits it (containers, Slurm, systemd)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

ROOT: Final = Path("/")


def host_limit_bytes(root: Path = ROOT) -> int:
    """Memory this process could take if nobody else took any: RAM and swap, within the limits of its cgroups.

    Args:
        root: Where ``proc`` and ``sys`` lie.
    """
    swap = int(psutil.swap_memory().total)
    limits = (_limit_bytes(group, swap) for group in _groups(root))
    return min([int(psutil.virtual_memory().total) + swap, *(limit for limit in limits if limit is not None)])


def available_host_bytes(root: Path = ROOT) -> int:
    """Memory this process can still take without swapping: the host's, or what is left of a cgroup's limit if that is less."""
    left = (_left_bytes(group) for group in _groups(root))
    return min([int(psutil.virtual_memory().available), *(size for size in left if size is not None)])


@dataclass(frozen=True, slots=True)
class _Group:
    """A cgroup's folder, and how its version names things."""

    folder: Path
    limit: str
    usage: str
    cached: str
    swap: str
    swap_includes_memory: bool

    def read(self, name: str) -> int | None:
        """A number of bytes; None where there is none: no such file, or "max"."""
        try:
            return int((self.folder / name).read_text())
        except (OSError, ValueError):
            return None


def _groups(root: Path) -> Iterator[_Group]:
    """The cgroups of this process that may limit memory, from its own up to the topmost that is seen here."""
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2)}
    for folder in _upwards(mounted, paths.get("", "/")):
        yield _Group(folder, "memory.max", "memory.current", "inactive_file", "memory.swap.max", swap_includes_memory=False)
    own = next((path for controllers, path in paths.items() if "memory" in controllers.split(",")), "/")
    for folder in _upwards(mounted / "memory", own):
        yield _Group(
            folder,
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
            "memory.memsw.limit_in_bytes",
            swap_includes_memory=True,
        )


def _upwards(mounted: Path, path: str) -> Iterator[Path]:
    """Folders of a cgroup and those it lies in. In a container the path may be that of the host, which is not mounted there."""
    folder = mounted / path.strip("/")
    while folder != mounted:
        yield folder
        folder = folder.parent
    yield mounted


def _limit_bytes(group: _Group, swap_bytes: int) -> int | None:
    limit = group.read(group.limit)
    if limit is None:
        return None
    swap = group.read(group.swap)
    if swap is None:
        return limit + swap_bytes
    return min(limit + swap_bytes, swap) if group.swap_includes_memory else limit + min(swap, swap_bytes)


def _left_bytes(group: _Group) -> int | None:
    limit, usage = group.read(group.limit), group.read(group.usage)
    if limit is None or usage is None:
        return None
    try:
        stat = dict(line.split() for line in (group.folder / "memory.stat").read_text().splitlines())
        cached = int(stat.get(group.cached, stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None
    # File pages count as usage but are dropped under pressure.
    return max(0, limit - usage + cached)
