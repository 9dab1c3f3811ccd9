"""Environment variables that vLLM reads: ours hold only where the user has set none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final, Literal

from llem_ray.backends.interfaces import NETWORK_VARIABLES, interface_of
from llem_ray.core.backend import Rendezvous

QUIET: Final[Mapping[str, str]] = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
"""On every device. Standard output belongs to the command line, and nothing is reported to anyone during a measurement."""

CPU: Final[Mapping[str, str]] = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
"""On the CPU: engine core in this process, threads where Linux puts them, 1 GiB of KV cache."""

CPU_EAGER: Final[Mapping[str, str]] = {"TORCHDYNAMO_DISABLE": "1"}
"""On the CPU with `enforce_eager`: tensor parallelism would compile one small function for seconds in spite of it."""


SEVERAL_HOSTS: Final[Mapping[str, str]] = {"VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "2"}
"""In a gang on several hosts: workers seldom end by themselves in the 5 s that vLLM gives them; other hosts wait meanwhile."""


class EnvironmentDefaults:
    """Sets variables that are unset, and takes back those it set.

    Args:
        device: Where the engine runs.
        workers: Processes that share the model on this host.
        eager: Nothing is to be compiled.
        place: Where the gang meets; None where it is on this host alone.
    """

    def __init__(self, device: Literal["cpu", "cuda"], *, workers: int, eager: bool, place: Rendezvous | None = None) -> None:
        wanted = dict(QUIET)
        if device == "cpu":
            wanted |= CPU
            wanted |= CPU_EAGER if eager else {}
            # Each worker would start a thread for every core, and all wait for each other in every layer.
            wanted |= {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // workers))} if workers > 1 else {}
        self._wanted = wanted
        self._place = place
        self._ours: dict[str, str] = {}

    def apply(self) -> None:
        """Set what is unset. To be called before vLLM or torch is imported."""
        for name, value in (self._wanted | self._network()).items():
            if name not in os.environ:
                os.environ[name] = self._ours[name] = value

    def _network(self) -> dict[str, str]:
        """Left alone, vLLM and torch guess the address by which other hosts reach this one."""
        if self._place is None:
            return {}
        interface = interface_of(self._place.node_addr)
        named = dict.fromkeys(NETWORK_VARIABLES.values(), interface) if interface is not None else {}
        return {"VLLM_HOST_IP": self._place.node_addr, **named, **SEVERAL_HOSTS}

    def take_back(self) -> None:
        """Unset what ``apply`` set and nobody has changed since."""
        for name, value in self._ours.items():
            if os.environ.get(name) == value:
                del os.environ[name]
        self._ours.clear()
