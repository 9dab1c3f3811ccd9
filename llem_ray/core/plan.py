"""What will run, in which order, on what. Made by ``planning``, run by ``execution``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llem_ray.core.measure_spec import FootprintSpec, MeasureSpec, StoppingSpec
from llem_ray.core.spec import Cell, DroppedCell, Experiment, Order


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One repeat of one cell. The unit that is run, retried and recorded."""

    trial_id: str
    """``<cell_id>-r<repeat>``."""
    cell: Cell
    repeat: int
    """0-based."""

    @property
    def experiment(self) -> Experiment:
        """The cell's experiment."""
        return self.cell.experiment


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadGroup:
    """Trials that share one loaded model, in run order. Served by one gang."""

    load_key: str
    """Hash of backend, model, parallelism, engine args and whether it serves online (16 hex digits)."""
    trials: tuple[Trial, ...]
    gpus: int
    """Whole GPUs its gang holds; 0 on the CPU."""

    @property
    def experiment(self) -> Experiment:
        """An experiment of the group; all agree in ``model`` and ``engine``."""
        return self.trials[0].experiment

    @property
    def online(self) -> bool:
        """Its trials send requests one by one; all of them, or none."""
        return self.experiment.workload.load.online


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a plan is expected to cost. A missing part is None with the reason in ``unknown``."""

    duration_s: float | None
    energy_kwh: float | None
    unknown: Mapping[str, str]
    """Field name -> why it is not known."""
    basis: str
    """Where the numbers come from: ``past run NAME``, ``configured rates``, ``nothing``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The very object that ``plan`` prints and ``submit`` runs."""

    name: str
    run_hash: str
    """Hash of the resolved sweep (8 hex digits); with ``name`` the run's identity."""
    groups: tuple[LoadGroup, ...]
    dropped: tuple[DroppedCell, ...]
    repeats: int
    order: Order
    seed: int
    measure: MeasureSpec
    estimate: Estimate
    base_dir: str
    stopping: StoppingSpec = field(default_factory=StoppingSpec)
    """With a target, ``repeats`` is what a cell gets at most."""
    footprint: FootprintSpec = field(default_factory=FootprintSpec)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All trials in run order, group after group."""
        return tuple(trial for group in self.groups for trial in group.trials)

    @property
    def run_name(self) -> str:
        """``<name>-<run_hash>``: the run directory's name."""
        return f"{self.name}-{self.run_hash}"
