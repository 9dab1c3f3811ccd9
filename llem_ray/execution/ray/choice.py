"""Which executor an address asks for."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Final

from llem_ray.core.errors import ConfigError, PlacementError
from llem_ray.execution.calls import Executor
from llem_ray.execution.ray.address import Address
from llem_ray.execution.ray.executor import EmbeddedRayExecutor

CLUSTER: Final = "llem_ray.execution.ray.cluster"


def make_executor(address: Address) -> Executor:
    """The executor for a run driver in this process.

    Args:
        address: Of any kind but ``jobs``, whose run driver is a process on the head.

    Raises:
        ConfigError: It is of kind ``jobs``.
        PlacementError: This release cannot join a cluster.
    """
    if address.kind == "embedded":
        return EmbeddedRayExecutor()
    if address.kind == "jobs":
        raise ConfigError(
            "this command runs where it is called", field="--address", found=address.text, allowed="auto, HOST:PORT"
        )
    if find_spec(CLUSTER) is None:
        raise PlacementError("this release of llem-ray runs sweeps on the machine where it is called only")
    executor: Executor = import_module(CLUSTER).ClusterExecutor(address)
    return executor
