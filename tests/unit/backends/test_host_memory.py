"""What a host has for a process: memory and swap, within the limits of cgroups of both versions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from llem_ray.backends.host_memory import available_host_bytes, host_limit_bytes

MB = 10**6


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 MB of memory, of which 60 are free, and 20 MB of swap."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=100 * MB, available=60 * MB))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=20 * MB))


def tree(root: Path, own: str, files: Mapping[str, str | int]) -> Path:
    for name, text in {"proc/self/cgroup": own, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("own", "files", "limit_mb"),
    [
        ("0::/", {}, 120),
        ("0::/", {f"{V2}/memory.max": "max"}, 120),
        ("0::/", {f"{V2}/memory.max": 30 * MB}, 50),
        ("0::/", {f"{V2}/memory.max": 30 * MB, f"{V2}/memory.swap.max": "max"}, 50),
        ("0::/", {f"{V2}/memory.max": 30 * MB, f"{V2}/memory.swap.max": 0}, 30),
        ("0::/", {f"{V2}/memory.max": 30 * MB, f"{V2}/memory.swap.max": 5 * MB}, 35),
        ("0::/", {f"{V2}/memory.max": 500 * MB}, 120),
        # Slurm and systemd limit a group that lies deeper than what is mounted; so may one in between.
        ("0::/slurm/job", {f"{V2}/slurm/job/memory.max": 40 * MB, f"{V2}/slurm/job/memory.swap.max": 0}, 40),
        ("0::/a/b", {f"{V2}/a/memory.max": 10 * MB, f"{V2}/a/memory.swap.max": 0, f"{V2}/a/b/memory.max": "max"}, 10),
        # A container without a namespace of its own tells the path of the host.
        ("0::/docker/abc", {f"{V2}/memory.max": 30 * MB, f"{V2}/memory.swap.max": 0}, 30),
        ("4:memory:/a\n0::/", {f"{V1}/memory.limit_in_bytes": 2**63 - 4096}, 120),
        ("4:memory:/a\n0::/", {f"{V1}/memory.limit_in_bytes": 30 * MB}, 50),
        ("4:memory:/a", {f"{V1}/a/memory.limit_in_bytes": 30 * MB, f"{V1}/a/memory.memsw.limit_in_bytes": 33 * MB}, 33),
    ],
)
def test_the_limit(tmp_path: Path, own: str, files: dict[str, str | int], limit_mb: int) -> None:
    assert host_limit_bytes(tree(tmp_path, own, files)) == limit_mb * MB


def test_what_is_left_of_a_limit(tmp_path: Path) -> None:
    assert available_host_bytes(tmp_path) == 60 * MB
    for folder, names in ((V2, ("memory.max", "memory.current")), (V1, ("memory.limit_in_bytes", "memory.usage_in_bytes"))):
        root = tmp_path / folder.rpartition("/")[2]
        numbers = dict(zip((f"{folder}/{name}" for name in names), (50 * MB, 30 * MB), strict=True))
        tree(root, "0::/", {**numbers, f"{folder}/memory.stat": f"anon 7\ninactive_file {5 * MB}"})
        assert available_host_bytes(root) == 25 * MB
        (root / folder / names[0]).write_text("max")
        assert available_host_bytes(root) == 60 * MB
