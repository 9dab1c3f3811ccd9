"""What works on every node of a cluster: the doctor's look, from a task on each."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from llem_ray.core.errors import LlemRayError
from llem_ray.execution.doctor import HostReport, examine_host
from llem_ray.execution.ray.address import Address
from llem_ray.execution.ray.base import as_node, pinned
from llem_ray.execution.ray.connect import connect, probe_cluster
from llem_ray.execution.ray.runtime import answer_of, import_ray

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
    host: HostReport | None
    """None when the node did not answer."""
    problem: str | None
    """What a sweep would stumble over there."""

    def as_dict(self) -> Mapping[str, Any]:
        """For JSON."""
        return asdict(self)


class _Doctor:
    """Examines the node it runs on."""

    def examine(self, interpreters: Sequence[tuple[str, str]], base_dir: str) -> HostReport:
        return examine_host(interpreters, base_dir)


def survey_cluster(address: Address, interpreters: Sequence[tuple[str, str]] = (), base_dir: str = ".") -> tuple[NodeReport, ...]:
    """Examine every live node. Joins the cluster with this process.

    Args:
        address: Of the cluster.
        interpreters: As in ``examine_host``; the paths are those of the nodes.
        base_dir: Folder that relative paths start from, on every node.

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
                    host=host,
                    problem=problem,
                )
            )
        return tuple(reports)
    finally:
        with contextlib.suppress(Exception):
            ray.shutdown()


def _gpu_problem(gpus: int, host: HostReport) -> str | None:
    seen = sum(device.scope in {"gpu", "module"} for source in host.sources if source.name == "nvml" for device in source.devices)
    if gpus > seen:
        return f"Ray hands out {gpus} GPUs there, but NVML shows {seen}: a gang on the others could not be measured"
    return None
