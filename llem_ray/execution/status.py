"""How far a run is, read from its directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llem_ray.core.errors import ResultsError
from llem_ray.core.spec import StoppingSpec
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


def read_status(rundir: RunDirectory, planned: Mapping[str, str] | None = None) -> RunStatus:
    """The run's status now. Takes no lock.

    Args:
        rundir: The run.
        planned: What ``planned_trials`` gave for it, to look at a run again and again.

    Raises:
        ResultsError: The directory is damaged.
    """
    trials = planned or planned_trials(rundir)
    running, holder = rundir.is_locked(), rundir.holder()
    # While a run goes on its journal is up to date; of a killed one, the rows that are there count as well.
    state = rundir.replay() if running else settled_state(rundir)
    done = len(trials.keys() & state.done.keys())
    failed = len(trials.keys() & state.given_up.keys())
    total = len(trials) - len(trials.keys() & state.not_needed)
    open_trials = [trial_id for trial_id in state.open_attempts if trial_id in trials]
    return RunStatus(
        name=rundir.name,
        path=str(rundir.path),
        total=total,
        done=done,
        failed=failed,
        left=total - done - failed,
        running=running,
        measuring=trials[open_trials[-1]] if running and open_trials else None,
        pid=holder[0] if holder else None,
        host=holder[1] if holder else None,
    )


def planned_target(rundir: RunDirectory) -> tuple[StoppingSpec, int | None, int | None]:
    """The run's target, what a cell gets at most, and the number of cells; no target before the plan is written down.

    Raises:
        ResultsError: The plan is damaged.
    """
    if not rundir.has_json("plan"):
        return StoppingSpec(), None, None
    plan = rundir.read_json("plan")
    try:
        return StoppingSpec(**plan.get("stopping", {})), int(plan["repeats"]), len(plan["cells"])
    except (KeyError, TypeError, ValueError) as error:
        raise ResultsError(f"the plan of {rundir.path} is damaged: {type(error).__name__}: {error}") from error


def planned_trials(rundir: RunDirectory) -> dict[str, str]:
    """Trial -> its settings and repeat, of every trial of the plan; none before the plan is written down.

    Raises:
        ResultsError: The plan is damaged.
    """
    if not rundir.has_json("plan"):
        return {}
    plan = rundir.read_json("plan")
    try:
        labels = {cell_id: _label(cell["settings"]) for cell_id, cell in plan["cells"].items()}
        return {
            trial["trial_id"]: f"{labels[trial['cell_id']]} repeat={trial['repeat']}".strip()
            for group in plan["groups"]
            for trial in group["trials"]
        }
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ResultsError(f"{rundir.path / 'plan.json'} is not a plan: {problem}", "it was changed from outside") from error


def _label(settings: Mapping[str, Any]) -> str:
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())
