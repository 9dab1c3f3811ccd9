"""The table of phases, FLOP, carbon and cost below a run's energies."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from llem_ray.reporting.efficiency import EFFICIENCY_COLUMNS, efficiency_table
from llem_ray.reporting.intervals import Uncertain
from llem_ray.reporting.summary import summarise_run
from llem_ray.results.schema import SCHEMAS


def row(batch: int, repeat: int, **more: Any) -> dict[str, Any]:
    return {
        "cell_id": f"c{batch}",
        "trial_id": f"c{batch}-r{repeat}",
        "repeat": repeat,
        "status": "completed",
        "settings": json.dumps({"workload.batch_size": batch}),
        "prompt_tokens": 1000,
        "output_tokens": 200,
        **more,
    }


PHASES = {
    "prefill_energy_j": 50.0,
    "decode_energy_j": 100.0,
    "phase_rest_energy_j": 50.0,
    "total_energy_j": 200.0,
    "phase_method": "phase_time_regression",
}
WORK = {"mfu": 0.42, "joules_per_flop": 1.5e-12}
FOOTPRINT = {"carbon_g": 0.02, "energy_cost": 0.00001, "currency": "EUR"}


def render(rows: list[dict[str, Any]]) -> str:
    summary = summarise_run("run", rows)
    cells = [(cell.label, cell.efficiency, cell.efficiency_intervals) for cell in summary.cells]
    table = efficiency_table(cells, summary.phase_methods, summary.currencies, summary.phase_residual_rel, summary.phase_reasons)
    if table is None:
        return ""
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_values_are_means_over_trials() -> None:
    (cell,) = summarise_run("run", [row(1, 0, **PHASES), row(1, 1, **{**PHASES, "prefill_energy_j": 150.0})]).cells
    assert cell.efficiency["prefill_joules_per_prompt_token"] == pytest.approx(0.1)
    assert cell.efficiency["decode_joules_per_output_token"] == pytest.approx(0.5)
    assert cell.efficiency["mfu"] is None


def test_costs_in_several_currencies_have_no_mean() -> None:
    """A run may be resumed with other inputs of footprint."""
    rows = [row(1, 0, **FOOTPRINT), row(1, 1, **FOOTPRINT | {"currency": "USD"}), row(8, 0, **FOOTPRINT), row(8, 1)]
    mixed, one = summarise_run("run", rows).cells
    assert mixed.efficiency["cost_per_million_output_tokens"] is None
    assert mixed.efficiency["carbon_g_per_million_output_tokens"] == pytest.approx(100.0)
    assert one.efficiency["cost_per_million_output_tokens"] == pytest.approx(0.05)


def test_phases_have_intervals_over_repeats_or_by_the_fit_of_a_single_one() -> None:
    fitted = {**PHASES, "prefill_energy_u_j": 2.0, "decode_energy_u_j": 5.0, "phase_residual_rel": 0.034}
    (cell,) = summarise_run("run", [row(1, 0, **fitted)]).cells
    single = cell.efficiency_intervals["prefill_joules_per_prompt_token"]
    assert single == Uncertain(mean=pytest.approx(0.05), half_width=pytest.approx(0.004), n=1, kind="U")
    text = " ".join(render([row(1, 0, **fitted)]).split())
    assert "50.0 ±4.0 500 ±50" in text
    assert "which leaves up to 3.4 % of a tick's energy" in text
    assert "± of prefill and decode is 2 sigma of the fit of a single repeat." in text
    rows = [row(1, n, **{**fitted, "decode_energy_j": energy_j}) for n, energy_j in enumerate((100.0, 104.0, 108.0))]
    (cell,) = summarise_run("run", rows).cells
    # per output token 0.50, 0.52, 0.54: 4.302653 x 0.02 / sqrt(3)
    spread = cell.efficiency_intervals["decode_joules_per_output_token"]
    assert spread == Uncertain(mean=pytest.approx(0.52), half_width=pytest.approx(0.0496827, rel=1e-5), n=3, kind="t95")
    assert "520 ±50" in render(rows)


def test_a_fit_that_is_all_too_good_leaves_room_for_the_label() -> None:
    sharp = {**PHASES, "prefill_energy_u_j": 1e-6, "decode_energy_u_j": 1e-6, "prefill_energy_j": 0.437801}
    text = render([row(1, 0, **sharp, **WORK, **FOOTPRINT), row(8, 0, **sharp)])
    assert "batch_size=1 " in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_all_of_it_fits_80_columns() -> None:
    text = render([row(1, 0, **PHASES, **WORK, **FOOTPRINT), row(8, 0)])
    for shown in ("50.0", "500", "42.0", "1.50", "100", "0.05", "phase_time_regression", "cost in EUR"):
        assert shown in text
    assert max(map(len, text.splitlines())) <= 80


def test_energy_that_belongs_to_neither_phase_is_told() -> None:
    text = render([row(1, 0, **PHASES)])
    assert "25.0" in text
    assert "the time between steps." in text
    assert "all their tokens share" in render([row(1, 0, **{**PHASES, "phase_method": "phase_token_regression"})])


def test_why_phases_are_not_told_apart() -> None:
    rows = [row(1, 0, **WORK, power_valid=True, phase_reason="a"), row(1, 1, **WORK, power_valid=True, phase_reason="b")]
    rows.append(row(1, 2, **WORK, power_valid=False, phase_reason="no measured energy"))
    shown = " ".join(render(rows).split())
    assert "Prefill and decode are not told apart: a; 1 other reason in phase_reason." in shown
    assert "are not told apart everywhere: a." in " ".join(render([rows[0], row(8, 0, **PHASES, power_valid=True)]).split())
    assert "told apart" not in render([row(1, 0, **WORK, power_valid=True)])


def test_columns_that_nobody_knows_are_left_out() -> None:
    text = render([row(1, 0, **WORK)])
    assert "MFU %" in text
    assert "prefill" not in text
    assert "Mtok" not in text
    assert render([row(1, 0)]) == ""


def test_the_columns_exist() -> None:
    assert set(EFFICIENCY_COLUMNS) <= set(SCHEMAS["trials"].names)
