"""Environment variables that decide how TensorRT-LLM starts its workers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

LAUNCHERS: Final = (
    "SLURM_",
    "PMI_",
    "PMIX_",
    "PRTE_",
    "OMPI_COMM_WORLD_",
    "OMPI_UNIVERSE_SIZE",
    "OMPI_FIRST_RANKS",
    "OMPI_NUM_APP_CTX",
    "OMPI_APP_CTX_",
    "OMPI_MCA_ess",
    "OMPI_MCA_orte_",
)
"""Set by a launcher (srun, mpirun) for its own tasks: MPI in our process would join that job instead of spawning workers."""

KEPT: Final = ("PMIX_MCA_",)
"""Tuning by the user, although the prefix is a launcher's."""

TAKEN_OUT: Final = ("TLLM_DISABLE_MPI", "RAY_LOCAL_WORLD_SIZE")
"""The first turns the workers over to Ray, the second switches TensorRT-LLM's count of GPUs off."""

VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
NO_VISIBLE: Final = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"

SET_BY_ORCHESTRATOR: Final = (NO_VISIBLE, "RAY_DEDUP_LOGS")
"""Its Ray orchestrator leaves these behind in the environment of the engine's process."""

MISLEADING_ORCHESTRATOR: Final = ("TLLM_RAY_FORCE_LOCAL_CLUSTER", "TRTLLM_RAY_PER_WORKER_GPUS", "TRTLLM_RAY_BUNDLE_INDICES")
"""They would lead its Ray workers to another cluster, or to other bundles than the gang's."""

SINGLE_PROCESS: Final = "TLLM_WORKER_USE_SINGLE_PROCESS"


class WorkerEnvironment:
    """Takes variables out that would lead the start of workers astray, and puts them back."""

    def __init__(self) -> None:
        self._taken: dict[str, str] = {}
        self._set: dict[str, str | None] = {}

    @property
    def shows_foreign_gpus(self) -> bool:
        """Whether GPUs were hidden from this process, which therefore must not use those it sees now."""
        return VISIBLE in self._taken

    def apply(self) -> None:
        """To be called before TensorRT-LLM is imported: the import initialises MPI.

        A check before there is a gang runs in a process that Ray shows no GPU; TensorRT-LLM cannot even judge arguments there.
        """
        if os.environ.get(VISIBLE) == "":
            self._taken[VISIBLE] = os.environ.pop(VISIBLE)
        for name in list(os.environ):
            launcher = name.startswith(LAUNCHERS) and not name.startswith(KEPT)
            if launcher or name in TAKEN_OUT:
                self._taken[name] = os.environ.pop(name)

    def apply_for_ray(self, gpu_ids: Sequence[str]) -> None:
        """The same, for workers that are started by Ray.

        Args:
            gpu_ids: The gang's GPUs of this host as Ray numbers them, which is NVML's order; empty before there is a gang. The
                library counts those that this process sees, and it must see no others.
        """
        self.apply()
        for name in MISLEADING_ORCHESTRATOR:
            if name in os.environ:
                self._taken[name] = os.environ.pop(name)
        for name in SET_BY_ORCHESTRATOR:
            self._set.setdefault(name, os.environ.get(name))
        self._assign("TLLM_DISABLE_MPI", "1")
        if gpu_ids:
            self._assign(VISIBLE, ",".join(gpu_ids))
            self._assign("CUDA_DEVICE_ORDER", "PCI_BUS_ID")

    def _assign(self, name: str, value: str) -> None:
        self._set.setdefault(name, os.environ.get(name))
        os.environ[name] = value

    def take_back(self) -> None:
        """Put back what ``apply`` took out and nobody has set since, and what was set for Ray."""
        for name, before in self._set.items():
            os.environ.pop(name, None)
            if before is not None:
                os.environ[name] = before
        self._set.clear()
        for name, value in self._taken.items():
            os.environ.setdefault(name, value)
        self._taken.clear()


def runs_in_this_process(workers: int) -> bool:
    """Whether the user has TensorRT-LLM's one worker run in the engine's process; by default it has one of its own."""
    return workers == 1 and os.environ.get(SINGLE_PROCESS) == "1"
