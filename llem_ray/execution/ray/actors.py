"""The actors: plain classes of ``execution`` that learn from Ray where they are."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from llem_ray.core.backend import Rendezvous
from llem_ray.core.plan import LoadGroup
from llem_ray.core.ports import reserve_port
from llem_ray.execution.calls import Leased
from llem_ray.execution.engine_host import EngineHost, check_group
from llem_ray.execution.ray.runtime import import_ray
from llem_ray.execution.sampler_host import SamplerHost
from llem_ray.power.sources import gpu_uuids

SAMPLER_NICENESS: Final = -10
ORPHAN_GRACE_S: Final = 60.0
"""A sampler whose lease has ended for so long ends its process: an idle node may then be taken away."""


class EngineActor(EngineHost):
    """EngineHost that learns its GPUs and its address from Ray."""

    def __init__(self, *args: Any, threads_are_ours: bool, rank: int = 0, **kwargs: Any) -> None:
        if not threads_are_ours:
            # Ray sets it to the actor's CPUs, of which we ask none: one thread, where the engine would choose its own number.
            os.environ.pop("OMP_NUM_THREADS", None)
        self._rank = rank
        super().__init__(*args, **kwargs)

    def lease(self) -> Leased:
        """Where this process runs, and which GPUs Ray gave it."""
        ray = import_ray()
        ids = tuple(str(gpu) for gpu in ray.get_runtime_context().get_accelerator_ids().get("GPU", []))
        leased = super().lease()
        return replace(
            leased,
            gpu_ids=ids,
            gpu_uuids=gpu_uuids(ids) if ids else (),
            rank=self._rank,
            address=ray.util.get_node_ip_address(),
            node_id=ray.get_runtime_context().get_node_id(),
        )

    def reserve_port(self) -> int:
        """A TCP port that is free here, and stays so for a minute."""
        return reserve_port()

    def meet(self, rendezvous: Rendezvous) -> Any:
        """Load, together with the other processes of the gang."""
        return self.load(rendezvous)


class SamplerActor(SamplerHost):
    """SamplerHost in a process of its own, ahead of the engine where the system allows it: a late poll is a lost sample."""

    def __init__(self, sources: Sequence[str] | str, sample_hz: float, lease_s: float, spool_dir: str | None) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, SAMPLER_NICENESS)
        super().__init__(sources, sample_hz, lease_s, spool_dir)
        self._end_after_s = lease_s + ORPHAN_GRACE_S
        threading.Thread(target=self._end_with_the_lease, name="llem-ray-lease", daemon=True).start()

    def _end_with_the_lease(self) -> None:
        while self.silence_s < self._end_after_s:
            time.sleep(5.0)
        os._exit(0)  # a detached actor: nobody else would ever end it


class CheckActor:
    """Checks engines on a node, without a GPU and without loading anything."""

    def check(self, groups: tuple[LoadGroup, ...], base_dir: str, cache_dir: str | None) -> None:
        """Raise what the first engine that cannot work raises."""
        for group in groups:
            check_group(group, base_dir, cache_dir)


class ClaimActor:
    """Holds the name of a run in a cluster for as long as its run driver lives."""

    def __init__(self, host: str, pid: int) -> None:
        self._holder = (host, pid)

    def holder(self) -> tuple[str, int]:
        """Host name and process id of the run driver."""
        return self._holder


class HolderActor:
    """Holds one GPU so that nobody else gets it."""

    def gpu(self) -> str | None:
        """UUID of the GPU that Ray gave it; None where it cannot be told."""
        ids = [str(gpu) for gpu in import_ray().get_runtime_context().get_accelerator_ids().get("GPU", [])]
        return next(iter(gpu_uuids(ids)), None)
