"""Which executor an address asks for."""

from __future__ import annotations

from llem_ray.core.errors import ConfigError
from llem_ray.execution.calls import Executor
from llem_ray.execution.ray.address import Address
from llem_ray.execution.ray.cluster import ClusterExecutor
from llem_ray.execution.ray.connect import ClusterFacts
from llem_ray.execution.ray.executor import EmbeddedRayExecutor


def make_executor(address: Address, cluster: ClusterFacts | None = None) -> Executor:
    """The executor for a run driver in this process.

    Args:
        address: Of any kind but ``jobs``, whose run driver is a process on the head.
        cluster: What a look at the cluster showed a moment ago; None: the executor looks itself.

    Raises:
        ConfigError: It is of kind ``jobs``.
    """
    if address.kind == "embedded":
        return EmbeddedRayExecutor()
    if address.kind == "jobs":
        raise ConfigError(
            "this command runs where it is called", field="--address", found=address.text, allowed="auto, HOST:PORT"
        )
    return ClusterExecutor(address, cluster)
