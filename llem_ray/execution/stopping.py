"""Which trials are still needed: results of a run's repeats, as they come in."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final, Literal

from llem_ray.core.plan import Plan, Trial
from llem_ray.energy.stopping import Repeat, is_surely_needed, judge, metric_value
from llem_ray.results.journal import JournalState
from llem_ray.results.reader import read_table
from llem_ray.results.rundir import RunDirectory

RESULT_COLUMNS: Final = ("trial_id", "cell_id", "repeat", "attempt", "status", "power_valid", "invalid_reasons", "window_s")


class Stopping:
    """Answers from any thread. Results may come late: what a trial's energy was is known once its samples are there.

    Args:
        plan: The plan, with its target.
        rows: Rows of ``trials`` of earlier sessions, in order: ``RESULT_COLUMNS`` and the target's metric.
        given_up: Trials that failed for good in these.
    """

    def __init__(self, plan: Plan, rows: Iterable[Mapping[str, Any]] = (), given_up: Collection[str] = ()) -> None:
        self._spec = plan.stopping
        self._lock = threading.Lock()
        self._results: dict[str, dict[int, Repeat]] = {}
        for row in rows:
            self.take(row, final=row["trial_id"] in given_up)

    @property
    def has_target(self) -> bool:
        """Some trials may turn out to be not needed."""
        return self._spec.half_width_rel is not None

    def take(self, row: Mapping[str, Any], *, final: bool) -> None:
        """A row of ``trials`` was made.

        Args:
            row: The row.
            final: It failed, and is not tried again.
        """
        if row["status"] == "failed" and not final:
            return
        value = metric_value(row, self._spec.metric)
        with self._lock:
            cell = self._results.setdefault(row["cell_id"], {})
            cell[row["repeat"]] = Repeat(value=value, window_s=row.get("window_s") or 0.0)

    def ask(self, trial: Trial) -> Literal["run", "skip", "wait"]:
        """Whether a trial is to be run; ``wait`` while results of its cell's earlier repeats may still settle that.

        Later repeats do not matter: a trial that is asked about again, as another one of its cell was retried, gets the same
        answer to the same results.
        """
        if not self.has_target or trial.repeat < self._spec.first:
            return "run"
        with self._lock:
            known = self._results.get(trial.cell.cell_id, {})
            earlier = {number: repeat for number, repeat in known.items() if number < trial.repeat}
        if judge(earlier, self._spec).ended is not None:
            return "skip"
        missing = trial.repeat - len(earlier)
        return "run" if not missing or is_surely_needed(earlier, missing, self._spec) else "wait"

    def reopen(self, plan: Plan, state: JournalState) -> None:
        """Trials that were not needed are open again where what is known now does not say so.

        That is so once a repeat that failed for good is tried again: with its value among the first ones a cell may need more.
        """
        for trial in plan.trials:
            if trial.trial_id in state.not_needed and self.ask(trial) != "skip":
                state.not_needed.discard(trial.trial_id)


def known_so_far(plan: Plan, rundir: RunDirectory, state: JournalState) -> Stopping:
    """What earlier sessions of a run found.

    Args:
        plan: Its plan.
        rundir: Where its rows are.
        state: What its journal says; trials that are not needed after all are open again in it.

    Raises:
        ResultsError: The rows cannot be read.
    """
    if plan.stopping.half_width_rel is None:
        return Stopping(plan)
    rows = read_table(rundir.path, "trials", columns=[*RESULT_COLUMNS, plan.stopping.metric]).to_pylist()
    stopping = Stopping(plan, sorted(rows, key=lambda row: row["attempt"]), state.given_up)
    stopping.reopen(plan, state)
    return stopping
