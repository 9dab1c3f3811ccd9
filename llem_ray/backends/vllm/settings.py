"""Environment variables that vLLM reads: ours hold only where the user has set none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final, Literal

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


class EnvironmentDefaults:
    """Sets variables that are unset, and takes back those it set.

    Args:
        device: Where the engine runs.
        workers: Processes that share the model.
        eager: Nothing is to be compiled.
    """

    def __init__(self, device: Literal["cpu", "cuda"], *, workers: int, eager: bool) -> None:
        wanted = dict(QUIET)
        if device == "cpu":
            wanted |= CPU
            wanted |= CPU_EAGER if eager else {}
            # Each worker would start a thread for every core, and all wait for each other in every layer.
            wanted |= {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // workers))} if workers > 1 else {}
        self._wanted = wanted
        self._ours: dict[str, str] = {}

    def apply(self) -> None:
        """Set what is unset. To be called before vLLM or torch is imported."""
        for name, value in self._wanted.items():
            if name not in os.environ:
                os.environ[name] = self._ours[name] = value

    def take_back(self) -> None:
        """Unset what ``apply`` set and nobody has changed since."""
        for name, value in self._ours.items():
            if os.environ.get(name) == value:
                del os.environ[name]
        self._ours.clear()
