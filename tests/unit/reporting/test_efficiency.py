"""The table of phases, FLOP, carbon and cost below a run's energies."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from llem_ray.reporting.efficiency import EFFICIENCY_COLUMNS, efficiency_table
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
    table = efficiency_table([(cell.label, cell.efficiency) for cell in summary.cells], summary.phase_methods, summary.currencies)
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


def test_all_of_it_fits_80_columns() -> None:
    text = render([row(1, 0, **PHASES, **WORK, **FOOTPRINT), row(8, 0)])
    for shown in ("0.0500", "0.500", "42.0", "1.50", "100", "0.05", "phase_time_regression", "cost in EUR"):
        assert shown in text
    assert max(map(len, text.splitlines())) <= 80


def test_energy_that_belongs_to_neither_phase_is_told() -> None:
    text = render([row(1, 0, **PHASES)])
    assert "25.0" in text
    assert "the time between steps." in text
    assert "all their tokens share" in render([row(1, 0, **{**PHASES, "phase_method": "phase_token_regression"})])


def test_columns_that_nobody_knows_are_left_out() -> None:
    text = render([row(1, 0, **WORK)])
    assert "MFU %" in text
    assert "prefill" not in text
    assert "Mtok" not in text
    assert render([row(1, 0)]) == ""


def test_the_columns_exist() -> None:
    assert set(EFFICIENCY_COLUMNS) <= set(SCHEMAS["trials"].names)
