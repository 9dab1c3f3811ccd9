"""What execution asks of others: a gang, a sampler, an executor, and a call that may not answer.

Two implementers: ``inline`` (one process, for debugging and tests) and ``ray``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

from llem_ray.core.backend import LoadReport, Rank
from llem_ray.core.errors import ConfigError, PlacementError
from llem_ray.core.measure_spec import WarmupSpec, WindowSpec
from llem_ray.core.outcome import Outcome
from llem_ray.core.plan import LoadGroup
from llem_ray.core.power import SampleBatch, SamplerInfo
from llem_ray.core.spec import Experiment
from llem_ray.planning.packing import Seat

T_co = TypeVar("T_co", covariant=True)

GONE_HINT: Final = "its processes were killed: out of memory, or a signal to all of them; the same command goes on with the run"


class Call(Protocol[T_co]):
    """An answer that is on its way."""

    def result(self, timeout_s: float) -> T_co:
        """The answer.

        Raises:
            TimeoutError: It has not come within ``timeout_s``; asking again is allowed.
            LlemRayError: What the other side raised; EngineDied when its process is gone, Unreachable when that is not certain.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialOrder:
    """All an engine host needs to run one attempt at a trial."""

    trial_id: str
    attempt: int
    experiment: Experiment
    guard_s: float
    warmup: WarmupSpec = field(default=WarmupSpec(batches=0))
    min_window_s: float
    cooldown_s: float
    window: WindowSpec = field(default=WindowSpec())
    record_steps: bool = True
    no_power: str | None = "nobody tells it"
    """Why nobody will tell the gang's power while it warms up; None: somebody will, by ``Gang.tell_warmup``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PowerSeen:
    """How steady a gang's power was in the stretches of its warm-up that end with one of its batches."""

    batches: int
    """Number of that batch, from 1."""
    cv: float
    """Coefficient of variation of the stretches' mean powers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmupProgress:
    """How far a warm-up has come."""

    marks: tuple[tuple[int, int], ...] = ()
    """Batches that ran, and when that was, on the engine's host: the begin, and the ends of some of the latest batches."""
    over: bool = False
    """No more is to be told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A gang that is ready for trials."""

    report: LoadReport
    ranks: tuple[Rank, ...]
    refused: tuple[ConfigError, ...] = ()
    """Of workloads whose requests the model cannot take, found before it was loaded; their trials will fail so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leased:
    """What one process of a gang holds: known from its placement, before anything is loaded."""

    node: str
    """Stable host id, as the sampler of that host reports it."""
    hostname: str
    pid: int
    gpu_ids: tuple[str, ...]
    """As the scheduler names them: NVML indices or UUIDs; empty on the CPU."""
    gpu_uuids: tuple[str, ...] = ()
    """The same as UUIDs, resolved where the process runs; empty on the CPU, and where NVML does not answer there."""
    rank: int = 0
    """Number of the process in its gang."""
    address: str = "127.0.0.1"
    """IP address of its host, as the others of the gang reach it."""
    node_id: str = ""
    """The scheduler's name of its node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A machine, or a part of one, that gangs can be placed on."""

    node_id: str
    """The scheduler's name of it; another one after every restart."""
    hostname: str
    address: str
    gpus: int
    """Whole GPUs it has."""
    gpus_elsewhere: int = 0
    """Those of them that somebody who is not of this run holds."""
    gpu_type: str | None = None
    backend: str | None = None
    """The only engine whose gangs it takes; None: any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """Samples, and when the sampler was asked for them: an exchange that tells its clock."""

    batches: tuple[SampleBatch, ...]
    received_ns: int
    """When the question arrived, on the sampler's clock."""
    replied_ns: int
    """When the answer left, same clock."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerSettings:
    """How every sampler of a run works."""

    run: str
    """The run's name: a run driver that resumes it finds its samplers again."""
    sources: tuple[str, ...] | str
    """Names of power sources, or ``auto``."""
    sample_hz: float


class Gang(Protocol):
    """One engine on its devices: one process, or several that meet."""

    def lease(self) -> Call[tuple[Leased, ...]]:
        """Answered once all of the gang's processes run where they were placed; by rank, the leading one first."""
        ...

    def load(self) -> Call[Loaded]:
        """Check the engine's arguments, then load the model."""
        ...

    def run(self, order: TrialOrder) -> Call[Outcome]:
        """Run one attempt. What goes wrong in the trial comes back as Failed; an engine that died is raised."""
        ...

    def phase(self) -> str | None:
        """What the gang is doing now, or None when it does not answer at once."""
        ...

    def tell_warmup(self, trial_id: str, attempt: int, seen: PowerSeen | None) -> Call[WarmupProgress]:
        """Tell an attempt that warms up what was seen of the gang's power. Answered at once, also by an engine that is busy.

        Returns:
            How far it is; nothing where the attempt has not begun.
        """
        ...

    def close(self, timeout_s: float) -> None:
        """Unload and end the gang's processes: politely within ``timeout_s``, then by force. Never raises."""
        ...

    def last_words(self) -> str | None:
        """End of the log of a gang that died, or None."""
        ...


class Sampler(Protocol):
    """The power sampler of one node."""

    def host(self) -> Call[str]:
        """Stable id of the host it runs on. Answered before it samples."""
        ...

    def describe(self, skip: Sequence[str] = (), min_epoch: int = 1) -> Call[SamplerInfo]:
        """Answered when the sampler has calibrated and polls; the first call starts it.

        Args:
            skip: UUIDs of devices that another sampler of the same host reads.
            min_epoch: Its epoch is this or a later one.
        """
        ...

    def fetch(self, after_seq: int, epoch: int) -> Call[Fetched]:
        """All batches of ``epoch`` after ``after_seq``, up to now; those up to it are acknowledged and forgotten."""
        ...

    def probe(self) -> Call[tuple[int, int]]:
        """Its clock when the question arrived and when the answer left, ns."""
        ...

    def alive(self, pids: Sequence[int]) -> Call[tuple[int, ...]]:
        """Those of the processes that still exist on its host."""
        ...

    def close(self, *, force: bool = False) -> None:
        """Stop polling and end its process; with ``force`` nobody waits for its answer. Never raises."""
        ...


class Executor(Protocol):
    """Where gangs and samplers run."""

    def start(self) -> None:
        """Reach or start the machine. Raises PlacementError within a deadline."""
        ...

    def nodes(self) -> tuple[Node, ...]:
        """The nodes that are alive now.

        Raises:
            PlacementError: Whoever knows them does not answer.
        """
        ...

    def open_sampler(self, node: Node, settings: SamplerSettings) -> Sampler:
        """The sampler of a node: a fresh one, or the one that an earlier run driver of the same run left there."""
        ...

    def check(self, groups: Sequence[LoadGroup], base_dir: str, cache_dir: str) -> None:
        """Refuse engines, engine arguments and models that cannot work, before anything is measured.

        Raises:
            PluginError, ConfigError: What the engine's own check raises.
        """
        ...

    def open_gang(self, group: LoadGroup, seats: Sequence[Seat], base_dir: str, cache_dir: str) -> Gang:
        """Place a gang for the group on the seats, whose ``node`` is a ``Node.node_id``."""
        ...

    def quarantine(self, node_id: str, gpu_uuid: str) -> None:
        """Keep every gang off a GPU from now on. Never raises."""
        ...

    def ask_for_nodes(self, groups: Sequence[LoadGroup]) -> None:
        """Tell an autoscaler, where there is one, what is needed."""
        ...

    def wait(self, calls: Sequence[Call[Any]], timeout_s: float) -> Sequence[Call[Any]]:
        """Those of the calls that are answered; returns when all are, or after ``timeout_s``."""
        ...

    def is_gone(self) -> bool:
        """What it started is gone for good: nothing of it will ever answer again. Answered at once."""
        ...

    def facts(self) -> Mapping[str, str]:
        """For the environment record: executor name, Ray version, address."""
        ...

    def close(self) -> None:
        """End everything it started. Never raises."""
        ...


def raise_if_gone(executor: Executor) -> None:
    """End the run where nothing that the executor started is left.

    Raises:
        PlacementError: It is gone.
    """
    if executor.is_gone():
        raise PlacementError("Ray, started by this command, has ended", GONE_HINT)
