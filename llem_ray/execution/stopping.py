"""Which trials are still needed: results of a run's repeats, as they come in."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final, Literal

from llem_ray.core.plan import Plan, Trial
from llem_ray.energy.stopping import Repeat, judge, metric_value

RESULT_COLUMNS: Final = ("trial_id", "cell_id", "repeat", "attempt", "status", "power_valid", "window_s")


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
        """Whether a trial is to be run; ``wait`` while results of its cell's earlier repeats may still settle that."""
        if not self.has_target or trial.repeat < self._spec.first:
            return "run"
        with self._lock:
            known = self._results.get(trial.cell.cell_id, {})
            earlier = [known[number] for number in sorted(known) if number < trial.repeat]
        verdict = judge(earlier, self._spec)
        if verdict.ended is not None:
            return "skip"
        missing = len(earlier) < trial.repeat
        return "wait" if missing else "run"
