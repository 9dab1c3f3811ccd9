"""The Ray orchestrator: real actors in the placement group that it is given. Traps of the real one (executor/ray_executor.py and
ray_gpu_worker.py in versions near 1.2.1) that it has:

- it joins whatever cluster it finds, and only passes by where this process has joined one;
- an actor asks for one CPU where it is placed, so a bundle without one never takes a worker;
- workers get the whole environment of the caller, on whatever host: its CUDA_VISIBLE_DEVICES hides GPUs from them, and its raylet
  is not theirs;
- a worker takes GPU number ``ray.get_gpu_ids()[0]``, which must be an integer, of those that CUDA sees;
- rank 0 must be on the caller's host: it listens on the caller's address, where the others meet it;
- statistics are not there;
- a worker that is gone is not noticed: the others wait for it;
- shutdown asks the workers to end, and removes no placement group that it was given.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
from typing import Any

import pynvml
import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tensorrt_llm._facts import FACTS, arguments_class


class RayPlacementConfig(arguments_class("RayPlacementConfig", FACTS["ray_placement_config"])):  # type: ignore[misc]
    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        groups, indices, share = self.placement_groups, self.placement_bundle_indices, self.per_worker_gpu_share
        if (groups is None) != (indices is None):
            raise ValueError("placement_groups and placement_bundle_indices must be provided together")
        if groups is not None and len(groups) != len(indices):
            raise ValueError(
                f"placement_groups length ({len(groups)}) must equal placement_bundle_indices length ({len(indices)})"
            )
        for i, group in enumerate(groups or []):
            if not isinstance(group, PlacementGroup):
                raise TypeError(f"placement_groups[{i}] must be a Ray PlacementGroup, got {type(group).__name__}")
        if share is not None and not 0 < share <= 1.0:
            raise ValueError(f"per_worker_gpu_share must be between 0 and 1.0, got {share}")


class RayGPUWorker:
    """What an extension is mixed into."""

    def __init__(self, device_id: int) -> None:
        self.device_id = device_id

    def step(self) -> None:
        """Its share of one iteration."""


@ray.remote
class RayWorkerWrapper:
    def __init__(self, extension: str | None, world_size: int, rank: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.gpu = int(ray.get_gpu_ids()[0])
        self.local_gpu = self.physical_to_local_id(self.gpu)
        if os.environ["RAY_RAYLET_PID"] != str(os.getppid()):
            raise RuntimeError("this worker takes the raylet of another host for its own")
        if os.environ.get("TLLM_DISABLE_MPI") != "1":
            raise RuntimeError("MPI is on")
        self.worker_class: type = RayGPUWorker
        if extension is not None:
            module, name = extension.rsplit(".", 1)
            try:
                mixed_in = getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError) as error:
                raise RuntimeError(f"Failed to load worker extension '{extension}'") from error
            taken = [name for name in dir(mixed_in) if not name.startswith("__") and hasattr(RayGPUWorker, name)]
            if taken:
                raise ValueError(f"Worker class RayGPUWorker already defines '{taken[0]}'")
            self.worker_class = type(f"RayGPUWorkerWith{name}", (RayGPUWorker, mixed_in), {})

    def setup_tcp_store(self) -> int:
        self.store = socket.create_server((os.environ["MASTER_ADDR"], 0))
        return int(self.store.getsockname()[1])

    def setup_distributed_env_and_worker(self, port: int) -> None:
        if self.rank != 0:
            self.store = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=10)
        self.worker = self.worker_class(device_id=self.local_gpu)

    def report_device_id(self) -> str:
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        index = int(visible.split(",")[self.local_gpu]) if visible else self.local_gpu
        return str(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index)))

    def call_worker_method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self.worker, name):
            raise AttributeError(f"The RayGPUWorker has no method called '{name}'.")
        return getattr(self.worker, name)(*args, **kwargs)

    def shutdown(self) -> None:
        self.store.close()

    @staticmethod
    def physical_to_local_id(physical: int) -> int:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if not visible:
            return physical
        return list(map(int, visible.split(","))).index(physical)


class RayExecutor:
    def __init__(self, args: Any, world_size: int) -> None:
        os.environ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
        os.environ["RAY_DEDUP_LOGS"] = "0"
        runtime_env = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
        ray.init(address="auto", include_dashboard=False, namespace="trtllm", ignore_reinit_error=True, runtime_env=runtime_env)
        self.master_address = ray.util.get_node_ip_address()
        self.workers: list[Any] = []
        try:
            self._create_workers(args, world_size)
            port = ray.get(self.workers[0].setup_tcp_store.remote())
            ray.get([worker.setup_distributed_env_and_worker.remote(port) for worker in self.workers])
        except Exception:
            self.shutdown()
            raise

    def _create_workers(self, args: Any, world_size: int) -> None:
        config = args.ray_placement_config
        if config is None or config.placement_groups is None:
            raise NotImplementedError("this stand-in makes no placement group of its own")
        places = list(zip(config.placement_groups, config.placement_bundle_indices, strict=True))
        flat = [(group, index) for group, indices in places for index in indices]
        if len(flat) != world_size:
            raise ValueError(f"Total bundle indices ({len(flat)}) must equal world_size ({world_size})")
        share = 1.0 if config.per_worker_gpu_share is None else config.per_worker_gpu_share
        runtime_env = ray.runtime_env.RuntimeEnv()
        runtime_env["env_vars"] = dict(os.environ) | {"TLLM_DISABLE_MPI": "1", "MASTER_ADDR": self.master_address}
        for rank, (group, index) in enumerate(flat):
            place = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=index)
            options = {"num_gpus": share, "runtime_env": runtime_env, "scheduling_strategy": place}
            self.workers.append(
                RayWorkerWrapper.options(**options).remote(args.ray_worker_extension_cls, world_size, rank)  # type: ignore[attr-defined]
            )
        try:
            ray.get([worker.__ray_ready__.remote() for worker in self.workers])
        except ray.exceptions.ActorDiedError as error:
            raise RuntimeError("RayGPUWorker died during initialization") from error

    def collective_rpc(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None, non_block: bool, rank: int | None
    ) -> list[Any]:
        refs = []
        for worker in self.workers if rank is None else self.workers[rank : rank + 1]:
            try:
                refs.append(getattr(worker, method).remote(*args, **(kwargs or {})))
            except AttributeError:
                refs.append(worker.call_worker_method.remote(method, *args, **(kwargs or {})))
        return refs if non_block else ray.get(refs)

    def step(self) -> bool:
        """One iteration of all workers; False for ever once one is gone."""
        try:
            self.collective_rpc("step", (), None, False, None)
        except ray.exceptions.RayError:
            return False
        return True

    def shutdown(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get([worker.shutdown.remote() for worker in self.workers], timeout=30.0)
        self.workers = []
