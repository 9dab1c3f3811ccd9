"""Whether the models of a plan can fit where they are to run: asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from llem_ray.backends.checkpoint_files import StoredWeights, local_config, read_stored_weights
from llem_ray.backends.host_memory import host_limit_bytes
from llem_ray.backends.memory_need import ENGINES, MemoryNeed, estimate_need, model_name
from llem_ray.backends.model_shape import read_shape
from llem_ray.backends.model_source import find_model
from llem_ray.core.errors import ConfigError, DeviceMemoryError, PlacementError
from llem_ray.core.plan import LoadGroup
from llem_ray.core.power import Device, SamplerInfo
from llem_ray.execution.meter import GPU_SCOPES
from llem_ray.power.sources import list_gpus

LIMIT: Final = "memory_limit_bytes"
"""Among a host's facts: what ``host_limit_bytes`` says there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupMemory:
    """What a load group needs on each device, and what that means here."""

    need: MemoryNeed | None
    unknown: str | None
    """Why ``need`` is None."""
    available_bytes: int | None
    """Memory of the largest device it could run on; None where there is none, or where that is not known."""

    @property
    def refusal(self) -> str | None:
        """Why it cannot fit; None where it may."""
        return self.need.refusal(self.available_bytes) if self.need and self.available_bytes is not None else None

    @property
    def doubt(self) -> str | None:
        """Why it may not fit; None where it should."""
        return self.need.doubt(self.available_bytes) if self.need and self.available_bytes is not None else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        told = self.need.as_dict() if self.need is not None else {}
        return told | {
            "unknown": self.unknown,
            "available_bytes": self.available_bytes,
            "refusal": self.refusal,
            "doubt": self.doubt,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """Memory of what gangs can be placed on."""

    gpu_bytes: tuple[int | None, ...]
    """Of each GPU; None where NVML does not tell."""
    host_bytes: tuple[int, ...]
    """Of each host."""

    def largest(self, *, on_gpu: bool) -> int | None:
        """The largest; None where there is none, or where one is unknown."""
        known = [size for size in (self.gpu_bytes if on_gpu else self.host_bytes) if size is not None]
        return max(known) if known and (not on_gpu or len(known) == len(self.gpu_bytes)) else None


def local_devices() -> Devices:
    """Those of this host."""
    return Devices(gpu_bytes=tuple(gpu.memory_bytes for gpu in list_gpus()), host_bytes=(host_limit_bytes(),))


def cluster_devices(infos: Iterable[SamplerInfo]) -> Devices:
    """Those that the samplers of a cluster see."""
    known = list(infos)
    gpus = (device.memory_bytes for info in known for device in info.devices if device.scope in GPU_SCOPES)
    hosts = (host_bytes(info.host) for info in known)
    return Devices(gpu_bytes=tuple(gpus), host_bytes=tuple(size for size in hosts if size))


def with_memory_limit(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Facts of this host, and what a process could take of its memory: with swap, within its container's limit."""
    return {**facts, LIMIT: host_limit_bytes()}


def host_bytes(facts: Mapping[str, Any]) -> int | None:
    """Memory that a process of the host could take, by its facts; None where they do not tell."""
    size = facts.get(LIMIT) or facts.get("memory_bytes")
    return int(size) if size else None


def group_memory(group: LoadGroup, base_dir: str, devices: Devices) -> GroupMemory:
    """What the group needs, from files of this host alone. Never raises for a model that is wrong: others refuse it.

    Args:
        group: Whose model and engine.
        base_dir: Folder that relative paths start from.
        devices: What it could run on.
    """
    need = _need(group, base_dir)
    available = devices.largest(on_gpu=is_on_gpu(group))
    if isinstance(need, str):
        return GroupMemory(need=None, unknown=need, available_bytes=available)
    return GroupMemory(need=need, unknown=None, available_bytes=available)


def require_memory(groups: Sequence[LoadGroup], base_dir: str, devices: Devices) -> None:
    """Refuse models that cannot fit on any of the devices.

    Raises:
        PlacementError: One cannot; the message shows the arithmetic.
    """
    for group in groups:
        if refused := memory_problem(group, group_memory(group, base_dir, devices), hosts=len(devices.host_bytes)):
            raise refused


def memory_problem(group: LoadGroup, memory: GroupMemory, *, hosts: int) -> PlacementError | None:
    """The refusal of a model that cannot fit; None where it may.

    Args:
        group: Whose model and engine.
        memory: What it needs.
        hosts: How many there are.
    """
    if memory.need is None or memory.refusal is None:
        return None
    experiment = group.experiment
    message = f"{model_name(experiment.model)} on {experiment.engine.backend} {memory.refusal}"
    return PlacementError(message, memory.need.remedy(hosts))


def require_placed(group: LoadGroup, base_dir: str, devices: Sequence[Device]) -> None:
    """Refuse to load a model onto GPUs that cannot hold it.

    Args:
        group: Whose model and engine.
        base_dir: Folder that relative paths start from.
        devices: What the gang holds; the largest of its GPUs counts.

    Raises:
        DeviceMemoryError: It cannot fit; the message shows the arithmetic.
    """
    if not is_on_gpu(group):
        return
    gpus = Devices(gpu_bytes=tuple(item.memory_bytes for item in devices if item.scope in GPU_SCOPES), host_bytes=())
    memory = group_memory(group, base_dir, gpus)
    if memory.need is not None and memory.refusal is not None:
        raise DeviceMemoryError(f"{model_name(group.experiment.model)} {memory.refusal}", memory.need.remedy())


def is_on_gpu(group: LoadGroup) -> bool:
    """The group's gang runs on GPUs."""
    device = group.experiment.engine.device
    return device == "cuda" or (device == "auto" and group.gpus > 0)


def _need(group: LoadGroup, base_dir: str) -> MemoryNeed | str:
    experiment = group.experiment
    if experiment.engine.backend not in ENGINES:
        return f"how much the {experiment.engine.backend} engine takes is its own affair"
    try:
        source = find_model(experiment.model, base_dir)
        config, folder = local_config(source, experiment.model)
    except ConfigError as error:
        return error.message
    if not config:
        return f"the config of {source.location} is not on this host: the engine checks it before it loads the weights"
    shape = read_shape(config)
    if shape is None:
        return "the model's config does not tell its dimensions"
    stored: StoredWeights | None = None
    if folder is not None and not source.random:
        stored = read_stored_weights(folder, shape.layers, tied=bool(config.get("tie_word_embeddings")))
    experiments = {trial.cell.cell_id: trial.experiment for trial in group.trials}
    return estimate_need(config, shape, stored, list(experiments.values()), on_gpu=is_on_gpu(group), random=source.random)
