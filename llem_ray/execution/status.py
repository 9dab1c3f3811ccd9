"""How far a run is, read from its directory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llem_ray.results.rundir import RunDirectory


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """A run at one instant."""

    name: str
    path: str
    total: int
    """Trials of the plan."""
    done: int
    failed: int
    """Trials that failed for good."""
    left: int
    """Trials that are still to do."""
    running: bool
    pid: int | None
    """Process that works on it."""
    host: str | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def read_status(rundir: RunDirectory) -> RunStatus:
    """The run's status now.

    Raises:
        ResultsError: The directory is damaged.
    """
    plan = rundir.read_json("plan")
    state = rundir.replay()
    trials = {trial["trial_id"] for group in plan["groups"] for trial in group["trials"]}
    holder = rundir.holder()
    done = len(trials & state.done.keys())
    failed = len(trials & state.given_up.keys())
    return RunStatus(
        name=rundir.name,
        path=str(rundir.path),
        total=len(trials),
        done=done,
        failed=failed,
        left=len(trials) - done - failed,
        running=holder is not None,
        pid=holder[0] if holder else None,
        host=holder[1] if holder else None,
    )
