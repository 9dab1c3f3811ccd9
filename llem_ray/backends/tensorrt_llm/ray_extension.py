"""What TensorRT-LLM mixes into its Ray workers for us. They import this module, and nothing else of ours."""

from __future__ import annotations

import os


class WorkerExtension:
    """Methods of each worker, called over ``LLM._collective_rpc``. A name that the worker has already would be refused."""

    def llem_ray_pid(self) -> int:
        """Process id, on the worker's host."""
        return os.getpid()
