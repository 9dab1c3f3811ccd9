"""The tensorrt engine where there is neither TensorRT-LLM nor a GPU: a stand-in for the library, and a machine that pretends.

Nothing of torch is touched: the engine asks a ``Machine`` for Python and GPUs, and gets ``PretendedMachine`` here.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llem_ray.backends.tensorrt_llm.backend import TensorrtBackend
from llem_ray.backends.tensorrt_llm.machine import Gpu
from llem_ray.core.backend import BackendConfig

FOLDER = str(Path(__file__).parent / "tensorrt_llm_fake")
GPUS = 2
UUIDS = tuple(f"GPU-0000000{index}-1111-2222-3333-444444444444" for index in range(GPUS))


@dataclass(frozen=True)
class PretendedMachine:
    """Two H100s and Python 3.12, whatever runs the tests."""

    version: tuple[int, int] = (3, 12)
    capability: tuple[int, int] = (9, 0)
    count: int = GPUS

    def python(self) -> tuple[int, int]:
        return self.version

    def gpus(self) -> tuple[Gpu, ...]:
        if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
            return ()
        return tuple(Gpu(name="Pretended GPU", uuid=uuid, capability=self.capability) for uuid in UUIDS[: self.count])


class PretendedBackend(TensorrtBackend):
    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config, PretendedMachine())


class BackendOfChild(PretendedBackend):
    """For a process that has nothing but the path of this folder."""

    def __init__(self, config: BackendConfig) -> None:
        sys.path.insert(0, FOLDER)
        importlib.import_module("tensorrt_llm._runtime").BEHAVIOUR.gpus = GPUS
        super().__init__(config)


class NvmlMachine(PretendedMachine):
    """Its GPUs are those of the (fake) NVML, as CUDA_VISIBLE_DEVICES numbers them."""

    def gpus(self) -> tuple[Gpu, ...]:
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        indices = range(pynvml.nvmlDeviceGetCount()) if visible is None else [int(index) for index in visible.split(",") if index]
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in indices]
        found = [Gpu(name="GPU", uuid=str(pynvml.nvmlDeviceGetUUID(one)), capability=self.capability) for one in handles]
        importlib.import_module("tensorrt_llm._runtime").BEHAVIOUR.gpus = len(found)
        return tuple(found)


class BackendOfCluster(TensorrtBackend):
    """For the hosts of a lab, where it is registered as `tensorrt`: see ``cluster_path``."""

    def __init__(self, config: BackendConfig) -> None:
        if FOLDER not in sys.path:  # in an interpreter of its own
            sys.path.insert(0, FOLDER)
        super().__init__(config, NvmlMachine())


def cluster_path() -> str:
    """PYTHONPATH of processes that find the stand-in, and this engine as `tensorrt`."""
    here = Path(__file__).parent
    return os.pathsep.join([str(here), str(here / "tensorrt_plugin"), FOLDER, os.environ.get("PYTHONPATH", "")])


@contextmanager
def fake_tensorrt(gpus: int = GPUS) -> Iterator[Any]:
    """Makes `tensorrt_llm` importable; yields what tells it how to behave. Afterwards it is gone, and what imported it."""
    sys.path.insert(0, FOLDER)
    importlib.invalidate_caches()
    visible = os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    try:
        behaviour = importlib.import_module("tensorrt_llm._runtime").BEHAVIOUR
        behaviour.reset()
        behaviour.gpus = gpus
        yield behaviour
    finally:
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        sys.path.remove(FOLDER)
        ours = ("llem_ray.backends.tensorrt_llm.engine", "llem_ray.backends.tensorrt_llm.preparing")
        for name in [name for name in sys.modules if name in ours or name.partition(".")[0] == "tensorrt_llm"]:
            del sys.modules[name]
