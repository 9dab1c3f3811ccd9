"""What execution asks of others: a gang, a sampler, an executor, and a call that may not answer.

Two implementers: ``inline`` (one process, for debugging and tests) and ``ray``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from llem_ray.core.backend import LoadReport, Rank
from llem_ray.core.outcome import Outcome
from llem_ray.core.plan import LoadGroup
from llem_ray.core.power import SampleBatch, SamplerInfo
from llem_ray.core.spec import Experiment

T_co = TypeVar("T_co", covariant=True)


class Call(Protocol[T_co]):
    """An answer that is on its way."""

    def result(self, timeout_s: float) -> T_co:
        """The answer.

        Raises:
            TimeoutError: It has not come within ``timeout_s``; asking again is allowed.
            LlemRayError: What the other side raised; EngineDied when its process is gone.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialOrder:
    """All an engine host needs to run one attempt at a trial."""

    trial_id: str
    attempt: int
    experiment: Experiment
    guard_s: float
    warmup_batches: int
    min_window_s: float
    cooldown_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """A gang that is ready for trials."""

    report: LoadReport
    ranks: tuple[Rank, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Leased:
    """What a gang holds: known from its placement, before anything is loaded."""

    node: str
    """Stable host id, as the sampler of that node reports it."""
    hostname: str
    pid: int
    gpu_ids: tuple[str, ...]
    """As the scheduler names them: NVML indices or UUIDs; empty on the CPU."""


class Gang(Protocol):
    """One engine on its devices."""

    def lease(self) -> Call[Leased]:
        """Answered once the gang's process runs where it was placed."""
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

    def close(self, timeout_s: float) -> None:
        """Unload and end the gang's processes: politely within ``timeout_s``, then by force. Never raises."""
        ...

    def last_words(self) -> str | None:
        """End of the log of a gang that died, or None."""
        ...


class Sampler(Protocol):
    """The power sampler of one node."""

    def describe(self) -> Call[SamplerInfo]:
        """Answered when the sampler has calibrated and polls."""
        ...

    def fetch(self, after_seq: int) -> Call[list[SampleBatch]]:
        """All batches after ``after_seq``, up to now; those up to it are acknowledged and forgotten."""
        ...

    def close(self) -> None:
        """Stop polling and end its process. Never raises."""
        ...


class Executor(Protocol):
    """Where gangs and samplers run."""

    def start(self) -> None:
        """Reach or start the machine. Raises PlacementError within a deadline."""
        ...

    def gpus_free(self) -> int:
        """Whole GPUs that a gang could hold now."""
        ...

    def open_samplers(self, sources: Sequence[str] | str, sample_hz: float, epoch: int) -> tuple[Sampler, ...]:
        """Start one sampler per node; ``epoch`` counts restarts, from 1."""
        ...

    def open_gang(self, group: LoadGroup, base_dir: str, cache_dir: str) -> Gang:
        """Place a gang for the group.

        Raises:
            PlacementError: Its resources can never be met; names what is needed and what there is.
        """
        ...

    def facts(self) -> Mapping[str, str]:
        """For the environment record: executor name, Ray version, address."""
        ...

    def close(self) -> None:
        """End everything it started. Never raises."""
        ...
