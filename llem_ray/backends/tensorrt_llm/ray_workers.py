"""TensorRT-LLM's workers as Ray actors in the gang's own placement group: for gangs of several nodes.

The library's Ray orchestrator would ask for a placement group of its own, which could never be granted beside the gang's. It is
told to use ours: rank i goes into bundle i, where a process of ours holds a small part of the one GPU, so Ray gives it that GPU
and no other. Which one it got is asked afterwards, and compared. This is the one module of an engine that needs Ray.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any, Final

from llem_ray.backends.tensorrt_llm.settings import NO_VISIBLE, VISIBLE
from llem_ray.backends.tensorrt_llm.waiting import within
from llem_ray.core.backend import BackendConfig, Rank, Rendezvous, Reservation
from llem_ray.core.errors import LoadError, PlacementError, PluginError

NAMESPACE: Final = "trtllm"
JOIN_S: Final = 60.0
IDENTIFY_S: Final = 60.0
LOOK_S: Final = 0.2
"""How long a look at the workers waits for their answers."""

OF_THIS_PROCESS: Final = (VISIBLE, "RAY_RAYLET_PID", "RAY_JOB_ID", "RAY_NODE_ID", "RAY_ADDRESS", "HOSTNAME")
"""The library hands the environment of this process to workers on all hosts: these, and ours (`OURS`), speak of this one."""
OURS: Final = "LLEM_RAY_"
SECRET: Final = ("RAY_AUTH_TOKEN",)
"""Each node's Ray has it; what is handed over stands in Ray's logs."""


def require_ray(reservation: Reservation) -> None:
    """Refuse an interpreter that could not join the cluster. Does not import Ray.

    Raises:
        PluginError: Ray is not installed here, or Ray or Python are of other versions than the cluster's.
    """
    try:
        found = metadata.version("ray")
    except metadata.PackageNotFoundError:
        found = None
    here = (found, platform.python_version())
    if here != (reservation.ray_version, reservation.python_version):
        raise PluginError(
            f"TensorRT-LLM starts its workers by Ray on several nodes: the engine's interpreter has"
            f" {'no Ray' if found is None else f'Ray {found}'} and Python {here[1]},"
            f" the cluster has Ray {reservation.ray_version} and Python {reservation.python_version}",
            "both must be the same: start the cluster in the environment that has TensorRT-LLM, or install this Ray beside it",
        )


def local_gpu_ids(rendezvous: Rendezvous) -> tuple[str, ...]:
    """Ray's numbers of the gang's GPUs on the host of this process.

    Raises:
        PluginError: Ray does not number them.
    """
    reservation = rendezvous.reservation
    assert reservation is not None
    named = [gpu for gpu in reservation.gpu_ids if not gpu.isdecimal()]
    if named:
        raise PluginError(
            f"TensorRT-LLM's Ray workers need GPUs with numbers, Ray calls them {', '.join(named)}",
            "start Ray there without UUIDs in CUDA_VISIBLE_DEVICES",
        )
    here = rendezvous.hosts[rendezvous.rank]
    return tuple(gpu for gpu, host in zip(reservation.gpu_ids, rendezvous.hosts, strict=True) if host == here)


def start_llm(llm_class: Any, arguments: Mapping[str, Any], reservation: Reservation) -> Any:
    """The library's LLM object, with its workers in the gang's bundles.

    Raises:
        LoadError: The cluster could not be joined. Errors of the library are raised as they are.
    """
    from tensorrt_llm.llmapi.llm_args import RayPlacementConfig  # noqa: PLC0415 - needed on several nodes only

    join_cluster(reservation)
    with environment_for_workers():
        config = RayPlacementConfig(
            placement_groups=[placement_group(reservation)],
            placement_bundle_indices=[list(range(len(reservation.gpu_ids)))],
            per_worker_gpu_share=reservation.gpu_share,
        )
        return llm_class(**arguments, ray_placement_config=config)


@contextmanager
def environment_for_workers() -> Iterator[None]:
    """The environment of this process without what would be wrong on another host, or would hide GPUs from the workers."""
    with _without(name for name in os.environ if name in OF_THIS_PROCESS + SECRET or name.startswith(OURS)):
        yield


@contextmanager
def _without(names: Iterable[str]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in list(names) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def join_cluster(reservation: Reservation) -> None:
    """Join the gang's cluster, unless this process is one of its actors.

    The library joins whatever cluster it finds, in the environment of the cluster; once this process has joined, it takes that.

    Raises:
        LoadError: Ray did not let us, or not within ``JOIN_S``.
    """
    import ray  # noqa: PLC0415 - as above

    if ray.is_initialized():
        return
    settings = {"py_executable": sys.executable, "env_vars": {NO_VISIBLE: "1"}}

    def join() -> None:
        ray.init(
            address=reservation.address,
            namespace=NAMESPACE,
            log_to_driver=False,
            configure_logging=False,
            runtime_env=settings,
        )

    try:
        with _without(OF_THIS_PROCESS):  # of the actor that started this process
            within(JOIN_S, f"to join the Ray cluster at {reservation.address}", join)
    except Exception as error:
        hint = "the engine's process has the environment of its node's Ray: token and TLS settings must be variables there"
        raise LoadError(f"the engine could not join the Ray cluster at {reservation.address}: {error}", hint) from error


def placement_group(reservation: Reservation) -> Any:
    """The gang's placement group, by its id: it belongs to the run driver."""
    from ray import PlacementGroupID  # noqa: PLC0415 - as above
    from ray.util.placement_group import PlacementGroup  # noqa: PLC0415

    return PlacementGroup(PlacementGroupID(bytes.fromhex(reservation.group)))


class RayWorkers:
    """The workers of a loaded LLM object.

    Args:
        llm: TensorRT-LLM's.
        config: With the gang's reservation.

    Raises:
        PlacementError: One runs on another GPU than the one in its bundle.
        HangError: They do not say who they are.
    """

    in_this_process = False
    where = "in Ray actors, each in its bundle of the gang's placement group"

    def __init__(self, llm: Any, config: BackendConfig) -> None:
        assert config.rendezvous is not None
        assert config.rendezvous.reservation is not None
        self._llm = llm
        self._asked: list[Any] = []
        uuids = within(IDENTIFY_S, "the workers' GPUs", lambda: list(llm._collective_rpc("report_device_id")))
        pids = within(IDENTIFY_S, "the workers' processes", lambda: list(llm._collective_rpc("llem_ray_pid")))
        hosts = config.rendezvous.hosts
        require_placed([as_uuid(uuid) for uuid in uuids], config.rendezvous.reservation.gpu_uuids, hosts)
        self.ranks = tuple(
            Rank(rank=rank, host=host, pid=int(pid), gpu_uuid=as_uuid(uuid))
            for rank, (host, pid, uuid) in enumerate(zip(hosts, pids, uuids, strict=True))
        )

    def gone(self) -> int | None:
        """Number of a worker that has ended, if there is one. A worker that only does not answer has not."""
        import ray  # noqa: PLC0415 - as above

        if not self._asked:
            self._asked = list(self._llm._collective_rpc("report_device_id", non_block=True))
        answered, _ = ray.wait(self._asked, num_returns=len(self._asked), timeout=LOOK_S)
        for rank, ref in enumerate(self._asked):
            if ref not in answered:
                continue
            try:
                ray.get(ref, timeout=LOOK_S)
            except ray.exceptions.ActorDiedError:
                return rank
            except ray.exceptions.RayError:
                continue  # it may answer the next time
        if len(answered) == len(self._asked):
            self._asked = []
        return None

    def end(self) -> None:
        """Nothing: the library has let them go, and the run driver removes the placement group with all that runs in it."""


def require_placed(found: list[str], placed: tuple[str, ...], hosts: tuple[str, ...]) -> None:
    """Refuse workers on other GPUs than those that were placed.

    Args:
        found: UUIDs by rank, as the workers see them.
        placed: UUIDs by rank, of the bundles; empty where they are not known.
        hosts: Host ids by rank.

    Raises:
        PlacementError: They differ, or two workers share a GPU.
    """
    if len(found) != len(hosts) or len(set(found)) != len(found):
        raise PlacementError(f"TensorRT-LLM has workers on {', '.join(found) or 'no GPU'}, the gang has {len(hosts)} GPUs")
    for rank, (uuid, expected) in enumerate(zip(found, placed, strict=False)):
        if uuid != expected:
            raise PlacementError(
                f"TensorRT-LLM's worker {rank} on {hosts[rank]} runs on {uuid}, its bundle has {expected}",
                "set CUDA_DEVICE_ORDER=PCI_BUS_ID where Ray starts, so that CUDA and NVML count GPUs alike",
            )


def as_uuid(text: str) -> str:
    """As NVML writes it."""
    return text if text.startswith(("GPU-", "MIG-")) else f"GPU-{text}"
