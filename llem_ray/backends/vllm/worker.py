"""What vLLM's workers tell about themselves. vLLM imports this inside every worker and mixes the class into its own."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import threading
import time
from typing import Any, Final

WORKER_EXTENSION: Final = "llem_ray.backends.vllm.worker.WorkerExtension"
GRACE_S: Final = 10.0
"""How long a worker may take to end by itself after its parent has."""


class WorkerExtension:
    """Methods for `collective_rpc`. Results hold only what msgpack can encode: anything else hangs the caller."""

    device: Any
    rank: int
    model_runner: Any
    compilation_config: Any

    def llem_ray_describe(self) -> dict[str, int | float | str]:
        """Rank, pid, UUID of the device (empty on the CPU), bytes of the weights this worker holds, seconds it compiled.

        From then on a worker with a process of its own ends with the one that started it. vLLM's own workers stay, and keep the
        GPU, where that was killed while they wait for another host.
        """
        parent = multiprocessing.parent_process()
        if parent is not None:
            threading.Thread(target=_end_with, args=(parent.pid,), name="llem-ray-parent", daemon=True).start()
        uuid = ""
        if self.device.type == "cuda":
            import torch  # noqa: PLC0415 - this module is imported by processes that have no torch

            uuid = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
        weights = sum(parameter.numel() * parameter.element_size() for parameter in self.model_runner.get_model().parameters())
        return {
            "rank": self.rank,
            "pid": os.getpid(),
            "gpu_uuid": uuid,
            "weight_bytes": weights,
            "compile_s": float(self.compilation_config.compilation_time),
        }


def _end_with(parent: int) -> None:
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        pass
    else:
        if os.getppid() == parent:
            ended = select.poll()
            ended.register(descriptor, select.POLLIN)
            ended.poll()
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)
