"""How a raylet is started on a host: by Ray's command line, since Ray itself is not imported here."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from llem_ray.testing.lab.spec import HostSpec
from llem_ray.testing.nvml import environment

GCS_PORT: Final = 6379
JOBS_PORT: Final = 8265
STARTED: Final = "Ray runtime started."
OBJECT_STORE_BYTES: Final = 150 * 10**6
FAST_HEALTH: Final = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}
"""Of the head: a silent host is dead after about 10 s instead of a minute."""
_OURS: Final = ("RAY_", "CUDA_", "NVIDIA_", "LLEM_RAY_", "PYTEST_", "GLOO_", "NCCL_", "LD_LIBRARY_PATH")
"""Variables that a host does not inherit from the creator."""


def ray_command() -> str | None:
    """The ``ray`` command beside this interpreter, or None."""
    return shutil.which("ray", path=str(Path(sys.executable).parent))


def host_environment(
    spec: HostSpec,
    *,
    host_id: str,
    home: Path,
    library: Path | None,
    scenario: Path,
    token: str | None,
    env: Mapping[str, str],
) -> dict[str, str]:
    """Environment of every process of a host.

    Args:
        spec: The host.
        host_id: What the host is called in the dataset: the kernel's boot id is the same on all of them.
        home: Its HOME.
        library: The fake NVML; None: the host has none.
        scenario: The scenario file of the fake NVML.
        token: Ray's token; None: authentication is off.
        env: The lab's further variables; the host's own go before.
    """
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(_OURS)}
    bin_folder = str(Path(sys.executable).parent)
    path = inherited.get("PATH", os.defpath)
    return {
        **inherited,
        "PATH": path if bin_folder in path.split(os.pathsep) else f"{bin_folder}{os.pathsep}{path}",
        "HOME": str(home),
        "HOSTNAME": spec.name,
        "HF_HUB_OFFLINE": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "eth0",
        "LLEM_RAY_HOST_ID": host_id,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # The hosts share the machine's memory: what other processes use is no reason to kill a worker here.
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_prestart_worker_first_driver": "0",
        **({"RAY_AUTH_MODE": "disabled"} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}),
        **(environment(library, scenario, base={}) if library is not None else {}),
        **env,
        **spec.env,
    }


def start_command(spec: HostSpec, ip: str, *, head_ip: str, dashboard: bool) -> list[str]:
    """Command that runs a host's raylet, and the head's GCS, until it is killed."""
    ray = ray_command()
    assert ray is not None, "Lab checks it first"
    if ip == head_ip:
        role = ["--head", f"--port={GCS_PORT}", f"--include-dashboard={dashboard}"]
        role += ["--dashboard-host=0.0.0.0", f"--dashboard-port={JOBS_PORT}"] if dashboard else []
    else:
        role = [f"--address={head_ip}:{GCS_PORT}"]
    command = [ray, "start", *role, "--block", "--disable-usage-stats", f"--node-ip-address={ip}", f"--node-name={spec.name}"]
    command += [f"--num-cpus={spec.num_cpus}", f"--num-gpus={len(spec.gpus) if spec.num_gpus is None else spec.num_gpus}"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}"]
    if spec.labels:
        command.append(f"--labels={_pairs(spec.labels)}")
    if spec.resources:
        command.append(f"--resources={json.dumps(dict(spec.resources))}")
    return command


def _pairs(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items())
