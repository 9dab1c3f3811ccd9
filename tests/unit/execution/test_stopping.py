"""Which trials are run, skipped or waited for, as results come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llem_ray.config.sweep import load_sweep
from llem_ray.core.plan import Plan
from llem_ray.execution.stopping import Stopping
from llem_ray.planning.plan import make_plan
from llem_ray.results.journal import JournalState

SWEEP = """
schema_version: 1
name: one
base:
  model: {config: llama-tiny}
  engine: {backend: fake, device: cpu}
repeats: 8
stopping: {half_width_rel: 0.1}
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return make_plan(load_sweep(tmp_path / "sweep.yaml"))


def row(plan: Plan, repeat: int, value: float | None = 1.0, **more: Any) -> dict[str, Any]:
    trial = plan.trials[repeat]
    return {
        "trial_id": trial.trial_id,
        "cell_id": trial.cell.cell_id,
        "repeat": repeat,
        "attempt": 1,
        "status": "completed",
        "power_valid": True,
        "window_s": 10.0,
        "joules_per_output_token": value,
        **more,
    }


def test_the_first_are_run_whatever_is_known(plan: Plan) -> None:
    stopping = Stopping(plan)
    assert [stopping.ask(trial) for trial in plan.trials[:5]] == ["run"] * 5
    assert stopping.ask(plan.trials[5]) == "wait"


def test_a_resolved_cell_is_skipped(plan: Plan) -> None:
    stopping = Stopping(plan, [row(plan, repeat) for repeat in range(5)])
    assert {stopping.ask(trial) for trial in plan.trials[5:]} == {"skip"}


def test_one_that_is_not_resolved_goes_on(plan: Plan) -> None:
    stopping = Stopping(plan)
    for repeat, value in enumerate((1.0, 2.0, 1.5, 0.5, 1.0)):
        stopping.take(row(plan, repeat, value), final=False)
    assert {stopping.ask(trial) for trial in plan.trials[5:]} == {"run"}  # far more than 8 are needed: nothing to wait for


def test_a_result_is_waited_for_where_it_may_be_the_last(plan: Plan) -> None:
    """s0 = 0.0847, t = 2.776: N = floor((2.776 x 0.0847 / 0.1006)^2) + 1 = 6."""
    stopping = Stopping(plan)
    for repeat, value in enumerate((1.0, 1.1, 0.9, 1.08, 0.95)):
        stopping.take(row(plan, repeat, value), final=False)
    assert [stopping.ask(trial) for trial in plan.trials[5:7]] == ["run", "wait"]
    stopping.take(row(plan, 5), final=False)
    assert stopping.ask(plan.trials[6]) == "skip"


def test_one_of_the_first_that_is_late_is_not_replaced(plan: Plan) -> None:
    """After the wait has timed out the trial is run; N stays that of the first repeats by their numbers."""
    stopping = Stopping(plan, [row(plan, repeat) for repeat in (0, 1, 3, 4, 5)])
    assert [stopping.ask(trial) for trial in plan.trials[5:]] == ["wait"] * 3
    stopping.take(row(plan, 2, 2.0), final=False)
    assert {stopping.ask(trial) for trial in plan.trials[5:]} == {"run"}


def test_what_was_not_needed_is_open_again_when_a_retried_repeat_may_change_that(plan: Plan) -> None:
    rows = [row(plan, repeat) for repeat in (0, 1, 3, 4, 5)] + [row(plan, 2, None, status="failed")]
    names = [trial.trial_id for trial in plan.trials]
    state = JournalState(not_needed={names[6], names[7]}, given_up={names[2]: "hang"})
    stopping = Stopping(plan, rows, state.given_up)
    stopping.reopen(plan, state)
    assert state.not_needed == {names[6], names[7]}
    state.given_up.clear()
    Stopping(plan, rows, state.given_up).reopen(plan, state)
    assert state.not_needed == set()


def test_failures_count_once_they_are_final(plan: Plan) -> None:
    stopping = Stopping(plan, [row(plan, repeat) for repeat in range(4)])
    failed = row(plan, 4, None, status="failed")
    stopping.take(failed, final=False)
    assert stopping.ask(plan.trials[5]) == "wait"
    stopping.take(failed, final=True)
    assert stopping.ask(plan.trials[5]) == "run"
    stopping.take(row(plan, 5), final=False)
    assert stopping.ask(plan.trials[6]) == "skip"


def test_failures_of_earlier_sessions_are_known(plan: Plan) -> None:
    rows = [row(plan, repeat) for repeat in range(4)] + [row(plan, 4, None, status="failed")]
    assert Stopping(plan, rows).ask(plan.trials[5]) == "wait"
    assert Stopping(plan, rows, {plan.trials[4].trial_id}).ask(plan.trials[5]) == "run"
