"""Gangs and samplers on an existing Ray cluster, which this process has joined."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from llem_ray.backends.memory_need import ENGINES
from llem_ray.core.errors import LlemRayError, RunInUse
from llem_ray.core.plan import LoadGroup
from llem_ray.execution.calls import Node, Sampler, SamplerSettings
from llem_ray.execution.ray.actors import ClaimActor
from llem_ray.execution.ray.address import Address
from llem_ray.execution.ray.base import BACKEND_LABEL, NO_BACKEND, RayExecutor, RaySampler, checking_nodes
from llem_ray.execution.ray.connect import ClusterFacts, connect, probe_cluster
from llem_ray.execution.ray.runtime import answer_of, first_line, import_ray

LOG = logging.getLogger(__name__)

CLAIM_TIMEOUT_S: Final = 30.0
CLAIM_WAIT_S: Final = 15.0
SPOOL_VARIABLE: Final = "LLEM_RAY_SPOOL"
DEFAULT_SPOOL: Final = "llem-ray-spool"


class ClusterExecutor(RayExecutor):
    """A cluster that others started, and others may use too.

    Samplers are detached and named after run and node, so that a run driver that resumes a run finds those of the one that died;
    they end themselves when nobody asks any more. Engines die with the run driver.

    Args:
        address: Of kind ``auto`` or ``gcs``.
        found: What a look at it showed a moment ago; None: look before joining.
    """

    def __init__(self, address: Address, found: ClusterFacts | None = None) -> None:
        super().__init__()
        self._address = address
        self._found = found
        self._facts: dict[str, str] = {}
        self._asked = False
        self._claim: Any = None

    def start(self) -> None:
        """Look at the cluster, then join it.

        Raises:
            PlacementError: It cannot be reached or joined from here; the message says why.
        """
        found = self._found or probe_cluster(self._address)
        context = connect(self._address)
        self._facts = {"executor": "ray-cluster", "ray": found.ray, "address": found.gcs_address, "nodes": str(len(found.alive))}
        session = (getattr(context, "address_info", None) or {}).get("session_dir")
        self._logs = Path(session) / "logs" if session else None

    def nodes(self) -> tuple[Node, ...]:
        """The nodes that Ray says are alive, with the GPUs that other jobs hold."""
        found = super().nodes()
        free = self._free_gpus()
        if free is None:
            return found
        mine = self._held_gpus()
        return tuple(
            replace(node, gpus_elsewhere=max(0, node.gpus - int(free.get(node.node_id, node.gpus)) - mine.get(node.node_id, 0)))
            for node in found
        )

    def _free_gpus(self) -> dict[str, float] | None:
        """Free GPUs by node; None where this Ray does not tell."""
        try:
            from ray._private.state import available_resources_per_node  # noqa: PLC0415 - Ray has no public call for it

            return {node_id: entry.get("GPU", 0.0) for node_id, entry in available_resources_per_node().items()}
        except Exception as error:  # noqa: BLE001 - private to Ray: without it others' GPUs show only when a placement waits
            LOG.debug("free GPUs are not known: %s", first_line(error))
            return None

    def open_sampler(self, node: Node, settings: SamplerSettings) -> Sampler:
        """The run's sampler on the node.

        Raises:
            RunInUse: Another run driver works on this run, on this cluster.
        """
        self._claim_run(settings.run)
        options = {
            "name": f"llem-ray-sampler-{settings.run}-{node.node_id}",
            "get_if_exists": True,
            "lifetime": "detached",
            "max_restarts": 0,
        }
        spool_dir = Path(os.environ.get(SPOOL_VARIABLE) or Path(tempfile.gettempdir()) / DEFAULT_SPOOL) / settings.run
        return RaySampler(self._sampler_actor(node, settings, options, spool_dir=str(spool_dir)))

    def _claim_run(self, run: str) -> None:
        """A name in the cluster that ends with this process: the lock of the run directory holds on one file system only."""
        if self._claim is not None:
            return
        ray = import_ray()
        name = f"llem-ray-run-{run}"
        until = time.monotonic() + CLAIM_WAIT_S
        while self._claim is None:
            try:
                claim = ray.remote(num_cpus=0)(ClaimActor).options(name=name).remote(socket.gethostname(), os.getpid())
                answer_of(claim.holder.remote(), CLAIM_TIMEOUT_S, "the claim of the run")
            except ValueError as error:  # the name is taken: Ray takes a moment to notice that a run driver was killed
                if time.monotonic() < until:
                    time.sleep(1.0)
                    continue
                raise RunInUse(
                    f"{_holder(name)} works on {run} on this cluster", "wait until it ends, or stop it there"
                ) from error
            except (LlemRayError, TimeoutError) as error:
                LOG.warning("the run could not be claimed on the cluster: %s", error)
                return
            self._claim = claim

    def check(self, groups: Sequence[LoadGroup], base_dir: str, _cache_dir: str) -> None:
        """Check every engine on a node of its kind, before anything is measured.

        Raises:
            LlemRayError: What an engine's check raises.
            PlacementError: No node can be asked.
        """
        if not groups:
            return
        for node, mine in checking_nodes(self.nodes(), groups):
            self.check_on(node.node_id, mine, base_dir, None)

    def _cache_dir(self, _cache_dir: str) -> str | None:
        return None

    def ask_for_nodes(self, groups: Sequence[LoadGroup]) -> None:
        """Ask the cluster's autoscaler for nodes that hold the largest gang of each engine."""
        bundles, selectors = wanted_nodes(groups, {node.backend for node in self.nodes() if node.backend is not None})
        with contextlib.suppress(Exception):  # without an autoscaler nothing comes of it, and the wait has a deadline
            from ray.autoscaler.sdk import request_resources  # noqa: PLC0415 - as import_ray

            request_resources(bundles=bundles, bundle_label_selectors=selectors)
            self._asked = True

    def facts(self) -> Mapping[str, str]:
        """For the environment record."""
        return dict(self._facts)

    def close(self) -> None:
        """Leave the cluster. Samplers have been closed by whoever opened them; what died hard ends with its lease."""
        with contextlib.suppress(Exception):
            if self._asked:  # a request stands until another takes its place
                import_ray().autoscaler.sdk.request_resources(bundles=[])
        with contextlib.suppress(Exception):
            import_ray().shutdown()


def wanted_nodes(
    groups: Sequence[LoadGroup], labels: Collection[str]
) -> tuple[list[dict[str, float]], list[dict[str, str]] | None]:
    """What an autoscaler is asked for: a bundle for each node of the largest gang, and the labels that the node must have.

    Args:
        groups: That wait for a place.
        labels: Engines that nodes of this cluster are for. Where there are some, it is asked for the largest gang of every
            engine, all of which may come to run at once, on nodes that are not for another one: its own, or unlabelled ones.
    """
    largest: dict[str | None, LoadGroup] = {}
    for group in groups:
        backend = group.experiment.engine.backend if labels else None
        if backend not in largest or group.gpus > largest[backend].gpus:
            largest[backend] = group
    known = {*labels, *ENGINES, *filter(None, largest), NO_BACKEND}
    bundles: list[dict[str, float]] = []
    selectors: list[dict[str, str]] = []
    for backend, group in largest.items():
        nodes = group.experiment.engine.nodes or 1
        bundles += [{"GPU": group.gpus // nodes} if group.gpus else {"CPU": 1}] * nodes
        selectors += [{BACKEND_LABEL: f"!in({','.join(sorted(known - {backend}))})"}] * nodes
    return bundles, selectors if labels else None


def _holder(name: str) -> str:
    with contextlib.suppress(Exception):
        ray = import_ray()
        host, pid = ray.get(ray.get_actor(name).holder.remote(), timeout=CLAIM_TIMEOUT_S)
        return f"process {pid} on {host}"
    return "another process"
