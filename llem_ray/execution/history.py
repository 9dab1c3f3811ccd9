"""What earlier runs of a sweep cost, for a plan's estimate."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from llem_ray.core.errors import ResultsError
from llem_ray.planning.estimate import PastRun
from llem_ray.results.reader import read_table
from llem_ray.results.rundir import list_runs

_OF_A_TRIAL = frozenset({"warmup", "guard", "measured", "cooldown", "gap"})


def find_past_run(results_dir: Path, sweep_name: str) -> PastRun | None:
    """The newest run of a sweep of that name that completed a trial, or None.

    A run that cannot be read is passed over: an estimate is not worth an error.
    """
    try:
        runs = list_runs(results_dir)
    except OSError:
        return None
    name = re.compile(re.escape(sweep_name) + r"-[0-9a-f]{8}(-[0-9]+)?")
    for path in reversed(runs):
        if not name.fullmatch(path.name):
            continue
        try:
            past = _read_past(path)
        except (ResultsError, OSError):
            continue
        if past is not None:
            return past
    return None


def _read_past(path: Path) -> PastRun | None:
    columns = ["trial_id", "cell_id", "status", "gpus", "total_energy_j", "window_s"]
    done = [row for row in read_table(path, "trials", columns).to_pylist() if row["status"] == "completed"]
    if not done:
        return None
    cells = {row["trial_id"]: row["cell_id"] for row in done}
    spans = {
        (row["phase"], row["trial_id"], row["begin_ns"]): row["duration_s"]
        for row in read_table(path, "phases", ["phase", "trial_id", "begin_ns", "duration_s"]).to_pylist()
    }
    loads_s = [duration_s for (phase, _, _), duration_s in spans.items() if phase == "load"]
    trials_s: dict[str, float] = defaultdict(float)
    for (phase, trial_id, _), duration_s in spans.items():
        if phase in _OF_A_TRIAL and trial_id in cells:
            trials_s[trial_id] += duration_s
    by_cell: dict[str, list[float]] = defaultdict(list)
    for trial_id, duration_s in trials_s.items():
        by_cell[cells[trial_id]].append(duration_s)
    measured = [row for row in done if row["total_energy_j"] is not None]
    window_s = sum(row["window_s"] for row in measured)
    return PastRun(
        name=path.name,
        seconds_per_load=_mean(loads_s),
        seconds_per_trial=_mean(list(trials_s.values())),
        cell_seconds={cell: sum(times) / len(times) for cell, times in by_cell.items()},
        mean_power_w=sum(row["total_energy_j"] for row in measured) / window_s if window_s else None,
        gpus=max(row["gpus"] for row in done),
    )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
