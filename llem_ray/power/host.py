"""What a host is: its stable id, and the facts that energy numbers depend on."""

from __future__ import annotations

import os
import platform
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import psutil

from llem_ray import __version__
from llem_ray.core.errors import PowerError
from llem_ray.power.nvml import driver_facts

_CONTAINER_CGROUP: Final = re.compile(r"docker|containerd|kubepods|libpod|lxc")


def host_id() -> str:
    """An id that stays the same for all processes and containers of this host until it reboots.

    ``LLEM_RAY_HOST_ID`` if set (Kubernetes: the downward API's ``spec.nodeName``), else the kernel's boot id, else the host name.
    """
    return os.environ.get("LLEM_RAY_HOST_ID") or _read(Path("/proc/sys/kernel/random/boot_id")) or socket.gethostname()


def read_host_facts() -> Mapping[str, Any]:
    """Facts for the ``nodes`` table; a fact that cannot be read is None.

    Keys: host_id, hostname, os, kernel, python, llem_ray, cpu_model, cpu_count_logical, cpu_count_physical, cpu_governor,
    memory_bytes, container (docker, kubernetes and the like), virtual_machine (True, False), and what
    ``nvml.driver_facts`` adds where an NVIDIA driver answers.
    """
    cpuinfo = _read(Path("/proc/cpuinfo")) or ""
    facts: dict[str, Any] = {
        "host_id": host_id(),
        "hostname": socket.gethostname(),
        "os": _os_name(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "llem_ray": __version__,
        "cpu_model": cpu_model(cpuinfo),
        "cpu_count_logical": psutil.cpu_count(),
        "cpu_count_physical": psutil.cpu_count(logical=False),
        "cpu_governor": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "memory_bytes": psutil.virtual_memory().total,
        "container": container_hint(),
        "virtual_machine": _is_virtual_machine(cpuinfo),
    }
    return facts | _nvidia_facts()


def cpu_model(cpuinfo: str) -> str | None:
    """Marketing name of the CPU in the text of /proc/cpuinfo; None where it has none (most ARM servers)."""
    for key in ("model name", "Model", "cpu model"):
        match = re.search(rf"^{key}\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
        if match and match[1].strip().lower() not in ("", "unknown"):
            return match[1].strip()
    return None


def container_hint(root: Path = Path("/")) -> str | None:
    """The kind of container this process seems to run in, or None: energy meters are often masked inside one."""
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        return "kubernetes"
    if (root / ".dockerenv").exists():
        return "docker"
    if (root / "run/.containerenv").exists():
        return "podman"
    match = _CONTAINER_CGROUP.search(_read(root / "proc/1/cgroup") or "")
    return match[0] if match else None


def _is_virtual_machine(cpuinfo: str) -> bool | None:
    flags = re.search(r"^flags\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return "hypervisor" in flags[1].split() if flags else None


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _nvidia_facts() -> dict[str, Any]:
    try:
        return dict(driver_facts())
    except PowerError:
        return {}


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip() or None
    except OSError:
        return None
