"""How far a run is, read from its directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llem_ray.core.errors import ResultsError
from llem_ray.core.measure_spec import StoppingSpec
from llem_ray.core.progress import format_setting
from llem_ray.results.reader import settled_state
from llem_ray.results.rundir import RunDirectory


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """A run at one instant."""

    name: str
    path: str
    total: int
    """Trials of the plan, without those that turned out to be not needed."""
    done: int
    failed: int
    """Trials that failed for good."""
    left: int
    """Trials that are still to do, those that run now included."""
    at_most: bool
    """Of those that are left some may turn out to be not needed."""
    running: bool
    """Some process works on it."""
    measuring: str | None
    """Settings of the trial that runs now, and its repeat; None between trials."""
    pid: int | None
    """Process that works on it."""
    host: str | None
    """Host name of that process."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """What a run's plan says of its trials."""

    trials: Mapping[str, str]
    """Trial -> its settings and repeat."""
    stopping: StoppingSpec
    """The run's target."""
    repeats: int | None
    """What a cell gets at most; None before the plan is written down."""
    cells: int


def read_status(rundir: RunDirectory, planned: Planned | None = None) -> RunStatus:
    """The run's status now. Takes no lock.

    Args:
        rundir: The run.
        planned: What ``read_planned`` gave for it, to look at a run again and again.

    Raises:
        ResultsError: The directory is damaged.
    """
    planned = planned if planned is not None and planned.trials else read_planned(rundir)
    trials = planned.trials
    running, holder = rundir.is_locked(), rundir.holder()
    # While a run goes on its journal is up to date; of a killed one, the rows that are there count as well.
    state = rundir.replay() if running else settled_state(rundir)
    done = len(trials.keys() & state.done.keys())
    failed = len(trials.keys() & state.given_up.keys())
    total = len(trials) - len(trials.keys() & state.not_needed)
    open_trials = [trial_id for trial_id in state.open_attempts if trial_id in trials]
    left = total - done - failed
    return RunStatus(
        name=rundir.name,
        path=str(rundir.path),
        total=total,
        done=done,
        failed=failed,
        left=left,
        at_most=left > 0 and planned.stopping.half_width_rel is not None,
        running=running,
        measuring=trials[open_trials[-1]] if running and open_trials else None,
        pid=holder[0] if holder else None,
        host=holder[1] if holder else None,
    )


def read_planned(rundir: RunDirectory) -> Planned:
    """What a run's plan says; no trials and no target before it is written down.

    Raises:
        ResultsError: The plan is damaged.
    """
    if not rundir.has_json("plan"):
        return Planned(trials={}, stopping=StoppingSpec(), repeats=None, cells=0)
    plan = rundir.read_json("plan")
    try:
        labels = {cell_id: _label(cell["settings"]) for cell_id, cell in plan["cells"].items()}
        trials = {
            trial["trial_id"]: f"{labels[trial['cell_id']]} repeat={trial['repeat']}".strip()
            for group in plan["groups"]
            for trial in group["trials"]
        }
        stopping = StoppingSpec(**plan.get("stopping", {}))
        return Planned(trials=trials, stopping=stopping, repeats=int(plan["repeats"]), cells=len(labels))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ResultsError(f"{rundir.path / 'plan.json'} is not a plan: {problem}", "it was changed from outside") from error


def _label(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{key.rpartition('.')[2]}={format_setting(value)}" for key, value in settings.items())
