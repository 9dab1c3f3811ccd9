"""What works on every node of a cluster: the doctor's look, from a task on each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from llem_ray.core.errors import LlemRayError, PlacementError
from llem_ray.core.plan import LoadGroup, Plan
from llem_ray.execution.calls import Node
from llem_ray.execution.dispatch import gang_request, placement_problem
from llem_ray.execution.doctor import HostReport, examine_host, problem_of
from llem_ray.execution.engine_host import check_group
from llem_ray.execution.ray.address import Address
from llem_ray.execution.ray.base import as_node, checking_nodes, pinned
from llem_ray.execution.ray.connect import connect, probe_cluster
from llem_ray.execution.ray.runtime import answer_of, import_ray
from llem_ray.planning.packing import NodeRoom

ANSWER_TIMEOUT_S: Final = 180.0
"""Engines are imported in processes of their own, each with a shorter deadline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeReport:
    """A node of a cluster as llem-ray sees it."""

    hostname: str
    address: str
    gpus: int
    """GPUs that Ray hands out there."""
    gpu_type: str | None
    backend: str | None
    """The only engine whose gangs it takes; None: any."""
    host: HostReport | None
    """None when the node did not answer."""
    problem: str | None
    """What a sweep would stumble over there."""

    def as_dict(self) -> Mapping[str, Any]:
        """For JSON."""
        return asdict(self)


class _Doctor:
    """Examines the node it runs on."""

    def check(self, groups: Sequence[LoadGroup], base_dir: str) -> tuple[LlemRayError | None, ...]:
        return tuple(problem_of(lambda group: check_group(group, base_dir, None), group) for group in groups)

    def examine(self, interpreters: Sequence[tuple[str, str]], base_dir: str) -> HostReport:
        return examine_host(interpreters, base_dir)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterReport:
    """The nodes of a cluster, and a plan that could run there."""

    nodes: tuple[NodeReport, ...]
    plan: Plan | None
    problems: tuple[LlemRayError | None, ...]
    """What is wrong with each load of the plan, but for its memory."""


def survey_cluster(
    address: Address,
    interpreters: Sequence[tuple[str, str]] = (),
    base_dir: str = ".",
    make_plan: Callable[[int], Plan] | None = None,
) -> ClusterReport:
    """Examine every live node, and check a plan as `submit` does. Joins the cluster with this process.

    Args:
        address: Of the cluster.
        interpreters: As in ``examine_host``; the paths are those of the nodes.
        base_dir: Folder that relative paths start from, on every node.
        make_plan: The plan for so many GPUs.

    Raises:
        PlacementError: The cluster cannot be reached or joined from here.
    """
    probe_cluster(address)
    connect(address)
    ray = import_ray()
    try:
        nodes = [as_node(entry) for entry in ray.nodes() if entry["Alive"]]
        doctors = [
            ray.remote(num_cpus=0, num_gpus=0)(_Doctor).options(scheduling_strategy=pinned(n.node_id)).remote() for n in nodes
        ]
        asked = [doctor.examine.remote(tuple(interpreters), base_dir) for doctor in doctors]
        reports = []
        for node, ref in zip(nodes, asked, strict=True):
            host, problem = None, None
            try:
                host = answer_of(ref, ANSWER_TIMEOUT_S, f"the doctor on {node.hostname}")
                problem = _gpu_problem(node.gpus, host)
            except TimeoutError:
                problem = f"no answer within {ANSWER_TIMEOUT_S:g} s"
            except LlemRayError as error:
                problem = str(error)
            reports.append(
                NodeReport(
                    hostname=node.hostname,
                    address=node.address,
                    gpus=node.gpus,
                    gpu_type=node.gpu_type,
                    backend=node.backend,
                    host=host,
                    problem=problem,
                )
            )
        plan = make_plan(sum(node.gpus for node in nodes)) if make_plan is not None else None
        problems = _check_plan(plan, nodes, doctors) if plan is not None else ()
        return ClusterReport(nodes=tuple(reports), plan=plan, problems=problems)
    finally:
        with contextlib.suppress(Exception):
            ray.shutdown()


def _check_plan(plan: Plan, nodes: Sequence[Node], doctors: Sequence[Any]) -> tuple[LlemRayError | None, ...]:
    """What keeps each load of the plan from running: no room for its gang, or what its engine's check says on a node."""
    rooms = [
        NodeRoom(node=node.node_id, gpus=node.gpus, free_gpus=node.gpus, gangs=0, gpu_type=node.gpu_type, backend=node.backend)
        for node in nodes
    ]
    found: dict[str, LlemRayError | None] = {}
    if not plan.measure.wait_for_nodes_s:  # nodes that are to come may hold more
        for group in plan.groups:
            found[group.load_key] = placement_problem(group, gang_request(group, group.trials, plan.measure), rooms)
    for node, groups in checking_nodes(nodes, plan.groups):
        doctor = doctors[nodes.index(node)]
        what = f"the engines' check on {node.hostname}"
        told: Sequence[LlemRayError | None]
        try:
            told = answer_of(doctor.check.remote(tuple(groups), plan.base_dir), ANSWER_TIMEOUT_S, what)
        except TimeoutError:
            told = [PlacementError(f"{what} gave no answer within {ANSWER_TIMEOUT_S:g} s")] * len(groups)
        except LlemRayError as error:
            told = [error] * len(groups)
        for group, problem in zip(groups, told, strict=True):
            found[group.load_key] = found.get(group.load_key) or problem
    return tuple(found.get(group.load_key) for group in plan.groups)


def _gpu_problem(gpus: int, host: HostReport) -> str | None:
    seen = sum(device.scope in {"gpu", "module"} for source in host.sources if source.name == "nvml" for device in source.devices)
    if gpus > seen:
        return f"Ray hands out {gpus} GPUs there, but NVML shows {seen}: a gang on the others could not be measured"
    return None
