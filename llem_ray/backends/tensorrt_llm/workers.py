"""TensorRT-LLM's worker processes, which MPI starts for it: who they are, and that none is left."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Final

import psutil

from llem_ray.backends.tensorrt_llm.settings import runs_in_this_process
from llem_ray.core.backend import Rank

TERMINATE_S: Final = 2.0
KILL_S: Final = 2.0
LOOK_S: Final = 0.02

RANK_VARIABLES: Final = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
"""How MPI tells a process its number."""


class MpiWorkers:
    """Those of a loaded LLM object, on the GPUs in the order in which CUDA counts them.

    Args:
        started: Process ids of what came with the LLM object.
        host: Stable host id.
        gpu_uuids: Of the workers, by rank.
    """

    def __init__(self, started: frozenset[int], host: str, gpu_uuids: Sequence[str]) -> None:
        self._started = started
        self.in_this_process = runs_in_this_process(len(gpu_uuids))
        self._pids = {} if self.in_this_process else dict(ranked(started))
        self.ranks = tuple(
            Rank(rank=rank, host=host, pid=self._pids.get(rank, os.getpid()), gpu_uuid=uuid)
            for rank, uuid in enumerate(gpu_uuids)
        )

    @property
    def where(self) -> str:
        """Where they run, for the notes of a load."""
        if self._pids:
            return "in processes of their own"
        if self.in_this_process:
            return "in the engine's process"
        return "in processes of their own, whose ids MPI does not tell; the engine's process stands for them"

    def gone(self) -> int | None:
        """Number of a worker that has ended, if there is one."""
        return next((rank for rank, pid in sorted(self._pids.items()) if not is_alive(pid)), None)

    def end(self) -> None:
        """End what is left of the processes."""
        end(pid for pid in self._started if is_alive(pid))


def descendants() -> frozenset[int]:
    """Process ids of all that this process has started, and of theirs."""
    return frozenset(process.pid for process in psutil.Process().children(recursive=True))


def ranked(pids: Iterable[int]) -> Mapping[int, int]:
    """Rank -> process id, for those that MPI has given a rank."""
    found: dict[int, int] = {}
    for pid in sorted(pids):
        with suppress(psutil.Error, ValueError):
            environment = psutil.Process(pid).environ()
            name = next((name for name in RANK_VARIABLES if name in environment), None)
            if name is not None:
                found.setdefault(int(environment[name]), pid)
    return found


def is_alive(pid: int) -> bool:
    """Whether the process runs."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end(pids: Iterable[int]) -> None:
    """End these processes and all they have started; takes ``TERMINATE_S`` + ``KILL_S`` at most."""
    processes: set[psutil.Process] = set()
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            processes |= {process, *process.children(recursive=True)}
    for send, wait_s in ((psutil.Process.terminate, TERMINATE_S), (psutil.Process.kill, KILL_S)):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                send(process)
        deadline_s = time.monotonic() + wait_s
        while (processes := {process for process in processes if is_alive(process.pid)}) and time.monotonic() < deadline_s:
            time.sleep(LOOK_S)
