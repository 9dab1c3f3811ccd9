"""Runs gangs and samplers as actors of a Ray that somebody started or joined."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from llem_ray.core.errors import LlemRayError, PlacementError
from llem_ray.core.plan import LoadGroup
from llem_ray.core.power import SamplerInfo
from llem_ray.execution.calls import Call, Fetched, Gang, Node, Sampler, SamplerSettings
from llem_ray.execution.context import unsure_workloads
from llem_ray.execution.engines import worker_layout
from llem_ray.execution.ray.actors import CheckActor, EngineActor, HolderActor, SamplerActor
from llem_ray.execution.ray.gang import RayGang
from llem_ray.execution.ray.runtime import RayCall, answer_of, first_line, import_ray, wait_for
from llem_ray.planning.packing import Seat
from llem_ray.workloads.sources import Sources

LOG = logging.getLogger(__name__)

SAMPLER_LEASE_S: Final = 120.0
CHECK_TIMEOUT_S: Final = 120.0
HOLD_TIMEOUT_S: Final = 30.0
CLOSE_TIMEOUT_S: Final = 5.0
HELD_SHARE: Final = 0.1
"""Of a GPU, for a process of ours that only keeps a place: the rest is for the worker that the engine starts there by Ray."""
TYPE_RESOURCE: Final = "accelerator_type:"
TYPE_LABEL: Final = "ray.io/accelerator-type"
BACKEND_LABEL: Final = "llem-ray/backend"
"""Names the one engine whose gangs a node takes; a node without it takes any. An engine that is none keeps gangs away."""
NO_BACKEND: Final = "none"
"""The engine that is none, by its usual name."""


class RaySampler:
    """A sampler host in an actor of its own."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def host(self) -> RayCall[str]:
        """Stable id of its host."""
        return RayCall(self._actor.host.remote(), "sampler start")

    def describe(self, skip: Sequence[str] = (), min_epoch: int = 1) -> RayCall[SamplerInfo]:
        """Answered when calibrated."""
        return RayCall(self._actor.describe.remote(tuple(skip), min_epoch), "sampler start")

    def fetch(self, after_seq: int, epoch: int) -> RayCall[Fetched]:
        """Batches after ``after_seq``."""
        return RayCall(self._actor.fetch.remote(after_seq, epoch), "sampler fetch")

    def probe(self) -> RayCall[tuple[int, int]]:
        """Its clock."""
        return RayCall(self._actor.probe.remote(), "clock exchange")

    def alive(self, pids: Sequence[int]) -> RayCall[tuple[int, ...]]:
        """Processes that still exist there."""
        return RayCall(self._actor.alive.remote(tuple(pids)), "process check")

    def close(self, *, force: bool = False) -> None:
        """Stop polling, then kill the actor."""
        ray = import_ray()
        with contextlib.suppress(Exception):
            if not force:
                ray.get(self._actor.close.remote(), timeout=CLOSE_TIMEOUT_S)
        with contextlib.suppress(Exception):
            ray.kill(self._actor)


class RayExecutor:
    """What embedded Ray and a cluster have in common.

    A gang on GPUs has a placement group with one bundle for each of its nodes, pinned there: its GPUs are granted together
    or not at all, and each of its processes takes its own from the bundle. Where the engine starts workers by Ray, there is a
    bundle for each GPU, of which our process takes a part, so that Ray tells which GPU it is, and the worker the rest.
    """

    def __init__(self) -> None:
        self._sources: Sources | None = None
        self._holders: list[tuple[str, Any]] = []
        self._gangs: list[tuple[RayGang, tuple[Seat, ...]]] = []
        self._logs: Path | None = None
        self._lock = threading.Lock()

    def nodes(self) -> tuple[Node, ...]:
        """The nodes that Ray says are alive.

        Raises:
            PlacementError: Ray's head does not answer.
        """
        ray = import_ray()
        try:
            known = ray.nodes()
        except Exception as error:
            raise PlacementError(f"Ray's head does not answer: {first_line(error)}") from error
        return tuple(as_node(entry) for entry in known if entry["Alive"])

    def open_sampler(self, node: Node, settings: SamplerSettings) -> Sampler:
        """A sampler actor on the node, ended when this process is."""
        return RaySampler(self._sampler_actor(node, settings, {}, spool_dir=None))

    def _sampler_actor(self, node: Node, settings: SamplerSettings, options: Mapping[str, Any], spool_dir: str | None) -> Any:
        ray = import_ray()
        actor = ray.remote(num_cpus=0, num_gpus=0, max_concurrency=4)(SamplerActor)
        placed = actor.options(scheduling_strategy=pinned(node.node_id), **options)
        return placed.remote(settings.sources, settings.sample_hz, lease_s=SAMPLER_LEASE_S, spool_dir=spool_dir)

    def check(self, groups: Sequence[LoadGroup], base_dir: str, cache_dir: str) -> None:
        """Nothing: whoever submits to this host has checked here."""

    def check_on(self, node_id: str, groups: Sequence[LoadGroup], base_dir: str, cache_dir: str | None) -> None:
        """Check engines on a node.

        Raises:
            LlemRayError: What an engine's check raises.
            PlacementError: The node does not answer, or llem-ray is not installed there.
        """
        ray = import_ray()
        actor = ray.remote(num_cpus=0, num_gpus=0)(CheckActor).options(scheduling_strategy=pinned(node_id)).remote()
        try:
            answer_of(actor.check.remote(tuple(groups), base_dir, cache_dir), CHECK_TIMEOUT_S, "the engines' check")
        except TimeoutError as error:
            raise PlacementError(f"node {node_id[:12]} did not check the engines within {CHECK_TIMEOUT_S:g} s") from error
        finally:
            with contextlib.suppress(Exception):
                ray.kill(actor)

    def open_gang(self, group: LoadGroup, seats: Sequence[Seat], base_dir: str, cache_dir: str) -> Gang:
        """Engine actors that hold the group's GPUs on the seats."""
        ray = import_ray()
        processes = seats_of_processes(group, seats)
        shared = worker_layout(group.experiment.engine) == "ray"
        if shared:
            require_cpus(seats, ray.nodes())
        placement = _placement_group(seats, single=shared) if group.gpus else None
        unsure, all_unsure = unsure_workloads(group, base_dir)
        actors = []
        for rank, (index, gpus) in enumerate(processes):
            strategy = pinned(seats[index].node) if placement is None else _in_bundle(placement, rank if shared else index)
            hidden = {} if gpus else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
            actor = ray.remote(
                num_cpus=0,
                num_gpus=HELD_SHARE if shared else gpus,
                max_restarts=0,
                concurrency_groups={"watch": 1},
                runtime_env=hidden,
                scheduling_strategy=strategy,
            )(EngineActor)
            actors.append(
                actor.remote(
                    group.experiment.model,
                    group.experiment.engine,
                    group.gpus,
                    base_dir,
                    self._cache_dir(cache_dir),
                    sources=self._sources_of(group, base_dir),
                    online=group.online,
                    unsure=unsure,
                    all_unsure=all_unsure,
                    threads_are_ours="OMP_NUM_THREADS" in os.environ,
                    rank=rank,
                )
            )
        gang = RayGang(actors, placement, self._logs, 1.0 - HELD_SHARE if shared else None)
        with self._lock:
            self._gangs = [(known, held) for known, held in self._gangs if not known.closed] + [(gang, tuple(seats))]
        return gang

    def _held_gpus(self) -> dict[str, int]:
        """GPUs that this run holds, by node."""
        with self._lock:
            gangs, holders = list(self._gangs), list(self._holders)
        held: dict[str, int] = {}
        for gang, seats in gangs:
            for seat in () if gang.closed else seats:
                held[seat.node] = held.get(seat.node, 0) + seat.gpus
        for node_id, _ in holders:
            held[node_id] = held.get(node_id, 0) + 1
        return held

    def _cache_dir(self, cache_dir: str) -> str | None:
        """Where engines keep what they build: None lets each host choose."""
        return cache_dir

    def _sources_of(self, group: LoadGroup, base_dir: str) -> Sources:
        """Prompts and lengths from files and data sets, read here: other hosts may not have them."""
        with self._lock:
            if self._sources is None:
                self._sources = Sources(base_dir)
            return self._sources.part([trial.experiment.workload for trial in group.trials])

    def quarantine(self, node_id: str, gpu_uuid: str) -> None:
        """Hold the GPU: take one after the other of those that are free on the node, and keep that one."""
        ray = import_ray()
        taken: list[Any] = []
        try:
            while True:
                actor = ray.remote(num_cpus=0, num_gpus=1)(HolderActor).options(scheduling_strategy=pinned(node_id)).remote()
                taken.append(actor)
                if answer_of(actor.gpu.remote(), HOLD_TIMEOUT_S, "quarantine") == gpu_uuid:
                    self._holders.append((node_id, taken.pop()))
                    return
        except (LlemRayError, TimeoutError) as error:
            LOG.error("GPU %s could not be held: %s", gpu_uuid, error)  # noqa: TRY400 - the text says it all
        finally:
            for actor in taken:
                with contextlib.suppress(Exception):
                    ray.kill(actor)

    def ask_for_nodes(self, groups: Sequence[LoadGroup]) -> None:
        """Nothing: this host is all there is."""

    def is_gone(self) -> bool:
        """Not known: a cluster's head may come back."""
        return False

    def wait(self, calls: Sequence[Call[Any]], timeout_s: float) -> Sequence[Call[Any]]:
        """Those that are answered."""
        return wait_for(calls, timeout_s)


def checking_nodes(nodes: Sequence[Node], groups: Sequence[LoadGroup]) -> list[tuple[Node, list[LoadGroup]]]:
    """Which node checks which groups' engines: the first of the kind that they run on. Where there is none, nobody does."""
    shares: dict[str, list[LoadGroup]] = {}
    for group in groups:
        backend = group.experiment.engine.backend
        able = (node for node in nodes if node.backend in {None, backend} and (node.gpus or not group.gpus))
        if (first := next(able, None)) is not None:
            shares.setdefault(first.node_id, []).append(group)
    return [(node, shares[node.node_id]) for node in nodes if node.node_id in shares]


def seats_of_processes(group: LoadGroup, seats: Sequence[Seat]) -> list[tuple[int, int]]:
    """Seat number and GPUs of every process of a gang, by rank: ranks fill one seat after the other.

    Raises:
        PlacementError: The engine's ranks cannot be spread evenly.
    """
    engine = group.experiment.engine
    if worker_layout(engine) == "host" or engine.world_size == 1:
        return [(index, seat.gpus) for index, seat in enumerate(seats)]
    if engine.world_size % len(seats):
        raise PlacementError(f"{engine.world_size} ranks cannot be spread evenly over {len(seats)} nodes", "set engine.nodes")
    if group.gpus % engine.world_size:
        raise PlacementError(f"{group.gpus} GPUs cannot be dealt evenly to {engine.world_size} ranks", "leave engine.gpus out")
    share = engine.world_size // len(seats)
    return [(index, group.gpus // engine.world_size) for index in range(len(seats)) for _ in range(share)]


def require_cpus(seats: Sequence[Seat], known: Sequence[Mapping[str, Any]]) -> None:
    """Refuse nodes without a CPU for each worker that an engine starts by Ray: its placement would be waited for in vain.

    Args:
        seats: The gang's.
        known: What ``ray.nodes()`` tells.

    Raises:
        PlacementError: One has too few.
    """
    cpus = {entry["NodeID"]: int(entry.get("Resources", {}).get("CPU", 0)) for entry in known}
    for seat in seats:
        if cpus.get(seat.node, 0) < seat.gpus:
            raise PlacementError(
                f"node {seat.node[:12]} has {cpus.get(seat.node, 0)} CPUs in Ray, the engine's workers there need {seat.gpus}",
                "Ray places an actor of the engine's own only where a CPU is free: start that node with a larger --num-cpus",
            )


def _placement_group(seats: Sequence[Seat], *, single: bool) -> Any:
    """A bundle for each seat; ``single``: for each GPU, with the CPU that Ray asks to place an actor of the engine's own."""
    bundles = [({"GPU": 1, "CPU": 1}, seat.node) for seat in seats for _ in range(seat.gpus)]
    if not single:
        bundles = [({"GPU": seat.gpus}, seat.node) for seat in seats]
    return import_ray().util.placement_group(
        [resources for resources, _ in bundles],
        strategy="STRICT_PACK" if len(seats) == 1 else "PACK" if single else "STRICT_SPREAD",
        bundle_label_selector=[{"ray.io/node-id": node} for _, node in bundles],
    )


def pinned(node_id: str) -> Any:
    """Scheduling on this node or not at all."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415 - as import_ray

    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _in_bundle(placement: Any, index: int) -> Any:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # noqa: PLC0415 - as import_ray

    return PlacementGroupSchedulingStrategy(placement, placement_group_bundle_index=index)


def as_node(entry: Mapping[str, Any]) -> Node:
    """A node as ``ray.nodes()`` tells it."""
    resources, labels = entry.get("Resources", {}), entry.get("Labels") or {}
    named = next((name.removeprefix(TYPE_RESOURCE) for name in resources if name.startswith(TYPE_RESOURCE)), None)
    return Node(
        node_id=entry["NodeID"],
        hostname=entry["NodeManagerHostname"],
        address=entry["NodeManagerAddress"],
        gpus=int(resources.get("GPU", 0)),
        gpu_type=labels.get(TYPE_LABEL) or named,
        backend=labels.get(BACKEND_LABEL) or None,
    )
